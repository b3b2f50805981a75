"""Stage 5, evaluate: base, tuned and honest baselines on the same held-out rows, each with its uncertainty.

Every system is read by one lenient rule: the first label that stands in its answer as a word of its own.
An answer without a label is wrong, and counted. A row's tools are offered with its prompt, and how they were
called is told apart (`stages._called`). What was trained by a grader's reward is examined by that
grader (`stages._graded`). Intervals are Wilson's, comparisons exact and paired (`statistics`). Loss and
perplexity are over answer tokens. Latencies are of single streams, the way answers are served; they are
observed, so they lie outside the scorecard's digest.

It does not know gates: it says how good the model is, never whether that is enough.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier import artifacts, plugins, statistics, template
from luthier.baselines import Baseline, Task
from luthier.engine import heap, memory
from luthier.errors import DataError, Interrupted
from luthier.inference.generate import Runtime
from luthier.inference.sampling import Sampling
from luthier.inference.score import likelihood
from luthier.plugins import Part
from luthier.rows import Chat, Message, Pair, Tools, again
from luthier.stages import Event, Inputs, _called, _graded, _preferred
from luthier.stages._rollouts import Exam as Graded

TUNED = "tuned"
LIKELIHOOD_ROWS = 500  # a proxy figure; beyond this only its third digit would move


@dataclass(frozen=True)
class Exam:
    """The examination room: who answers, on which rows, and how answers are read."""

    runtime: Runtime
    tokenizer: Any
    stop_ids: frozenset[int]
    rows: Sequence[Any]
    section: Any
    tell: Callable[[Event], None]

    def answer(
        self,
        prompts: Sequence[Sequence[Message]],
        adapter: str | None,
        who: str,
        tools: Sequence[Tools] | None = None,
    ) -> list[str]:
        """Greedy answers as text. `tools`: what each prompt offers."""
        tokens = self.tokens(prompts, adapter, who, tools)
        return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in tokens]

    def tokens(
        self,
        prompts: Sequence[Sequence[Message]],
        adapter: str | None,
        who: str,
        tools: Sequence[Tools] | None = None,
    ) -> list[list[int]]:
        """Greedy answers, many prompts at a time."""
        offered = tools or [()] * len(prompts)
        ids = [
            template.prompt_ids(self.tokenizer, prompt, some)
            for prompt, some in zip(prompts, offered, strict=True)
        ]
        told = _progress(self.tell, who)
        return self.runtime.greedy(ids, self.section.max_new_tokens, adapter, self.stop_ids, told)

    def read(self, text: str) -> str | None:
        """The label an answer gives; without a closed set of labels the whole answer is the label."""
        return read(text, self.section.labels)


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    torch.set_num_threads(artifacts.read_json(inputs.artefacts["plan"] / "plan.json")["threads"])
    heap.release()
    memory.forget_peak()
    base, adapter = inputs.artefacts["model"] / "base", inputs.artefacts["train"] / "adapter"
    rows = _sample(_rows(inputs, section.split), section.rows, inputs.seed)
    exams = {"Chat": _exam, "Prompt": _graded_exam, "Pair": _preferred_exam}
    kind = _objective(inputs).module.ROWS
    if kind == "Chat":
        _answerable(rows, section.labels)
    tell = _heeding(inputs)
    tell(Event("evaluate", "loading the model", 0, len(rows)))
    tokenizer = template.load_tokenizer(base)
    runtime = Runtime.load(base)
    runtime.add(TUNED, adapter)
    exam = Exam(runtime, tokenizer, template.stop_ids(tokenizer), rows, section, tell)
    card, samples, fitted_s = exams[kind](exam, inputs)
    efficiency = _efficiency(exam, base, adapter, inputs.seed) | {"baseline_seconds": fitted_s}
    artifacts.write_json(out / "scorecard.json", card)
    artifacts.write_jsonl(out / "samples.jsonl", samples)
    (out / "observed").mkdir(exist_ok=True)
    artifacts.write_json(out / "observed" / "efficiency.json", efficiency)
    return _facts(card, efficiency)


Found = tuple[dict[str, Any], list[dict[str, Any]], dict[str, float]]  # scorecard, samples, seconds to fit


def _objective(inputs: Inputs) -> Part:
    """What the training minimised, as its artefact has it."""
    named = dict(artifacts.read_json(inputs.artefacts["train"] / "phase.json")["phase"]["objective"])
    module = plugins.load("objectives", name := named.pop("name"))
    return Part("objectives", name, module.Params.model_validate(named))


def _exam(exam: Exam, inputs: Inputs) -> Found:
    """Answers held against the rows' own, and honest baselines beside them."""
    prompts, tools = [row.prompt for row in exam.rows], [row.tools for row in exam.rows]
    texts = {
        "base": exam.answer(prompts, None, "base model", tools),
        TUNED: exam.answer(prompts, TUNED, "tuned model", tools),
    }
    said = {
        name: [
            _called.said(row, text) or exam.read(text) for row, text in zip(exam.rows, answers, strict=True)
        ]
        for name, answers in texts.items()
    }
    notes: dict[str, dict[str, Any]] = {name: {"note": note} for name, note in _graded.NOTES.items()}
    fitted_s = {}
    for part in exam.section.baselines:
        began = time.monotonic()
        found = _baseline(part, exam, inputs)
        fitted_s[part.name] = round(time.monotonic() - began, 3)
        said[part.name] = found.said
        notes[part.name] = {"note": found.note, **found.chosen}
    card = _scorecard(exam, said, notes)
    if (calls := _called.rates(exam.rows, texts)) is not None:
        card["calls"] = calls
    card["loss"], card["perplexity"] = _likelihoods(exam, inputs.seed)
    return card, _samples(exam.rows, texts, said), fitted_s


