"""Word-by-word attention.

Sizes: B pairs of Tk words of a premise and Tq of a hypothesis, or S ragged ones of at most that many; D of both,
A; padded (0 or 1: a mask of the premise). The reference is the eager loop over the words of the hypothesis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_attn import word_by_word_attention

from .problem import Case, Cost, Inputs, Op, Sizes, count_rows, ragged_lengths, visible_pairs


def _recurrent_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    D, A = sizes["D"], sizes["A"]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    words, premise_words = count_rows(sizes)
    lead = () if "S" in sizes else (sizes["B"],)
    inputs = {
        "premise": normal(*lead, premise_words // (*lead, 1)[0], D),
        "hypothesis": normal(*lead, words // (*lead, 1)[0], D),
        "w_y": normal(D, A, std=D**-0.5),
        "w_h": normal(D, A, std=D**-0.5),
        "w_r": normal(D, A, std=D**-0.5),
        "w": normal(A, std=2 * A**-0.5),  # weights neither uniform nor one-hot
        "w_t": normal(D, D, std=D**-0.5),
    }
    if "S" in sizes:
        for name, axis in (("cu_seqlens_premise", "Tk"), ("cu_seqlens_hypothesis", "Tq")):
            lengths = torch.tensor([0, *ragged_lengths(sizes, axis)], device=device)
            inputs[name] = lengths.cumsum(0).to(torch.int32)
    if sizes.get("padded"):
        lengths = torch.tensor(ragged_lengths(sizes, "Tk", "B"), device=device)
        inputs["mask"] = torch.arange(sizes["Tk"], device=device) < lengths[:, None]
    return inputs


def _recurrent_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A = sizes["D"], sizes["A"]
    words, premise_words = count_rows(sizes)
    pairs = visible_pairs(sizes)
    weights = 3 * D * A + A + D * D
    read = (premise_words + words) * D + weights
    out = words * D
    other = 2 * 4 * (sizes["S"] + 1) if "S" in sizes else sizes["B"] * sizes["Tk"] * sizes.get("padded", 0)
    flops = 2 * (premise_words * D * A + words * (2 * D * A + D * D) + pairs * D)
    forward = Cost(flops, itemsize * (read + out) + other, pairs * A)
    return forward, Cost(2 * flops, itemsize * (read + out + read) + other)


RECURRENT = Op(
    family="recurrent",
    inputs=_recurrent_inputs,
    call=word_by_word_attention,  # type: ignore[arg-type]
    cost=_recurrent_cost,
    cases=(
        # The paper's: sentences of SNLI, its smallest and its largest width.
        Case("entailment-100", {"B": 32, "Tk": 14, "Tq": 8, "D": 100, "A": 100}),
        Case("entailment-100", {"B": 32, "Tk": 14, "Tq": 8, "D": 100, "A": 100}, torch.float32),
        Case("entailment-160", {"B": 32, "Tk": 14, "Tq": 8, "D": 160, "A": 160, "padded": 1}),
        Case("large", {"B": 256, "Tk": 64, "Tq": 32, "D": 256, "A": 256}),
        Case("large", {"B": 256, "Tk": 64, "Tq": 32, "D": 256, "A": 256}, torch.float32),
        Case("ragged", {"S": 256, "Tk": 64, "Tq": 32, "D": 256, "A": 256}),
        Case("long", {"B": 64, "Tk": 1024, "Tq": 32, "D": 256, "A": 256}),
        Case("small", {"B": 8, "Tk": 14, "Tq": 8, "D": 100, "A": 100}, torch.float32, "cpu"),
    ),
)
