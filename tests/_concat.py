"""Inputs of the concat family for its test files."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import _pairwise
import pytest
import torch
from _compare import Operator, assert_close, assert_matches_reference, evaluate
from _location import ACTIVATIONS, offsets
from torch import Tensor

from fused_attn import concat_attention, distance_attention

__all__ = [
    "ACTIVATIONS",
    "ALL",
    "IMPLS",
    "ROWS",
    "Case",
    "check",
    "compare",
    "each_impl",
    "every_impl",
    "hide",
    "offsets",
    "operator",
    "pairwise",
    "segments",
]

IMPLS = (pytest.param("triton", marks=pytest.mark.kernel), "auto")  # auto: on a CPU, the blocked path
ALL = (*IMPLS, "reference")
each_impl = pytest.mark.parametrize("impl", IMPLS)
every_impl = pytest.mark.parametrize("impl", ALL)
ROWS = ("query", "key", "value")
Window = tuple[int | None, int | None]


def operator(**options) -> Operator:
    """`concat_attention`, or with `p` `distance_attention`, as the comparator wants it; the options are fixed."""
    attention = distance_attention if "p" in options else concat_attention

    def op(*, impl: str, query: Tensor, key: Tensor, value: Tensor, v: Tensor, **rest):
        return attention(query, key, value, v, **options, **rest, impl=impl)

    return op


@dataclass(frozen=True)
class Case(_pairwise.Factors):
    """One call of concat or distance attention: the values of the factors that the tests vary."""

    dtype: torch.dtype = torch.float32
    batch: int = 2  # sequences, where padded
    queries: int = 21  # of a sequence, or all packed ones
    keys: int = 33
    attn_dim: int = 9
    value_dim: int = 12
    heads: int | None = None
    v_heads: bool = True  # with heads, v is (H, A)
    activation: str = "tanh"
    p: int | None = None  # of distance attention, in place of an activation
    ragged: bool = False
    mask: str = "none"  # none, keys, padding, pairs (both with rows that see nothing), empty or expanded (stride 0);
    # packed only keys, of which a sequence has none that is seen
    window: Window | None = None
    score_bias: str | None = None  # axes: b, h, q, k, or 1 (H: 1 for the heads); h and H go without heads, 1 before
    # all but k alone
    layout: str = "contiguous"  # contiguous, transposed, strided (the last axis) or expanded (batch or heads)
    dropout_p: float = 0.0
    return_weights: bool = True  # where padded
    through: Sequence[str] = ("output", "weights")

    @property
    def op(self) -> Operator:
        feature = {"activation": self.activation} if self.p is None else {"p": self.p}
        weights = self.return_weights and not self.ragged
        return operator(**feature, window=self.window, dropout_p=self.dropout_p, return_weights=weights)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs by name; the same on every device."""
        rng = torch.Generator().manual_seed(1)

        def rows(count: int, width: int) -> Tensor:
            heads = () if self.heads is None else (self.heads,)
            shape = (count, *heads, width) if self.ragged else (self.batch, *heads, count, width)
            return self._laid_out(torch.randn(shape, generator=rng).to(device, self.dtype))

        made = {
            "query": rows(self.queries, self.attn_dim),
            "key": rows(self.keys, self.attn_dim),
            "value": rows(self.keys, self.value_dim),
        }
        per_head = self.v_heads and self.heads is not None
        v = torch.randn((self.heads, self.attn_dim) if per_head else (self.attn_dim,), generator=rng)
        made["v"] = (v * 3 / math.sqrt(self.attn_dim)).to(device, self.dtype)
        if self.score_bias is not None:
            sizes = {"b": self.batch, "h": self.heads, "H": 1, "q": self.queries, "k": self.keys, "1": 1}
            axes = self.score_bias if self.heads is not None else self.score_bias.replace("h", "").replace("H", "")
            if len(axes) > 1:
                axes = axes.rjust(3 if self.heads is None else 4, "1")
            bias = torch.randn([sizes[axis] for axis in axes], generator=rng)
            made["score_bias"] = self._laid_out(bias.to(device, self.dtype))
        if self.mask != "none":
            mask = self._mask(rng).to(device)
            made["mask"] = mask if "expanded" in (self.mask, self.layout) else self._laid_out(mask)
        if self.ragged:
            made["cu_seqlens_q"] = offsets(split_rows(self.queries, few=1), device)
            made["cu_seqlens_k"] = offsets(split_rows(self.keys, few=2), device)
        return made

    def raw_arguments(self, tensors: Mapping[str, Tensor], seed: Tensor | None = None) -> list:
        """The inputs and options of the raw operators, in their canonical form."""
        rows = [tensors[name] if self.heads else tensors[name].unsqueeze(-2 if self.ragged else 1) for name in ROWS]
        if self.ragged:
            rows = [x.transpose(0, 1)[None] for x in rows]
        v = tensors["v"].expand(self.heads or 1, -1)
        bias, mask, *rest = map(tensors.get, ("score_bias", "mask", "cu_seqlens_q", "cu_seqlens_k"))
        mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
        return [*rows, v, bias, mask, *rest, seed, self.activation, *(self.window or (None, None)), self.dropout_p]

    def _mask(self, rng: torch.Generator) -> Tensor:
        if self.ragged:
            return (torch.rand(self.keys, generator=rng) < 0.6) & (torch.arange(self.keys) >= 4)
        mask = torch.rand(self.batch, self.queries, self.keys, generator=rng) < 0.6
        if self.mask in ("pairs", "expanded"):
            mask[:, ::3] = False  # queries that see nothing
            mask[:, :, ::4] = False  # keys that nothing sees
            return mask[:, :1].expand_as(mask) if self.mask == "expanded" else mask
        mask = mask[:, 0].clone() if self.queries else torch.ones(self.batch, self.keys, dtype=torch.bool)
        if self.mask == "padding":
            ends = torch.randint(1, self.keys + 1, (self.batch, 1), generator=rng)
            return torch.arange(self.keys) < ends
        if self.mask == "empty":
            mask[-1:] = False
        return mask

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "strided" and x.dim():
            return torch.stack([x, x], -1)[..., 0]
        if self.layout == "transposed" and x.dim() > 2:
            return x.transpose(-3, -2).contiguous().transpose(-3, -2)
        if self.layout == "expanded" and x.dim() > 2:
            return x.narrow(-3, 0, min(1, x.shape[-3])).expand_as(x)
        return x


