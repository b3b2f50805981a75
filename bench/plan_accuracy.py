"""How far the plan is from what comes: peak memory and time, over configurations it was not fitted to.

    python bench/plan_accuracy.py RESULT.json [--seed SEED] [--count COUNT] [--guard HOME]
    python bench/plan_accuracy.py RESULT.json --set SET [--only NAME,…]

Every configuration is a random-weight model, rows of random words and a recipe, taken through data, model,
plan and train in a fresh process; `--guard HOME` adds `examples/guard.yaml`'s real base, in that home. Peaks
are the kernel's (`VmHWM`) of the train stage. The result is written after every run, and what is in it
already is not run again. `FITTING` holds the configurations that the constants of `forecast/footprint.py`
were set on; those that judge are drawn from a seed, another one whenever something was changed after a look
at what an earlier one gave. Memory's peak is reached in a few steps, so they are short.

Times mean something on a quiet machine alone; memory does not care. `TIMES` are small models and more steps:
all of them take about eight minutes where nothing else runs, and `--seconds` leaves off in time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LIMIT_S = 1800
SPLITS = ("train", "validation", "test")
SEEN = 20  # steps after which the time left is predicted again


@dataclass(frozen=True)
class Config:
    """`lengths`: the fewest and the most bytes of a user's message, each a token; `answer`: of its answer."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    lengths: tuple[int, int]
    batch: int
    steps: int
    r: int = 16
    dtype: str = "bfloat16"
    answer: int = 4
    targets: str | tuple[str, ...] = "all-linear"
    family: str = "llama"
    checkpointing: str | None = None
    system: str | None = None
    objective: str = "sft"


FITTING = (
    Config("fit-guard", 30, 576, 9, 3, 1536, 49152, (20, 120), 16, 8),
    Config("fit-chat", 30, 576, 9, 3, 1536, 49152, (100, 500), 6, 8),
    Config("fit-wide", 6, 1024, 16, 4, 4096, 32000, (300, 900), 2, 14),
    Config("fit-float", 12, 512, 8, 8, 1408, 32000, (60, 250), 8, 10, dtype="float32"),
    Config("fit-rank", 24, 320, 5, 5, 960, 16384, (30, 200), 8, 24, r=64),
    Config("fit-long", 12, 512, 8, 2, 1408, 32000, (900, 1500), 2, 12, answer=200),
    Config("fit-head", 8, 512, 8, 2, 1408, 151936, (50, 200), 8, 16, answer=60),
    Config("fit-tiny", 4, 128, 4, 2, 384, 4096, (20, 200), 8, 60),
    Config("fit-many", 10, 576, 9, 3, 1536, 8192, (5, 60), 16, 60),
    Config("fit-full", 16, 512, 8, 4, 1536, 32000, (100, 400), 4, 14, checkpointing="full"),
)
TIMES = (
    Config("t-plain", 7, 448, 7, 7, 1216, 12288, (25, 140), 7, 32),
    Config("t-float", 6, 384, 6, 3, 1024, 12288, (25, 100), 7, 32, dtype="float32"),
    Config("t-qv", 9, 448, 7, 7, 1216, 8192, (30, 120), 6, 32, targets=("q_proj", "v_proj")),
    Config("t-deep", 20, 256, 4, 2, 704, 8192, (30, 150), 4, 32),
    Config("t-norms", 7, 448, 7, 7, 1216, 12288, (30, 120), 6, 32, family="qwen3"),
    Config("t-gemma", 5, 384, 6, 2, 1152, 12288, (30, 120), 6, 32, family="gemma3"),
    Config("t-full", 7, 448, 7, 7, 1216, 12288, (30, 120), 6, 32, checkpointing="full"),
    Config("t-short", 10, 384, 6, 2, 1024, 8192, (5, 50), 10, 36, r=8),
    Config("t-long", 5, 384, 6, 6, 1024, 8192, (400, 800), 1, 32, answer=30),
    Config("t-mixed", 7, 384, 6, 6, 1024, 12288, (5, 400), 4, 32),
    Config("t-wide", 4, 768, 12, 4, 2560, 8192, (30, 180), 4, 32),
    Config("t-words", 5, 384, 6, 6, 1024, 81920, (30, 80), 6, 32, answer=16),
    Config("t-rank", 7, 448, 7, 7, 1216, 8192, (30, 140), 6, 32, r=80),
    Config("t-phi", 7, 384, 6, 6, 1024, 12288, (30, 130), 6, 32, family="phi3"),
    Config("t-selective", 7, 448, 7, 7, 1216, 12288, (30, 120), 6, 32, checkpointing="selective"),
    Config("t-pairs", 7, 384, 6, 6, 1024, 12288, (25, 80), 3, 32, answer=25, objective="dpo"),
    Config("t-micros", 5, 384, 6, 6, 1024, 8192, (150, 350), 14, 26),
)
SETS = {"fitting": FITTING, "times": TIMES}
FAMILIES = ("llama", "llama", "qwen3", "mistral", "gemma3", "phi3")
QUERIES, JOINED = ("q_proj", "v_proj"), ("qkv_proj",)  # Phi 3's are one layer
LARGEST = 140_000_000  # parameters
OPERATIONS_PER_S = {"bfloat16": 3.5e11, "float32": 1e11}  # roughly, of two cores
SECONDS = 25  # roughly, of training


