"""The table of compositions: a row an operator or module and structure, a column what PyTorch composes it with.

``TRITON_INTERPRET=1 python -m tests._compositions`` runs the cells and prints it.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import pickle
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_attn import (
    ConcatAttention,
    GeneralAttention,
    GraphAttention,
    HierarchicalAttention,
    LocationAttention,
    LocationAwareAttention,
    RaggedRNN,
    Score,
    StatisticsPooling,
    WordByWordAttention,
    concat_attention,
    general_attention,
    graph_attention,
    hierarchical_attention,
    location_attention,
    location_aware_attention,
    statistics_pooling,
    word_by_word_attention,
)


@dataclasses.dataclass
class Row:
    """call: from `impl` and tensors to a tensor or several. make: from batch and length to the tensors."""

    name: str
    call: Callable
    make: Callable[[int, int], dict[str, Tensor]]
    module: nn.Module | None = None
    impls: tuple[str, ...] = ("auto", "triton")

    def tensors(self, impl: str, batch: int = 2, length: int = 5) -> dict[str, Tensor]:
        torch.manual_seed(0)
        made = self.make(batch, length)
        if impl != "triton":
            made = {name: x.double() if x.is_floating_point() else x for name, x in made.items()}
        if self.module is not None:
            self.module.to(torch.float32 if impl == "triton" else torch.float64)
        return made

    def run(self, impl: str, tensors: dict[str, Tensor]) -> list[Tensor]:
        results = self.call(impl, **tensors)
        results = results if isinstance(results, tuple) else (results,)
        return [x for x in results if x is not None]

    def loss(self, impl: str, tensors: dict[str, Tensor]) -> Tensor:
        return sum((torch.cos(torch.arange(x.numel()).view(x.shape) + i) * x + x * x).sum()
                   for i, x in enumerate(self.run(impl, tensors)))  # fmt: skip

    def parameters(self) -> dict[str, Tensor]:
        return {} if self.module is None else {f"module.{n}": x for n, x in self.module.named_parameters()}


def offsets(rows: int, parts: int) -> Tensor:
    return torch.tensor([rows * i // parts for i in range(parts + 1)], dtype=torch.int32)


def _rows() -> list[Row]:
    made: list[Row] = []

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape)

    def add(name: str, call: Callable, make: Callable, module: nn.Module | None = None, **options) -> None:
        made.append(Row(name, call, make, module, **options))

    def seen(*shape: int) -> Tensor:
        return torch.arange(shape[0] * shape[1]).view(shape) % 3 > 0

    def score(t: dict[str, Tensor], p: str) -> Score:
        gate = (t[p + "gw"], t[p + "gb"]) if p + "gw" in t else None
        return Score(t[p + "w"], t.get(p + "b"), t[p + "v"], gate, t.get(p + "ctx"))

    add(
        "location padded", lambda i, h, w: location_attention(h, w, impl=i), lambda B, T: {"h": r(B, T, 4), "w": r(4)}
    )
    add(
        "location padded, all options",
        lambda i, gw, gb, **t: location_attention(**t, gate=(gw, gb), return_weights=True, impl=i),
        lambda B, T: {
            "h": r(B, T, 4),
            "w": r(4, 3),
            "b": r(3),
            "v": r(3, 2),
            "gw": r(4, 3),
            "gb": r(3),
            "context": r(B, T, 3),
            "values": r(B, T, 2),
            "score_bias": r(B, T),
            "mask": seen(B, T),
        },
    )
    add(
        "location packed",
        lambda i, c, **t: location_attention(**t, cu_seqlens=c, impl=i),
        lambda B, T: {"h": r(B * T, 4), "w": r(4), "c": offsets(B * T, B)},
    )
    add(
        "location packed, all options",
        lambda i, gw, gb, c, context, **t: location_attention(
            **t, gate=(gw, gb), context=context[:, None], cu_seqlens=c, return_weights=True, impl=i
        ),
        lambda B, T: {
            "h": r(B * T, 4),
            "w": r(4, 3),
            "b": r(3),
            "v": r(3, 2),
            "gw": r(4, 3),
            "gb": r(3),
            "context": r(B, 3),
            "values": r(B * T, 2),
            "score_bias": r(B * T),
            "mask": seen(B, T).flatten(),
            "c": offsets(B * T, B),
        },
    )
    for name, window in (("causal", (None, 0)), ("window", (1, 1))):
        add(
            f"location padded, {name}",
            lambda i, window=window, **t: location_attention(**t, window=window, return_weights=True, impl=i),
            lambda B, T: {"h": r(B, T, 4), "w": r(4, 2), "values": r(B, T, 3), "mask": seen(B, T)},
        )
        add(
            f"location packed, {name}",
            lambda i, c, window=window, **t: location_attention(**t, cu_seqlens=c, window=window, impl=i),
            lambda B, T: {"h": r(B * T, 4), "w": r(4), "c": offsets(B * T, B)},
        )
    add(
        "concat padded",
        lambda i, **t: concat_attention(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4), "value": r(B, T, 4), "v": r(4)},
    )
    add(
        "concat padded, all options",
        lambda i, **t: concat_attention(**t, window=(2, 1), return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, T, 4),
            "key": r(B, 2, T, 4),
            "value": r(B, 2, T, 3),
            "v": r(2, 4),
            "score_bias": r(2, T, T),
            "mask": seen(B, T),
        },
    )
    add(
        "concat padded, one query",
        lambda i, **t: concat_attention(**t, impl=i),
        lambda B, T: {"query": r(B, 1, 4), "key": r(B, T, 4), "value": r(B, T, 4), "v": r(4)},
    )
    add(
        "concat packed",
        lambda i, c, **t: concat_attention(**t, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {
            "query": r(B * T, 2, 4),
            "key": r(B * T, 2, 4),
            "value": r(B * T, 2, 4),
            "v": r(4),
            "c": offsets(B * T, B),
        },
    )
    add(
        "general padded",
        lambda i, **t: general_attention(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4)},
    )
    add(
        "general padded, all options",
        lambda i, **t: general_attention(**t, activation="tanh", window=(2, 1), return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, T, 3),
            "key": r(B, 2, T, 4),
            "value": r(B, 2, T, 3),
            "weight": r(2, 3, 4),
            "score_bias": r(2, T, T),
            "mask": seen(B, T),
        },
    )
    add(
        "general packed",
        lambda i, c, **t: general_attention(**t, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {"query": r(B * T, 4), "key": r(B * T, 4), "value": r(B * T, 4), "c": offsets(B * T, B)},
    )
    add("statistics padded", lambda i, h: statistics_pooling(h, impl=i), lambda B, T: {"h": r(B, T, 4)})
    add(
        "statistics padded, all options",
        lambda i, **t: statistics_pooling(**t, return_weights=True, impl=i),
        lambda B, T: {
            "h": r(B, T, 4),
            "w": r(4, 3),
            "b": r(3),
            "v": r(3, 2),
            "context": r(B, T, 3),
            "values": r(B, T, 2),
            "mask": torch.arange(T).expand(B, T) < max(1, T - 1),
        },
    )
    add(
        "statistics packed",
        lambda i, c, **t: statistics_pooling(**t, cu_seqlens=c, return_weights=True, impl=i),
        lambda B, T: {"h": r(B * T, 4), "w": r(4, 3), "v": r(3), "c": offsets(B * T, B)},
    )
    add(
        "graph",
        lambda i, **t: graph_attention(**t, impl=i),
        lambda B, T: {
            "query": r(T, 4),
            "key": r(T, 4),
            "v": r(4),
            "indptr": torch.arange(T + 1) * 2,
            "indices": torch.arange(2 * T) % T,
        },
    )
    add(
        "graph, all options",
        lambda i, **t: graph_attention(**t, return_weights=True, impl=i),
        lambda B, T: {
            "query": r(T, 2, 4),
            "key": r(T, 2, 4),
            "v": r(2, 4),
            "value": r(T, 2, 4),
            "edge": r(2 * T, 2, 4),
            "indptr": torch.arange(T + 1) * 2,
            "indices": torch.arange(2 * T) % T,
        },
    )
    add(
        "hierarchical",
        lambda i, h, a, b, **t: hierarchical_attention(h, a, b, score(t, "i"), score(t, "o"), impl=i),
        lambda B, T: {
            "h": r(B * T, 4),
            "a": offsets(B * T, 2 * B),
            "b": offsets(2 * B, B),
            "iw": r(4, 3),
            "iv": r(3),
            "ow": r(4, 3),
            "ov": r(3),
        },
    )
    add(
        "hierarchical, all options",
        lambda i, h, a, b, mask, **t: hierarchical_attention(
            h, a, b, score(t, "i"), score(t, "o"), mask=mask, return_segments=True, return_weights=True, impl=i
        ),
        lambda B, T: {
            "h": r(B * T, 4),
            "a": offsets(B * T, 2 * B),
            "b": offsets(2 * B, B),
            "mask": seen(B, T).flatten(),
            **{
                p + n: x
                for p in "io"
                for n, x in (("w", r(4, 3)), ("b", r(3)), ("v", r(3)), ("gw", r(4, 3)), ("gb", r(3)))
            },
        },
    )
    words = {"w_y": (4, 3), "w_h": (4, 3), "w_r": (4, 3), "w": (3,), "w_t": (4, 4)}
    add(
        "word by word padded",
        lambda i, **t: word_by_word_attention(**t, impl=i),
        lambda B, T: {"premise": r(B, T, 4), "hypothesis": r(B, T, 4), **{n: r(*s) for n, s in words.items()}},
    )
    add(
        "word by word padded, all options",
        lambda i, **t: word_by_word_attention(**t, return_weights=True, impl=i),
        lambda B, T: {
            "premise": r(B, T, 4),
            "hypothesis": r(B, T, 4),
            **{n: r(*s) for n, s in words.items()},
            "state": r(B, 4),
            "mask": seen(B, T),
        },
    )
    add(
        "word by word packed",
        lambda i, c, **t: word_by_word_attention(**t, cu_seqlens_premise=c, cu_seqlens_hypothesis=c, impl=i),
        lambda B, T: {
            "premise": r(B * T, 4),
            "hypothesis": r(B * T, 4),
            **{n: r(*s) for n, s in words.items()},
            "state": r(B, 4),
            "c": offsets(B * T, B),
        },
    )
    add(
        "location-aware",
        lambda i, **t: location_aware_attention(**t, impl=i),
        lambda B, T: {
            "query": r(B, 4),
            "key": r(B, T, 4),
            "value": r(B, T, 4),
            "v": r(4),
            "previous": r(B, T),
            "conv_weight": r(2, 3),
            "u": r(2, 4),
            "mask": torch.ones(B, T, dtype=torch.bool),
            "score_bias": r(B, T),
        },
    )
    torch.manual_seed(1)
    m: nn.Module
    m = LocationAttention(4, 3, hops=2, gated=True, context_dim=2)
    add(
        "LocationAttention", lambda i, m=m, **t: m(**t, impl=i), lambda B, T: {"h": r(B, T, 4), "context": r(B, 2)}, m
    )
    m = ConcatAttention(4, 4, 3, num_heads=2, bias=True, context_dims=(2,))
    add(
        "ConcatAttention",
        lambda i, x, m=m, **t: m(**t, contexts=(x,), impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4), "x": r(B, 2)},
        m,
    )
    m = GeneralAttention(4, num_heads=2)
    add(
        "GeneralAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4)},
        m,
    )
    m = StatisticsPooling(4, 3, per_channel=True, global_context=True)
    add(
        "StatisticsPooling",
        lambda i, c, m=m, **t: m(**t, cu_seqlens=c, impl=i),
        lambda B, T: {"h": r(B * T, 4), "c": offsets(B * T, B)},
        m,
    )
    m = GraphAttention(4, 3, num_heads=2, share_weights=True, edge_dim=2)
    add(
        "GraphAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {
            "x": r(T, 4),
            "indptr": torch.arange(T + 1) * 2,
            "indices": torch.arange(2 * T) % T,
            "edge": r(2 * T, 2),
        },
        m,
    )
    m = HierarchicalAttention(4, 3, between=RaggedRNN(nn.GRU(4, 3, bidirectional=True)), between_dim=6)
    add(
        "HierarchicalAttention, RaggedRNN",
        lambda i, h, a, b, m=m: m(h, a, b, impl=i),
        lambda B, T: {"h": r(B * T, 4), "a": offsets(B * T, 2 * B), "b": offsets(2 * B, B)},
        m,
    )
    m = WordByWordAttention(4, 4, 3)
    add(
        "WordByWordAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"premise": r(B, T, 4), "hypothesis": r(B, T, 4)},
        m,
    )
    m = LocationAwareAttention(4, 4, 3, channels=2, width=3)
    add(
        "LocationAwareAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"query": r(B, 4), "key": r(B, T, 4), "previous": r(B, T)},
        m,
    )
    return made


ROWS = {row.name: row for row in _rows()}


# --- Columns: each gives pairs (got, want) --------------------------------------------------------------------------

Pairs = list[tuple[str, Tensor, Tensor]]
BACKEND = "aot_eager"


def live(row: Row, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}


def value_and_grads(row: Row, call: Callable[[dict], Tensor], tensors: dict) -> dict:
    leaves = {name: x for name, x in {**tensors, **row.parameters()}.items() if x.requires_grad}
    for x in leaves.values():
        x.grad = None
    loss = call(tensors)
    loss.backward()  # what reentrant checkpointing can
    grads = {f"d{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    return {"loss": loss.detach(), **grads}


def pairs(got: dict, want: dict) -> Pairs:
    assert got.keys() == want.keys()
    return [(name, got[name], want[name]) for name in want]


def same_loss(change: Callable, *, fullgraph: bool = False, sizes=((2, 5),)) -> Callable:
    """A column: the loss, called as `change` says, has the reference's value and gradients, at these sizes."""

    def column(row: Row, impl: str) -> Pairs:
        call, out = change(lambda t: row.loss(impl, t)), []
        for batch, length in sizes:
            tensors = live(row, row.tensors(impl, batch, length))
            want = value_and_grads(row, lambda t: row.loss("reference", t), tensors)
            out += pairs(value_and_grads(row, call, tensors), want)
        return out

    return column


