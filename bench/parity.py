"""How many tokens of mixed answers plain transformers and peft would choose too, in the base's number type.

    python bench/parity.py MADE_FOLDER RESULT.json [--requests 200] [--tokens 48]

All requests, over eight adapters in turn, grow together in one `Decoder`. Then plain transformers with one
PEFT adapter at a time reads each prompt with its answer and says which token is likeliest at each place, so
that a first difference does not count again for all that follows it. For each token that differs the result
has the reference's own gap between its best and the token that was said, in steps of a bfloat16 there.
MADE_FOLDER comes from serving/made.py. It measures no time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from run import keep, machine
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.inference.decoder import Decoder
from luthier.inference.growing import Room
from luthier.inference.sampling import Chooser, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("made", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    asked = parser.parse_args()
    about = json.loads((asked.made / "about.json").read_text("utf-8"))
    base, names = Path(about["base"]), about["adapters"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = json.loads((asked.made / "prompts.json").read_text("utf-8"))["short"]
    prompts = [tokenizer(texts[n % len(texts)])["input_ids"] for n in range(asked.requests)]
    adapters = [names[n % len(names)] for n in range(asked.requests)]
    answers = served(base, asked.made / "adapters", prompts, adapters, asked.tokens)
    found = compared(base, asked.made / "adapters", prompts, adapters, answers)
    tokens = sum(map(len, answers))
    result = {
        "settings": {"requests": asked.requests, "tokens": asked.tokens, **about, "base": base.name},
        "machine": machine(),
        "tokens": tokens,
        "equal_share": 1 - len(found) / tokens,
        "differing": sorted(found, key=lambda one: -one["gap_steps"]),
    }
    keep(asked.result, result)
    print(json.dumps({key: result[key] for key in ("tokens", "equal_share")}), flush=True)


def served(
    base: Path, folder: Path, prompts: list[list[int]], adapters: list[str], tokens: int
) -> list[list[int]]:
    """The answers, sixteen growing at a time."""
    decoder = Decoder.load(base, "base", Room(rows=16))
    for name in sorted(set(adapters)):
        decoder.add(name, folder / name)
    how = Sampling(tokens)
    rows = [decoder.begin(p, Chooser(how), name) for p, name in zip(prompts, adapters, strict=True)]
    while decoder.busy:
        for grown in decoder.step():
            if grown.error is not None:
                raise grown.error
    return [row.ids[row.prompt :] for row in rows]


@torch.inference_mode()
def compared(
    base: Path, folder: Path, prompts: list[list[int]], adapters: list[str], answers: list[list[int]]
) -> list[dict[str, Any]]:
    """Every token that plain transformers and peft would not have chosen in its place."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    stranger: Any = None
    for name in sorted(set(adapters)):
        if stranger is None:
            stranger = PeftModel.from_pretrained(model, folder / name, adapter_name=name)
        else:
            stranger.load_adapter(folder / name, adapter_name=name)
    stranger.eval()
    found: list[dict[str, Any]] = []
    for number, (prompt, name, answer) in enumerate(zip(prompts, adapters, answers, strict=True)):
        stranger.set_adapter(name)
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits_T_V = stranger(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        best_T = logits_T_V.max(-1).values
        chosen_T = logits_T_V.gather(1, torch.tensor(answer)[:, None])[:, 0]
        for at in (best_T > chosen_T).nonzero()[:, 0].tolist():
            best, gap = float(best_T[at]), float(best_T[at] - chosen_T[at])
            step = 2.0 ** (math.floor(math.log2(abs(best))) - 7)
            found.append({"request": number, "at": at, "gap": gap, "gap_steps": gap / step})
    return found


if __name__ == "__main__":
    main()
