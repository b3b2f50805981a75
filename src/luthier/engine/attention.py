"""Attention over documents laid end to end, where no token sees another document, and no T × T mask exists.

Source: scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) and its gradient as matrix
products; sliding windows as in Mistral (Jiang et al. 2023, arXiv 2310.06825): token q sees keys k with
q - window < k <= q. Short documents of like length share one batched product: padding behind a document's
end changes nothing before it, as no token looks ahead, and is dropped at once. Long ones go through torch's
own kernel, which never holds the L × L scores. It enters through transformers' attention interface under
the name `IMPLEMENTATION`, so every decoder family that uses that interface has it; with no mask function
under that name transformers builds no mask.

It does not know caches, cross-attention, soft caps or sinks: what it does not know, it refuses.
`base.prove` compares a whole model against transformers' own path before it is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from luthier.errors import ModelError

IMPLEMENTATION = "luthier_documents"
SHORT = 256  # tokens; below it the scores of a document are cheap to hold, and dear to stream
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})


@dataclass(frozen=True)
class Group:
    """Neighbouring documents that attend in one call, each laid out over `length` places.

    spread_P: for each of documents × length places, the token that lies there (any token, behind the end).
    gather_T: for each of the group's tokens, its place.
    """

    start: int
    tokens: int
    documents: int
    length: int
    spread_P: Tensor
    gather_T: Tensor


@dataclass(frozen=True)
class Documents:
    """How a batch's tokens fall into documents; built once per batch, used by every layer."""

    groups: tuple[Group, ...]
    tokens: int

    @staticmethod
    def of(lengths_D: Sequence[int]) -> Documents:
        """Group neighbours: short ones unless one is more than twice another, long ones if equal."""
        runs: list[list[int]] = []
        for length in lengths_D:
            like = runs and (
                length == runs[-1][0]
                or (max(length, *runs[-1]) <= SHORT and 2 * min(length, *runs[-1]) >= max(length, *runs[-1]))
            )
            if like:
                runs[-1].append(length)
            else:
                runs.append([length])
        groups, start = [], 0
        for run in runs:
            groups.append(_group(start, run))
            start += sum(run)
        return Documents(tuple(groups), start)


def _group(start: int, lengths: Sequence[int]) -> Group:
    longest, begin = max(lengths), start
    spread, gather = [], []
    for number, length in enumerate(lengths):
        place = torch.arange(longest)
        spread.append(begin + place.clamp(max=length - 1))
        gather.append(number * longest + place[:length])
        begin += length
    return Group(start, begin - start, len(lengths), longest, torch.cat(spread), torch.cat(gather))


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
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    parts = []
    for group in documents.groups:
        if group.length <= SHORT and not dropout:
            mask = _hidden(group.length, window, query.device)
            part = _Short.apply(query[0], key[0], value[0], group, (mask, scale))  # type: ignore[no-untyped-call]
        else:
            part = _long(query[0], key[0], value[0], group, (window, dropout or 0.0, scale))
        parts.append(part)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _hidden(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) must not see a key (column)."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None, :]
    return (behind < 0) if window is None else (behind < 0) | (behind >= window)


class _Short(torch.autograd.Function):
    """softmax(Q K^T) V of one group, with probabilities kept for the way back; heads share keys in groups."""

    @staticmethod
    def forward(
        ctx: Any, q_HTE: Tensor, k_KTE: Tensor, v_KTE: Tensor, group: Group, how: tuple[Tensor, float]
    ) -> Tensor:
        mask_LL, scale = how
        q, k, v = (_spread(x, group, k_KTE.shape[0]) for x in (q_HTE, k_KTE, v_KTE))
        scores = torch.bmm(q, k.transpose(1, 2)).float().mul_(scale)
        scores.view(len(q), -1, *mask_LL.shape).masked_fill_(mask_LL, -torch.inf)
        weights = torch.softmax(scores, dim=-1).to(q.dtype)
        out = torch.bmm(weights, v)
        ctx.save_for_backward(q, k, v, weights)
        ctx.group, ctx.scale, ctx.shapes = group, scale, (q_HTE.shape, k_KTE.shape, v_KTE.shape)
        return _gather(out, group, q_HTE.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_TH_: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        group: Group = ctx.group
        shapes = ctx.shapes
        heads, kv_heads, tokens = shapes[0][0], shapes[1][0], shapes[0][1]
        places = grad_TH_.new_zeros(group.documents * group.length, heads, grad_TH_.shape[-1])
        places[group.gather_T] = grad_TH_  # nothing flows back from behind a document's end
        grad = _stacked(places, group, kv_heads)
        v_grad = torch.bmm(weights.transpose(1, 2), grad)
        slope = torch.bmm(grad, v.transpose(1, 2)).float()
        slope -= (slope * weights).sum(-1, keepdim=True)
        slope = slope.mul_(weights).mul_(ctx.scale).to(q.dtype)
        q_grad, k_grad = torch.bmm(slope, k), torch.bmm(slope.transpose(1, 2), q)
        sent = []
        for found, count in ((q_grad, heads), (k_grad, kv_heads), (v_grad, kv_heads)):
            whole = found.new_zeros(tokens, count, found.shape[-1])
            whole[group.start : group.start + group.tokens] = _gather(found, group, count)
            sent.append(whole.transpose(0, 1))
        return *sent, None, None


def _spread(x_HTE: Tensor, group: Group, kv_heads: int) -> Tensor:
    return _stacked(x_HTE.transpose(0, 1).index_select(0, group.spread_P), group, kv_heads)


def _stacked(x_PHE: Tensor, group: Group, kv_heads: int) -> Tensor:
    """(documents × kv heads, heads per kv head × length, width): one matrix for each key head."""
    _, heads, width = x_PHE.shape
    x_DHLE = x_PHE.view(group.documents, group.length, heads, width).transpose(1, 2)
    return x_DHLE.reshape(group.documents * kv_heads, heads // kv_heads * group.length, width)


def _gather(x: Tensor, group: Group, heads: int) -> Tensor:
    """Undo `_stacked` and drop what lies behind a document's end: (tokens, heads, width)."""
    x_DHLE = x.view(group.documents, heads, group.length, x.shape[-1])
    return x_DHLE.transpose(1, 2).reshape(-1, heads, x.shape[-1]).index_select(0, group.gather_T)


def _long(
    q_HTE: Tensor, k_HTE: Tensor, v_HTE: Tensor, group: Group, how: tuple[int | None, float, float]
) -> Tensor:
    """The same through torch's kernel, which streams the scores: (tokens, heads, width)."""
    window, dropout, scale = how
    narrow = window is not None and window < group.length

    def cut(x_HTE: Tensor) -> Tensor:
        x_HDLE = x_HTE.index_select(1, group.spread_P).view(
            -1, group.documents, group.length, x_HTE.shape[-1]
        )
        return x_HDLE.transpose(0, 1)

    out_DHLE = scaled_dot_product_attention(
        cut(q_HTE), cut(k_HTE), cut(v_HTE),
        attn_mask=~_hidden(group.length, window, q_HTE.device) if narrow else None,
        dropout_p=dropout, is_causal=not narrow, scale=scale, enable_gqa=q_HTE.shape[0] != k_HTE.shape[0],
    )  # fmt: skip
    out_PHE = out_DHLE.transpose(1, 2).reshape(-1, q_HTE.shape[0], v_HTE.shape[-1])
    return out_PHE.index_select(0, group.gather_T)


AttentionInterface.register(IMPLEMENTATION, attend)
