"""Places: a share for each tenant, a line that is short, and no place is lost."""

from __future__ import annotations

import asyncio

import pytest

from luthier.http.places import Line, Places, TooMany


def test_a_tenant_has_its_share_and_no_more() -> None:
    places = Places(4, 2, "full")
    free, *_ = [places.take(tenant) for tenant in ("a", "a", "b")]
    with pytest.raises(TooMany):
        places.take("a")
    places.take("b")
    with pytest.raises(TooMany):
        places.take("c")
    free()
    free()  # a place is given back once
    places.take("c")
    with pytest.raises(TooMany):
        places.take("a")


def test_a_free_place_goes_to_who_has_fewest_and_a_line_is_no_longer_than_it_may_be() -> None:
    order: list[str] = []

    async def visit(places: Places, name: str, done: asyncio.Event) -> None:
        async with places.one(name[0]):
            order.append(name)
            await done.wait()

    async def all_of_them() -> None:
        places, done = Places(2, 2, "full", Line(2, 30.0)), asyncio.Event()
        first = asyncio.Event()
        tasks = [
            asyncio.create_task(visit(places, "a1", first)),
            asyncio.create_task(visit(places, "a2", done)),
        ]
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(visit(places, name, done)) for name in ("a3", "a4", "b1")]
        await asyncio.sleep(0)
        with pytest.raises(TooMany):
            await visit(places, "a5", done)
        first.set()
        await tasks[0]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == ["a1", "a2", "b1"]
        done.set()
        await asyncio.gather(*tasks)
        assert order[3:] == ["a3", "a4"]

    asyncio.run(all_of_them())


def test_who_leaves_the_line_or_waits_too_long_holds_no_place() -> None:
    async def leave() -> None:
        places = Places(1, 1, "full", Line(4, 0.01))
        places.take("a")
        with pytest.raises(TooMany):
            async with places.one("b"):
                pass
        places = Places(1, 1, "full", Line(4, 30.0))
        free = places.take("a")

        async def visit() -> None:
            async with places.one("b"):
                pass

        waiting, given = asyncio.create_task(visit()), asyncio.create_task(visit())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        free()
        given.cancel()  # at the very moment when it was given the place
        with pytest.raises(asyncio.CancelledError):
            await given
        places.take("c")

    asyncio.run(leave())
