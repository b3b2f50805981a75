"""How much one server takes on at once, how much it has taken on, and the error that says it is full.

RFC 6585 §4 (429 Too Many Requests) and RFC 9110 §10.2.3 (Retry-After) are the source of `Busy`.
It does not know keys or tenants: the limits here are the whole server's.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import ServeError

# What one request may ask for, whatever the server's size; checked before any work is done for it.
MESSAGES = 2048
PARTS = 1024  # of one message
NESTS = 50_000  # lists and objects of one body, or as many brackets in its texts
CHOICES = 8
PROMPTS = 2048  # answers of one request for completions; OpenAI's bound for prompts
PROMPTS_TOKENS = 1 << 20  # that they read and may write in all
INPUTS, INPUTS_TOKENS = 2048, 300_000  # OpenAI's for embeddings
STOPS = 4
STOP_CHARACTERS = 256
TOP_LOGPROBS = 20
BIASES = 1024
TOOLS = 128
TOOLS_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """`active` answers grow in turn, token by token; `waiting` more may queue; the next gets a 429. In a
    rush, which begins at half a queue, only those get in whose first token can be expected within `first_s`
    or so (`serving.desk`)."""

    active: int = 16
    waiting: int = 32
    first_s: float = 0.4
    adapters: int = 32
    bases: int = 2
    default_tokens: int = 256
    body_bytes: int = 4 * 1024 * 1024
    grace_s: float = 20.0
    cached: int = 0  # answers that are kept to be given again
    chunk_tokens: int = 128
    cache_bytes: int = 1 << 30


DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Counts:
    """What an engine has to do: answers that grow or wait, and the cache's blocks: all there are, those that
    somebody holds, and of the full ones how many were found again and how many were computed since it
    started. `turns` grows as long as the engine gets on."""

    active: int
    waiting: int
    blocks: int = 0
    held_blocks: int = 0
    found_blocks: int = 0
    filled_blocks: int = 0
    turns: int = 0


class Busy(ServeError):
    """The queue is full; the same request may succeed `retry_after_s` from now."""

    http_code = 429
    retry_after_s = 1


def busy(waiting: int, retry_after_s: int) -> Busy:
    what = f"the server is full: {waiting} requests wait for their turn already"
    error = Busy(what, hint=f"try again in {retry_after_s} s")
    error.retry_after_s = retry_after_s
    return error
