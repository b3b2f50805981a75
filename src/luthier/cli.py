"""The command line: a thin door onto `api`. Results go to stdout, progress and errors to stderr.

Exit codes are those of `errors`: 0 fine, 2 recipe, 3 data, 4 model, 5 plan, 6 training, 7 a gate refused,
8 home or disk, 9 not found, 10 serving, 11 fetching, 75 interrupted, 70 a bug of ours. With `--json` the
last line of stdout is one JSON object, for an error too. Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier import cli_bases, cli_jobs, cli_keys, cli_traffic, tables
from luthier.door import AsJson, Home, errors, results, who
from luthier.door import answer as _answer
from luthier.door import door as _door

if TYPE_CHECKING:
    from luthier.pipeline import Stop

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Raw rows to a governed, served, reversible fine-tuned language model.",
    epilog="Start with: luthier run examples/guard.yaml",
)
Recipe = Annotated[Path, typer.Argument(help="recipe file (YAML)", show_default=False)]
Model = Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME@DIGEST", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="override, e.g. train.0.lr=1e-4")
]


@app.command()
def run(recipe: Recipe, set: Set = None, home: Home = None, as_json: AsJson = False) -> None:
    """Take a recipe through all seven stages; finished stages are reused."""
    _run("monitor", recipe, set, home, as_json)


@app.command()
def plan(recipe: Recipe, set: Set = None, home: Home = None, as_json: AsJson = False) -> None:
    """Stages 1 to 3: what would be trained, its memory and its minutes, before spending them."""
    _run("plan", recipe, set, home, as_json)


@app.command()
def runs(home: Home = None, as_json: AsJson = False, limit: int = 50) -> None:
    """List runs, newest first."""
    _answer(as_json, lambda api: api.runs(home=home, limit=limit), tables.runs)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="a run's id, or its first letters")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show one run: stages, digests, gates, and where its report is."""
    _answer(as_json, lambda api: api.show(run, home=home), tables.show)


@app.command()
def compare(a: str, b: str, home: Home = None, as_json: AsJson = False) -> None:
    """Compare two runs on the test rows they share, with an exact paired test."""
    _answer(as_json, lambda api: api.compare(a, b, home=home), tables.compare)


@app.command()
def releases(
    name: Annotated[str | None, typer.Argument()] = None, home: Home = None, as_json: AsJson = False
) -> None:
    """List releases and the aliases that stand on them."""
    _answer(as_json, lambda api: api.releases(name, home=home), tables.releases)


