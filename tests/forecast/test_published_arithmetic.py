"""Published arithmetic comes out of the functions that plan a run: exactly, or with the stated rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from luthier.forecast import bits, flops, footprint, layout
from luthier.methods import lora
from luthier.template import Encoded

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, tie_word_embeddings=False,
)  # fmt: skip
MIXTRAL_8X7B = MixtralConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    tie_word_embeddings=False,
)  # fmt: skip


def outline(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class OneLinear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Linear(4096, 4096, bias=False, device="meta")

    def get_output_embeddings(self) -> None:
        return None


def test_rank_8_on_a_4096_by_4096_layer_is_65536_weights_256_times_fewer() -> None:
    found = lora.trainable(OneLinear(), lora.Params(r=8))
    assert found == 65_536 and 4096 * 4096 == 16_777_216 == 256 * found


@pytest.mark.parametrize(
    ("targets", "rank", "trainable", "percent"),
    [
        (("q_proj", "v_proj"), 8, 3_407_872, 0.042),
        (("q_proj", "k_proj", "v_proj"), 8, 4_718_592, 0.059),
        (("q_proj", "k_proj", "v_proj", "o_proj"), 8, 6_815_744, 0.085),
        ("all-linear", 8, 20_971_520, 0.261),
        ("all-linear", 16, 41_943_040, 0.522),
    ],
)
def test_trainable_shares_of_llama_3_8b(targets: Any, rank: int, trainable: int, percent: float) -> None:
    model = outline(LLAMA_3_8B)
    ranks = lora.ranks(model, lora.Params(r=rank, targets=targets))
    shape = footprint.shape(model, ranks, 2)
    assert shape.parameters == 8_030_261_248
    assert shape.trainable == lora.trainable(model, lora.Params(r=rank, targets=targets)) == trainable
    assert round(100 * trainable / shape.parameters, 3) == percent


def test_rank_8_on_queries_and_values_of_llama_2_7b() -> None:
    model = outline(LLAMA_2_7B)
    found = lora.trainable(model, lora.Params(r=8, targets=("q_proj", "v_proj")))
    assert found == 4_194_304
    assert round(100 * found / sum(flops.sizes(model).values()), 3) == 0.062


def test_bits_per_parameter_full_lora_and_qlora_and_the_sum_that_slides_get_wrong() -> None:
    full = bits.bits(16)
    lora_ = bits.bits(16, share=0.025, moments_bits=32)
    qlora = bits.bits(4, share=0.025, moments_bits=32)
    assert (full.weights, full.gradients, full.optimiser, full.total) == (16, 16, 64, 96)
    assert (lora_.adapters, lora_.gradients, lora_.optimiser) == pytest.approx((0.4, 0.4, 0.8))
    assert lora_.total == pytest.approx(17.6)
    assert qlora.total == pytest.approx(5.6), "the parts listed; the published sum is 5.2"
    sizes = [round(each * 65 / 8) for each in (full.total, lora_.total, 5.2)]
    assert sizes == [780, 143, 42] and full.total_bytes(65e9) == 780e9
    assert round(full.total / 5.2, 1) == 18.5


def test_double_quantisation_takes_constants_from_a_half_to_0_127_bits() -> None:
    once = bits.constants_bits([64], [32])
    twice = bits.constants_bits([64, 256], [8, 32])
    assert once == 0.5 and twice == 8 / 64 + 32 / (64 * 256) and round(twice, 3) == 0.127
    assert round(once - twice, 3) == 0.373
    assert round((once - twice) * 65e9 / 8 / 1e9, 1) == 3.0


def test_mixtral_has_46_7_billion_weights_and_12_9_at_work_for_a_token() -> None:
    weights = flops.sizes(outline(MIXTRAL_8X7B))
    whole, at_work = flops.active(weights, experts=8, chosen=2)
    assert round(whole / 1e9, 1) == 46.7 and round(at_work / 1e9, 1) == 12.9
    assert round(100 * at_work / whole, 1) == 27.6


def test_full_tuning_of_7_billion_weights_in_float32_takes_112_gb() -> None:
    full = bits.bits(32, trained_bits=32, moments_bits=64)
    assert full.total / 8 == 16 and full.total_bytes(7e9) == 112e9


def test_a_frozen_base_costs_four_operations_a_weight_and_token() -> None:
    shape = footprint.shape(outline(LLAMA_3_8B), {}, 2)
    ranks = lora.ranks(outline(LLAMA_3_8B), lora.Params(r=16))
    adapted = footprint.shape(outline(LLAMA_3_8B), ranks, 2)
    at = layout.of([Encoded(tuple(range(512)), tuple(n >= 384 for n in range(512)), "row")])
    found = flops.training(adapted, at)
    assert shape.blocks == 6_979_321_856
    assert found.blocks / at.tokens == pytest.approx(4 * shape.blocks, rel=0.01), (
        "the first layer sends less back"
    )
    assert found.useful / at.tokens == pytest.approx(29.1e9, rel=0.03)
