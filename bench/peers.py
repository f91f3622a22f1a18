"""Other systems that can compute a family's forward: what `Op.peers` names. Each is imported only where it runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """Another system's forward."""

    call: Callable[..., Tensor]
    """On the inputs and options of an op."""
    needs: str = "torch"  # the module it is made with
    compile: bool = False  # whether it is made for torch.compile

    @property
    def available(self) -> bool:
        """Whether it can be imported here."""
        return importlib.util.find_spec(self.needs) is not None


def _with_heads(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four as (B, H, T, width) and (H, A)."""
    if query.dim() == 3:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    return query, key, value, v.expand(query.shape[1], -1)


def concat_flex(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, *, activation: str, window: tuple[None, None]
) -> Tensor:
    """FlexAttention: the product of its own query and key is 0, a score modification makes the additive score.

    A modification maps numbers to numbers, so the sum over features is unrolled and reads captured tensors.
    """
    from torch.nn.attention.flex_attention import flex_attention

    act = {"tanh": torch.tanh, "relu": torch.relu}[activation]
    q, k, value, weights = _with_heads(query, key, value, v)

    def additive(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        for d in range(q.shape[-1]):
            # Its scores are float32; so are these, which bf16 would round at each term.
            score = score + weights[h, d].float() * act(q[b, h, i, d].float() + k[b, h, j, d].float())
        return score

    nothing = [value.new_zeros(*x.shape[:3], 16) for x in (q, k)]  # 16: the narrowest that it takes
    return flex_attention(*nothing, value, score_mod=additive, scale=1.0).reshape(*query.shape[:-1], value.shape[-1])


def concat_keops(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, *, activation: str, window: tuple[None, None]
) -> Tensor:
    """KeOps: the formula on lazy tensors, compiled when it is first met. It has no bf16, so that is float32 here."""
    from pykeops.torch import LazyTensor

    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, value, weights = (x.to(dtype).contiguous() for x in _with_heads(query, key, value, v))
    z = LazyTensor(q[:, :, :, None]) + LazyTensor(k[:, :, None])
    act = z.relu() if activation == "relu" else 1 - 2 / (1 + (2 * z).exp())  # it has no tanh
    scores = (act * LazyTensor(weights[None, :, None, None])).sum(-1)
    out = scores.sumsoftmaxweight(LazyTensor(value[:, :, None]), axis=3)
    return out.to(value.dtype).reshape(*query.shape[:-1], value.shape[-1])


def general_sdpa(
    query: Tensor, key: Tensor, value: Tensor | None = None, *, scale: float, window: tuple[None, int | None]
) -> Tensor:
    """PyTorch's attention, by the backend that it chooses."""
    q, k, value = (x if x.dim() == 4 else x.unsqueeze(1) for x in (query, key, key if value is None else value))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, value, is_causal=window[1] == 0, scale=scale).reshape(*query.shape[:-1], value.shape[-1])


def general_flex(
    query: Tensor, key: Tensor, value: Tensor | None = None, *, scale: float, window: tuple[None, int | None]
) -> Tensor:
    """FlexAttention; the causal window as a block mask, which is made in the call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, value = (x if x.dim() == 4 else x.unsqueeze(1) for x in (query, key, key if value is None else value))
    blocks = None
    if window[1] == 0:
        sizes = (q.shape[2], k.shape[2])
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, *sizes, device=q.device)
    out = flex_attention(q, k, value, block_mask=blocks, scale=scale)
    return out.reshape(*query.shape[:-1], value.shape[-1])


def hierarchical_padded(
    h: Tensor, inner_offsets: Tensor, outer_offsets: Tensor, *, sentences: int, words: int, **scores: Tensor
) -> Tensor:
    """Eager PyTorch on documents padded to (G, sentences, words, D), which is part of the call, with masks."""

    def padded(rows: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        at = offsets[:-1, None] + torch.arange(longest, device=rows.device)
        shown = at < offsets[1:, None]
        absent = ~shown.view(*shown.shape, *[1] * (rows.dim() - 1))
        return rows[at.clamp(max=len(rows) - 1)].masked_fill(absent, 0), shown

    def pool(x: Tensor, shown: Tensor, level: str) -> Tensor:
        w, b, v = (scores[f"{level}_{part}"] for part in "wbv")
        # Not -inf: a sentence that is padding would be NaN.
        s = (torch.tanh(x @ w + b) @ v).masked_fill(~shown, torch.finfo(x.dtype).min)
        return (s.softmax(-1)[..., None] * x).sum(-2)

    by_sentence, seen = padded(h, inner_offsets, words)
    documents, present = padded(by_sentence, outer_offsets, sentences)
    seen, _ = padded(seen, outer_offsets, sentences)
    return pool(pool(documents, seen, "inner"), present, "outer")
