"""Fused is PEFT: the same log-probabilities and the same gradients, in every family, whatever is adapted."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from luthier.engine import attention, batch, documents, fused, head
from luthier.engine.kernels import Seen
from luthier.engine.native import can_compile, kernels
from luthier.methods import lora
from tests.engine.test_attention import rows
from tests.engine.tiny_families import FAMILIES, SMALL, make

COMPILER = pytest.mark.skipif(not can_compile(), reason="no C++ compiler is installed")
LENGTHS = (17, 9, 9, 4)
CONFIGS = FAMILIES | {
    "qwen2, biased": lambda: Qwen2Config(**SMALL),
    "gelu": lambda: LlamaConfig(**SMALL, hidden_act="gelu"),
}
# A layer's norms, linears, MLP and attention, twice, and the last norm.
FUSED = {"gemma3": 31, "gelu": 21, "phi3": 17, "qwen3": 27}
# All computed again, whole or in blocks of queries; or streamed, where rotary positions are autograd's.
LIMITS = [
    [(documents, "SHORT", 0)],
    [(documents, "SHORT", 0), (documents, "QUERIES", 4)],
    [(attention, "LONG", 0)],
]


def adapted(config: Any, **how: Any) -> Any:
    """A family's model under LoRA with a B that is not zero."""
    model = lora.attach(make(config), lora.Params(**{"r": 4, "alpha": 6, **how}), seed=1)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=noise)
    return model


