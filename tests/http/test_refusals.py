"""What of a flood is written, that the rest is told by its number, and that no key is written anywhere."""

from __future__ import annotations

import httpx

from luthier import audit, keys
from luthier.http.refusals import ALL, EACH, Refusals
from luthier.keys import Scope
from tests.http.running import threaded
from tests.serving.make_home import World


def test_one_callers_flood_hides_nobody_elses_refusal() -> None:
    refusals = Refusals()
    flood = sum(refusals.may_write("10.0.0.1", a_key=False, now_s=1.0) for _ in range(1000))
    assert flood == EACH
    assert refusals.may_write("10.0.0.2", a_key=False, now_s=2.0)
    crowd = sum(refusals.may_write(f"10.1.{n}.1", a_key=False, now_s=3.0) for n in range(5000))
    assert crowd == ALL - EACH - 1
    assert refusals.may_write("key-1", a_key=True, now_s=4.0)
    silence = refusals.silence()
    assert silence is not None and silence.more == 1000 - EACH + 5000 - crowd
    assert silence.by["10.0.0.1"] == 1000 - EACH and refusals.silence() is None
    assert refusals.may_write("10.0.0.1", a_key=False, now_s=62.0)


def test_what_looks_like_a_key_is_hidden_and_words_are_not() -> None:
    secret = keys.new_secret()
    served = keys.fingerprint(b"hunter22!")
    for text in (f"/v1/{secret}", f"/v1/files?key={secret}&a=b", secret.replace("lt-", "lt%2d")):
        assert secret[3:] not in keys.hidden(text)
    assert "hunter22!" not in keys.hidden("/v1/hunter22!/x", served)
    assert "sk-proj" not in keys.hidden("/v1/sk-proj-abcdefghijklmnopqrstuvwxyz").replace("sk-…", "")
    for text in ("/v1/files/file-abc", "/v1/models/lt-guard@production", "/v1/x?a=b"):
        assert keys.hidden(text, served) == text


def test_a_servers_log_tells_how_many_it_left_out_and_holds_no_key(world: World) -> None:
    before = audit.verify(world.store)["entries"]
    _, reader = keys.create(world.store, "acme", [Scope.READ])
    planted = keys.new_secret()
    with threaded(world.store, world.home) as client, httpx.Client(base_url=client.url, verify=False) as http:
        for secret in [planted] * 25 + [reader] * 2:
            headers = {"authorization": f"Bearer {secret}"}
            http.delete(f"/v1/files/{planted}?key={planted}", headers=headers)
        http.delete(f"/v1/{client.key}", headers={"authorization": "Bearer wrong"})
    found = [entry for entry in audit.entries(world.store, before) if entry.action == "refused"]
    by_key = [entry for entry in found if entry.facts.get("why") == "missing scope"]
    assert len(by_key) == 2 and len(found) == EACH + 2 + 1
    assert found[-1].target == "16 more were not written" and found[-1].facts["more"] == 16
    assert planted not in str(found) and client.key not in str(found)
    audit.verify(world.store)
