"""One run of the GPU comparison, in a process of its own: a random model, two workloads, one system.

`luthier` is the engine as the train stage puts it together (packed rows, fused layers, attention over
documents, tiled head); `peft` is what one writes with PEFT and transformers alone, `peft-checkpointed` the
same with gradient checkpointing. All have the same random base and adapter. Not known: files, other runs.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from itertools import count
from typing import Any

import luthier  # noqa: F401  it sets how long OpenMP threads wait, so it must come before torch

# isort: split
import torch
from meter import peak_rss_bytes
from transformers import AutoModelForCausalLM, LlamaConfig
from workloads import lengths

from luthier.engine import attention, batch, fused, loop, native, varlen
from luthier.methods import lora
from luthier.objectives import sft
from luthier.template import Encoded

WORKLOADS = ("full", "mixed")
RANK, ALPHA, LR, SEED = 16, 32, 2e-4, 17
TILE = 1024  # rows of logits alive at once: a GPU's products want more of them than a CPU's
IGNORED = -100
LAYERS: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run: a system that trains each workload for `steps` steps, the first `warmup` not counted.

    A micro-batch holds `at_once` × `length` tokens, a step `micros` of them (in `mixed` about as many).
    """

    system: str
    device: str
    shape: str
    length: int
    at_once: int
    micros: int
    steps: int
    warmup: int

    @property
    def budget(self) -> int:
        return self.at_once * self.length


Row = tuple[int, ...]
Turn = Callable[[Sequence[Row]], float]  # one optimiser step on these rows, and its loss


def run(wanted: Job) -> dict[str, Any]:
    """Both workloads on one loaded model, and what the device's limit is."""
    prepare = luthier_system if wanted.system == "luthier" else peft_system
    found: dict[str, Any] = {"machine": machine(wanted.device), "workloads": {}}
    began = time.perf_counter()
    model, turn, facts = prepare(wanted)
    parameters = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    found |= {"load_s": round(time.perf_counter() - began, 1), "parameters": parameters, **facts}
    for workload in WORKLOADS:
        try:
            figures = timed(wanted, turn, list(steps_of(wanted, workload)))
        except torch.OutOfMemoryError as error:
            found["workloads"][workload] = {"failed": f"out of memory: {str(error)[:200]}"}
            continue
        figures["tflops_4p"] = round(4 * parameters * figures["tokens_per_s"] / 1e12, 4)
        figures["of_limit"] = round(figures["tflops_4p"] / found["machine"]["product_tflops"], 3)
        found["workloads"][workload] = figures
    return found


def steps_of(wanted: Job, workload: str) -> Iterator[list[Row]]:
    """The rows of each step. Every token but the first is learnt; what the tokens are does not matter."""
    chance = random.Random(f"{workload}:{SEED}")
    vocabulary = LAYERS[wanted.shape]["vocab_size"]
    for _ in range(wanted.steps):
        rows: list[Row] = []
        while sum(map(len, rows)) < wanted.micros * wanted.budget:
            length = wanted.length if workload == "full" else min(sum(lengths(chance)), wanted.length)
            rows.append(tuple(chance.randrange(1, vocabulary) for _ in range(length)))
        yield rows


