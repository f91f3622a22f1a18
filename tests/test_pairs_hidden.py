"""NaN and infinity where no query looks, or not this one: a row reaches the queries that see it, and no other."""

import _concat
import _general
import pytest
import torch
from _compare import assert_close, evaluate, largest
from _concat import every_impl

from fused_attn import (
    ConcatAttention,
    GeneralAttention,
    concat_attention,
    distance_attention,
    general_attention,
)

SIZES = {"queries": 9, "keys": 21, "attn_dim": 4, "value_dim": 6, "batch": 1}
HEADS = {"heads": 2, "batch": 1}
CAUSAL, LATE, NEAR = (None, 0), (-4, None), (2, 3)
CASES = {
    "concat": _concat.Case(**SIZES, window=CAUSAL),
    "concat, near": _concat.Case(**SIZES | HEADS, window=NEAR, mask="pairs", activation="sigmoid"),
    "concat, gelu": _concat.Case(**SIZES, window=CAUSAL, mask="keys", activation="gelu", dtype=torch.bfloat16),
    "concat, bfloat16": _concat.Case(**SIZES, window=NEAR, score_bias="qk", dropout_p=0.3, dtype=torch.bfloat16),
    "concat, identity": _concat.Case(**SIZES | {"queries": 21}, window=LATE, mask="pairs", activation="identity"),
    "concat, packed": _concat.Case(**SIZES | {"queries": 16, "keys": 40}, heads=2, ragged=True, window=NEAR),
    "concat, packed keys": _concat.Case(**SIZES | {"queries": 16, "keys": 40}, heads=2, ragged=True, mask="keys"),
    "concat, packed keys, elu": _concat.Case(
        **SIZES | {"queries": 16, "keys": 40}, ragged=True, mask="keys", window=NEAR, activation="elu"
    ),
    "distance, packed keys": _concat.Case(**SIZES | {"queries": 16, "keys": 40}, p=1, ragged=True, mask="keys"),
    "distance": _concat.Case(**SIZES, window=CAUSAL, p=1),
    "distance, squares": _concat.Case(**SIZES | HEADS, window=NEAR, mask="pairs", p=2),
    "general": _general.Case(**SIZES, window=CAUSAL, weight="matrix"),
    "general, late": _general.Case(**SIZES | {"queries": 21}, window=LATE, activation="tanh", weight="matrix"),
    "general, near": _general.Case(**SIZES | HEADS, window=NEAR, mask="pairs", weight="heads"),
    "general, bfloat16": _general.Case(**SIZES, window=NEAR, score_bias="qk", dropout_p=0.3, dtype=torch.bfloat16),
    "general, dot": _general.Case(**SIZES | {"value_dim": 4}, window=CAUSAL, return_weights=False),
    "general, dot and mask": _general.Case(
        **SIZES, own_value=False, window=CAUSAL, mask="pairs", return_weights=False
    ),
    "general, wide": _general.Case(**SIZES | {"attn_dim": 40, "value_dim": 40}, window=NEAR, weight="matrix"),
    "general, packed": _general.Case(
        **SIZES | {"queries": 16, "keys": 40}, heads=2, ragged=True, window=NEAR, weight="matrix"
    ),
    "general, packed keys": _general.Case(
        **SIZES | {"queries": 16, "keys": 40}, heads=2, ragged=True, mask="keys", weight="matrix"
    ),
    "general, packed keys, bfloat16": _general.Case(
        **SIZES | {"queries": 16, "keys": 40}, ragged=True, mask="keys", dropout_p=0.3, dtype=torch.bfloat16
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
each_fill = pytest.mark.parametrize("fill", [torch.nan, torch.inf])
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def visible(case, tensors):
    """Which rows of keys (last axis) the rows of queries see, without heads: (B, rows, rows), packed B = 1."""
    left, right = case.window or (None, None)
    device = tensors["key"].device
    if case.ragged:
        places = []
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            starts = tensors[name].long()
            seq = torch.repeat_interleave(starts.diff())
            places.append((seq, torch.arange(len(seq), device=device) - starts[seq]))
        (q_seq, i), (k_seq, j) = places
        shown = (q_seq[:, None] == k_seq)[None]
    else:
        i, j = (torch.arange(n, device=device) for n in (case.queries, case.keys))
        shown = torch.ones(case.batch, len(i), len(j), dtype=torch.bool, device=device)
    if left is not None:
        shown = shown & (j >= i[:, None] - left)
    if right is not None:
        shown = shown & (j <= i[:, None] + right)
    mask = tensors.get("mask")
    return shown if mask is None else shown & (mask[:, None] if mask.dim() == 2 else mask)  # of packed keys (M,)


def rows(case, x):
    """X with the rows first: (B, T, [H,] width), packed (1, N, [H,] width)."""
    if case.ragged:
        return x[None]
    return x if case.heads is None else x.transpose(1, 2)


def filled(case, tensors, name, which, fill):
    x = tensors[name].clone()
    rows(case, x)[which] = fill
    return x


@every_impl
@each_fill
@each_case
def test_rows_that_no_query_sees_may_hold_anything(case, fill, impl, device):
    """As in a cache that is not yet written; and queries that see no key."""
    tensors = case.tensors(device)
    shown = visible(case, tensors)
    unused = {"query": ~shown.any(2), "key": ~shown.any(1), "value": ~shown.any(1)}
    assert unused["key"].any()
    clean = evaluate(case.op, tensors, impl)
    tensors |= {name: filled(case, tensors, name, which, fill) for name, which in unused.items() if name in tensors}
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name, which in unused.items():
        if name in tensors:
            assert largest(rows(case, result.gradients[name])[which]) == 0, name


@every_impl
@pytest.mark.parametrize("name", ["query", "key", "value"])
@each_case
def test_a_row_that_is_not_finite_reaches_only_what_sees_it(case, name, impl, device):
    tensors = case.tensors(device)
    if name not in tensors:
        return  # the keys are the values
    shown = visible(case, tensors)
    used = shown.any(2 if name == "query" else 1).nonzero()
    batch, row = used[len(used) // 2].tolist()
    spoilt = torch.zeros(shown.shape[0], shown.shape[1 if name == "query" else 2], dtype=torch.bool, device=device)
    spoilt[batch, row] = True
    hit = spoilt if name == "query" else (shown & spoilt[:, None]).any(2)  # queries
    touched = (shown & hit[..., None]).any(1)  # keys
    assert hit.any()
    assert not hit.all()
    clean = evaluate(case.op, tensors, impl, through=("output",))
    tensors[name] = filled(case, tensors, name, spoilt, torch.nan)
    result = evaluate(case.op, tensors, impl, through=("output",))
    reach = {"output": hit, "weights": hit, "query": hit, "key": touched, "value": touched}
    for got, want in zip(result, clean, strict=True):
        for at, x in got.items():
            if at in reach:
                torch.testing.assert_close(rows(case, x)[~reach[at]], rows(case, want[at])[~reach[at]], msg=at)
    if case.dropout_p == 0:
        assert rows(case, result.outputs["output"])[hit].isnan().flatten(1).any(1).all()


# --- Parameters of the modules --------------------------------------------------------------------------------------


def parameter_gradients(module, *args, **kwargs):
    out = module(*args, **kwargs)
    along = torch.linspace(-1, 1, out.shape[-1], device=out.device)
    return torch.autograd.grad((out * along).sum(), list(module.parameters())), out


STRUCTURES = {
    "keys": {"mask": torch.arange(7) < torch.tensor([[5], [0]])},
    "pairs": {"mask": (torch.arange(7) < 5).expand(2, 4, 7) & (torch.arange(4) != 1)[:, None]},
    "window": {"window": (None, 1)},
    "both": {"window": (None, 1), "mask": torch.arange(7) < torch.tensor([[5], [0]])},
    "blind": {"window": (-5, None)},
}


def structure_on(device, structure):
    return {name: x.to(device) if name == "mask" else x for name, x in structure.items()}


def random(device, *shapes):
    """The same on every device."""
    return [torch.randn(shape).to(device) for shape in shapes]


def spoil(x, seen, fill):
    """`fill` in the rows that are not seen."""
    return torch.where(seen.expand(x.shape[:-1])[..., None], x, fill)


def seen_by(structure, device):
    mask = structure.get("mask", torch.ones(2, 4, 7, dtype=torch.bool, device=device))
    mask = mask[:, None] if mask.dim() == 2 else mask
    left, right = structure.get("window", (None, None))
    i, j = torch.arange(4, device=device)[:, None], torch.arange(7, device=device)
    left, right = 9 if left is None else left, 9 if right is None else right
    shown = mask & (i - left <= j) & (j <= i + right)
    return shown.any(2), shown.any(1)


@every_impl
@each_fill
@pytest.mark.parametrize("activation", ["tanh", "identity"])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_hidden_rows_leave_the_parameters_of_concat_attention_alone(structure, activation, fill, impl, device):
    torch.manual_seed(0)
    module = ConcatAttention(6, 5, 4, context_dims=(3, 2, 3), num_heads=2, activation=activation, bias=True)
    module, structure = module.to(device), structure_on(device, structure)
    query, key = random(device, (2, 4, 6), (2, 7, 5))
    of_key, of_sequence, of_query = random(device, (2, 7, 3), (2, 2), (2, 4, 3))
    q_seen, k_seen = seen_by(structure, device)

    def run(query, key, *contexts):
        return parameter_gradients(module, query, key, contexts=contexts, impl=impl, **structure)

    clean = run(query, key, of_key, of_sequence, of_query)
    spoilt = run(
        spoil(query, q_seen, fill),
        spoil(key, k_seen, fill),
        spoil(of_key, k_seen, fill),
        spoil(of_sequence, q_seen.any(1), fill),
        spoil(of_query, q_seen, fill),
    )
    torch.testing.assert_close(spoilt, clean)


@every_impl
@each_fill
@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_hidden_rows_leave_the_weight_of_general_attention_alone(structure, num_heads, fill, impl, device):
    torch.manual_seed(0)
    module, structure = GeneralAttention(6, 5, num_heads=num_heads).to(device), structure_on(device, structure)
    query, key = random(device, (2, 4, 6), (2, 7, 5))
    q_seen, k_seen = seen_by(structure, device)
    clean = parameter_gradients(module, query, key, impl=impl, **structure)
    spoilt = parameter_gradients(module, spoil(query, q_seen, fill), spoil(key, k_seen, fill), impl=impl, **structure)
    torch.testing.assert_close(spoilt, clean)


@pytest.mark.kernel
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("op", [concat_attention, distance_attention, general_attention], ids=lambda op: op.__name__)
def test_queries_of_nan_that_see_nothing_send_nothing(op, queries, device):
    """A sequence whose keys are all hidden: its queries must not meet even a gradient of 0."""
    query, key, value = (torch.randn(2, n, d, device=device) for n, d in ((queries, 4), (7, 4), (7, 3)))
    query[1] = torch.nan
    parameters = [] if op is general_attention else [torch.ones(4, device=device)]
    mask = torch.tensor([[True] * 7, [False] * 7], device=device)
    leaves = [x.requires_grad_() for x in (query, key, value, *parameters)]
    out = op(*leaves, mask=mask, impl="triton")
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (out[1] == 0).all()
    assert all((g[1] == 0).all() for g in grads[:3])
    assert all(g.isfinite().all() for g in grads)
