"""llama.cpp's own HTTP server, as xllamacpp brings it: Q8_0 weights, 16 slots, eight LoRA files.

    python bench/serving/llamacpp_serve.py '{"made": …, "port": …, "threads": …}'

A request chooses its adapter with `lora: [{"id": N, "scale": 1.0}]`; llama.cpp does not put requests with
different adapters into one batch. It runs in bench/peers/.venvs/llamacpp.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import xllamacpp

SLOTS, CONTEXT = 16, 2048


def main() -> None:
    job = json.loads(sys.argv[1])
    folder = Path(job["made"]) / "gguf"
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "base.gguf")
    params.model_alias = {"base"}
    params.n_ctx = SLOTS * CONTEXT
    params.n_parallel = SLOTS
    params.cont_batching = True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    params.hostnames = ["127.0.0.1"]
    params.port = job["port"]
    params.lora_init_without_apply = True
    params.lora_adapters = [adapter(folder / f"a{number}.gguf") for number in range(1, 9)]
    server = xllamacpp.Server(params)
    print(server.listening_address, file=sys.stderr, flush=True)
    threading.Event().wait()


def adapter(path: Path) -> xllamacpp.CommonAdapterLoraInfo:
    found = xllamacpp.CommonAdapterLoraInfo()
    found.path, found.scale = str(path), 0.0
    return found


if __name__ == "__main__":
    main()
