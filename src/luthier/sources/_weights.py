"""A model as it comes (a folder or one GGUF file) → a plain folder: config, safetensors, tokenizer.

Sources: the Hugging Face model folder; GGUF (github.com/ggml-org/ggml, docs/gguf.md) as transformers reads
it. Quantised GGUF weights are de-quantised in float32 and rounded once to the wanted type, so they are the
file's weights, not those of the model it was made from. The result is made once per source content and
type, and kept in the cache, sealed; a half-made one is never used. The same input gives the same bytes.

Safetensors only: pickles, folders with code of their own, and already quantised folders are refused.
This module does not know rows, recipes or adapters.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luthier import artifacts
from luthier.errors import LuthierError, ModelError, StoreError

VERSION = 1  # raise it when the same source would give other bytes
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack", ".npz")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model"),
)
ABANDONED_S = (
    24 * 3600.0
)  # a conversion that was killed leaves its folder; after a day nobody is at work in it
ABOUT = "about.json"
Tell = Callable[[str, int | None, int | None], None]
CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"


def prepare(source: Path, digest: str, dtype: str, cache: Path, tell: Tell) -> tuple[Path, str | None]:
    """The plain folder for `source`, whose content is `digest`, and the licence the file itself states.

    Converted unless the cache has it.
    """
    key = artifacts.digest_of({"source": digest, "dtype": dtype, "version": VERSION})
    kept = cache / "bases" / key
    if kept.exists():
        try:
            artifacts.verify(kept)
            return _kept(kept)
        except StoreError:
            tell("the converted model in the cache is damaged; it is made again", None, None)
            shutil.rmtree(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for left in kept.parent.glob(".convert-*"):
        if time.time() - left.stat().st_mtime > ABANDONED_S:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=kept.parent) as folder:
        made = Path(folder) / key
        (made / "base").mkdir(parents=True)
        tell(f"converting {source.name} to {dtype} safetensors", None, None)
        try:
            _convert(source, dtype, made / "base", tell)
            licence = _stated_licence(source) if source.is_file() else None
        except OSError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise _disk_full(first, kept) or ModelError(
                f"cannot be converted: {first}", where=str(source)
            ) from error
        artifacts.write_json(made / ABOUT, {"licence": licence})
        artifacts.seal(made)
        artifacts.publish(made, kept)
    return _kept(kept)


def _stated_licence(source: Path) -> str | None:
    """The licence that a GGUF file states about itself, if it states one."""
    import gguf

    field = gguf.GGUFReader(source).get_field("general.license")
    return str(field.contents()) if field else None


def _kept(kept: Path) -> tuple[Path, str | None]:
    return kept / "base", artifacts.read_json(kept / ABOUT)["licence"]


def inspect(folder: Path) -> None:
    """Refuse a folder that holds anything but data: pickles, code, another quantisation."""
    where = str(folder)
    if not (folder / CONFIG).is_file():
        hint = "point at a Hugging Face model folder or a .gguf"
        raise ModelError("there is no config.json", where=where, hint=hint)
    for name in (CONFIG, "tokenizer_config.json", "processor_config.json"):
        if (folder / name).is_file() and "auto_map" in _json(folder / name):
            raise ModelError(
                f"{name} asks for code of its own (`auto_map`); luthier never runs code from a model folder",
                where=where,
                hint="use a model whose architecture is part of transformers",
            )
    pickles = sorted(item.name for item in folder.iterdir() if item.suffix.lower() in PICKLES)
    if pickles:
        raise ModelError(
            f"{pickles[0]} may hold pickled code; only safetensors are loaded",
            where=where,
            hint="convert the weights to safetensors and remove this file from the folder",
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError("there are no safetensors weights", where=where)
    if "quantization_config" in _json(folder / CONFIG):
        raise ModelError(
            "the weights are quantised", where=where, hint="use the unquantised folder or a GGUF"
        )


def _convert(source: Path, dtype: str, out: Path, tell: Tell) -> None:
    """Write the plain folder; what the tokenizer says about stop and padding goes into the configuration."""
    from transformers import AutoTokenizer

    gguf = source.is_file()
    if gguf and source.suffix.lower() != ".gguf":
        raise ModelError("neither a model folder nor a .gguf file", where=str(source))
    if not gguf:
        inspect(source)
    folder = str(source.parent if gguf else source)
    options = {"local_files_only": True, "trust_remote_code": False} | (
        {"gguf_file": source.name} if gguf else {}
    )
    with _quiet(tell), _readable(source):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if gguf:
            tokenizer.save_pretrained(out)
            _tidy(out / "tokenizer_config.json", "is_local", "local_files_only", "name_or_path")
        else:
            for name in TOKENIZER:
                if (source / name).is_file():
                    shutil.copyfile(source / name, out / name)
        model = _loaded(folder, dtype, source, options)
        model.save_pretrained(out, max_shard_size="1000GB")
    _tidy(out / CONFIG, "_name_or_path", "_model_name_or_path", "transformers_version")
    kept = _json(source / GENERATION) if not gguf and (source / GENERATION).is_file() else {}
    artifacts.write_json(out / GENERATION, _generation(tokenizer, kept))


def _loaded(folder: str, dtype: str, source: Path, options: Mapping[str, Any]) -> Any:
    """The model with every weight present, in the wanted type, with no trace of a quantisation."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = ", ".join(sorted(map(str, report[kind]))[:5])
            raise ModelError(
                f"the weights do not fit the architecture: {kind.replace('_', ' ')}: {names}",
                where=str(source),
            )
    if getattr(model, "hf_quantizer", None) is not None:
        # transformers (5.23) calls a GGUF model "not serializable" though its weights are plain by now
        model.hf_quantizer = None
        del model.config.quantization_config
    if any(type(p.data) is not torch.Tensor or p.dtype is not torch.float32 for p in model.parameters()):
        raise ModelError(
            "the weights stayed packed", where=str(source), hint="uninstall the `kernels` package"
        )
    return model.to(getattr(torch, dtype))


