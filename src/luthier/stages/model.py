"""Stage 2, model: a base reference becomes a plain folder with a digest, and the chat template is proved.

The folder holds safetensors in the wanted type, tokenizer and configuration, and nothing that can run.
The template check (`template.check`) goes over every row of the dataset before anything is trained: the
stop token is learnt, no mask is empty, and each training row begins with its serving prompt.
This stage does not know how to train, nor whether the base is any good at the task.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from luthier import artifacts, plugins, template
from luthier.errors import Interrupted, ModelError
from luthier.rows import Row, again
from luthier.sources import _licence, _weights
from luthier.stages import Event, Inputs

LABEL = "model"
SPLITS = ("train", "validation", "test")


def external(section: Any, root: Path) -> dict[str, str]:
    """What the model's source holds: one changed byte asks for a new base."""
    return dict(section.origin.module.fingerprint(section.origin.params, root))


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    licence = _licence.spdx(section.licence)
    if licence is None:
        raise ModelError(_licence.unknown(section.licence), where="model.licence", hint=_licence.HINT)

    def tell(message: str, done: int | None = None, total: int | None = None) -> None:
        if inputs.stopping():
            raise Interrupted("stopped while preparing the base model", hint="the same command goes on")
        inputs.tell(Event("model", message, done, total))

    origin = section.origin
    if set(origin.params.files) != {LABEL}:
        wrong = next((label for label in origin.params.files if label != LABEL), "")
        raise ModelError(plugins.unknown("label", wrong, (LABEL,)), where="model.from.files")
    source = origin.module.fetch(origin.params, inputs.root, inputs.cache, tell)[LABEL]
    digest = origin.module.fingerprint(origin.params, inputs.root)[LABEL]
    base, stated = _weights.prepare(source, digest, section.dtype, inputs.cache, tell)
    _same_licence(stated, licence)
    artifacts.link_tree(base, out / "base")
    tell("checking the chat template on every row")
    tokenizer = template.load_tokenizer(out / "base")
    proof = template.check(tokenizer, _rows(inputs.artefacts["data"]))
    about = _about(out / "base", len(tokenizer))
    about |= {"licence": licence, "source": origin.as_dict(), "dtype": section.dtype, "template_check": proof}
    artifacts.write_json(out / "base.json", about)
    keys = ("digest", "tokenizer_digest", "architecture", "parameters", "licence", "dtype")
    return {key: about[key] for key in keys} | {"template_check": proof}


def _same_licence(stated: str | None, declared: str) -> None:
    known = _licence.spdx(stated) if stated else None
    if known and known != declared:
        raise ModelError(
            f"the recipe says licence {declared}, the file itself says {known}",
            where="model.licence",
            hint="look at the giver's page, then correct the recipe",
        )


def _rows(data: Path) -> list[Row]:
    return [
        again(record) for split in SPLITS for record in artifacts.read_jsonl(data / "rows" / f"{split}.jsonl")
    ]


def _about(base: Path, vocabulary: int) -> dict[str, Any]:
    """What the base is, from the files themselves."""
    config = artifacts.read_json(base / _weights.CONFIG)
    tensors = _header(base / _weights.WEIGHTS)
    parameters = 0
    for tensor in tensors.values():
        size = 1
        for dimension in tensor["shape"]:
            size *= dimension
        parameters += size
    files = {path.name: artifacts.file_digest(path) for path in sorted(base.iterdir())}
    embedded = int(config.get("vocab_size", vocabulary))
    if vocabulary > embedded:
        raise ModelError(
            f"the tokenizer has {vocabulary} tokens, the model knows {embedded}",
            where=str(base),
            hint="this tokenizer belongs to another model",
        )
    return {
        "digest": artifacts.digest_of(files),
        "tokenizer_digest": artifacts.digest_of(
            {name: digest for name, digest in files.items() if name in _weights.TOKENIZER}
        ),
        "architecture": (config.get("architectures") or ["unknown"])[0],
        "parameters": parameters,
        "weights_bytes": (base / _weights.WEIGHTS).stat().st_size,
    }


def _header(path: Path) -> dict[str, Any]:
    """The tensors a safetensors file says it holds: 8 bytes of length, then JSON."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header
