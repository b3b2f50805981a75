"""What every server of the comparison answers with: one base, eight adapters, prompts; each form made once.

    python bench/serving/made.py FOLDER --rows bench/.rows

FOLDER gets `adapters/a1 … a8` (PEFT; rank 16 on every linear layer but the head, random, no two alike),
`merged` (the base with a1 folded in), `home` (luthier's releases of the eight), `prompts.json` (texts cut
from the guard's training messages) and, where llama.cpp's environment stands, `gguf/` for it (Q8_0, and each
adapter as a LoRA file). It does not know how anything is served.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from luthier import artifacts, template
from luthier.home import Home
from luthier.store import ReleaseRecord, Store

ADAPTERS = tuple(f"a{number}" for number in range(1, 9))
RANK, SIGMA, SEED = 16, 0.02, 17
SHORT, LONG, SHORTS, LONGS = 64, 1120, 96, 12  # tokens of a prompt, and how many prompts of each kind
NAME = "bench"
LLAMACPP = Path(__file__).parents[1] / "peers" / ".venvs" / "llamacpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=Path, required=True, help="what workloads.py wrote: rows and a base")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    base = Path(json.loads((asked.rows / "about.json").read_text("utf-8"))["base"])
    adapters(base, asked.folder)
    prompts(base, asked.rows, asked.folder)
    home(base, asked.folder)
    gguf(base, asked.folder)
    about = {"base": str(base), "rank": RANK, "sigma": SIGMA, "seed": SEED, "adapters": ADAPTERS}
    artifacts.write_json(asked.folder / "about.json", about)


def adapters(base: Path, folder: Path) -> None:
    """Eight adapters that differ, and the first one merged into the base."""
    if (folder / "merged").exists():
        return
    for number, name in enumerate(ADAPTERS):
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        torch.manual_seed(SEED + number)
        tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
        for weight_name, weight in tuned.named_parameters():
            if "lora_B" in weight_name:
                torch.nn.init.normal_(weight, std=SIGMA)
        tuned.save_pretrained(folder / "adapters" / name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, folder / "adapters" / ADAPTERS[0]).merge_and_unload()
    merged.save_pretrained(folder / "merged.part")
    template.load_tokenizer(base).save_pretrained(folder / "merged.part")
    (folder / "merged.part").rename(folder / "merged")


def prompts(base: Path, rows: Path, folder: Path) -> None:
    tokenizer = template.load_tokenizer(base)
    ids = [token for row in artifacts.read_jsonl(rows / "chat.jsonl") for token in row["input_ids"]]
    draw = random.Random(SEED)

    def some(length: int, count: int) -> list[str]:
        starts = [draw.randrange(len(ids) - length) for _ in range(count)]
        return [tokenizer.decode(ids[at : at + length], skip_special_tokens=True) for at in starts]

    artifacts.write_json(folder / "prompts.json", {"short": some(SHORT, SHORTS), "long": some(LONG, LONGS)})


def home(base: Path, folder: Path) -> None:
    """A home of luthier in which each adapter is an accepted release, `bench@aN`."""
    if (folder / "home").exists():
        return
    made = Home.at(folder / "home.part")
    store = Store.open(made.path)
    model = folder / "model.part"
    shutil.copytree(base, model / "base")
    files = {path.name: artifacts.file_digest(path) for path in sorted((model / "base").iterdir())}
    digest = artifacts.digest_of(files)
    artifacts.write_json(model / "base.json", {"digest": digest})
    model_digest = _publish(made, model)
    for name in ADAPTERS:
        release = folder / "release.part"
        shutil.copytree(folder / "adapters" / name, release / "adapter")
        (release / "adapter" / "README.md").unlink(missing_ok=True)
        config = release / "adapter" / "adapter_config.json"
        about = json.loads(config.read_text("utf-8")) | {
            "base_model_name_or_path": f"luthier-base:{digest[:12]}"
        }
        artifacts.write_json(config, about)
        artifacts.write_json(
            release / "release.json", {"name": NAME, "base": digest, "model": model_digest, "accepted": True}
        )
        record = ReleaseRecord(_publish(made, release), NAME, None, True, {"model": model_digest})
        store.add_release(record)
        for alias in (name, *(("production",) if name == ADAPTERS[0] else ())):
            store.move_ref(NAME, alias, record.digest, expected=None, actor="bench", reason="made")
    store.close()
    (folder / "home.part").rename(folder / "home")


def _publish(home: Home, folder: Path) -> str:
    digest = artifacts.seal(folder)
    artifacts.publish(folder, home.artifact(digest))
    return digest


def gguf(base: Path, folder: Path) -> None:
    """The base as Q8_0 by llama.cpp's own converter, and each adapter in llama.cpp's LoRA format."""
    out = folder / "gguf"
    if out.exists() or not LLAMACPP.exists():
        return
    part = folder / "gguf.part"
    part.mkdir(exist_ok=True)
    script = next(LLAMACPP.glob("lib/python3*/site-packages/convert_hf_to_gguf.py"))
    command = [str(LLAMACPP / "bin" / "python"), str(script), str(base), "--outtype", "q8_0"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*command, "--outfile", str(part / "base.gguf")], check=True, env=clean)
    config = json.loads((base / "config.json").read_text("utf-8"))
    for name in ADAPTERS:
        _lora_file(folder / "adapters" / name, config, part / f"{name}.gguf")
    part.rename(out)


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _lora_file(adapter: Path, config: dict[str, Any], out: Path) -> None:
    """A GGUF of type adapter; q and k in the row order that llama.cpp's rotary positions want."""
    import gguf as format_
    from safetensors.torch import load_file

    writer = format_.GGUFWriter(str(out), "llama")
    writer.add_type(format_.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for name, weight in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        _, _, rest = name.partition(".layers.")
        number, _, module = rest.partition(".")
        module, _, kind = module.removesuffix(".weight").rpartition(".")
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        value = weight.float()
        if kind == "lora_B" and NAMES[module] in heads:
            half = len(value) // heads[NAMES[module]] // 2
            value = value.view(heads[NAMES[module]], 2, half, -1).transpose(1, 2).reshape(value.shape)
        suffix = {"lora_A": "lora_a", "lora_B": "lora_b"}[kind]
        writer.add_tensor(f"blk.{number}.{NAMES[module]}.weight.{suffix}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
