"""Location attention with a window: one output a position, by the kernels, by the blocked path, by the reference."""

import dataclasses
import itertools

import pytest
import torch
from _compare import (
    IMPLS,
    Result,
    assert_as_exact,
    assert_close,
    assert_identical,
    assert_matches_reference,
    evaluate,
    in_double,
    largest,
    nudged,
    projection,
    shifted,
)
from _location import Case, offsets, operator, pairwise
from _marks import both_forms
from _recorder import Recorder

from fused_attn import LocationAttention, location_attention, reference
from fused_attn._location_windowed import WINDOW
from fused_attn.blocked import location as in_blocks
from fused_attn.kernels.inputs import WindowInputs

WINDOWS = ((None, 0), (None, -1), (None, 5), (None, -3), (None, 40), (0, None), (3, None), (-2, None), (40, None))
WINDOWS += ((2, 2), (5, -1), (-1, 4), (0, 0), (-30, 33), (None, None), (10**9, 10**9), (None, -(10**9)))
FACTORS = {
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "rows": (1, 16, 37, 50),
    "dim": (1, 9),
    "attn_dim": (3,),
    "hops": (1, 3),
    "score": ("linear", "linear_hops", "mlp", "gated_hops", "projected"),
    "ragged": (False, True),
    "mask": ("none", "random", "padding", "empty", "expanded"),
    "context": ("none", "sequence", "row"),
    "value": (None, 1, 35),
    "score_bias": (False, True),
    "layout": ("contiguous", "swapped", "strided"),
    "dropout_p": (0.0, 0.3),
    "through": (("output", "weights"), ("output",), ("weights",)),
}
FAST = ("blocked", pytest.param("triton", marks=pytest.mark.kernel))  # what is compared with the reference
ALL = ("blocked", *IMPLS)
each_fast = pytest.mark.parametrize("impl", FAST)
each_impl = pytest.mark.parametrize("impl", ALL)
each_window = pytest.mark.parametrize("window", WINDOWS, ids=str)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    """Several levels of chunks in few rows."""
    monkeypatch.setattr(in_blocks, "CHUNK", 4)
    monkeypatch.setattr(in_blocks, "WIDE", 8)


def windowed(case: Case, window, return_weights: bool = True):
    """The operator of a case with a window; "blocked" is what `auto` is on a CPU."""
    weights = return_weights and not case.ragged

    def op(*, impl: str, **tensors):
        fixed = {"activation": case.activation, "gate_activation": case.gate_activation, "dropout_p": case.dropout_p}
        return operator(window=window, return_weights=weights, **fixed)(
            impl={"blocked": "auto"}.get(impl, impl), **tensors
        )

    return op


def on(impl: str, device: torch.device) -> str:
    """The public name of an implementation."""
    if impl == "blocked" and device.type != "cpu":
        pytest.skip("auto is the kernel on a GPU")
    return {"blocked": "auto"}.get(impl, impl)


def check(case: Case, window, impl: str, device: torch.device, **options) -> None:
    on(impl, device)
    options = {"through": case.through, **options}
    assert_matches_reference(windowed(case, window), case.tensors(device), dtype=case.dtype, impl=impl, **options)


# --- Against the reference ---------------------------------------------------------------------------------------


def pairwise_cases():
    made = pairwise(FACTORS)
    for i, case in enumerate(made):
        for impl in FAST:
            window = WINDOWS[i % len(WINDOWS)]
            marks = getattr(impl, "marks", ())
            name = impl.values[0] if marks else impl
            yield pytest.param(case, window, name, marks=marks, id=f"{name},{window},{case}")


@pytest.mark.parametrize(("case", "window", "impl"), list(pairwise_cases()))
def test_matches_the_reference_for_every_pair_of_factors(case, window, impl, device):
    check(case, window, impl, device)


@both_forms
@each_window
@each_fast
def test_matches_the_reference_for_every_window(impl, window, ragged, device):
    check(Case(batch=2, rows=42, dim=3, attn_dim=2, ragged=ragged, mask="random"), window, impl, device)


