"""The table of compositions: a row an operator or module and structure, a column what PyTorch composes it with.

``TRITON_INTERPRET=1 python tests/_compositions.py`` runs the cells and prints it.
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
from _compare import Result, assert_as_exact, assert_matches_reference
from _composition_rows import CPU, ROWS, Row
from torch import Tensor, func, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

# --- Columns: each gives pairs (got, want) --------------------------------------------------------------------------

Pairs = list[tuple[str, Tensor, Tensor]]
BACKEND = "aot_eager"


def live(row: Row, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in tensors.items()}


def value_and_grads(row: Row, call: Callable[[dict], Tensor], tensors: dict) -> dict:
    leaves = {name: x for name, x in {**tensors, **row.parameters()}.items() if x.requires_grad}
    for x in leaves.values():
        x.grad = None
    torch.manual_seed(0)
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
    """Every tensor of the shape and dtype of an earlier one replaced by that one."""
    first: dict[tuple, Tensor] = {}
    return {
        name: how(first[x.shape, x.dtype])
        if first.setdefault((x.shape, x.dtype), x) is not x and x.is_floating_point()
        else x
        for name, x in tensors.items()
    }


def transformed(make: Callable[[Callable], Callable], *, every: bool = False) -> Callable:
    """A column: what `make` makes of the loss as a function of its first tensor, or of every one; others are live."""

    def column(row: Row, impl: str) -> Pairs:
        tensors = live(row, row.tensors(impl))
        out: Pairs = []
        for name in [n for n, x in tensors.items() if x.requires_grad][: None if every else 1]:
            x = tensors[name].detach()
            got = make(lambda y, name=name: row.loss(impl, {**tensors, name: y}), True)(x)
            want = make(lambda y, name=name: row.loss("reference", {**tensors, name: y}), False)(x)
            flat = zip(tree_leaves(got), tree_leaves(want), strict=True)
            out += [(f"{name} {i}", g.detach(), w.detach()) for i, (g, w) in enumerate(flat)]
        return out

    return column


def samples(fn: Callable, *, none: bool = False) -> Callable:
    """`fn` by `vmap` over two samples, and over none."""
    each = torch.vmap(fn)
    return lambda x: [each(torch.stack([x, x + 1])), *([each(x.new_empty(0, *x.shape))] if none else [])]


def maybe(compiled: bool, fn: Callable, **options) -> Callable:
    return torch.compile(fn, backend=BACKEND, **options) if compiled else fn


def double_grad(loss: Callable) -> Callable:
    return func.grad(lambda x: func.grad(loss)(x).square().sum())


def gradients(row: Row, impl: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """Of the loss, which have gradients themselves."""
    leaves = [x for x in {**tensors, **row.parameters()}.values() if x.requires_grad]
    torch.manual_seed(0)
    return list(torch.autograd.grad(row.loss(impl, tensors), leaves, create_graph=True, materialize_grads=True))


def double_backward(row: Row, impl: str) -> Pairs:
    """Through the gradients of the results too, which depend on the results. The kernel's by the error rule."""
    if impl == "triton" and row.module is None:

        def first(*, impl: str, **leaves: Tensor) -> Tensor:
            return torch.cat([g.flatten() for g in gradients(row, impl, leaves)])

        assert_matches_reference(first, row.tensors(impl))
        return []

    def penalty(which: str) -> Callable:
        return lambda tensors: sum(g.square().sum() for g in gradients(row, which, tensors))

    tensors = live(row, row.tensors(impl))
    return pairs(value_and_grads(row, penalty(impl), tensors), value_and_grads(row, penalty("reference"), tensors))


