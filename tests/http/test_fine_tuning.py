"""Fine-tuning over HTTP: by the official client, unmodified; and what it is refused."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import openai
import pytest
from sqlalchemy import update

from luthier import audit, keys
from luthier.http.openai.fine_tuning import FOLLOWERS, SHARE
from luthier.jobs import examine
from luthier.schema.keys import KEYS
from tests.http.running import Client, threaded
from tests.jobs.place import World, chats, jsonl, make_world, wait


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("tuning"))


@pytest.fixture(scope="module")
def idle(here: World) -> Iterator[Client]:
    """A server without a worker: what is asked for stays as it is."""
    with threaded(here.store, here.home) as client:
        yield client


@pytest.fixture
def client(idle: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=idle.url + "/v1", api_key=idle.key, max_retries=0) as client:
        yield client


def uploaded(client: openai.OpenAI, count: int = 12, salt: str = "") -> str:
    file = ("train.jsonl", io.BytesIO(jsonl(chats(count, salt))))
    return client.files.create(file=file, purpose="fine-tune").id


def test_the_official_client_trains_and_follows_to_a_model(here: World) -> None:
    with threaded(here.store, here.home, workers=1) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0)
        jobs = client.fine_tuning.jobs
        job = jobs.create(
            model="tiny",
            training_file=uploaded(client),
            validation_file=uploaded(client, 4, "held out"),
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 6}},
            },
            suffix="http",
            seed=3,
        )
        assert job.status == "validating_files" and job.fine_tuned_model is None
        told = live(server, job.id)
        done = jobs.retrieve(job.id)
        assert done.status == "succeeded", done.error
        assert done.fine_tuned_model and done.fine_tuned_model.startswith("ft:tiny:local:http:")
        assert done.hyperparameters.n_epochs == 2 and done.trained_tokens
        paged = [event.id for event in jobs.list_events(job.id, limit=7)]
        assert paged == [event["id"] for event in reversed(told)]
        metrics = [event for event in told if event["type"] == "metrics" and "train_loss" in event["data"]]
        assert [event["data"]["step"] for event in metrics] == [1, 2, 3, 4]
        kept = list(jobs.checkpoints.list(job.id))
        assert [one.step_number for one in kept] == [4, 2]
        assert kept[0].metrics.train_loss == metrics[-1]["data"]["train_loss"]
        assert kept[0].metrics.valid_loss is not None
        answers = {model: said(client, model) for model in (done.fine_tuned_model, *names(kept))}
        assert all(answers.values())
        table = client.files.content(done.result_files[0]).text
        assert table.splitlines()[0] == (
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
        )
        client.close()


def names(kept: list[Any]) -> list[str]:
    return [one.fine_tuned_model_checkpoint for one in kept]


def said(client: openai.OpenAI, model: str) -> str:
    """An answer of the model's, as it comes."""
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "number 3"}], max_tokens=8, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def live(server: Client, job_id: str, **query: str) -> list[dict[str, Any]]:
    """Every event of the live stream, to its end."""
    path = f"/v1/fine_tuning/jobs/{job_id}/events"
    with server.open(240) as plain, plain.stream("GET", path, params={"stream": "true", **query}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        data = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def test_a_stream_begins_after_the_event_it_is_told_and_ends_when_the_job_does(
    client: openai.OpenAI, idle: Client
) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client))
    first = list(client.fine_tuning.jobs.list_events(job.id))[-1]
    heard: list[dict[str, Any]] = []
    stream = threading.Thread(target=lambda: heard.extend(live(idle, job.id, after=first.id)))
    stream.start()
    client.fine_tuning.jobs.cancel(job.id)
    stream.join(60)
    assert not stream.is_alive()
    assert [event["message"] for event in heard][-1] == "The job has been cancelled"
    assert first.id not in [event["id"] for event in heard]