def timed(wanted: Job, turn: Turn, steps: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Useful tokens a second after the warm-up, and the most memory the allocator held."""
    cuda = wanted.device != "cpu"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for rows in steps:
        began = time.perf_counter()
        losses.append(turn(rows))
        if cuda:
            torch.cuda.synchronize()
        seconds.append(round(time.perf_counter() - began, 4))
    tokens = [sum(map(len, rows)) for rows in steps]
    counted = slice(wanted.warmup, None)
    return {
        "tokens_per_s": round(sum(tokens[counted]) / sum(seconds[counted]), 1),
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else peak_rss_bytes(),
        "losses": losses, "seconds": seconds, "tokens": tokens,
    }  # fmt: skip


def model_of(wanted: Job, implementation: str) -> Any:
    """The random model, frozen, with an adapter that is the same in every system."""
    config = LlamaConfig(**LAYERS[wanted.shape], rope_theta=500000.0, pad_token_id=0, use_cache=False)
    torch.manual_seed(SEED)
    with torch.device(wanted.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=implementation
        )
    return lora.attach(model, lora.Params(r=RANK, alpha=ALPHA), SEED).to(wanted.device)


def luthier_system(wanted: Job) -> tuple[Any, Turn, dict[str, Any]]:
    """The engine as the train stage puts it together, on the device."""
    device = torch.device(wanted.device)
    model = model_of(wanted, attention.IMPLEMENTATION)
    compiled = device.type == "cuda" and util.find_spec("triton") is not None
    fused.fuse(model, native.kernels(compiled))
    settings = loop.Settings(steps=10**6, lr=LR, seed=SEED, schedule="constant", tile=TILE)
    adam, done = loop.optimiser(model, settings), count(0)

    def objective(policy: Any, reference: Any, micro: Any) -> Any:
        return sft.loss(policy, reference, micro, sft.Params())

    def turn(rows: Sequence[Row]) -> float:
        told = [Encoded(ids=row, mask=(True,) * len(row), id=str(number)) for number, row in enumerate(rows)]

        def micros(step: int) -> list[Any]:
            del step
            return [placed(micro, device) for micro in batch.micro_batches(told, wanted.budget)]

        past = loop.Past(step=next(done))  # a step at a time, as one `train` would do them
        return float(next(loop.train(model, micros, objective, adam, settings, past)).loss)

    width = LAYERS[wanted.shape]["hidden_size"] // LAYERS[wanted.shape]["num_attention_heads"]
    name = "engine.attention" if device.type == "cpu" else varlen.kernel(device, torch.bfloat16, width)[0]
    return model, turn, {"attention": name, "compiled": compiled}


def placed(micro: Any, device: Any) -> Any:
    """The batch with its tensors on the device."""
    moved = {name: x.to(device) for name, x in vars(micro).items() if isinstance(x, torch.Tensor)}
    return replace(micro, **moved)


def peft_system(wanted: Job) -> tuple[Any, Turn, dict[str, Any]]:
    """What one writes with PEFT and transformers alone: padded micro-batches, transformers' own loss."""
    cuda = wanted.device != "cpu"
    implementation = "flash_attention_2" if cuda and util.find_spec("flash_attn") else "sdpa"
    model = model_of(wanted, implementation)
    model.train()
    if checkpointed := wanted.system.endswith("checkpointed"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0, fused=True)

    def turn(rows: Sequence[Row]) -> float:
        learnt = sum(len(row) - 1 for row in rows)
        adam.zero_grad()
        total = 0.0
        for some in padded(rows, wanted.budget):
            inputs = {name: x.to(wanted.device) for name, x in tensors(some).items()}
            loss = model(**inputs, num_items_in_batch=learnt).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        return total

    return model, turn, {"attention": implementation, "checkpointed": checkpointed}


def padded(rows: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Rows of like length together, as many as fit the budget once padded: kinder than the file's order."""
    some: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if some and len(some[0]) * (len(some) + 1) > budget:
            yield some
            some = []
        some.append(row)
    yield some


def tensors(rows: Sequence[Row]) -> dict[str, Any]:
    """Padded tensors; no mask where nothing is padded, so that attention takes its fast way."""
    width = max(map(len, rows))
    ids = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    found = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, IGNORED)}
    return found if bool(mask.all()) else found | {"attention_mask": mask}


def machine(device: str) -> dict[str, Any]:
    """What it runs on, and what a large bf16 product reaches there (the best of some)."""
    cuda = device != "cpu"
    n, best = (8192 if cuda else 1024), math.inf
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    packages = ("luthier", "torch", "transformers", "peft", "flash-attn", "triton")
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "product_tflops": round(2 * n**3 / best / 1e12, 3),
        "versions": {name: version for name in packages if (version := installed(name))},
    }


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