def differences(row: Row, impl: str) -> Pairs:
    """First and second derivatives are those of finite differences, for numbers and for shapes of their own."""
    tensors = live(row, row.tensors(impl, 2, 3))
    leaves = {n: x for n, x in tensors.items() if x.requires_grad}

    def fn(*xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(row.run(impl, {**tensors, **dict(zip(leaves, xs, strict=True))}))

    torch.autograd.gradcheck(fn, tuple(leaves.values()), fast_mode=True)
    torch.autograd.gradgradcheck(fn, tuple(leaves.values()), fast_mode=True)
    return []


def batched(row: Row, impl: str) -> Pairs:
    """Gradients for two cotangents at once, as a vectorised Jacobian asks for them."""
    tensors = live(row, row.tensors(impl))
    leaves = {name: x for name, x in {**tensors, **row.parameters()}.items() if x.requires_grad}
    starts = next(iter(leaves.values())).new_tensor([1.0, -2.0])

    def grads(which: str, start: Tensor, **options) -> tuple[Tensor, ...]:
        loss = row.loss(which, tensors)
        return torch.autograd.grad(loss, list(leaves.values()), start, materialize_grads=True, **options)

    want = [grads("reference", start) for start in starts]
    got = grads(impl, starts, is_grads_batched=True)
    return [(f"d{n}", g, torch.stack(w)) for n, g, *w in zip(leaves, got, *want, strict=True)]


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

    def run(call: Callable[[dict], list[Tensor]]) -> list[Tensor]:
        torch.manual_seed(0)
        return call({name: x.clone() for name, x in tensors.items()})

    with torch.inference_mode():
        got = run(lambda t: row.run(impl, t))
        compiled = run(torch.compile(lambda t: row.run(impl, t), backend=BACKEND, fullgraph=True))
    want = run(lambda t: row.run("reference", t))
    return [(str(i), g, w) for i, (g, w) in enumerate(zip([*got, *compiled], [*want, *want], strict=True))]


def autocast(row: Row, impl: str) -> Pairs:
    """As by hand, with float32 gradients; float64 stays; compiled as near to float32 as eager, by the error rule."""
    kind = row.device.type
    wide = row.tensors(impl)
    with torch.autocast(kind, torch.bfloat16):
        assert impl == "triton" or all(x.dtype == torch.float64 for x in row.run(impl, wide))
    tensors = live(row, {n: x.float() if x.is_floating_point() else x for n, x in row.tensors("triton").items()})
    for dtype in (torch.float16, torch.bfloat16) if row.module is None else ():
        by_hand = {n: x.to(dtype) if x.is_floating_point() and n not in row.kept else x for n, x in tensors.items()}
        with torch.autocast(kind, dtype):
            results = row.run(impl, tensors)
            loss = row.loss(impl, tensors)
        for got, want in zip(results, row.run(impl, by_hand), strict=True):
            assert got.dtype == want.dtype  # float32 where it is no output: scores, states
            assert torch.equal(got, want)
        leaves = [x for x in tensors.values() if x.requires_grad]
        for got, want in zip(*(torch.autograd.grad(x, leaves) for x in (loss, row.loss(impl, by_hand))), strict=True):
            assert got.dtype == torch.float32
            assert torch.equal(got, want)
            assert got.any()

    def result(call: Callable[[dict], Tensor]) -> Result:
        found = value_and_grads(row, call, tensors)
        return Result({"loss": found.pop("loss")}, found)

    exact = result(lambda t: row.loss("reference", t))
    with torch.autocast(kind, torch.bfloat16):
        eager = result(lambda t: row.loss(impl, t))
        got = result(torch.compile(lambda t: row.loss(impl, t), backend=BACKEND, fullgraph=True))
    assert_as_exact(got, eager, exact, dtype=torch.bfloat16)
    return []


class RawCalls(TorchDispatchMode):
    """Keeps the calls of raw operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, op: torch._ops.OpOverload, types, args=(), kwargs=None) -> object:
        if op.namespace == "fused_attn":
            self.calls.append((op, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)))
        return op(*args, **(kwargs or {}))


def raw_operators(row: Row, impl: str) -> Pairs:
    """Those of a call and its backward pass `opcheck`: in bfloat16, another layout, for fewer gradients."""
    tensors = {n: x.mT.contiguous().mT if x.dim() > 1 else x for n, x in row.tensors(impl).items()}
    narrow = {n: x.bfloat16() if x.is_floating_point() else x for n, x in tensors.items()}
    with RawCalls() as raw:
        for each in (tensors, narrow) if row.module is None else (tensors,):
            row.loss(impl, live(row, each)).backward()
    assert raw.calls or impl == "auto"  # which takes the reference for some
    for op, args in raw.calls:
        torch.library.opcheck(op, args)
        if op._schema.arguments[-1].name == "needs":
            torch.library.opcheck(op, (*args[:-1], [False] * len(args[-1])))
            known = [x.name[0] == "d" and isinstance(x.type, torch.OptionalType) for x in op._schema.arguments]
            fewer = [None if may else x for may, x in zip(known, args, strict=True)]
            torch.library.opcheck(op, tuple(fewer))
    return []


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


class Loss(nn.Module):
    """The loss of a row of a module, as a module."""

    def __init__(self, row: Row, impl: str) -> None:
        super().__init__()
        self.row, self.impl, self.module = row, impl, row.module

    def forward(self, tensors: dict[str, Tensor]) -> Tensor:
        return self.row.loss(self.impl, tensors)


def functional(row: Row, impl: str) -> Pairs:
    """Gradients of parameters that are not the module's, of one set and, by `vmap`, of two, with a sample each."""
    tensors = row.tensors(impl)
    name = next(iter(tensors))
    given = {f"module.{n}": x.detach() / 2 for n, x in row.module.named_parameters()}
    more = {n: torch.stack([x, -x]) for n, x in given.items()}

    def grad(which: str, parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        loss = Loss(row, which)
        return func.grad(lambda p: func.functional_call(loss, p, ({**tensors, name: x},)))(parameters)

    x = tensors[name]
    xs = torch.stack([x, x + 1])
    want = [grad("reference", {n: p[i] for n, p in more.items()}, xs[i]) for i in range(2)]
    return [
        *pairs(grad(impl, given, x), grad("reference", given, x)),
        *pairs(
            torch.vmap(lambda p, x: grad(impl, p, x))(more, xs),
            {n: torch.stack([w[n] for w in want]) for n in want[0]},
        ),
    ]


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


COLUMNS: dict[str, Callable[[Row, str], Pairs]] = {
    "compile": same_loss(compiled(backend=BACKEND)),
    "compile, dynamic": same_loss(compiled(backend=BACKEND, dynamic=True), sizes=((2, 5), (3, 7))),
    "Inductor": same_loss(compiled()),
    "compile(grad)": transformed(lambda f, c: maybe(c, func.grad(f), fullgraph=True)),
    "grad(compile)": transformed(lambda f, c: func.grad(maybe(c, f))),
    "compile(grad(grad))": transformed(lambda f, c: maybe(c, double_grad(f), fullgraph=True)),
    "compile(vmap(grad))": transformed(
        lambda f, c: lambda x: maybe(c, torch.vmap(func.grad(f)), fullgraph=True)(torch.stack([x, x + 1]))
    ),
    "vmap": transformed(lambda f, c: samples(f, none=True), every=True),
    "vmap(grad)": transformed(lambda f, c: samples(func.grad(f)), every=True),
    "jacrev": transformed(lambda f, c: func.jacrev(f)),
    "jvp": transformed(lambda f, c: lambda x: func.jvp(f, (x,), (torch.ones_like(x),))),
    "jacfwd": transformed(lambda f, c: func.jacfwd(f)),
    "jvp(grad)": transformed(lambda f, c: lambda x: func.jvp(func.grad(f), (x,), (torch.ones_like(x),))),
    "double backward": double_backward,
    "gradcheck": differences,
    "batched gradients": batched,
    "checkpoint": same_loss(checkpointed(False)),
    "checkpoint, reentrant": same_loss(checkpointed(True)),
    "saved-tensor hooks": same_loss(hooked),
    "inference_mode": inference,
    "autocast": autocast,
    "raw operators": raw_operators,
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
}
FORWARD = ("jvp", "jacfwd", "jvp(grad)")
OF_MODULES = ("functional_call", "deepcopy", "pickle")


def applies(row: Row, column: str, impl: str) -> bool:
    if column == "gradcheck" and impl == "triton":  # which has no float64
        return False
    return (column not in OF_MODULES or row.module is not None) and (row.columns is None or column in row.columns)


def cell(row: Row, column: str, impl: str, device: torch.device = CPU) -> str:
    """What came: ✓, or "clear error"; anything else raises."""
    torch.compiler.reset()
    row = dataclasses.replace(row, device=device)
    rnn = contextlib.nullcontext() if row.name.count("RNN") == 0 else torch._dynamo.config.patch(allow_rnn=True)
    try:
        with rnn:
            found = COLUMNS[column](row, impl)
    except NotImplementedError as error:
        if impl == "triton" and column in FORWARD and "has no forward mode" in str(error):
            return "clear error"
        raise
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if impl != "triton" else {"rtol": 1e-4, "atol": 1e-5}
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
        for impl in options.impl or ("auto", "triton"):
            if options.row and row.name not in options.row:
                continue
            found = []
            for column in columns:
                try:
                    found.append(cell(row, column, impl) if applies(row, column, impl) else "")
                except Exception as error:
                    found.append("✗")
                    print(f"{row.name} | {column} | {impl}: {type(error).__name__}: {error}"[:400], file=sys.stderr)
            print(f"| {row.name}, `{impl}` | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
