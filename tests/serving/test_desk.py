"""The queue before the engine: whose turn it is, who is refused, who gives way."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from luthier.errors import ServeError
from luthier.serving.desk import Dropped, Turn
from luthier.serving.limits import Busy, Limits
from luthier.serving.service import Options, Service
from luthier.serving.worker import Ask, End, Event, Failed
from tests.serving.make_home import World, asked

LONG = 1900


@pytest.fixture(scope="module")
def service(world: World) -> Iterator[Service]:
    with Service(world.store, world.home, Limits(active=1, waiting=6, first_s=math.inf)) as service:
        service.warm()
        yield service


@pytest.fixture(autouse=True)
def settled(service: Service) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 30
    while service.worker.counts().active + service.worker.counts().waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(service: Service, tokens: int) -> Ask:
    target = service.router.resolve("guard")
    return service.prepare(target, asked("hello there"), Options(max_tokens=tokens))


def submit(
    service: Service, given: Ask, tenant: str, *, low: bool = False
) -> tuple[queue.Queue[Event], Callable[[], None]]:
    events: queue.Queue[Event] = queue.Queue()
    return events, service.submit(given, events.put, Turn(tenant, low))


def last(events: queue.Queue[Event]) -> Event:
    while True:
        event = events.get(timeout=30)
        if isinstance(event, End | Failed):
            return event


def test_a_tenant_that_floods_the_queue_is_not_served_before_one_that_asks_once(service: Service) -> None:
    plug, unplug = submit(service, ask(service, LONG), "flood")
    plug.get(timeout=30)
    short = ask(service, 4)
    order: queue.Queue[str] = queue.Queue()

    def told(name: str) -> Callable[[Event], None]:
        return lambda event: order.put(name) if isinstance(event, End) else None

    for n in range(4):
        service.submit(short, told(f"flood {n}"), Turn("flood"))
    service.submit(short, told("guest"), Turn("guest"))
    unplug()
    heard = [order.get(timeout=30) for _ in range(5)]
    assert heard[:2] == ["flood 0", "guest"]


def test_a_full_queue_refuses_the_tenant_that_filled_it_and_takes_in_another(service: Service) -> None:
    plug, unplug = submit(service, ask(service, LONG), "flood")
    plug.get(timeout=30)
    short = ask(service, 4)
    waiting = [submit(service, short, "flood")[0] for _ in range(6)]
    with pytest.raises(Busy) as refusal:
        submit(service, short, "flood")
    assert 1 <= refusal.value.retry_after_s <= 60
    guest, _ = submit(service, short, "guest")
    pushed = last(waiting.pop())
    assert isinstance(pushed, Failed) and isinstance(pushed.error, Busy)
    unplug()
    assert isinstance(last(guest), End)
    assert all(isinstance(last(events), End) for events in waiting)


def test_room_is_judged_for_the_tenant_that_asks(service: Service) -> None:
    """Also for one request of many answers: they find room together, or none of them does."""
    short, target = ask(service, 4), service.router.resolve("guard")
    plug, unplug = submit(service, ask(service, LONG), "local")
    plug.get(timeout=30)
    waiting = [submit(service, short, "local")[0] for _ in range(6)]
    given = target, asked("hello there"), Options(max_tokens=4)
    for turn in (None, Turn("local")):
        with pytest.raises(Busy):
            service.prepare(*given, turn)
        with pytest.raises(Busy):
            service.prepare_text(target, "hello", Options(max_tokens=4), turn)
    assert service.prepare(*given, Turn("guest"))
    assert service.prepare_text(target, "hello", Options(max_tokens=4), Turn("guest"))
    service.worker.require_room(Turn("guest"), 3)
    with pytest.raises(Busy):
        service.worker.require_room(Turn("guest"), 4)
    assert all(events.empty() for events in waiting)  # to ask for room takes nobody's
    unplug()
    assert all(isinstance(last(events), End) for events in waiting)
    service.worker.require_room(Turn("local"), 7)
    with pytest.raises(Busy):
        service.worker.require_room(Turn("local"), 8)


def test_a_low_request_runs_in_idle_room_and_gives_way_to_the_first_that_comes(service: Service) -> None:
    low, _ = submit(service, ask(service, LONG), "shadow", low=True)
    low.get(timeout=30)
    events, _ = submit(service, ask(service, 4), "someone")
    assert isinstance(last(events), End)
    dropped = last(low)
    assert isinstance(dropped, Failed) and isinstance(dropped.error, Dropped)
    idle, _ = submit(service, ask(service, 4), "shadow", low=True)
    assert isinstance(last(idle), End)


def test_a_low_request_is_refused_while_others_wait(service: Service) -> None:
    plug, unplug = submit(service, ask(service, LONG), "a")
    plug.get(timeout=30)
    waits, _ = submit(service, ask(service, 4), "a")
    with pytest.raises(Dropped):
        submit(service, ask(service, 4), "shadow", low=True)
    unplug()
    assert isinstance(last(waits), End)


def test_a_waiting_request_that_is_cancelled_leaves_the_queue(service: Service) -> None:
    plug, unplug = submit(service, ask(service, LONG), "a")
    plug.get(timeout=30)
    events, cancel = submit(service, ask(service, 4), "a")
    cancel()
    assert service.worker.counts().waiting == 0
    unplug()
    assert events.empty()


def test_a_closing_desk_fails_what_did_not_end_in_time_and_takes_nothing_more(world: World) -> None:
    service = Service(world.store, world.home, Limits(active=1, waiting=2))
    service.start()
    running, _ = submit(service, ask(service, LONG), "a")
    running.get(timeout=30)
    waiting, _ = submit(service, ask(service, 4), "a")
    service.close(grace_s=0.0)
    for events in (running, waiting):
        assert isinstance(last(events), Failed)
    with pytest.raises(ServeError, match="shutting down"):
        service.worker.require_room()


def test_what_one_tenant_asked_is_not_found_by_another(service: Service) -> None:
    def found(tenant: str) -> int:
        before = service.engine.counts().found_blocks
        target = service.router.resolve("guard")
        given = service.prepare(target, asked("a secret that is long enough " * 4), Options(max_tokens=2))
        events, _ = submit(service, given, tenant)
        assert isinstance(last(events), End)
        return service.engine.counts().found_blocks - before

    assert found("one") == 0 and found("one") > 4
    assert found("another") == 0 and found("another") > 4


@dataclass(frozen=True)
class Rush:
    """Two places, both taken for long by a flood that was refused once; hardly any time for a first token."""

    service: Service
    short: Ask
    waited: queue.Queue[Event]
    unplugs: list[Callable[[], None]]


@pytest.fixture
def rush(world: World) -> Iterator[Rush]:
    with Service(world.store, world.home, Limits(active=2, waiting=1, first_s=0.001)) as service:
        service.warm()
        long, short = ask(service, LONG), ask(service, 4)
        for _ in range(3):  # what an answer takes is known from here on
            assert isinstance(last(submit(service, short, "flood")[0]), End)
        plugs = []
        for _ in range(2):
            events, unplug = submit(service, long, "flood")
            events.get(timeout=30)
            plugs.append(unplug)
        waited, _ = submit(service, short, "flood")
        with pytest.raises(Busy):
            submit(service, short, "flood")
        yield Rush(service, short, waited, plugs)
        for unplug in plugs:
            unplug()


def test_in_a_rush_who_waits_too_long_is_refused_and_who_would_is_not_let_in(rush: Rush) -> None:
    failed = last(rush.waited)
    assert isinstance(failed, Failed) and isinstance(failed.error, Busy)
    assert rush.service.worker.counts().waiting == 0
    with pytest.raises(Busy) as refusal:
        rush.service.worker.require_room(Turn("flood"))
    assert 1 <= refusal.value.retry_after_s <= 60
    for unplug in rush.unplugs:
        unplug()
    assert isinstance(last(submit(rush.service, rush.short, "flood")[0]), End)


def test_in_a_rush_a_tenant_with_less_than_its_share_waits_for_its_place(rush: Rush) -> None:
    assert isinstance(last(rush.waited), Failed)
    guest, _ = submit(rush.service, rush.short, "guest")
    with pytest.raises(Busy):
        submit(rush.service, rush.short, "guest")
    rush.unplugs[0]()
    assert isinstance(last(guest), End)


def test_a_request_of_many_answers_comes_in_whole(rush: Rush) -> None:
    assert isinstance(last(rush.waited), Failed)
    rush.unplugs[0]()
    first, _ = submit(rush.service, rush.short, "flood")
    more = [queue.Queue[Event]() for _ in range(20)]
    for events in more:
        rush.service.submit(rush.short, events.put, Turn("flood", more=True))
    rush.unplugs[1]()
    assert all(isinstance(last(events), End) for events in (first, *more))
