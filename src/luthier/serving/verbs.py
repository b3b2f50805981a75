"""Canaries and shadows as verbs: begin one, look at it, stop it, finish it.

What a verb does is a row; servers that share the store follow it with their next request. It knows no
terminal and no running server.
"""

from __future__ import annotations

from typing import Any

from luthier.errors import LuthierError, NotFound
from luthier.serving.splits import Action, Kind, Split, Splits
from luthier.store import ReleaseRecord, Store


def begin(store: Store, name: str, kind: Kind, to: str, percent: float, actor: str) -> dict[str, Any]:
    """Let the release `to` (a digest's beginning or an alias) meet `percent` of NAME's requests."""
    record = _release(store, name, to)
    split = Splits(store).begin(name, kind, record.digest, percent, actor)
    store.record_event(f"{kind.value}_began", {"name": name, "digest": split.digest, "percent": percent})
    return _told(store, split)


def end(store: Store, name: str, kind: Kind, action: Action, actor: str) -> dict[str, Any]:
    """Stop a split; or finish a canary, which moves production onto it, if that still stands where it did."""
    splits = Splits(store)
    split = splits.last(name, kind)
    if split is None or not split.in_force:
        raise NotFound(
            f"{name} has no {kind.value} under way", hint=f"luthier {kind.value} {name} --to DIGEST"
        )
    if action is Action.FINISH:
        store.move_ref(
            name, "production", split.digest, expected=split.champion, actor=actor, reason="canary finished"
        )
    ended = splits.end(split, action, actor, f"{action.value} asked for", {})
    store.record_event(f"{kind.value}_{action.value}", {"name": name, "digest": split.digest})
    return _told(store, ended)


def look(store: Store, name: str, kind: Kind) -> dict[str, Any]:
    """The latest split of a name and how it stands."""
    split = Splits(store).last(name, kind)
    if split is None:
        raise NotFound(f"{name} never had a {kind.value}", hint=f"luthier {kind.value} {name} --to DIGEST")
    return _told(store, split)


def _told(store: Store, split: Split) -> dict[str, Any]:
    moved = split.in_force and store.resolve(split.name, "production") != split.champion
    told = {
        "name": split.name,
        "kind": split.kind.value,
        "state": "void: production has moved" if moved else _STATES[split.action],
        "digest": split.digest,
        "champion": split.champion,
        "percent": split.percent,
        "actor": split.actor,
        "reason": split.reason,
        "at": split.at,
        "figures": dict(split.facts),
    }
    if split.kind is Kind.SHADOW:
        told["figures"] = Splits(store).compared(split.id)
    return told


_STATES = {
    Action.BEGIN: "in force",
    Action.STOP: "stopped",
    Action.FINISH: "finished",
    Action.ABORT: "aborted",
}


def _release(store: Store, name: str, to: str) -> ReleaseRecord:
    digest = store.resolve(name, to)
    try:
        return store.release(name, digest or to)
    except LuthierError as error:
        known = ", ".join(sorted(store.aliases(name))) or "none yet"
        raise NotFound(f"{name} has no alias or release {to!r}", hint=f"aliases: {known}") from error
