"""Chat templates that could run away, rendered where they can be cut: 1 s of processor time, 64 MB.

A template comes with a model, from strangers. transformers' sandbox (Jinja's, immutable) keeps it from files
and code but not from nested loops or strings that double
(https://jinja.palletsprojects.com/en/stable/sandbox/ says so itself). Templates that plainly cannot (`plain`:
one level of loops, no arithmetic that grows, no macros) are rendered in place; any other in a fork of one
child process, by transformers' own renderer, so what it says is the same. The limits are the kernel's:
ITIMER_VIRTUAL counts the fork's own time, so a busy machine cuts nobody, and RLIMIT_AS its memory.

It does not know tokenizers. Why not a counting sandbox: there are too many ways to double a string.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock
from typing import Any

from luthier.errors import ModelError

SECONDS = 1.0
BYTES = 64 * 1024 * 1024
PAGE = os.sysconf("SC_PAGE_SIZE")
FILTERS = frozenset({"trim", "tojson", "length", "upper", "lower", "first", "last", "default", "string"})
METHODS = frozenset({"strip", "lstrip", "rstrip", "startswith", "endswith", "get", "raise_exception"})


class Refused(ModelError):
    """The template does not take this conversation. It is the conversation that must change: a 400."""

    http_code = 400
    param, code = "messages", "invalid_value"

    def __init__(self, said: str, where: str | None = None) -> None:
        super().__init__(
            f"the chat template refuses this conversation: {said}",
            where=where,
            hint="write it in the order of turns that the model's own template knows",
        )
        self.said = said


class Cut(ModelError):
    """The template took more than it may."""


@functools.lru_cache(maxsize=64)
def plain(chat_template: str) -> bool:
    """Whether its work is bounded by the conversation's own length, told from its syntax alone."""
    from jinja2 import Environment, TemplateError, nodes

    grows = (
        nodes.Mul, nodes.Pow, nodes.Mod, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock,
        nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block,
    )  # fmt: skip
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False).parse(chat_template)
    except TemplateError:
        return False
    if any(next(tree.find_all(kind), None) is not None for kind in grows):
        return False
    sums = (nodes.Add, nodes.Concat, nodes.For)
    if any(next(node.find_all(sums), None) is not None for node in tree.find_all(nodes.Assign)):
        return False
    if any(next(loop.find_all(nodes.For), None) for loop in tree.find_all(nodes.For)):
        return False
    if any(loop.recursive or next(loop.iter.find_all(nodes.Call), None) for loop in tree.find_all(nodes.For)):
        return False
    if any(node.name not in FILTERS for node in tree.find_all(nodes.Filter)):
        return False
    return all(_name(call.node) in METHODS for call in tree.find_all(nodes.Call))


def _name(node: Any) -> str | None:
    return getattr(node, "attr", None) or getattr(node, "name", None)


class Renderer:
    """One child that renders for the whole process; one that ended is replaced when it is next needed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def render(self, chat_template: str, values: Mapping[str, Any]) -> str:
        """The rendered text; `Refused` where the template does, `Cut` where it runs away."""
        asked = json.dumps([chat_template, dict(values)]).encode("utf-8") + b"\n"
        with self._lock:
            child = self._ready()
            assert child.stdin is not None and child.stdout is not None
            try:
                child.stdin.write(asked)
                child.stdin.flush()
                answer = child.stdout.readline()
            except BrokenPipeError:
                answer = b""
            if not answer.endswith(b"\n"):
                child.kill()
                child.wait()
                self._child = None
                raise ModelError(
                    "the process that renders chat templates ended; the next request gets another"
                )
        found = json.loads(answer)
        if "cut" in found:
            raise Cut(f"the chat template takes more than {SECONDS:g} s or {BYTES >> 20} MB")
        if "error" in found:
            raise Refused(str(found["error"]))
        return str(found["text"])

    def _ready(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            # Nothing of torch is needed; without it the child is a tenth of the size.
            environment = {**os.environ, "USE_TORCH": "0", "USE_TF": "0", "USE_FLAX": "0"}
            self._child = subprocess.Popen(
                [sys.executable, "-m", "luthier.rendering"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        return self._child


RENDERER = Renderer()


def _serve() -> None:
    """The child: a line in, a line out. Each is rendered by a fork of its own: a cut costs no new start."""
    from transformers.utils.chat_template_utils import render_jinja_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for line in sys.stdin.buffer:
        fork = os.fork()
        if fork == 0:
            _answer(render_jinja_template, line)
        _, status = os.waitpid(fork, 0)
        if not status:
            _keep(line)
        else:
            sys.stdout.buffer.write(b'{"cut": true}\n')
            sys.stdout.buffer.flush()


def _keep(line: bytes) -> None:
    """Compile here what a fork could compile within the limits, so that the next fork need not."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    with suppress(TemplateError, ArithmeticError, ValueError, TypeError, RecursionError):
        _compile_jinja_template(json.loads(line)[0])


def _answer(render: Callable[..., Any], line: bytes) -> None:
    """The fork: render under the limits, answer, and end."""
    code = 1
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            size = int(statm.read().split()[0]) * PAGE
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)  # its signal ends a process that does not expect it
        chat_template, values = json.loads(line)
        try:
            answer = {"text": render(chat_template=chat_template, **values)[0][0]}
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary to a stranger's template
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            answer = {"error": said[:500]}
        data = json.dumps(answer).encode("ascii") + b"\n"
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
