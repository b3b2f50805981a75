"""One home for the tests of jobs that only read or add; those that kill make their own."""

from __future__ import annotations

import pytest

from tests.jobs.place import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("jobs"))