def _preferred_exam(exam: Exam, inputs: Inputs) -> Found:
    """Pairs: which of both answers is likelier."""
    del inputs
    if exam.section.baselines or exam.section.labels:
        raise DataError(
            "baselines and labels need rows with a right answer; pairs are judged by which side is likelier",
            where="evaluate",
            hint="leave out `evaluate.baselines` and `evaluate.labels`",
        )
    pairs = [row for row in exam.rows if isinstance(row, Pair)]
    found, samples = _preferred.judge(
        exam.runtime, exam.tokenizer, pairs, lambda who: _progress(exam.tell, who)
    )
    asked = {"split": exam.section.split, "labels": [], "positive": None, "likelihood_rows": len(pairs)}
    return found | asked | {"max_new_tokens": exam.section.max_new_tokens}, samples, {}


def _graded_exam(exam: Exam, inputs: Inputs) -> Found:
    """Answers judged by the grader that training was rewarded by."""
    if exam.section.baselines or exam.section.labels:
        raise DataError(
            "baselines and labels need rows with a right answer; prompts are judged by their grader",
            where="evaluate",
            hint="leave out `evaluate.baselines` and `evaluate.labels`",
        )
    params: Any = _objective(inputs).params
    exam = replace(exam, section=exam.section.model_copy(update={"max_new_tokens": params.max_new_tokens}))
    room = Graded(exam.tokenizer, exam.runtime, params.grader, exam.stop_ids)
    prompts = [row.prompt for row in exam.rows]
    answers = {
        "base": exam.tokens(prompts, None, "base model"),
        TUNED: exam.tokens(prompts, TUNED, "tuned model"),
    }
    judged = _graded.judge(room, exam.rows, answers)
    card = _graded.scorecard(judged, params, exam.section.split, inputs.seed)
    return card, _graded.samples(judged, exam.rows), {}


def read(text: str, labels: Sequence[str]) -> str | None:
    """The first label that stands in `text` as a word of its own, whatever its case.

    Of two labels that begin at the same place, such as `safe` and `safe mode`, the longer is meant.
    """
    if not labels:
        return text.strip() or None
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    found = re.search(rf"(?<!\w)({names})(?!\w)", text, re.IGNORECASE)
    return next((label for label in labels if found and label.lower() == found[0].lower()), None)


def _rows(inputs: Inputs, split: str) -> list[Any]:
    records = artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / f"{split}.jsonl")
    return [again(record) for record in records]


def _sample(rows: list[Any], count: int | None, seed: int) -> list[Any]:
    if not rows:
        raise DataError(
            "there is no row to examine on",
            hint="give a test split, raise data.split.test, or set evaluate.split",
        )
    if count is None or count >= len(rows):
        return rows
    return [rows[n] for n in sorted(random.Random(seed).sample(range(len(rows)), count))]


def _answerable(rows: Sequence[Chat], labels: Sequence[str]) -> None:
    """A row whose right answer is no label could only be failed; say so before minutes are spent."""
    odd = next((row for row in rows if labels and row.answer.strip() not in labels), None)
    if odd is not None:
        raise DataError(
            f"the right answer {odd.answer!r} is not one of evaluate.labels {list(labels)}",
            where=odd.where,
            hint="add it to `evaluate.labels`, or map it with `values` in the source",
        )


def _heeding(inputs: Inputs) -> Callable[[Event], None]:
    """`tell`, which is called every few seconds, and so is where a wish to stop is heard."""

    def tell(event: Event) -> None:
        if inputs.stopping():
            raise Interrupted("stopped while evaluating", hint="the same command evaluates again")
        inputs.tell(event)

    return tell


def _progress(tell: Callable[[Event], None], who: str) -> Callable[[int, int], None]:
    began = time.monotonic()

    def told(done: int, total: int) -> None:
        eta_s = (time.monotonic() - began) / max(done, 1) * (total - done)
        tell(Event("evaluate", who, done, total, {"eta_s": eta_s}))

    return told


