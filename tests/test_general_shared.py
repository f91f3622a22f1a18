"""General attention whose heads share keys, and whose scale is a tensor."""

import pytest
import torch
from _compare import IMPLS, assert_matches_reference, evaluate

from fused_attn import GeneralAttention, general, general_attention

B, H, TK, D = 3, 4, 37, 19
FORMS = [*IMPLS, "auto"]


def inputs(device, *, queries=1, dtype=torch.float32, value=True, weight=False):
    torch.manual_seed(0)
    made = {"query": torch.randn(B, H, queries, 7 if weight else D), "key": torch.randn(B, 1, TK, D)}
    if value:
        made["value"] = torch.randn(B, 1, TK, 5)
    if weight:
        made["weight"] = torch.randn(H, 7, D) / 3
    made = {name: x.to(device, dtype) for name, x in made.items()}
    return made


def operator(expand: bool, **options):
    def op(*, impl, query, key, value=None, weight=None, score_bias=None, scale=1.0, mask=None):
        if expand:
            key, value = (x if x is None else x.expand(-1, H, -1, -1) for x in (key, value))
        options_ = {"return_weights": True, "mask": mask, "score_bias": score_bias, "scale": scale, **options}
        return general_attention(query, key, value, weight, **options_, impl=impl)

    return op


