"""What a job would take, before anyone pays for it: tokens, minutes, memory and money, from its own plan.

The first three stages of the very recipe that the job would be, so the tokens are those of the bill, and the
job that follows finds these stages sealed. It runs in a process of its own when a server asks
(`python -m luthier.jobs.quote HOME TENANT`, the request on stdin, one JSON object on stdout): planning times
real micro-batches and sets threads. Quotes of one home are made one after the other.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

from luthier.errors import LuthierError, ServeError
from luthier.home import Home
from luthier.jobs import ask, examine, spec
from luthier.jobs.asked import Create, Refused, parse
from luthier.jobs.queue import Queue
from luthier.jobs.records import Job
from luthier.jobs.spec import Terms
from luthier.store import Store
from luthier.uploads import Uploads

LONGEST_S = 600
NAMES = ("tokens", "steps", "minutes", "peak_gb", "money", "energy_kwh")
SETTLED = ("rows", "validation_rows", "n_epochs", "batch_size", "learning_rate_multiplier")


def quote(asked: Create, tenant: str, place: tuple[Store, Uploads, Home], terms: Terms) -> dict[str, Any]:
    """The plan of the job that would be created; its files are read, and nothing is queued."""
    from luthier import pipeline
    from luthier.jobs.child import problem, rows

    store, uploads, home = place
    job = ask.drafted(asked, tenant, store, uploads)
    with home.lock("job-quote", lambda pid: None):
        try:
            settled = examine.settle(job, place)
            job = replace(job, settled=settled)
            made = spec.recipe(job, terms, rows(job))
            outcome = pipeline.run(made, pipeline.Place(home, store, home.path), until="plan")
        except examine.Wrong as wrong:
            raise Refused(wrong.message, param=wrong.param, code=wrong.code) from None
        except LuthierError as error:
            said = problem(job, error)
            raise Refused(said["message"], param=said["param"], code=said["code"]) from error
        finally:
            examine.forget(replace(job, status="cancelled"), Queue(store), home)
    facts = outcome.stage("plan").facts
    return quoted(job, settled, facts)


def quoted(job: Job, settled: dict[str, Any], facts: Any) -> dict[str, Any]:
    return {
        "object": "fine_tuning.quote",
        "model": job.base,
        "seed": job.seed,
        "trained_tokens": facts["tokens"],
        **{name: settled[name] for name in SETTLED},
        **{name: facts[name] for name in NAMES if name in facts and name != "tokens"},
    }


def elsewhere(body: bytes, tenant: str, home: Home) -> dict[str, Any]:
    """The same in a process of its own; what it refuses is refused here."""
    command = [sys.executable, "-m", "luthier.jobs.quote", str(home.path), tenant]
    try:
        done = subprocess.run(command, input=body, capture_output=True, timeout=LONGEST_S, check=False)
        said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        raise ServeError("no quote could be made", hint="the job itself may still be created") from error
    if "refused" in said:
        raise Refused(**said["refused"])
    return said


def main(words: list[str]) -> int:
    from luthier.jobs import verbs

    os.nice(10)
    home = Home.at(words[0])
    store = Store.open(home.database)
    try:
        asked = parse(sys.stdin.buffer.read())
        said = quote(asked, words[1], (store, Uploads(store, home), home), verbs.terms())
    except Refused as refusal:
        said = {
            "refused": {
                "what": refusal.what, "param": refusal.param, "code": refusal.code, "http": refusal.http_code,
            }
        }  # fmt: skip
    print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