@both_forms
@pytest.mark.parametrize("window", [(None, 0), (0, None)], ids=str)
@each_fast
def test_matches_the_reference_over_many_tiles(impl, window, ragged, device):
    case = Case(batch=1, rows=130, dim=2, attn_dim=2, ragged=ragged, mask="random")
    check(case, window, impl, device)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_values_and_many_hops_match_the_reference(dtype, device):
    case = Case(dtype=dtype, batch=1, rows=20, dim=3, attn_dim=3, hops=5, score="mlp_hops", value=70)
    check(case, (None, 2), "triton", device)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(None, 0), (2, None), (3, 2)], ids=str)
def test_widths_and_lengths_of_whole_vectors_match_the_reference(window, dtype, device):
    check(Case(dtype=dtype, batch=1, rows=80, dim=16, attn_dim=16, value=32), window, "triton", device)


@pytest.mark.kernel
@both_forms
@pytest.mark.parametrize("value", [75, 100, 300])
def test_matches_the_reference_where_rows_are_vectors_of_4_or_of_none(value, ragged, device):
    case = Case(dtype=torch.bfloat16, batch=2, rows=70, dim=3, attn_dim=3, value=value, ragged=ragged)
    check(case, (None, 0), "triton", device)


@pytest.mark.parametrize("name", ["h", "w", "value", "score_bias"])
@each_fast
def test_one_gradient_alone_is_that_of_the_reference(impl, name, device):
    case = Case(batch=2, rows=40, dim=3, attn_dim=2, value=3, score_bias=True)
    check(case, (None, 0), impl, device, wrt=[name])


@pytest.mark.kernel
def test_segments_of_every_length_match_the_reference(device):
    lengths = [0, 1, 16, 0, 17, 34, 0, 2]
    case = Case(rows=sum(lengths), dim=3, ragged=True)
    tensors = case.tensors(device) | {"cu_seqlens": offsets(lengths, device)}
    for window in ((None, -1), (1, None)):
        assert_matches_reference(windowed(case, window), tensors)


def raw(scores, value, cu, seed, window, dropout_p, impl):
    inputs = WindowInputs(scores, value, cu, seed, *window, dropout_p)
    if impl == "reference":
        return reference.windowed_attention(inputs)
    return WINDOW(inputs, impl == "blocked", impl == "triton" and value.dtype.itemsize == 2)[:2]


