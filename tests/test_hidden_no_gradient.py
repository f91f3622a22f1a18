"""On a CPU with no gradient the results tell, and no look before, whether hidden rows hold what they should not."""

import pytest
import torch

from fused_attn import (
    concat_attention,
    general_attention,
    location_attention,
    reference,
    statistics_pooling,
    target_attention,
)

FILLS = (torch.nan, torch.inf, -torch.inf, 1e30, -3e38)
MASK = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
CU = torch.tensor([0, 4, 8, 12], dtype=torch.int32)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(3, 4, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


W, B, V, G = numbers(5, 3), numbers(3), numbers(3), numbers(5, 3)
CALLS = {
    "location": lambda x, mask: location_attention(x, W, B, V, mask=mask, return_weights=True),
    "location, values": lambda x, mask: location_attention(rows(5), W, B, V, value=x, mask=mask, return_weights=True),
    "location, gated": lambda x, mask: location_attention(x, W, B, V, gate=(G, B), mask=mask, return_weights=True),
    "location, context": lambda x, mask: location_attention(
        rows(5), W, B, V, context=x[..., :3], mask=mask, return_weights=True
    ),
    "location, packed": lambda x, mask: location_attention(
        x.flatten(0, 1), W, B, V, mask=mask.flatten(), cu_seqlens=CU, return_weights=True
    ),
    "general": lambda x, mask: general_attention(rows(5), x, x, mask=mask, return_weights=True),
    "general, weight": lambda x, mask: general_attention(
        rows(5), x, rows(2), numbers(5, 5), mask=mask, return_weights=True
    ),
    "general, values": lambda x, mask: general_attention(rows(5), rows(5), x, mask=mask, return_weights=True),
    "general, dropout": lambda x, mask: general_attention(
        rows(5), x, x, mask=mask, dropout_p=0.5, return_weights=True
    ),
    "concat": lambda x, mask: concat_attention(
        rows(5), x, x, numbers(5), mask=mask, return_weights=True, impl="reference"
    ),
    "target": lambda x, mask: target_attention(
        numbers(3, 5), x, numbers(20, 3), None, V, mask=mask, return_weights=True
    ),
    "target, softmax": lambda x, mask: target_attention(
        numbers(3, 5), rows(5), numbers(20, 3), None, V, value=x, softmax=True, mask=mask, return_weights=True
    ),
    "statistics": lambda x, mask: statistics_pooling(x, W, B, V, mask=mask, return_weights=True),
    "statistics, a channel": lambda x, mask: statistics_pooling(
        x, W, B, numbers(3, 5), mask=mask, return_weights=True
    ),
    "statistics, equal": lambda x, mask: statistics_pooling(x, mask=mask, return_weights=True),
}


@pytest.mark.whole
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("name", CALLS)
def test_hidden_rows_may_hold_anything(name, fill):
    x = rows(5)
    found = []
    for hidden in (0.0, fill):
        torch.manual_seed(0)
        found.append(CALLS[name](x.masked_fill(~MASK[..., None], hidden), MASK))
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("fill", [torch.nan, 1e30, 2.0])
@pytest.mark.parametrize("name", CALLS)
def test_visible_rows_are_seen_as_with_gradients(name, fill):
    """NaN that is seen is in the results, and large numbers as well: a result that is looked at twice is the same."""
    x = rows(5)
    x[0, 2] = fill  # visible
    x[0, 1] = torch.nan  # hidden
    found = []
    for asks in (False, True):
        torch.manual_seed(0)
        found.append(CALLS[name](x.clone().requires_grad_(asks), MASK))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=0, equal_nan=True)


def test_rows_are_not_looked_at_before_where_no_gradient_is_asked_for(monkeypatch):
    looks = []
    monkeypatch.setattr(reference, "is_tame", lambda x: looks.append(x) or False)
    x = rows(5)
    CALLS["general"](x, MASK)
    assert not looks
    CALLS["general"](x.requires_grad_(), MASK)
    assert looks
    with torch.no_grad():
        looks.clear()
        CALLS["general"](x, MASK)
        assert not looks
