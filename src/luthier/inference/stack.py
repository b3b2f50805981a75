"""A decoder's layers as one C++ call: for the common families, in bfloat16, on a CPU with AVX2 or AVX-512.

`stack.cpp` beside this file does the work; here a model of transformers is laid out for it: weights in tiles
in the place of the model's own, adapters in tiles by their slot, rotary tables, a cache of keys and values.
A step of few tokens costs little more than reading the weights once, because nothing of Python stands between
two layers. Whatever is not taken here (`takes`) answers through `inference.answering`, more slowly.

Like that one, a `Stack` proves itself against transformers' untouched forward before it is used. It does not
know requests, sampling, or which block is whose. On CPUs with matrix units (AMX) it is not used: torch's
products use them and tiles here do not; which is faster there is not measured.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.engine import native
from luthier.errors import ModelError
from luthier.inference.adapters import Pair
from luthier.inference.answering import SIBLINGS, Answering, heard, require_known, together
from luthier.inference.decode import Laid, Low
from luthier.inference.pages import BLOCK
from luthier.inference.proof import plainly, proof, prove

SOURCE = Path(__file__).with_name("stack.cpp")
TILE = 16
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})
# Kinds of rotary positions whose table does not change with the length.
STEADY = frozenset({"default", "llama3", "linear", "yarn"})


class _Linear(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("weight", "scale", "bias", "part", "a", "b", "rank", "lows")
    ] + [(name, ctypes.c_int64) for name in ("width", "tiles")]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "norm_mid", "norm_q", "norm_k")),
        *((name, _Linear) for name in ("qkv", "out", "both", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _Stack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("layers", "embed", "norm", "cosine", "sine")),
        *((name, ctypes.c_int64) for name in ("depth", "width", "hidden", "heads", "kv_heads", "head")),
        *((name, ctypes.c_int64) for name in ("turned", "low")),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "positions", "places", "slots", "lines", "table")),
        *((name, ctypes.c_int64) for name in ("tokens", "stride")),
    ]  # fmt: skip


def takes(model: Any) -> bool:
    """Whether this model on this machine can be answered with here."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = config.num_key_value_heads * head
    sizes = (config.hidden_size, head, kv, config.intermediate_size)
    rotary = getattr(config, "rope_parameters", None) or {}
    return (
        model.dtype is torch.bfloat16
        and model.device.type == "cpu"
        and config.model_type in FAMILIES
        and config.hidden_act in {"silu", "swish"}
        and all(size % TILE == 0 for size in sizes)
        and rotary.get("rope_type", "default") in STEADY
        and "amx_bf16" not in native.cpu_flags()
        and has_stack()
    )  # fmt: skip


@cache
def has_stack() -> bool:
    """Whether the C++ is here, and knows this CPU's instructions (`lanes.h`)."""
    return native.can_compile() and bool(_library().stack_has())