def drawn(seed: int, count: int) -> tuple[Config, ...]:
    """Configurations of any size, length, method, rank and objective that train in about `SECONDS`."""
    draw = random.Random(seed)
    return tuple(_one(f"{seed}-{number}", draw) for number in range(1, count + 1))


def _one(name: str, draw: random.Random) -> Config:
    head, heads = draw.choice((32, 64, 64, 64, 128)), draw.randint(3, 16)
    width, layers = head * heads, draw.randint(3, 32)
    inner = 64 * round(width * draw.uniform(2.2, 4.5) / 64)
    vocabulary = round(2 ** draw.uniform(12.5, 17.2))
    inside = layers * (2 * width + 3 * inner) * width
    if inside + vocabulary * width > LARGEST or width < 192:
        return _one(name, draw)
    dtype = draw.choice(("bfloat16",) * 5 + ("float32",))
    objective = draw.choice(("sft",) * 5 + ("dpo",))
    low = round(2 ** draw.uniform(3.5, 10.5))
    high, answer = round(low * draw.uniform(1.3, 4.0)), draw.choice((4, 4, 20, 60, 200))
    each = ((low + high) / 2 + answer) * (2 if objective == "dpo" else 1)
    batch = max(1, round(2 ** draw.uniform(8.6, 11.5) / each))
    a_step = 5 * batch * each * (inside + vocabulary * width * answer / each)
    kv_heads = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
    r = draw.choice((4, 8, 16, 16, 32, 64, 128))
    targets, family = draw.choice(("all-linear",) * 4 + (QUERIES,)), draw.choice(FAMILIES)
    return Config(
        name, layers, width, heads, kv_heads, inner, vocabulary, (low, high), batch,
        max(8, min(60, int(SECONDS * OPERATIONS_PER_S[dtype] / a_step))), r=r, dtype=dtype, answer=answer,
        targets=JOINED if (targets, family) == (QUERIES, "phi3") else targets, family=family,
        objective=objective,
        checkpointing=draw.choice((None, None, None, "selective", "full")),
        system=draw.choice((None, None, None, "Answer at once. " * 8)),
    )  # fmt: skip


GUARDS = {
    "guard-8": {"train.0.steps": 30, "train.0.method.r": 8},
    "guard-20": {"train.0.steps": 24, "train.0.batch": 20},
}


def main() -> None:
    asked = arguments()
    whole = json.loads(asked.result.read_text("utf-8")) if asked.result.exists() else {}
    whole |= {"cpu": cpu(), "threads": asked.threads}
    judging = asked.set is None
    done = whole.setdefault(f"drawn-{asked.seed}" if judging else asked.set, {"summary": {}, "runs": []})
    if asked.again:
        again(done, asked)
    done["runs"] = [run for run in done["runs"] if "failed" not in run]  # what failed is tried again
    known = {run["name"] for run in done["runs"]}
    given = {each.name: each for each in (drawn(asked.seed, asked.count) if judging else SETS[asked.set])}
    names = [*given, *(GUARDS if asked.guard and judging else ())]
    began = time.monotonic()
    for name in names:
        if time.monotonic() - began > asked.seconds:
            break
        if name in known or (asked.only and name not in asked.only.split(",")):
            continue
        run = once(name, given.get(name), asked)
        done["runs"].append({"name": name, **run})
        done["summary"] = summary(done["runs"])
        keep(whole, asked.result)
        print(line({"name": name, **run}), flush=True)
    keep(whole, asked.result)
    print("\n".join(line(run) for run in done["runs"]))
    print(json.dumps(summary(done["runs"]), indent=1))


def again(done: dict[str, Any], asked: argparse.Namespace) -> None:
    """Hold the plans of today's code against the runs of the file; for a second look, not for a record."""
    for run in done["runs"]:
        config = Config(**run["config"]) if run["name"] not in GUARDS else None
        found = once(run["name"], config, asked)
        if "failed" not in found and "failed" not in run:
            run |= {name: found[name] for name in ("predicted_bytes", "trial_bytes")}
            run["peak_error"] = round(found["predicted_bytes"]["total"] / run["peak_bytes"] - 1, 4)
    done["summary"] = summary(done["runs"])


