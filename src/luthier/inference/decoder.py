"""Answers that grow together: every step a token for each, and a piece of the prompts still to be read.

Sources: iteration-level scheduling (Orca, Yu et al., OSDI 2022); prompts in chunks beside decoding rows
(Sarathi-Serve, Agrawal et al. 2024, arXiv 2403.02310); paged cache and pre-emption by recomputation (Kwon et
al. 2023, arXiv 2309.06180). Sequences under different adapters, or none, share a step.

Sequences are taken in as they come. One that finds no block free gives up those of the youngest, which is
read again later from where its tokens are still known; none is ever lost, and what it says stays the same.
What begins alike under the same weights is computed once (`inference.pages`).

It does not know text, templates, queues of tenants or clocks. One thread owns a `Decoder`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from luthier.errors import LuthierError, ModelError
from luthier.inference import adapters, pages, stack
from luthier.inference.decode import largest
from luthier.inference.growing import ROOM, AnswerFailed, Ended, Growing, Grown, Read, Room
from luthier.inference.pages import BLOCK, Pool
from luthier.inference.sampling import Chooser, Chosen, Sampling, likeliest
from luthier.inference.schedule import lay, readers

Progress = Callable[[int, int], None]
log = logging.getLogger("luthier.engine")


class Decoder:
    """A base model in memory, the adapters beside it, and every answer that grows from them."""

    def __init__(self, model: Any, base_digest: str, room: Room = ROOM, int8: bool = False) -> None:
        config = model.config.get_text_config()
        self.context = int(config.max_position_embeddings)
        self.room = room
        self._base_digest = base_digest
        blocks = _blocks(config, model.dtype.itemsize, room)
        self._answering = stack.ready(model, blocks, room.adapters, int8)
        self.pool = Pool(blocks)
        self._slots: dict[str, int] = {}
        self._free_slots = list(range(room.adapters, 0, -1))
        self._running: list[Growing] = []  # the longest here first
        self._waiting: deque[Growing] = deque()
        self._lost: list[Grown] = []

    @classmethod
    def load(
        cls, base: Path, digest: str, room: Room = ROOM, threads: int | None = None, int8: bool = False
    ) -> Decoder:
        """A base from its folder; with `int8` its layers' weights are rounded to 8 bits."""
        if threads is not None:
            torch.set_num_threads(threads)
        transformers_logging.disable_progress_bar()
        if not any(base.glob("*.safetensors")):
            raise ModelError(
                "no safetensors weights here", where=str(base), hint="only safetensors are loaded"
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype="auto", attn_implementation="sdpa", local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"transformers cannot load this base model: {error}", where=str(base)) from error
        return cls(model, digest, room, int8)

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._slots)

    @property
    def longest(self) -> int:
        """The most tokens that one sequence can come to."""
        return min(self.context, self.pool.blocks * BLOCK)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting or self._lost)

    def add(self, adapter_digest: str, folder: Path) -> None:
        """Lay an adapter beside the others. Refused whole, and without a trace, if anything is amiss."""
        if adapter_digest in self._slots:
            return
        if not self._free_slots:
            raise ModelError(f"{self.room.adapters} adapters are loaded already", hint="drop one first")
        slot = self._free_slots[-1]
        try:
            self._answering.put(slot, adapters.read(folder, self._answering.layers))
        except ModelError as error:
            raise ModelError(
                f"the adapter does not fit this base: {error.what}", where=error.where or str(folder),
                hint=error.hint or "load it over the base it was trained on",
            ) from error  # fmt: skip
        self._free_slots.pop()
        self._slots[adapter_digest] = slot

    def drop(self, adapter_digest: str) -> None:
        """Take an adapter out; sequences that grow under it end in an error."""
        slot = self._slots.pop(adapter_digest, None)
        if slot is None:
            return
        for row in [row for row in (*self._running, *self._waiting) if row.adapter == adapter_digest]:
            self.cancel(row)
            self._lost.append(Grown(row, error=_not_loaded(adapter_digest)))
        self._answering.put(slot, None)
        self._free_slots.append(slot)

    def begin(
        self,
        prompt_ids: Sequence[int],
        chooser: Chooser,
        adapter: str | None = None,
        stop_ids: frozenset[int] = frozenset(),
        score: bool = False,
        pool: bool = False,
    ) -> Growing:
        """Queue a sequence. `score` asks for the prompt's own log-probabilities too, `pool` for its sum of
        last hidden states."""
        if not prompt_ids:
            raise ModelError("an empty prompt has no next token")
        if adapter is not None and adapter not in self._slots:
            raise _not_loaded(adapter)
        wanted = len(prompt_ids) + chooser.sampling.max_new_tokens
        if wanted > self.longest:
            raise ModelError(f"{wanted} tokens do not fit: a sequence can come to {self.longest} here")
        row = Growing(list(prompt_ids), adapter, chooser, stop_ids, len(prompt_ids), score)
        row.pooled = torch.zeros(()) if pool else None
        self._waiting.append(row)
        return row

    def cancel(self, row: Growing) -> None:
        """No more of it; its blocks are free at once. A sequence that has ended is left as it is."""
        if row in self._running:
            self._running.remove(row)
        elif row in self._waiting:
            self._waiting.remove(row)
        self._release(row)

    def step(self) -> list[Grown]:
        """One forward for all that grow; what it brought, in no order that means anything."""
        lost, self._lost = self._lost, []
        self._admit()
        some = self._some()
        if not some:
            return lost
        some.sort(key=lambda one: self._slot(one[0]))  # those under one adapter beside each other
        try:
            return lost + self._compute(some)
        except Exception:
            log.exception("a step of %d sequences failed; each is tried alone", len(some))
        found = lost
        for row, count in some:
            try:
                found += self._compute([(row, count)])
            except Exception as error:
                log.exception("this one fails alone too")
                found.append(self._fail(row, error))
        return found

    def _compute(self, some: Sequence[tuple[Growing, int]]) -> list[Grown]:
        """Whole, or not at all: what may fail for all comes before anything changes."""
        ids_T, laid = lay([(row, count, self._slot(row)) for row, count in some])
        hidden_T_E = self._answering.hidden(ids_T, laid)
        ends = list(accumulate(count for _, count in some))
        asking = [
            (row, end - 1)
            for (row, count), end in zip(some, ends, strict=True)
            if row.left == count and row.chooser.sampling.max_new_tokens > 0
        ]
        logits_B_V = self._answering.logits(hidden_T_E[[at for _, at in asking]]) if asking else None
        found: list[Grown] = []
        for (row, count), end in zip(some, ends, strict=True):
            self._hear(row, hidden_T_E[end - count : end])
            row.read += count
            self._name(row)
            if not row.left and row.chooser.sampling.max_new_tokens == 0:
                found.append(self._grown(row, None))
        return found if logits_B_V is None else found + self._choose([row for row, _ in asking], logits_B_V)

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        adapter: str | None,
        stop_ids: frozenset[int],
        tell: Progress | None = None,
    ) -> list[list[int]]:
        """The answers to many prompts, each with its stop token unless it ran out of room."""
        rows = [self.begin(prompt, Chooser(sampling), adapter, stop_ids) for prompt in prompts]
        done, left = 0, set(map(id, rows))
        while left:
            for grown in self.step():
                if grown.error is not None:
                    raise grown.error
                if grown.ended is not None and id(grown.row) in left:
                    left.discard(id(grown.row))
                    done += 1
                    if tell is not None:
                        tell(done, len(rows))
        return [row.ids[row.prompt :] for row in rows]

    def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        """One answer token by token; a stop token is the last one. Leaving the loop cancels the rest."""
        row = self.begin(prompt_ids, Chooser(sampling), adapter, stop_ids)
        try:
            while True:
                for grown in (grown for grown in self.step() if grown.row is row):
                    if grown.error is not None:
                        raise grown.error
                    if grown.chosen is not None:
                        yield grown.chosen.token
                    if grown.ended is not None:
                        return
        finally:
            self.cancel(row)

    def embed(self, prompts: Sequence[Sequence[int]], adapter: str | None = None) -> Tensor:
        """The mean of the last hidden states of each prompt's tokens: (B, E), float32."""
        rows = [self.begin(prompt, Chooser(Sampling(0)), adapter, pool=True) for prompt in prompts]
        left = set(map(id, rows))
        while left:
            left -= {id(grown.row) for grown in self.step() if grown.ended is not None}
        return torch.stack([row.pooled / row.prompt for row in rows if row.pooled is not None])

    def check(self) -> None:
        """Raise `AssertionError` where a block is lost or held by nobody (for tests)."""
        self.pool.check()
        holders = [0] * self.pool.blocks
        for row in (*self._running, *self._waiting):
            for block in row.blocks:
                holders[block] += 1
        assert holders == self.pool._holders, "blocks are held by nobody, or by too many"

    # ---- how a step is made up -------------------------------------------------------------------------

    def _admit(self) -> None:
        """Take in the waiting while there are rows, and blocks to read them with."""
        while self._waiting and len(self._running) < self.room.rows:
            row = self._waiting[0]
            self._match(row)
            needed = -(-(len(row.ids) + 1) // BLOCK) - len(row.blocks)
            if self._running and needed + len(self._running) > self.pool.available:
                self.pool.found -= len(row.blocks)
                self._release(row)
                return
            self._running.append(self._waiting.popleft())

    def _match(self, row: Growing) -> None:
        """Go on from the longest beginning that the cache knows; a token is always left to compute."""
        if row.read % BLOCK or row.score or row.pooled is not None:
            return
        full = (len(row.ids) - 1) // BLOCK
        start = row.read // BLOCK
        row.blocks += self.pool.find([self._key(row, number) for number in range(start, full)])
        row.read = len(row.blocks) * BLOCK

    def _key(self, row: Growing, number: int) -> bytes:
        while len(row.keys) <= number:
            before = row.keys[-1] if row.keys else pages.root(self._base_digest, row.adapter, row.salt)
            at = len(row.keys) * BLOCK
            row.keys.append(pages.chain(before, row.ids[at : at + BLOCK]))
        return row.keys[number]

    def _some(self) -> list[tuple[Growing, int]]:
        """Who computes how many tokens in this step: all rows that decode, and a chunk of those that read."""
        some = [(row, 1) for row in tuple(self._running) if row.left == 1 and self._hold(row, 1)]
        budget = max(self.room.chunk - len(some), BLOCK)
        claimed: set[bytes] = set()
        for row, kept in readers(self._running, budget):
            if budget <= 0 or row not in self._running:
                continue
            self._match(row)
            count = min(row.left, max(budget - kept, 0))
            if count and count >= BLOCK and not row.read % BLOCK and not row.score:
                key = self._key(row, row.read // BLOCK)
                if key in claimed:  # another computes this very block now; it is found in the next step
                    continue
                claimed.add(key)
            if count and self._hold(row, count):
                some.append((row, count))
                budget -= count
        return [(row, count) for row, count in some if row in self._running]

    def _hold(self, row: Growing, count: int) -> bool:
        """Blocks for its next tokens, if need be those of younger rows; False: it was itself the youngest."""
        if row not in self._running:
            return False
        while len(row.blocks) * BLOCK < row.read + count:
            block = self.pool.take()
            if block is not None:
                row.blocks.append(block)
                continue
            youngest = self._running.pop()
            self._release(youngest)
            self._waiting.appendleft(youngest)
            if youngest is row:
                return False
        return True

    def _release(self, row: Growing) -> None:
        for block in reversed(row.blocks):  # the end of a chain is forgotten before its beginning
            self.pool.let(block)
        row.blocks.clear()
        row.read = row.named = 0
        if row.score:
            row.logps.clear()
            row.tops.clear()

    def _slot(self, row: Growing) -> int:
        return self._slots.get(row.adapter, 0) if row.adapter else 0

    # ---- what a step brought ---------------------------------------------------------------------------

    def _hear(self, row: Growing, hidden_T_E: Tensor) -> None:
        """Take what is asked of the prompt's tokens while their hidden states are at hand."""
        if row.pooled is not None:
            row.pooled = hidden_T_E.float().sum(0) + (row.pooled if row.read else 0.0)
        if not row.score or row.read >= row.prompt:
            return
        if not row.logps:
            row.logps.append(None)
            row.tops.append(())
        following = row.ids[row.read + 1 : min(row.read + len(hidden_T_E), row.prompt - 1) + 1]
        if not following:
            return
        logp_N_V = torch.log_softmax(self._answering.logits(hidden_T_E[: len(following)]), dim=-1)
        row.logps += logp_N_V.gather(1, torch.tensor(following)[:, None])[:, 0].tolist()
        count = row.chooser.sampling.logprobs or 0
        row.tops += [likeliest(logp_V, count) for logp_V in logp_N_V]

    def _name(self, row: Growing) -> None:
        """Blocks that are full now can be found by what is in them."""
        for number in range(row.read // BLOCK):
            if number >= row.named:
                self.pool.name(row.blocks[number], self._key(row, number))
        row.named = row.read // BLOCK

    def _choose(self, rows: Sequence[Growing], logits_B_V: Tensor) -> list[Grown]:
        """A token for each; who cannot have one ends alone."""
        found: list[Grown] = []
        sound = logits_B_V.amax(-1).isfinite().tolist()
        plain = [n for n, row in enumerate(rows) if sound[n] and row.chooser.plain]
        if plain:
            some_B_V = logits_B_V if len(plain) == len(rows) else logits_B_V[plain]
            found += [
                self._grown(rows[n], Chosen(token)) for n, token in zip(plain, largest(some_B_V), strict=True)
            ]
        for n in sorted(set(range(len(rows))) - set(plain)):
            if not sound[n]:
                found.append(self._fail(rows[n], AnswerFailed("the weights give what is no number")))
                continue
            try:
                found.append(self._grown(rows[n], rows[n].chooser.choose(logits_B_V[n])))
            except Exception as error:  # a grammar that ran out of bounds ends its own answer only
                log.info("a token could not be chosen", exc_info=error)
                found.append(self._fail(rows[n], error))
        return found

    def _fail(self, row: Growing, error: Exception) -> Grown:
        self.cancel(row)
        if not isinstance(error, LuthierError):
            error = AnswerFailed(f"the engine failed ({type(error).__name__})")
        return Grown(row, error=error)

    def _grown(self, row: Growing, chosen: Chosen | None) -> Grown:
        first = len(row.ids) == row.prompt
        read = Read(tuple(row.logps), tuple(row.tops)) if row.score and first else None
        ended: Ended | None = None
        if chosen is not None:
            row.ids.append(chosen.token)
            ended = Ended.STOP if chosen.token in row.stop_ids else None
        if ended is None and len(row.ids) - row.prompt >= row.chooser.sampling.max_new_tokens:
            ended = Ended.LENGTH
        if ended is not None:
            self.cancel(row)
        return Grown(row, chosen, ended, read)


def _blocks(config: Any, itemsize: int, room: Room) -> int:
    """As many blocks as the cache's bytes hold, but no more than the rows could ever fill, twice."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * width * itemsize * BLOCK
    most = 2 * room.rows * -(-int(config.max_position_embeddings) // BLOCK)
    return int(max(4, min(room.cache_bytes // kept, most)))


def _not_loaded(adapter: str) -> ModelError:
    return ModelError(f"adapter {adapter} is not loaded", hint="add it first, or it was dropped meanwhile")
