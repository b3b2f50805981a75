from __future__ import annotations

import csv
import io
import math
import socket
from pathlib import Path
from typing import Any

import pytest

from luthier import rows, tuned
from luthier.errors import DataError
from luthier.jobs import ask, examine
from luthier.jobs.records import Claim, Note
from luthier.jobs.verbs import OWNER, Jobs
from luthier.training_file import Kind
from tests.e2e.world import luthier
from tests.jobs.place import TENANT, World, chats, jsonl, wait, working

pytestmark = pytest.mark.timeout(900)


def test_a_job_goes_from_files_to_a_model_and_tells_every_step_once(world: World) -> None:
    job = world.create(
        training_file=world.upload(chats(12)),
        validation_file=world.upload(chats(4, "held out")),
        hyperparameters={"n_epochs": 2, "batch_size": 4},
        suffix="parity",
        seed=5,
    )
    assert job.status == "validating_files"
    with working(world):
        done = world.until(job)
    assert done.status == "succeeded", (done.error, [e.message for e in world.events(job)])
    said = ask.job_object(done)
    assert said["fine_tuned_model"].startswith(f"ft:tiny:{TENANT}:parity:")
    assert said["hyperparameters"] == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    told = world.events(job)
    assert [event.number for event in told] == list(range(1, len(told) + 1))
    steps = [event.data["step"] for event in told if "train_loss" in event.data]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert done.planned is not None and done.trained_tokens == done.planned["tokens"]
    model = tuned.find(world.store, done.model, TENANT)
    assert world.store.release(job.id, model.release).facts["tenant"] == TENANT
    table = world.uploads.get(TENANT, said["result_files"][0])
    with world.uploads.open(table) as stream:
        table_rows = list(csv.DictReader(io.TextIOWrapper(stream, "utf-8")))
    assert [int(row["step"]) for row in table_rows if row["train_loss"]] == steps


def test_a_bad_line_fails_the_job_by_its_number(world: World) -> None:
    lines = jsonl(chats(11)).splitlines(keepends=True)
    bad = [
        (lines[0] + b"\n" + b'{"messages": []}\n', "line 3: "),
        (lines[0] + b'{"messages": [{"role": "user", "content": "x"}]}\n', "line 2: "),
        (lines[0], "Training file has 1 example(s), but must have at least 10"),
    ]  # fmt: skip
    jobs = [(world.create(training_file=world.upload(data)), words) for data, words in bad]
    with working(world):
        for job, words in jobs:
            done = world.until(job)
            assert done.status == "failed" and done.error is not None
            assert words in done.error["message"]
            assert done.error["param"] == "training_file"
            assert done.error["code"] in ("invalid_training_file", "invalid_n_examples")
            assert str(world.home.path) not in str(done.error)


def test_what_only_the_tokenizer_sees_is_told_by_its_line_too(world: World) -> None:
    rows = chats(12)
    rows[6]["messages"][0]["content"] = "long " * 1000
    job = world.create(training_file=world.upload(rows))
    with working(world):
        done = world.until(job)
    assert done.error is not None and done.error["message"].startswith("line 7: this row has 50")
    assert (done.error["code"], done.error["param"]) == ("invalid_training_file", "training_file")


def test_a_job_that_can_never_fit_fails_with_the_plans_own_advice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_JOB_MEMORY_GB", "0.01")
    job = world.create(training_file=world.upload(chats(12, "never fits")))
    with working(world):
        done = world.until(job)
    assert done.error is not None and done.error["code"] == "does_not_fit"
    assert "plan.memory_gb:" in done.error["message"]


