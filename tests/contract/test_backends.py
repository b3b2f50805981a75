"""Every backend that can run here gives the same tokens, ends alike, and refuses in the same words.

vLLM and llama.cpp are tried where LUTHIER_TEST_VLLM and LUTHIER_TEST_LLAMACPP name the python of an
environment that has them (`make test-vllm`, `make test-llamacpp`).
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from safetensors.torch import load_file, save_file

from luthier import artifacts, backends
from luthier.backends import _http, _leash, _process, llamacpp, remote, vllm
from luthier.backends._relay import Relay, Unsupported
from luthier.errors import GraderError, LuthierError, ModelError, ServeError
from luthier.metrics import Question
from luthier.serving.engine_process import Unavailable
from luthier.serving.limits import Limits
from luthier.serving.router import Router
from luthier.serving.service import Options, Service
from luthier.serving.worker import Ask, End, EngineFailed, Event, Failed, Reason, Said
from tests.http import running
from tests.serving.make_home import PROMPTS, TOKENS, World, asked, make_home

LONG = 1900
WAIT_S = 120
VLLM = os.environ.get("LUTHIER_TEST_VLLM")
LLAMACPP = os.environ.get("LUTHIER_TEST_LLAMACPP")
LIMITS = Limits(active=4, waiting=8)
SPELT = {
    "embedded in a thread": "{name: embedded, apart: false, threads: 1}",
    "embedded apart": "{name: embedded, threads: 1}",
    "vllm": f"{{name: vllm, python: '{VLLM}', dtype: float32, adapters: 2, rank: 8, context: 2048}}",
    "llamacpp": f"{{name: llamacpp, python: '{LLAMACPP}', places: 2, threads: 1}}",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_home(tmp_path_factory.mktemp("backends"), heads=2)  # vLLM on a CPU knows no head of 16


@pytest.fixture(scope="module")
def elsewhere(world: World) -> Iterator[running.Client]:
    """A server of luthier's in a process of its own, with the same releases; its key in the environment."""
    process, client = running.spawn(world.home.path)
    os.environ["TEST_REMOTE_KEY"] = client.key
    yield client
    del os.environ["TEST_REMOTE_KEY"]
    process.terminate()
    process.wait(WAIT_S)


@pytest.fixture(scope="module", params=[*SPELT, "remote"])
def service(request: pytest.FixtureRequest, world: World) -> Iterator[Service]:
    if request.param == "vllm" and VLLM is None:
        pytest.skip("LUTHIER_TEST_VLLM names no environment with vLLM: make test-vllm")
    if request.param == "llamacpp" and LLAMACPP is None:
        pytest.skip("LUTHIER_TEST_LLAMACPP names no environment with llama.cpp: make test-llamacpp")
    if request.param == "remote":
        client = request.getfixturevalue("elsewhere")
        spelt = f"{{name: remote, url: '{client.url}', key_env: TEST_REMOTE_KEY}}"
    else:
        spelt = SPELT[request.param]
    part = backends.read(spelt)
    with Service(world.store, world.home, LIMITS, backend=part) as service:
        service.worker.warm(service.router.resolve("guard"))
        yield service


def ask(service: Service, model: str, prompt: str, **options: Any) -> Ask:
    return service.prepare(service.router.resolve(model), asked(prompt), Options(**options))


def submit(service: Service, given: Ask) -> queue.Queue[Event]:
    events: queue.Queue[Event] = queue.Queue()
    service.submit(given, events.put)
    return events


def finish(events: queue.Queue[Event]) -> tuple[list[Said], str, Event]:
    said, text = [], ""
    while True:
        event = events.get(timeout=WAIT_S)
        if isinstance(event, Failed):
            return said, text, event
        text += event.text
        if isinstance(event, End):
            return said, text, event
        if isinstance(event, Said):
            said.append(event)


def test_three_releases_at_once_answer_token_for_token_as_transformers_and_peft_do(
    world: World, service: Service
) -> None:
    """Three adapters where vLLM and llama.cpp have two places: one makes room, and comes back."""
    cases = [(digest, prompt) for prompt in PROMPTS for digest in world.releases]
    under_way = [
        (case, submit(service, ask(service, f"guard@{case[0]}", case[1], max_tokens=TOKENS)))
        for case in cases
    ]
    for case, events in under_way:
        said, text, end = finish(events)
        reference = world.answers[case]
        assert (tuple(one.token for one in said), text) == (reference.tokens, reference.text)
        assert isinstance(end, End) and end.reason.value == reference.reason


