"""Bad input to every public function and module: an error that names an argument, in the caller's own words."""

import inspect
import re

import numpy as np
import pytest
import torch
from _inputs import (
    BAD_OPTIONS,
    INDICES,
    INDPTR,
    ROWS,
    TENSOR,
    TK,
    TQ,
    WRONG_VALUES,
    A,
    B,
    D,
    E,
    N,
    bad_numbers,
    bad_offsets,
    bad_tensors,
    floats,
    ints,
    map_tensors,
    tensors,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn
from fused_attn import (
    ConcatAttention,
    LocationAttention,
    concat_attention,
    general_attention,
    graph_attention,
    location_attention,
    location_aware_attention,
    statistics_pooling,
    transpose_csr,
)
from fused_attn.kernels import chip

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
FIRST = {"h", "rows", "query", "premise", "edge_index", "indices", "x"}  # later arguments have to be as these
SAME = {"indptr": "edge_index"}  # one argument, of two forms
LATER = {  # axes whose size an argument is the first to say, or says alone, in rows of such names
    *(("", name, -1) for name in ("value", "value", "indices", "hypothesis")),
    *(("", name, -2) for name in ("key", "hypothesis", "conv_weight", "outer_context")),
    *((("location aware, packed", name, axis) for name, axis in (("previous", -1), ("conv_weight", -3)))),
    ("word by word, packed premise", "hypothesis", -3),
    *((row, "key", -3) for row in ("concat, packed heads", "concat, packed queries", "general, packed heads")),
    ("graph, heads", "key", -3),
    ("concat, packed heads", "mask", -2),
    *((row, "cu_seqlens", -1) for row in ("target, packed", "TargetAttention, packed")),
    ("GraphAttention, self loops", "indptr", -1),  # a list of edges
    *((row, "w", -1) for row in ("location, gated", "location, packed", "location, window", "stat", "word by word")),
    *(("target", name, -1) for name in ("w1", "w2")),
    *(("location, packed hops", "v", -1), ("general", "key", -1), ("LocationAttention", "cu_seqlens", -1)),
    *(("HierarchicalAttention", f"{level}_offsets", -1) for level in ("inner", "outer")),
    ("GeneralAttention", "mask", -2),  # one more than B is Tq
}


def raised(row, **changed):
    """What a call with some arguments changed raises: its type, the name there, the text; None where it passes."""
    try:
        row.make()(**{**row.arguments, **changed})
    except (ValueError, TypeError) as error:
        text = str(error)
        match = re.match(r"([a-z_]+[a-z0-9_.]*(\[\d+\])?): expected ", text)
        assert match, text
        assert "; got " in text, text
        return type(error), match[1], text
    return None


def stem(name):
    """`gate` of `gate[0]`, `inner` of `inner.w`."""
    return re.split(r"[.\[]", name)[0]


@every_row
def test_the_good_calls_are_good(row):
    assert raised(row) is None


@every_row
def test_every_tensor_that_is_none_of_the_kind_raises_with_its_name(row):
    has = inspect.signature(row.function).parameters
    for name in tensors(row.arguments):
        for kind, bad in bad_tensors(row.arguments[name]).items():
            if kind == "jagged" and name in ("h", "context", "value", "score_bias"):
                continue  # these may be, together
            if kind == "jagged" and name in ("query", "key") and "cu_seqlens_q" in has:
                continue  # and either of these
            if kind == "jagged" and name in ("key", "previous", "mask") and "previous" in has:
                continue  # and these
            if kind == "jagged" and name == "key" and {"query", "cu_seqlens"} <= has.keys():
                continue  # and the history of one query
            if (kind, name) in {("rank 0", "score_bias"), ("meta", "edge_index")}:
                continue  # a bias broadcasts, and the edges are alone
            came = raised(row, **{name: bad})
            assert came is not None, (name, kind)
            error, named, text = came
            if (kind, name) != ("nested", "h"):  # which some take, of the other layout
                assert error is (ValueError if kind in WRONG_VALUES else TypeError), (name, kind, came)
            if name in FIRST and kind in ("meta", "float64"):
                assert stem(named) in has, (name, kind, came)
            else:
                several = (kind, name) == ("list", "context") and not isinstance(row.make(), torch.nn.Module)
                assert named in (f"{name}[0]" if several else name, SAME.get(name)), (kind, came)
                assert kind != "meta" or "expected device cpu; got meta" in text, came


@every_row
def test_every_option_that_is_none_raises_with_its_name(row):
    for name in row.options():
        for error, value in BAD_OPTIONS[name].items():
            for bad in value:
                if name == "scale" and bad is TENSOR and row.function is general_attention:
                    continue  # a scale that learns
                if bad is None and inspect.signature(row.function).parameters[name].default is None:
                    continue
                came = raised(row, **{name: bad})
                assert came is not None, (name, bad)
                assert (came[0], stem(came[1])) == (error, name), came


@pytest.mark.parametrize(("title", "row"), ROWS.items(), ids=ROWS.keys())
def test_every_size_that_differs_is_named(title, row):
    """One more along an axis: wrong where the size is bound, else as good as before."""
    has = inspect.signature(row.function).parameters
    later = {(name, axis) for start, name, axis in LATER if title.startswith(start)}
    for name in tensors(row.arguments):
        x = row.arguments[name]
        for axis in range(-x.dim(), 0):
            came = raised(row, **{name: torch.cat([x, x.narrow(axis, 0, 1)], axis)})
            if name in FIRST or (name, axis) in later:
                assert came is None or (came[0] is ValueError and stem(came[1]) in has), (name, axis, came)
            else:
                assert came is not None, (name, axis)
                assert came[0] is ValueError, (axis, came)
                assert came[1] in (name, SAME.get(name)), (axis, came)
            if came is not None and "expected shape" in came[2] and came[1] not in ("edge_index", "conv_weight"):
                assert re.search(r"= \d+ from ", came[2]), came


@every_row
def test_sizes_of_0_pass_or_are_named(row):
    has = inspect.signature(row.function).parameters
    for name in tensors(row.arguments):
        x = row.arguments[name]
        for axis in range(x.dim()):
            came = raised(row, **{name: x.narrow(axis, 0, 0)})
            known = {*has, *SAME.values()}
            assert came is None or (came[0] is ValueError and stem(came[1]) in known), (name, axis, came)


@every_row
def test_offsets_that_are_none_raise_with_their_name(row):
    for name in tensors(row.arguments):
        if "cu_seqlens" in name or name in ("inner_offsets", "offsets"):
            last = int(row.arguments[name][-1])
            for kind, bad in bad_offsets(row.arguments[name], last).items():
                came = raised(row, **{name: bad})
                assert came is not None, (name, kind)
                wrong_type = not isinstance(bad, torch.Tensor) or bad.dtype != torch.int32
                assert came[:2] == (TypeError if wrong_type else ValueError, name), (kind, came)
                if kind in bad_numbers(last):
                    assert f"{name}: expected non-decreasing offsets from 0 to " in came[2], came


@every_row
def test_the_same_on_meta_gives_shapes(row):
    if row is ROWS["GraphAttention, self loops"]:
        return  # how many there are is in the numbers

    def shapes(x):
        return [shapes(y) for y in x] if isinstance(x, tuple) else None if x is None else tuple(x.shape)

    call, arguments = row.make(), row.arguments
    here = call(**arguments)
    call = call.to("meta") if isinstance(call, torch.nn.Module) else call
    there = call(**map_tensors(lambda x: x.to("meta"), arguments))
    assert shapes(there) == shapes(here)


HABITS = {
    "attn_mask": "mask=",
    "key_padding_mask": "mask=~key_padding_mask",
    "is_causal": r"window=\(None, 0\)",
    "need_weights": "return_weights=True",
    "attention_mask": r"mask=attention_mask\.bool\(\)",
}


@every_row
def test_habits_are_told_what_to_pass(row):
    has = inspect.signature(row.function).parameters
    for name, text in HABITS.items():
        if re.match(r"\w+", text)[0] in has:
            with pytest.raises(
                TypeError, match=rf"^{name}: expected .*{text}.*; got {name}=, which \w+ does not have"
            ):
                row.make()(**row.arguments, **{name: None})
        else:
            with pytest.raises(TypeError, match=name):
                row.make()(**row.arguments, **{name: None})


def test_the_signatures_stay():
    for name in fused_attn.__all__:
        thing = getattr(fused_attn, name)
        if name.endswith("_attention") or name.endswith("Attention") or name.endswith("ooling"):
            call = getattr(thing, "forward", thing)
            parameters = inspect.signature(call).parameters
            assert "impl" in parameters
            assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
            assert call.__doc__


# --- NumPy's scalars, autocast --------------------------------------------------------------------------------------


def test_numpy_scalars_are_numbers():
    query, key, v = floats(B, TQ, A), floats(B, TK, A), floats(A)
    want = concat_attention(query, key, key, v, window=(1, None), return_weights=True)
    got = concat_attention(
        query, key, key, v, window=[np.int64(1), None], dropout_p=np.float32(0), return_weights=np.bool_(True)
    )
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    options = ConcatAttention(np.int64(D), np.int32(D), A, dropout=np.float32(0.5)).dropout
    assert type(options) is float
    scaled = fused_attn.general_attention(query, key, scale=np.float32(2))
    torch.testing.assert_close(scaled, fused_attn.general_attention(query, key, scale=2), rtol=0, atol=0)


@every_row
def test_modules_take_other_dtypes_under_autocast(row):
    module = row.make()
    if not isinstance(module, torch.nn.Module):
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halves = {
            n: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for n, x in row.arguments.items()
        }
        halves = {n: row.arguments[n] if n == "score_bias" else x for n, x in halves.items()}
        out = module(**halves)
        first = out[0] if isinstance(out, tuple) else out
        assert first.dtype in (torch.bfloat16, torch.float32)


BAD_SIZES = {ValueError: [0, -1, 10**30], TypeError: [2.0, "3", True, float("nan"), []]}
OPTIONS = {"dropout": "dropout_p"} | {n: n for n in ("activation", "gate_activation", "scale", "between")}


@pytest.mark.parametrize(
    ("name", "sizes", "flags"),
    [
        ("LocationAttention", ["dim", "attn_dim", "hops", "context_dim"], ["gated", "bias"]),
        ("StatisticsPooling", ["dim", "attn_dim", "hops"], ["per_channel", "global_context", "bias"]),
        ("TargetAttention", ["dim", "attn_dim", "second_dim"], ["softmax", "bias"]),
        ("ConcatAttention", ["query_dim", "key_dim", "attn_dim", "num_heads"], ["bias"]),
        ("GeneralAttention", ["query_dim", "key_dim", "num_heads"], []),
        (
            "GraphAttention",
            ["query_dim", "head_dim", "num_heads", "key_dim", "edge_dim"],
            ["concat", "share_weights", "bias", "self_loops"],
        ),
        (
            "HierarchicalAttention",
            ["dim", "inner_dim", "outer_dim", "inner_context_dim", "outer_context_dim"],
            ["gated", "bias"],
        ),
        ("WordByWordAttention", ["premise_dim", "hypothesis_dim", "attn_dim"], []),
        ("LocationAwareAttention", ["query_dim", "key_dim", "attn_dim", "channels", "width"], ["bias"]),
    ],
)
def test_constructors_name_their_argument(name, sizes, flags):
    make = getattr(fused_attn, name)
    has = inspect.signature(make).parameters
    good = {n: 4 for n, p in has.items() if p.default is p.empty}
    table = {n: BAD_SIZES for n in sizes} | {n: BAD_OPTIONS["return_weights"] for n in flags}
    table |= {n: BAD_OPTIONS[option] for n, option in OPTIONS.items() if n in has}
    bad = ((n, error, value) for n in table for error, value in table[n].items() for value in value)
    for argument, error, value in bad:
        may_be = value == 1e300 or (value is None and has[argument].default is None)  # a scale of float64, say
        if not may_be:
            with pytest.raises(error, match=rf"^{argument}: expected .*; got "):
                make(**{**good, argument: value})


# --- Structures of other graphs and batches ---------------------------------------------------------------------


def jagged(*offsets, width=D):
    return torch.nested.nested_tensor_from_jagged(floats(N, width), torch.tensor(offsets))


@pytest.mark.parametrize("name", ["value", "context", "score_bias"])
@pytest.mark.parametrize("call", [location_attention, statistics_pooling, LocationAttention(D, A, context_dim=A)])
def test_jagged_arguments_of_other_offsets_raise(call, name):
    module = isinstance(call, torch.nn.Module)
    if name not in inspect.signature(call.forward if module else call).parameters:
        return
    width = {"value": D, "context": A}.get(name)

    def given(*offsets):
        if width is not None:
            return jagged(*offsets, width=width)
        return torch.nested.nested_tensor_from_jagged(floats(N), torch.tensor(offsets))

    parameters = () if module else (floats(D, A), None, floats(A))
    more = {"context": given(0, 3, N)} if module and name != "context" and width else {}
    more |= {"context": jagged(0, 3, N, width=A)} if module and name != "context" else {}
    call(jagged(0, 3, N), *parameters, **{name: given(0, 3, N)}, **more)
    for offsets in ((0, 4, N), (0, 3, 4, N)):
        with pytest.raises(ValueError, match=rf"^{name}: expected a jagged tensor with the offsets of h; got "):
            call(jagged(0, 3, N), *parameters, **{name: given(*offsets)}, **more)


class Plain(torch.Tensor):
    """A subclass of nothing new."""


@pytest.mark.parametrize("kind", [torch.Tensor, Plain, torch.nn.Parameter])
def test_values_of_subclasses_are_checked(kind):
    offsets = ints(0, 3, N + 1)
    offsets = torch.nn.Parameter(offsets, False) if kind is torch.nn.Parameter else offsets.as_subclass(kind)
    with pytest.raises(ValueError, match=rf"^cu_seqlens: .*; got \[0, 3, {N + 1}\]"):
        location_attention(floats(N, D), floats(D), cu_seqlens=offsets)


@pytest.mark.parametrize("offsets", [(0, 3, N - 1), (0, 5, 3, N), (1, 3, N)], ids=str)
def test_a_jagged_tensor_of_bad_offsets_raises(offsets):
    for call in (location_attention, statistics_pooling):
        with pytest.raises(ValueError, match=r"^h: expected non-decreasing offsets from 0 to .*; got "):
            call(jagged(*offsets), floats(D, A), None, floats(A))


def test_a_transposed_jagged_tensor_raises():
    with pytest.raises(ValueError, match=r"^h: expected a jagged tensor whose second axis .*; got "):
        location_attention(jagged(0, 3, N).transpose(1, 2), floats(D))


NODES = {"query": floats(4, A), "key": floats(4, A), "v": floats(A), "indptr": INDPTR, "indices": INDICES}


def other_structures():
    good = transpose_csr(INDPTR, INDICES, 4)
    yield "of other rows", transpose_csr(ints(0, 3, 4, 7, E), INDICES, 4)
    yield "of other columns", transpose_csr(INDPTR, INDICES.flip(0), 4)
    yield "of the same edges in another order", transpose_csr(INDPTR, INDICES[[1, 0, 2, 3, 4, 5, 6, 7, 8, 9]], 4)
    same = (good[2] == 2) | (good[2] == 3)  # two edges between the same nodes
    assert same.sum() == 2
    yield "one edge twice", (*good[:2], good[2].masked_fill(same, 2))
    yield "not transposed", (INDPTR, INDICES, torch.arange(E))


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("title", "given"), list(other_structures()), ids=[title for title, _ in other_structures()])
def test_a_structure_of_another_graph_raises(title, given, impl):
    with pytest.raises(ValueError, match=r"^transposed\[[012]\]: expected .*; got "):
        graph_attention(**NODES, transposed=given, impl=impl)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_structure_of_this_graph_passes(dtype):
    given = transpose_csr(INDPTR.to(dtype), INDICES.to(dtype), 4)
    want = graph_attention(**NODES)
    torch.testing.assert_close(graph_attention(**NODES, transposed=given), want)
    empty = NODES | {"indptr": ints(0, 0, 0, 0, 0), "indices": ints()}
    assert (
        graph_attention(**empty, transposed=transpose_csr(empty["indptr"], empty["indices"], 4)).count_nonzero() == 0
    )


