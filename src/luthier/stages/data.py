"""Stage 1, data: declared sources become three disjoint splits of rows, and a card that says so.

Order: licence and purpose first, then reading, value maps and chat form, the split, exact de-duplication,
and the removal of leaks (a prompt that also stands in a split of higher rank: test, validation, train).
Source of the split: distinct prompts in the order of SHA-256 over seed and content, so membership depends
neither on the order of rows nor on the machine, and equal prompts always share a split.
This stage does not know tokens, near-duplicates or personal data, nor data larger than memory.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import artifacts, plugins
from luthier.errors import DataError, Interrupted
from luthier.rows import Message, Row, dicts
from luthier.sources import _form, _licence, _records
from luthier.stages import Event, Inputs

SPLITS = ("train", "validation", "test")
RANKED = ("test", "validation", "train")
LABELS = (*SPLITS, "all")
CLASSES = 20  # with more distinct answers than this they are texts, not classes
TELL_ROWS = 5000

Pools = Mapping[str, Sequence[Row]]
Prompt = tuple[Message, ...]


@dataclass(frozen=True)
class Divided:
    """Three disjoint splits, and what was left out or is doubtful."""

    rows: Mapping[str, tuple[Row, ...]]
    duplicates: int
    leaks: Mapping[str, int]
    contradictions: tuple[tuple[str, ...], ...]


def external(section: Any, root: Path) -> dict[str, str]:
    """What every source file holds, so that one changed byte asks for a new dataset."""
    return {
        f"{n}.{label}": digest
        for n, source in enumerate(section.sources)
        for label, digest in source.origin.module.fingerprint(source.origin.params, root).items()
    }


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    _permitted(section)
    if section.split.validation + section.split.test >= 1:
        raise DataError("the shares for validation and test leave nothing to train on", where="data.split")
    pools: list[Pools] = []
    files: list[list[dict[str, Any]]] = []
    for n, source in enumerate(section.sources):
        pool, read = _read(source, f"data.sources.{n}", inputs, section.rows or "Chat")
        pools.append(pool)
        files.append(read)
    divided = divide(pools, section.split, inputs.seed, dedup=section.dedup == "exact")
    for split in _wanted(section):
        if not divided.rows[split]:
            raise DataError(
                f"no row is left for {split}",
                where="data.split",
                hint=f"declare a file labelled `{split}`, give it a share in `data.split`, or add rows",
            )
    for split in SPLITS:
        artifacts.write_jsonl(
            out / "rows" / f"{split}.jsonl", (row.as_record() for row in divided.rows[split])
        )
    card = _card(section, inputs, out, divided, files)
    artifacts.write_json(out / "card.json", card)
    artifacts.write_bytes(out / "card.md", _page(card).encode("utf-8"))
    return {
        "rows": {split: len(divided.rows[split]) for split in SPLITS},
        "rows_read": card["rows_read"],
        "duplicates_removed": divided.duplicates,
        "leaks_removed": dict(divided.leaks),
        "contradictions": len(divided.contradictions),
        "answers": {split: card["splits"][split]["answers"] for split in SPLITS},
        "licences": sorted({source["licence"] for source in card["sources"]}),
        "sources": len(card["sources"]),
        "version": card["version"],
    }


def _wanted(section: Any) -> list[str]:
    """Splits that must have a row: train, those with a share, and those that a source declares."""
    declared = {label for source in section.sources for label in source.origin.params.files}
    shares = {"validation": section.split.validation, "test": section.split.test}
    return [split for split in SPLITS if split == "train" or shares[split] or split in declared]


def _permitted(section: Any) -> None:
    """Refuse a source whose licence is not known or whose purpose is not stated, before anything is read."""
    for n, source in enumerate(section.sources):
        where = f"data.sources.{n}"
        if _licence.spdx(source.licence) is None:
            raise DataError(_licence.unknown(source.licence), where=f"{where}.licence", hint=_licence.HINT)
        if not source.purpose.strip():
            raise DataError(
                "no purpose is stated", where=f"{where}.purpose", hint="say what the rows are used for here"
            )


def _read(source: Any, where: str, inputs: Inputs, kind: str) -> tuple[Pools, list[dict[str, Any]]]:
    """All rows of a source by label, and what each of its files was."""

    def tell(message: str, done: int | None, total: int | None) -> None:
        if inputs.stopping():
            raise Interrupted("stopped while fetching data", hint="the same command goes on")
        inputs.tell(Event("data", message, done, total))

    origin = source.origin
    for label in origin.params.files:
        if label not in LABELS:
            raise DataError(plugins.unknown("label", label, LABELS), where=f"{where}.from.files")
    paths = origin.module.fetch(origin.params, inputs.root, inputs.cache, tell)
    form = source.chat and _form.Form(
        source.chat.user, source.chat.assistant, source.chat.system, source.values, source.chat.rejected
    )
    if source.values and not source.chat:
        raise DataError("`values` needs `chat`: it maps columns, not messages", where=f"{where}.values")
    pools: dict[str, list[Row]] = {}
    files = []
    for label, path in sorted(paths.items()):
        name = origin.params.files[label]
        rows = pools[label] = []
        for record, place in _records.read(path, name):
            rows.append(_form.read(record, form, place, kind))
            if len(rows) % TELL_ROWS == 0:
                tell(f"reading {name}", len(rows), None)
        if not rows:
            raise DataError("the file has no rows", where=name)
        files.append({"label": label, "name": name, "rows": len(rows), "sha256": artifacts.file_digest(path)})
        tell(f"read {name}", len(rows), len(rows))
    return pools, files


def divide(pools: Sequence[Pools], shares: Any, seed: int, *, dedup: bool) -> Divided:
    """Rows into splits, as declared or by seed and content; then no row twice, no prompt in two splits."""
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for pool in pools:
        for split, some in _declared(pool, shares, seed).items():
            rows[split] += some
    duplicates = 0
    if dedup:
        for split in SPLITS:
            once = list({row.id: row for row in reversed(rows[split])}.values())[::-1]
            duplicates += len(rows[split]) - len(once)
            rows[split] = once
    answers: dict[Prompt, dict[str, str]] = defaultdict(dict)
    for split in SPLITS:
        for row in rows[split]:
            answers[row.prompt].setdefault(row.answer, row.where)
    contradictions = tuple(tuple(places.values()) for places in answers.values() if len(places) > 1)
    taken: set[Prompt] = set()
    leaks: dict[str, int] = {}
    for split in RANKED:
        kept = [row for row in rows[split] if row.prompt not in taken]
        leaks[split] = len(rows[split]) - len(kept)
        rows[split] = kept
        taken.update(row.prompt for row in kept)
    return Divided(
        {split: tuple(rows[split]) for split in SPLITS},
        duplicates,
        {split: leaks[split] for split in SPLITS if split != RANKED[0]},
        contradictions,
    )


def _declared(pool: Pools, shares: Any, seed: int) -> dict[str, list[Row]]:
    """A source's own splits; those that it does not declare are held out of its `train` and `all` rows."""
    found = {split: list(pool.get(split, ())) for split in ("test", "validation")}
    open_rows = [*pool.get("train", ()), *pool.get("all", ())]
    groups: dict[Prompt, list[Row]] = defaultdict(list)
    for row in open_rows:
        groups[row.prompt].append(row)
    strata = _strata(groups, seed, stratified=shares.by == "stratified")
    chosen: dict[Prompt, str] = {}
    for split, share in (("test", shares.test), ("validation", shares.validation)):
        if split in pool:
            continue
        for stratum, quota in _quotas({name: len(order) for name, order in strata.items()}, share).items():
            free = [prompt for prompt in strata[stratum] if prompt not in chosen]
            chosen.update(dict.fromkeys(free[:quota], split))
    rows: dict[str, list[Row]] = {"train": [], **found}
    for row in open_rows:
        rows[chosen.get(row.prompt, "train")].append(row)
    return rows


