"""A recurrent layer over packed rows as one operator, for the compiler and functorch.

PyTorch's own wants the lengths in the CPU's memory, where neither shows them. The weights come as one vector, so that
the operator has as many arguments for every layer. Derivatives are those of the formula, step by step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._dropout import draw_seed, dropout_scale
from ._operators import left_to_autograd, raw_op, vjp
from ._ops import forward_mode, under_autocast
from .reference import segment_ids

_GATES = {"LSTM": 4, "GRU": 3}  # else one


def pack(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order in which a layer of PyTorch takes packed rows, and on the CPU how many it takes at each time.

    At a time it takes a row of each group that is that long, the longest group first.
    """
    group = segment_ids(offsets, rows)
    place = torch.arange(rows, device=offsets.device) - offsets[group]
    rank = torch.argsort(torch.argsort(offsets.diff(), descending=True, stable=True))
    return torch.argsort(place * rank.numel() + rank[group]), place.bincount().cpu()


def run_packed(run: Callable[[Tensor, Tensor], Tensor], rows: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """The states of the rows, where `run` makes those of data and batch sizes as `PackedSequence` has them."""
    if rows.shape[0] == 0:  # a layer refuses no rows: one that nothing reads, so that its weights get zero gradients
        return run(torch.cat([rows, rows.new_zeros(1, rows.shape[1])]), counts.new_ones(1))[:0]
    return run(rows[order], counts)[torch.argsort(order)]


def _split(
    weights: Tensor, width: int, mode: str, hidden: int, proj: int, layers: int, bias: bool, bidirectional: bool
) -> list[list[Tensor]]:
    """The weights of each layer and direction, as `nn.RNNBase` has them in ``all_weights``."""
    gates, directions, out = _GATES.get(mode, 1) * hidden, 1 + bidirectional, proj or hidden
    shapes: list[list[tuple[int, ...]]] = []
    for layer in range(layers):
        one: list[tuple[int, ...]] = [(gates, out * directions if layer else width), (gates, out)]
        one += [(gates,), (gates,)] if bias else []
        shapes += [one + ([(proj, hidden)] if proj else [])] * directions
    flat = iter(weights.split([math.prod(shape) for one in shapes for shape in one]))
    return [[next(flat).view(shape) for shape in one] for one in shapes]


def _native(rows: Tensor, weights: Tensor, order: Tensor, counts: Tensor, *options: Any) -> Tensor:
    """The states by the function that `nn.GRU`, `nn.LSTM` or `nn.RNN` calls; no dropout."""
    mode, hidden, proj, layers, bias, bidirectional, _ = options
    flat = [x for one in _split(weights, rows.shape[1], *options[:-1]) for x in one]

    def run(data: Tensor, batch_sizes: Tensor) -> Tensor:
        size = (len(flat) // len(flat[: (4 if bias else 2) + (proj > 0)]), int(batch_sizes[0]))
        state: Any = data.new_zeros(*size, proj or hidden)
        state = (state, data.new_zeros(*size, hidden)) if mode == "LSTM" else state
        function = getattr(torch._VF, mode.lower())
        results = function(data, batch_sizes, state, flat, bias, layers, 0.0, False, bidirectional)
        return cast("Tensor", results[0])

    return run_packed(run, rows, order, counts)


def formula(
    rows: Tensor, weights: Tensor, order: Tensor, counts: Tensor, seed: Tensor | None, *options: Any
) -> Tensor:
    """The states, step by step in plain PyTorch, which has derivatives of every kind."""
    mode, _, _, layers, bias, bidirectional, dropout = options
    weights_of = _split(weights, rows.shape[1], *options[:-1])

    def run(data: Tensor, batch_sizes: Tensor) -> Tensor:
        sizes = batch_sizes.tolist()
        for layer in range(layers):
            if layer and seed is not None:
                data = data * dropout_scale(
                    seed,
                    torch.arange(data.shape[1], device=data.device),
                    order.new_tensor(layer),
                    torch.arange(data.shape[0], device=data.device)[:, None],
                    dropout,
                ).to(data.dtype)
            both = range(layer * (1 + bidirectional), (layer + 1) * (1 + bidirectional))
            data = torch.cat([_walk(data, sizes, weights_of[i], mode, bias, i > both[0]) for i in both], -1)
        return data

    return run_packed(run, rows, order, counts)


def _walk(data: Tensor, sizes: list[int], weights: list[Tensor], mode: str, bias: bool, backwards: bool) -> Tensor:
    """One direction of one layer, on rows by time; at a time the first `sizes` sequences go on."""
    w_x, w_h, *more = weights
    inputs = (data @ w_x.mT + (more[0] if bias else 0)).split(sizes)
    project = more[-1] if len(more) % 2 else None
    h, c = (data.new_zeros(0, n) for n in (w_h.shape[1], w_h.shape[0] // _GATES.get(mode, 1)))
    states = []
    for x in reversed(inputs) if backwards else inputs:
        new = max(0, len(x) - len(h))
        h, c = (torch.cat([y[: len(x)], y.new_zeros(new, y.shape[1])]) for y in (h, c))
        y = h @ w_h.mT + (more[1] if bias else 0)
        if mode == "LSTM":
            i, f, g, o = (x + y).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            h = h if project is None else h @ project.mT
        elif mode == "GRU":
            (x_r, x_z, x_n), (y_r, y_z, y_n) = x.chunk(3, -1), y.chunk(3, -1)
            n, z = (x_n + (x_r + y_r).sigmoid() * y_n).tanh(), (x_z + y_z).sigmoid()
            h = n + z * (h - n)
        else:
            h = (x + y).relu() if mode == "RNN_RELU" else (x + y).tanh()
        states.append(h)
    return torch.cat(states[::-1] if backwards else states)


def _takes(order: int) -> int:
    """How many tensors the derivative of this order takes: those that the order before takes, and gives.

    Order 0: rows and weights to states. Order 1: these and the gradient of the states, to those of rows and weights.
    """
    takes, gives = 2, 1
    for _ in range(order):
        takes, gives = takes + gives, takes
    return takes


def _derivative(order: int, pull: Callable[..., Any], rest: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The formula's derivative of this order; pull: how the last is taken, as `vjp` does or one that nests."""
    if order == 0:
        return (formula(*tensors, *rest),)
    takes = _takes(order - 1)
    before = functools.partial(_derivative, order - 1, _nested, rest)
    return cast("tuple[Tensor, ...]", pull(before, tensors[:takes], tensors[takes:]))


def _nested(fn: Callable[..., Any], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Any:
    _, pull, *_ = torch.func.vjp(fn, *inputs)
    return pull(tuple(cotangents))


def _run(offsets: Tensor, tensors: list[Tensor], seed: Tensor | None, order: int, *options: Any) -> list[Tensor]:
    structure = pack(offsets, tensors[0].shape[0])
    if order == 0 and seed is None:
        return [_native(*tensors, *structure, *options)]
    return [x.contiguous() for x in _derivative(order, vjp, (*structure, seed, *options), *tensors)]


def _run_fake(offsets: Tensor, tensors: list[Tensor], seed: Tensor | None, order: int, *options: Any) -> list[Tensor]:
    if order:
        return [x.new_empty(x.shape) for x in tensors[: _takes(order - 1)]]
    _, hidden, proj, _, _, bidirectional, _ = options
    return [tensors[0].new_empty(tensors[0].shape[0], (proj or hidden) * (1 + bidirectional))]


_rnn = raw_op(
    "ragged_rnn",
    "(Tensor offsets, Tensor[] tensors, Tensor? seed, int order, "
    "str mode, int hidden, int proj, int layers, bool bias, bool bidirectional, float dropout) -> Tensor[]",
    _run,
    _run_fake,
)


class _RaggedRNN(torch.autograd.Function):
    """The states of the last layer, or a derivative of them: its own gradients are the derivative of the next order.

    So no order's formula is ever traced: the number of its steps is a number of the data.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(offsets: Tensor, seed: Tensor | None, order: int, options: tuple[Any, ...], *tensors: Tensor) -> Any:
        return tuple(_rnn(offsets, list(tensors), seed, order, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        offsets, seed, ctx.order, ctx.options, *tensors = inputs
        ctx.save_for_backward(offsets, seed, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        offsets, seed, *tensors = ctx.saved_tensors
        d_tensors = _ragged_rnn(offsets, seed, ctx.order + 1, ctx.options, *tensors, *grads)
        needs = ctx.needs_input_grad[4:]
        return (*[None] * 4, *(g if need else None for g, need in zip(d_tensors, needs, strict=True)))


_ragged_rnn = left_to_autograd(_RaggedRNN)


def ragged_rnn(rnn: nn.RNNBase, rows: Tensor, offsets: Tensor) -> Tensor:
    """The states of the last layer, by one operator."""
    weights = torch.cat([getattr(rnn, name).reshape(-1) for names in rnn._all_weights for name in names])
    seed = draw_seed(rnn.dropout if rnn.training else 0.0, rows.device)
    options = (
        rnn.mode,
        rnn.hidden_size,
        rnn.proj_size,
        rnn.num_layers,
        rnn.bias,
        rnn.bidirectional,
        float(rnn.dropout),
    )
    return _states(rows, weights, offsets, seed, *options)


@under_autocast("rows", "weights")
def _states(rows: Tensor, weights: Tensor, offsets: Tensor, seed: Tensor | None, *options: Any) -> Tensor:
    if forward_mode():
        return formula(rows, weights, *pack(offsets, rows.shape[0]), seed, *options)
    return cast("Tensor", _ragged_rnn(offsets, seed, 0, options, rows, weights)[0])