def test_jobs_are_listed_in_pages_and_by_metadata(client: openai.OpenAI) -> None:
    file = uploaded(client)
    made = [
        client.fine_tuning.jobs.create(model="tiny", training_file=file, metadata={"page": str(n % 2)})
        for n in range(4)
    ]
    found = [job.id for job in client.fine_tuning.jobs.list(limit=2)]
    assert found[:4] == [job.id for job in reversed(made)]
    found = [job.id for job in client.fine_tuning.jobs.list(limit=10, metadata={"page": "1"})]
    assert found == [made[3].id, made[1].id]
    for job in made:
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_a_queued_job_is_paused_and_resumed(client: openai.OpenAI, here: World) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client))
    with pytest.raises(openai.BadRequestError, match="validating_files"):
        client.fine_tuning.jobs.pause(job.id)
    examine.examine(here.queue.get(None, job.id), here.queue, (here.store, here.uploads, here.home))
    assert str(client.fine_tuning.jobs.pause(job.id).status) == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    assert client.fine_tuning.jobs.cancel(job.id).finished_at
    assert not list(client.fine_tuning.jobs.checkpoints.list(job.id))


def test_what_is_not_there_or_not_the_callers_is_one_and_the_same(client: openai.OpenAI, here: World) -> None:
    theirs = here.create("others", training_file=here.upload(chats(), "others"))
    jobs = client.fine_tuning.jobs
    for name in (theirs.id, "ftjob-0", "..%2f..%2fetc"):
        for ask in (
            jobs.retrieve,
            jobs.cancel,
            jobs.pause,
            jobs.resume,
            jobs.checkpoints.list,
            jobs.list_events,
        ):
            with pytest.raises(openai.NotFoundError):
                ask(name)
    assert theirs.id not in [job.id for job in jobs.list()]
    with pytest.raises(openai.BadRequestError, match="no such file") as caught:
        jobs.create(model="tiny", training_file=theirs.training_file)
    assert (caught.value.param, caught.value.code) == ("training_file", "file_not_found")
    here.queue.cancel(None, theirs.id)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"model": "gpt-4o-mini"}, "model", "model_not_available"),
        ({"epochs": 1}, "epochs", "unknown_parameter"),
        ({"hyperparameters": {"n_epochs": 1000}}, "hyperparameters.n_epochs", "invalid_value"),
        ({"metadata": {"licence": "dunno"}}, "metadata.licence", "invalid_value"),
    ],
)
def test_a_refusal_names_its_field(client: openai.OpenAI, change: Any, param: str, code: str) -> None:
    asked = {"model": "tiny", "training_file": "file-0"} | change
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/fine_tuning/jobs", body=asked, cast_to=object)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"


def test_checkpoint_permissions_are_refused_by_their_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="checkpoint permissions are not supported"):
        client.fine_tuning.checkpoints.permissions.create("ft:x", project_ids=["p"])


def test_a_quote_over_http_is_that_of_the_plan(client: openai.OpenAI, here: World) -> None:
    asked = {
        "model": "tiny", "training_file": uploaded(client, 11, "quote"), "hyperparameters": {"n_epochs": 1},
    }  # fmt: skip
    queued = len(here.queue.page("local", None, 100)[0])
    said: Any = client.post("/fine_tuning/quotes", body=asked, cast_to=object)
    assert said["rows"] == 11 and said["steps"] == 11 and said["trained_tokens"] > 11
    assert said["object"] == "fine_tuning.quote" and len(here.queue.page("local", None, 100)[0]) == queued
    with pytest.raises(openai.BadRequestError, match="line 1: "):
        client.post(
            "/fine_tuning/quotes",
            body=asked
            | {
                "method": {"type": "reinforcement", "reinforcement": {"grader": CHECK}},
                "hyperparameters": None,
            },
            cast_to=object,
        )


CHECK = {
    "type": "string_check", "name": "same", "operation": "eq", "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
}  # fmt: skip