@pytest.fixture
def folds(monkeypatch):
    """The shapes of the queries that were folded."""
    seen, real = [], general._folded
    monkeypatch.setattr(general, "_folded", lambda x: seen.append(x.query.shape) or real(x))
    return seen


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("mask", ["none", "keys", "heads", "some see nothing"])
@pytest.mark.parametrize("weight", [False, True], ids=["dot", "weight"])
@pytest.mark.parametrize("value", [False, True], ids=["keys", "values"])
def test_heads_of_one_query_are_queries_of_one_head(value, weight, mask, impl, folds, device):
    tensors = inputs(device, value=value, weight=weight)
    tensors["score_bias"] = torch.randn(1, H, 1, TK, device=device)
    if mask != "none":
        shown = torch.rand(B, *((1,) if mask == "keys" else (H,)), 1, TK, device=device) < 0.6
        if mask == "some see nothing":
            shown[1], shown[2, 1] = False, False
            tensors["query"][1] = torch.nan
            tensors["key"][1] = torch.inf
        tensors["mask"] = shown[:, 0, 0] if mask == "keys" else shown
    got, want = evaluate(operator(False), tensors, impl), evaluate(operator(True), tensors, "reference")
    for of_got, of_want in zip(got, want, strict=True):
        for name, x in of_want.items():
            torch.testing.assert_close(of_got[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert folds == [(B, H, 1, D)]


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["dot", "weight"])
def test_folded_heads_match_the_reference(weight, dtype, device):
    tensors = inputs(device, dtype=dtype, weight=weight) | {"scale": torch.linspace(0.2, 0.8, H, device=device)}
    assert_matches_reference(operator(False), tensors, dtype=dtype)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize(
    ("queries", "options"), [(1, {"window": (0, 9)}), (1, {"window": (None, -1)}), (5, {}), (5, {"window": (2, 3)})]
)
def test_other_calls_give_one_head_to_all(queries, options, impl, folds, device):
    tensors = inputs(device, queries=queries)
    got = evaluate(operator(False, **options), tensors, impl)
    want = evaluate(operator(True, **options), tensors, "reference")
    for of_got, of_want in zip(got, want, strict=True):
        for name, x in of_want.items():
            torch.testing.assert_close(of_got[name], x, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    assert not folds


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("what", ["state", "scores, lse, log weights", "dropout"])
def test_what_else_is_asked_for_has_its_shape(what, impl, device):
    tensors = inputs(device)
    options = {
        "state": {"return_state": True},
        "scores, lse, log weights": {"return_scores": True, "return_lse": True, "return_log_weights": True},
        "dropout": {"dropout_p": 0.5, "return_weights": True},
    }[what]
    torch.manual_seed(0)
    got = general_attention(*tensors.values(), **options, impl=impl)
    key, value = (x.expand(-1, H, -1, -1) for x in (tensors["key"], tensors["value"]))
    torch.manual_seed(0)
    want = general_attention(tensors["query"], key, value, **options, impl="reference")
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        assert x.shape == y.shape
        if what != "dropout" or i:  # which draws for queries of one head
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("activation", ["identity", "tanh"])
@pytest.mark.parametrize("heads", [None, "one", "each"])
@pytest.mark.parametrize("hide", ["none", "mask", "window", "packed"])
def test_a_scale_has_the_gradient_of_the_formula(hide, heads, activation, impl, device):
    """Also where it is 0, and where hidden rows are NaN."""
    torch.manual_seed(0)
    lead = (2,) if heads is None else (2, 3)
    query, key, value = (torch.randn(*lead, n, 6, device=device) for n in (4, 5, 5))
    shown = torch.ones(4, 5, dtype=torch.bool, device=device)
    structure = {}
    if hide == "mask":
        shown[:, 3:] = shown[1] = False
        structure["mask"] = shown.expand(*(2,) if heads is None else (2, 3), 4, 5)
    if hide == "window":
        shown = shown.tril(1)
        structure["window"] = (None, 1)
    if hide == "packed":
        query, key, value = (x[0] if heads is None else x[0].transpose(0, 1) for x in (query, key, value))
        structure = {
            "cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32, device=device),
            "cu_seqlens_k": torch.tensor([0, 5], dtype=torch.int32, device=device),
        }
    for start in (0.7, 0.0):
        shape = (3,) if heads == "each" else ()
        scale = torch.full(shape, start, device=device, requires_grad=True)
        rows = [x.clone().requires_grad_() for x in (query, key, value)]
        q, k, v = (x.transpose(0, 1) if hide == "packed" and heads else x for x in rows)
        factor = scale[:, None, None] if heads == "each" else scale
        z = factor * (q @ k.mT)
        z = torch.tanh(z) if activation == "tanh" else z
        want = (z.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0) @ v).square()
        grads = torch.autograd.grad(want.sum(), [*rows, scale])
        given = [x.detach().clone() for x in rows]
        if hide == "mask":
            given[0][..., 1, :] = torch.nan
            given[1][..., 3:, :] = torch.nan
        given = [x.requires_grad_() for x in given]
        out = general_attention(*given, scale=scale, activation=activation, **structure, impl=impl)
        got = torch.autograd.grad(out.square().sum(), [*given, scale])
        want = want.transpose(0, 1) if hide == "packed" and heads else want
        torch.testing.assert_close(out.square(), want, rtol=1e-4, atol=1e-5)
        for name, x, y in zip(("query", "key", "value", "scale"), got, grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"d{n}: {text}")


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_scale_beside_16_bit_rows_has_a_float32_gradient(dtype, device):
    tensors = inputs(device, queries=5, dtype=dtype) | {"scale": torch.tensor(0.37, device=device)}
    op = operator(True)
    assert evaluate(op, tensors, "triton").gradients["scale"].dtype == torch.float32
    assert_matches_reference(op, tensors, dtype=dtype)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("heads", [1, 3])
def test_a_module_learns_its_scale(heads, impl, device):
    module = GeneralAttention(7, D, num_heads=heads, scale=0.5, learn_scale=True).to(device)
    plain = GeneralAttention(7, D, num_heads=heads, scale=0.5).to(device)
    assert set(module.state_dict()) == {"weight", "scale"}
    assert module.scale.shape == ((3,) if heads == 3 else ())
    plain.load_state_dict({"weight": module.weight.detach()})
    query, key = torch.randn(B, 1, 7, device=device), torch.randn(B, TK, D, device=device)
    got = module(query, key, impl=impl)
    torch.testing.assert_close(got, plain(query, key, impl=impl))
    got.square().sum().backward()
    assert module.scale.grad.count_nonzero() == heads
    module.scale.data.fill_(7)
    module.reset_parameters()
    assert (module.scale == 0.5).all()
    assert "scale=0.5, learn_scale=True" in repr(module)


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("value", ["keys", "one", "each"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_decoder_projects_its_keys_once(packed, value, heads, impl, device):
    torch.manual_seed(0)
    module = GeneralAttention(7, D, num_heads=heads, scale=0.3).to(device)
    query, key = torch.randn(B, 2, 7, device=device), torch.randn(B, TK, D, device=device)
    values = {"keys": None, "one": torch.randn(B, TK, 5), "each": torch.randn(B, heads, TK, 5)}[value]
    values = values[:, 0] if value == "each" and heads == 1 else values
    values = values if values is None else values.to(device)
    structure = {}
    if packed:
        values = values.transpose(1, 2) if values is not None and values.dim() == 4 else values
        query, key, values = (x if x is None else x.flatten(0, 1) for x in (query, key, values))
        for side, n in (("q", 2), ("k", TK)):
            structure[f"cu_seqlens_{side}"] = torch.arange(0, B * n + 1, n, dtype=torch.int32, device=device)
    projected = module.project_keys(key)
    assert projected.shape == (*key.shape[:-1], heads * 7)
    steps = [query] if packed else query.split(1, 1)
    for step in steps:
        got = module(step, key, values, projected=projected, **structure, impl=impl)
        want = module(step, key, values, **structure, impl="reference")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    assert module.weight.grad.count_nonzero() > 0


def test_projected_keys_that_are_hidden_may_be_nan(device):
    module = GeneralAttention(7, D, num_heads=2).to(device)
    query, key = torch.randn(B, 1, 7, device=device), torch.randn(B, TK, D, device=device)
    key[:, 4:] = torch.nan
    mask = torch.arange(TK, device=device).expand(B, TK) < 4
    got = module(query, key, projected=module.project_keys(key), mask=mask)
    got.sum().backward()
    torch.testing.assert_close(got, module(query, key, mask=mask))
    assert module.weight.grad.isfinite().all()


def test_projected_keys_of_another_width_are_named(device):
    module = GeneralAttention(7, D, num_heads=2).to(device)
    query, key = torch.randn(B, 1, 7, device=device), torch.randn(B, TK, D, device=device)
    for projected in (module.project_keys(key)[:, 1:], module.project_keys(key)[..., :7], key):
        with pytest.raises(
            ValueError, match=r"projected: expected shape \(B, Tk, width\) .*num_heads times query_dim"
        ):
            module(query, key, projected=projected)