def _baseline(part: Any, exam: Exam, inputs: Inputs) -> Baseline:
    def answer(prompts: Sequence[Sequence[Message]]) -> list[str | None]:
        return [exam.read(text) for text in exam.answer(prompts, None, f"baseline {part.name}")]

    task = Task(
        train=_rows(inputs, "train"),
        validation=_rows(inputs, "validation"),
        test=exam.rows,
        labels=exam.section.labels,
        seed=inputs.seed,
        answer=answer,
    )
    found: Baseline = part.module.predict(part.params, task)
    return found


def _scorecard(
    exam: Exam, said: dict[str, list[str | None]], notes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    gold = [row.answer.strip() for row in exam.rows]
    systems = {}
    for name, answers in said.items():
        scores = asdict(statistics.scores(gold, answers, exam.section.positive))
        if not exam.section.labels:
            scores["confusion"], scores["kappa"] = {}, None
        systems[name] = scores | notes[name]
    right = {name: [a == b for a, b in zip(answers, gold, strict=True)] for name, answers in said.items()}
    paired = {}
    for name in said:
        if name != TUNED:
            wins = sum(a and not b for a, b in zip(right[TUNED], right[name], strict=True))
            losses = sum(b and not a for a, b in zip(right[TUNED], right[name], strict=True))
            paired[f"{TUNED}_vs_{name}"] = {
                "wins": wins,
                "losses": losses,
                "p": statistics.mcnemar(wins, losses),
            }
    return {
        "rows": len(gold),
        "split": exam.section.split,
        "labels": list(exam.section.labels),
        "positive": exam.section.positive,
        "max_new_tokens": exam.section.max_new_tokens,
        "likelihood_rows": min(LIKELIHOOD_ROWS, len(gold)),
        "systems": systems,
        "paired": paired,
    }


def _likelihoods(exam: Exam, seed: int) -> tuple[dict[str, float], dict[str, float | None]]:
    some = _sample(list(exam.rows), LIKELIHOOD_ROWS, seed)
    rows = [(row.ids, row.mask) for row in template.encode_all(exam.tokenizer, some)]
    found = {
        name: likelihood(exam.runtime, rows, adapter, _progress(exam.tell, f"likelihood, {name}"))
        for name, adapter in (("base", None), (TUNED, TUNED))
    }
    return {n: one.loss for n, one in found.items()}, {n: one.perplexity for n, one in found.items()}


def _efficiency(exam: Exam, base: Path, adapter: Path, seed: int) -> dict[str, Any]:
    """Single requests, one after the other, as they will be served: the release's own baseline."""
    draw = random.Random(seed)
    rows = [draw.choice(exam.rows) for _ in range(exam.section.latency_requests)]
    first, total, tokens = [], [], 0
    told = _progress(exam.tell, "latency of single requests")
    for n, row in enumerate(rows):
        prompt = template.prompt_ids(exam.tokenizer, row.prompt, getattr(row, "tools", ()))
        began = time.perf_counter()
        for count, _ in enumerate(
            exam.runtime.stream(prompt, Sampling(exam.section.max_new_tokens), TUNED, exam.stop_ids)
        ):
            if count == 0:
                first.append(time.perf_counter() - began)
            tokens += 1
        total.append(time.perf_counter() - began)
        told(n + 1, len(rows))
    return {
        "requests": len(rows),
        "errors": 0,
        "latency": statistics.percentiles(total),
        "first_token": statistics.percentiles(first),
        "tokens_per_s": tokens / sum(total),
        "tokens_per_answer": tokens / len(rows),
        "peak_rss_bytes": memory.peak_rss_bytes(),
        "adapter_bytes": sum(path.stat().st_size for path in adapter.iterdir()),
        "base_bytes": sum(path.stat().st_size for path in base.iterdir()),
    }


def _samples(
    rows: Sequence[Chat], texts: dict[str, list[str]], said: dict[str, list[str | None]]
) -> list[dict[str, Any]]:
    return [
        {
            "id": row.id,
            "where": row.where,
            "gold": row.answer,
            "prompt": row.prompt[-1].content,
            "answers": {name: answers[n] for name, answers in texts.items()},
            "said": {name: answers[n] for name, answers in said.items()},
            "correct": {name: answers[n] == row.answer.strip() for name, answers in said.items()},
        }
        for n, row in enumerate(rows)
    ]


def _facts(card: dict[str, Any], efficiency: dict[str, Any]) -> dict[str, Any]:
    shown = ("accuracy", "reward", "preferred", "margin", "low", "high", "f1", "unparsed", "note")
    systems = card["systems"].items()
    return {
        "rows": card["rows"],
        "systems": {name: {key: score[key] for key in shown if key in score} for name, score in systems},
        "paired": card["paired"],
        **({"calls": card["calls"]} if "calls" in card else {}),
        "loss": card["loss"],
        "perplexity": card["perplexity"],
        "latency_p50_s": efficiency["latency"]["p50"],
        "latency_p95_s": efficiency["latency"]["p95"],
        "tokens_per_s": efficiency["tokens_per_s"],
        "peak_rss_bytes": efficiency["peak_rss_bytes"],
    }
