"""The engine in its own process: the same answers, and what is left of them when it is killed."""

from __future__ import annotations

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from luthier.errors import NotFound, ServeError
from luthier.serving import engine_process, wire
from luthier.serving.engine_process import EngineProcess, State, Unavailable
from luthier.serving.limits import Limits
from luthier.serving.service import Options, Service
from luthier.serving.worker import Ask, End, EngineFailed, Event, Failed, Said
from tests.serving.make_home import PROMPTS, TOKENS, World, asked

LONG = 1900
WAIT_S = 60


@pytest.fixture(scope="module")
def service(world: World) -> Iterator[Service]:
    with Service(world.store, world.home, Limits(active=2, waiting=8), threads=1, apart=True) as service:
        service.warm()
        yield service


def engine(service: Service) -> EngineProcess:
    assert isinstance(service.engine, EngineProcess)
    return service.engine


def ask(service: Service, model: str, prompt: str, tokens: int) -> Ask:
    return service.prepare(service.router.resolve(model), asked(prompt), Options(max_tokens=tokens))


def submit(service: Service, given: Ask) -> queue.Queue[Event]:
    events: queue.Queue[Event] = queue.Queue()
    service.submit(given, events.put)
    return events


def finish(events: queue.Queue[Event]) -> tuple[list[int], str, Event]:
    tokens, text = [], ""
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, Failed):
            return tokens, text, event
        if isinstance(event, Said | End):
            text += event.text
        if isinstance(event, End):
            return tokens, text, event
        if isinstance(event, Said):
            tokens.append(event.token)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_across_the_process_boundary_equal_their_releases_references(
    world: World, service: Service
) -> None:
    cases = [(digest, prompt) for prompt in PROMPTS for digest in world.releases]
    under_way = [submit(service, ask(service, f"guard@{d}", prompt, TOKENS)) for d, prompt in cases]
    for case, events in zip(cases, under_way, strict=True):
        tokens, text, end = finish(events)
        reference = world.answers[case]
        assert (tuple(tokens), text) == (reference.tokens, reference.text)
        assert isinstance(end, End) and end.reason.value == reference.reason


def test_a_killed_engine_ends_the_begun_in_an_error_and_asks_the_rest_of_the_next(
    world: World, service: Service
) -> None:
    restarts = engine(service).restarts
    begun = submit(service, ask(service, "guard", PROMPTS[0], LONG))
    begun.get(timeout=WAIT_S)
    blocked = submit(service, ask(service, "guard", PROMPTS[0], LONG))
    blocked.get(timeout=WAIT_S)
    waiting = [submit(service, ask(service, "guard", prompt, TOKENS)) for prompt in PROMPTS]
    pid = engine(service).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for events in (begun, blocked):
        _, _, end = finish(events)
        assert isinstance(end, Failed) and isinstance(end.error, EngineFailed)
        assert end.error.http_code == 500
    release = service.router.resolve("guard").release_digest
    for prompt, events in zip(PROMPTS, waiting, strict=True):
        tokens, _, end = finish(events)
        assert isinstance(end, End)
        assert tuple(tokens) == world.answers[release, prompt].tokens
    assert engine(service).restarts == restarts + 1 and service.state == "ok"
    assert service.worker.counts().active == service.worker.counts().waiting == 0


def test_an_engine_that_hangs_is_killed_and_another_answers(
    world: World, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "SILENT", 4)
    restarts = engine(service).restarts
    begun = submit(service, ask(service, "guard", PROMPTS[0], LONG))
    begun.get(timeout=WAIT_S)
    pid = engine(service).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    waiting = submit(service, ask(service, "guard", PROMPTS[1], TOKENS))
    _, _, end = finish(begun)
    assert isinstance(end, Failed) and isinstance(end.error, EngineFailed)
    tokens, _, end = finish(waiting)
    assert isinstance(end, End)
    release = service.router.resolve("guard").release_digest
    assert tuple(tokens) == world.answers[release, PROMPTS[1]].tokens
    assert engine(service).restarts == restarts + 1 and not alive(pid)


