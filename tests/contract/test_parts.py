"""Every part on every shelf keeps its family's promises: found by file name, self-describing, validated."""

from __future__ import annotations

import inspect

import pytest
from pydantic import ValidationError

from luthier import plugins

OFFERS = {
    "sources": ("fetch", "fingerprint"),
    "objectives": ("loss",),
    "methods": ("attach", "save", "load", "report"),
    "metrics": ("score", "templates"),
    "baselines": ("predict",),
    "gates": ("check",),
    "backends": ("engine",),
}
PARTS = [(family, name) for family in plugins.FAMILIES for name in plugins.names(family)]


@pytest.mark.parametrize(("family", "name"), PARTS)
def test_a_part_offers_what_its_family_promises(family: str, name: str) -> None:
    module = plugins.load(family, name)
    for verb in OFFERS[family]:
        assert inspect.isfunction(getattr(module, verb)), f"{family}/{name} lacks {verb}"
    assert issubclass(module.Params, plugins.Params)
    assert isinstance(getattr(module, "VERSION", 1), int)
    assert (module.__doc__ or "").count("\n") >= 2, "says what it is, its source, and what it does not know"


@pytest.mark.parametrize(("family", "name"), PARTS)
def test_a_parts_params_are_frozen_and_refuse_unknown_keys(family: str, name: str) -> None:
    params = plugins.load(family, name).Params
    assert params.model_config["frozen"] and params.model_config["extra"] == "forbid"
    with pytest.raises(ValidationError, match="Extra inputs"):
        params.model_validate({"no_such_setting": 1})


@pytest.mark.parametrize("family", plugins.FAMILIES)
def test_an_unknown_part_is_answered_with_the_nearest_name(family: str) -> None:
    known = plugins.names(family)[0]
    with pytest.raises(ValueError, match=f"did you mean '{known}'"):
        plugins.load(family, known + "x")


def test_a_recipe_cannot_name_a_module_that_is_not_a_part() -> None:
    for name in ("__init__", "_licence", "../artifacts", "os", "luthier.artifacts", ""):
        with pytest.raises(ValueError, match="unknown"):
            plugins.load("sources", name)


def test_every_family_on_disk_is_listed_and_documented() -> None:
    import luthier

    for family, parts in luthier.parts().items():
        assert parts, f"{family} is an empty shelf"
        assert all(parts.values()), f"a part of {family} does not say what it is"