def same_inputs(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], *, compiled: bool = True) -> Callable:
    """A column: the tensors are made of the leaves by `change`, eagerly and in one graph."""

    def column(row: Row, impl: str) -> Pairs:
        leaves = live(row, row.tensors(impl))
        want = value_and_grads(row, lambda t: row.loss("reference", change(t)), leaves)
        out = pairs(value_and_grads(row, lambda t: row.loss(impl, change(t)), leaves), want)
        if compiled:
            graph = torch.compile(lambda t: row.loss(impl, change(t)), backend=BACKEND, fullgraph=True)
            out += pairs(value_and_grads(row, graph, leaves), want)
        return out

    return column


def twins(tensors: dict[str, Tensor], how: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Every tensor of the shape of an earlier one replaced by that one."""
    first: dict[tuple, Tensor] = {}
    return {
        name: how(first[x.shape]) if first.setdefault(x.shape, x) is not x and x.is_floating_point() else x
        for name, x in tensors.items()
    }


def transformed(make: Callable[[Callable], Callable]) -> Callable:
    """A column: what `make` makes of the loss as a function of its first tensor, others captured and live."""

    def column(row: Row, impl: str) -> Pairs:
        tensors = live(row, row.tensors(impl))
        name = next(iter(tensors))
        x = tensors[name].detach()
        got = make(lambda y: row.loss(impl, {**tensors, name: y}), True)(x)
        want = make(lambda y: row.loss("reference", {**tensors, name: y}), False)(x)
        flat = zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=True)
        return [(f"{name} {i}", g.detach(), w.detach()) for i, (g, w) in enumerate(flat)]

    return column


def maybe(compiled: bool, fn: Callable, **options) -> Callable:
    return torch.compile(fn, backend=BACKEND, **options) if compiled else fn


def double_grad(loss: Callable) -> Callable:
    return torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())


def double_backward(row: Row, impl: str) -> Pairs:
    def penalty(which: str) -> Callable:
        def call(tensors: dict[str, Tensor]) -> Tensor:
            leaves = [x for x in {**tensors, **row.parameters()}.values() if x.requires_grad]
            grads = torch.autograd.grad(row.loss(which, tensors), leaves, create_graph=True, materialize_grads=True)
            return sum(g.square().sum() for g in grads)

        return call

    tensors = live(row, row.tensors(impl))
    return pairs(value_and_grads(row, penalty(impl), tensors), value_and_grads(row, penalty("reference"), tensors))


def hooked(call: Callable) -> Callable:
    def run(tensors: dict[str, Tensor]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
            return call(tensors)

    return run


def checkpointed(reentrant: bool) -> Callable:
    def change(call: Callable) -> Callable:
        def run(tensors: dict[str, Tensor]) -> Tensor:
            names = list(tensors)
            return checkpoint(
                lambda *xs: call(dict(zip(names, xs, strict=True))), *tensors.values(), use_reentrant=reentrant
            )

        return run

    return change


def inference(row: Row, impl: str) -> Pairs:
    tensors = row.tensors(impl)
    with torch.inference_mode():
        got = row.run(impl, {name: x.clone() for name, x in tensors.items()})
        compiled = torch.compile(lambda t: row.run(impl, t), backend=BACKEND, fullgraph=True)(tensors)
    want = row.run("reference", tensors)
    return [(str(i), g, w) for i, (g, w) in enumerate(zip([*got, *compiled], [*want, *want], strict=True))]


def autocast(row: Row, impl: str) -> Pairs:
    """In bfloat16: compiled is eager, to the bit."""
    tensors = {n: x.float() if x.is_floating_point() else x for n, x in row.tensors("triton").items()}
    with torch.autocast("cpu", torch.bfloat16):
        call = torch.compile(lambda t: row.loss(impl, t), backend=BACKEND, fullgraph=True)
        leaves = live(row, tensors)
        return pairs(value_and_grads(row, call, leaves), value_and_grads(row, lambda t: row.loss(impl, t), leaves))


class Exported(nn.Module):
    """The call of a row, on its tensors in their order."""

    def __init__(self, row: Row, impl: str) -> None:
        super().__init__()
        self.call, self.impl, self.module, self.names = row.call, impl, row.module, list(row.tensors(impl))

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.call(self.impl, **dict(zip(self.names, tensors, strict=True)))


def export(decompose: bool, reload: bool = False) -> Callable:
    def column(row: Row, impl: str) -> Pairs:
        tensors = row.tensors(impl)
        program = torch.export.export(Exported(row, impl), tuple(tensors.values()))
        program = program.run_decompositions() if decompose else program
        if reload:
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            buffer.seek(0)
            program = torch.export.load(buffer)
        got = program.module()(*tensors.values())
        got, want = got if isinstance(got, tuple) else (got,), row.run("reference", tensors)
        return [(str(i), g, w) for i, (g, w) in enumerate(zip([x for x in got if x is not None], want, strict=True))]

    return column


def copied(copy_of: Callable[[nn.Module], nn.Module]) -> Callable:
    """A column of modules: a copy has the module's results and gradients."""

    def column(row: Row, impl: str) -> Pairs:
        tensors = live(row, row.tensors(impl))
        assert row.module is not None
        twin = copy_of(row.module)
        other = dataclasses.replace(row, module=twin, call=lambda i, **t: row.call(i, m=twin, **t))
        want = value_and_grads(row, lambda t: row.loss("reference", t), tensors)
        return pairs(value_and_grads(other, lambda t: other.loss(impl, t), tensors), want)

    return column


def functional(row: Row, impl: str) -> Pairs:
    tensors = row.tensors(impl)
    assert row.module is not None
    module = row.module
    parameters = {name: x.detach() for name, x in module.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, which: str) -> Tensor:
            return row.loss(which, tensors)

    def grads(which: str) -> dict[str, Tensor]:
        def loss(live_parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(
                Loss(), {f"module.{n}": x for n, x in live_parameters.items()}, (which,)
            )

        return torch.func.grad(loss)(parameters)

    return pairs(grads(impl), grads("reference"))


def noncontiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.stack([x, x], -1)[..., 0] if x.is_floating_point() else x for n, x in tensors.items()}


def expanded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: x[:1].expand(x.shape) if x.is_floating_point() and x.dim() else x for n, x in tensors.items()}


