"""Where training runs: in one process, as a copy in each of several (DDP), or with a share in each (FSDP2).

Sources: data parallelism with a sum of gradients (Li et al. 2020, arXiv 2006.15704); fully sharded data
parallelism (Zhao et al. 2023, arXiv 2304.11277) as torch's `fully_shard`, one group for each decoder layer
and one for the rest. A step's loss is a sum over its micro-batches divided by all its units, so ranks compute
micro-batches and add up: the numbers that decide (losses, norms, requests to stop) are sums which every rank
holds in full, so all come to the same decision without a vote.

What leaves a process is whole (`whole`): a checkpoint does not tell how many ranks wrote it. Ranks must be
fed the same rows and seed; each lays out all of a step and computes its part.

It does not know models' inner forms beyond `get_decoder().layers`, files, stages or who starts the processes
(`launch`). The CUDA paths (NCCL, deterministic mode) are written for H100-class cards and not measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from luthier.engine.head import Scored, batch_scores
from luthier.errors import TrainError
from luthier.objectives import Batch

Kind = Literal["one", "ddp", "fsdp"]
LONGEST_S = 600.0  # a rank that waits this long for another gives up
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """This process among those that train together."""

    kind: Kind = "one"
    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def leads(self) -> bool:
        """True in the process that writes and speaks for all."""
        return self.rank == 0

    @property
    def in_step(self) -> bool:
        """True where every forward pass is a common act, so that ranks must do equally many."""
        return self.kind == "fsdp"

    def share(self, tokens_M: Sequence[int]) -> tuple[tuple[int, float], ...]:
        """This rank's micro-batches, as (number, weight); the largest are dealt first, to who has least.

        In step, ranks with fewer do the smallest once more, with a weight of 0.
        """
        shares: list[list[int]] = [[] for _ in range(self.world)]
        for number in sorted(range(len(tokens_M)), key=lambda number: (-tokens_M[number], number)):
            least = min(shares, key=lambda share: sum(tokens_M[at] for at in share))
            least.append(number)
        mine = [(number, 1.0) for number in sorted(shares[self.rank])]
        if self.in_step and tokens_M:
            smallest = min(range(len(tokens_M)), key=lambda number: tokens_M[number])
            mine += [(smallest, 0.0)] * (max(map(len, shares)) - len(mine))
        return tuple(mine)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum of all ranks' tensors (on the CPU)."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers

    def each(self, number: float) -> list[float]:
        """Every rank's number, in the order of ranks."""
        numbers = torch.zeros(self.world, dtype=torch.float64)
        numbers[self.rank] = number
        found: list[float] = self.total(numbers).tolist()
        return found

    def any(self, said: bool) -> bool:
        """Whether a rank said so."""
        return any(self.each(said))

    def add_up(self, weights: Sequence[torch.nn.Parameter]) -> None:
        """Give every rank the sum of all gradients: in float32, as one tensor, in the order given."""
        if self.kind != "ddp":
            return  # sharded gradients were added up on the way back
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        moved = torch.tensor([float(weight.grad is not None) for weight in weights], device=self.device)
        flat = torch.cat([moved, *(grad.float().flatten() for grad in grads)])
        dist.all_reduce(flat)
        moved, *parts = torch.split(flat, [len(weights), *(weight.numel() for weight in weights)])
        for weight, part, count in zip(weights, parts, moved.tolist(), strict=True):
            weight.grad = part.view_as(weight).to(weight.dtype) if count else None

    def settle(self, model: Any) -> None:
        """Bring the model to its device; where it is shared, keep this rank's part of every weight."""
        if not self.in_step:
            model.to(self.device)
            return
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in (*model.get_decoder().layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)  # sums: the step divides by its units
            module.set_force_sum_reduction_for_comms(True)
        model.scores = partial(batch_scores, model)
        register_fsdp_forward_method(model, "scores")

    def scores(self, model: Any, micro: Batch, *how: Any) -> Scored:
        """`head.batch_scores`; of a shared model as one forward pass, so that all it reads is at hand."""
        found: Scored = model.scores(micro, *how) if self.in_step else batch_scores(model, micro, *how)
        return found

    def put(self, micro: Batch) -> Batch:
        """The batch on this rank's device."""
        names = ("ids_T", "positions_T", "places_N", "targets_N", "rows_N")
        sampled = ("advantages_D", "behaviour_N", "reference_N")
        here = [name for name in (*names, *sampled) if getattr(micro, name) is not None]
        return replace(micro, **{name: getattr(micro, name).to(self.device) for name in here})

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


ONE = Placement()


def join(kind: Kind, timeout_s: float = LONGEST_S, meeting: str = "env://") -> Placement:
    """Meet the other processes; `torchrun` says in the environment who is who."""
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = _device(local)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=limit)
    return Placement(kind, rank, world, device)


def alone() -> Placement:
    """One process, on this machine's first card if it has one."""
    return Placement(device=_device(0))


def _device(local: int) -> torch.device:
    """The card of this rank, with deterministic kernels; the CPU where there are no cards."""
    if not torch.cuda.is_available():
        return CPU
    cards = torch.cuda.device_count()
    if local >= cards:
        raise TrainError(f"this machine has {cards} card(s), and rank {local} needs one of its own")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this rank may hold a part; all ranks must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, or of this rank's part of it, laid as `like` is."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=True)
    moved = tensor.to(like.device_mesh.device_type, copy=True)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def unshard(model: torch.nn.Module) -> None:
    """Put whole weights where shares of trained ones were, to be read or written; training is over then."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.requires_grad and isinstance(weight, DTensor):
                setattr(module, name, torch.nn.Parameter(whole(weight.detach())))