def test_a_quote_is_what_the_bill_says(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_PRICE_PER_HOUR", "3.5")
    fields = {
        "model": "tiny", "training_file": world.upload(chats(13, "quoted"), OWNER),
        "hyperparameters": {"n_epochs": 3, "batch_size": 4},
    }  # fmt: skip
    jobs = Jobs(world.home.path)
    quoted = jobs.quote(fields)
    assert quoted["money"] > 0 and quoted["minutes"] > 0 and quoted["rows"] == 13
    made = jobs.create(fields)
    assert made["seed"] == quoted["seed"]
    with working(world):
        done = world.until(world.queue.get(None, made["id"]))
    assert done.trained_tokens == quoted["trained_tokens"]
    assert done.planned is not None and done.planned["money"] == quoted["money"]
    assert not list((world.home.path / "jobs" / "rows").iterdir())


def with_name(name: str) -> dict[str, Any]:
    turns = chats(1)[0]["messages"]
    return {"messages": [turns[0] | {"name": name}, turns[1]]}


def twice() -> list[dict[str, str]]:
    """Two turns of the assistant's, one after the other."""
    turns: list[dict[str, str]] = chats(1)[0]["messages"]
    return [*turns, turns[1]]


def test_a_reinforcement_job_is_graded_from_file_to_model(world: World) -> None:
    grader = {
        "type": "string_check", "name": "vowel", "operation": "ilike", "input": "{{ sample.output_text }}",
        "reference": "{{ item.wanted }}",
    }  # fmt: skip
    rows = [{"messages": chats(12)[n]["messages"][:1], "wanted": "a"} for n in range(12)]
    method = {
        "type": "reinforcement",
        "reinforcement": {
            "grader": grader,
            "hyperparameters": {"n_epochs": 1, "batch_size": 6, "compute_multiplier": 0.25},
        },
    }
    job = world.create(training_file=world.upload(rows), method=method)
    fieldless = {"messages": rows[0]["messages"], "other": 1}
    blind = world.create(training_file=world.upload([*rows, fieldless]), method=method)
    with working(world):
        done, refused = world.until(job), world.until(blind)
    assert done.status == "succeeded", done.error
    assert any("train_mean_reward" in event.data for event in world.events(job))
    assert refused.error is not None and "line 13" in refused.error["message"]


def test_a_job_waits_until_the_memory_promised_to_others_is_free(world: World) -> None:
    big = world.create(training_file=world.upload(chats(10, "big")))
    world.queue.examined(big.id, {"rows": 10}, Note("validated"))
    held = Claim(big.id, "held", socket.gethostname(), 600.0)
    with world.home.lock(f"job-{big.id}", lambda pid: None):  # a living process has it
        assert world.queue.claim(held) and world.queue.note(held, None, peak_bytes=10**15)
        job = world.create(training_file=world.upload(chats(10, "small")), hyperparameters={"n_epochs": 1})
        with working(world):
            wait(lambda: any("Waiting for memory" in event.message for event in world.events(job)))
            assert not any("train_loss" in event.data for event in world.events(job))
            world.queue.cancel(None, big.id)
            assert world.until(job).status == "succeeded"


def test_jobs_are_asked_for_and_stopped_on_the_command_line_without_a_server(
    world: World, tmp_path: Path
) -> None:
    home = world.home.path
    (tmp_path / "rows.jsonl").write_bytes(jsonl(chats(10, "typed")))
    settings = ("--set", "hyperparameters.n_epochs=2", "--set", "suffix=typed", "--set", "metadata.a=b")
    made = luthier(home, "jobs", "create", "tiny", str(tmp_path / "rows.jsonl"), *settings, "--json")
    assert made["hyperparameters"]["n_epochs"] == 2 and made["metadata"] == {"a": "b"}
    assert made["id"] in luthier(home, "jobs", "list")
    assert luthier(home, "jobs", "cancel", made["id"], "--json")["status"] == "cancelled"
    assert "The job has been cancelled" in luthier(home, "jobs", "follow", made["id"])
    assert "cancelled" in luthier(home, "jobs", "show", made["id"])
    luthier(home, "jobs", "pause", made["id"], code=3)
    luthier(home, "jobs", "show", "ftjob-none", code=9)
    luthier(home, "jobs", "create", "tiny", str(tmp_path / "none.jsonl"), code=3)


def test_tools_weights_and_developers_are_carried_into_rows() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    record = {
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}],
            },
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "not learnt", "weight": 0},
            {"role": "user", "content": "call it"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "parallel_tool_calls": False,
    }
    row = examine.as_row(record, Kind.CHAT, "line 1")
    assert row["messages"][0] == {"role": "system", "content": "be short"}
    assert row["messages"][2]["weight"] == 0 and row["messages"][-1]["tool_calls"] == [call]
    assert row["tools"] == record["tools"]
    assert rows.chat(row["messages"], "again", row["tools"]).messages[-1].calls
    with pytest.raises(DataError, match="`functions` is not supported"):
        examine.as_row(record | {"functions": [{"name": "f"}]}, Kind.CHAT, "line 1")


def test_turns_out_of_order_are_refused_with_their_line() -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]
    with pytest.raises(DataError, match="message 2 is 'user', expected 'assistant'") as caught:
        examine.as_row({"messages": turns}, Kind.CHAT, "line 7")
    assert caught.value.where == "line 7"


def test_preferences_become_pairs() -> None:
    record = {
        "input": {"messages": [{"role": "user", "content": "hi"}]},
        "preferred_output": [{"role": "assistant", "content": "hello"}],
        "non_preferred_output": [{"role": "assistant", "content": "go away"}],
    }
    row = examine.as_row(record, Kind.PREFERENCE, "line 1")
    assert row == {
        "prompt": record["input"]["messages"],  # type: ignore[index]
        "chosen": record["preferred_output"],
        "rejected": record["non_preferred_output"],
    }


def test_a_preference_job_goes_from_pairs_to_a_model(world: World) -> None:
    pairs = [
        {
            "input": {"messages": chats(12)[n]["messages"][:1]},
            "preferred_output": [{"role": "assistant", "content": "short"}],
            "non_preferred_output": [{"role": "assistant", "content": "a long and winding answer"}],
        }
        for n in range(12)
    ]
    settings = {"n_epochs": 2, "batch_size": 4, "beta": 0.2, "learning_rate_multiplier": 20}
    method = {"type": "dpo", "dpo": {"hyperparameters": settings}}
    job = world.create(training_file=world.upload(pairs), method=method, suffix="dpo", seed=2)
    with working(world):
        done = world.until(job)
    assert done.status == "succeeded", done.error
    said = ask.job_object(done)
    assert said["method"] == {"type": "dpo", "dpo": {"hyperparameters": settings}}
    losses = [event.data["train_loss"] for event in world.events(job) if "train_loss" in event.data]
    assert len(losses) == 6 and abs(losses[0] - math.log(2)) < 1e-3 and losses[-1] < losses[0]
    recipe = done.recipe or {}
    assert recipe["train"][0]["objective"]["name"] == "dpo"
    assert recipe["train"][0]["objective"]["beta"] == 0.2
