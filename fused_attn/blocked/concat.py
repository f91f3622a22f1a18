r"""Concat (additive) attention in blocked PyTorch, for CPUs: the formulas, forward and backward, below autograd.

A *tile* is a block of queries and every key that their window shows, so its softmax is the plain one. Its scores
are made a *block* of keys at a time, in one work buffer that stays in the cache and is used again: nothing of size
Tq·Tk·A exists, and nothing of size Tq·Tk but what the caller asks for. The backward makes a tile's softmax again.

Scores. With :math:`a_d = e^{f q_d} e^{f k_d}`, whose two exponentials are made once a row,

.. math:: tanh(q_d + k_d) = (a_d - 1) / (a_d + 1), f = 2 \qquad \sigma(q_d + k_d) = 1 / (1 + a_d), f = -1

and the sum of two features over one denominator is a quotient of two bilinear forms in (1, a0, a1, a0 a1):

.. math:: (1 + a_0)(1 + a_1) \quad and, for tanh, \quad (v_0 + v_1)(a_0 a_1 - 1) + (v_0 - v_1)(a_0 - a_1)

so a matrix product over four makes both, and an element costs half a division. Blocks whose denominators might
overflow, and the other activations, add and activate; so does the backward, which wants each feature apart. The
gradient of a score, with the factor :math:`\kappa_{ij}` of dropout and :math:`p_{ij}` its softmax, is

.. math:: g_{ij} = p_{ij} (\kappa_{ij} dO_i \cdot value_j - \delta_i + dlse_i) + dscores_{ij}, \quad
    \delta_i = \sum_j p_{ij} \kappa_{ij} dO_i \cdot value_j

and where the softmax is of log σ that times 1 - σ. With the whole row at hand, p from its own maximum and sum, and
δ from the row too, cancel as the reference's do; from lse and :math:`dO_i \cdot o_i` a gradient that should be 0 (one
key has it all) came out as 2e-4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._dropout import dropout_scale
from .._one_side import both_packed, packed_rows, padded_rows, with_both_packed
from .._softmax import normaliser
from ..kernels.inputs import ConcatInputs, pair_starts
from ..reference import in_parts, readable, sound

T = TypeVar("T")

# Processor time at B = 4, 256 × 512, A = Dv = 128, float32, tanh, one thread of a Xeon with AVX-512 and 2 MiB of L2.
BUFFER_BYTES = 2**21
"""The work buffer, half of it for each of two cores. One core with 2^19, 2^20, 2^21 bytes: forward 50, 38, 40 ms,
backward 130, 112, 122 ms. Not smaller: the threads meet after every operator, which is dear on a busy machine."""
ROWS = 64
"""Queries of a tile. With 32, 64, 128: forward 45, 38, 40 ms; backward 117, 112, 112 ms."""
TILE = 2**20
"""Most elements of a tile of scores, while it has `LEAST_ROWS` queries: the values are read once a tile."""
LEAST_ROWS = 8
SLOW = 8e-9
"""Seconds an element of a block, with many threads, after which one thread is tried: it takes 0.6e-9 in the forward
and 4e-9 in the backward, and with two threads on two cores that other programs keep busy 6e-8 and 2e-7."""

SAFE = 30.0
"""Largest |exponent of a| for a block of pairs: the products stay under e^60 |v| = 1e26 |v|."""
SMALL = 4.0
"""A tanh whose exponents stay under this is taken as it is: a - 1 would lose the relative precision of small ones."""
FEW = 16
"""Features under which each is activated: a pair has the rounding of three, which is that of a score of few."""
FACTOR = {"tanh": 2.0, "sigmoid": -1.0}

_ATEN = torch.ops.aten
# From z to act(z); and from (g, z or act(z)) to g act'. `_WANTS_Z` want z, the others what is in the buffer.
_FORWARD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tanh": lambda z, out: _ATEN.tanh.out(z, out=out),
    "sigmoid": lambda z, out: _ATEN.sigmoid.out(z, out=out),
    "relu": lambda z, out: _ATEN.relu.out(z, out=out),
    "leaky_relu": lambda z, out: _ATEN.leaky_relu.out(z, 0.2, out=out),
    "elu": lambda z, out: _ATEN.elu.out(z, out=out),
    "silu": lambda z, out: _ATEN.silu.out(z, out=out),
    "gelu": lambda z, out: _ATEN.gelu.out(z, out=out),
    "abs": lambda z, out: _ATEN.abs.out(z, out=out),
    "square": lambda z, out: _ATEN.square.out(z, out=out),
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tanh": lambda g, y: _ATEN.tanh_backward.grad_input(g, y, grad_input=y),
    "sigmoid": lambda g, y: _ATEN.sigmoid_backward.grad_input(g, y, grad_input=y),
    "relu": lambda g, y: _ATEN.threshold_backward.grad_input(g, y, 0, grad_input=y),
    "leaky_relu": lambda g, y: _ATEN.leaky_relu_backward.grad_input(g, y, 0.2, True, grad_input=y),
    "elu": lambda g, y: _ATEN.elu_backward.grad_input(g, 1, 1, 1, True, y, grad_input=y),
    "silu": lambda g, z: _ATEN.silu_backward.grad_input(g, z, grad_input=z),
    "gelu": lambda g, z: _ATEN.gelu_backward.grad_input(g, z, grad_input=z),
    "abs": lambda g, z: z.sgn_().mul_(g),
    "square": lambda g, z: z.mul_(2).mul_(g),
}
_WANTS_Z = ("silu", "gelu", "abs", "square")


class _Tile(NamedTuple):
    """Some queries of some heads of some sequences, and the keys they may see; in rows."""

    b: slice
    h: slice
    rows: slice
    cols: slice
    seq: int  # of the first
    i: int  # position of the first query
    j: int  # position of the first key

    def of(self, x: Tensor) -> Tensor:
        """What of a tensor that broadcasts to (B, H, Tq, Tk) is of this tile: a view that broadcasts to its pairs."""
        places = zip(x.shape, (self.b, self.h, self.rows, self.cols), strict=True)
        return x[tuple(slice(None) if size == 1 else at for size, at in places)]


class _Pace:
    """Takes one thread for the blocks to come where the threads keep each other waiting; inside its ``with``.

    They meet after every operator. On a core that another program has, one is a slice of time late: some
    milliseconds an operator, where a block takes less. Whether a CPU is busy or slow is seen at the next block.
    The last bits of a result may differ with the number of threads, so not under `use_deterministic_algorithms`.
    """

    def __init__(self) -> None:
        self.threads = 1 if torch.are_deterministic_algorithms_enabled() else torch.get_num_threads()
        self.allowed = SLOW

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.allowed != SLOW:
            torch.set_num_threads(self.threads)

    def took(self, seconds: float) -> None:
        """A block took so many seconds an element."""
        if self.threads == 1 or seconds <= self.allowed:
            return
        if self.allowed == SLOW:
            self.allowed = seconds
            torch.set_num_threads(1)
        else:  # one is slower still, and is not asked again
            self.allowed = math.inf
            torch.set_num_threads(self.threads)


class _Call:
    """What forward and backward share: the tiles, their scores, and the activations of a block."""

    def __init__(self, inputs: ConcatInputs, *, guarded: bool = False) -> None:
        query, key, value, v, score_bias, mask, cu_seqlens_q, cu_seqlens_k, self.seed, *options = inputs
        activation, self.left, self.right, self.dropout_p, score_activation = options
        self.smooth = score_activation == "logsigmoid"
        if mask is not None and mask.dim() != 3:  # what no query or key may use can hold anything, NaN too
            query, key, value = readable(mask, query, key, value)
        (self.B, self.H, self.Tq, self.A), self.Tk = query.shape, key.shape[2]
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.q, self.k, self.value, self.v = (x.to(self.dtype) for x in (query, key, value, v))
        # Guarded: a row that is not finite reaches only the queries that see it. What it makes of them is kept apart.
        self.bad_q: Tensor | None = None
        if guarded:
            bounded = activation in ("tanh", "sigmoid")
            (self.q, self.bad_q), (self.k, self.bad_k) = (sound(x, nan_only=bounded) for x in (self.q, self.k))
            self.value, self.bad_value = sound(self.value)
        self.mask = mask[:, None, None] if mask is not None and mask.dim() == 2 else mask
        self.bias = score_bias  # of packed rows (1, H or 1, P), as a mask of pairs is
        if cu_seqlens_q is None or cu_seqlens_k is None:
            self.segments = [(0, self.Tq, 0, self.Tk)]
        else:
            cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
            self.segments = list(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False))
        self.ragged = cu_seqlens_q is not None
        self.starts = pair_starts(inputs).tolist() if self.ragged else []
        self.elements = BUFFER_BYTES // self.dtype.itemsize  # of the work buffer
        self.buffer = self.q.new_empty(0)
        self.pace = _Pace()

        self.act, self.bound = activation, 0.0
        self.left_side: Tensor | None = None  # (B, H, Tq, pairs, 4): the basis (1, a0, a1, a0 a1)
        self.factor = FACTOR.get(activation, 0.0)
        if self.factor and self.q.numel() and self.k.numel():
            self.bound = self._bound(self.q, self.k)
            if self.A >= FEW and (activation == "sigmoid" or not self.bound < SMALL):
                self.left_side = self._basis(self.q)
                self.right_side = self._basis(self.k).permute(0, 1, 3, 4, 2).contiguous()
                v0, v1 = F.pad(self.v, (0, self.A % 2)).unflatten(-1, (-1, 2)).unbind(-1)
                if activation == "tanh":
                    numerator = (-v0 - v1, v0 - v1, v1 - v0, v0 + v1)
                else:
                    numerator = (v0 + v1, v1, v0, torch.zeros_like(v0))
                self.numerator = torch.stack(numerator, -1)  # (H, pairs, 4)
        if activation == "identity":
            # Rank 1, and in float64: 60 and -45 cancel before they are rounded.
            self.qv, self.kv = ((x.double() @ self.v.double()[..., None]).squeeze(-1) for x in (self.q, self.k))

    def _bound(self, q: Tensor, k: Tensor) -> float:
        return abs(self.factor) * (q.abs().amax() + k.abs().amax()).item()

    def _basis(self, x: Tensor) -> Tensor:
        """(1, a0, a1, a0 a1) of each pair of features, (B, H, T, pairs, 4); the one that makes A even has v = 0."""
        a0, a1 = torch.exp(self.factor * F.pad(x, (0, self.A % 2))).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((torch.ones_like(a0), a0, a1, a0 * a1), -1)

    def tiles(self) -> Iterator[_Tile]:
        """Every tile in which a query may see a key: windows cost their width."""
        if not (self.B and self.H):
            return
        for seq, (q0, q1, k0, k1) in enumerate(self.segments):
            span = k1 - k0
            if self.left is not None and self.right is not None:
                span = min(span, max(1, self.left + self.right + ROWS))
            step = min(ROWS, max(LEAST_ROWS, TILE // max(1, span)), max(1, q1 - q0))
            # Short sequences share a tile, so that they share what an operator costs.
            fit = max(1, self.elements // max(1, step * span * self.A))
            heads = min(self.H, fit)
            batch = max(1, fit // self.H) if heads == self.H else 1
            for i in range(0, q1 - q0, step):
                end = min(i + step, q1 - q0)
                lo = 0 if self.left is None else max(0, i - self.left)
                hi = k1 - k0 if self.right is None else min(k1 - k0, end + self.right)
                if lo >= hi:
                    continue
                for b in range(0, self.B, batch):
                    for h in range(0, self.H, heads):
                        yield _Tile(
                            slice(b, min(b + batch, self.B)),
                            slice(h, min(h + heads, self.H)),
                            slice(q0 + i, q0 + end),
                            slice(k0 + lo, k0 + hi),
                            seq if self.ragged else b,
                            i,
                            lo,
                        )

    def pairs(self, t: _Tile, x: Tensor) -> Tensor:
        """What of a number a pair, of packed rows ``(H, P)`` or ``(1, P)``, is of a tile: a view that broadcasts."""
        if not self.ragged:
            return t.of(x)
        q0, q1, k0, k1 = self.segments[t.seq]
        heads = t.h if x.shape[0] > 1 else slice(None)
        of_sequence = x[heads, self.starts[t.seq] : self.starts[t.seq + 1]].unflatten(1, (q1 - q0, k1 - k0))
        return of_sequence[None, :, t.rows.start - q0 : t.rows.stop - q0, t.cols.start - k0 : t.cols.stop - k0]

    def _positions(self, t: _Tile) -> tuple[Tensor, Tensor]:
        device = self.q.device
        i = torch.arange(t.i, t.i + t.rows.stop - t.rows.start, device=device)
        return i[:, None], torch.arange(t.j, t.j + t.cols.stop - t.cols.start, device=device)

    def hidden(self, t: _Tile) -> Tensor | None:
        """Which keys of the tile are not visible, broadcastable to (b, h, m, n); None: all are."""
        shown = None
        if self.mask is not None:
            shown = t.of(self.mask) if self.mask.dim() == 4 else self.pairs(t, self.mask[0])
        i, j = self._positions(t)
        if self.left is not None:
            inside = j >= i - self.left
            shown = inside if shown is None else shown & inside
        if self.right is not None:
            inside = j <= i + self.right
            shown = inside if shown is None else shown & inside
        return None if shown is None else ~shown

    def kept(self, t: _Tile) -> Tensor | None:
        """Factors of dropout, (b, h, m, n)."""
        if self.dropout_p == 0:
            return None
        assert self.seed is not None
        i, j = self._positions(t)
        seq = torch.arange(t.seq, t.seq + t.b.stop - t.b.start, device=i.device)[:, None, None, None]
        head = torch.arange(t.h.start, t.h.stop, device=i.device)[:, None, None]
        return dropout_scale(self.seed, j, seq * self.H + head, i, self.dropout_p).to(self.dtype)

    def work(self, *shape: int) -> Tensor:
        """The work buffer in this shape."""
        size = math.prod(shape)
        if self.buffer.numel() < size:
            self.buffer = self.q.new_empty(size)
        return self.buffer[:size].view(shape)

    def blocks(self, t: _Tile) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """For each block of the tile's keys: which of them, q (b, h, m, 1, A) and k (b, h, 1, n, A)."""
        q, k = self.q[t.b, t.h, t.rows, None], self.k[t.b, t.h, None, t.cols]
        step = max(1, self.elements // max(1, q.numel()))
        for j in range(0, k.shape[3], step):
            some = slice(j, min(j + step, k.shape[3]))
            start = time.perf_counter()
            yield some, q, k[:, :, :, some]
            self.pace.took((time.perf_counter() - start) / (q.numel() * (some.stop - j)))

    def added(self, q: Tensor, k: Tensor) -> Tensor:
        """z = q + k in the work buffer, (b, h, m, n, A)."""
        return torch.add(q, k, out=self.work(*q.shape[:3], k.shape[3], self.A))

    def scores(self, t: _Tile, hidden: Tensor | None) -> Tensor:
        """Scores of a tile (b, h, m, n), -inf where hidden."""
        if self.act == "identity":
            s = (self.qv[t.b, t.h, t.rows, None] + self.kv[t.b, t.h, None, t.cols]).to(self.dtype)
        else:
            rows = None
            if self.left_side is not None:
                basis = self.left_side[t.b, t.h, t.rows].transpose(2, 3)  # (b, h, pairs, m, 4)
                rows = torch.cat((basis, basis * self.numerator[t.h, :, None]), 3).flatten(0, 2)
            parts = []
            for some, q, k in self.blocks(t):
                b, h, m, n = *q.shape[:3], k.shape[3]
                if rows is not None and (self.bound <= SAFE or self._bound(q, k) <= SAFE):
                    cols = self.right_side[t.b, t.h, ..., t.cols][..., some].flatten(0, 2)
                    x = self.work(rows.shape[0], 2 * m, n)
                    torch.bmm(rows, cols, out=x)
                    x[:, m:].div_(x[:, :m])
                    parts.append(x[:, m:].unflatten(0, (b, h, -1)).sum(2))
                else:
                    x = self.added(q, k)
                    _FORWARD[self.act](x, x)
                    weights = self.v[t.h].expand(b, h, self.A).reshape(b * h, self.A, 1)
                    parts.append(torch.bmm(x.view(b * h, m * n, self.A), weights).view(b, h, m, n))
            s = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        if self.bad_q is not None:
            s = s.masked_fill(self.bad_q[t.b, t.h, t.rows] | self.bad_k[t.b, t.h, t.cols].mT, torch.nan)
        if self.bias is not None:
            s += self.pairs(t, self.bias[0] if self.ragged else self.bias)
        s = F.logsigmoid(s) if self.smooth else s
        return s if hidden is None else s.masked_fill_(hidden, -torch.inf)

    def reached(self, t: _Tile, x: Tensor, hidden: Tensor | None) -> Tensor:
        """Guarded: x (b, h, m, n), NaN for values that are not finite where a query sees them, 0 where hidden."""
        if self.bad_q is None:
            return x
        x = x.masked_fill(self.bad_value[t.b, t.h, t.cols].mT, torch.nan)
        return x if hidden is None else x.masked_fill_(hidden, 0)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(s - pivot) in place of s, pivot, their sum) over the last axis; a row that sees no key gets 0, 0, 0."""
    pivot = s.amax(-1, keepdim=True)
    pivot.masked_fill_(pivot == -torch.inf, 0)
    p = s.sub_(pivot).exp_()
    return p, pivot, p.sum(-1, keepdim=True)


@with_both_packed
def concat_fwd(inputs: ConcatInputs, need_scores: bool, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, scores) as `fused_attn.reference.concat_attention` has them.

    The scores are written only where `need_scores` says so, else they are empty; pairs: P, of packed rows.
    """
    made = _paced(_forward, _Call(inputs), need_scores, pairs)
    if _may_mix(inputs) and not made[0].isfinite().all():
        made = _paced(_forward, _Call(inputs, guarded=True), need_scores, pairs)
    return made


