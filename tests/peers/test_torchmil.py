"""`fused_attn.compat.torchmil` beside torchmil itself."""

import copy

import _peer
import pytest
import torch
from _peer import Case, alone, close, library_runs, pair_of
from torch import nn

_peer.need("torchmil.nn")
from torchmil.models import ABMIL, CLAM_SB  # noqa: E402
from torchmil.nn import AttentionPool  # noqa: E402

from fused_attn.compat import _peers, replace_attention  # noqa: E402


def bags(masked=True, width=6):
    """Three bags of seven instances, of which four, seven and one are visible."""
    rows = torch.arange(7) < torch.tensor([4, 7, 1])[:, None]
    return torch.randn(3, 7, width), *([rows] if masked else [])


class Called(nn.Module):
    """A pool or model that is called with a mask of some dtype, and asked for the values of its attention."""

    def __init__(self, module, dtype, att):
        super().__init__()
        self.module, self.dtype, self.att = module, dtype, att

    def forward(self, x, mask=None):
        return self.module(x, mask if mask is None else mask.to(self.dtype), return_att=self.att)


def case(kind=AttentionPool, *arguments, mask=None, att=False, **options):
    def make():
        module = kind(*(arguments or (6, 5)), **options)
        return Called(module, mask, att) if att or mask not in (None, torch.bool) else module

    return Case(make, lambda: bags(mask is not None), AttentionPool)


CASES = {
    "plain": case(),
    "mask": case(mask=torch.bool),
    "float mask": case(mask=torch.float32, act="relu"),
    "integer mask": case(mask=torch.int64, act="gelu"),
    "gated": case(gated=True),
    "gated, mask": case(gated=True, mask=torch.bool),
    "gated relu, att": case(gated=True, act="relu", att=True),
    "gated gelu, mask, att": case(gated=True, act="gelu", mask=torch.bool, att=True),
    "att": case(att=True),
    "mask, att": case(mask=torch.bool, att=True),
    "ABMIL": case(ABMIL, (6,), 5, mask=torch.bool),
    "ABMIL, gated, att": case(ABMIL, (6,), 5, "relu", True, mask=torch.float32, att=True),
    "CLAM_SB": case(CLAM_SB, (6,), 5, mask=torch.bool),
}
LEARNING = {name: case for name, case in CASES.items() if name != "CLAM_SB"}  # whose other classifiers a loss uses


@pytest.mark.whole
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@_peer.table(LEARNING)
def test_outputs_and_gradients(case, dtype, training):
    _peer.check_same(case, dtype, training)


@pytest.mark.whole
@_peer.table(CASES)
def test_five_steps(case):
    _peer.check_steps(case)


@pytest.mark.whole
@_peer.table(CASES)
def test_checkpoints(case):
    _peer.check_state(case)


@pytest.mark.whole
@_peer.table(CASES)
def test_pickled_copied_and_restored(case):
    _peer.check_copies(case)


@pytest.mark.whole
@_peer.table({name: CASES[name] for name in ("plain", "gated, mask", "mask, att", "ABMIL")})
def test_compiled(case):
    _peer.check_compiles(case)


def test_the_list_is_the_registry():
    assert [row.name for row in _peers.known("torchmil")] == [
        row[0].__name__ for row in _peers.registry("torchmil").values()
    ]


@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_losses_of_clam(masked):
    """Which instances are taken follows from the raw scores, those of hidden instances among them."""
    torch.manual_seed(0)
    theirs = CLAM_SB((6,), 5, gated=True, k_sample=2)
    replaced = copy.deepcopy(theirs)
    replace_attention(replaced, cpu="always", strict=True)
    x, labels = torch.randn(3, 7, 6), torch.tensor([0, 1, 1])
    mask = bags()[1] if masked else None
    results = []
    for model in (theirs, replaced):
        prediction, losses = model.compute_loss(labels, x, mask)
        total = sum(losses.values())
        total.backward()
        results.append((prediction, losses, [x.grad for x in model.parameters()]))
    close(results[1][:2], results[0][:2])
    close(results[1][2], results[0][2], max(x.abs().max().item() for x in results[0][2]))