@pytest.mark.parametrize("through", [("output", "lse"), ("lse",)], ids="+".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("window", [(None, 0), (2, None), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_fast
def test_free_gradients_of_output_and_lse_give_those_of_the_reference(
    impl, dtype, window, dropout_p, through, device
):
    check_free_gradients(impl, dtype, window, dropout_p, through, device)


@pytest.mark.parametrize("window", [(None, 0), (2, None), (3, 1)], ids=str)
@each_fast
def test_scores_far_from_zero_cost_no_precision(impl, window, device):
    """Quarters, which a thousand more leaves exact; one number for lse in float32 would be off by 3e-5."""
    check_free_gradients(impl, torch.float32, window, 0.0, ("output", "lse"), device, shift=1000)


def check_free_gradients(impl, dtype, window, dropout_p, through, device, shift=0) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "scores": torch.randn(2, 20, 2, generator=rng).to(device),
        "value": torch.randn(2, 20, 3, generator=rng).to(device, dtype),
    }
    if shift:
        tensors["scores"] = (tensors["scores"] * 4).round() / 4 + shift
    tensors["scores"][0, :5] = -torch.inf
    tensors["value"][0, :5] = torch.nan
    seed = torch.tensor([5], device=device)

    def derivatives(tensors, impl):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        results = raw(*leaves.values(), None, seed, window, dropout_p, impl)
        named = dict(zip(("output", "lse"), results, strict=True))
        cotangents = [projection(named[name], i) for i, name in enumerate(through)]
        grads = torch.autograd.grad(
            [named[name] for name in through], list(leaves.values()), cotangents, materialize_grads=True
        )
        outputs = {"output": named["output"].to(tensors["value"].dtype), "lse": named["lse"]}
        return Result(
            {name: x.detach().masked_fill(x == -torch.inf, 0) for name, x in outputs.items()},
            dict(zip(leaves, grads, strict=True)),
        )

    exact = derivatives(in_double(tensors), "reference")
    rough = [derivatives(nudged(tensors, i) if i else tensors, "reference") for i in range(1 if shift else 3)]
    assert_as_exact(derivatives(tensors, impl), rough, exact, dtype=dtype)


def jagged(x, cu):
    return torch.nested.nested_tensor_from_jagged(x, cu.long())


@each_fast
@pytest.mark.parametrize("score", ["linear", "mlp_hops"])
def test_jagged_tensors_are_ragged_batches(score, impl, device):
    on(impl, device)
    case = Case(rows=40, dim=3, score=score, ragged=True, value=2)
    tensors = case.tensors(device)
    packed = windowed(case, (None, 0))

    def op(*, impl, h, value, cu_seqlens, **parameters):
        if h.dtype == torch.float64:  # the oracle has no nested tensors
            return packed(impl=impl, h=h, value=value, cu_seqlens=cu_seqlens, **parameters)
        out = packed(impl=impl, h=jagged(h, cu_seqlens), value=jagged(value, cu_seqlens), **parameters)
        assert out.is_nested
        assert torch.equal(out.offsets(), cu_seqlens.long())
        return out.values()

    assert_matches_reference(op, tensors, impl=impl)


# --- What the form means -----------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("score", ["linear", "mlp_hops"])
def test_causal_outputs_are_poolings_of_the_prefixes(score, impl, device):
    on(impl, device)
    case = Case(batch=2, rows=21, dim=3, score=score, mask="random")
    tensors = case.tensors(device)
    out, weights = windowed(case, (None, 0))(impl=impl, **tensors)
    _, strict = windowed(case, (None, -1))(impl=impl, **tensors)
    for i in (0, 7, 20):
        prefix = {name: x[:, : i + 1] if name in ("h", "mask") else x for name, x in tensors.items()}
        want, want_weights = operator()(impl="reference", **prefix)
        torch.testing.assert_close(out[:, i], want)
        torch.testing.assert_close(weights[..., i, : i + 1], want_weights)
        assert largest(weights[..., i, i + 1 :]) == 0
        assert largest(strict[..., i, i:]) == 0


@each_impl
@both_forms
def test_positions_that_see_nothing_give_zeros(ragged, impl, device):
    on(impl, device)
    case = Case(batch=2, rows=40, dim=3, attn_dim=2, ragged=ragged, mask="random", score_bias=True)
    tensors = case.tensors(device)
    out = windowed(case, (None, -1), return_weights=False)(impl=impl, **tensors)
    assert largest(out[[0, 3] if ragged else (slice(None), 0)]) == 0  # the first of each sequence
    for window, mask in (
        ((None, -50), tensors["mask"]),
        ((None, 0), torch.zeros_like(tensors["mask"])),
        ((2, -3), tensors["mask"]),
    ):
        result = evaluate(windowed(case, window), tensors | {"mask": mask}, impl)
        for family in result:
            for name, x in family.items():
                assert largest(x) == 0, name


@each_impl
@pytest.mark.parametrize("sizes", [{"batch": 0, "rows": 5}, {"rows": 0}], ids=["batch=0", "rows=0"])
def test_empty_batches_give_empty_outputs(sizes, impl, device):
    on(impl, device)
    case = Case(**sizes, dim=3, score="mlp_hops", value=2)
    result = evaluate(windowed(case, (None, 0)), case.tensors(device), impl)
    batch, rows = case.tensors(device)["h"].shape[:2]
    assert result.outputs["output"].shape == (batch, rows, 3, 2)
    assert result.outputs["weights"].shape == (batch, 3, rows, rows)
    assert all(largest(x) == 0 for x in result.gradients.values())


@pytest.mark.parametrize("window", [(None, 0), (1, None), (1, 2)], ids=str)
@each_fast
def test_weights_of_values_without_a_feature_match_the_reference(impl, window, device):
    """The weights do not depend on the values."""
    case = Case(batch=2, rows=40, dim=3, mask="random")
    tensors = case.tensors(device) | {"value": torch.zeros(2, 40, 0, device=device)}
    on(impl, device)
    assert_matches_reference(windowed(case, window), tensors, impl=impl)


@each_impl
@both_forms
@pytest.mark.parametrize("window", [(None, 0), (1, 2)], ids=str)
def test_masked_rows_are_never_read_and_have_zero_gradients(window, ragged, impl, device):
    on(impl, device)
    case = Case(batch=2, rows=40, dim=3, score="gated", value=3, score_bias=True, mask="random", ragged=ragged)
    tensors = case.tensors(device)
    clean = evaluate(windowed(case, window), tensors, impl)
    hidden = ~tensors["mask"]
    by_row = ("h", "value", "score_bias")
    for name in by_row:
        tensors[name][hidden] = torch.nan
    result = evaluate(windowed(case, window), tensors, impl)
    assert_close(result, clean)
    for name in by_row:
        assert largest(result.gradients[name][hidden]) == 0, name


@each_impl
def test_hidden_keys_that_are_the_values_are_never_read(impl, device):
    on(impl, device)
    case = Case(batch=2, rows=40, dim=3, mask="random")
    tensors = case.tensors(device)
    clean = evaluate(windowed(case, (None, 0)), tensors, impl)
    tensors["h"][~tensors["mask"]] = torch.nan
    assert_close(evaluate(windowed(case, (None, 0)), tensors, impl), clean)


@each_impl
@pytest.mark.parametrize("window", [(None, 0), (0, None), (3, 2)], ids=str)
def test_nan_that_is_not_masked_shows_where_it_is_seen(window, impl, device):
    case = Case(batch=1, rows=50, dim=3, score_bias=True)
    tensors = case.tensors(device)
    tensors["score_bias"][0, 20] = torch.nan
    out = windowed(case, window, return_weights=False)(impl=on(impl, device), **tensors)
    i = torch.arange(50, device=device)
    seen = reference.in_window(i, torch.tensor(20, device=device), *window, torch.ones_like(i, dtype=torch.bool))
    assert out[0, seen].isnan().all()


@each_impl
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_padded_and_ragged_forms_agree(dropout_p, impl, device):
    on(impl, device)
    lengths = [7, 0, 21, 1]
    case = Case(rows=29, dim=3, ragged=True, dropout_p=dropout_p)
    tensors = case.tensors(device)
    cu = offsets(lengths, device)
    torch.manual_seed(0)
    packed = windowed(case, (None, 1))(impl=impl, **tensors | {"cu_seqlens": cu})
    h = torch.nested.nested_tensor_from_jagged(tensors["h"], cu.long())
    mask = torch.arange(21, device=device) < cu.diff()[:, None]
    torch.manual_seed(0)
    rest = {name: x for name, x in tensors.items() if name not in ("h", "cu_seqlens")}
    padded, _ = windowed(dataclasses.replace(case, ragged=False), (None, 1))(
        impl=impl, h=h.to_padded_tensor(torch.nan, (4, 21, 3)), mask=mask, **rest
    )
    torch.testing.assert_close(padded[mask], packed)


@each_impl
@pytest.mark.parametrize("window", [(None, 0), (20, 3)], ids=str)
def test_dropout_differs_between_positions_hops_and_sequences(window, impl, device):
    """With all scores 0 and unit vectors as values the output is the weights."""
    impl = on(impl, device)
    h = torch.zeros(2, 64, 1, device=device)
    value = torch.eye(64, device=device).expand(2, 64, 64)
    w = torch.zeros(1, 2, device=device)
    torch.manual_seed(0)
    out = location_attention(h, w, value=value, window=window, dropout_p=0.3, impl=impl)
    i, j = torch.arange(64, device=device)[:, None], torch.arange(64, device=device)
    shown = (j <= i + window[1]) & (j >= i - (window[0] or 64))
    assert largest(out.transpose(1, 2)[..., ~shown]) == 0
    kept = (out.transpose(1, 2) != 0)[..., shown].double()
    assert abs(kept.mean().item() - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    rows = (out != 0)[:, 40:50, :, 25:40].flatten(0, 2)
    assert len(rows.unique(dim=0)) > 0.95 * len(rows)
    size = shown.sum(-1)[:, None, None] * 0.7
    torch.testing.assert_close((out * size)[out != 0], torch.ones_like(out[out != 0]))


# --- Scores that are hard on a softmax ---------------------------------------------------------------------------


def slopes(kind: str, rows: int) -> torch.Tensor:
    """Biases whose maxima in neighbouring tiles differ by up to a thousand."""
    at = torch.arange(rows, dtype=torch.float32)
    steps = {
        "falling": -at,
        "rising": at,
        "steep": -40 * at,
        "late": 1000.0 * (at >= rows // 2),
        "early": 1000.0 * (at < rows // 2),
        "peaks": 1000.0 * (at % 20 == 7),
        "deep": -1000.0 * (at // 20),
    }
    return steps[kind]


@pytest.mark.parametrize("kind", ["falling", "rising", "steep", "late", "early", "peaks", "deep"])
@pytest.mark.parametrize("window", [(None, 0), (2, None), (9, 2)], ids=str)
@each_fast
def test_scores_of_very_different_tiles_match_the_reference(impl, window, kind, device):
    on(impl, device)
    case = Case(batch=2, rows=70, dim=3, value=3, score="linear", score_bias=True)
    tensors = case.tensors(device)
    tensors["score_bias"] = tensors["score_bias"] + slopes(kind, 70).to(device)
    assert_matches_reference(windowed(case, window), tensors, impl=impl)


@each_impl
def test_adding_a_number_to_all_scores_changes_nothing(impl, device):
    on(impl, device)
    case = Case(batch=2, rows=70, dim=3, score_bias=True)
    op = windowed(case, (None, 0))
    tensors, exact = shifted(op, case.tensors(device))
    assert_matches_reference(op, tensors, impl=impl, exact=exact)


@pytest.mark.kernel
def test_two_runs_are_bitwise_equal(device):
    case = Case(batch=2, rows=40, dim=3, score="mlp_hops")
    op, tensors = windowed(case, (None, 0)), case.tensors(device)
    assert_identical(evaluate(op, tensors, "triton"), evaluate(op, tensors, "triton"))


# --- Under PyTorch's transforms ----------------------------------------------------------------------------------

FORMS = {
    "padded": (Case(batch=2, rows=9, dim=3, attn_dim=2, hops=2, score="gated_hops", mask="random"), (None, 0)),
    "dropout": (Case(batch=2, rows=9, dim=3, dropout_p=0.5), (1, 1)),
    "ragged": (Case(rows=9, dim=3, score="linear", ragged=True), (2, None)),
}
each_form = pytest.mark.parametrize(("case", "window"), FORMS.values(), ids=FORMS.keys())


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@each_form
@each_impl
def test_compiles_as_one_graph_forward_and_backward(impl, case, window, device):
    on(impl, device)
    op, tensors = windowed(case, window), case.tensors(device)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    assert_close(evaluate(compiled, tensors, impl), evaluate(op, tensors, impl))


class Prefixes(torch.nn.Module):
    def __init__(self, impl):
        super().__init__()
        self.impl, self.attention = impl, LocationAttention(5, 4, hops=2)

    def forward(self, h, mask):
        return self.attention(h, mask=mask, window=(None, 0), impl=self.impl)


@each_fast
@pytest.mark.usefixtures("_fresh_compiler")
def test_exports_with_dynamic_batch_and_time(impl, device):
    module = Prefixes(on(impl, device)).to(device).eval()

    def inputs(batch, rows):
        return torch.randn(batch, rows, 5, device=device), torch.rand(batch, rows, device=device) < 0.8

    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    program = torch.export.export(module, inputs(3, 9), dynamic_shapes=[{0: batch, 1: time}] * 2).module()
    for sizes in ((2, 40), (7, 5)):
        h, mask = inputs(*sizes)
        torch.testing.assert_close(program(h, mask), module(h, mask))


@pytest.mark.parametrize("window", [(None, 0), (1, None), (1, 1)], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_float64_passes_gradcheck_and_gradgradcheck(impl, window, device):
    case = Case(batch=1, rows=6, dim=2, attn_dim=2, score="mlp", mask="random")
    tensors = in_double(case.tensors(device))
    live = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}

    def fn(*xs):
        return windowed(case, window)(impl=impl, mask=tensors["mask"], **dict(zip(live, xs, strict=True)))

    torch.autograd.gradcheck(fn, tuple(live.values()))
    torch.autograd.gradgradcheck(fn, tuple(live.values()))


@each_form
@each_fast
def test_second_derivatives_are_those_of_the_reference(impl, case, window, device):
    on(impl, device)
    tensors = case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def first_derivatives(*, impl, **leaves):
        results = windowed(case, window)(impl=impl, **leaves)
        results = results if isinstance(results, tuple) else (results,)
        grads = torch.autograd.grad(
            results,
            [leaves[name] for name in names],
            [projection(x, i) for i, x in enumerate(results)],
            create_graph=True,
        )
        return torch.cat([g.flatten() for g in grads])

    assert_matches_reference(first_derivatives, tensors, impl=impl)


@each_impl
def test_func_grad_is_the_gradient(impl, device):
    on(impl, device)
    case, window = FORMS["padded"]
    op, tensors = windowed(case, window), case.tensors(device)
    names = [name for name, x in tensors.items() if x.is_floating_point()]

    def loss(live):
        results = op(impl=impl, **{**tensors, **live})
        return sum((x * projection(x, i)).sum() for i, x in enumerate(results))

    got = torch.func.grad(loss)({name: tensors[name] for name in names})
    want = evaluate(op, tensors, impl).gradients
    for name in names:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_vmap_and_per_sample_gradients_are_loops(impl, device):
    module = Prefixes(on(impl, device)).to(device)
    parameters = {name: x.detach() for name, x in module.named_parameters()}
    h, mask = torch.randn(3, 9, 5, device=device), torch.rand(3, 9, device=device) < 0.8

    def loss(parameters, h, mask):
        return torch.func.functional_call(module, parameters, (h[None], mask[None])).square().sum()

    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, h, mask)
    for i in range(3):
        for name, x in torch.func.grad(loss)(parameters, h[i], mask[i]).items():
            torch.testing.assert_close(got[name][i], x, msg=lambda text, name=name: f"{name}: {text}")


@each_impl
def test_module_passes_the_window_on(impl, device):
    module = Prefixes(on(impl, device)).to(device)
    h = torch.randn(2, 9, 5, device=device)
    out = module(h, None)
    assert out.shape == (2, 9, 2, 5)
    torch.testing.assert_close(out[:, -1], module.attention(h))


# --- Cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(None, 0), (0, None), (20, 20), (None, None)], ids=str)
@both_forms
def test_blocked_path_is_linear_in_the_rows(ragged, window, device):
    on("blocked", device)
    counts = []
    for rows in (1024, 2048, 4096):
        scores, value = torch.randn(rows, 1), torch.randn(rows, 8)
        cu = torch.tensor([0, 10, 10, rows], dtype=torch.int32)
        tensors = (scores, value, cu, None) if ragged else (scores[None], value[None], None, None)
        inputs = WindowInputs(*tensors, *window, 0.0)
        with Recorder() as seen:
            out, lse = in_blocks.window_fwd(inputs)
            in_blocks.window_bwd(inputs, lse, out, lse, [True, True])
        counts.append((seen.largest, seen.work))
    for (before, work), (after, more) in itertools.pairwise(counts):
        assert after <= 2.1 * before
        assert more <= 2.1 * work
