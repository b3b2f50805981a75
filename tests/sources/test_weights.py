"""GGUF to a plain folder, with a real (tiny) GGUF file: names and layout as llama.cpp writes them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from luthier import artifacts, template
from luthier.errors import ModelError
from luthier.rows import Message, Role
from luthier.sources import _weights

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
DIE = """
import os, signal, sys
from pathlib import Path
from luthier.sources import _weights
def tell(message, done, total):
    if message.startswith("de-quantising") and done:
        os.kill(os.getpid(), signal.SIGKILL)
_weights.prepare(Path(sys.argv[1]), "d", "float32", Path(sys.argv[2]), tell)
"""


def silent(message: str, done: int | None, total: int | None) -> None:
    del message, done, total


def named(name: str) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def rotated(tensor: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps query and key rows interleaved for its rotary embedding."""
    rows, columns = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def make_gguf(base: Path, path: Path) -> Path:
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size + 1)
    tokens = [*tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), "zq"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["z q"])
    for key, value in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{key}_token_id")(value)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in load_file(base / "model.safetensors").items():
        array = np.vstack([tensor, tensor[:1]]) if "embed" in name else tensor.numpy()
        if "q_proj" in name:
            array = rotated(array, config.num_attention_heads)
        if "k_proj" in name:
            array = rotated(array, config.num_key_value_heads)
        writer.add_tensor(named(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tiny_base, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_becomes_the_folder_it_was_made_from(file: Path, tiny_base: Path, tmp_path: Path) -> None:
    kept, licence = _weights.prepare(file, "d", "float32", tmp_path, silent)
    assert licence == "mit"
    made, given = load_file(kept / "model.safetensors"), load_file(tiny_base / "model.safetensors")
    assert made.keys() == given.keys()
    assert all(torch.equal(made[name][: len(given[name])], given[name]) for name in given)
    question = [Message(Role.USER, "hi there")]
    assert template.prompt_ids(template.load_tokenizer(kept), question) == template.prompt_ids(
        template.load_tokenizer(tiny_base), question
    )
    config = artifacts.read_json(kept / "config.json")
    assert "quantization_config" not in config and "transformers_version" not in config
    assert artifacts.read_json(kept / "generation_config.json")["eos_token_id"] == 2


def test_a_gguf_gives_the_same_bytes_twice(file: Path, tmp_path: Path) -> None:
    folders = [_weights.prepare(file, "d", "bfloat16", tmp_path / n, silent)[0].parent for n in ("a", "b")]
    assert artifacts.verify(folders[0]) == artifacts.verify(folders[1])


def test_a_conversion_killed_midway_leaves_nothing_that_is_used(file: Path, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", DIE, str(file), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = list((tmp_path / "bases").iterdir())
    assert left and all(path.name.startswith(".convert-") for path in left)
    os.utime(left[0], (0, 0))
    kept, _ = _weights.prepare(file, "d", "float32", tmp_path, silent)
    assert artifacts.verify(kept.parent) and list((tmp_path / "bases").iterdir()) == [kept.parent]


def test_a_cut_gguf_is_refused(file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    shutil.copyfile(file, cut)
    with cut.open("r+b") as stream:
        stream.truncate(cut.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"cannot be (loaded|converted)"):
        _weights.prepare(cut, "d", "float32", tmp_path / "cache", silent)
