"""An adapter's files, read once they are safe to open: safetensors, finite, its own, and plain LoRA.

Source: PEFT's format (https://huggingface.co/docs/peft/developer_guides/checkpoint); scaling alpha / r, or
alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732). It does not know models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings under which loading an adapter would change the base itself, which every other adapter shares.
SHARED = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")
PLAIN_STARTS = (True, False, None, "gaussian")
VARIANTS = (
    "use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config", "lora_bias", "use_bdlora",
    "velora_config", "monteclora_config", "kasa_config", "fan_in_fan_out",
)  # fmt: skip
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Pair:
    """One linear layer's adapter: A (R, E) and B (O, R), what it adds being scale · B A x."""

    a_R_E: Tensor
    b_O_R: Tensor
    scale: float


def read(folder: Path, layers: Iterable[str]) -> dict[str, Pair]:
    """The pair of every layer that the adapter changes, by the layer's name in the base.

    Of the base's `layers`, those that its configuration names must all be there.
    """
    config, names = inspect(folder)
    if config["peft_type"] != "LORA" or any(config.get(variant) for variant in VARIANTS):
        raise ModelError(
            f"only plain LoRA adapters answer in one batch, this one is {config['peft_type']}"
            + "".join(f", {variant}" for variant in VARIANTS if config.get(variant)),
            where=str(folder / CONFIG),
            hint="merge it into a base of its own",
        )
    sides: dict[str, dict[str, Tensor]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        for name in sorted(names):
            known = KEY.fullmatch(name)
            if known is None:
                raise ModelError(f"{name} is no weight of a LoRA layer", where=str(folder / WEIGHTS))
            sides.setdefault(known["module"], {})[known["side"]] = tensors.get_tensor(name)
    found = {}
    for module, pair in sides.items():
        if (
            len(pair) != 2
            or pair["A"].ndim != 2
            or pair["B"].ndim != 2
            or len(pair["A"]) != pair["B"].shape[1]
        ):
            raise ModelError(f"{module}: A and B do not belong together", where=str(folder / WEIGHTS))
        found[module] = Pair(pair["A"], pair["B"], _scale(config, module, len(pair["A"])))
    missing = sorted(set(_targets(folder, layers)) - set(found))
    if missing:
        raise ModelError(f"{len(missing)} layer(s) are missing: {missing[0]}", where=str(folder / WEIGHTS))
    return found


def _targets(folder: Path, layers: Iterable[str]) -> list[str]:
    """The layers that PEFT would lay this adapter over."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
        return [name for name in layers if check_target_module_exists(config, name)]
    except (TypeError, ValueError, KeyError, AttributeError, re.error) as error:
        raise ModelError(f"PEFT cannot read its settings: {error}", where=str(folder / CONFIG)) from error


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _patterned(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(patterns: object, module: str, default: float) -> float:
    """PEFT's rule: the first pattern that the end of the module's name matches."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def inspect(adapter: Path) -> tuple[dict[str, Any], set[str]]:
    """An adapter's configuration and the names of its tensors, once its files are safe to open."""
    for path in sorted(adapter.iterdir()) if adapter.is_dir() else []:
        if path.suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"}:
            raise ModelError(
                f"{path.name} could run code when loaded", where=str(path), hint="safetensors only"
            )
    try:
        config = json.loads((adapter / CONFIG).read_text("utf-8"))
        with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
            keys = set(tensors.keys())
            bad = next(
                (key for key in sorted(keys) if not torch.isfinite(tensors.get_tensor(key)).all()), None
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"not an adapter folder ({CONFIG} and {WEIGHTS}): {error}", where=str(adapter)
        ) from error
    if bad is not None:
        raise ModelError(
            f"{bad} contains NaN or infinity", where=str(adapter / WEIGHTS), hint="train it again"
        )
    if not keys:
        raise ModelError("the adapter holds no tensor", where=str(adapter / WEIGHTS))
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ModelError("`peft_type` is missing", where=str(adapter / CONFIG))
    shared = [name for name in SHARED if config.get(name)]
    if config.get("bias", "none") != "none":
        shared.append("bias")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        shared.append("init_lora_weights")
    if shared or config.get("num_virtual_tokens"):
        raise ModelError(
            f"{', '.join(shared) or 'virtual tokens'}: such an adapter changes more than its own layers",
            where=str(adapter / CONFIG),
            hint="adapters here share one base and must leave it as it is",
        )
    return config, keys