def test_compiled_a_structure_of_another_graph_stops():
    torch.compiler.reset()
    other = transpose_csr(ints(0, 3, 4, 7, E), INDICES, 4)
    compiled = torch.compile(lambda t: graph_attention(**NODES, transposed=t), backend="eager", fullgraph=True)
    compiled(transpose_csr(INDPTR, INDICES, 4))
    with pytest.raises(RuntimeError, match=r"transposed\[[01]\]: expected"):
        compiled(other)


# --- TF32 --------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings():
    """PyTorch's settings of float32 products, put back."""
    old = [
        (owner, owner.fp32_precision)
        for owner in (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.cudnn.conv)
    ]
    yield
    torch.set_float32_matmul_precision("highest")
    for owner, precision in old:
        owner.fp32_precision = precision


def matmul(precision):
    torch.backends.cuda.matmul.fp32_precision = precision


def everything(precision):
    torch.backends.fp32_precision = precision


def convolutions(precision):
    torch.backends.cudnn.conv.fp32_precision = precision


def old_flag(on):
    torch.backends.cuda.matmul.allow_tf32 = on


WAYS = {
    "nothing": ([], False),
    "old, highest": ([(torch.set_float32_matmul_precision, "highest")], False),
    "old, high": ([(torch.set_float32_matmul_precision, "high")], True),
    "old, medium": ([(torch.set_float32_matmul_precision, "medium")], True),
    "old flag": ([(old_flag, True)], True),
    "old flag, off": ([(old_flag, True), (old_flag, False)], False),
    "new": ([(matmul, "tf32")], True),
    "new, ieee": ([(matmul, "ieee")], False),
    "of everything": ([(everything, "tf32")], True),
    "of everything, but not of products": ([(everything, "tf32"), (matmul, "ieee")], False),
    "of convolutions": ([(convolutions, "tf32")], False),
    "not of convolutions": ([(convolutions, "ieee"), (matmul, "tf32")], True),
    "old, then new": ([(torch.set_float32_matmul_precision, "high"), (matmul, "ieee")], False),
    "new, then old": ([(matmul, "tf32"), (torch.set_float32_matmul_precision, "highest")], False),
    "new, then old flag": ([(matmul, "ieee"), (old_flag, True)], True),
}


@pytest.mark.parametrize(("steps", "tf32"), WAYS.values(), ids=WAYS.keys())
def test_tf32_is_as_pytorch_was_told_by_either_interface(steps, tf32, settings):
    for step, value in steps:
        step(value)
    assert chip.matmul_flags(chip.H200, torch.float32)["PRECISION"] == ("tf32" if tf32 else "ieee")
    assert chip.matmul_flags(chip.H200, torch.bfloat16)["PRECISION"] == "ieee"
    location_attention(floats(B, TK, D), floats(D, A), None, floats(A), impl="triton")


def test_no_convolution_has_a_setting_of_its_own():
    """The location-aware step makes its features as a product, which follows the setting of products."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    row = ROWS["location aware"]
    arguments = {n: x.clone().requires_grad_() if x.is_floating_point() else x for n, x in row.arguments.items()}
    with Watch():
        location_aware_attention(**arguments)[0].sum().backward()
    assert any("mm" in name for name in seen)
    assert not any("conv" in name for name in seen), [name for name in seen if "conv" in name]