def test_an_engine_that_gets_no_step_done_is_killed_and_one_that_idles_is_not(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "STUCK", 2)
    restarts, pid = engine(service).restarts, engine(service).pid
    begun = submit(service, ask(service, "guard", PROMPTS[0], TOKENS))
    assert isinstance(finish(begun)[2], End)
    time.sleep(3.5 * engine_process.TICK_S)
    assert engine(service).pid == pid and engine(service).restarts == restarts
    begun = submit(service, ask(service, "guard", PROMPTS[0], LONG))
    begun.get(timeout=WAIT_S)
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # for SILENT it would still be well
    assert isinstance(finish(begun)[2], Failed)
    assert engine(service).restarts == restarts + 1


def test_an_engine_that_hangs_before_it_is_ready_is_killed_and_the_next_one_answers(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped while it still imports what it needs; what was asked of it is asked of the next."""
    with Service(world.store, world.home, Limits(active=2), threads=1, apart=True) as service:
        until(lambda: engine(service).pid is not None)
        pid = engine(service).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        events = submit(service, ask(service, "guard", PROMPTS[0], TOKENS))
        assert engine(service).state is State.STARTING
        monkeypatch.setattr(engine_process, "UNREADY", 2)
        until(lambda: engine(service).pid != pid)
        monkeypatch.setattr(engine_process, "UNREADY", WAIT_S)
        tokens, _, end = finish(events)
        assert isinstance(end, End) and engine(service).restarts == 1 and not alive(pid)
        release = service.router.resolve("guard").release_digest
        assert tuple(tokens) == world.answers[release, PROMPTS[0]].tokens


def test_a_cancelled_answer_frees_its_place_in_the_engine(service: Service) -> None:
    events: queue.Queue[Event] = queue.Queue()
    cancel = service.submit(ask(service, "guard", PROMPTS[0], LONG), events.put)
    events.get(timeout=WAIT_S)
    until(lambda: engine(service).counts().active == 1)
    cancel()
    until(lambda: engine(service).counts().active == 0)


def test_closing_lets_what_is_under_way_finish_within_the_grace_time(world: World) -> None:
    with Service(world.store, world.home, Limits(active=2), threads=1, apart=True) as service:
        events = submit(service, ask(service, "guard", PROMPTS[0], 300))
        events.get(timeout=WAIT_S)
        pid = engine(service).pid
        service.close(grace_s=WAIT_S)
        tokens, _, end = finish(events)
        assert isinstance(end, End) and len(tokens) == 299
        with pytest.raises(ServeError, match="shutting down"):
            service.worker.require_room()
        assert pid is not None and not alive(pid)


def test_an_engine_that_keeps_crashing_opens_the_circuit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "BACKOFF_S", (0.0,) * 5)
    engine = EngineProcess(Limits())
    engine.start()
    try:
        seen: set[int] = set()
        deadline = time.monotonic() + WAIT_S
        while engine.state is not State.FAILED:
            assert time.monotonic() < deadline
            if (pid := engine.pid) is not None and pid not in seen:
                seen.add(pid)
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        with pytest.raises(Unavailable) as refusal:
            engine.require_room()
        assert refusal.value.http_code == 503 and 1 <= refusal.value.retry_after_s <= 30
        assert not engine.alive and len(seen) == engine_process.CRASHES
    finally:
        engine.close(0.0)


def test_an_error_travels_as_its_class_and_its_words_and_an_unknown_one_as_a_failure() -> None:
    back = wire.to_error(wire.from_error(NotFound("no such thing", where="there", hint="look")))
    assert isinstance(back, NotFound) and str(back) == "there: no such thing\n  → look"
    assert isinstance(wire.to_error(["SystemExit", "odd", None, None]), EngineFailed)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