def frozen(row: Row, impl: str) -> Pairs:
    """The first tensor needs no gradient, what is captured does."""
    tensors = live(row, row.tensors(impl))
    name = next(iter(tensors))
    tensors[name] = tensors[name].detach()
    captured = {n: x for n, x in tensors.items() if n != name}
    if not any(x.requires_grad for x in {**captured, **row.parameters()}.values()):
        return []
    call = torch.compile(lambda x: row.loss(impl, {name: x, **captured}), backend=BACKEND, fullgraph=True)
    want = value_and_grads(row, lambda t: row.loss("reference", t), tensors)
    return pairs(value_and_grads(row, lambda t: call(t[name]), tensors), want)


def compiled(**options) -> Callable:
    return lambda call: torch.compile(call, fullgraph=True, **options)


func = torch.func
COLUMNS: dict[str, Callable[[Row, str], Pairs]] = {
    "compile": same_loss(compiled(backend=BACKEND)),
    "compile, dynamic": same_loss(compiled(backend=BACKEND, dynamic=True), sizes=((2, 5), (3, 7))),
    "Inductor": same_loss(compiled()),
    "compile(grad)": transformed(lambda f, c: maybe(c, func.grad(f), fullgraph=True)),
    "grad(compile)": transformed(lambda f, c: func.grad(maybe(c, f))),
    "compile(grad(grad))": transformed(lambda f, c: maybe(c, double_grad(f), fullgraph=True)),
    "compile(vmap(grad))": transformed(
        lambda f, c: lambda x: maybe(c, torch.vmap(func.grad(f)), fullgraph=True)(torch.stack([x, x + 1]))),
    "vmap": transformed(lambda f, c: lambda x: torch.vmap(f)(torch.stack([x, x + 1]))),
    "vmap(grad)": transformed(lambda f, c: lambda x: torch.vmap(func.grad(f))(torch.stack([x, x + 1]))),
    "jacrev": transformed(lambda f, c: func.jacrev(f)),
    "jvp": transformed(lambda f, c: lambda x: func.jvp(f, (x,), (torch.ones_like(x),))),
    "jacfwd": transformed(lambda f, c: func.jacfwd(f)),
    "jvp(grad)": transformed(lambda f, c: lambda x: func.jvp(func.grad(f), (x,), (torch.ones_like(x),))),
    "double backward": double_backward,
    "checkpoint": same_loss(checkpointed(False)),
    "checkpoint, reentrant": same_loss(checkpointed(True)),
    "saved-tensor hooks": same_loss(hooked),
    "inference_mode": inference,
    "autocast": autocast,
    "export": export(False),
    "export, decomposed, saved": export(True, reload=True),
    "functional_call": functional,
    "deepcopy": copied(copy.deepcopy),
    "pickle": copied(lambda m: pickle.loads(pickle.dumps(m))),
    "one tensor twice": same_inputs(lambda t: twins(t, lambda x: x)),
    "a view of another": same_inputs(lambda t: twins(t, lambda x: x.view_as(x))),
    "a frozen input": frozen,
    "non-contiguous": same_inputs(noncontiguous),
    "expanded": same_inputs(expanded),
    "batch 1, length 1": same_loss(lambda f: f, sizes=((1, 5), (2, 1), (1, 1))),
}  # fmt: skip
FORWARD = ("jvp", "jacfwd", "jvp(grad)")
OF_MODULES = ("functional_call", "deepcopy", "pickle")


