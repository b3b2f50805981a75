"""Whose job is next, and how many one tenant may have.

The tenant with the fewest jobs running goes first; of those alike, the one that has gone longest without
any; of one tenant, the oldest job. So a tenant that queues many gets what nobody else wants: max-min fairness
(Bertsekas and Gallager, Data Networks, 6.5) over places. A job that runs is never taken off for another's.
It does not know the queue's tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from luthier.errors import ServeError
from luthier.jobs.records import Job

UNFINISHED = 32  # jobs of one tenant that have not ended; the next is refused


class TooManyJobs(ServeError):
    """The tenant has as many unfinished jobs as it may."""

    http_code = 429
    code = "rate_limit_exceeded"
    param = None

    def __init__(self, most: int) -> None:
        super().__init__(
            f"{most} fine-tuning jobs are unfinished already, and no more are taken",
            hint="wait until one has ended, or cancel one",
        )


def fair(free: Sequence[Job], running: Mapping[str, set[str]], served: Mapping[str, int]) -> list[Job]:
    """`free`, oldest first, in the order of turns. `running`: ids by tenant; `served`: when each last was."""
    waiting: dict[str, list[Job]] = {}
    for job in free:
        waiting.setdefault(job.tenant, []).append(job)
    has = {tenant: set(running.get(tenant, ())) for tenant in waiting}
    order = []
    while waiting:
        tenant = min(waiting, key=lambda one: (len(has[one]), served.get(one, 0)))
        job = waiting[tenant].pop(0)
        order.append(job)
        has[tenant].add(job.id)
        if not waiting[tenant]:
            del waiting[tenant]
    return order