@app.command()
def promote(
    model: Model,
    to: Annotated[str, typer.Option(help="the alias to move")] = "production",
    reason: str = "promoted",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Move an alias onto a release (NAME alone means its staging release). One row; nothing is copied."""
    _answer(
        as_json, lambda api: api.promote(model, to=to, reason=reason, actor=who(), home=home), tables.moved
    )


@app.command()
def rollback(name: str, alias: str = "production", home: Home = None, as_json: AsJson = False) -> None:
    """Move an alias back to where it stood before its last promotion. One row; nothing is rebuilt."""
    _answer(as_json, lambda api: api.rollback(name, alias=alias, actor=who(), home=home), tables.moved)


@app.command()
def serve(  # noqa: PLR0913 - each is an option of the command
    port: Annotated[int, typer.Option(help="0 takes a free one")] = 8321,
    host: str = "127.0.0.1",
    key: Annotated[
        str | None, typer.Option(envvar="LUTHIER_API_KEY", help="default: a new one, printed")
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="bring SmolLM2-135M-Instruct along")] = False,
    base: Annotated[
        Path | None, typer.Option(help="bring this base along: a recipe, a model folder or a .gguf")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes for fine-tuning jobs; 0 for none", min=0)] = 1,
    cache: Annotated[int, typer.Option(help="deterministic answers kept; 0 for none", min=0)] = 0,
    first_token_seconds: Annotated[
        float, typer.Option(help="in a rush, whoever would wait longer for a first token is told 429", min=0)
    ] = 0.4,
    backend: Annotated[
        str | None,
        typer.Option(help="what computes answers: '{name: vllm, url: …}'; default: our own engine"),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="whom graders may ask: '{name: remote, url: …, model: …, key_env: …}'"),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="write what is asked and answered to a file below the home")
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(help="certificate chain, PEM; with --tls-key: HTTPS")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its private key, PEM")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="listen beyond this machine without TLS")
    ] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Serve every base and release over HTTP with the OpenAI API; alias moves are followed at once.

    The official client's base_url is the printed url followed by /v1. With --json one line is printed when
    requests will be answered: url, key, and model, the base that can be tuned, sampled and scored.
    """
    brought: dict[str, Any] = {}

    def announce(ready: dict[str, Any]) -> None:
        model = brought.get("name") or next(iter(ready["models"]), None)
        if as_json:
            said = {"url": ready["url"], "key": ready["key"], "model": model}
            if "prompt_log" in ready:
                said["prompt_log"] = ready["prompt_log"]
            print(json.dumps(said), flush=True)
        else:
            tables.serving(results, ready)

    with _door(as_json):
        from luthier import http

        if demo or base is not None:
            brought |= cli_bases.admitted(None, base, "LicenseRef-own", home)
        secure = http.Secure(tls_cert, tls_key, insecure)
        http.serve(
            home=home, host=host, port=port, key=key, workers=workers, cached=cache,
            first_token_s=first_token_seconds, backend=backend, judge=judge, log_prompts=log_prompts,
            secure=secure, announce=announce,
        )  # fmt: skip


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS, NAME@DIGEST, a base, or ft:…")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="say one thing and leave")] = None,
    max_tokens: int = 256,
    home: Home = None,
) -> None:
    """Talk to a model on this machine, without a server."""
    with _door(False):
        from luthier import api

        for piece in api.chat(model, _spoken(message), max_tokens=max_tokens, home=home):
            print(piece, end="", flush=True)


@app.command()
def monitor(model: Model, since: str | None = None, home: Home = None, as_json: AsJson = False) -> None:
    """Requests served so far against the release's own baseline."""
    _answer(as_json, lambda api: api.monitor(model, since=since, home=home), tables.monitor)


@app.command()
def lineage(
    what: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@DIGEST, or the id of a training row")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """From a release back to its rows and base; or from a row to every release that learnt it."""
    _answer(as_json, lambda api: api.lineage(what, home=home), tables.lineage)


@app.command()
def parts(as_json: AsJson = False) -> None:
    """List every part a recipe can name."""
    _answer(as_json, lambda api: api.parts(), tables.parts)


@app.command()
def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Check this machine, the libraries, and every byte of what the aliases stand on."""
    found = _answer(as_json, lambda api: list(api.doctor(home=home)), tables.doctor)
    if not all(finding["ok"] for finding in found):
        raise typer.Exit(8)


def _run(until: str, recipe: Path, overrides: list[str] | None, home: Path | None, as_json: bool) -> None:
    with _door(as_json):
        from luthier import api
        from luthier.pipeline import Stop
        from luthier.progress import Watch

        stop = Stop()
        with _signals(stop), Watch(errors) as watch:
            outcome = api.run(recipe, set=overrides or [], home=home, until=until, tell=watch.tell, stop=stop)
        if as_json:
            print(json.dumps(api.describe(outcome)), flush=True)
        else:
            tables.outcome(results, api.describe(outcome))


@contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the run to save and stop; a second one stops it where it stands."""

    def handle(number: int, frame: FrameType | None) -> None:
        stop.request()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spoken(message: str | None) -> Iterator[str]:
    if message is not None:
        yield message
        return
    while True:
        try:
            line = errors.input("\n[bold]you[/] ")
        except EOFError:
            return
        if line.strip():
            yield line


# `--help` lists in this order: what a newcomer types first stands first.
app.add_typer(cli_jobs.app, name="jobs")
app.command()(cli_jobs.work)
app.command("import-openai")(cli_jobs.import_openai)
cli_traffic.register(app)
app.command()(cli_bases.share)
app.add_typer(cli_bases.app, name="bases")
cli_keys.register(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
