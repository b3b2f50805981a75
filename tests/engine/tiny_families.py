"""Tiny random decoders of several families, float32, with the engine's attention or transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from luthier.engine.attention import IMPLEMENTATION

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL, head_dim=16),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=5, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, head_dim=16, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: Phi3Config(**SMALL, sliding_window=7),
}


def make(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION).float().eval()
    with torch.no_grad():  # larger than the usual start, so that attention is far from uniform
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(4.0)
    return model