class Stack:
    """A model and its cache of `blocks` blocks; `slots` adapters may lie beside it at once.

    The layers' linear weights are taken out of the model: nothing else can compute with it then. With `int8`
    they are rounded to 8 bits, each output's by its own factor; adapters, norms, embeddings and the head stay
    as they are.
    """

    @torch.no_grad()
    def __init__(self, model: Any, blocks: int, slots: int, int8: bool = False) -> None:
        self.blocks = blocks
        self.dtype: torch.dtype = model.dtype
        ids_T = proof(model)
        plain_T_E, asked = plainly(model, ids_T), heard(model, ids_T)
        names = {module: name for name, module in model.named_modules()}
        kv_heads, head = asked[0].kept
        self._cache = torch.zeros(len(asked), 2, blocks * BLOCK * kv_heads * head, dtype=self.dtype)
        self._linears: list[_Linears] = []
        self._kept: list[Any] = []  # whatever the C++ has an address of
        layers = []
        for layer, held, one in zip(model.get_decoder().layers, self._cache, asked, strict=True):
            found = [_Linears(some, [names[linear] for linear in some], slots + 1, paired)
                     for some, paired in _families(layer)]  # fmt: skip
            self._linears += found
            for linears in found if int8 else ():
                linears.squeeze()
            for linear in (linear for some, _ in _families(layer) for linear in some):
                linear.weight.data = linear.weight.data.new_empty(0)
            where = [self._address(norm) for norm in _norms(layer)]
            cache = (held[0].data_ptr(), held[1].data_ptr(), one.sight.window or 0, one.sight.scale)
            layers.append(_Layer(*where, *(linears.described() for linears in found), *cache))
        self._describe(model, (_Layer * len(layers))(*layers), asked[0].kept)
        prove(self, ids_T, plain_T_E)

    def _describe(self, model: Any, layers: Any, kept: tuple[int, int]) -> None:
        config, decoder = model.config.get_text_config(), model.get_decoder()
        longest = min(int(config.max_position_embeddings), self.blocks * BLOCK)
        turns = decoder.rotary_emb(torch.zeros(1, dtype=self.dtype), torch.arange(longest)[None])
        self._head = _Linears([model.get_output_embeddings()], ["lm_head"], 1)
        self._width, self._vocabulary = int(config.hidden_size), len(model.get_input_embeddings().weight)
        tables = [self._address(table[0].contiguous()) for table in turns]
        embed = self._address(model.get_input_embeddings().weight.data.contiguous())
        self._kept.append(layers)
        self._stack = _Stack(
            ctypes.addressof(layers), embed, self._address(decoder.norm.weight.data), *tables, len(layers),
            self._width, config.intermediate_size, config.num_attention_heads, *kept, turns[0].shape[-1], 0,
            decoder.norm.variance_epsilon,
        )  # fmt: skip

    def _address(self, tensor: Tensor | None) -> int | None:
        self._kept.append(tensor)
        return None if tensor is None else tensor.data_ptr()

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the linear layers that an adapter may change."""
        return tuple(name for linears in self._linears for name in linears.names)

    def put(self, slot: int, pairs: Mapping[str, Pair] | None) -> None:
        """Lay an adapter into a slot (from 1), or nothing; all of it or none."""
        require_known(pairs, self.layers)
        lows = [linears.low(pairs) if pairs else None for linears in self._linears]
        for linears, low in zip(self._linears, lows, strict=True):
            self._stack.low = max(self._stack.low, linears.put(slot, low))

    def hidden(self, ids_T: Tensor, laid: Laid) -> Tensor:
        """The last hidden states (T, E) of a step's tokens, whose keys and values are in the cache then."""
        if not 0 <= int(ids_T.min()) <= int(ids_T.max()) < self._vocabulary:
            raise IndexError(f"a token beyond the vocabulary of {self._vocabulary}")
        out_T_E = torch.empty(len(ids_T), self._width, dtype=self.dtype)
        adapted = any(segment.slot for segment in laid.segments)
        reach = laid.reach
        step = _Step(
            ids_T.data_ptr(), laid.positions_T.data_ptr(), laid.places_T.data_ptr(),
            laid.slots_T.data_ptr() if adapted else None, reach.lines_T.data_ptr(),
            reach.table_S_N.data_ptr(), len(ids_T), reach.table_S_N.shape[1],
        )  # fmt: skip
        _library().stack_hidden(
            ctypes.byref(self._stack), ctypes.byref(step), ctypes.c_void_p(out_T_E.data_ptr())
        )
        return out_T_E

    def logits(self, hidden_B_E: Tensor) -> Tensor:
        """Float32 logits (B, V)."""
        x_B_E = hidden_B_E.contiguous()
        out_B_V = torch.empty(len(x_B_E), -(-self._head.outs // TILE) * TILE)
        x, out = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x_B_E, out_B_V))
        _library().stack_logits(ctypes.byref(self._head.described()), x, ctypes.c_long(len(x_B_E)), out)
        return out_B_V[:, : self._head.outs]