def test_a_stop_string_ends_an_answer_before_itself(world: World, service: Service) -> None:
    long = {case: one.text for case, one in world.answers.items() if len(one.text) > 4}
    case, text = max(long.items(), key=lambda item: sum(letter.isascii() for letter in item[1]))
    stop = next(two for n in range(1, len(text)) if (two := text[n : n + 2]).isascii() and len(two) == 2)
    events = submit(service, ask(service, f"guard@{case[0]}", case[1], max_tokens=TOKENS, stops=(stop,)))
    _, told, end = finish(events)
    assert isinstance(end, End) and end.reason is Reason.STOP
    assert told == text[: text.index(stop)]


def test_a_release_judged_in_int8_is_refused_where_it_cannot_be_answered_so(
    world: World, service: Service
) -> None:
    given = ask(service, f"guard@{world.releases[0]}", PROMPTS[0], max_tokens=TOKENS)  # of a float32 base
    rounded = replace(given, target=replace(given.target, int8=True))
    try:
        said, _, end = finish(submit(service, rounded))
    except Unsupported as error:
        assert "int8" in error.what
    else:
        assert not said and isinstance(end, Failed) and "int8" in end.error.what


@pytest.mark.parametrize("module", [vllm, llamacpp])
def test_a_release_judged_in_int8_is_not_brought_to_a_server_that_would_not_answer_for_it(
    world: World, module: Any
) -> None:
    engine = module.engine(module.Params(url="http://127.0.0.1:9"), Limits(), world.home)
    try:
        target = replace(Router(world.store, world.home).resolve("guard"), int8=True)
        with pytest.raises(Unsupported, match="int8"):
            engine.warm(target)
        with pytest.raises(ServeError) as other:  # nobody is there, and that is said
            engine.warm(replace(target, int8=False))
        assert not isinstance(other.value, Unsupported)
    finally:
        engine.close(0.0)


def test_after_a_start_that_failed_nobody_waits_for_another_but_an_address_is_asked_again(
    tmp_path: Path,
) -> None:
    for params, waits in (
        (vllm.Params(python=tmp_path), True),
        (vllm.Params(url="http://127.0.0.1:9"), False),
    ):
        circuit = _process.Circuit("it could not be started")
        circuit.require_closed()
        circuit.open(params)
        if not waits:
            circuit.require_closed()
            continue
        with pytest.raises(Unavailable, match="could not be started") as said:
            circuit.require_closed()
        assert said.value.hint is not None and said.value.hint.startswith("try again in ")
        assert 1 <= said.value.retry_after_s <= _process.OPEN_S


def test_log_probabilities_come_with_tokens_and_the_likeliest_is_the_greedy_one(
    world: World, service: Service
) -> None:
    given = ask(service, f"guard@{world.releases[1]}", PROMPTS[1], max_tokens=TOKENS, logprobs=3)
    said, _, end = finish(submit(service, given))
    if isinstance(end, Failed):
        assert isinstance(end.error, Unsupported) and "the backend remote cannot" in end.error.what
        return
    assert said
    for one in said:
        assert one.logp is not None and len(one.top) == 3
        assert one.top[0][0] == one.token and one.top[0][1] == pytest.approx(one.logp, abs=1e-4)
        assert [logp for _, logp in one.top] == sorted((logp for _, logp in one.top), reverse=True)


def test_a_cancelled_answer_says_no_more_and_frees_its_place(world: World, service: Service) -> None:
    events: queue.Queue[Event] = queue.Queue()
    given = ask(service, "guard", PROMPTS[0], max_tokens=LONG, ignore_eos=True)
    cancel = service.submit(given, events.put)
    assert isinstance(events.get(timeout=WAIT_S), Said)
    cancel()
    while not events.empty():
        assert isinstance(events.get(), Said)
    assert service.worker.counts().active == 0
    reference = world.answers[world.releases[2], PROMPTS[2]]
    after = ask(service, f"guard@{world.releases[2]}", PROMPTS[2], max_tokens=TOKENS)
    said, _, _ = finish(submit(service, after))
    assert tuple(one.token for one in said) == reference.tokens


