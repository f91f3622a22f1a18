"""Masks of concat and general attention in every form that broadcasts, as views."""

import importlib

import _concat
import _general
import pytest
import torch
from _compare import assert_close, evaluate, largest
from _concat import every_impl
from torch import Tensor

import fused_attn as f

B, H, TQ, TK = 2, 3, 7, 21
SIZES = {"batch": B, "heads": H, "queries": TQ, "keys": TK, "attn_dim": 4, "value_dim": 6}
FORMS = {
    "keys of the batch": (1, TK),
    "pairs of the batch": (1, TQ, TK),
    "keys of a sequence": (B, 1, TK),
    "SDPA: pairs": (1, 1, TQ, TK),
    "SDPA: keys": (B, 1, 1, TK),
    "SDPA: keys of the batch": (1, 1, 1, TK),
    "SDPA: sequences": (B, 1, TQ, TK),
    "heads": (B, H, TQ, TK),
    "heads, keys": (B, H, 1, TK),
    "heads of the batch": (1, H, TQ, TK),
    "heads, keys of the batch": (1, H, 1, TK),
}
OF_KEYS = {"keys of the batch", "keys of a sequence", "SDPA: keys", "SDPA: keys of the batch"}
CASES = {
    "concat": _concat.Case(**SIZES),
    "concat, window": _concat.Case(**SIZES, window=(2, 3), activation="gelu"),
    "concat, identity": _concat.Case(**SIZES, activation="identity"),
    "distance": _concat.Case(**SIZES, p=1),
    "general": _general.Case(**SIZES, weight="matrix"),
    "general, window": _general.Case(**SIZES, window=(2, 3), score_bias="bhqk", dropout_p=0.3),
    "general, keys are values": _general.Case(**SIZES, own_value=False, return_weights=False),
}
each_form = pytest.mark.parametrize("form", FORMS)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def mask_of(form: str, device: torch.device) -> Tensor:
    """Some queries see nothing, and some keys nobody."""
    mask = torch.rand(FORMS[form], generator=torch.Generator().manual_seed(3)) < 0.6
    mask[..., ::4] = False
    if mask.shape[-2] == TQ:
        mask[..., ::3, :] = False
    return mask.to(device)


def expanded(mask: Tensor) -> Tensor:
    return (mask[:, None] if mask.dim() == 3 else mask).expand(B, H, TQ, TK)


def fill(tensors: dict[str, Tensor], shown: Tensor, value: float) -> dict[str, Tensor]:
    """The rows of each head that no pair uses are put in place, and returned by name."""
    unused = {"query": ~shown.any(3), "key": ~shown.any(2), "value": ~shown.any(2)}
    unused = {name: rows for name, rows in unused.items() if name in tensors}
    for name, rows in unused.items():
        tensors[name][rows] = value
    return unused


@every_impl
@each_form
@each_case
def test_a_mask_that_broadcasts_is_that_of_all_pairs(case, form, impl, device):
    """Of all pairs with heads: each head by a call of its own, but for dropout, whose words are a head's."""
    tensors, mask = case.tensors(device), mask_of(form, device)
    got = evaluate(case.op, tensors | {"mask": mask}, impl)
    if case.dropout_p:
        assert_close(got, evaluate(case.op, tensors | {"mask": expanded(mask).contiguous()}, impl))
        return

    def each_head(*, impl, mask, **tensors):
        def of(name, h):
            x = tensors[name]
            return x[:, h] if x.dim() == 4 else x[h] if name == "v" and x.dim() == 2 else x

        calls = [case.op(impl=impl, mask=mask[:, h].contiguous(), **{n: of(n, h) for n in tensors}) for h in range(H)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls, 1)
        return tuple(torch.stack(each, 1) for each in zip(*calls, strict=True))

    assert_close(got, evaluate(each_head, tensors | {"mask": expanded(mask)}, impl))


@every_impl
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("form", ["pairs of the batch", "SDPA: keys", "heads", "heads, keys of the batch"])
@each_case
def test_rows_that_a_head_may_not_use_may_hold_anything_there(case, form, value, impl, device):
    tensors = case.tensors(device) | {"mask": mask_of(form, device)}
    clean = evaluate(case.op, tensors, impl)
    unused = fill(tensors, expanded(tensors["mask"]), value)
    result = evaluate(case.op, tensors, impl)
    assert_close(result, clean)
    for name, rows in unused.items():
        assert largest(result.gradients[name][rows]) == 0, name


@pytest.mark.kernel
@each_form
@pytest.mark.parametrize("family", ["concat", "general"])
def test_a_mask_is_a_view_for_the_kernels_and_one_of_keys_no_term_a_pair(family, form, device, monkeypatch):
    module, seen = importlib.import_module(f"fused_attn.kernels.{family}"), []
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda k, grid, args, *a, **o: seen.append(args) or launch(k, grid, args, *a, **o)
    )
    case, mask = CASES[family], mask_of(form, device)
    case.op(impl="triton", **case.tensors(device), mask=mask)
    pairs = seen[0]["mask"].ptr
    assert (pairs is None) == (form in OF_KEYS)
    if pairs is not None:
        assert pairs.shape == (B, H, TQ, TK)
        assert pairs.data_ptr() == mask.data_ptr()


def test_of_two_axes_the_first_is_the_batch_where_it_may_be(device):
    query, key = torch.randn(5, 5, 4, device=device), torch.randn(5, 6, 4, device=device)
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
    out = f.general_attention(query, key, mask=mask)
    torch.testing.assert_close(out, f.general_attention(query, key, mask=mask[:, None].expand(5, 5, 6).contiguous()))


@pytest.mark.parametrize("form", [form for form in FORMS if "heads" not in form])
def test_modules_take_masks_that_broadcast(form, device):
    torch.manual_seed(0)
    mask = mask_of(form, device)
    query, key = torch.randn(B, TQ, 4, device=device), torch.randn(B, TK, 5, device=device)
    for layer in (
        f.ConcatAttention(4, 5, 3, num_heads=H),
        f.GeneralAttention(4, 5, num_heads=H),
        f.DistanceAttention(4, 5, 3, num_heads=H),
    ):
        layer.to(device)
        torch.testing.assert_close(layer(query, key, mask=mask), layer(query, key, mask=expanded(mask).contiguous()))