def _families(layer: Any) -> list[tuple[list[nn.Linear], bool]]:
    """A layer's four groups of linear layers that read one input; whether their outputs go in pairs."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (_named(attention, ("qkv_proj",), SIBLINGS[0]), False),
        ([attention.o_proj], False),
        (_named(mlp, ("gate_up_proj",), SIBLINGS[1]), True),
        ([mlp.down_proj], False),
    ]


def _named(module: Any, one: tuple[str, ...], several: tuple[str, ...]) -> list[nn.Linear]:
    """The layers that a family has as one, or as several."""
    return [getattr(module, name) for name in (one if hasattr(module, one[0]) else several)]


def _norms(layer: Any) -> list[Tensor | None]:
    own = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    norms = [layer.input_layernorm, layer.post_attention_layernorm, *own]
    return [None if norm is None else norm.weight.data for norm in norms]


def ready(model: Any, blocks: int, slots: int, int8: bool = False) -> Answering | Stack:
    """A model made ready to answer, the fastest way that it can be."""
    if takes(model):
        return Stack(model, blocks, slots, int8)
    if int8:
        raise ModelError(
            "weights in int8 answer on CPUs with AVX2 or AVX512-BF16 (and no AMX), for bfloat16 bases of the "
            f"families {', '.join(sorted(FAMILIES))}: this base or this machine is another",
            hint="release with `weights: trained`",
        )
    return Answering(model, blocks, slots)


class _Linears:
    """Layers that read one input, as tiles; `paired`: half of their outputs each go with one of the other."""

    def __init__(
        self, linears: Sequence[nn.Linear], names: Sequence[str], slots: int, paired: bool = False
    ) -> None:
        self.names = tuple(names)
        self._halves = 2 if paired else 1
        self._sizes = [linear.out_features for linear in linears]
        self.outs, self._width = sum(self._sizes), linears[0].in_features
        weights = [linear.weight.data for linear in linears]
        self._weight = self._tiles(_filled(torch.cat(weights)))
        self._scale: Tensor | None = None
        self._bias: Tensor | None = None
        if any(linear.bias is not None for linear in linears):
            zeros = [weight.new_zeros(len(weight)) for weight in weights]
            biases = [zero if linear.bias is None else linear.bias.data
                      for zero, linear in zip(zeros, linears, strict=True)]  # fmt: skip
            self._bias = self._ordered(_filled(torch.cat(biases)[:, None])).flatten()
        part_O = torch.arange(len(linears)).repeat_interleave(torch.tensor(self._sizes))
        self._part = self._ordered(_filled(part_O[:, None])).flatten()[::TILE].contiguous()
        self._tables = torch.zeros(4, slots, dtype=torch.int64)  # addresses of A and B, the rank, tiles of A
        self._lows: dict[int, tuple[Tensor, Tensor]] = {}

    def described(self) -> _Linear:
        """Its addresses, which stay what they are."""
        scale, bias = (None if x is None else x.data_ptr() for x in (self._scale, self._bias))
        tables = (row.data_ptr() for row in self._tables)
        at = (self._weight.data_ptr(), scale, bias, self._part.data_ptr(), *tables)
        return _Linear(*at, self._width, len(self._weight))

    def squeeze(self) -> None:
        """From here on the weights are int8, each output's with the factor that its largest asks for."""
        scale_NT = self._weight.abs().amax(dim=(1, 3)).float().div(127).clamp(min=1e-12)
        self._weight = (self._weight.float() / scale_NT[:, None, :, None]).round().to(torch.int8)
        self._scale = scale_NT.flatten()

    def low(self, pairs: Mapping[str, Pair]) -> Low | None:
        like = torch.empty(0, self._width, dtype=torch.bfloat16)
        return together(pairs, self.names, self._sizes, like)

    def put(self, slot: int, low: Low | None) -> int:
        """An adapter's part, or nothing, into a slot; returns how many numbers its A makes of a token."""
        self._tables[:, slot] = 0
        self._lows.pop(slot, None)
        if low is None:
            return 0
        a_PR_E = _filled(low.a_PR_E)
        a, b = self._lows[slot] = _tiles(a_PR_E), self._tiles(low.b_R_O.T)
        self._tables[:, slot] = torch.tensor([a.data_ptr(), b.data_ptr(), low.rank, len(a)])
        return len(a_PR_E)

    def _ordered(self, x_O_N: Tensor) -> Tensor:
        """Tiles one after another, or of each half one in turn."""
        width = x_O_N.shape[1]
        return x_O_N.reshape(self._halves, -1, TILE, width).transpose(0, 1).reshape(-1, width)

    def _tiles(self, x_O_E: Tensor) -> Tensor:
        return _tiles(self._ordered(x_O_E))


def _filled(x_O_N: Tensor) -> Tensor:
    """With zeros behind, as many whole tiles."""
    return nn.functional.pad(x_O_N, (0, 0, 0, -len(x_O_N) % TILE))


def _tiles(x_O_E: Tensor) -> Tensor:
    """(outputs, width) as (outputs / 16, width / 2, 16, 2)."""
    outs, width = x_O_E.shape
    return x_O_E.reshape(outs // TILE, TILE, width // 2, 2).transpose(1, 2).contiguous()


def _library() -> ctypes.CDLL:
    return native.build(SOURCE)
