"""lm-evaluation-harness over HTTP against the same model in process: the same scores, or a failure.

    make test-lm-eval        # makes the harness's own environment and runs this in it

    PYTHON bench/lm_eval_parity.py BASE_FOLDER LUTHIER RESULT.json

Two tasks with data of our own beside this file: one of choices (log-likelihoods, `echo` with `logprobs`),
one of words to write (greedy answers). `LUTHIER` is the command that serves BASE_FOLDER on a free port;
`hf` loads the same folder in this process. Both run in float32: in bfloat16 a logit of 16 is known to within
0.06 only, so log-likelihoods differ by more than 0.1 between any two ways to compute them. Samples are
compared one by one, too.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

TASKS = ["local_choice", "local_words"]
IN_PROCESS = {"dtype": "float32", "device": "cpu", "max_length": 2048}
HERE = Path(__file__).parent / "lm_eval"


def main() -> int:
    given, luthier, out = sys.argv[1:4]
    with tempfile.TemporaryDirectory() as folder:
        base, home = _in_float32(given, f"{folder}/base"), f"{folder}/home"
        server = subprocess.Popen(
            [luthier, "serve", "--base", base, "--port", "0", "--json", "--workers", "0", "--home", home],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            over_http, http_s = _scored(
                "local-completions",
                {
                    "model": ready["model"],
                    "base_url": f"{ready['url']}/v1/completions",
                    "tokenizer": base,
                    "tokenizer_backend": "huggingface",
                    "num_concurrent": 1,
                    "max_length": 2048,
                    "header": {"Authorization": f"Bearer {ready['key']}"},
                },
            )
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        here, here_s = _scored("hf", IN_PROCESS | {"pretrained": base})
    tasks = {task: _compared(over_http, here, task) for task in TASKS}
    found = {
        "what": "lm-evaluation-harness over HTTP and in process",
        "lm_eval": lm_eval.__version__,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "base": Path(given).resolve().parent.name[:12],
        "tasks": tasks,
        "seconds": {"http": round(http_s, 1), "in_process": round(here_s, 1)},
    }
    Path(out).write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(json.dumps(found, indent=2))
    return 0 if all(task["same"] for task in tasks.values()) else 1


def _in_float32(given: str, folder: str) -> str:
    AutoModelForCausalLM.from_pretrained(given, dtype="float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(given).save_pretrained(folder)
    return folder


def _scored(model: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], float]:
    began_s = time.monotonic()
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=TASKS,
        batch_size=1,
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found is not None
    return found, time.monotonic() - began_s


def _compared(over_http: dict[str, Any], here: dict[str, Any], task: str) -> dict[str, Any]:
    scores = [
        {name: value for name, value in found["results"][task].items() if isinstance(value, float)}
        for found in (over_http, here)
    ]
    pairs = list(zip(over_http["samples"][task], here["samples"][task], strict=True))
    widest, answers = 0.0, 0
    for ours, theirs in pairs:
        for a, b in zip(ours["filtered_resps"], theirs["filtered_resps"], strict=True):
            if isinstance(a, str):
                answers += a == b
            else:
                widest = max(widest, abs(float(a[0]) - float(b[0])))
    told = {"same": scores[0] == scores[1], "http": scores[0], "in_process": scores[1], "samples": len(pairs)}
    return told | ({"equal_answers": answers} if answers else {"widest_log_likelihood_difference": widest})


if __name__ == "__main__":
    raise SystemExit(main())
