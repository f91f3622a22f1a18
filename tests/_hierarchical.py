"""Inputs of the hierarchical family for its test files."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import _pairwise
import torch
from _compare import Operator
from _location import offsets
from torch import Tensor

from fused_attn.hierarchical import Score, hierarchical_attention

SCORES = ("linear", "mlp", "gated", "projected")
PARTS = ("w", "b", "v", "gate_w", "gate_b", "context")
# Documents of sentences of words. Empty sentences first, in the middle and last, and empty documents likewise; more
# sentences in one document than a block of the kernel has, and one of a single word.
DOCUMENTS = {
    "mixed": [[], [0, 4, 0, 19, 1], [], [0, 0], [2] * 17 + [0], [35, 3], []],
    "few": [[], [0, 4, 0, 7], [3], [0]],
    "sentences": [[5, 9], [1], [3, 2, 4]],
    "one": [[1]],
    "one sentence": [[63]],
}


def operator(
    *, activations: Sequence[str] = ("tanh", "sigmoid") * 2, through: Sequence[str] = ("out",), **options
) -> Operator:
    """`hierarchical_attention` over flat names, as the comparator wants it.

    Returns the output, and of the other results those in `through`, as one vector.
    """

    def op(*, impl: str, h: Tensor, inner_offsets: Tensor, outer_offsets: Tensor, mask=None, **tensors):
        def score(name: str, act: str, gate_act: str) -> Score:
            w, b, v, gate_w, gate_b, context = (tensors.get(f"{name}_{part}") for part in PARTS)
            return Score(w, b, v, None if gate_w is None else (gate_w, gate_b), context, act, gate_act)

        result = hierarchical_attention(
            h,
            inner_offsets,
            outer_offsets,
            score("inner", *activations[:2]),
            score("outer", *activations[2:]),
            mask=mask,
            return_segments=True,
            return_weights=True,
            impl=impl,
            **options,
        )
        rest = [getattr(result, name).flatten() for name in result._fields[1:] if name in through]
        return (result.out, torch.cat(rest)) if rest else result.out

    return op


@dataclass(frozen=True)
class Case(_pairwise.Factors):
    """One call: the values of the factors that the tests vary."""

    dtype: torch.dtype = torch.float32
    documents: str = "mixed"
    dim: int = 17
    attn_dims: tuple[int, int] = (9, 5)
    inner: str = "mlp"  # the scores
    outer: str = "mlp"
    activations: tuple[str, str, str, str] = ("tanh", "sigmoid", "tanh", "sigmoid")
    contexts: tuple[str, str] = ("none", "none")  # none, parent or row
    mask: str = "none"  # none, random, empty (nothing of the second half is seen) or expanded (stride 0)
    bias: bool = True
    layout: str = "contiguous"  # contiguous or strided (the last axis)
    through: Sequence[str] = ("segments", "inner_weights", "outer_weights")

    @property
    def op(self) -> Operator:
        return operator(activations=self.activations, through=self.through)

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs by name; the same on every device."""
        rng = torch.Generator().manual_seed(1)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=rng) * scale

        lengths = [n for document in DOCUMENTS[self.documents] for n in document]
        groups, segments, rows = len(DOCUMENTS[self.documents]), len(lengths), sum(lengths)
        made = {"h": randn(rows, self.dim)}
        for i, (name, parents, entries) in enumerate((("inner", segments, rows), ("outer", groups, segments))):
            kind = getattr(self, name)
            A = self.dim if kind == "projected" else self.attn_dims[i]
            inner = () if kind == "linear" else (A,)
            if kind != "projected":
                made[f"{name}_w"] = randn(self.dim, *inner, scale=1.5 / math.sqrt(self.dim))
            if self.bias:
                made[f"{name}_b"] = randn(*inner)
            if kind != "linear":
                made[f"{name}_v"] = randn(A, scale=3 / math.sqrt(A))
            if kind == "gated":
                made[f"{name}_gate_w"] = randn(self.dim, A, scale=1 / math.sqrt(self.dim))
                if self.bias:
                    made[f"{name}_gate_b"] = randn(A)
            if self.contexts[i] != "none":
                made[f"{name}_context"] = randn(parents if self.contexts[i] == "parent" else entries, *inner)
        made = {name: self._laid_out(x.to(device, self.dtype)) for name, x in made.items()}
        for i, name in enumerate(("inner", "outer")):  # the forms that are never ambiguous
            if self.contexts[i] != "none":
                made[f"{name}_context"] = made[f"{name}_context"].unsqueeze(int(self.contexts[i] == "parent"))
        if self.mask == "expanded":
            made["mask"] = torch.ones(1, dtype=torch.bool, device=device).expand(rows)
        elif self.mask != "none":
            mask = torch.rand(rows, generator=rng) < 0.6
            if self.mask == "empty":
                mask[rows // 2 :] = False
            made["mask"] = self._laid_out(mask.to(device))
        made["inner_offsets"] = offsets(lengths, device)
        made["outer_offsets"] = offsets([len(document) for document in DOCUMENTS[self.documents]], device)
        return made

    def _laid_out(self, x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0] if self.layout == "strided" and x.dim() else x


pairwise = functools.partial(_pairwise.pairwise, make=Case)