def test_an_adapter_that_is_not_there_fails_its_own_request_alone(
    world: World, service: Service, tmp_path: Path
) -> None:
    given = ask(service, "guard", PROMPTS[0], max_tokens=TOKENS)
    gone = replace(given.target, adapter_digest="0" * 64, adapter_dir=tmp_path / "gone")
    gone = replace(gone, release_digest="0" * 64)
    _, _, end = finish(submit(service, replace(given, target=gone)))
    assert isinstance(end, Failed) and isinstance(end.error, ModelError | EngineFailed)
    assert end.error.what
    said, _, _ = finish(submit(service, given))
    assert tuple(one.token for one in said) == world.answers[world.releases[0], PROMPTS[0]].tokens


def test_what_cannot_be_done_is_refused_by_name_or_done(service: Service) -> None:
    given = ask(service, "guard", PROMPTS[0], max_tokens=1)
    for wish in ({"score_prompt": True}, {"embed": True}):
        _, _, end = finish(submit(service, replace(given, **wish)))
        if isinstance(end, Failed):
            assert isinstance(end.error, LuthierError) and end.error.http_code == 400
            assert re.match("the backend (vllm|llamacpp|remote) cannot", end.error.what)


def test_a_vllm_that_runs_already_is_used_with_what_it_has_loaded(
    world: World, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second server is pointed at the first one's; it ends, and the first one's goes on."""
    if not (isinstance(service.engine, Relay) and isinstance(service.engine.behind, vllm.Vllm)):
        pytest.skip("another backend")
    door = service.engine.behind.door
    assert door is not None and door.key is not None
    monkeypatch.setenv("TEST_VLLM_KEY", door.key)
    part = backends.read(f"{{name: vllm, url: '{door.url}', key_env: TEST_VLLM_KEY, adapters: 2, rank: 8}}")
    with Service(world.store, world.home, LIMITS, backend=part) as second:
        for digest in world.releases:
            given = ask(second, f"guard@{digest}", PROMPTS[0], max_tokens=TOKENS)
            said, _, _ = finish(submit(second, given))
            assert tuple(one.token for one in said) == world.answers[digest, PROMPTS[0]].tokens
        other = replace(given, target=replace(given.target, base_digest="0" * 64))
        _, _, end = finish(submit(second, other))
        assert isinstance(end, Failed) and "holds base" in end.error.what
    for digest in world.releases:  # what the other one has put out is loaded again
        given = ask(service, f"guard@{digest}", PROMPTS[1], max_tokens=TOKENS)
        said, _, _ = finish(submit(service, given))
        assert tuple(one.token for one in said) == world.answers[digest, PROMPTS[1]].tokens


def llama(service: Service) -> llamacpp.LlamaCpp:
    if not (isinstance(service.engine, Relay) and isinstance(service.engine.behind, llamacpp.LlamaCpp)):
        pytest.skip("another backend")
    return service.engine.behind


def test_a_llamacpp_that_runs_already_is_used_for_the_release_it_names_and_no_other(
    world: World, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind = llama(service)
    given = ask(service, f"guard@{world.releases[0]}", PROMPTS[0], max_tokens=TOKENS)
    with behind.held(given.target) as place:
        monkeypatch.setenv("TEST_LLAMA_KEY", place.door.key or "")
        part = backends.read(f"{{name: llamacpp, url: '{place.door.url}', key_env: TEST_LLAMA_KEY}}")
        with Service(world.store, world.home, LIMITS, backend=part) as second:
            said, _, _ = finish(submit(second, given))
            assert tuple(one.token for one in said) == world.answers[world.releases[0], PROMPTS[0]].tokens
            other = ask(second, f"guard@{world.releases[1]}", PROMPTS[0], max_tokens=TOKENS)
            _, _, end = finish(submit(second, other))
            assert isinstance(end, Failed) and "does not serve" in end.error.what


def test_a_llamacpp_that_was_killed_is_started_again_by_the_next_request(
    world: World, service: Service
) -> None:
    behind = llama(service)
    given = ask(service, "guard", PROMPTS[0], max_tokens=TOKENS)
    before = finish(submit(service, given))
    (process,) = (one.process for one in behind.servers(given.target))
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(WAIT_S)
    assert finish(submit(service, given)) == before
    assert isinstance(before[2], End)


def test_a_llamacpp_whose_tokens_are_not_the_embedded_engines_serves_nobody(
    world: World, service: Service
) -> None:
    """The probes beside the file are falsified, so the server that would answer from it gives others."""
    behind = llama(service)
    given = ask(service, f"guard@{world.releases[2]}", PROMPTS[0], max_tokens=TOKENS)
    with behind.held(given.target):
        pass
    folder = behind.job(given.target).folder
    probes = artifacts.read_json(folder / "probes.json")
    probes[0]["answer"][0] = (probes[0]["answer"][0] + 1) % 200
    artifacts.write_json(folder / "probes.json", probes)
    (folder / artifacts.MANIFEST).unlink()
    artifacts.seal(folder)
    with Service(world.store, world.home, LIMITS, backend=backends.read(SPELT["llamacpp"])) as strict:
        for says in ("tokens that the embedded engine gives", "could not serve this release"):
            _, _, end = finish(submit(strict, given))
            assert isinstance(end, Failed) and says in end.error.what
    shutil.rmtree(folder)


def test_a_llamacpp_in_eight_bits_serves_where_most_tokens_agree(world: World, service: Service) -> None:
    llama(service)
    spelt = SPELT["llamacpp"].replace("places: 2", "dtype: q8_0, agreement: 0.5")
    with Service(world.store, world.home, LIMITS, backend=backends.read(spelt)) as narrow:
        given = ask(narrow, "guard", PROMPTS[0], max_tokens=TOKENS)
        said, _, end = finish(submit(narrow, given))
        assert said and isinstance(end, End)
        penalised = replace(given, sampling=replace(given.sampling, frequency_penalty=0.5))
        _, _, end = finish(submit(narrow, penalised))
        assert isinstance(end, Failed) and end.error.http_code == 400 and "penalties" in end.error.what


def test_a_backend_that_closes_fails_what_is_left_and_takes_no_more(world: World) -> None:
    for name in ("embedded in a thread", "embedded apart"):
        with Service(world.store, world.home, LIMITS, backend=backends.read(SPELT[name])) as service:
            given = ask(service, "guard", PROMPTS[0], max_tokens=LONG, ignore_eos=True)
            events = submit(service, given)
            assert isinstance(events.get(timeout=WAIT_S), Said)
            service.close(grace_s=0.0)
            _, _, end = finish(events)
            assert isinstance(end, Failed) and isinstance(end.error, ServeError)
            with pytest.raises(ServeError, match="shutting down"):
                service.submit(given, events.put)


def test_vllm_is_never_asked_for_an_adapter_that_it_would_choke_on(world: World, tmp_path: Path) -> None:
    """It answers these with 500; they are refused before they are posted."""
    target = Service(world.store, world.home).router.resolve("guard")
    assert target.adapter_dir is not None
    vllm.check(target.adapter_dir, 8)
    with pytest.raises(ModelError, match="rank 4 is above 2"):
        vllm.check(target.adapter_dir, 2)
    settings = (target.adapter_dir / "adapter_config.json").read_text("utf-8")
    weights = load_file(target.adapter_dir / "adapter_model.safetensors")
    save_file(weights, tmp_path / "adapter_model.safetensors")
    for name, value, says in (
        ("use_dora", "true", "plain LoRA"),
        ("modules_to_save", '["lm_head"]', "modules_to_save"),
        ("alpha_pattern", '{"q_proj": 3}', "alpha_pattern"),
    ):
        (tmp_path / "adapter_config.json").write_text(f'{settings.rstrip().rstrip("}")}, "{name}": {value}}}')
        with pytest.raises(ModelError, match=says):
            vllm.check(tmp_path, 8)


@pytest.mark.parametrize(
    ("spelt", "says"),
    [
        ("{name: vlm, url: 'http://127.0.0.1:1'}", "did you mean 'vllm'"),
        ("{name: vllm}", "give `python`"),
        ("{name: vllm, url: 'http://10.0.0.7:8000'}", "on this machine alone"),
        ("{name: vllm, url: 'http://me:secret@127.0.0.1:8000'}", "no password"),
        ("{name: vllm, url: 'file:///etc/passwd'}", "write http"),
        ("{name: vllm, url: 'http://127.0.0.1:1', rank: 7}", "vLLM takes 8"),
        ("{name: remote, url: 'http://example.com'}", "only https"),
        ("{name: remote, url: 'https://example.com?to=other'}", "write http"),
        ("{name: vllm, pyton: x}", "Extra inputs"),
        ("{name: llamacpp}", "give `python`"),
        ("{name: llamacpp, url: 'http://10.0.0.7:8080'}", "on this machine alone"),
        ("{name: [", "cannot be read"),
    ],
)
def test_a_misspelt_backend_is_refused_with_what_is_wrong(spelt: str, says: str) -> None:
    with pytest.raises(ServeError, match=says):
        backends.read(spelt)


def test_a_remote_model_judges_through_the_chat_api(elsewhere: running.Client, world: World) -> None:
    """The judge is a real server's release; what it says is what it says to anyone."""
    params = remote.Params(url=f"{elsewhere.url}/v1", key_env="TEST_REMOTE_KEY", model="guard")
    question = Question("some other name", (("user", PROMPTS[1]),), TOKENS)
    assert remote.ask(params)(question) == world.answers[world.releases[0], PROMPTS[1]].text


def test_a_judge_that_cannot_be_asked_is_a_graders_error_that_tells_no_key(
    elsewhere: running.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = Question("guard", (("user", "hello"),), 4)
    monkeypatch.setenv("A_WRONG_KEY", "not-the-key-at-all")
    for changes, says in (
        ({"model": "nobody"}, "unknown model"),
        ({"key_env": "A_WRONG_KEY"}, "401"),
        ({"url": "http://127.0.0.1:1"}, "does not answer"),
    ):
        settings = {"url": elsewhere.url, "key_env": "TEST_REMOTE_KEY", "model": "guard"} | changes
        with pytest.raises(GraderError, match=says) as told:
            remote.ask(remote.Params.model_validate(settings))(question)
        assert "not-the-key-at-all" not in str(told.value) and told.value.flag == remote.NotAsked.flag
    with pytest.raises(ServeError, match="NO_SUCH_KEY is not set"):
        remote.ask(remote.Params(url=elsewhere.url, key_env="NO_SUCH_KEY"))


class _Redirects(BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        self.asked.append(self.path)
        self.send_response(307)
        self.send_header("location", "/v1/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()


def test_a_redirect_is_not_followed() -> None:
    with HTTPServer(("127.0.0.1", 0), _Redirects) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        params = remote.Params(url=f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(GraderError, match="307"):
            remote.ask(params)(Question("any", (("user", "hello"),), 4))
        server.shutdown()
        thread.join()
    assert _Redirects.asked == ["/v1/chat/completions"]


def test_a_path_off_the_list_is_never_asked() -> None:
    door = _http.Door("http://127.0.0.1:1", vllm.PATHS)
    for path in ("/metrics", "/v1/chat/completions", "/collective_rpc", "/v1/models/../../sleep"):
        with pytest.raises(ValueError, match="may be asked"), door.call(path):
            pass


def test_what_is_on_the_leash_ends_when_its_holder_is_killed() -> None:
    """The holder is killed with SIGKILL: it can do nothing, and its child ends all the same."""
    holder = (
        "import subprocess, sys\n"
        "leash = subprocess.Popen([sys.executable, '-I', sys.argv[1], sys.executable, '-c',"
        "'import os, sys, time; print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)'],"
        "stdin=subprocess.PIPE, start_new_session=True)\n"
        "leash.wait()"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", holder, _leash.__file__], stderr=subprocess.PIPE, text=True
    )
    assert started.stderr is not None
    child = int(started.stderr.readline())
    started.kill()
    started.wait(WAIT_S)
    until = time.monotonic() + WAIT_S
    while _runs(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