def applies(row: Row, column: str) -> bool:
    return column not in OF_MODULES or row.module is not None


def cell(row: Row, column: str, impl: str) -> str:
    """What came: ✓, or "clear error"; anything else raises."""
    torch.compiler.reset()
    rnn = contextlib.nullcontext() if row.name.count("RNN") == 0 else torch._dynamo.config.patch(allow_rnn=True)
    try:
        with rnn:
            found = COLUMNS[column](row, impl)
    except NotImplementedError as error:
        if impl == "triton" and column in FORWARD and "has no forward mode" in str(error):
            return "clear error"
        raise
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if impl != "triton" else {"rtol": 2e-3, "atol": 2e-4}
    for name, got, want in found:
        torch.testing.assert_close(got, want, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return "✓"


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the cells and print the table, as Markdown.")
    parser.add_argument("--row", action="append", help="this row; may be repeated; all where it is not given")
    parser.add_argument("--skip", action="append", default=[], help="leave this column out; may be repeated")
    parser.add_argument("--impl", action="append", help="auto or triton; both where it is not given")
    options = parser.parse_args()
    columns = [name for name in COLUMNS if name not in options.skip]
    print("| | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|", flush=True)
    for row in ROWS.values():
        for impl in options.impl or row.impls:
            if options.row and row.name not in options.row:
                continue
            found = []
            for column in columns:
                try:
                    found.append(cell(row, column, impl) if applies(row, column) else "")
                except Exception as error:
                    found.append("✗")
                    print(f"{row.name} | {column} | {impl}: {type(error).__name__}: {error}"[:400], file=sys.stderr)
            print(f"| {row.name}, `{impl}` | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
