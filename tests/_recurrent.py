"""Inputs of word-by-word attention for its test files."""

import functools
import math
from dataclasses import dataclass

import _pairwise
import torch
from _compare import Operator, assert_matches_reference
from _concat import split_rows
from _location import offsets
from torch import Tensor

from fused_attn import word_by_word_attention

PARAMETERS = ("w_y", "w_h", "w_r", "w", "w_t")
FLOATING = ("premise", "hypothesis", *PARAMETERS, "state")


def operator(**options) -> Operator:
    """`word_by_word_attention` as the comparator wants it; the options are fixed."""

    def op(*, impl: str, premise: Tensor, hypothesis: Tensor, w_y, w_h, w_r, w, w_t, **rest):
        return word_by_word_attention(premise, hypothesis, w_y, w_h, w_r, w, w_t, **options, **rest, impl=impl)

    return op


@dataclass(frozen=True)
class Case(_pairwise.Factors):
    """One call: the values of the factors that the tests vary."""

    dtype: torch.dtype = torch.float32
    batch: int = 2  # sequences, where padded
    premise: int = 9  # words of a premise, or all packed ones
    hypothesis: int = 4
    dim: int = 7
    hypothesis_dim: int = 5
    attn_dim: int = 6
    state: bool = False
    mask: str = "none"  # none, some, padding, empty (of a sequence no word is seen) or expanded (stride 0)
    ragged: bool = False
    alone: str = ""  # of ragged batches: "premise" or "hypothesis", where the other is padded
    layout: str = "contiguous"  # contiguous, swapped (the first two axes) or strided (the last one)
    return_weights: bool = True  # where the premise is padded

    @property
    def op(self) -> Operator:
        return operator(return_weights=self.return_weights and not self.packed("premise"))

    def packed(self, side: str) -> bool:
        return self.ragged and self.alone in ("", side)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs by name; the same on every device."""
        rng = torch.Generator().manual_seed(1)

        def made(*shape: int, scale: float = 1.0) -> Tensor:
            return self._laid_out((torch.randn(shape, generator=rng) * scale).to(device, self.dtype))

        lengths = split_rows(self.premise, few=2), split_rows(self.hypothesis, few=1)
        batch = len(lengths[0]) if self.ragged else self.batch
        lead = {side: () if self.packed(side) else (batch,) for side in ("premise", "hypothesis")}
        D, A = self.dim, self.attn_dim
        tensors = {
            "premise": made(*lead["premise"], self.premise, D),
            "hypothesis": made(*lead["hypothesis"], self.hypothesis, self.hypothesis_dim),
            "w_y": made(D, A, scale=1 / math.sqrt(D)),
            "w_h": made(self.hypothesis_dim, A, scale=1 / math.sqrt(self.hypothesis_dim)),
            "w_r": made(D, A, scale=1 / math.sqrt(D)),
            "w": made(A, scale=2 / math.sqrt(A)),
            "w_t": made(D, D, scale=1 / math.sqrt(D)),
        }
        if self.state:
            tensors["state"] = made(batch, D)
        if self.mask != "none":
            mask = torch.rand(batch, self.premise, generator=rng) < 0.6
            if self.mask == "padding":
                ends = torch.randint(1, self.premise + 1, (batch, 1), generator=rng)
                mask = torch.arange(self.premise) < ends
            elif self.mask == "empty":
                mask[-1:] = False
            elif self.mask == "expanded":
                mask = mask[:1].expand(batch, -1)
            tensors["mask"] = mask.to(device) if self.mask == "expanded" else self._laid_out(mask.to(device))
        for side, each in zip(lead, lengths, strict=True):
            if self.packed(side):
                tensors[f"cu_seqlens_{side}"] = offsets(each, device)
        return tensors

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "strided":
            return torch.stack([x, x], -1)[..., 0]
        if self.layout == "swapped" and x.dim() > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x


def check(case: Case, device: torch.device, impl: str = "triton", **options) -> None:
    """`impl` against the reference; the options are those of `evaluate`."""
    assert_matches_reference(case.op, case.tensors(device), dtype=case.dtype, impl=impl, **options)


pairwise = functools.partial(_pairwise.pairwise, make=Case)


ALL = {"return_weights": True, "return_log_weights": True, "return_scores": True, "return_lse": True}


def told(out, weights, log_weights, scores, lse):
    """All results but the weights in one tensor, 0 for -inf, and the weights."""
    parts = (out, log_weights, scores, lse)
    return torch.cat([x.masked_fill(x == -torch.inf, 0).flatten() for x in parts]), weights


def formula(**given):
    """r of every word and the weights: see `formula_with_scores`."""
    out, weights, _ = formula_with_scores(**given)
    return out, weights


def formula_with_scores(*, impl, premise, hypothesis, w_y, w_h, w_r, w, w_t, state=None, mask=None):
    """Word by word, of padded sequences: the oracle, which calls nothing of the package."""
    r = premise.new_zeros(premise.shape[0], premise.shape[2]) if state is None else state
    out, weights, scores = [], [], []
    for t in range(hypothesis.shape[1]):
        s = torch.tanh(premise @ w_y + (hypothesis[:, t] @ w_h + r @ w_r)[:, None]) @ w
        s = s if mask is None else s.masked_fill(~mask, -torch.inf)
        alpha = s.softmax(1)
        r = (alpha[..., None] * premise).sum(1) + torch.tanh(r @ w_t)
        out.append(r)
        weights.append(alpha)
        scores.append(s)
    return tuple(torch.stack(x, 1) for x in (out, weights, scores))


def location_aware_formula(*, value, **given):
    """One location-aware step: the oracle, which calls nothing of the package."""
    alpha = location_aware_scores(**given).softmax(1)
    return (alpha[..., None] * value).sum(1), alpha


def location_aware_scores(
    *, impl, query, key, v, previous, conv_weight, u, score_bias=None, mask=None, act=torch.tanh
):
    """What the softmax of such a step is of."""
    side = conv_weight.shape[-1] // 2
    hidden = torch.zeros_like(key[..., 0], dtype=torch.bool) if mask is None else ~mask
    if previous.dim() == 2:
        previous, conv_weight = previous[:, None], conv_weight[:, None]
    f = torch.zeros_like(key[..., :1])
    for p in range(previous.shape[1]):
        padded = torch.nn.functional.pad(previous[:, p].masked_fill(hidden, 0), (side, side))
        f = f + padded.unfold(1, 2 * side + 1, 1) @ conv_weight[:, p].T
    s = act(query[:, None] + key + f @ u) @ v
    s = s if score_bias is None else s + score_bias
    return s.masked_fill(hidden, -torch.inf)
