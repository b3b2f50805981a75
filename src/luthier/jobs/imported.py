"""Old OpenAI jobs as recipes on disk: settings from `client.fine_tuning.jobs.list()`, rows from their JSONL.

What a recipe can say of a job is carried over, line for line and number for number; the rest is told, not
dropped in silence: OpenAI's weights stay with OpenAI, and its learning rates are not ours. A recipe is
written only where its rows are at hand and can be learnt. It knows no network: you downloaded the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from luthier import metrics
from luthier.errors import DataError
from luthier.jobs import examine, spec
from luthier.jobs.asked import Create, Refused, parse
from luthier.jobs.records import Job
from luthier.jobs.spec import Terms

LARGEST_BYTES = 64 * 1024 * 1024
NAME = re.compile(r"[^a-z0-9]+")
CARRIED = ("training_file", "validation_file", "method", "hyperparameters", "metadata", "suffix", "seed")
SILENT = (  # of the object itself, or with nothing to carry
    *("object", "id", "created_at", "finished_at", "status", "model", "organization_id", "error", "luthier"),
    *("user_provided_suffix", "estimated_finish", "result_files", "trained_tokens", "fine_tuned_model"),
    *("integrations", "shared_with_openai", "eval_id", "usage_metrics", *CARRIED),
)


def read(path: Path) -> list[dict[str, Any]]:
    """The jobs of a file: a page of the API, a list, one job, or one a line."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise DataError(f"larger than {LARGEST_BYTES // 2**20} MiB", where=str(path))
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", where=str(path)) from error
    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    jobs = [one for one in value if isinstance(one, dict) and str(one.get("id", "")).startswith("ftjob-")]
    if not jobs or len(jobs) != len(value):
        hint = "write it with: json.dump([job.model_dump() for job in client.fine_tuning.jobs.list()], file)"
        raise DataError("this is no list of fine-tuning jobs", where=str(path), hint=hint)
    return jobs


def carry(old: Mapping[str, Any], files: Path, out: Path, base: Mapping[str, Any]) -> dict[str, Any]:
    """One job as a recipe below `out`; returns {job, recipe or None, told: what was not carried over}."""
    told = list(_lost(old))
    said: dict[str, Any] = {"job": str(old["id"]), "recipe": None, "told": told}
    try:
        asked = _asked(old)
        rows = {param: _source(files, str(old[param])) for param in ("training_file", "validation_file")
                if old.get(param)}  # fmt: skip
        carried = _written(asked, rows, out)
        counts = {param: count for param, (_, count) in carried.items()}
        settled = spec.settled(asked, counts["training_file"], counts.get("validation_file", 0))
        job = _job(old, asked, base, settled | {"max_length": spec.MAX_LENGTH})
        splits = {"training_file": "train", "validation_file": "validation"}
        paths = {splits[param]: path for param, (path, _) in carried.items()}
        made = spec.recipe(job, Terms(None), paths).as_dict()
        made["plan"] = {name: value for name, value in made["plan"].items() if value is not None}
        place = out / f"{job.id}.yaml"
        place.write_text(yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=100), "utf-8")
        said["recipe"] = str(place)
    except (Refused, DataError) as error:
        told.append(f"no recipe: {error.what}")
    except examine.Wrong as wrong:
        told.append(f"no recipe: {wrong.param}: {wrong.message}")
    except ValidationError as error:
        told.append(f"no recipe: {error.errors()[0]['msg']}")
    return said


def _lost(old: Mapping[str, Any]) -> Sequence[str]:
    told = [
        f"the weights of {old.get('model')!r} are not to be had; the recipe trains the base that you named"
    ]
    if old.get("fine_tuned_model"):
        told.append(f"{old['fine_tuned_model']} stays at OpenAI; the recipe makes a model of the same rows")
    if old.get("integrations"):
        told.append("integrations: no metrics are mirrored")
    if old.get("result_files"):
        told.append(f"result files are not needed: {', '.join(map(str, old['result_files']))}")
    told += [f"`{name}` is not known here and was left out" for name in old if name not in SILENT]
    return told


def _asked(old: Mapping[str, Any]) -> Create:
    """The request that would make such a job."""
    fields = {name: old[name] for name in CARRIED if old.get(name) is not None and name != "hyperparameters"}
    fields["suffix"] = NAME.sub("-", str(old.get("user_provided_suffix") or "").lower()).strip("-")
    method = fields.get("method")
    if isinstance(method, dict):
        fields["method"] = {name: _said(value) for name, value in method.items() if value is not None}
    elif old.get("hyperparameters"):
        fields["hyperparameters"] = _said(old["hyperparameters"])
    return parse(json.dumps({**fields, "model": str(old.get("model") or "unknown")}).encode())


def _said(value: Any) -> Any:
    """Without what was left null."""
    if not isinstance(value, dict):
        return value
    return {name: _said(inner) for name, inner in value.items() if inner is not None}


def _source(files: Path, file_id: str) -> Path:
    if not re.fullmatch(r"file-[A-Za-z0-9_-]{1,64}", file_id):
        raise DataError(f"{file_id[:80]!r} is not the id of a file")
    for name in (f"{file_id}.jsonl", file_id):
        if (files / name).is_file():
            return files / name
    raise DataError(
        f"{file_id}: put its content at {files / file_id}.jsonl (client.files.content({file_id!r}))"
    )


def _written(asked: Create, rows: Mapping[str, Path], out: Path) -> dict[str, tuple[str, int]]:
    """Each file's rows below `out`: their path from there, and how many they are."""
    method = asked.how
    grader = None if method.reinforcement is None else metrics.read(method.reinforcement.grader)
    found = {}
    for param, source in rows.items():
        name = f"rows/{source.stem}-{examine.KINDS[method.type].value}.jsonl"
        carried = examine.Carried(examine.KINDS[method.type], param, grader)
        found[param] = (name, examine.write(source, out / name, carried))
    return found


def _job(old: Mapping[str, Any], asked: Create, base: Mapping[str, Any], settled: Mapping[str, Any]) -> Job:
    short = NAME.sub("-", f"{asked.suffix or 'job'}-{str(old['id'])[-8:]}".lower()).strip("-")
    name = (short if short[0].isalpha() else f"job-{short}")[:48].rstrip("-")
    seed = asked.seed if asked.seed is not None else 17
    model = str(old.get("model") or "unknown")
    return Job(
        id=name, tenant="local", base=model, model=name, status="queued", asked=asked.model_dump(mode="json"),
        section=base, seed=seed, training_file=asked.training_file, training_sha256="",
        validation_file=asked.validation_file, validation_sha256=None, created_at=0, settled=settled,
    )  # fmt: skip
