from __future__ import annotations

import pytest
from sqlalchemy import text

from luthier import audit
from luthier.errors import LuthierError
from luthier.jobs.records import Note
from luthier.jobs.verbs import Jobs
from tests.jobs.place import TENANT, World, chats


def test_what_the_command_line_does_to_a_job_is_told(world: World) -> None:
    job = world.create(training_file=world.upload(chats()))
    world.queue.examined(job.id, {"rows": 10}, Note("validated"))
    jobs = Jobs(world.home.path, "cli:ada")
    for verb in ("pause", "resume", "cancel"):
        jobs.move(job.id, verb)
    told = [entry for entry in audit.entries(world.store) if entry.target == job.id]
    assert [(entry.action, entry.actor, entry.tenant) for entry in told] == [
        (f"jobs {verb}", "cli:ada", TENANT) for verb in ("pause", "resume", "cancel")
    ]
    assert any(entry.action == "bases add" for entry in audit.entries(world.store))


def test_a_move_and_its_entry_in_the_audit_log_are_one_commit(world: World) -> None:
    job = world.create(training_file=world.upload(chats()))
    world.queue.examined(job.id, {"rows": 10}, Note("validated"))
    jobs, before = Jobs(world.home.path, "cli:ada"), audit.verify(world.store)["entries"]
    with world.store.writing() as connection:
        connection.execute(
            text("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no room'); END")
        )
    try:
        with pytest.raises(LuthierError, match="no room"):
            jobs.move(job.id, "pause")
    finally:
        with world.store.writing() as connection:
            connection.execute(text("DROP TRIGGER full"))
    assert world.queue.get(None, job.id).status == "queued"
    assert "The job has been paused" not in [event.message for event in world.events(job)]
    with pytest.raises(LuthierError, match="Cannot resume a job that is queued; it must be paused"):
        jobs.move(job.id, "resume")
    assert audit.verify(world.store)["entries"] == before  # what is not done is not told of
