from __future__ import annotations

from luthier import audit
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