def learnt(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = head.batch_logps(model, batch.collate(rows(LENGTHS)))
    (logps * torch.linspace(0.5, 1.5, len(logps))).sum().backward()
    return logps.detach(), {
        name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad
    }


def assert_equal_models(one: Any, other: Any, bound: float) -> None:
    (logps, gradients), (expected, expected_gradients) = learnt(one), learnt(other)
    assert gap(logps, expected) <= bound
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in gradients.items():
        assert gap(gradient, expected_gradients[name]) <= bound, name


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative distance of two tensors."""
    return float((one.detach().float() - other.float()).norm() / other.detach().float().norm())


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_fused_is_peft_in_float32(family: str) -> None:
    model = adapted(CONFIGS[family]())
    plain = copy.deepcopy(model)
    assert fused.fuse(model, kernels(compiled=False)) == FUSED.get(family, 23)
    assert_equal_models(model, plain, 2e-6)


@pytest.mark.parametrize("limits", LIMITS)
def test_fused_is_peft_where_documents_are_long(limits: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(FAMILIES["qwen3"]())
    plain = copy.deepcopy(model)
    fused.fuse(model, kernels(compiled=False))
    for limit in limits:
        monkeypatch.setattr(*limit)
    assert_equal_models(model, plain, 2e-6)


@pytest.mark.parametrize("spare", ["selective", "full"])
@pytest.mark.parametrize("family", ["gemma3", "llama", "phi3"])
def test_what_is_computed_again_gives_the_same_bits(family: str, spare: fused.Spare) -> None:
    model = adapted(FAMILIES[family]())
    saving = copy.deepcopy(model)
    fused.fuse(model, kernels(compiled=False))
    fused.fuse(saving, kernels(compiled=False), spare)
    assert_equal_models(saving, model, 0.0)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("down_proj",), ("up_proj", "o_proj")])
def test_fused_is_peft_where_some_layers_have_no_adapter(targets: tuple[str, ...]) -> None:
    model = adapted(FAMILIES["llama"](), targets=targets)
    plain = copy.deepcopy(model)
    fused.fuse(model, kernels(compiled=False))
    attention = model.get_decoder().layers[0].self_attn
    assert "forward" in vars(attention.o_proj), "also a layer without an adapter has our products"
    assert_equal_models(model, plain, 2e-6)


def test_fused_is_peft_in_bfloat16_but_for_rounding() -> None:
    model = adapted(FAMILIES["llama"]())
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    plain = copy.deepcopy(model)
    fused.fuse(model, kernels(compiled=False))
    assert_equal_models(model, plain, 4e-2)


def test_what_is_not_recognised_is_left_as_it_was() -> None:
    model = adapted(FAMILIES["llama"](), dropout=0.5)
    fused.fuse(model, kernels(compiled=False))
    changed = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "forward" in vars(module)}
    assert changed == {"input_layernorm", "post_attention_layernorm", "norm"}


def test_one_copy_of_the_base_is_held_and_parameters_stay_the_same() -> None:
    model = adapted(FAMILIES["llama"]())
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fused.fuse(model, kernels(compiled=False))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    attention = model.get_decoder().layers[0].self_attn
    layers = (getattr(attention, name).base_layer for name in ("q_proj", "k_proj", "v_proj"))
    storages = {layer.weight.untyped_storage().data_ptr() for layer in layers}
    assert len(storages) == 1


def test_a_layer_called_alone_or_twice_still_answers() -> None:
    model = adapted(FAMILIES["llama"]())
    plain = copy.deepcopy(model)
    fused.fuse(model, kernels(compiled=False))
    own, other = (m.get_decoder().layers[1].self_attn for m in (model, plain))
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    for name in ("k_proj", "k_proj", "q_proj", "v_proj", "k_proj"):
        assert gap(getattr(own, name)(x), getattr(other, name)(x)) < 1e-6


@COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_formulas_are_the_formulas(dtype: torch.dtype) -> None:
    plain, compiled = kernels(compiled=False), kernels(compiled=True)
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    draw = torch.Generator().manual_seed(0)
    for tokens in (1, 7, 64):
        x, grad = (torch.randn(tokens, 32, generator=draw).to(dtype) for _ in range(2))
        weight = torch.randn(32, generator=draw).to(dtype)
        y, scale = plain.norm(x, weight, 1e-6, 1.0)
        assert gap(compiled.norm(x, weight, 1e-6, 1.0)[0], y) < bound
        expected = plain.norm_backward(grad, x, weight, scale, 1.0)
        assert gap(compiled.norm_backward(grad, x, weight, scale, 1.0), expected) < bound
        for name in plain.gate:
            assert gap(compiled.gate[name](x), plain.gate[name](x)) < bound
            slope = grad[:, :16].contiguous()  # the C++ takes nothing else
            found = compiled.gate_backward[name](slope, x)
            for one, other in zip(found, plain.gate_backward[name](slope, x), strict=True):
                assert gap(one, other) < bound


@COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", [Seen(20), Seen(20, 7), Seen(20, 7, 5), Seen(2)])
def test_compiled_softmax_sees_the_keys_that_the_plain_one_sees(dtype: torch.dtype, seen: Seen) -> None:
    plain, compiled = kernels(compiled=False), kernels(compiled=True)
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    draw = torch.Generator().manual_seed(0)
    shape = (4, 3 * seen.length, seen.before + seen.length)
    scores, grad = (4 * torch.randn(*shape, generator=draw).to(dtype) for _ in range(2))
    weights = plain.soften(scores.clone(), seen, 0.3)
    found = compiled.soften(scores.clone(), seen, 0.3)
    assert gap(found, weights) < bound
    assert torch.equal(found == 0, weights == 0)
    slope = plain.soften_backward(grad.clone(), weights, seen, 0.3)
    assert gap(compiled.soften_backward(grad.clone(), weights, seen, 0.3), slope) < bound


@COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_rotation_and_head_are_the_plain_ones(dtype: torch.dtype) -> None:
    plain, compiled = kernels(compiled=False), kernels(compiled=True)
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(33, 9, 16, generator=draw).to(dtype)[:, 3:7]  # a piece of a wider row
    cos, sin = (torch.randn(33, 12, generator=draw).to(dtype) for _ in range(2))
    assert gap(compiled.turn(x, cos, sin), plain.turn(x, cos, sin)) < bound
    assert gap(compiled.unturn(x, cos, sin), plain.unturn(x, cos, sin)) < bound
    logits = 6 * torch.randn(9, 1000, generator=draw).to(dtype)
    targets = torch.randint(0, 1000, (9,), generator=draw)
    targets[2:6] = logits[2:6].argmax(-1)
    logits[3, 0] = logits[3].max()  # the first of two equals is the likeliest, and not the target
    logits[4, 999] = logits[4].max()
    one, other = (formulas.settle(logits.clone(), targets, True) for formulas in (compiled, plain))
    assert gap(one[0], other[0]) < bound and gap(one[2], other[2]) < bound
    assert one[1].tolist() == other[1].tolist() == [n in (2, 4, 5) for n in range(9)]
    alone = compiled.settle(logits.clone(), targets, False)
    assert torch.equal(alone[0], one[0]) and torch.equal(alone[1], one[1]) and alone[2] is None


@COMPILER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_compiled_formulas_let_no_bad_number_pass_for_a_good_one(dtype: torch.dtype, bad: float) -> None:
    compiled = kernels(compiled=True)
    row = torch.ones(1, 40, dtype=dtype)
    row[0, 17] = bad
    assert not compiled.norm(row, torch.ones(40, dtype=dtype), 1e-5, 0.0)[0].isfinite().all()
    assert not compiled.settle(row.clone(), torch.tensor([3]), True)[0].isfinite().all()
    assert not compiled.soften(row.clone(), Seen(1, 39), 1.0).isfinite().all()
    both = torch.cat((row, row), dim=1)
    assert not compiled.gate["silu"](both).isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILER)])
def test_what_a_young_adapter_adds_is_not_rounded_away_in_bfloat16(bias: bool, compiled: bool) -> None:
    noise = torch.Generator().manual_seed(5)
    linear = torch.nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16).requires_grad_(False)
    a, b = (torch.nn.Parameter(torch.randn(shape, generator=noise)) for shape in ((4, 64), (96, 4)))
    x = torch.randn(256, 64, generator=noise).bfloat16()
    with torch.no_grad():
        a.mul_(0.05)
        b.mul_(2e-4)  # after one step of AdamW at 2e-4
    stack = fused.Stack([fused.Part(linear, a, b, 2.0)], kernels(compiled))
    low = stack.low(stack.adapters())
    assert low is not None
    grad = torch.randn(256, 96, generator=noise).bfloat16()
    wide_a, wide_b = (weight.float() for weight in low)
    found = [
        (stack.forward(x, low)[0], stack.forward(x, None)[0], x.float() @ wide_a.T @ wide_b.T),
        (stack.input_gradient(grad, low)[0], stack.input_gradient(grad, None)[0], grad @ low[1] @ low[0]),
    ]
    for with_, without, added in found:
        assert with_ is not None and without is not None
        wide = added.float()
        assert wide.abs().mean() < without.float().abs().mean() / 256  # below half a unit in the last place
        kept = ((with_.float() - without.float()) * wide).sum() / wide.square().sum()
        assert 0.7 < float(kept) < 1.3