def _strata(
    groups: Mapping[Prompt, Sequence[Row]], seed: int, *, stratified: bool
) -> dict[str, list[Prompt]]:
    """Prompts in the order of their hash, by answer if answers are classes; else all together."""
    answer = {prompt: min(rows, key=lambda row: row.id).answer for prompt, rows in groups.items()}
    classes = stratified and len(set(answer.values())) <= CLASSES
    ordered = sorted(groups, key=lambda prompt: _order(prompt, seed))
    strata: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in ordered:
        strata[answer[prompt] if classes else ""].append(prompt)
    return dict(sorted(strata.items()))


def _order(prompt: Prompt, seed: int) -> bytes:
    return hashlib.sha256(artifacts.canonical([seed, dicts(prompt)])).digest()


def _quotas(sizes: Mapping[str, int], share: float) -> dict[str, int]:
    """Whole numbers that sum to the share of all and keep the ratio of strata (largest remainder)."""
    exact = {name: size * share for name, size in sizes.items()}
    quotas = {name: math.floor(value) for name, value in exact.items()}
    missing = math.floor(sum(exact.values()) + 0.5) - sum(quotas.values())
    by_remainder = sorted(sizes, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[:missing]:
        quotas[name] += 1
    return quotas


def _answers(rows: Sequence[Row]) -> dict[str, int]:
    """How often each answer stands, if answers are classes; else how many different ones there are."""
    counts = Counter(row.answer or "(the model's own)" for row in rows)
    return dict(sorted(counts.items())) if len(counts) <= CLASSES else {"(distinct texts)": len(counts)}


def _card(
    section: Any, inputs: Inputs, out: Path, divided: Divided, files: Sequence[list[dict[str, Any]]]
) -> dict[str, Any]:
    splits = {
        split: {
            "rows": len(divided.rows[split]),
            "answers": _answers(divided.rows[split]),
            "sha256": artifacts.file_digest(out / "rows" / f"{split}.jsonl"),
        }
        for split in SPLITS
    }
    sources = []
    for source, read in zip(section.sources, files, strict=True):
        licence = _licence.spdx(source.licence) or source.licence
        sources.append(
            {
                "from": source.origin.as_dict(),
                "licence": licence,
                "noncommercial": _licence.noncommercial(licence),
                "purpose": source.purpose,
                "files": read,
            }
        )
    return {
        "name": inputs.name,
        "version": artifacts.digest_of({split: splits[split]["sha256"] for split in SPLITS}),
        "sources": sources,
        "splits": splits,
        "rows_read": sum(file["rows"] for read in files for file in read),
        "duplicates_removed": divided.duplicates,
        "leaks_removed": dict(divided.leaks),
        "contradictions": len(divided.contradictions),
        "contradiction_examples": [list(places) for places in divided.contradictions[:20]],
        "split": {
            "seed": inputs.seed,
            "method": "as declared; else by SHA-256 of seed and prompt",
            **section.split.model_dump(mode="json"),
        },
        "dedup": section.dedup,
    }


def _page(card: Mapping[str, Any]) -> str:
    """The card for people."""
    lines = [f"# Dataset card: {card['name']}", "", f"Version `{card['version']}`", "", "## Sources", ""]
    for source in card["sources"]:
        note = " (its licence grants no commercial use)" if source["noncommercial"] else ""
        lines += [
            f"- **{_origin(source['from'])}**, licence {source['licence']}{note}",
            f"  Purpose: {' '.join(source['purpose'].split())}",
        ]
        lines += [
            f"  - `{file['name']}` as {file['label']}: {file['rows']} rows, sha256 `{file['sha256']}`"
            for file in source["files"]
        ]
    lines += ["", "## Splits", "", "| split | rows | answers | sha256 |", "| --- | ---: | --- | --- |"]
    for split in SPLITS:
        facts = card["splits"][split]
        answers = ", ".join(f"{_cell(name)}: {count}" for name, count in facts["answers"].items())
        lines.append(f"| {split} | {facts['rows']} | {answers} | `{facts['sha256'][:16]}` |")
    how = card["split"]
    leaks = ", ".join(f"{split}: {count}" for split, count in card["leaks_removed"].items())
    lines += [
        "",
        "## How it was made",
        "",
        f"- Rows read: {card['rows_read']}.",
        f"- Exact duplicates removed within a split: {card['duplicates_removed']} (rule: {card['dedup']}).",
        f"- Rows removed, as their prompt stands in a split of higher rank ({', '.join(RANKED)}): {leaks}.",
        f"- Prompts with more than one answer, kept: {card['contradictions']}.",
        f"- Split: {how['method']} (seed {how['seed']}, {how['by']}; "
        f"validation {how['validation']}, test {how['test']}).",
        "",
        "## Not checked",
        "",
        "Near-duplicates, personal data, quality of answers, and the giver's right to give this licence.",
        "",
    ]
    return "\n".join(lines)


def _origin(origin: Mapping[str, Any]) -> str:
    pinned = " ".join(str(origin[key]) for key in ("package", "repo", "revision") if key in origin)
    return f"{origin['name']} {pinned}".strip()


def _cell(text: str) -> str:
    """A table cell: one short line that cannot end the cell."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 40 else flat[:39] + "…"