def keep(whole: dict[str, Any], result: Path) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")


def cpu() -> dict[str, Any]:
    lines = [line.split(":", 1)[1].split() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith(("model name", "flags"))]  # fmt: skip
    flags = sorted(flag for flag in lines[1] if flag.startswith(("amx", "avx512_bf16", "avx512f", "avx2")))
    return {"name": " ".join(lines[0]), "flags": flags, "cores": os.cpu_count()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="of the configurations drawn")
    parser.add_argument("--count", type=int, default=18, help="how many are drawn")
    parser.add_argument("--set", choices=sorted(SETS), help="these instead of drawn ones")
    parser.add_argument("--again", action="store_true", help="plan anew what was run already; train nothing")
    parser.add_argument("--only", help="these names, with commas")
    parser.add_argument("--guard", help="a home in which examples/guard.yaml can run")
    parser.add_argument("--steps", type=int, default=10**6, help="at most so many (memory needs few)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after so many")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if found.inside:
        inside(found)
        sys.exit(0)
    return found


def once(name: str, config: Config | None, asked: argparse.Namespace) -> dict[str, Any]:
    """One configuration, or a guard, in a process of its own; a failure is a result too."""
    inside = json.dumps(asdict(config)) if config else name
    command = [sys.executable, __file__, str(asked.result), "--inside", inside]
    command += ["--threads", str(asked.threads)]
    command += ["--steps", str(asked.steps)]
    command += ["--again"] if asked.again else []
    command += ["--guard", asked.guard] if asked.guard else []
    load = os.getloadavg()[0]
    made = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if made.returncode:
        return {"failed": made.stderr[-1500:], "load_before": load}
    return {**json.loads(made.stdout.splitlines()[-1]), "load_before": round(load, 2)}


def inside(asked: argparse.Namespace) -> None:
    """In the fresh process: the recipe through its train stage; what was said, and what came, to stdout."""
    import luthier

    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        place = Path(folder)
        if asked.inside in GUARDS:
            recipe, home = ROOT / "examples" / "guard.yaml", asked.guard
            wishes = GUARDS[asked.inside] | {"plan.threads": asked.threads}
            about: dict[str, Any] = dict(wishes)
        else:
            config = Config(**json.loads(asked.inside))
            config = replace(config, steps=min(config.steps, asked.steps))
            recipe, home, wishes = write(config, place, asked.threads), str(place / "home"), {}
            about = asdict(config)
        began = time.monotonic()
        done = luthier.run(
            recipe,
            home=home,
            until="plan" if asked.again else "train",
            set=[f"{path}={value}" for path, value in wishes.items()],
        )
        stages = {record.stage: record for record in done.stages}
        if asked.again:
            plan = stages["plan"].facts
            print(json.dumps({"predicted_bytes": plan["bytes"], "trial_bytes": plan["trial"]}))
            return
        observed = Path(home) / "artifacts" / stages["train"].digest / "observed"
        steps = [json.loads(text) for text in (observed / "timings.jsonl").read_text().splitlines()]
        curve = (observed.parent / "curve.jsonl").read_text().splitlines()
        tokens = [json.loads(text)["computed_tokens"] for text in curve]
        print(
            json.dumps(
                measured(about, stages, steps, tokens) | {"wall_s": round(time.monotonic() - began, 1)}
            )
        )


def measured(
    about: dict[str, Any], stages: dict[str, Any], steps: list[Any], tokens: list[int]
) -> dict[str, Any]:
    from luthier.forecast import pace

    plan, train = stages["plan"].facts, stages["train"].facts
    timed = [(count, step["seconds"]) for count, step in zip(tokens, steps, strict=True)]
    found = {
        "config": about,
        "parameters": round(plan["trainable_parameters"] * (1 / plan["trainable_share"] - 1)),
        "largest_micro_batch": plan["largest_micro_batch"],
        "checkpointing": plan["checkpointing"],
        "compiled": plan["compiled"],
        "threads": plan["threads"],
        "predicted_bytes": plan["bytes"],
        "trial_bytes": plan["trial"],
        "peak_bytes": train["peak_rss_bytes"],
        "peak_error": round(plan["bytes"]["total"] / train["peak_rss_bytes"] - 1, 4),
        "rss_bytes": [step["rss_bytes"] for step in steps],
        "step_s": [round(step["seconds"], 3) for step in steps],
        "predicted_s": round(60 * plan["minutes"], 2),
        "train_s": train["train_seconds"],
        "time_error": round(60 * plan["minutes"] / train["train_seconds"] - 1, 4),
    }
    if len(timed) > SEEN + 3:
        left = sum(seconds for _, seconds in timed[SEEN:])
        said = pace.left_s(timed[:SEEN], sum(count for count, _ in timed[SEEN:]))
        found |= {"left_s": round(left, 2), "left_error": round(said / left - 1, 4)}
    return found


