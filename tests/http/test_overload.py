"""Far more than a server takes on: who is let in is answered right, who is not is told when to come back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from luthier.serving.limits import Limits
from tests.http.running import threaded
from tests.http.test_chat import gauge, until
from tests.serving.make_home import PROMPTS, TOKENS, World, copy_home

BENCH = Path(__file__).parents[2] / "bench"


def test_ten_times_too_much_is_answered_right_or_refused_with_a_time_to_come_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import overload

    own = copy_home(world, tmp_path / "home")
    with threaded(own.store, own.home, limits=Limits(active=2, waiting=2)) as client:
        job = {"url": client.url, "key": client.key, "model": "guard", "more": {}}
        prompts = [PROMPTS[n % len(PROMPTS)] for n in range(80)]

        async def all_at_once() -> list[dict[str, object]]:
            return await asyncio.gather(*(overload.ask(job, prompt, TOKENS) for prompt in prompts))

        found = asyncio.run(all_at_once())
        until(lambda: gauge(client, "luthier_in_flight") + gauge(client, "luthier_queue") == 0)
        assert gauge(client, "luthier_blocks_held") == 0
        summary = overload.summary([{**one, "late_s": 0.0} for one in found])
    assert summary["statuses"].keys() == {"200", "429"} and summary["refused_without_retry_after"] == 0
    for prompt, one in zip(prompts, found, strict=True):
        if one["status"] == 200:
            assert one["ended"] and one["text"] == own.answers[own.releases[0], prompt].text
        else:
            assert isinstance(one["retry_after"], str) and int(one["retry_after"]) >= 1
    logged = [record.status for record in own.store.requests()]
    assert sorted(logged) == sorted(one["status"] for one in found)
