from __future__ import annotations

import json
from typing import Any

import pytest

from luthier.jobs import spec
from luthier.jobs.asked import Refused, parse


def asked(**fields: Any) -> Any:
    return parse(json.dumps({"model": "tiny", "training_file": "file-1", **fields}).encode())


BAD_BETA = {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"epochs": 3}, "epochs", "unknown_parameter"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"hyperparameters": {"warmup": 1}}, "hyperparameters.warmup", "unknown_parameter"),
        ({"method": {"type": "magic"}}, "method.type", "invalid_value"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "invalid_value"),
        ({"method": {"type": "reinforcement"}}, "method", "invalid_value"),
        (BAD_BETA, "method.dpo.hyperparameters.beta", "invalid_value"),
        ({"suffix": "a:b"}, "suffix", "invalid_value"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "invalid_value"),
        ({"metadata": {str(n): "v" for n in range(17)}}, "metadata", "invalid_value"),
        ({"integrations": [{"type": "mlflow"}]}, "integrations.type", "invalid_value"),
        ({"training_file": None}, "training_file", "invalid_value"),
    ],
)  # fmt: skip
def test_what_cannot_be_taken_is_refused_by_its_name(fields: Any, param: str, code: str) -> None:
    with pytest.raises(Refused) as caught:
        asked(**fields)
    assert (caught.value.param, caught.value.code, caught.value.http_code) == (param, code, 400)


def test_a_refusal_tells_every_form_that_would_have_been_taken() -> None:
    with pytest.raises(Refused, match="'auto' or greater than or equal to 1"):
        asked(hyperparameters={"n_epochs": 0})
    with pytest.raises(Refused, match="only letters, digits"):
        asked(suffix="my nice model")


def test_a_missing_field_and_a_body_that_is_no_json_are_named() -> None:
    with pytest.raises(Refused, match="Missing required parameter: 'model'"):
        parse(b'{"training_file": "file-1"}')
    for body in (b"", b"[]", b"{", b"[" * 100_000):
        with pytest.raises(Refused):
            parse(body)


def test_both_forms_of_hyperparameters_mean_the_same() -> None:
    old = asked(hyperparameters={"n_epochs": 2})
    new = asked(method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}})
    assert old.how == new.how
    with pytest.raises(Refused, match="different things"):
        asked(hyperparameters={"n_epochs": 3}, method=new.method.model_dump(exclude_none=True))


@pytest.mark.parametrize(
    ("rows", "epochs", "batch"), [(10, 10, 1), (20, 5, 1), (100, 3, 6), (9000, 2, 16), (60000, 1, 16)]
)
def test_auto_is_settled_from_the_number_of_rows(rows: int, epochs: int, batch: int) -> None:
    found = spec.settled(asked(), rows, 0)
    assert (found["n_epochs"], found["batch_size"], found["learning_rate_multiplier"]) == (epochs, batch, 1.0)


def test_what_is_given_is_not_changed() -> None:
    given = {"n_epochs": 7, "batch_size": 3, "learning_rate_multiplier": 0.5}
    found = spec.settled(asked(hyperparameters=given), 1000, 0)
    assert given.items() <= found.items()


def test_every_field_of_the_official_request_is_known_here() -> None:
    from openai.types.fine_tuning import job_create_params as official

    from luthier.jobs import asked as ours

    pairs = [
        (official.JobCreateParams, ours.Create),
        (official.Hyperparameters, ours.Hyperparameters),
        (official.Method, ours.Method),
        (official.Integration, ours.Integration),
        (official.IntegrationWandb, ours.Wandb),
        (official.DpoMethodParam, ours.Dpo),
        (official.SupervisedMethodParam, ours.Supervised),
        (official.ReinforcementMethodParam, ours.Reinforcement),
    ]
    for theirs, mine in pairs:
        assert set(theirs.__annotations__) == set(mine.model_fields), theirs
