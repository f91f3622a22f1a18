"""Inputs of the location family for its test files."""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import _pairwise
import pytest
import torch
from _compare import Operator
from torch import Tensor

from fused_attn import location_attention

ACTIVATIONS = ("identity", "tanh", "relu", "sigmoid", "leaky_relu", "elu", "gelu", "silu")
SCORES = ("linear", "linear_hops", "mlp", "mlp_hops", "gated", "gated_hops", "projected", "projected_hops")


def operator(**options) -> Operator:
    """`location_attention` over flat names, as the comparator wants it; the options are fixed."""

    def op(
        *,
        impl: str,
        h: Tensor,
        w: Tensor | None = None,
        gate_w: Tensor | None = None,
        gate_b: Tensor | None = None,
        **rest,
    ):
        gate = None if gate_w is None else (gate_w, gate_b)
        return location_attention(h, w, gate=gate, **{"return_weights": True, **options}, **rest, impl=impl)

    return op


@dataclass(frozen=True)
class Case(_pairwise.Factors):
    """One call: the values of the factors that the tests vary."""

    dtype: torch.dtype = torch.float32
    batch: int = 3  # sequences, where padded
    rows: int = 63  # of a sequence, or all packed ones
    dim: int = 33
    attn_dim: int = 17
    hops: int = 3
    score: str = "mlp"
    activation: str = "tanh"
    gate_activation: str = "sigmoid"
    ragged: bool = False
    mask: str = "none"  # none, random, padding, empty (a sequence sees nothing) or expanded (stride 0)
    context: str = "none"  # none, sequence or row
    value: int | None = None  # their width
    score_bias: bool = False
    bias: bool = True
    layout: str = "contiguous"  # contiguous, swapped (batch and sequence) or strided (the last axis)
    dropout_p: float = 0.0
    through: Sequence[str] = ("output", "weights")

    @property
    def op(self) -> Operator:
        return operator(activation=self.activation, gate_activation=self.gate_activation, dropout_p=self.dropout_p)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs by name; the same on every device."""
        rng = torch.Generator().manual_seed(1)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=rng) * scale

        mlp = not self.score.startswith("linear")
        projected = self.score.startswith("projected")  # w is None
        attn_dim = self.dim if projected else self.attn_dim
        inner = (attn_dim,) if mlp else (self.hops,) if self.score == "linear_hops" else ()
        lengths = split_rows(self.rows) if self.ragged else [self.rows] * self.batch
        lead = (self.rows,) if self.ragged else (self.batch, self.rows)
        made = {"h": randn(*lead, self.dim)}
        if not projected:
            made["w"] = randn(self.dim, *inner, scale=1.5 / math.sqrt(self.dim))
        if self.bias:
            made["b"] = randn(*inner)
        if mlp:
            hops = (self.hops,) if self.score.endswith("hops") else ()
            made["v"] = randn(attn_dim, *hops, scale=3 / math.sqrt(attn_dim))
        if self.score.startswith("gated"):
            made["gate_w"] = randn(self.dim, self.attn_dim, scale=1 / math.sqrt(self.dim))
            if self.bias:
                made["gate_b"] = randn(self.attn_dim)
        if self.context == "sequence":
            made["context"] = randn(len(lengths), *inner)
        elif self.context == "row":
            made["context"] = randn(*lead, *inner)
        if self.value is not None:
            made["value"] = randn(*lead, self.value)
        if self.score_bias:
            made["score_bias"] = randn(*lead)
        made = {name: self._laid_out(x.to(device, self.dtype)) for name, x in made.items()}
        if self.context != "none" and self.ragged:  # the forms that are never ambiguous
            made["context"] = made["context"].unsqueeze(1 if self.context == "sequence" else 0)
        if self.mask != "none":
            mask = self._mask(lead, lengths, rng).to(device)
            if self.mask == "expanded":  # one row for all sequences
                made["mask"] = mask.view(-1, self.rows)[0].expand(lead)
            else:
                made["mask"] = self._laid_out(mask)
        if self.ragged:
            made["cu_seqlens"] = offsets(lengths, device)
        return made

    def _mask(self, lead: tuple[int, ...], lengths: Sequence[int], rng: torch.Generator) -> Tensor:
        mask = torch.rand(lead, generator=rng) < 0.6
        if self.mask == "padding":
            ends = torch.randint(1, self.rows + 1, lead[:-1], generator=rng)
            mask = torch.arange(self.rows) < ends[..., None]
        elif self.mask == "empty" and self.ragged:
            mask[: sum(lengths[: len(lengths) // 2])] = False
        elif self.mask == "empty":
            mask[1] = False
        return mask

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.layout == "strided" and x.dim():
            return torch.stack([x, x], -1)[..., 0]
        if self.layout == "swapped" and x.dim() > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x


def table(names: str, *axes: Sequence, of_kernel: int, torch_paths: Sequence[str] = ("auto", "reference")):
    """All of a table by PyTorch's paths; of the kernel, which takes seconds a case there, every so many-th."""
    cases = list(itertools.product(*axes))
    params = [pytest.param(*case, impl) for impl in torch_paths for case in cases]
    params += [pytest.param(*case, "triton", marks=pytest.mark.kernel) for case in cases[::of_kernel]]
    return pytest.mark.parametrize(f"{names},impl", params)


def split_rows(rows: int) -> list[int]:
    """Lengths of segments: empty ones first, in the middle and last, and one that holds most rows."""
    few = min(rows, 3)
    return [0, few, 0, rows - few, 0, 0]


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


pairwise = functools.partial(_pairwise.pairwise, make=Case)