def opened(server: Client, secret: str, job_id: str, within: ExitStack) -> tuple[int, Iterator[str]]:
    """A live stream that stays open as long as the stack: its status and its lines."""
    http = within.enter_context(Client(server.url, secret).open())
    path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    answer = within.enter_context(http.stream("GET", path))
    return answer.status_code, answer.iter_lines()


def test_one_tenants_streams_leave_room_for_anothers_and_end_with_their_key(
    client: openai.OpenAI, idle: Client, here: World
) -> None:
    mine = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client)).id
    theirs = here.create("others", training_file=here.upload(chats(), "others")).id
    other = keys.create(here.store, "others", [keys.Scope.READ])[1]
    key, secret = keys.create(here.store, "local", [keys.Scope.READ])
    brief, short = keys.create(here.store, "local", [keys.Scope.READ], lives=timedelta(hours=1))
    with ExitStack() as open_ones:
        first, lines = opened(idle, secret, mine, open_ones)
        second, late = opened(idle, short, mine, open_ones)
        codes = [opened(idle, idle.key, mine, open_ones)[0] for _ in range(FOLLOWERS // SHARE)]
        assert [first, second, *codes] == [200] * (FOLLOWERS // SHARE) + [429] * 2
        assert opened(idle, other, theirs, open_ones)[0] == 200
        keys.revoke(here.store, key.id)
        with here.store.writing() as connection:  # the hour is over
            over = (
                update(KEYS)
                .where(KEYS.c.id == brief.id)
                .values(expires_at="2020-01-01T00:00:00.000000+00:00")
            )
            connection.execute(over)
        for heard, why in ((lines, "revoked"), (late, "expired")):
            told = list(heard)  # it ends, though the job has not
            assert "event: error" in told and "data: [DONE]" not in told
            error = json.loads(next(line[6:] for line in told if line.startswith('data: {"error"')))["error"]
            assert (error["code"], error["message"]) == ("invalid_api_key", f"this API key is {why}")

    def again() -> bool:
        with ExitStack() as one:
            return opened(idle, idle.key, mine, one)[0] == 200

    wait(again, 30)
    client.fine_tuning.jobs.cancel(mine)
    here.queue.cancel(None, theirs)


def test_one_tenants_quotes_leave_room_for_anothers(idle: Client, here: World) -> None:
    other = keys.create(here.store, "others", [keys.Scope.TRAIN])[1]
    ready = threading.Barrier(3)

    def quote(secret: str) -> int:
        with Client(idle.url, secret).open() as http:
            ready.wait()
            asked = {"model": "no such base", "training_file": "file-0"}
            return http.post("/v1/fine_tuning/quotes", json=asked).status_code

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(quote, (idle.key, idle.key, other)))
    assert sorted(found[:2]) == [400, 429] and found[2] == 400


def test_a_follower_that_leaves_is_forgotten(idle: Client, client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client))
    before = threading.active_count()
    path = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
    for _ in range(5):
        with idle.open() as plain, plain.stream("GET", path) as answer:
            next(answer.iter_lines())
    client.fine_tuning.jobs.cancel(job.id)
    wait(lambda: threading.active_count() <= before + 2, 30)


def test_what_a_request_does_to_a_job_stands_in_the_audit_log_once_and_what_it_cannot_do_does_not(
    client: openai.OpenAI, here: World
) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=uploaded(client, salt="audited"))
    examine.examine(here.queue.get(None, job.id), here.queue, (here.store, here.uploads, here.home))
    client.fine_tuning.jobs.pause(job.id)
    with pytest.raises(openai.BadRequestError, match="Cannot pause a job that is paused"):
        client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    told = [entry for entry in audit.entries(here.store) if job.id in entry.target]
    assert [(entry.action, entry.target, entry.actor) for entry in told] == [
        (f"POST /v1/fine_tuning/jobs/{{job}}/{verb}", f"/v1/fine_tuning/jobs/{job.id}/{verb}", keys.SERVED)
        for verb in ("pause", "resume", "cancel")
    ]
