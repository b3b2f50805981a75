"""Which release answers a request, and what else comes of it: a canary's share, a shadow, a known answer.

The router says what a model's name means; a canary in force on that name gives some users its challenger
instead, a shadow lets a challenger answer some requests once more, unseen, and an answer that is known
already is not computed again. If the challenger cannot even be found whole, the champion answers and the
trial hears of a failure. Nothing is remembered between requests: splits are followed as aliases are.
It does not know HTTP, templates or tokens.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from luthier.errors import LuthierError
from luthier.home import Home
from luthier.serving.cache import Cache, key_of
from luthier.serving.canary import Canaries, Ticket
from luthier.serving.desk import Desk, Turn
from luthier.serving.router import DEFAULT_ALIAS, Router, Target
from luthier.serving.shadow import Shadows
from luthier.serving.splits import Kind, Split, Splits
from luthier.serving.worker import Ask, Sink
from luthier.store import RequestRecord, Store

Again = Callable[[Target], Ask]

log = logging.getLogger("luthier.serving")


@dataclass(slots=True)
class Route:
    """What answers one request. Tell `ended` what became of it, whatever that is."""

    target: Target
    ticket: Ticket | None = None
    shadow: Split | None = None
    known: bool | None = None  # whether the answer came from the cache; None where it could not

    def ended(self, record: RequestRecord) -> None:
        if self.ticket is not None:
            self.ticket.end(None if self.known else record)


class Traffic:
    def __init__(self, store: Store, home: Home, router: Router, desk: Desk, cache: Cache | None) -> None:
        self.splits = Splits(store)
        self.shadows = Shadows(desk, self.splits)
        self.cache = cache
        self._canaries = Canaries(store, home, self.splits)
        self._router = router
        self._desk = desk
        self._draw = random.Random()  # whose request is shadowed has to be unforeseeable, not repeatable

    def route(self, model: str, target: Target, who: str) -> Route:
        """`target` is what `model` names; `who` is a user that should stay on one side of a canary."""
        if model not in (target.name, f"{target.name}@{DEFAULT_ALIAS}"):
            return Route(target)
        splits = self.splits.in_force(target.name, target.release_digest)
        shadow = splits.get(Kind.SHADOW)
        if shadow is not None and self._draw.random() * 100 >= shadow.percent:
            shadow = None
        canary = splits.get(Kind.CANARY)
        if canary is None:
            return Route(target, None, shadow)
        chosen = canary.takes(who)
        ticket = self._canaries.begin(canary, chosen)
        if not chosen:
            return Route(target, ticket, shadow)
        try:
            return Route(self._router.target(canary.digest, canary.name), ticket)
        except LuthierError as error:
            log.error("canary %s cannot be served: %s", canary.digest[:12], error)
            ticket.fail()
            return Route(target, None, shadow)

    def start(
        self, route: Route, ask: Ask, sink: Sink, turn: Turn, again: Again | None = None
    ) -> Callable[[], None]:
        """Begin an answer; `again` asks another release the same, for a shadow. Returns what cancels it."""
        key = key_of(ask, turn.tenant) if self.cache is not None else None
        if self.cache is not None and key is not None:
            known = self.cache.get(key)
            route.known = known is not None and route.known is not False
            if known is not None:
                for event in known:
                    sink(event)
                return _nothing
            sink = self.cache.tee(key, sink)
        if route.shadow is not None and again is not None:
            split = route.shadow
            sink = self.shadows.tap(split, lambda: again(self._router.target(split.digest, split.name)), sink)
        return self._desk.submit(ask, sink, turn)


def _nothing() -> None:
    return None
