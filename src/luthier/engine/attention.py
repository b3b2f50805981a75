"""Attention over documents laid end to end, where no token sees another document, and no T × T mask exists.

Source: scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) and its gradient as matrix
products; sliding windows as in Mistral (Jiang et al. 2023, arXiv 2310.06825): token q sees keys k with
q - window < k <= q. Documents of like length share one batched product (`engine.documents`). Probabilities of
short documents are kept for the way back. Long ones attend in blocks of queries, each with the keys up to its
own end, and their probabilities are computed again. Very long ones, if no window is shorter than they are,
and those with dropout go through torch's own kernel, one by one (`engine.varlen`). Where `engine.flash` has
instructions for it, all of this is its work.

What documents share is attended to where it lies, and computed once. Queries are a document's own tokens,
keys the path's and its own. Those that follow the same path share one product over its keys, whose gradient
is the sum of what they all send back.

It enters through transformers' attention interface under the name `IMPLEMENTATION`, so every decoder family
that uses that interface has it; with no mask function under that name transformers builds no mask.

It does not know caches, cross-attention, soft caps or sinks: what it does not know, it refuses.
`base.prove` compares a whole model against transformers' own path before it is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from luthier.engine import flash, varlen
from luthier.engine.documents import Documents, Group
from luthier.engine.kernels import PLAIN, Kernels, Seen
from luthier.errors import ModelError

IMPLEMENTATION = "luthier_documents"
LONG = 2048  # tokens; beyond it the scores of one document are too many to hold even for a moment
Qkv = tuple[Tensor, Tensor, Tensor]  # (T, heads, width), and keys and values (T, key heads, width)
Turn = tuple[Tensor, Tensor]  # rotary cos and sin, each (T, rotated width)
KeysValues = tuple[Tensor, Tensor]  # or their gradients
_HARMLESS = frozenset({"position_ids", "use_cache", "cache_position", "output_attentions"})


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
    how = How(window, scale, dropout or 0.0)
    for listener in _listeners:
        listener.append(how)
    q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    return over_documents((q_THE, k_TKE, v_TKE), None, documents, how).unsqueeze(0), None


_listeners: list[list[How]] = []


@contextmanager
def hearing(heard: list[How]) -> Iterator[None]:
    """Note what attention layers ask for while this lasts."""
    _listeners.append(heard)
    try:
        yield
    finally:
        _listeners.remove(heard)


@dataclass(frozen=True)
class How:
    """What a layer's attention is: how far back it sees, what multiplies its scores, what it drops."""

    window: int | None
    scale: float
    dropout: float = 0.0
    formulas: Kernels = PLAIN


def over_documents(qkv: Qkv, turn: Turn | None, documents: Documents, how: How) -> Tensor:
    """Attention of each document over itself: (T, heads, width). `turn`: rotary tables, if still to do."""
    q_THE, k_TKE, v_TKE = qkv
    if how.formulas.flash and not how.dropout and flash.takes(q_THE, turn):
        return flash.attention(qkv, turn, documents.units, flash.Sight(how.window, how.scale))
    if q_THE.is_cuda or how.dropout or _beyond(documents, how.window):
        return _one_by_one(qkv, turn, documents, how)
    at = (turn, documents, how)
    out_THE: Tensor = _Attention.apply(q_THE, k_TKE, v_TKE, at)  # type: ignore[no-untyped-call]
    return out_THE


def _one_by_one(qkv: Qkv, turn: Turn | None, documents: Documents, how: How) -> Tensor:
    """Through torch's own kernels, or those of a GPU."""
    q_THE, k_TKE = _turned(qkv[:2], turn, how)
    v_TKE = qkv[2].contiguous()  # a part would keep alive what it was cut from
    laid = varlen.layout(documents.lengths_D, documents.parents_D, q_THE.device)
    return varlen.over_documents(
        (q_THE, k_TKE, v_TKE), laid, varlen.Sight(how.window, how.scale, how.dropout)
    )


def _beyond(documents: Documents, window: int | None) -> bool:
    """Whether torch's own kernel is better: where scores are too many, if it needs no mask of all pairs."""
    longest = max(group.reach for group in documents.groups)
    return longest > LONG and (window is None or window >= longest)


def _turned(queries_and_keys: tuple[Tensor, Tensor], turn: Turn | None, how: How) -> tuple[Tensor, Tensor]:
    """Rotated, if that is still to do; only the tables are kept for the way back, once for all layers."""
    if turn is None:
        return queries_and_keys
    q_THE, k_TKE = queries_and_keys
    formulas = how.formulas.turn, how.formulas.unturn
    return varlen.turned(q_THE, turn, formulas), varlen.turned(k_TKE, turn, formulas)


