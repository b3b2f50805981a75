from __future__ import annotations

import pytest

from tests.serving.make_home import World, make_home


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_home(tmp_path_factory.mktemp("world"))