def write(config: Config, place: Path, threads: int) -> Path:
    """A base, rows and a recipe."""
    model(config, place / "base")
    draw = random.Random(7)
    total = max(16, min(2000, config.batch * config.steps))
    for split, count in (("train", total), ("validation", 8), ("test", 4)):
        with (place / f"{split}.jsonl").open("w") as file:
            for _ in range(count):
                text = "".join(draw.choices("abcdefghij ", k=draw.randint(*config.lengths)))
                answer = "".join(draw.choices("abcdefghij", k=config.answer))
                row = {"prompt": text, "completion": answer}
                if config.objective == "dpo":
                    row["rejected"] = "".join(draw.choices("abcdefghij", k=config.answer))
                file.write(json.dumps(row) + "\n")
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    recipe = {
        "luthier": 1,
        "name": "accuracy",
        "data": {
            "sources": [
                {
                    "from": {"name": "files", "files": {split: f"{split}.jsonl" for split in SPLITS}},
                    "licence": "CC0-1.0", "purpose": "measure the plan",
                    "chat": {"system": config.system} | (
                        {"user": "{prompt}", "assistant": "{completion}", "rejected": "{rejected}"}
                        if config.objective == "dpo"
                        else {}
                    ),
                }
            ],
        },
        "model": {
            "from": {"name": "files", "files": {"model": "base"}},
            "licence": "CC0-1.0", "dtype": config.dtype,
        },
        "plan": {"max_length": 8192, "threads": threads, "checkpointing": config.checkpointing},
        "train": [
            {
                "objective": {"name": config.objective},
                "method": {"name": "lora", "r": config.r, "alpha": 16, "targets": targets},
                "steps": config.steps, "batch": config.batch, "lr": 1e-4,
                "validation": {"every": 1000, "rows": 8},
            }
        ],
        "release": {"gates": [{"name": "floor", "minimum": 0}], "intended_use": "none", "limits": "none"},
    }  # fmt: skip
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def model(config: Config, folder: Path) -> None:
    """A random model with a byte-level tokenizer: a real folder, as a downloaded one is. In a child process,
    so that what it took does not count."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import plan_accuracy as own; own._model(*sys.argv[2:])"
    )
    given = json.dumps(asdict(config))
    command = [sys.executable, "-c", code, str(Path(__file__).parent), given, str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # what it says of a failure is ours


def _model(given: str, folder: str) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        MistralConfig,
        Phi3Config,
        PreTrainedTokenizerFast,
        Qwen3Config,
    )

    config = Config(**json.loads(given))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.model_max_length = 8192
    torch.manual_seed(0)
    kinds: dict[str, Any] = {
        "llama": LlamaConfig, "qwen3": Qwen3Config, "mistral": MistralConfig, "gemma3": Gemma3TextConfig,
        "phi3": Phi3Config,
    }  # fmt: skip
    kind = kinds[config.family]
    made = kind(
        vocab_size=config.vocabulary, hidden_size=config.width, intermediate_size=config.inner,
        num_hidden_layers=config.layers, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads, head_dim=config.width // config.heads,
        max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(made, dtype=getattr(torch, config.dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    good = [run for run in runs if "failed" not in run]
    found: dict[str, Any] = {"runs": len(good), "failed": len(runs) - len(good)}
    for kind in ("peak_error", "time_error", "left_error"):
        errors = [run[kind] for run in good if kind in run]
        if errors:
            sizes = sorted(abs(error) for error in errors)
            found[kind] = {"median": median(sizes), "worst": sizes[-1], "most_under": min(0.0, *errors)}
    return found


def line(run: dict[str, Any]) -> str:
    if "failed" in run:
        return f"{run['name']:16} failed: {run['failed'].strip().splitlines()[-1:]}"
    left = f"{run['left_error']:+7.1%}" if "left_error" in run else ""
    return (
        f"{run['name']:16} {run['parameters'] / 1e6:6.1f}M {run['largest_micro_batch']:5} tokens  "
        f"peak {run['predicted_bytes']['total'] / 1e9:5.2f} GB for {run['peak_bytes'] / 1e9:5.2f} "
        f"({run['peak_error']:+6.1%})  time {run['predicted_s']:6.1f} s for {run['train_s']:6.1f} "
        f"({run['time_error']:+7.1%}) {left}"
    )


if __name__ == "__main__":
    main()