class _Attention(torch.autograd.Function):
    """softmax(Q K^T) V, a group of documents at a time; probabilities are kept where documents are short."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, at: tuple[Turn | None, Documents, How]
    ) -> Tensor:
        turn, documents, how = at
        kv_heads = k_TKE.shape[1]
        out_THE = q_THE.new_empty(q_THE.shape)
        kept: list[Tensor] = []
        laid: list[KeysValues] = []
        for group in documents.groups:
            q, k, v = _laid_out((q_THE, k_TKE, v_TKE), turn, group, how)
            laid.append((k, v))
            k_far, v_far = _path(laid, group, kv_heads)
            kept += [q, k, v]
            mixed = torch.empty_like(q) if len(group.blocks) > 1 else q
            for block in group.blocks:
                near = slice(0, block[1])
                weights = _weights(_queries(q, group, block), (k[:, near], k_far), (group, block), how)
                part = _mixed(weights, v[:, near], v_far)
                mixed = _put(mixed, part, group, block)
            if group.short:
                kept.append(weights)
            out_THE[group.start : group.start + group.tokens] = _gather(mixed, group, q_THE.shape[1])
        ctx.save_for_backward(*(turn or (None, None)), *kept)
        ctx.documents, ctx.how, ctx.heads = documents, how, (q_THE.shape[1], kv_heads)
        return out_THE

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *kept = ctx.saved_tensors
        turn, how, groups = None if cos is None else (cos, sin), ctx.how, ctx.documents.groups
        heads, kv_heads = ctx.heads
        tokens, width = len(grad_THE), grad_THE.shape[-1]
        sent = [grad_THE.new_empty(tokens, count, width) for count in (heads, kv_heads, kv_heads)]
        tensors = iter(kept)
        held = [[next(tensors) for _ in range(4 if group.short else 3)] for group in groups]
        laid = [(k, v) for _, k, v, *_ in held]
        owed: dict[int, KeysValues] = {}  # to keys and values of groups that later ones follow
        for number, group in reversed(list(enumerate(groups))):
            part = slice(group.start, group.start + group.tokens)
            grad = _spread(grad_THE[part], group, kv_heads)
            found, due = _group_backward(held[number], _path(laid, group, kv_heads), grad, (group, how))
            for owing in due:
                _owe(owed, laid, group, owing)
            if number in owed:
                more = owed.pop(number)
                found = [found[0], *((x + y).to(x.dtype) for x, y in zip(found[1:], more, strict=True))]
            for whole, piece, turned in zip(sent, found, (turn, turn, None), strict=True):
                flat = _gather(piece, group, whole.shape[1])
                whole[part] = flat if turned is None else how.formulas.unturn(flat, cos[part], sin[part])
        return *sent, None


def _group_backward(
    held: Sequence[Tensor], far: KeysValues | tuple[None, None], grad: Tensor, whose: tuple[Group, How]
) -> tuple[list[Tensor], list[KeysValues]]:
    """The gradients of a group's queries, keys and values, and what its path is owed."""
    (q, k, v, *weighed), (k_far, v_far), (group, how) = held, far, whose
    whole = len(group.blocks) == 1
    q_grad = torch.empty_like(q)
    # Several blocks add to one key, so they do it in float32.
    k_grad, v_grad = (torch.zeros_like(x, dtype=x.dtype if whole else torch.float32) for x in (k, v))
    due: list[KeysValues] = []
    for block in group.blocks:
        near = slice(0, block[1])
        q_part, grad_part = (_queries(x, group, block) for x in (q, grad))
        weights = weighed[0] if weighed else _weights(q_part, (k[:, near], k_far), (group, block), how)
        v_part, v_owed = _collected(weights, grad_part, v_far)
        against = _against(grad_part, v[:, near], v_far)
        slope = how.formulas.soften_backward(against, weights, _seen(group, block, how), how.scale)
        k_part, k_owed = _collected(slope, q_part, k_far)
        q_grad = _put(q_grad, _mixed(slope, k[:, near], k_far), group, block)
        if whole:
            k_grad, v_grad = k_part, v_part
        else:
            k_grad[:, near] += k_part
            v_grad[:, near] += v_part
        if k_owed is not None and v_owed is not None:
            due.append((k_owed, v_owed))
    return [q_grad, k_grad.to(k.dtype), v_grad.to(v.dtype)], due


def _queries(x: Tensor, group: Group, block: tuple[int, int]) -> Tensor:
    """The rows of a block's queries: (K · documents, heads per K · block, width)."""
    if block == (0, group.length):
        return x
    x_NGLE = x.view(len(x), -1, group.length, x.shape[-1])
    return x_NGLE[:, :, slice(*block)].reshape(len(x), -1, x.shape[-1])


def _put(whole: Tensor, part: Tensor, group: Group, block: tuple[int, int]) -> Tensor:
    """`whole` with the rows of a block's queries set."""
    if block == (0, group.length):
        return part
    whole_NGLE = whole.view(len(whole), -1, group.length, whole.shape[-1])
    whole_NGLE[:, :, slice(*block)] = part.view(len(whole), -1, block[1] - block[0], whole.shape[-1])
    return whole


def _spread(x_THE: Tensor, group: Group, kv_heads: int) -> Tensor:
    """A group's tokens in their places, 0 behind a document's end, as `_stacked` has them."""
    if group.even:
        return _stacked(x_THE, group, kv_heads)
    places = x_THE.new_zeros(group.documents * group.length, *x_THE.shape[1:])
    return _stacked(places.index_copy_(0, group.gather_T, x_THE), group, kv_heads)


