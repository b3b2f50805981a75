"""What Prometheus sees: requests by release and status, latencies, tokens, and how full the server is.

Source: https://prometheus.io/docs/practices/naming. Each app has its own registry, so two servers in one
process do not share counts. Releases and tenants are the labels that grow: the first `LABELS` of each have
their own, the rest are "other". Reasons are the names of our errors.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from luthier.errors import LuthierError
from luthier.serving.engine_process import EngineProcess
from luthier.serving.service import Service
from luthier.serving.transcript import Transcript
from luthier.store import RequestRecord

LABELS = 50
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Meter:
    def __init__(self, service: Service, transcript: Transcript | None = None) -> None:
        self._registry = into = CollectorRegistry()
        mine = ["release"]
        self._requests = Counter("luthier_requests", "chat requests", [*mine, "status"], registry=into)
        self._tokens = Counter("luthier_tokens", "tokens read and written", [*mine, "kind"], registry=into)
        self._seconds = Histogram(
            "luthier_request_seconds", "time to the whole answer", mine, buckets=SECONDS, registry=into
        )
        self._first = Histogram(
            "luthier_first_token_seconds", "time to the first token", mine, buckets=SECONDS, registry=into
        )
        self._tenant_requests = Counter("luthier_tenant_requests", "requests", ["tenant"], registry=into)
        self._tenant_tokens = Counter(
            "luthier_tenant_tokens", "tokens read and written", ["tenant", "kind"], registry=into
        )
        self._refused = Counter("luthier_refused", "requests without an answer", ["reason"], registry=into)
        self._release, self._tenant = _Few(), _Few()
        worker, journal, engine, cache = (
            service.worker, service.journal, service.engine, service.traffic.cache
        )  # fmt: skip
        if isinstance(engine, EngineProcess):
            self._gauge("luthier_engine_restarts", "engines lost so far", lambda: engine.restarts)
        if cache is not None:
            self._gauge("luthier_cache_hits", "answers that were known", lambda: cache.hits)
            self._gauge("luthier_cache_misses", "answers that were not", lambda: cache.misses)
        self._gauge("luthier_in_flight", "answers growing now", lambda: worker.counts().active)
        self._gauge("luthier_queue", "requests waiting for a turn", lambda: worker.counts().waiting)
        self._gauge("luthier_blocks", "blocks of the cache", lambda: worker.counts().blocks)
        self._gauge("luthier_blocks_held", "blocks that answers hold", lambda: worker.counts().held_blocks)
        self._gauge("luthier_blocks_found", "blocks not read again", lambda: worker.counts().found_blocks)
        self._gauge("luthier_blocks_filled", "blocks computed", lambda: worker.counts().filled_blocks)
        self._gauge("luthier_request_log_dropped", "records the log missed", lambda: journal.dropped)
        if transcript is not None:
            self._gauge("luthier_prompt_log_lost", "requests that log missed", lambda: transcript.lost)

    def _gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        Gauge(name, meaning, registry=self._registry).set_function(read)

    def note(self, record: RequestRecord, tenant: str) -> None:
        release = self._release((record.release or "none")[:12])
        tenant = self._tenant(tenant)
        self._tenant_requests.labels(tenant).inc()
        self._tenant_tokens.labels(tenant, "prompt").inc(record.prompt_tokens)
        self._tenant_tokens.labels(tenant, "completion").inc(record.completion_tokens)
        if record.status >= 400:
            self._refused.labels(record.error or "unknown").inc()
        self._requests.labels(release, str(record.status)).inc()
        self._seconds.labels(release).observe(record.total_s)
        if record.first_token_s is not None:
            self._first.labels(release).observe(record.first_token_s)
        self._tokens.labels(release, "prompt").inc(record.prompt_tokens)
        self._tokens.labels(release, "completion").inc(record.completion_tokens)

    def turned_away(self, tenant: str, error: LuthierError) -> None:
        """A request that was refused before anything was known of it but whose it is."""
        self._tenant_requests.labels(self._tenant(tenant)).inc()
        self._refused.labels(type(error).__name__).inc()
        self._requests.labels("none", str(error.http_code)).inc()

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _Few:
    """The first labels are told by name, so that no flood of names fills the page."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if len(self._known) < LABELS:
            self._known.add(name)
        return name if name in self._known else "other"
