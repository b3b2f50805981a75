"""The held-out loss of adapters that any system left, all measured by one and the same code in float32.

    python bench/systems/heldout.py BASE ROWS.jsonl THREADS ADAPTER_FOLDER …

It prints one JSON line: the mean negative log-likelihood of the learnt tokens for each folder, in order. It
does not know which system trained them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from luthier_run import encoded
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from luthier.engine import base, batch, loop
from luthier.methods import lora
from luthier.objectives import sft


def main() -> None:
    folder, rows, threads, *adapters = sys.argv[1:]
    torch.set_num_threads(int(threads))
    told = [json.loads(line) for line in Path(rows).read_text("utf-8").splitlines()]
    micros = batch.micro_batches(encoded(told), 1024)
    model = lora.load(base.load(Path(folder), "float32"), Path(adapters[0]))
    assert isinstance(model, PeftModel)
    found = []
    for adapter in adapters:
        set_peft_model_state_dict(model, load_file(Path(adapter) / "adapter_model.safetensors"))
        seen = loop.look(
            model, micros, lambda policy, reference, micro: sft.loss(policy, reference, micro, sft.Params())
        )
        found.append(seen.loss)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