def _path(laid: Sequence[KeysValues], group: Group, kv_heads: int) -> KeysValues | tuple[None, None]:
    """Keys and values that a group's documents all see before their own: (kv heads, before, width) each."""
    if not group.path:
        return None, None

    def joined(kind: int) -> Tensor:
        parts = [_document(laid[at][kind], kv_heads, number)[:, :length] for at, number, length in group.path]
        return torch.cat(parts, dim=1)

    return joined(0), joined(1)


def _document(x: Tensor, kv_heads: int, number: int) -> Tensor:
    """One document's part of what a group laid out: (kv heads, length, width)."""
    return x.view(kv_heads, -1, *x.shape[1:])[:, number]


def _owe(owed: dict[int, KeysValues], laid: Sequence[KeysValues], group: Group, found: KeysValues) -> None:
    """Note the gradient of a group's path with the groups it lies in; in float32, as many may add to it."""
    begin, kv_heads = 0, len(found[0])
    for at, number, length in group.path:
        if at not in owed:
            k, v = laid[at]
            owed[at] = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for sum_, piece in zip(owed[at], found, strict=True):
            _document(sum_, kv_heads, number)[:, :length] += piece[:, begin : begin + length]
        begin += length


def _against(x: Tensor, near: Tensor, far: Tensor | None) -> Tensor:
    """x · (far, near)ᵀ: of each query with the path, which all documents share, and with its own document."""
    if far is None:
        return torch.bmm(x, near.transpose(1, 2))
    before = far.shape[1]
    scores = x.new_empty(*x.shape[:2], before + near.shape[1])
    torch.bmm(_joined(x, far), far.transpose(1, 2), out=_joined(scores, far)[..., :before])
    torch.bmm(x, near.transpose(1, 2), out=scores[..., before:])
    return scores


def _mixed(weights: Tensor, near: Tensor, far: Tensor | None) -> Tensor:
    """weights · (far, near)."""
    if far is None:
        return torch.bmm(weights, near)
    before = far.shape[1]
    path = torch.bmm(_joined(weights, far)[..., :before], far)
    return path.view(*weights.shape[:2], -1).baddbmm_(weights[..., before:], near)


def _collected(weights: Tensor, x: Tensor, far: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weightsᵀ · x: for each document's own tokens, and for the path as a sum over its documents."""
    if far is None:
        return torch.bmm(weights.transpose(1, 2), x), None
    before = far.shape[1]
    path = torch.bmm(_joined(weights, far)[..., :before].transpose(1, 2), _joined(x, far))
    return torch.bmm(weights[..., before:].transpose(1, 2), x), path


def _joined(x: Tensor, far: Tensor) -> Tensor:
    """(K · documents, M, …) as (K, documents · M, …): all that one key head of a path is multiplied with."""
    return x.view(len(far), -1, x.shape[-1])


def _laid_out(qkv: Qkv, turn: Turn | None, group: Group, how: How) -> list[Tensor]:
    """Query, key and value of a group, rotated, one matrix for each key head: (K · documents, …, width)."""
    kv_heads, found = qkv[1].shape[1], []
    for x, turned in zip(qkv, (turn, turn, None), strict=True):
        part = slice(group.start, group.start + group.tokens)
        flat = x[part] if turned is None else how.formulas.turn(x[part], turned[0][part], turned[1][part])
        found.append(_stacked(flat if group.even else flat.index_select(0, group.spread_P), group, kv_heads))
    return found


def _weights(
    q: Tensor, keys: tuple[Tensor, Tensor | None], at: tuple[Group, tuple[int, int]], how: How
) -> Tensor:
    """Attention probabilities (K · documents, heads per K · block, keys) in the number type of `q`."""
    weights: Tensor = how.formulas.soften(_against(q, *keys), _seen(*at, how), how.scale)
    return weights


def _seen(group: Group, block: tuple[int, int], how: How) -> Seen:
    return Seen(block[1] - block[0], group.before + block[0], how.window)


def _stacked(x_PHE: Tensor, group: Group, kv_heads: int) -> Tensor:
    """(kv heads · documents, heads per kv head · length, width): one matrix for each key head.

    Those of one key head are neighbours, so that a path's keys meet all of them in one product (`_joined`).
    """
    _, heads, width = x_PHE.shape
    x_DLKGE = x_PHE.view(group.documents, group.length, kv_heads, heads // kv_heads, width)
    laid = x_DLKGE.permute(2, 0, 3, 1, 4).reshape(kv_heads * group.documents, -1, width)
    return laid.contiguous()  # a view would keep the wide product alive that it was cut from


def _gather(x: Tensor, group: Group, heads: int) -> Tensor:
    """Undo `_stacked` and drop what lies behind a document's end: (tokens, heads, width)."""
    x_KDGLE = x.view(len(x) // group.documents, group.documents, -1, group.length, x.shape[-1])
    x_PHE = x_KDGLE.permute(1, 3, 0, 2, 4).reshape(-1, heads, x.shape[-1])
    return x_PHE if group.even else x_PHE.index_select(0, group.gather_T)


AttentionInterface.register(IMPLEMENTATION, attend)
