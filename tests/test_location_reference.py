"""The oracle itself: the reference against the formulas written as loops over numbers."""

import itertools
import math

import pytest
import torch
from _location import ACTIVATIONS, SCORES, Case

from fused_attn import location_attention
from fused_attn._dropout import _philox, dropout_scale

# By the formulas of their definitions, not by PyTorch's functions.
BY_HAND = {
    "identity": lambda x: x,
    "tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
    "relu": lambda x: x if x > 0 else 0.0,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "leaky_relu": lambda x: x if x > 0 else 0.2 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def attend_by_hand(activation, gate_activation, h, w, b, v, gate_w, gate_b, context, value, score_bias, mask):
    """One sequence, one hop, lists of numbers: (output, weights)."""

    def project(row, matrix, bias):
        return [sum(x * line[a] for x, line in zip(row, matrix, strict=True)) + bias[a] for a in range(len(bias))]

    scores = []
    for j, row in enumerate(h):
        u = [BY_HAND[activation](z + c) for z, c in zip(project(row, w, b), context, strict=True)]
        if gate_w is not None:
            gates = [BY_HAND[gate_activation](g) for g in project(row, gate_w, gate_b)]
            u = [x * g for x, g in zip(u, gates, strict=True)]
        scores.append(sum(x * y for x, y in zip(u, v, strict=True)) + score_bias[j])
    raw = [math.exp(s) if seen else 0.0 for s, seen in zip(scores, mask, strict=True)]
    weights = [x / sum(raw) if sum(raw) else 0.0 for x in raw]
    out = [sum(a * row[d] for a, row in zip(weights, value, strict=True)) for d in range(len(value[0]))]
    return out, weights


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_formula(activation, score):
    gate_activation = ACTIVATIONS[-1 - ACTIVATIONS.index(activation)]
    case = Case(
        rows=6, dim=3, attn_dim=4, hops=2, score=score, context="sequence", value=5, score_bias=True, mask="empty"
    )
    t = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors(torch.device("cpu")).items()}
    gate = (t["gate_w"], t["gate_b"]) if "gate_w" in t else None
    out, weights = location_attention(
        t["h"],
        t.get("w"),
        t["b"],
        t.get("v"),
        gate=gate,
        context=t["context"],
        value=t["value"],
        activation=activation,
        gate_activation=gate_activation,
        mask=t["mask"],
        score_bias=t["score_bias"],
        return_weights=True,
        impl="reference",
    )

    # Give every score a hop axis, a linear one the v of its hop, and projected rows the identity.
    out, weights = (x if score.endswith("hops") else x[:, None] for x in (out, weights))
    w = t["w"].reshape(3, -1) if "w" in t else torch.eye(3).double()
    b, context = t["b"].reshape(-1), t["context"].reshape(3, -1)
    v = torch.eye(w.shape[1]).double() if "v" not in t else t["v"].reshape(w.shape[1], -1)
    for seq in range(3):
        for hop in range(v.shape[1]):
            by_hand = attend_by_hand(
                activation,
                gate_activation,
                t["h"][seq].tolist(),
                w.tolist(),
                b.tolist(),
                v[:, hop].tolist(),
                *((x.tolist() for x in gate) if gate else (None, None)),
                context[seq].tolist(),
                t["value"][seq].tolist(),
                t["score_bias"][seq].tolist(),
                t["mask"][seq].tolist(),
            )
            for got, want in zip((out[seq, hop], weights[seq, hop]), by_hand, strict=True):
                torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_reference_of_packed_rows_is_that_of_each_segment_alone():
    case = Case(rows=9, dim=3, attn_dim=4, hops=2, score="gated_hops", ragged=True, context="row", mask="random")
    t = {name: x.double() if x.is_floating_point() else x for name, x in case.tensors(torch.device("cpu")).items()}
    gate = (t["gate_w"], t["gate_b"])
    out, weights = location_attention(
        t["h"],
        t["w"],
        t["b"],
        t["v"],
        gate=gate,
        context=t["context"],
        mask=t["mask"],
        cu_seqlens=t["cu_seqlens"],
        return_weights=True,
        impl="reference",
    )
    for seq, (lo, hi) in enumerate(itertools.pairwise(t["cu_seqlens"].tolist())):
        alone, its_weights = location_attention(
            t["h"][None, lo:hi],
            t["w"],
            t["b"],
            t["v"],
            gate=gate,
            context=t["context"][:, lo:hi],
            mask=t["mask"][None, lo:hi],
            return_weights=True,
            impl="reference",
        )
        torch.testing.assert_close(out[seq], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights[lo:hi], its_weights[0].mT, rtol=1e-12, atol=1e-12)


def philox_by_hand(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 as the paper has it, on Python's unbounded integers."""
    (k0, k1), (x0, x1, x2, x3) = key, counter
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * x0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [x0, x1, x2, x3]


def test_philox_by_hand_gives_the_published_words():
    """The known answers that Random123 (Salmon et al., SC 2011) ships."""
    ones, digits = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox_by_hand((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_by_hand((ones, ones), (ones,) * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_by_hand((0xA4093822, 0x299F31D0), digits) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_reference_draws_the_words_of_philox():
    seeds = (0, 1, 2**32 - 1, 2**63 - 2, 0x299F31D0A4093822)
    counters = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (999_999, 2**31 - 1, 127), (0x243F6A88, 0x85A308D3, 7))
    for seed in seeds:
        for counter in counters:
            got = _philox(torch.tensor([seed]), *(torch.tensor([c]) for c in counter))
            want = philox_by_hand((seed % 2**32, seed >> 32), (*counter, 0))
            assert [word.item() for word in got] == want, (seed, counter)


def test_four_weights_share_a_call_of_philox():
    seed, segment, p = 0x299F31D0A4093822, 5, 0.5
    position, hop = torch.arange(40)[:, None], torch.arange(24)[None, :]
    got = dropout_scale(torch.tensor([seed]), position, torch.tensor(segment), hop, p)
    for t in range(40):
        for r in range(24):
            words = philox_by_hand((seed % 2**32, seed >> 32), (t & ~8, segment, r & ~8, 0))
            word = words[(t >> 3 & 1) + 2 * (r >> 3 & 1)]
            assert got[t, r] == (2.0 if word >> 8 >= 2**23 else 0.0), (t, r)
