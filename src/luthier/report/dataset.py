"""The data card as the page shows it: rows by split, what was taken out, and where the rows came from.

It reads the card that the data stage leaves and knows no other file.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.report.folders import Record, mapping, records
from luthier.report.numbers import clip, count, short, visible


@dataclass(frozen=True)
class Origin:
    """One source: its name, licence, purpose, and a line for each file of it."""

    name: str
    licence: str
    purpose: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """`answers` heads the columns that follow the rows of each split; `removed` are label and count."""

    answers: tuple[str, ...]
    splits: tuple[tuple[str, str, tuple[str, ...]], ...]
    removed: tuple[tuple[str, str], ...]
    origins: tuple[Origin, ...]


def dataset(card: Record) -> Dataset | None:
    if not card:
        return None
    splits = {str(name): mapping(entry) for name, entry in mapping(card.get("splits")).items()}
    known = [name for name in ("train", "validation", "test") if name in splits]
    ordered = [(name, splits[name]) for name in dict.fromkeys([*known, *splits])]
    answers = sorted({str(name) for _, entry in ordered for name in mapping(entry.get("answers"))})
    rows = [
        (
            visible(name),
            count(entry.get("rows")),
            tuple(count(mapping(entry.get("answers")).get(a)) for a in answers),
        )
        for name, entry in ordered
    ]
    return Dataset(
        tuple(clip(visible(answer), 40) for answer in answers),
        tuple(rows),
        tuple(_removed(card)),
        tuple(_origin(entry) for entry in records(card.get("sources"))),
    )


def _removed(card: Record) -> list[tuple[str, str]]:
    told = [
        ("rows read", count(card.get("rows_read"))),
        ("exact duplicates removed", count(card.get("duplicates_removed"))),
    ]
    told += [
        (f"leaks removed from {visible(split)}", count(total))
        for split, total in sorted(mapping(card.get("leaks_removed")).items())
    ]
    return [*told, ("prompts with two answers, kept", count(card.get("contradictions")))]


def _origin(entry: Record) -> Origin:
    licence = visible(entry.get("licence") or "no licence recorded")
    licence += " (no commercial use)" if entry.get("noncommercial") else ""
    files = [
        f"{visible(file.get('name'))} as {visible(file.get('label'))}: {count(file.get('rows'))} rows,"
        f" sha256 {short(file.get('sha256'))}"
        for file in records(entry.get("files"))
    ]
    return Origin(source_name(entry), licence, clip(visible(entry.get("purpose") or ""), 400), tuple(files))


def source_name(entry: Record) -> str:
    """A pinned package or repository by its name; files by the word for them."""
    origin = mapping(entry.get("from"))
    pin = origin.get("package") or origin.get("repo") or origin.get("name") or "files"
    return visible(pin)


def source_pin(entry: Record) -> str:
    """The short digest that pins the source: of the package, the revision, else of its first file."""
    origin = mapping(entry.get("from"))
    files = records(entry.get("files"))
    return short(
        origin.get("sha256") or origin.get("revision") or (files[0].get("sha256") if files else None)
    )
