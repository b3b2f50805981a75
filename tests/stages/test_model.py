from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luthier import artifacts
from luthier.errors import Interrupted, ModelError
from luthier.recipe import Model
from luthier.rows import chat
from luthier.sources import _weights
from luthier.stages import Inputs, model


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for split in model.SPLITS:
        turns = [{"role": "user", "content": f"q {split}"}, {"role": "assistant", "content": "yes"}]
        rows = [chat(turns, f"{split}.csv:2").as_record()]
        artifacts.write_jsonl(tmp_path / "data" / "rows" / f"{split}.jsonl", rows)
    return tmp_path / "data"


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "given")
    return tmp_path / "given"


def section(path: str = "given", **changes: Any) -> Model:
    given = {"from": {"name": "files", "files": {"model": path}}, "licence": "MIT", "dtype": "float32"}
    return Model.model_validate(given | changes)


def run(dataset: Path, out: str = "out", part: Model | None = None, **changes: Any) -> dict[str, Any]:
    root = dataset.parent
    given: dict[str, Any] = {
        "name": "toy",
        "artefacts": {"data": dataset},
        "digests": {},
        "root": root,
        "seed": 17,
    }
    given |= {"cache": root / "cache", "scratch": root / "scratch"}
    (root / out).mkdir(exist_ok=True)
    return model.run(part or section(), Inputs(**(given | changes)), root / out)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_becomes_a_plain_base_that_transformers_loads(
    dataset: Path, base: Path, tmp_path: Path
) -> None:
    (base / "README.md").write_text("not needed")
    facts = run(dataset)
    kept = tmp_path / "out" / "base"
    assert {path.name for path in kept.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    loaded, report = AutoModelForCausalLM.from_pretrained(kept, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(base)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))
    assert facts["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert facts["architecture"] == "LlamaForCausalLM" and facts["licence"] == "MIT"
    assert facts["template_check"]["rows"] == 3 and loaded.generation_config.eos_token_id == 2
    about = artifacts.read_json(tmp_path / "out" / "base.json")
    assert about["digest"] == facts["digest"] and about["source"]["name"] == "files"


def test_weights_are_kept_in_the_type_the_recipe_names(dataset: Path, base: Path, tmp_path: Path) -> None:
    facts = run(dataset, part=section(dtype="bfloat16"))
    kept = tmp_path / "out" / "base"
    assert {tensor.dtype for tensor in load_file(kept / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((kept / "config.json").read_text())["dtype"] == "bfloat16" == facts["dtype"]
    assert run(dataset, "other")["digest"] != facts["digest"]


def test_the_same_source_gives_the_same_bytes_and_is_converted_once(
    dataset: Path, base: Path, tmp_path: Path
) -> None:
    first = run(dataset, "one")
    said: list[str] = []
    second = run(dataset, "two", tell=lambda event: said.append(event.message))
    shutil.rmtree(tmp_path / "cache")
    third = run(dataset, "three")
    assert first == second == third and not any("converting" in message for message in said)
    digests = {artifacts.seal(tmp_path / name) for name in ("one", "two", "three")}
    assert len(digests) == 1


def test_a_damaged_or_half_made_conversion_is_never_used(dataset: Path, base: Path, tmp_path: Path) -> None:
    good = run(dataset, "one")
    (kept,) = (tmp_path / "cache" / "bases").iterdir()
    weights = kept / "base" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.unlink()
    weights.write_bytes(damaged)
    assert run(dataset, "two") == good
    (kept / "manifest.json").unlink()
    assert run(dataset, "three") == good


def test_one_changed_byte_of_the_model_asks_for_another_base(base: Path, tmp_path: Path) -> None:
    before = model.external(section(), tmp_path)
    (base / "tokenizer_config.json").write_text((base / "tokenizer_config.json").read_text() + " ")
    assert model.external(section(), tmp_path) != before


def refused(dataset: Path, words: str, part: Model | None = None) -> ModelError:
    with pytest.raises(ModelError, match=words) as caught:
        run(dataset, part=part)
    left = dataset.parent / "cache" / "bases"
    assert not left.exists() or not list(left.iterdir())
    return caught.value


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "optimizer.pth", "x.PKL"])
def test_pickles_are_refused_even_beside_safetensors(dataset: Path, base: Path, name: str) -> None:
    (base / name).write_bytes(b"\x80\x04K\x01.")
    assert name in refused(dataset, "pickled code").what


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_folder_with_code_of_its_own_is_refused(dataset: Path, base: Path, name: str) -> None:
    (base / "evil.py").write_text("raise SystemExit('ran')")
    edit(base / name, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]})
    refused(dataset, f"{name} asks for code")


def test_folders_that_are_no_model_are_refused(dataset: Path, base: Path, tmp_path: Path) -> None:
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(dataset, "quantised")
    (base / "config.json").write_text("{")
    refused(dataset, "not JSON")
    (base / "config.json").unlink()
    refused(dataset, "no config.json")
    (tmp_path / "a.txt").write_text("x")
    refused(dataset, "neither a model folder nor", section("a.txt"))
    (tmp_path / "a.gguf").write_text("x" * 100)
    refused(dataset, "a.gguf|cannot be loaded", section("a.gguf"))


def test_weights_that_do_not_fit_their_configuration_are_refused(dataset: Path, base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    edit(base / "config.json", num_hidden_layers=3, layer_types=None)
    refused(dataset, "missing keys: model.layers.2")
    edit(base / "config.json", **config)
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    refused(dataset, "missing keys|cannot be loaded")


def test_a_tokenizer_of_another_model_is_refused(dataset: Path, base: Path) -> None:
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] += [
        {"id": n, "content": f"<x{n}>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for n in range(len(content["model"]["vocab"]), len(content["model"]["vocab"]) + 9)
    ]  # fmt: skip
    (base / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"belongs to another model|the model knows"):
        run(dataset)


def test_an_unknown_licence_or_label_stops_before_anything_is_fetched(dataset: Path) -> None:
    assert (
        refused(dataset, "unknown licence 'dunno'", section("no", licence="dunno")).where == "model.licence"
    )
    part = section(**{"from": {"name": "files", "files": {"modle": "given"}}})
    refused(dataset, "unknown label 'modle'; did you mean 'model'", part)


def test_a_template_that_cannot_be_learnt_from_blocks_the_run(dataset: Path, base: Path) -> None:
    path = base / "chat_template.jinja"
    path.write_text(path.read_text().replace("'<|im_end|>'", "''"))
    with pytest.raises(ModelError, match="no stop token") as caught:
        run(dataset)
    assert caught.value.where == "train.csv:2"


def test_someone_who_asks_to_stop_is_heard_and_leaves_nothing_half_made(
    dataset: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(dataset, stopping=lambda: True)
    left = tmp_path / "cache" / "bases"
    assert not left.exists() or not list(left.iterdir())


def test_a_licence_that_contradicts_the_file_is_refused() -> None:
    with pytest.raises(ModelError, match=r"file itself says Apache-2\.0"):
        model._same_licence("apache-2.0", "MIT")
    model._same_licence("apache-2.0", "Apache-2.0")
    model._same_licence("some words", "MIT")
    model._same_licence(None, "MIT")


def test_generation_stops_where_the_tokenizer_stops() -> None:
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    assert _weights._generation(Tokenizer(), {}) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    kept = _weights._generation(Tokenizer(), {"eos_token_id": [7, 2], "transformers_version": "5"})
    assert kept["eos_token_id"] == [7, 2] and "transformers_version" not in kept
