"""LoRA starts as its base, moves only what it should, and leaves plain PEFT files with the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from luthier.engine import base, batch, head
from luthier.errors import ModelError
from luthier.methods import lora
from tests.engine.test_attention import rows
from tests.tiny import make_tiny_base

PARAMS = lora.Params(r=4, alpha=8)


def attached(folder: Path, params: lora.Params = PARAMS, seed: int = 1, dtype: str = "float32") -> Any:
    return lora.attach(base.load(folder, dtype), params, seed)


def test_before_the_first_step_the_model_is_its_base(tiny_base: Path) -> None:
    micro = batch.collate(rows((9, 5)))
    plain = head.batch_logps(base.load(tiny_base, "float32"), micro)
    assert torch.equal(head.batch_logps(attached(tiny_base), micro), plain)


def test_at_the_first_step_b_has_a_gradient_and_a_has_none(tiny_base: Path) -> None:
    """B is zero, so A's gradient is zero: were both zero, neither would ever move."""
    model = attached(tiny_base)
    head.batch_logps(model, batch.collate(rows((9, 5)))).sum().backward()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert bool(weight.grad.any()) is (".lora_B." in name), name
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            weight.data.zero_()
    model.zero_grad()
    head.batch_logps(model, batch.collate(rows((9, 5)))).sum().backward()
    assert not any(bool(w.grad.any()) for w in model.parameters() if w.requires_grad)


def test_the_start_comes_from_the_seed_alone(tiny_base: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = attached(tiny_base)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    two, other = attached(tiny_base), attached(tiny_base, seed=2)
    weights = [{n: w for n, w in model.named_parameters() if ".lora_A." in n} for model in (one, two, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not any(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    for name, weight in weights[0].items():
        assert float(weight.detach().abs().max()) <= weight.shape[1] ** -0.5, name


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_trainable_weights_follow_the_closed_form(tiny_base: Path, targets: Any) -> None:
    params = lora.Params(r=6, targets=targets)
    per_layer = {"q_proj": 64 + 64, "v_proj": 64 + 32}
    if targets == "all-linear":
        per_layer |= {
            "k_proj": 64 + 32,
            "o_proj": 64 + 64,
            "gate": 64 + 128,
            "up": 64 + 128,
            "down": 128 + 64,
        }
    expected = 2 * 6 * sum(per_layer.values())
    found = lora.report(attached(tiny_base, params))
    assert found["trainable_parameters"] == expected == lora.trainable(base.outline(tiny_base), params)
    assert 0 < found["trainable_share"] < 1


def test_adapters_are_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    model = attached(make_tiny_base(tmp_path / "bf16", dtype="bfloat16"), dtype="bfloat16")
    for weight in model.parameters():
        assert weight.dtype is (torch.float32 if weight.requires_grad else torch.bfloat16)


def test_saved_files_are_plain_peft_with_the_same_bytes_each_time(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        lora.save(attached(tiny_base), tmp_path / name, "luthier-base:0123")
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "luthier-base:0123" and "peft_version" not in config
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tiny_base) not in (tmp_path / "one" / "adapter_config.json").read_text()
    saved = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in saved)


def test_a_stranger_with_plain_peft_gets_the_same_logits(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = attached(tiny_base)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(0, 0.05, generator=noise)
    lora.save(model, tmp_path, "luthier-base:0123")
    document = rows((11,))
    expected = head.batch_logps(model, batch.collate(document))
    for loaded in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path).eval(),
        lora.load(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path),
    ):
        found = base._plain_logps(loaded, batch.collate(document))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_target_is_answered_with_the_names_there_are(tiny_base: Path) -> None:
    with pytest.raises(ModelError, match="q_proj"):
        attached(tiny_base, lora.Params(targets=("qproj",)))


def test_a_folder_without_safetensors_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="safetensors"):
        lora.load(base.load(tiny_base, "float32"), tmp_path)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"dropout": 1.0}, {"targets": "q_proj"}, {"rank": 8}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        lora.Params.model_validate(wrong)