def _may_mix(inputs: ConcatInputs) -> bool:
    """Whether a hidden row may meet a number in a tile, all of a sequence: of a query of hidden keys, too."""
    packed = inputs.mask is not None and inputs.packed
    return in_parts(inputs.mask, packed, inputs.left, inputs.right)


def _paced(step: Callable[..., T], call: _Call, *args: object) -> T:
    with call.pace:
        return step(call, *args)


def _forward(call: _Call, need_scores: bool, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Tq, Tk = call.B, call.H, call.Tq, call.Tk
    out = call.q.new_zeros(B, H, Tq, call.value.shape[-1])
    lse = normaliser(call.q.new_full((B, H, Tq), -torch.inf), call.q.new_zeros(B, H, Tq))
    shape = (H, pairs) if call.ragged else (B, H, Tq, Tk)
    scores = call.q.new_full(shape if need_scores else (0,), -torch.inf)
    for t in call.tiles():
        hidden = call.hidden(t)
        s = call.scores(t, hidden)
        if need_scores:
            call.pairs(t, scores).copy_(s)
        p, pivot, total = _softmax(s)
        lse[t.b, t.h, t.rows] = torch.cat([pivot.masked_fill(total == 0, -torch.inf), total], -1)
        kept = call.kept(t)
        if kept is not None:
            p *= kept
        p = call.reached(t, p, hidden)
        out[t.b, t.h, t.rows] = (p @ call.value[t.b, t.h, t.cols]).div_(total.masked_fill_(total == 0, 1))
    return out, lse, scores


def concat_bwd(
    inputs: ConcatInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (query, key, value, v, score_bias), None where `needs` is False."""
    if inputs.one_sided:
        padded_q = inputs.cu_seqlens_q is None

        def of_queries(x: Any) -> Any:
            return packed_rows(x) if padded_q and x is not None else x

        saved = of_queries(out), of_queries(lse)
        grads = concat_bwd(both_packed(inputs), *saved, of_queries(dout), of_queries(dlse), dscores, needs)
        for i in (0,) if padded_q else (1, 2):
            if (grad := grads[i]) is not None:
                grads[i] = padded_rows(grad, inputs[i])
        return grads
    dlse = None if dlse is None else (dlse * lse)[..., 1:]  # of log l, from that of l
    given = (dout, dlse, dscores, inputs.score_bias, needs)
    made = _paced(_backward, _Call(inputs), *given)
    if _may_mix(inputs) and not all(grad is None or grad.isfinite().all() for grad in made):
        made = _paced(_backward, _Call(inputs, guarded=True), *given)
    return [
        grad.to(like.dtype).reshape(like.shape) if need and grad is not None and like is not None else None
        for need, grad, like in zip(needs, made, inputs[:5], strict=True)
    ]


def _backward(
    call: _Call,
    dout: Tensor,
    dlse: Tensor | None,
    dscores: Tensor | None,
    score_bias: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """What `concat_bwd` returns, wide, all made or not."""
    activation = call.act
    need_q, need_k, need_value, need_v, need_bias = needs
    dq, dk, dvalue = (x.new_zeros(x.shape) for x in (call.q, call.k, call.value))
    dv = call.v.new_zeros(call.v.shape, dtype=torch.float64)
    dbias = None
    if need_bias:
        assert score_bias is not None
        dbias = dq.new_zeros(score_bias.shape)
    dout = dout.to(call.dtype)
    for t in call.tiles():
        hidden, kept, do = call.hidden(t), call.kept(t), dout[t.b, t.h, t.rows]
        s = call.scores(t, hidden)
        slope = torch.expm1(s).neg_() if call.smooth else None  # 1 - σ, from log σ
        p, _, total = _softmax(s)
        p /= total.masked_fill_(total == 0, 1)
        if call.bad_q is not None and hidden is not None:
            p.masked_fill_(hidden, 0)
        if need_value:
            dvalue[t.b, t.h, t.cols] += (p if kept is None else p * kept).mT @ do
        if not (need_q or need_k or need_v or need_bias):
            continue
        g = call.reached(t, do @ call.value[t.b, t.h, t.cols].mT, hidden)
        if kept is not None:
            g *= kept
        # Twice: the second is what rounding leaves of the first, which all of a row have alike. Where one key has
        # almost all the weight its gradient is no more than that.
        for _ in range(2):
            g.sub_((p * g).sum(-1, keepdim=True))
        g.mul_(p)
        if call.bad_q is not None and hidden is not None:
            g.masked_fill_(hidden, 0)
        # These two cancel where one key has all the weight, so they are added up by themselves.
        more = None if dscores is None else call.pairs(t, dscores)
        if dlse is not None:
            of_lse = dlse[t.b, t.h, t.rows]
            more = p * of_lse if more is None else torch.addcmul(more, p, of_lse)
        if more is not None:
            g += more if hidden is None else more.masked_fill(hidden, 0)
        if slope is not None:
            g *= slope
        if dbias is not None:
            part = call.pairs(t, dbias[0] if call.ragged else dbias)
            part += g.sum_to_size(part.shape)
        if not (need_q or need_k or need_v):
            continue
        if activation == "identity":
            gi, gj = (g.sum(axis, dtype=torch.float64).unsqueeze(-1) for axis in (-1, -2))
            dq[t.b, t.h, t.rows] += gi
            dk[t.b, t.h, t.cols] += gj
            for gx, x in ((gi, call.q[t.b, t.h, t.rows]), (gj, call.k[t.b, t.h, t.cols])):
                dv[t.h] += (gx * x).sum((0, 2))
            continue
        dq_tile, dk_tile = dq[t.b, t.h, t.rows], dk[t.b, t.h, t.cols]
        for some_keys, q, k in call.blocks(t):
            x = call.added(q, k)
            b, h, m, n, A = x.shape
            gn = g[..., some_keys]
            wants_z = activation in _WANTS_Z
            if need_v or not wants_z:
                y = torch.empty_like(x) if wants_z else x
                _FORWARD[activation](x, y)
            if need_v:
                # A product a query, then sums: one product over all pairs (i, j) had four times the error.
                rows = torch.bmm(gn.reshape(b * h * m, 1, n), y.view(b * h * m, n, A)).view(b, h, m, A)
                dv[t.h] += rows.sum((0, 2), dtype=torch.float64)
            if need_q or need_k:
                _BACKWARD[activation](gn[..., None].expand_as(x), x)
            if need_q:
                dq_tile += x.sum(3)
            if need_k:
                dk_tile[:, :, some_keys] += x.sum(2)
    v_rows = call.v[:, None]
    return dq.mul_(v_rows), dk.mul_(v_rows), dvalue, dv, dbias
