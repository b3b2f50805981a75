"""What the metrics page tells beyond single requests: how many names it may come to know."""

from __future__ import annotations

from luthier.http.meter import LABELS, Meter
from luthier.serving.service import Service
from luthier.store import RequestRecord
from tests.serving.make_home import World


def test_a_flood_of_releases_and_tenants_does_not_fill_the_page(world: World) -> None:
    meter = Meter(Service(world.store, world.home))
    for n in range(3 * LABELS):
        record = RequestRecord("2026-11-25T00:00:00", f"{n:064d}"[::-1], "guard", 200, 3, 2)
        meter.note(record, f"tenant {n}")
    page = meter.page().decode()
    lines = [line for line in page.splitlines() if line.startswith("luthier_requests_total{")]
    assert len(lines) == LABELS + 1
    assert f'luthier_requests_total{{release="other",status="200"}} {2 * LABELS:.1f}' in page
    assert f'luthier_tenant_requests_total{{tenant="other"}} {2 * LABELS:.1f}' in page
    assert f'luthier_tenant_tokens_total{{kind="prompt",tenant="other"}} {6 * LABELS:.1f}' in page
