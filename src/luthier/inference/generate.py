"""Tokens out of weights: one base model, many adapters beside it, greedy or sampled answers.

`Runtime.stream` does for a batch of one what `transformers.generate` does over a `PeftModel` in the same
dtype (https://huggingface.co/docs/transformers/main_classes/text_generation): the same modules, the same
attention, the same cache, the adapter unmerged, one forward a token. So a stranger who loads the adapter
with plain transformers and peft gets the same bits. What is served grows in `inference.decoder` instead.

`Runtime.greedy` answers many prompts at once for evaluation: sorted by length, left-padded, and the tokens
that all prompts begin with are read only once. In bfloat16 its rounding differs from a stream's, so at a
near-tie the two may choose different tokens.

It does not know chat templates, queues or clocks, and it obeys no penalty that a base's
generation_config.json may ask for. One thread owns a Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from luthier.errors import ModelError
from luthier.inference.adapters import inspect
from luthier.inference.sampling import Chooser, Chosen, Sampling, likeliest

TILE = 256  # positions of a prompt whose logits are held at once
ROWS = 64  # rows of one evaluation batch
PADDED_TOKENS = 6144  # and its size once padded; more gains nothing on a CPU and costs memory

# As an index the last position is copied out; as a plain 1 it stays a strided view, for which torch's matmul
# with frozen bfloat16 weights takes a slow path, and for more rows copies the output matrix once per row.
LAST = torch.tensor([-1])

Progress = Callable[[int, int], None]


class Runtime:
    """A base model in memory, and the adapters that may be laid over it, each by its digest."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: Any = None
        self._adapters: dict[str, Path] = {}
        self._layers: tuple[BaseTunerLayer, ...] = ()
        self._active: str | None = None

    @classmethod
    def load(cls, base: Path, threads: int | None = None) -> Runtime:
        if threads is not None:
            torch.set_num_threads(threads)
        transformers_logging.disable_progress_bar()  # progress is shown by whoever asked, not by the library
        if not any(base.glob("*.safetensors")):
            raise ModelError(
                "no safetensors weights here", where=str(base), hint="only safetensors are loaded"
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base, dtype="auto", attn_implementation="sdpa", local_files_only=True, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"transformers cannot load this base model: {error}", where=str(base)) from error
        return cls(model.eval())

    @property
    def model(self) -> Any:
        """The plain transformers model; adapters, once added, are injected into its layers."""
        return self._model

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def add(self, adapter_digest: str, adapter: Path) -> None:
        """Lay an adapter beside the others. Refused whole, and without a trace, if anything is amiss."""
        if adapter_digest in self._adapters:
            return
        _, keys = inspect(adapter)
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(
                    self._model, adapter, adapter_name=adapter_digest, torch_device=str(self._model.device)
                )
            else:
                self._peft.load_adapter(
                    adapter, adapter_name=adapter_digest, torch_device=str(self._model.device)
                )
            loaded = set(get_peft_model_state_dict(self._peft, adapter_name=adapter_digest))
            if loaded != keys:
                odd = sorted(loaded ^ keys)
                raise ValueError(f"{len(odd)} tensor(s) do not belong to this base or are missing: {odd[0]}")
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            self._forget(adapter_digest)
            first = str(error).strip().splitlines()
            raise ModelError(
                f"the adapter does not fit this base: {' '.join(line.strip() for line in first[:3])}",
                where=str(adapter),
                hint="load it over the base it was trained on",
            ) from error
        self._peft.eval()
        self._adapters[adapter_digest] = adapter
        self._rescan()

    def drop(self, adapter_digest: str) -> None:
        if self._adapters.pop(adapter_digest, None) is not None:
            self._forget(adapter_digest)

    def stream(
        self, prompt_ids: Sequence[int], sampling: Sampling, adapter: str | None, stop_ids: frozenset[int]
    ) -> Iterator[int]:
        """Answer one prompt token by token; a stop token is the last one yielded.

        Streams may be advanced in turn, each over its own adapter: the adapter is chosen anew per step.
        """
        if not prompt_ids:
            raise ModelError("an empty prompt has no next token")
        self._require(adapter)
        chosen = self.answer(prompt_ids, Chooser(sampling), adapter, stop_ids)
        return (one.token for one in chosen)

    def answer(
        self, prompt_ids: Sequence[int], chooser: Chooser, adapter: str | None, stop_ids: frozenset[int]
    ) -> Iterator[Chosen]:
        """The same, as `chooser` chooses, with what it tells of each token."""
        cache = DynamicCache(config=self._model.config)
        ids_BT = torch.tensor([list(prompt_ids)])
        for _ in range(chooser.sampling.max_new_tokens):
            chosen = chooser.choose(self._step(ids_BT, cache, adapter))
            yield chosen
            if chosen.token in stop_ids:
                return
            ids_BT = torch.tensor([[chosen.token]])

    @torch.inference_mode()
    def prompt_logps(self, prompt_ids: Sequence[int], top: int, adapter: str | None) -> list[Chosen]:
        """What the model thinks of each token of a prompt but the first, and its `top` likeliest instead."""
        self._use(adapter)
        ids_T = torch.tensor(list(prompt_ids), device=self._model.device)
        hidden_T_E = self._model.get_decoder()(input_ids=ids_T[None], use_cache=False).last_hidden_state[0]
        found: list[Chosen] = []
        for begin in range(0, len(ids_T) - 1, TILE):
            some_N_E = hidden_T_E[begin : min(begin + TILE, len(ids_T) - 1)]
            logp_N_V = torch.log_softmax(self._model.get_output_embeddings()(some_N_E).float(), dim=-1).cpu()
            for logp_V, token in zip(logp_N_V, prompt_ids[begin + 1 :], strict=False):
                found.append(Chosen(token, float(logp_V[token]), likeliest(logp_V, top)))
        return found

    @torch.inference_mode()
    def _step(self, ids_BT: Tensor, cache: Any, adapter: str | None) -> Tensor:
        """Logits (float32) after the last of `ids`; no mask is given because nothing is padded.

        In float32, where parity excuses nothing, the last position is taken exactly as `generate` takes it.
        In bfloat16 it is copied out first: measured bit-equal, and 0.3 s sooner to the first token.
        """
        self._use(adapter)
        last = LAST if self._model.dtype is torch.bfloat16 else 1
        out = self._model(
            input_ids=ids_BT.to(self._model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
        logits_V: Tensor = out.logits[0, -1].to(copy=True, dtype=torch.float32, device="cpu")
        return logits_V

    @torch.inference_mode()
    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        adapter: str | None,
        stop_ids: frozenset[int],
        tell: Progress | None = None,
    ) -> list[list[int]]:
        """Greedy answers to many prompts, each ending with its stop token unless it ran out of room."""
        if any(not prompt for prompt in prompts):
            raise ModelError("an empty prompt has no next token")
        self._require(adapter)
        shared = self.read_shared(prompts, common_prefix(prompts), adapter)
        start = shared.get_seq_length()
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for batch in batches([len(prompt) - start for prompt in prompts]):
            rows = [list(prompts[n][start:]) for n in batch]
            self._use(adapter)
            for n, answer in zip(batch, self._answer(rows, shared, max_new_tokens, stop_ids), strict=True):
                answers[n] = answer
            done += len(batch)
            if tell is not None:
                tell(done, len(prompts))
        return answers

    def read_shared(self, rows: Sequence[Sequence[int]], length: int, adapter: str | None) -> Any:
        """A cache of the first `length` tokens of all rows; left empty where sharing would not be plain."""
        cache = DynamicCache(config=self._model.config)
        if length > 0 and not any(getattr(layer, "is_sliding", False) for layer in cache.layers):
            self._step(torch.tensor([list(rows[0][:length])]), cache, adapter)
        return cache

    def fan_out(self, shared: Any, rows: int) -> Any:
        """A cache for a batch in which every row has already read what `shared` holds."""
        cache = DynamicCache(config=self._model.config)
        if shared.get_seq_length():
            for n, layer in enumerate(shared.layers):
                cache.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), n)
        return cache

    def _answer(
        self, rows: list[list[int]], shared: Any, max_new_tokens: int, stop_ids: frozenset[int]
    ) -> list[list[int]]:
        """Left-pad one batch behind the shared prefix and decode until every row has stopped."""
        start, widest = shared.get_seq_length(), max(map(len, rows))
        pads_B = torch.tensor([widest - len(row) for row in rows])
        ids_BT = torch.tensor([[0] * (widest - len(row)) + row for row in rows])
        mask_BT = torch.ones(len(rows), start + widest, dtype=torch.long)
        mask_BT[:, start:] = (torch.arange(widest) >= pads_B[:, None]).long()
        at_BT = (start + torch.arange(widest) - pads_B[:, None]).clamp(min=0)
        cache = self.fan_out(shared, len(rows))
        answers: list[list[int]] = [[] for _ in rows]
        alive = list(range(len(rows)))
        for _ in range(max_new_tokens):
            out = self._model(
                input_ids=ids_BT, attention_mask=mask_BT, position_ids=at_BT, past_key_values=cache,
                use_cache=True, logits_to_keep=LAST,
            )  # fmt: skip
            chosen: list[int] = out.logits[:, -1].float().argmax(-1).tolist()
            for row, token in zip(alive, chosen, strict=True):
                answers[row].append(token)
            keep = [n for n, token in enumerate(chosen) if token not in stop_ids]
            if not keep:
                break
            if len(keep) < len(alive):
                alive = [alive[n] for n in keep]
                cache.batch_select_indices(torch.tensor(keep))
                mask_BT, at_BT = mask_BT[keep], at_BT[keep]
            ids_BT = torch.tensor([[chosen[n]] for n in keep])
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(keep), 1)], dim=1)
            at_BT = at_BT[:, -1:] + 1
        return answers

    def under(self, adapter: str | None) -> Any:
        """The transformers model with this adapter (or none) speaking, until the next step of any stream."""
        self._use(adapter)
        return self._model

    def _require(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self._adapters:
            raise ModelError(
                f"adapter {adapter} is not loaded", hint="add it first, or it was dropped meanwhile"
            )

    def _use(self, adapter: str | None) -> None:
        """Make one adapter (or none: the bare base) speak; costs nothing when it already does."""
        self._require(adapter)
        if adapter != self._active:
            self._switch(adapter)

    def _switch(self, adapter: str | None) -> None:
        wanted = [] if adapter is None else [adapter]
        for layer in self._layers:
            # What layer.set_adapter does, less its walk over every weight's requires_grad (ms per token).
            layer._active_adapter = wanted
        self._active = adapter

    def _rescan(self) -> None:
        self._layers = tuple(m for m in self._model.modules() if isinstance(m, BaseTunerLayer))
        for layer in self._layers:
            layer.set_adapter([], inference_mode=True)
        self._active = None

    def _forget(self, adapter_digest: str) -> None:
        """Take an adapter out of every layer; with the last one the layers themselves are unwrapped."""
        if self._adapters and self._peft is not None:
            self._rescan()
            for layer in self._layers:
                layer.delete_adapter(adapter_digest)
            self._peft.peft_config.pop(adapter_digest, None)
        else:
            for name, module in list(self._model.named_modules()):
                if isinstance(module, BaseTunerLayer):
                    self._model.set_submodule(name, module.get_base_layer())
            if hasattr(self._model, "peft_config"):
                del self._model.peft_config
            self._peft = None
        self._rescan()


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own."""
    if len(prompts) < 2:
        return 0
    rows = [tuple(prompt) for prompt in prompts]
    low, high = min(rows), max(rows)  # whatever these two share, all share
    shortest = min(map(len, rows))
    differs = (n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b)
    return min(next(differs, shortest), shortest - 1)


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, the longest first (so memory peaks at the start)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        widest = lengths[batch[0]] if batch else lengths[row]
        if batch and (len(batch) == ROWS or widest * (len(batch) + 1) > PADDED_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