def split_rows(rows: int, few: int) -> list[int]:
    """Lengths of segments: one that is empty on both sides, one on each side alone, and one that holds most."""
    few = min(rows, few)
    some = min(rows - few, 4)
    rest = rows - few - some
    return [0, few, some, 0, rest, 0] if few == 1 else [0, 0, some, few, rest, 0]


def segments(lengths: Sequence[tuple[int, int]], device: torch.device) -> dict[str, Tensor]:
    """Offsets of packed sequences of so many queries and so many keys each."""
    return {f"cu_seqlens_{side}": offsets([pair[i] for pair in lengths], device) for i, side in enumerate("qk")}


def check(case: Case, device: torch.device, impl: str, **options) -> None:
    """`impl` against the reference; the options are those of `evaluate`."""
    compare(case.op, case.tensors(device), impl, dtype=case.dtype, **{"through": case.through, **options})


def compare(op: Operator, tensors: Mapping[str, Tensor], impl: str, *, dtype=torch.float32, **options) -> None:
    if dtype == torch.float64:  # nothing judges the reference
        assert_close(evaluate(op, tensors, impl, **options), evaluate(op, tensors, "reference", **options))
    else:
        assert_matches_reference(op, tensors, dtype=dtype, impl=impl, **options)


pairwise = functools.partial(_pairwise.pairwise, make=Case)


def hide(tensors: dict[str, Tensor], fill: float) -> dict[str, Tensor]:
    """Put `fill` in the rows that the mask lets no query or key use; return these rows by name."""
    mask = tensors["mask"]
    keys = mask if mask.dim() == 2 else mask.any(1)
    hidden = {name: ~keys for name in ("key", "value") if name in tensors}  # the values may be the keys
    if mask.dim() == 3:
        hidden["query"] = ~mask.any(2)
    for name, rows in hidden.items():
        x = tensors[name]
        (x if x.dim() == 3 else x.transpose(1, 2))[rows] = fill
    return hidden
