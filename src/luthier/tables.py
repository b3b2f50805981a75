"""What a person reads after a verb: small tables and sentences drawn with rich, from plain values only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = Mapping[str, Any]
TYPED = ("run", "digest", "id", "base", "job", "release")  # what somebody types next is never cut short
MARKS = {True: "[green]✓[/]", False: "[red]✗[/]"}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in (
            "seconds",
            "accuracy",
            "reward",
            "F1",
            "p95 s",
            "rows",
            "GB",
            "share",
            "minutes",
            "kWh",
        )
        table.add_column(column, justify="right" if right else "left", no_wrap=column in TYPED)
    return table


def outcome(console: Console, done: Row) -> None:
    """The end of a run: stages, the scores beside each other, and what to do next."""
    stages(console, done["stages"])
    score = done["stages"].get("evaluate", {}).get("facts", {}).get("systems")
    if score:
        console.print()
        systems(console, score)
    prediction = done["stages"].get("plan", {}).get("facts", {})
    if prediction and "train" not in done["stages"]:
        console.print()
        plan(console, prediction)
    console.print()
    if done["release"]:
        console.print(
            f"release [bold]{done['name']}@{done['release'][:12]}[/]   next: luthier promote {done['name']}"
        )
    if done["report"]:
        console.print(f"report  {done['report']}", soft_wrap=True)


def stages(console: Console, records: Mapping[str, Row]) -> None:
    table = _table("stage", "digest", "seconds", "")
    for name, record in records.items():
        table.add_row(
            name, record["digest"][:12], f"{record['seconds']:.1f}", "reused" if record["reused"] else ""
        )
    console.print(table)


def plan(console: Console, facts: Row) -> None:
    """What training would take: weights, tokens, bytes by kind, time, money, and the same elsewhere."""
    where = facts["device"] or "this machine"
    share, packed = facts["trainable_share"], facts["computed_tokens"]
    bits = sum(facts["bits_per_parameter"].values())
    lines = [
        ("trains", f"{facts['trainable_parameters']:,} weights, {share:.2%} of all; {bits:.1f} bits each"),
        ("tokens", f"{facts['tokens']:,} in {facts['steps']:,} steps; {packed:,} after packing, "
         f"{facts['loss_tokens']:,} learnt"),
        ("at once", f"{facts['largest_micro_batch']:,} tokens of {facts['micro_batches']:,} micro-batches; "
         f"checkpointing: {facts['checkpointing']}; {facts['dtype']}"),
        ("memory", f"{facts['peak_gb']:.2f} GB of {facts['budget_gb']:.2f} on {where}"),
        ("work", f"{facts['operations']['total'] / 1e12:,.2f} trillion operations"),
        ("time", f"{clock(60 * facts['minutes'])} at {facts['tokens_per_s']:,.0f} tokens/s"),
    ]  # fmt: skip
    if "energy_kwh" in facts:
        lines.append(("energy", f"{facts['energy_kwh']:.4g} kWh"))
    if "money" in facts:
        lines.append(("money", f"{facts['money']:.4g}"))
    for name, said in lines:
        console.print(f"  [bold]{name:<9}[/]{said}", highlight=False)
    kinds = _table("kind", "GB", "share")
    whole = facts["bytes"]["total"]
    for kind, count in sorted(facts["bytes"].items(), key=lambda item: (item[0] == "total", -item[1])):
        if count:
            kinds.add_row(kind, f"{count / 1e9:.3f}", f"{count / whole:.0%}")
    console.print()
    console.print(kinds)
    if facts["elsewhere"]:
        console.print()
        console.print(_elsewhere(facts["elsewhere"]))
        console.print("[dim]elsewhere: from data sheets and an assumed share of their rates[/]")
    for warning in facts["warnings"]:
        console.print(f"[yellow]note[/] {escape(warning)}", soft_wrap=True)


def _elsewhere(devices: Sequence[Row]) -> Table:
    table = _table("device", "fits", "GB", "minutes", "kWh")
    for device in devices:
        figures = ["", "", ""]
        if device["fits"]:
            minutes = device["minutes"]
            figures = [f"{device['peak_gb']:.1f}", f"{minutes:,.2f}", f"{device['energy_kwh']:.4f}"]
        table.add_row(device["device"], MARKS[device["fits"]], *figures)
    return table


def clock(seconds: float) -> str:
    """75 → '1:15'; 3675 → '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def systems(console: Console, score: Mapping[str, Row]) -> None:
    if any("reward" in system for system in score.values()):
        table = _table("system", "reward", "95 % interval")
        for name, system in score.items():
            interval = f"{system['low']:.4f} – {system['high']:.4f}"
            table.add_row(name, f"{system['reward']:.4f}", interval)
        console.print(table)
        return
    table = _table("system", "accuracy", "95 % interval", "F1")
    for name, system in score.items():
        interval = f"{system['low']:.1%} – {system['high']:.1%}"
        f1 = "" if system.get("f1") is None else f"{system['f1']:.3f}"
        table.add_row(name.replace("_", " "), f"{system['accuracy']:.1%}", interval, f1)
    console.print(table)


