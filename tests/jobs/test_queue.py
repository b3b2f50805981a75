from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from luthier.jobs import ask, spec
from luthier.jobs.asked import Create, Refused
from luthier.jobs.queue import NoJob
from luthier.jobs.records import Claim, Job, Note
from tests import databases
from tests.jobs.place import TENANT, World, chats, make_world


@pytest.fixture(scope="module", params=databases.KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The queue alone, on each database."""
    folder = tmp_path_factory.mktemp("queue")
    with databases.fresh(request.param, folder) as place:
        made = make_world(folder, place)
        yield made
        made.store.close()


def queued(world: World, tenant: str = TENANT, **fields: object) -> Job:
    job = world.create(tenant, training_file=world.upload(chats(), tenant), **fields)
    world.queue.examined(job.id, {"rows": 10}, Note("validated"))
    return job


def claimed(job: Job, token: str = "a", host: str = "here", lease_s: float = 60.0) -> Claim:
    return Claim(job.id, token, host, lease_s)


def test_of_racing_workers_just_one_gets_a_job(world: World) -> None:
    job = queued(world)
    won: list[str] = []

    def race(name: str) -> None:
        if world.queue.claim(claimed(job, name, host=name)):
            won.append(name)

    racers = [threading.Thread(target=race, args=(f"host{n}",)) for n in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(won) == 1
    world.queue.cancel(None, job.id)


def test_a_lease_that_ran_out_is_another_workers_and_the_first_changes_nothing_any_more(world: World) -> None:
    job = queued(world)
    late, prompt = claimed(job, "late", "afar", lease_s=-1.0), claimed(job, "prompt")
    assert world.queue.claim(late)
    taken = world.queue.claim(prompt)
    assert taken is not None and (taken.deaths, taken.attempts) == (1, 2)
    assert not world.queue.renew(late, 0)
    assert not world.queue.note(late, Note("said too late"))
    assert not world.queue.fail(late, {"code": "x", "message": "x", "param": None})
    assert world.queue.renew(prompt, 0)
    assert "said too late" not in [event.message for event in world.events(job)]
    world.queue.cancel(None, job.id)


def test_events_have_no_holes_and_a_named_one_is_told_once(world: World) -> None:
    job = queued(world)
    claim = claimed(job)
    world.queue.claim(claim)
    for step in (1, 2, 1, 2, 3):
        world.queue.note(claim, Note(f"step {step}", f"step:{step}"))
    told = world.events(job)
    assert [event.number for event in told] == list(range(1, len(told) + 1))
    assert [event.message for event in told][-3:] == ["step 1", "step 2", "step 3"]
    world.queue.cancel(None, job.id)
    assert world.events(job)[-1].message == "The job has been cancelled"


def test_events_are_paged_from_both_ends(world: World) -> None:
    job = queued(world)
    whole = world.events(job)
    first, more = world.queue.events(job.id, None, 1, newest=True)
    assert more and first == whole[-1:]
    rest, more = world.queue.events(job.id, first[0].id, 100, newest=True)
    assert not more and rest == whole[-2::-1]
    with pytest.raises(Refused, match="no event"):
        world.queue.events(job.id, "ftevent-of-another", 1, newest=True)


def test_a_job_can_be_paused_resumed_and_cancelled_only_where_that_makes_sense(world: World) -> None:
    job = queued(world)
    claim = claimed(job)
    with pytest.raises(Refused, match="Cannot resume a job that is queued"):
        world.queue.resume(TENANT, job.id)
    world.queue.claim(claim)
    assert world.queue.pause(TENANT, job.id).status == "paused"
    assert not world.queue.renew(claim, 0)
    assert world.queue.resume(TENANT, job.id).status == "queued"
    assert world.queue.cancel(TENANT, job.id).finished_at
    for verb in (world.queue.pause, world.queue.resume, world.queue.cancel):
        with pytest.raises(Refused, match="cancelled"):
            verb(TENANT, job.id)


def test_tenants_do_not_see_each_others_jobs(world: World) -> None:
    job = queued(world, "one")
    for verb in (world.queue.get, world.queue.cancel, world.queue.pause, world.queue.resume):
        with pytest.raises(NoJob):
            verb("two", job.id)
    assert world.queue.page("two", None, 10) == ([], False)
    with pytest.raises(Refused):
        world.queue.page("two", job.id, 10)
    with pytest.raises(Refused, match="no such file"):
        world.create("two", training_file=job.training_file)
    world.queue.cancel("one", job.id)


def test_jobs_are_paged_newest_first_and_filtered_by_metadata(world: World) -> None:
    jobs = [queued(world, "pages", metadata={"n": str(n % 2)}) for n in range(5)]
    page, more = world.queue.page("pages", None, 2)
    assert more and [job.id for job in page] == [jobs[4].id, jobs[3].id]
    page, more = world.queue.page("pages", page[-1].id, 3)
    assert not more and [job.id for job in page] == [job.id for job in jobs[2::-1]]
    page, more = world.queue.page("pages", None, 10, {"n": "1"})
    assert not more and [job.id for job in page] == [jobs[3].id, jobs[1].id]
    for job in jobs:
        world.queue.cancel(None, job.id)


def test_a_job_without_a_seed_has_that_of_what_it_asks_for(world: World) -> None:
    file = world.upload(chats())
    a, b, c = (world.create(training_file=file, **more) for more in ({}, {}, {"seed": 7}))
    assert a.seed == b.seed != c.seed == 7
    assert a.model != b.model
    for job in (a, b, c):
        world.queue.cancel(None, job.id)


def test_a_job_object_is_what_the_official_client_reads(world: World) -> None:
    from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent

    job = world.create(
        training_file=world.upload(chats()),
        metadata={"a": "b"},
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
    )
    said = FineTuningJob.model_validate(ask.job_object(job), strict=True)
    assert said.status == "validating_files" and said.hyperparameters.n_epochs == "auto"
    assert said.integrations and said.integrations[0].wandb.project == "p"
    for event in world.events(job):
        FineTuningJobEvent.model_validate(ask.event_object(event), strict=True)
    assert any("mirrors no metrics" in event.message for event in world.events(job))
    world.queue.cancel(None, job.id)


def test_a_judge_may_be_named_as_the_base_that_is_tuned() -> None:
    judge = {"type": "score_model", "name": "x", "model": "tiny", "input": [{"role": "user", "content": "?"}]}
    both = {"type": "multi", "name": "b", "graders": {"x": judge}, "calculate_output": "x"}
    for grader in (judge, both):
        method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
        asked = Create.model_validate({"model": "tiny", "training_file": "file-1", "method": method})
        made = spec.objective(asked, {"compute_multiplier": 1.0})["grader"]
        assert (made.get("graders", {}).get("x") or made)["model"] == "base"


@pytest.mark.parametrize(
    ("grader", "param"),
    [
        ({"type": "python", "source": "def grade(): ..."}, "method.reinforcement.grader.type"),
        ({"type": "string_check", "name": "x", "operation": "almost"}, "method.reinforcement.grader"),
        (
            {
                "type": "score_model",
                "name": "x",
                "model": "gpt-4o",
                "input": [{"role": "user", "content": "?"}],
            },
            "method.reinforcement.grader.model",
        ),
    ],
)
def test_what_is_no_grader_here_is_refused_before_a_job_is_made(
    world: World, grader: dict[str, Any], param: str
) -> None:
    method = {"type": "reinforcement", "reinforcement": {"grader": grader}}
    with pytest.raises(Refused) as caught:
        world.create(training_file=world.upload(chats()), method=method)
    assert caught.value.code == "invalid_grader" and str(caught.value.param).startswith(param)
