"""Stage 6, release: every gate looks at the evidence; verdicts, model card and adapter become one folder.

Before judging it rehearses: the saved adapter answers probes through the very engine that will serve it.
A gate that fails to reach a verdict has refused. Nothing is raised on a refusal: the folder then says why,
and whoever runs the stage decides what to do. It moves no alias and knows no store.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from luthier import artifacts, cards, template
from luthier.errors import Interrupted, LuthierError
from luthier.gates import Evidence, Verdict
from luthier.inference.decoder import Decoder
from luthier.inference.growing import Room
from luthier.inference.sampling import Sampling
from luthier.rows import again
from luthier.stages import STAGES, Event, Inputs
from luthier.store import RequestRecord

PROBES = 500  # the most any gate may ask for
REHEARSAL = 20  # probes answered whatever the gates ask for


class Rehearsal:
    """The serving engine with the saved adapter, and the log of what it was asked."""

    def __init__(self, inputs: Inputs, stop_ids: frozenset[int], max_new_tokens: int, weights: str) -> None:
        base = inputs.artefacts["model"]
        digest = str(artifacts.read_json(base / "base.json")["digest"])
        room = Room(rows=1, adapters=1)
        self.decoder = Decoder.load(base / "base", digest, room, int8=weights == "int8")
        self.adapter = inputs.digests["train"]
        self.decoder.add(self.adapter, inputs.artefacts["train"] / "adapter")
        self.model, self.stop_ids, self.max_new_tokens = f"{inputs.name}@rehearsal", stop_ids, max_new_tokens
        self.stopping = inputs.stopping
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.log: list[RequestRecord] = []

    def serve(self, prompt: Sequence[int]) -> list[int]:
        """One greedy answer; asked again, the answer given before."""
        known = self.answers.get(tuple(prompt))
        if known is not None:
            return known
        if self.stopping():
            raise Interrupted("stopped while rehearsing", hint="the same command rehearses again")
        began, first, tokens = time.perf_counter(), None, []
        for token in self.decoder.stream(prompt, Sampling(self.max_new_tokens), self.adapter, self.stop_ids):
            first = time.perf_counter() - began if first is None else first
            tokens.append(token)
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.log.append(
            RequestRecord(
                at, None, self.model, 200, len(prompt), len(tokens), first, time.perf_counter() - began
            )
        )
        self.answers[tuple(prompt)] = tokens
        return tokens


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    torch.set_num_threads(artifacts.read_json(inputs.artefacts["plan"] / "plan.json")["threads"])
    evidence, rehearsal = _evidence(inputs, section.weights)
    for n, probe in enumerate(evidence.probes[:REHEARSAL]):
        rehearsal.serve(probe)
        inputs.tell(Event("release", "rehearsal", n + 1, min(REHEARSAL, len(evidence.probes))))
    verdicts = [_compatible(inputs)]
    for n, part in enumerate(section.gates):
        inputs.tell(Event("release", f"gate {part.name}", n, len(section.gates)))
        verdicts.append({"gate": part.name, **_judge(part, evidence)})
    card = _card(section, inputs, evidence, verdicts)
    holes = cards.missing(card)
    verdicts.append(
        {
            "gate": "model card",
            "passed": not holes,
            "reason": f"the card lacks {', '.join(holes)}" if holes else "the card is complete",
            "evidence": {},
        }
    )
    accepted = all(verdict["passed"] for verdict in verdicts)
    release = {
        "name": inputs.name,
        "accepted": accepted,
        "verdicts": verdicts,
        "champion": inputs.digests.get("champion"),
        **{stage: inputs.digests[stage] for stage in STAGES["release"].needs},
        "base": card["base"]["digest"],
        "base_model_relation": "adapter",
        "weights": section.weights,
    }
    _write(out, inputs, release, card, rehearsal.log)
    return {"accepted": accepted, "verdicts": verdicts, "champion": release["champion"]}


def _evidence(inputs: Inputs, weights: str = "trained") -> tuple[Evidence, Rehearsal]:
    base, train, evaluate = (inputs.artefacts[stage] for stage in ("model", "train", "evaluate"))
    champion = inputs.artefacts.get("champion")
    tokenizer = template.load_tokenizer(base / "base")
    card = artifacts.read_json(evaluate / "scorecard.json")
    rows = artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / f"{card.get('split', 'test')}.jsonl")
    random.Random(inputs.seed).shuffle(rows)
    probes = [template.prompt_ids(tokenizer, again(row).prompt) for row in rows[:PROBES]]
    longest = int(card["max_new_tokens"])
    rehearsal = Rehearsal(inputs, template.stop_ids(tokenizer), longest, weights)
    evidence = Evidence(
        scorecard=card,
        correct=_correct(evaluate),
        champion=artifacts.read_json(champion / "scorecard.json") if champion else None,
        champion_correct=_correct(champion) if champion else {},
        efficiency=artifacts.read_json(evaluate / "observed" / "efficiency.json"),
        adapter=train / "adapter",
        base=base / "base",
        probes=probes,
        stop_ids=rehearsal.stop_ids,
        max_new_tokens=longest,
        serve=rehearsal.serve,
        rewards=_rewards(evaluate),
        champion_rewards=_rewards(champion) if champion else {},
    )
    return evidence, rehearsal


def _correct(folder: Path) -> dict[str, dict[str, bool]]:
    return {row["id"]: row["correct"] for row in artifacts.read_jsonl(folder / "samples.jsonl")}


def _rewards(folder: Path) -> dict[str, dict[str, float]]:
    rows = artifacts.read_jsonl(folder / "samples.jsonl")
    return {row["id"]: row["rewards"] for row in rows if "rewards" in row}


def _judge(part: Any, evidence: Evidence) -> dict[str, Any]:
    try:
        verdict: Verdict = part.module.check(part.params, evidence)
    except Interrupted:
        raise
    except (
        LuthierError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        OSError,
        RuntimeError,
    ) as error:
        verdict = Verdict(False, f"no verdict: {type(error).__name__}: {error}")
    return asdict(verdict)


def _compatible(inputs: Inputs) -> dict[str, Any]:
    """The adapter must have been trained over the very base it will be laid over."""
    trained = artifacts.read_json(inputs.artefacts["train"] / "phase.json")["base"]
    base = artifacts.read_json(inputs.artefacts["model"] / "base.json")["digest"]
    same = trained == base
    return {
        "gate": "compatibility",
        "passed": same,
        "reason": f"adapter and base {base[:12]} belong together"
        if same
        else "the adapter is of another base",
        "evidence": {"trained_on": trained, "base": base},
    }


def _card(section: Any, inputs: Inputs, evidence: Evidence, verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    base = artifacts.read_json(inputs.artefacts["model"] / "base.json")
    data = artifacts.read_json(inputs.artefacts["data"] / "card.json")
    phase = artifacts.read_json(inputs.artefacts["train"] / "phase.json")
    card = evidence.scorecard
    shown = (
        ("reward", "low", "high") if card.get("measure") == "reward" else ("accuracy", "low", "high", "f1")
    )
    return {
        "name": inputs.name,
        "intended_use": section.intended_use,
        "limits": section.limits,
        "weights": section.weights,
        "base": {name: base[name] for name in ("source", "architecture", "parameters", "licence", "digest")},
        "data": {
            **{split: data["splits"][split]["rows"] for split in ("train", "validation", "test")},
            "licences": sorted({source["licence"] for source in data["sources"]}),
            "purposes": sorted({source["purpose"] for source in data["sources"]}),
            "version": data["version"],
        },
        "training": {
            "objective": phase["phase"]["objective"]["name"],
            "method": phase["phase"]["method"]["name"],
            **{name: phase[name] for name in ("steps", "useful_tokens", "seed", "best_step")},
        },
        "evaluation": {
            "rows": card["rows"],
            "split": card.get("split", "test"),
            "systems": {name: {key: score[key] for key in shown} for name, score in card["systems"].items()},
            "paired": card["paired"],
        },
        "gates": [{key: verdict[key] for key in ("gate", "passed", "reason")} for verdict in verdicts],
        "lineage": {stage: inputs.digests[stage] for stage in STAGES["release"].needs},
    }


def _write(
    out: Path, inputs: Inputs, release: dict[str, Any], card: dict[str, Any], log: list[RequestRecord]
) -> None:
    artifacts.write_json(out / "release.json", release)
    artifacts.write_json(out / "card.json", card)
    artifacts.write_bytes(out / "card.md", cards.page(card).encode("utf-8"))
    artifacts.link_tree(inputs.artefacts["train"] / "adapter", out / "adapter")
    for name in ("scorecard.json", "samples.jsonl"):
        artifacts.write_bytes(out / name, (inputs.artefacts["evaluate"] / name).read_bytes())
    (out / "observed").mkdir(exist_ok=True)
    artifacts.write_jsonl(out / "observed" / "requests.jsonl", [asdict(request) for request in log])
