"""What is measured, said once: each op's cases, inputs, arithmetic and traffic.

Speed, memory, plots and the README's tables all read `REGISTRY`. Adding a family is one `Op` at the end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_attn import concat_attention, general_attention, location_attention

from .peers import Peer, concat_flex, concat_keops, general_flex, general_sdpa

Sizes = Mapping[str, int]
Inputs = dict[str, Tensor]
MODES = ("forward", "forward+backward")


class Cost(NamedTuple):
    """The least that a computation has to do, whatever its implementation."""

    flops: int  # of its matrix products; recomputation and elementwise functions are not counted
    bytes: int  # each input read once, each output written once
    tanhs: int = 0  # tanh or sigmoid, one for each pair that is visible and each feature of its score


@dataclass(frozen=True)
class Case:
    """One problem."""

    name: str
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"  # the type of device that it is of a sensible size for
    check: Sizes = field(default_factory=dict)  # sizes to check at, where float64 does not fit at those timed

    @property
    def dtype_name(self) -> str:
        """The dtype, as `torch` names it."""
        return str(self.dtype).removeprefix("torch.")

    def capped(self, limit: int) -> Sizes:
        """The sizes with none over `limit`: the same problem in small."""
        return {name: min(size, limit) for name, size in self.sizes.items()}


@dataclass(frozen=True)
class Op:
    """One family."""

    family: str
    inputs: Callable[[Sizes, torch.dtype, torch.device, int], Inputs]
    """(sizes, dtype, device, seed) -> fresh random keyword arguments of `call`; the floating ones get gradients."""
    call: Callable[..., Tensor]
    """The op on `inputs`, `options` and `impl`."""
    cost: Callable[[Sizes, int], tuple[Cost, Cost]]
    """(sizes, bytes of an element) -> cost of the forward, cost of the backward on its own."""
    cases: tuple[Case, ...]
    options: Callable[[Sizes], Mapping[str, Any]] = lambda sizes: {}
    """Keyword arguments of `call` that are no tensors."""
    peers: Callable[[Sizes], Mapping[str, Peer]] = lambda sizes: {}
    """Other systems that can compute these sizes, by provider."""

    def work(self, case: Case, mode: str) -> Cost:
        """Cost of a case in one of `MODES`."""
        forward, backward = self.cost(case.sizes, case.dtype.itemsize)
        return forward if mode == "forward" else Cost(*(sum(both) for both in zip(forward, backward, strict=True)))


# ---------------------------------------------------------------------------------------------------------------
# Location. Sizes: B sequences of T rows, or S ragged ones of at most T; D, A (absent: linear score), R (absent: no
# hop axis), gates (0 or 1); with left or right, or both, a window: one output a row.
# ---------------------------------------------------------------------------------------------------------------


def ragged_lengths(sizes: Sizes, axis: str = "T", count: str = "S") -> list[int]:
    """Lengths of the S sequences. They belong to the problem, not to the draw of its inputs: one fixed seed."""
    draw = random.Random(0)
    return [draw.randint(min(16, sizes[axis]), sizes[axis]) for _ in range(sizes[count])]


def _location_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    D, A = sizes["D"], sizes.get("A")
    hops = (sizes["R"],) if "R" in sizes else ()
    inner = hops if A is None else (A,)
    # Scales as of a trained layer: activations off their linear part, weights neither uniform nor one-hot.
    inputs = {"w": normal(D, *inner, std=2 * D**-0.5), "b": normal(*inner, std=0.1)}
    if A is not None:
        inputs["v"] = normal(A, *hops, std=2 * A**-0.5)
    if sizes.get("gates"):
        inputs |= {"gate_w": normal(D, *inner, std=2 * D**-0.5), "gate_b": normal(*inner, std=0.1)}
    if "S" in sizes:
        lengths = torch.tensor([0, *ragged_lengths(sizes)], device=device)
        inputs["cu_seqlens"] = lengths.cumsum(0).to(torch.int32)
        rows: tuple[int, ...] = (sum(ragged_lengths(sizes)),)
    else:
        rows = (sizes["B"], sizes["T"])
    return {"h": normal(*rows, D), **inputs}


def _location_call(
    *,
    h: Tensor,
    w: Tensor,
    b: Tensor,
    v: Tensor | None = None,
    gate_w: Tensor | None = None,
    gate_b: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: tuple[int | None, int | None] | None,
    impl: str,
) -> Tensor:
    gate = None if gate_w is None else (gate_w, gate_b)
    return location_attention(h, w, b, v, gate=gate, cu_seqlens=cu_seqlens, window=window, impl=impl)  # type: ignore[return-value, arg-type]


def _location_options(sizes: Sizes) -> Mapping[str, Any]:
    return {"window": _window(sizes) if {"left", "right"} & set(sizes) else None}


def _window(sizes: Sizes) -> tuple[int | None, int | None]:
    return sizes.get("left"), sizes.get("right")


def _location_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, A, R = sizes["D"], sizes.get("A"), sizes.get("R", 1)
    if "S" in sizes:
        seqs, rows, index = sizes["S"], sum(ragged_lengths(sizes)), 4 * (sizes["S"] + 1)
    else:
        seqs, rows, index = sizes["B"], sizes["B"] * sizes["T"], 0
    if A is None:
        weights, biases = D * R, R
    else:
        projections = 1 + sizes.get("gates", 0)
        weights, biases = D * A * projections + A * R, A * projections
    read = rows * D + weights + biases
    window = _location_options(sizes)["window"]
    out = (seqs if window is None else rows) * R * D
    # A row meets every weight once, and R sums of D: of a window with two ends it is in many.
    sums = 1 if window is None or None in window else min(sum(window) + 1, sizes["T"])
    forward = Cost(2 * rows * (weights + sums * R * D), itemsize * (read + out) + index)
    # Each product gives two, one for either operand; inputs and the output's gradient in, every gradient out.
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


_GATED = {"D": 512, "A": 128, "gates": 1}
_SMALL_GATED = {"D": 64, "A": 32, "gates": 1}

LOCATION = Op(
    family="location",
    inputs=_location_inputs,
    call=_location_call,
    cost=_location_cost,
    options=_location_options,
    cases=(
        Case("gated-bag", {"B": 1, "T": 100_000, **_GATED}),
        Case("gated-bag", {"B": 1, "T": 100_000, **_GATED}, torch.float32),
        Case("gated-batch", {"B": 64, "T": 1024, **_GATED}),
        Case("gated-ragged", {"S": 64, "T": 4096, **_GATED}),
        Case("han-words", {"B": 2048, "T": 32, "D": 256, "A": 128}),
        Case("hops", {"B": 64, "T": 512, "D": 600, "A": 350, "R": 30}),
        Case("linear", {"B": 256, "T": 1024, "D": 512}),
        Case("linear", {"B": 256, "T": 1024, "D": 512}, torch.float32),
        Case("wide", {"B": 8, "T": 4096, "D": 2048, "A": 256}),
        # The reference makes all pairs of positions.
        Case("prefix", {"B": 8, "T": 4096, "D": 256, "A": 128, "right": 0}, check={"B": 2}),
        Case("prefix", {"B": 8, "T": 4096, "D": 256, "A": 128, "right": 0}, torch.float32, check={"B": 2}),
        Case("context", {"B": 8, "T": 4096, "D": 256, "A": 128, "left": 16, "right": 16}, check={"B": 2}),
        Case("prefix-small", {"B": 4, "T": 1024, "D": 64, "A": 32, "right": 0}, torch.float32, "cpu"),
        Case("gated-bag-small", {"B": 1, "T": 8192, **_SMALL_GATED}, torch.float32, "cpu"),
        Case("gated-ragged-small", {"S": 16, "T": 512, **_SMALL_GATED}, torch.float32, "cpu"),
        Case("han-words-small", {"B": 64, "T": 32, "D": 64, "A": 32}, torch.float32, "cpu"),
        Case("hops-small", {"B": 16, "T": 128, "D": 64, "A": 32, "R": 4}, torch.float32, "cpu"),
        Case("linear-small", {"B": 16, "T": 512, "D": 128}, torch.float32, "cpu"),
    ),
)


# ---------------------------------------------------------------------------------------------------------------
# Concat. Sizes: B sequences of Tq queries and Tk keys, or S ragged ones of at most that many; H (absent: no heads),
# A, Dv; left, right (absent: that side of the window is open); relu (0 or 1: tanh), padded (0 or 1: a mask of keys).
# ---------------------------------------------------------------------------------------------------------------


def visible_pairs(sizes: Sizes) -> int:
    """Pairs of a query and a key that it may see, over all sequences, of one head."""
    if "S" in sizes:
        lengths = list(zip(ragged_lengths(sizes, "Tq"), ragged_lengths(sizes, "Tk"), strict=True))
    elif sizes.get("padded"):
        lengths = [(sizes["Tq"], keys) for keys in ragged_lengths(sizes, "Tk", "B")]
    else:
        lengths = [(sizes["Tq"], sizes["Tk"])] * sizes["B"]

    def of_sequence(queries: int, keys: int) -> int:
        left, right = sizes.get("left", queries), sizes.get("right", keys)
        return sum(max(0, min(keys, i + right + 1) - max(0, i - left)) for i in range(queries))

    return sum(n * of_sequence(*shape) for shape, n in Counter(lengths).items())


def _concat_rows(sizes: Sizes) -> tuple[int, int]:
    """Rows of queries and of keys, over all sequences."""
    if "S" in sizes:
        return sum(ragged_lengths(sizes, "Tq")), sum(ragged_lengths(sizes, "Tk"))
    return sizes["B"] * sizes["Tq"], sizes["B"] * sizes["Tk"]


def _concat_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    heads = (sizes["H"],) if "H" in sizes else ()
    rows = _concat_rows(sizes)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    def packed_or_padded(side: int, width: int) -> Tensor:
        if "S" in sizes:
            return normal(rows[side], *heads, width)
        return normal(sizes["B"], *heads, rows[side] // sizes["B"], width)

    A = sizes["A"]
    inputs = {
        "query": packed_or_padded(0, A),
        "key": packed_or_padded(1, A),
        "value": packed_or_padded(1, sizes["Dv"]),
        "v": normal(*heads, A, std=2 * A**-0.5),  # scores spread by about 1: weights neither uniform nor one-hot
    }
    if "S" in sizes:
        for name, axis in (("cu_seqlens_q", "Tq"), ("cu_seqlens_k", "Tk")):
            lengths = torch.tensor([0, *ragged_lengths(sizes, axis)], device=device)
            inputs[name] = lengths.cumsum(0).to(torch.int32)
    if sizes.get("padded"):
        lengths = torch.tensor(ragged_lengths(sizes, "Tk", "B"), device=device)
        inputs["mask"] = torch.arange(sizes["Tk"], device=device) < lengths[:, None]
    return inputs


def _concat_options(sizes: Sizes) -> Mapping[str, Any]:
    return {
        "activation": "relu" if sizes.get("relu") else "tanh",
        "window": _window(sizes),
    }


def _concat_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    A, DV, H = sizes["A"], sizes["Dv"], sizes.get("H", 1)
    queries, keys = _concat_rows(sizes)
    pairs = H * visible_pairs(sizes)
    index = 2 * 4 * (sizes["S"] + 1) if "S" in sizes else 0
    if sizes.get("padded"):
        index += keys  # the mask, a byte each
    read = H * (queries * A + keys * (A + DV) + A)
    out = H * queries * DV
    # The scores are no product of matrices: `tanhs` has them.
    tanhs = 0 if sizes.get("relu") else pairs * A
    forward = Cost(2 * pairs * DV, itemsize * (read + out) + index, tanhs)
    # To make the activations again is recomputation, and a tanh has its derivative.
    backward = Cost(2 * forward.flops, itemsize * (read + out + read) + index)
    return forward, backward


def _concat_peers(sizes: Sizes) -> Mapping[str, Peer]:
    if any(name in sizes for name in ("S", "left", "right", "padded")):
        return {}
    peers = {"keops": Peer(concat_keops, needs="pykeops")}
    if sizes["A"] <= 128:  # unrolled: on two cores of a CPU, 32 features took 18 s to compile and 128 took 92 s
        peers["flex"] = Peer(concat_flex, compile=True)
    return peers


# The reference writes the activations, B·H·Tq·Tk·A of them, and its backward holds about five such tensors at once:
# at most 86 GB here, but for "long-window", which no GPU holds and where its failure is the result. In float64 they
# are four times as large: hence the sizes to check at.
CONCAT = Op(
    family="concat",
    inputs=_concat_inputs,
    call=concat_attention,  # type: ignore[arg-type]
    cost=_concat_cost,
    options=_concat_options,
    peers=_concat_peers,
    cases=(
        Case("decoder", {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256}),
        Case("decoder", {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256}, torch.float32),
        Case("decoder-step", {"B": 128, "Tq": 1, "Tk": 512, "A": 512, "Dv": 512}),
        Case("padded", {"B": 32, "Tq": 128, "Tk": 512, "A": 256, "Dv": 256, "padded": 1}),
        Case(
            "square", {"B": 4, "H": 4, "Tq": 2048, "Tk": 2048, "A": 128, "Dv": 128}, check={"B": 1, "H": 2},
        ),
        Case("long-keys", {"B": 2, "Tq": 128, "Tk": 65_536, "A": 128, "Dv": 128}, check={"Tk": 16_384}),
        Case(
            "long-keys", {"B": 2, "Tq": 128, "Tk": 65_536, "A": 128, "Dv": 128}, torch.float32, check={"Tk": 16_384}
        ),
        Case("causal", {"B": 4, "H": 4, "Tq": 1024, "Tk": 1024, "A": 128, "Dv": 128, "right": 0}, check={"B": 1}),
        Case(
            "window", {"B": 2, "H": 2, "Tq": 4096, "Tk": 4096, "A": 128, "Dv": 128, "left": 255, "right": 0},
            check={"B": 1, "Tq": 2048, "Tk": 2048},
        ),
        Case(
            "long-window", {"B": 1, "Tq": 32_768, "Tk": 32_768, "A": 128, "Dv": 128, "left": 255, "right": 0},
            check={"Tq": 2048, "Tk": 2048},
        ),
        Case("ragged", {"S": 16, "Tq": 512, "Tk": 512, "A": 128, "Dv": 128}, check={"S": 8}),
        Case("relu", {"B": 8, "Tq": 1024, "Tk": 1024, "A": 128, "Dv": 128, "relu": 1}, check={"B": 4}),
        Case(
            "decoder-small", {"B": 4, "Tq": 256, "Tk": 512, "A": 128, "Dv": 128}, torch.float32, "cpu",
            check={"B": 2},
        ),
        Case(
            "window-small", {"B": 2, "Tq": 512, "Tk": 512, "A": 64, "Dv": 64, "left": 63, "right": 0}, torch.float32,
            "cpu",
        ),
    ),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# General. Sizes: B sequences of Tq queries and Tk keys, H (absent: no heads), D, Dv (absent: the values are the
# keys), weight (0 or 1), left, right (absent: that side of the window is open).
# ---------------------------------------------------------------------------------------------------------------


def _general_inputs(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    lead = (sizes["B"], *((sizes["H"],) if "H" in sizes else ()))
    D = sizes["D"]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)

    inputs = {"query": normal(*lead, sizes["Tq"], D), "key": normal(*lead, sizes["Tk"], D)}
    if "Dv" in sizes:
        inputs["value"] = normal(*lead, sizes["Tk"], sizes["Dv"])
    if sizes.get("weight"):
        inputs["weight"] = normal(D, D, std=D**-0.5)
    return inputs


def _general_options(sizes: Sizes) -> Mapping[str, Any]:
    return {"scale": sizes["D"] ** -0.5, "window": _window(sizes)}


def _general_cost(sizes: Sizes, itemsize: int) -> tuple[Cost, Cost]:
    D, H = sizes["D"], sizes.get("H", 1)
    queries, keys = (H * n for n in _concat_rows(sizes))
    width = sizes.get("Dv", D)
    weights = D * D if sizes.get("weight") else 0
    read = queries * D + keys * (D + sizes.get("Dv", 0)) + weights
    out = queries * width
    forward = Cost(2 * H * visible_pairs(sizes) * (D + width) + 2 * queries * weights, itemsize * (read + out))
    backward = Cost(2 * forward.flops, itemsize * (read + out + read))
    return forward, backward


def _general_peers(sizes: Sizes) -> Mapping[str, Peer]:
    if sizes.get("weight") or "left" in sizes or sizes.get("right", 0):
        return {}
    return {"sdpa": Peer(general_sdpa), "flex": Peer(general_flex, compile=True)}


GENERAL = Op(
    family="general",
    inputs=_general_inputs,
    call=general_attention,  # type: ignore[arg-type]
    cost=_general_cost,
    options=_general_options,
    peers=_general_peers,
    cases=(
        # Values that are the keys: few queries (a decoder's step), then many.
        Case("shared-step", {"B": 64, "Tq": 1, "Tk": 8192, "D": 256}),
        Case("shared-steps", {"B": 64, "Tq": 16, "Tk": 8192, "D": 256}),
        Case("shared-step", {"B": 64, "Tq": 1, "Tk": 8192, "D": 256}, torch.float32),
        Case("shared", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 128}, check={"B": 1, "H": 2}),
        Case("dot-64", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 64, "Dv": 64}, check={"B": 1, "H": 2}),
        Case("dot-128", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 128, "Dv": 128}, check={"B": 1, "H": 2}),
        Case(
            "causal-128", {"B": 4, "H": 8, "Tq": 4096, "Tk": 4096, "D": 128, "Dv": 128, "right": 0},
            check={"B": 1, "H": 2},
        ),
        Case("bilinear", {"B": 32, "Tq": 128, "Tk": 512, "D": 256, "weight": 1}),
        Case("bilinear", {"B": 32, "Tq": 128, "Tk": 512, "D": 256, "weight": 1}, torch.float32),
        Case("bilinear-small", {"B": 4, "Tq": 64, "Tk": 256, "D": 64, "weight": 1}, torch.float32, "cpu"),
        Case(
            "causal-small", {"B": 2, "H": 2, "Tq": 256, "Tk": 256, "D": 32, "Dv": 32, "right": 0}, torch.float32,
            "cpu",
        ),
    ),
)  # fmt: skip

REGISTRY: list[Op] = [LOCATION, CONCAT, GENERAL]
