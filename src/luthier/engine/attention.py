"""Attention over documents laid end to end, where no token sees another document, and no T × T mask exists.

Source: scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) through torch's own kernel,
once per group of equally long neighbours; sliding windows as in Mistral (Jiang et al. 2023, arXiv
2310.06825): token q sees keys k with q - window < k <= q. It enters through transformers' attention
interface under the name `IMPLEMENTATION`, so every decoder family that uses that interface has it; with no
mask function under that name transformers builds no mask.

It does not know caches, padding, cross-attention, soft caps or sinks: what it does not know, it refuses.
`base.prove` compares a whole model against transformers' own path before it is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from luthier.errors import ModelError

IMPLEMENTATION = "luthier_documents"
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})


@dataclass(frozen=True)
class Documents:
    """Runs of equally long documents, as (first token, documents, tokens of each); built once per batch."""

    groups: tuple[tuple[int, int, int], ...]
    tokens: int

    @staticmethod
    def of(lengths_D: Sequence[int]) -> Documents:
        groups, start = [], 0
        for length, run in groupby(lengths_D):
            count = sum(1 for _ in run)
            groups.append((start, count, length))
            start += count * length
        return Documents(tuple(groups), start)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One layer's attention, as transformers calls it: query (1, heads, T, width) to (1, T, heads, width)."""
    documents = options.pop("documents", None)
    window, dropout, scaling = (options.pop(name, None) for name in ("sliding_window", "dropout", "scaling"))
    causal = options.pop("is_causal", None)
    if not isinstance(documents, Documents):
        raise ModelError("this model is set up for packed training, and was called without its documents")
    unknown = sorted(name for name, value in options.items() if name not in _HARMLESS and value is not None)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if causal is False or not getattr(module, "is_causal", True):
        unknown.append("bidirectional attention")
    if unknown:
        raise ModelError(
            f"{type(module).__name__} asks for attention this engine does not know: {', '.join(unknown)}",
            hint="choose a plain causal decoder (Llama, Qwen, Mistral, Gemma 3, Phi 3 …)",
        )
    if query.shape[0] != 1 or query.shape[2] != documents.tokens or key.shape[2] != documents.tokens:
        raise ModelError(f"{query.shape[2]} tokens do not make documents of {documents.tokens}")
    parts = [
        _group(query[0], key[0], value[0], group, (window, dropout or 0.0, scaling))
        for group in documents.groups
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _group(
    q_HTE: Tensor,
    k_HTE: Tensor,
    v_HTE: Tensor,
    group: tuple[int, int, int],
    how: tuple[int | None, float, float | None],
) -> Tensor:
    """Attention of `count` documents of one length, as one batch: (count × length, heads, width)."""
    start, count, length = group
    window, dropout, scaling = how

    def cut(x_HTE: Tensor) -> Tensor:
        heads, _, width = x_HTE.shape
        return x_HTE[:, start : start + count * length].view(heads, count, length, width).transpose(0, 1)

    narrow = window is not None and window < length
    out = scaled_dot_product_attention(
        cut(q_HTE), cut(k_HTE), cut(v_HTE),
        attn_mask=_window(length, window, q_HTE.device) if narrow and window is not None else None,
        dropout_p=dropout, is_causal=not narrow, scale=scaling, enable_gqa=q_HTE.shape[0] != k_HTE.shape[0],
    )  # fmt: skip
    return out.transpose(1, 2).reshape(count * length, q_HTE.shape[0], v_HTE.shape[-1])


def _window(length: int, window: int, device: torch.device) -> Tensor:
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None, :]
    return (behind >= 0) & (behind < window)


AttentionInterface.register(IMPLEMENTATION, attend)