def runs(console: Console, found: Sequence[Row]) -> None:
    table = _table("run", "name", "status", "started", "release")
    for row in found:
        table.add_row(row["run"], row["name"], row["status"], row["started_at"], (row["release"] or "")[:12])
    console.print(table if found else "no runs yet: luthier run examples/guard.yaml")


def show(console: Console, run: Row) -> None:
    console.print(
        f"[bold]{run['name']}[/] {run['run']}  {run['status']}  "
        f"{run['started_at']} → {run['finished_at'] or '…'}"
    )
    if run["error"]:
        console.print(escape(run["error"]), style="red", soft_wrap=True)
    stages(console, run["stages"])
    for verdict in run["stages"].get("release", {}).get("facts", {}).get("verdicts", []):
        console.print(
            f"{MARKS[verdict['passed']]} {verdict['gate']}: {escape(verdict['reason'])}", soft_wrap=True
        )
    if run["report"]:
        console.print(f"report  {run['report']}", soft_wrap=True)


def compare(console: Console, both: Row) -> None:
    systems(console, {f"{label}  {both[label]['run']}": both[label]["tuned"] for label in ("a", "b")})
    console.print(
        f"on {both['rows']:,} shared rows b is right where a is wrong {both['b_wins']} times, "
        f"the other way {both['b_losses']} times (exact paired test p = {both['p']:.3g})"
    )


def releases(console: Console, found: Sequence[Row]) -> None:
    table = _table("name", "digest", "gates", "aliases", "run", "at")
    for row in found:
        aliases = ", ".join(row["aliases"])
        table.add_row(row["name"], row["digest"][:12], MARKS[row["accepted"]], aliases, row["run"], row["at"])
    console.print(table if found else "no releases yet: luthier run examples/guard.yaml")


def split(console: Console, told: Row) -> None:
    """A canary or a shadow: how it stands, and the figures it has so far."""
    console.print(
        f"{told['name']} {told['kind']} [bold]{told['digest'][:12]}[/] at {told['percent']:g} % beside "
        f"{told['champion'][:12]}: {escape(told['state'])} ({escape(told['reason'])}, {told['at']})"
    )
    for name, value in told["figures"].items():
        console.print(f"  {name.replace('_', ' ')}: {escape(str(value))}")


def moved(console: Console, move: Row) -> None:
    if not move["moved"]:
        console.print(
            f"{move['name']}@{move['alias']} stands on {move['digest'][:12]} already: nothing moved"
        )
        return
    before = (move["previous"] or "nothing")[:12]
    console.print(
        f"{move['name']}@{move['alias']}: {before} → [bold]{move['digest'][:12]}[/] "
        f"({escape(move['reason'])})"
    )


def bases(console: Console, found: Sequence[Row]) -> None:
    if not found:
        console.print("no base model yet: luthier bases add NAME FROM")
        return
    table = _table("base", "architecture", "parameters", "context", "licence", "digest")
    for base in found:
        table.add_row(
            base["name"], base["architecture"], f"{base['parameters']:,}", f"{base['context']:,}",
            base["licence"], base["digest"][:12],
        )  # fmt: skip
    console.print(table)


def keys(console: Console, found: Sequence[Row]) -> None:
    if not found:
        console.print("no key yet: luthier keys create")
        return
    table = _table("id", "tenant", "name", "begins", "scopes", "budget", "state", "until")
    for key in found:
        table.add_row(
            key["id"], key["tenant"], key["name"], key["prefix"] + "…", " ".join(key["scopes"]),
            "\n".join(_budget(key)), key["state"], (key["expires_at"] or "")[:16],
        )  # fmt: skip
    console.print(table)


def _budget(key: Row) -> Iterator[str]:
    """What a key may spend, a line each; of tokens also what it has."""
    if key["requests_per_minute"]:
        yield f"{key['requests_per_minute']:,}/min"
    if key["concurrent_requests"]:
        yield f"{key['concurrent_requests']:,} at once"
    for period, so_far in (("day", "tokens_today"), ("month", "tokens_this_month")):
        if most := key[f"tokens_per_{period}"]:
            yield (f"{key[so_far]:,} of " if so_far in key else "") + f"{most:,} tokens/{period}"


def audit(console: Console, found: Sequence[Row]) -> None:
    table = _table("entry", "at", "who", "tenant", "what", "to")
    for entry in found:
        row = (str(entry["seq"]), entry["at"][:19], entry["actor"], entry["tenant"], entry["action"])
        table.add_row(*row, entry["target"])
    console.print(table)


