"""Canaries, shadows and known answers, over real releases and a real engine."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator

import pytest

from luthier.errors import NotFound, StoreError
from luthier.serving import verbs
from luthier.serving.cache import key_of
from luthier.serving.desk import Turn
from luthier.serving.limits import Limits
from luthier.serving.service import Options, Service
from luthier.serving.shadow import similarity
from luthier.serving.splits import Action, Kind, Splits
from luthier.serving.traffic import Route
from luthier.serving.worker import Ask, End, Event, Reason, Said
from luthier.store import RequestRecord
from tests.serving.make_home import NAME, PROMPTS, TOKENS, World, asked, copy_home

WAIT_S = 30


@pytest.fixture(scope="module")
def mine(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return copy_home(world, tmp_path_factory.mktemp("traffic") / "home")


@pytest.fixture(scope="module")
def service(mine: World) -> Iterator[Service]:
    with Service(mine.store, mine.home, Limits(active=4, cached=8)) as service:
        yield service


@pytest.fixture(autouse=True)
def unsplit(mine: World) -> Iterator[None]:
    yield
    for kind in Kind:
        last = Splits(mine.store).last(NAME, kind)
        if last is not None and last.in_force:
            verbs.end(mine.store, NAME, kind, Action.STOP, "test")
    if mine.store.resolve(NAME, "production") != mine.releases[0]:
        mine.promote(mine.releases[0])


def route(service: Service, who: str, model: str = NAME) -> Route:
    return service.traffic.route(model, service.router.resolve(model), who)


def answer(service: Service, found: Route, prompt: str, tenant: str = "local", **more: object) -> list[int]:
    events: queue.Queue[Event] = queue.Queue()
    options = Options(max_tokens=TOKENS, **more)  # type: ignore[arg-type]

    def prepare(target: object) -> Ask:
        return service.prepare(target, asked(prompt), options)  # type: ignore[arg-type]

    service.traffic.start(found, prepare(found.target), events.put, Turn(tenant), prepare)
    tokens: list[int] = []
    while not isinstance(event := events.get(timeout=WAIT_S), End):
        assert isinstance(event, Said), event
        tokens.append(event.token)
    return tokens


def ended(release: str, status: int = 200, slow: float = 1.0) -> RequestRecord:
    return RequestRecord(
        "2026-11-25T00:00:00", release, NAME, status, completion_tokens=11, first_token_s=0.1 * slow,
        total_s=0.3 * slow,
    )  # fmt: skip


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_canary_answers_its_share_of_users_and_each_user_stays_on_one_side(
    mine: World, service: Service
) -> None:
    champion, challenger = mine.releases[:2]
    verbs.begin(mine.store, NAME, Kind.CANARY, challenger, 25, "test")
    users = [f"user {n}" for n in range(400)]
    met = {user: route(service, user).target.release_digest for user in users}
    share = sum(digest == challenger for digest in met.values()) / len(users)
    assert set(met.values()) == {champion, challenger} and 0.15 < share < 0.35
    for user in users[:50]:
        assert route(service, user).target.release_digest == met[user]
    exact = route(service, users[0], f"{NAME}@{champion}")
    assert exact.target.release_digest == champion and exact.ticket is None
    for user in users[:8]:
        found = route(service, user)
        reference = mine.answers[found.target.release_digest, PROMPTS[0]]
        assert tuple(answer(service, found, PROMPTS[0])) == reference.tokens


def test_a_canary_that_fails_is_aborted_by_a_row_with_its_figures(mine: World, service: Service) -> None:
    champion, challenger = mine.releases[:2]
    verbs.begin(mine.store, NAME, Kind.CANARY, challenger, 50, "test")
    for n in range(200):
        found = route(service, f"user {n}")
        if found.ticket is None:
            break
        digest = found.target.release_digest
        found.ended(ended(digest, status=500 if digest == challenger else 200))
    until(lambda: verbs.look(mine.store, NAME, Kind.CANARY)["state"] == "aborted")
    told = verbs.look(mine.store, NAME, Kind.CANARY)
    assert told["figures"]["answers"]["canary"] <= 40 and "fails" in told["reason"]
    assert {route(service, f"user {n}").target.release_digest for n in range(50)} == {champion}
    until(lambda: any(event.kind == "canary_aborted" for event in mine.store.events()))


def test_a_canary_that_is_slow_is_aborted_and_one_as_good_is_not(mine: World, service: Service) -> None:
    challenger = mine.releases[1]
    for slow, state in ((3.0, "aborted"), (1.0, "in force")):
        verbs.begin(mine.store, NAME, Kind.CANARY, challenger, 50, "test")
        for n in range(300):
            found = route(service, f"user {n}")
            digest = found.target.release_digest
            found.ended(ended(digest, slow=slow if digest == challenger else 1.0))
        until(lambda state=state: verbs.look(mine.store, NAME, Kind.CANARY)["state"] == state)  # type: ignore[misc]


def test_finishing_a_canary_promotes_it_and_a_production_that_moved_makes_it_void(
    mine: World, service: Service
) -> None:
    champion, challenger, third = mine.releases
    verbs.begin(mine.store, NAME, Kind.CANARY, challenger, 50, "test")
    with pytest.raises(StoreError, match="has a canary already"):
        verbs.begin(mine.store, NAME, Kind.CANARY, third, 50, "test")
    verbs.end(mine.store, NAME, Kind.CANARY, Action.FINISH, "test")
    assert mine.store.resolve(NAME, "production") == challenger
    with pytest.raises(NotFound):
        verbs.end(mine.store, NAME, Kind.CANARY, Action.STOP, "test")
    verbs.begin(mine.store, NAME, Kind.CANARY, third, 100, "test")
    mine.promote(champion)
    assert verbs.look(mine.store, NAME, Kind.CANARY)["state"].startswith("void")
    assert route(service, "anyone").target.release_digest == champion
    with pytest.raises(StoreError):
        verbs.end(mine.store, NAME, Kind.CANARY, Action.FINISH, "test")
    assert mine.store.resolve(NAME, "production") == champion


def test_a_shadow_answers_unseen_and_leaves_how_alike_it_was(mine: World, service: Service) -> None:
    champion, challenger = mine.releases[:2]
    told = verbs.begin(mine.store, NAME, Kind.SHADOW, challenger, 100, "test")
    assert told["figures"]["answers"] == 0
    for prompt in PROMPTS:
        found = route(service, "someone")
        assert found.target.release_digest == champion
        tokens = answer(service, found, prompt, tenant="shadowed")
        assert tuple(tokens) == mine.answers[champion, prompt].tokens
    until(lambda: verbs.look(mine.store, NAME, Kind.SHADOW)["figures"]["answers"] == len(PROMPTS))
    figures = verbs.look(mine.store, NAME, Kind.SHADOW)["figures"]
    pairs = [(mine.answers[champion, p].tokens, mine.answers[challenger, p].tokens) for p in PROMPTS]
    assert figures["same"] == sum(a == b for a, b in pairs) and figures["errors"] == 0
    assert figures["similarity"] == pytest.approx(sum(similarity(a, b) for a, b in pairs) / len(pairs))


def test_similarity_is_one_minus_the_edits_over_the_longer_length() -> None:
    assert similarity((1, 2, 3), (1, 2, 3)) == 1.0
    assert similarity((), ()) == 1.0
    assert similarity((1, 2), (3, 4)) == 0.0
    assert similarity((1, 2, 3, 4), (1, 3, 4)) == 0.75


def test_a_known_answer_is_given_again_to_its_own_tenant_for_its_own_release_only(
    mine: World, service: Service
) -> None:
    def known(tenant: str, **more: object) -> bool | None:
        found = route(service, "x")
        tokens = answer(service, found, PROMPTS[1], tenant, **more)
        digest = found.target.release_digest
        if not more:
            assert tuple(tokens) == mine.answers[digest, PROMPTS[1]].tokens
        return found.known

    assert known("a") is False and known("a") is True
    assert known("b") is False
    assert known("a", temperature=1.0) is None
    assert known("a", temperature=1.0, seed=7) is False and known("a", temperature=1.0, seed=7) is True
    assert known("a", temperature=1.0, seed=8) is False
    mine.promote(mine.releases[1])
    assert known("a") is False and known("a") is True
    mine.promote(mine.releases[0])
    assert known("a") is True


def test_the_cache_makes_room_by_dropping_what_was_unused_longest(service: Service) -> None:
    cache = service.traffic.cache
    assert cache is not None
    for n in range(12):
        answer(service, route(service, "x"), f"prompt {n}", "filler")
    assert len(cache) == 8 and cache.held_bytes > 0


def test_the_key_of_an_answer_holds_everything_it_depends_on(mine: World, service: Service) -> None:
    target = service.router.resolve(NAME)
    keys = set()
    for options in (
        Options(), Options(max_tokens=3), Options(top_p=0.5), Options(seed=1), Options(stops=("a",)),
        Options(logprobs=1), Options(top_k=2), Options(presence_penalty=1.0), Options(logit_bias=((1, 2.0),)),
    ):  # fmt: skip
        keys.add(key_of(service.prepare(target, asked("hi"), options), "a"))
    other = service.router.resolve(f"{NAME}@{mine.releases[1]}")
    keys.add(key_of(service.prepare(other, asked("hi"), Options()), "a"))
    keys.add(key_of(service.prepare(target, asked("hi"), Options()), "b"))
    assert len(keys) == 11 and None not in keys


def test_an_answer_is_known_before_its_end_is_told(mine: World, service: Service) -> None:
    cache = service.traffic.cache
    assert cache is not None
    known: list[bool] = []
    hear = cache.tee("a key", lambda event: known.append(cache.get("a key") is not None))
    hear(Said(1, "one"))
    hear(End(Reason.STOP, ""))
    assert known == [False, True]
