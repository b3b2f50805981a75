"""LoRA: the frozen weight W of a linear layer gets a trained low-rank addition, W + (alpha / r) B A.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv 2106.09685). B starts
at zero, so the model starts as its base; A starts uniform within 1 / sqrt(d_in), PEFT's default. The
forward is PEFT's, and so are the files: `adapter_config.json` and `adapter_model.safetensors`, written
with the same bytes for the same weights (no versions, no local paths, no order of a set).

A linear of d_in by d_out has r (d_in + d_out) trained weights, kept in float32 whatever the base is in.
It does not know losses, quantised bases, embeddings or convolutions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import artifacts, plugins
from luthier.errors import ModelError

VERSION = 1
STARTS_AS_BASE = True  # B is 0: freshly attached it adds nothing
USUAL_SHARE = (0.0001, 0.01)  # of all weights that train; outside of it a plan says so
_HOST_FIELDS = ("peft_version", "auto_mapping", "revision", "runtime_config")


class Params(plugins.Params):
    r: int = Field(default=8, ge=1, le=1024)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="every linear but the head, or names such as q_proj"
    )


def attach(model: Any, params: Params, seed: int) -> Any:
    """Freeze the base and add the adapter; A is drawn from `seed` alone, not from torch's generator."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM", r=params.r, lora_alpha=params.alpha, lora_dropout=params.dropout,
        target_modules=params.targets if isinstance(params.targets, str) else list(params.targets),
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            adapted = get_peft_model(model, config)  # autocast_adapter_dtype: float32 adapters on a bf16 base
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name in linears(model)})
        raise ModelError(
            f"the adapter cannot be attached: {str(error).splitlines()[0]}",
            hint=f"linear layers here: {', '.join(names)}",
        ) from error
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            if ".lora_A." in name:
                bound = weight.shape[1] ** -0.5
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=noise))  # any device
            elif ".lora_B." in name:
                weight.zero_()
    return adapted


def linears(model: Any) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every linear layer but the head, by name."""
    from torch.nn import Linear

    head = model.get_output_embeddings()
    parts = model.named_modules()
    found = {name: part for name, part in parts if isinstance(part, Linear) and part is not head}
    return {name: (part.in_features, part.out_features) for name, part in found.items()}


def ranks(model: Any, params: Params) -> dict[str, int]:
    """The rank of each linear layer's addition, by the layer's name (`model` may be weightless)."""
    return {
        name: params.r
        for name in linears(model)
        if isinstance(params.targets, str)
        or any(name == target or name.endswith(f".{target}") for target in params.targets)
    }


def trainable(model: Any, params: Params) -> int:
    """Trained weights, without building them: the sum of r (d_in + d_out)."""
    found = linears(model)
    return sum(rank * sum(found[name]) for name, rank in ranks(model, params).items())


def report(model: Any) -> dict[str, float]:
    """How much of the model moves."""
    moving = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    frozen = sum(weight.numel() for weight in model.parameters() if not weight.requires_grad)
    return {"trainable_parameters": moving, "trainable_share": moving / (moving + frozen)}


def save(model: Any, folder: Path, base_name: str) -> None:
    """Write the adapter as plain PEFT files whose bytes depend on the weights and settings alone."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save as tensor_bytes

    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    ordered = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    config = {key: _plain(value) for key, value in model.peft_config["default"].to_dict().items()}
    for field in _HOST_FIELDS:
        config.pop(field, None)
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    data = tensor_bytes(ordered, metadata={"format": "pt"})
    artifacts.write_bytes(folder / "adapter_model.safetensors", data)
    artifacts.write_json(folder / "adapter_config.json", config)


def _plain(value: Any) -> Any:
    """JSON with one order: sets are sorted, enums are their values."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "value", value)


def load(model: Any, folder: Path) -> Any:
    """The adapter on its base, ready to answer."""
    from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError("no adapter_model.safetensors here", where=str(folder))
    return PeftModel.from_pretrained(model, str(folder)).eval()