def serving(console: Console, ready: Row) -> None:
    console.print(f"serving at [bold]{ready['url']}[/]   key: {ready['key']}", soft_wrap=True)
    client = f"OpenAI(base_url={ready['url'] + '/v1'!r}, api_key={ready['key']!r})"
    console.print(f"for the official client: {client}", soft_wrap=True, markup=False, highlight=False)
    models = ", ".join(ready["models"]) or "none yet; a release is served as soon as an alias stands on it"
    console.print(f"models: {models}", soft_wrap=True)
    if "prompt_log" in ready:
        console.print(
            f"prompts and answers are logged in {ready['prompt_log']}", style="bold", soft_wrap=True
        )
    console.print("stop with Ctrl-C; promote and rollback are followed without a restart", style="dim")


def monitor(console: Console, report: Row) -> None:
    console.print(
        f"[bold]{report['name']}[/] {report['release'][:12]}: {report['volume']['requests']} requests"
    )
    table = _table("signal", "now", "baseline", "verdict", "action")
    for signal in report["signals"]:
        table.add_row(
            signal["signal"],
            str(signal["value"]),
            str(signal["baseline"]),
            {True: "ok", False: "breach", None: "open"}[signal["ok"]],
            signal.get("action") or "",
        )
    console.print(table)


def lineage(console: Console, found: Row) -> None:
    if "row" in found:
        for release in found["learnt_by"]:
            aliases = ", ".join(release["aliases"]) or "no alias"
            steps = ", ".join(map(str, release["steps"]))
            console.print(
                f"row {found['row']} → steps {steps} → {release['name']}@{release['digest'][:12]} ({aliases})"
            )
        return
    aliases = ", ".join(found["aliases"]) or "no alias"
    console.print(f"[bold]{found['name']}@{found['release'][:12]}[/] ({aliases}), run {found['run']}")
    base = found["base"]
    console.print(f"├ adapter    {found['adapter'][:12]}")
    console.print(f"├ scorecard  {found['scorecard'][:12]}")
    console.print(f"├ plan       {found['plan'][:12]}")
    console.print(
        f"├ base       {base['artefact'][:12]}  {base['architecture']}, "
        f"{base['parameters']:,} parameters, {base['licence']}"
    )
    console.print(f"├ data       {found['data']['artefact'][:12]}")
    console.print(f"└ replaces   {(found['replaces'] or 'nothing')[:12]}")


def parts(console: Console, shelves: Mapping[str, Mapping[str, str]]) -> None:
    for family, found in shelves.items():
        console.print(f"[bold]{family}[/]")
        for name, line in found.items():
            console.print(f"  {name:<15} {escape(line)}", highlight=False)


def doctor(console: Console, findings: Sequence[Row]) -> None:
    table = _table("", "check", "found", "")
    for finding in findings:
        table.add_row(
            MARKS[finding["ok"]], finding["check"], escape(finding["found"]), escape(finding["hint"] or "")
        )
    console.print(table)


def jobs(console: Console, found: Sequence[Row]) -> None:
    """Jobs, newest first: what each is about and how far it is; ids are whole, to be copied."""
    for one in found:
        tokens = one["trained_tokens"] or (one["luthier"]["planned"] or {}).get("tokens")
        told = f"{tokens:,} tokens" if tokens else ""
        line = f"{one['id']}  {one['status']:<16}  {one['model']}  {told}  {one['fine_tuned_model'] or ''}"
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def job(console: Console, one: Row) -> None:
    """One job: its state and settings, why it failed, its checkpoints and its latest events."""
    settings = ", ".join(f"{name} {value}" for name, value in one["hyperparameters"].items())
    console.print(f"[bold]{one['id']}[/]  {one['status']}  {escape(one['model'])}  {escape(settings)}")
    if one["error"]:
        console.print(f"[red]{one['error']['code']}[/] {escape(one['error']['message'])}", soft_wrap=True)
    if one["fine_tuned_model"]:
        console.print(f"model {escape(one['fine_tuned_model'])}", soft_wrap=True)
    for made in one.get("checkpoints", ()):
        console.print(f"checkpoint {escape(made['fine_tuned_model_checkpoint'])}", soft_wrap=True)
    for said in one.get("events", ()):
        event(console, said)


def quote(console: Console, found: Row) -> None:
    """What a job would take."""
    money = f", price {found['money']:.4f}" if "money" in found else ""
    console.print(
        f"{found['trained_tokens']:,} tokens in {found['steps']:,} steps over {found['rows']:,} examples, "
        f"about {found['minutes']:.1f} minutes, {found['peak_gb']:.2f} GB of memory{money}"
    )


def event(console: Console, said: Row) -> None:
    style = {"warn": "yellow", "error": "red"}.get(said["level"], "default")
    console.print(f"[{style}]{escape(said['message'])}[/]", highlight=False, soft_wrap=True)


def imported(console: Console, found: Sequence[Row]) -> None:
    """Old jobs: the recipe each became, and what was lost."""
    for one in found:
        console.print(
            f"[bold]{escape(one['job'])}[/] → {escape(one['recipe'] or 'no recipe')}", soft_wrap=True
        )
        for line in one["told"]:
            console.print(f"  {escape(line)}", soft_wrap=True)