def _generation(tokenizer: Any, kept: dict[str, Any]) -> dict[str, Any]:
    """generation_config.json: the folder's own, made to stop where the tokenizer stops."""
    stops = kept.get("eos_token_id")
    known = stops if isinstance(stops, list) else [stops]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in known:
        kept["eos_token_id"] = tokenizer.eos_token_id
    if kept.get("pad_token_id") is None:
        kept["pad_token_id"] = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    kept.setdefault("bos_token_id", tokenizer.bos_token_id)
    return {key: value for key, value in kept.items() if key != "transformers_version" and value is not None}


@contextmanager
def _quiet(tell: Tell) -> Iterator[None]:
    """Without transformers' own warnings and bars; where it counts GGUF tensors, we tell."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    def counted(items: Collection[Any], **_: Any) -> Iterator[Any]:
        for n, item in enumerate(items):
            if n % 16 == 0:
                tell("de-quantising tensors", n, len(items))
            yield item

    level, bars, bar = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        getattr(reader, "tqdm", None),
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = counted
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Name the model when transformers, tokenizers or gguf cannot read it, whatever they raise."""
    try:
        yield
    except (LuthierError, OSError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _disk_full(first, source) or ModelError(
            f"cannot be loaded: {first}", where=str(source)
        ) from error


def _disk_full(message: str, where: Path) -> StoreError | None:
    """safetensors and transformers report a full disk in words only."""
    if "No space left" not in message:
        return None
    return StoreError(
        "the disk is full", where=str(where), hint="free some space, then run the same command again"
    )


def _tidy(path: Path, *noise: str) -> None:
    """Drop what says how and by which version a file was written, not what is in the model."""
    artifacts.write_json(path, {key: value for key, value in _json(path).items() if key not in noise})


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("not a JSON object", where=str(path))
    return value
