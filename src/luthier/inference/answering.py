"""A decoder made ready to answer many at once: one forward for the tokens of all, each under its own adapter.

The model is transformers' own. What changes are the forwards of its parts: linear layers that read one input
are one product, adapters of all requests in it; keys and values go into pages; norms, rotary positions and
the gate are one pass each (`engine.kernels`). Tokens of all sequences lie end to end, nothing is padded.

`Answering` proves itself before it is used: a prompt read in chunks and token by token must give the hidden
states of transformers' untouched forward. An architecture that does something else than what is done here
fails that and is refused. It does not know requests, sampling, or which block is whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.engine import native
from luthier.engine.kernels import Kernels
from luthier.errors import ModelError
from luthier.inference import decode
from luthier.inference.adapters import Pair
from luthier.inference.decode import Held, Laid, Low, Lows, Sight
from luthier.inference.pages import BLOCK
from luthier.inference.proof import plainly, proof, prove

IMPLEMENTATION = "luthier_pages"
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Group:
    """Linear layers that read the same input: one product, with the adapters of all requests."""

    def __init__(self, names: Sequence[str], linears: Sequence[nn.Linear], slots: int, now: _Now) -> None:
        self.names, self.now = tuple(names), now
        self.sizes = [linear.out_features for linear in linears]
        self.weight_O_E = linears[0].weight.data
        if len(linears) > 1:
            self.weight_O_E = torch.cat([linear.weight.data for linear in linears])
            for linear, rows in zip(linears, torch.split(self.weight_O_E, self.sizes), strict=True):
                linear.weight.data = rows  # one copy: the layer's own weight is now a view of the group
        biases = [linear.bias for linear in linears]
        self.bias_O: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = zip(biases, self.sizes, strict=True)
            zeros = self.weight_O_E.new_zeros
            self.bias_O = torch.cat([zeros(size) if bias is None else bias.data for bias, size in parts])
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        self.lows = Lows(slots, ends)

    def call(self, x_T_E: Tensor) -> Tensor:
        laid = self.now.laid
        weights = self.weight_O_E, self.bias_O
        if laid is None:
            return decode.product(x_T_E, weights, None, (), None)
        return decode.product(x_T_E, weights, self.lows, laid.segments, laid.slots_T)

    def low(self, pairs: Mapping[str, Pair]) -> Low | None:
        return together(pairs, self.names, self.sizes, self.weight_O_E)


def together(
    pairs: Mapping[str, Pair], names: Sequence[str], sizes: Sequence[int], like_N_E: Tensor
) -> Low | None:
    """The part of an adapter for layers of these names and outputs that read one input, padded to one even
    rank; raises `ModelError` where shapes differ."""
    mine = [pairs.get(name) for name in names]
    rank = max((len(pair.a_R_E) for pair in mine if pair is not None), default=0)
    if not rank:
        return None
    rank += rank % 2
    width = like_N_E.shape[1]
    a_PR_E = like_N_E.new_zeros(len(mine) * rank, width)
    b_R_O = like_N_E.new_zeros(rank, sum(sizes))
    start = 0
    for number, (name, pair, size) in enumerate(zip(names, mine, sizes, strict=True)):
        if pair is not None:
            here = len(pair.a_R_E)
            if pair.a_R_E.shape[1] != width or len(pair.b_O_R) != size:
                raise ModelError(f"{name}: the adapter is for a layer of another shape")
            a_PR_E[number * rank :][:here] = pair.a_R_E
            b_R_O[:here, start : start + size] = (pair.b_O_R.float() * pair.scale).T
        start += size
    return Low(a_PR_E, b_R_O)


def require_known(pairs: Mapping[str, Pair] | None, layers: Sequence[str]) -> None:
    """Raise `ModelError` where an adapter changes what this base does not have."""
    if unknown := sorted(set(pairs or ()) - set(layers)):
        raise ModelError(f"{len(unknown)} layer(s) of the adapter are not this base's: {unknown[0]}")


class _Now:
    """What is being computed: modules in the middle of a model are told nothing else."""

    laid: Laid | None = None


class Answering:
    """A model and its cache of `blocks` blocks; `slots` adapters may lie beside it at once."""

    def __init__(self, model: Any, blocks: int, slots: int) -> None:
        self._model = model.eval()
        self._now = _Now()
        self._formulas = native.kernels(model.device.type == "cpu" and native.can_compile())
        ids = proof(model)
        plain = plainly(model, ids)
        asked = heard(model, ids)
        self._groups = self._regroup(slots + 1, [one.sight for one in asked])
        self._by_name = {name: group for group in self._groups for name in group.names}
        self.held: list[Held] = []
        self.blocks = blocks
        for shape in (one.kept for one in asked):
            whole = (blocks * BLOCK, *shape)
            keys, values = (torch.zeros(whole, dtype=model.dtype, device=model.device) for _ in range(2))
            self.held.append((keys, values))
        prove(self, ids, plain)

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = self._model.dtype
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the linear layers that an adapter may change."""
        return tuple(self._by_name)

    def put(self, slot: int, pairs: Mapping[str, Pair] | None) -> None:
        """Lay an adapter into a slot (from 1), or nothing; all of it or none."""
        require_known(pairs, self.layers)
        lows = [group.low(pairs) if pairs else None for group in self._groups]
        for group, low in zip(self._groups, lows, strict=True):
            group.lows.put(slot, low)

    @torch.inference_mode()
    def hidden(self, ids_T: Tensor, laid: Laid) -> Tensor:
        """The last hidden states (T, E) of a step's tokens, whose keys and values are in the cache then."""
        self._now.laid = laid
        try:
            out = self._model.get_decoder()(
                input_ids=ids_T[None], position_ids=laid.positions_T[None], pages=self, use_cache=False
            )
        finally:
            self._now.laid = None
        found: Tensor = out.last_hidden_state[0]
        return found

    @torch.inference_mode()
    def logits(self, hidden_B_E: Tensor) -> Tensor:
        """Float32 logits (B, V)."""
        return decode.logits(hidden_B_E.contiguous(), self._model.get_output_embeddings().weight)

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], layer: int, sight: Sight) -> Tensor:
        """One layer's attention (T, heads, width), after its keys and values went into their places."""
        q_THE, k_TKE, v_TKE = qkv
        laid = self._now.laid
        assert laid is not None
        held = self.held[layer]
        for cache, new in zip(held, (k_TKE, v_TKE), strict=True):
            cache.index_copy_(0, laid.places_T, new)
        return decode.attend(q_THE, held, laid.reach, sight)

    def _regroup(self, slots: int, sights: Sequence[Sight]) -> list[Group]:
        """Replace forwards; returns all groups of linear layers."""
        groups: list[Group] = []
        taken: dict[nn.Module, Group] = {}
        names = {module: name for name, module in self._model.named_modules()}
        modules = list(self._model.get_decoder().modules())
        families = [[getattr(m, name, None) for name in family] for m in modules for family in SIBLINGS]
        families = [family for family in families if all(type(one) is nn.Linear for one in family)]
        known = {linear for family in families for linear in family}
        families += [[m] for m in modules if type(m) is nn.Linear and m not in known]
        for family in families:
            linears = [linear for linear in family if linear is not None]
            made = Group([names[linear] for linear in linears], linears, slots, self._now)
            groups.append(made)
            taken.update(dict.fromkeys(linears, made))
            _share(made, linears)
        for module in modules:
            if type(module).__name__.endswith("RMSNorm"):
                _fuse_norm(module, self._formulas)
            elif hasattr(module, "down_proj"):
                _fuse_mlp(module, taken, self._formulas)
        for module, sight in zip(attentions(self._model), sights, strict=True):
            how = _projections(module, taken), sight, self._formulas
            module.forward = partial(_attention, module, how)
        return groups