@pytest.mark.parametrize("att", [False, True])
def test_a_bag_of_which_nothing_is_visible_gives_zeros(att):
    theirs, replaced, (x, mask) = pair_of(case(mask=torch.bool, gated=True, att=att))
    mask[1] = False
    x.requires_grad_()
    want, got = theirs(x, mask), replaced(x, mask)
    if att:
        close(got[1], want[1])
        want, got = want[0], got[0]
    assert want[1].isnan().all()
    assert torch.equal(got[1], torch.zeros(6))
    close(got[[0, 2]], want[[0, 2]])
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *replaced.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@_peer.table({name: CASES[name] for name in ("plain", "gated, mask", "mask, att")})
def test_autocast_is_the_librarys(case, dtype):
    theirs, replaced, inputs = pair_of(case)
    with torch.autocast("cpu", dtype):
        want = theirs(*inputs)
        with alone(case.peer):
            got = replaced(*inputs)
    for a, b in zip(*(_peer.tree_leaves(x) for x in (got, want)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_lazy_layers_are_made_by_the_first_call():
    torch.manual_seed(0)
    pool = AttentionPool(att_dim=5, gated=True)
    assert not replace_attention(pool, cpu="always", strict=True).skipped
    x, mask = bags()
    with library_runs(AttentionPool):
        want = pool(x, mask)
    with alone(AttentionPool):
        close(pool(x, mask), want)


class Adapter(nn.Linear):
    """As of an adapter: another product than with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


def hooked(pool):
    pool.fc1.module.register_forward_hook(lambda *_: None)


def adapted(pool):
    pool.fc1.module = Adapter(6, 5)


def activated(pool):
    pool.act_layer = nn.SiLU()


def approximate(pool):
    pool.act_layer = nn.GELU("tanh")


def gated(pool):
    pool.act_gated = nn.Tanh()


def biased(pool):
    pool.fc2 = nn.Linear(5, 1)


OTHERS = {
    "hooks": (hooked, "fc1.module has hooks"),
    "adapter": (adapted, "fc1.module is a .*Adapter"),
    "another activation": (activated, "act_layer is a .*SiLU"),
    "approximate": (approximate, "act_layer is an approximate GELU"),
    "another gate": (gated, "act_gated is a .*Tanh"),
    "bias": (biased, "fc2 has a bias"),
}


@pytest.mark.parametrize(("change", "why"), OTHERS.values(), ids=OTHERS)
def test_pools_that_were_changed_are_the_librarys(change, why):
    """Before the replacement they are skipped, and say why; after it the library's forward runs."""
    torch.manual_seed(0)
    pool = AttentionPool(6, 5, gated=True)
    replaced = copy.deepcopy(pool)
    replace_attention(replaced, cpu="always", strict=True)
    change(pool)
    with pytest.raises(ValueError, match=why):
        replace_attention(pool, strict=True)
    change(replaced)
    replaced.load_state_dict(pool.state_dict())
    inputs = bags()
    with library_runs(AttentionPool):
        got = replaced(*inputs)
    close(got, pool(*inputs))


def test_other_masks_are_the_librarys():
    theirs, replaced, (x,) = pair_of(case())
    with library_runs(AttentionPool):
        got = replaced(x, torch.ones(1, 7))
    close(got, theirs(x, torch.ones(1, 7)))


@pytest.mark.parametrize("spectral", [False, True], ids=["weight_norm", "spectral_norm"])
def test_parametrised_layers_are_read(spectral):
    """Once a call, for what is in a parametrisation may change as it is read."""
    theirs, replaced, inputs = pair_of(case(gated=True, mask=torch.bool))
    wrap = nn.utils.parametrizations.spectral_norm if spectral else nn.utils.parametrizations.weight_norm
    for module in (theirs, replaced):
        torch.manual_seed(0)
        wrap(module.fc1.module)
        wrap(module.fc_gated.module)
    for _ in range(2):
        with alone(AttentionPool):
            got = replaced(*inputs)
        close(got, theirs(*inputs))


def test_the_smoothed_pools_are_no_pool_that_is_known():
    """They compute something else; their classes are no subclasses of the pool."""
    from torchmil.nn import ProbSmoothAttentionPool, SmAttentionPool

    model = nn.ModuleList([ProbSmoothAttentionPool(6), SmAttentionPool(6)])
    report = replace_attention(model)
    assert (report.replaced, report.skipped) == ([], [])


def test_the_librarys_own_tests():
    files = ["nn/attention/test_attention_pool.py", "models/test_abmil.py", "models/test_clam.py"]
    _peer.check_upstream("torchmil", "torchmil/tests", files)
