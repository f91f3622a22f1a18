"""float16 and bfloat16: products that they cannot hold are scores that they can, by every way of a call."""

import pytest
import torch
from _concat import ALL

from fused_attn import concat_attention, general_attention

each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def large(rows, width, dtype, seed, device="cpu"):
    return torch.randn(2, rows, width, generator=torch.Generator().manual_seed(seed)).to(device, dtype) * 100


def ways(call, device):
    """The output by every implementation, with the weights and without, in place of dropout one that drops none.

    Not by the reference on a GPU, which computes in the dtype it is given there: see `reference.widened`.
    """
    impls = [x if isinstance(x, str) else x.values[0] for x in ALL]
    for impl in (x for x in impls if x != "reference" or device.type == "cpu"):
        for options in ({}, {"return_weights": True}, {"dropout_p": 1e-9}):
            out = call(impl=impl, **options)
            yield f"{impl} {options}", out[0] if isinstance(out, tuple) else out


def assert_all_like(call, want, dtype):
    for way, out in ways(call, want.device):
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(
            out.double(), want, rtol=2 * step, atol=2 * step, msg=lambda text, at=way: f"{at}: {text}"
        )


@pytest.mark.kernel
@each_dtype
@pytest.mark.parametrize("masked", [False, True])
def test_products_of_general_attention_past_float16(masked, dtype, device):
    query, key, value = (large(rows, 64, dtype, i, device) for i, rows in enumerate((3, 5, 5)))
    value = value / 100
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=device) if masked else None
    scores = query.double() @ key.double().mT
    assert scores.abs().max() > 65504
    scores = 1e-5 * scores if mask is None else (1e-5 * scores).masked_fill(~mask[:, None], -torch.inf)
    want = torch.softmax(scores, -1) @ value.double()
    assert_all_like(lambda **o: general_attention(query, key, value, scale=1e-5, mask=mask, **o), want, dtype)


@pytest.mark.kernel
@each_dtype
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "identity", "tanh"])
def test_sums_of_concat_attention_past_float16(activation, queries, dtype, device):
    """Two halves of v that cancel: each alone is past what float16 holds. Of integers, that float32 sums exactly."""
    query, key, value = (
        large(queries, 8, dtype, 0, device).round(),
        large(5, 8, dtype, 1, device).round(),
        large(5, 6, dtype, 2, device) / 100,
    )
    key[..., 4:], query[..., 4:] = key[..., :4], query[..., :4]
    key[:, 1:3, 4:] = key[:, 1:3, :4].flip(-1)
    v = torch.tensor([1000.0] * 4 + [-1000.0] * 4, dtype=dtype, device=device)
    act = {"relu": torch.relu, "identity": lambda x: x, "tanh": torch.tanh}[activation]
    pairs = act(query.double()[:, :, None] + key.double()[:, None]) * v.double()
    if activation != "tanh":
        assert pairs.abs().max() > 65504
        assert torch.equal(pairs, pairs.round())
        assert pairs.abs().sum(-1).max() < 2**24  # so float32 holds every partial sum, in any order
    want = torch.softmax(pairs.sum(-1), -1) @ value.double()
    assert_all_like(lambda **o: concat_attention(query, key, value, v, activation=activation, **o), want, dtype)


@each_dtype
def test_autocast_does_not_narrow_what_is_widened(dtype):
    query, key = large(3, 64, torch.float32, 0), large(5, 64, torch.float32, 1)
    with torch.autocast("cpu", dtype=dtype):
        out, weights = general_attention(query, key, scale=1e-5, return_weights=True)
    rounded = query.to(dtype).double(), key.to(dtype).double()
    want = torch.softmax(1e-5 * rounded[0] @ rounded[1].mT, -1)
    assert out.dtype == dtype
    torch.testing.assert_close(weights.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