def attentions(model: Any) -> list[Any]:
    """The attention modules in the order of their layers."""
    found = [m for m in model.get_decoder().modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    if not found or [module.layer_idx for module in found] != list(range(len(found))):
        raise ModelError(f"{type(model).__name__}: attention layers are not where decoders have them")
    return found


@dataclass(frozen=True)
class _Heard:
    """What one layer's attention asks for, and the shape (key heads, width) of what it keeps of a token."""

    sight: Sight
    kept: tuple[int, int]


_listeners: list[dict[int, _Heard]] = []


@torch.inference_mode()
def heard(model: Any, ids_T: Tensor) -> list[_Heard]:
    """One forward in which attention only notes what it is asked."""
    model.set_attn_implementation(IMPLEMENTATION)
    found: dict[int, _Heard] = {}
    _listeners.append(found)
    try:
        model.get_decoder()(input_ids=ids_T[None].to(model.device), use_cache=False)
    finally:
        _listeners.remove(found)
    return [found[module.layer_idx] for module in attentions(model)]


def _note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, when it is not ours: only to be noted."""
    if not _listeners or mask is not None or options.get("softcap") or value.shape != key.shape:
        raise ModelError(
            f"{type(module).__name__} asks for attention this engine does not know",
            hint="choose a plain causal decoder (Llama, Qwen, Mistral, Gemma 3, Phi 3 …)",
        )
    window, scaling = options.get("sliding_window"), options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    _listeners[-1][int(module.layer_idx)] = _Heard(Sight(window, scale), (key.shape[1], key.shape[3]))  # type: ignore[arg-type]
    return query.transpose(1, 2), None


def _kv_heads(module: Any) -> int:
    return int(module.config.num_key_value_heads)


def _projections(module: Any, taken: Mapping[nn.Module, Group]) -> Callable[[Tensor], Sequence[Tensor]]:
    """(T, E) to queries, keys and values, each (T, heads, width)."""
    width = module.head_dim
    if hasattr(module, "qkv_proj"):
        group = taken[module.qkv_proj]
        kv = _kv_heads(module) * width
        sizes = [group.sizes[0] - 2 * kv, kv, kv]
    else:
        group = taken[module.q_proj]
        sizes = group.sizes

    def project(x_T_E: Tensor) -> Sequence[Tensor]:
        parts = group.call(x_T_E).split_with_sizes(sizes, dim=-1)
        return [part.view(len(part), -1, width) for part in parts]

    return project


def _attention(
    module: Any,
    how: tuple[Callable[[Tensor], Sequence[Tensor]], Sight, Kernels],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    pages: Answering,
    **_: Any,
) -> tuple[Tensor, None]:
    """What every Llama-like attention does, on (1, T, E)."""
    project, sight, formulas = how
    q_THE, k_TKE, v_TKE = project(hidden_states[0])
    if hasattr(module, "q_norm"):
        q_THE, k_TKE = module.q_norm(q_THE.contiguous()), module.k_norm(k_TKE.contiguous())
    cos, sin = (table[0] for table in position_embeddings)
    turned = formulas.turn(q_THE, cos, sin), formulas.turn(k_TKE, cos, sin), v_TKE
    out_THE = pages.attend(turned, module.layer_idx, sight)
    return module.o_proj(out_THE.flatten(1)[None]), None


def _share(group: Group, linears: Sequence[nn.Linear]) -> None:
    """Layers that are called one after another with one input: the first computes all."""
    ready: dict[int, Tensor] = {}

    def call(number: int, x: Tensor) -> Tensor:
        if number not in ready:
            y = group.call(x.reshape(-1, x.shape[-1]))
            ready.update(enumerate(y.view(*x.shape[:-1], -1).split_with_sizes(group.sizes, dim=-1)))
        return ready.pop(number)

    for number, linear in enumerate(linears):
        linear.forward = partial(call, number)  # type: ignore[method-assign]


def _fuse_norm(module: Any, formulas: Kernels) -> None:
    """One pass in place of the module's own formula, if a trial gives the module's own answer."""
    weight_E = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight_E is None or eps is None:
        return
    trial = torch.linspace(-2.0, 2.0, 4 * len(weight_E)).sin().view(4, -1).to(weight_E)
    with torch.inference_mode():
        own = module(trial)
        for shift in (0.0, 1.0):  # Gemma's weights count from 1
            call = partial(_norm, weight_E.data, float(eps), shift, formulas)
            if (call(trial).float() - own.float()).abs().max() <= 4e-2 * own.float().abs().max():
                module.forward = call
                return


def _norm(weight_E: Tensor, eps: float, shift: float, formulas: Kernels, x: Tensor) -> Tensor:
    y: Tensor = formulas.norm(x.reshape(-1, x.shape[-1]), weight_E, eps, shift)[0]
    return y.view(x.shape)


def _fuse_mlp(module: Any, taken: Mapping[nn.Module, Group], formulas: Kernels) -> None:
    """down(activation(gate) · up), where that is what the configuration names."""
    wide = getattr(module, "gate_up_proj", None) or getattr(module, "gate_proj", None)
    name = GATES.get(_activation(module))
    if wide is None or wide not in taken or name is None:
        return
    both, down, gate = taken[wide], taken[module.down_proj], formulas.gate[name]
    if sum(both.sizes) == 2 * module.down_proj.in_features:
        module.forward = partial(_mlp, both, down, gate)


def _activation(module: Any) -> str:
    config = getattr(module, "config", None)
    return str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", ""))


def _mlp(both: Group, down: Group, gate: Callable[..., Tensor], x: Tensor) -> Tensor:
    return down.call(gate(both.call(x.reshape(-1, x.shape[-1])))).view(x.shape)


AttentionInterface.register(IMPLEMENTATION, _note)
