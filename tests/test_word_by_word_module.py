"""`WordByWordAttention`."""

import dataclasses

import pytest
import torch
from _compare import IMPLS
from _recurrent import Case

from fused_attn import WordByWordAttention

PADDED = Case(premise=3, hypothesis=2, dim=3, hypothesis_dim=2, attn_dim=2, mask="some", state=True)
RAGGED = dataclasses.replace(PADDED, premise=5, hypothesis=3, mask="none", ragged=True)
PREMISE, HYPOTHESIS = (dataclasses.replace(RAGGED, alone=side) for side in ("premise", "hypothesis"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "case", [PADDED, RAGGED, PREMISE, HYPOTHESIS], ids=["padded", "ragged", "packed premise", "packed hypothesis"]
)
def test_module_is_the_function_on_its_weights(case, impl, device):
    torch.manual_seed(0)
    module = WordByWordAttention(case.dim, case.hypothesis_dim, case.attn_dim).to(device)
    t = case.tensors(device)
    rest = {name: x for name, x in t.items() if not name.startswith("w")}
    weighted = not case.packed("premise")
    got = module(**rest, return_weights=weighted, impl=impl)
    layers = ("premise_proj", "hypothesis_proj", "state_proj", "score", "carry")
    weights = [getattr(module, name).weight.T for name in layers]
    weights[3] = weights[3][:, 0]
    named = dict(zip(("w_y", "w_h", "w_r", "w", "w_t"), weights, strict=True))
    want = case.op(impl=impl, **rest, **named)
    for x, y in zip(got if weighted else (got,), want if weighted else (want,), strict=True):
        torch.testing.assert_close(x, y)
    sum(x.square().sum() for x in (got if weighted else (got,))).backward()
    assert all(x.grad.count_nonzero() > 0 for x in module.parameters())
    assert [name for name, _ in module.named_parameters()] == [f"{name}.weight" for name in layers]
