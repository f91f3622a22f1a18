"""Target attention of recommenders: one query a user, a history of keys, and an MLP that scores their pairs.

The first layer of the MLP sees the query, the key, their difference and their product, which for one query is a
matrix and a bias of its own on the key. So nothing of width 4D is made, and what is left is the pooling of rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import reference
from ._checks import Checker, Table, argument, check_activation, check_flag, check_scale, mask_of, offsets_of
from ._habits import explicit
from ._jagged import jagged_history
from ._operators import Operator, exact_of, launcher
from ._ops import Impl, exports_from_one, keeps_exact, under_autocast, use_triton, weights_of_rows
from ._results import by_formula, check_wanted, returned
from .kernels.inputs import TargetInputs
from .location import check_sequences
from .segments import Offsets, as_offsets

MAX_UNITS = 128
"""Of the second layer, whose sums a kernel keeps; of the first there may be any number."""


def _table(rows: str, seq: str, last: str) -> Table:
    """Rows are ``"B T"`` or ``"N"``, sequences ``"B"`` or ``"S"``; last: the width that `v` meets, A or K."""
    packed = seq != "B"
    return {
        "query": argument(f"{seq} D", "first"),
        "key": argument(f"{rows} D", offsets="" if packed else "cu_seqlens"),
        "w1": argument("4D A", linear=True),
        "w2": argument("A K", optional=True, linear=True),
        "v": argument(last, linear=True),
        "b1": argument("A", optional=True),
        "b2": argument("K", optional=True),
        "b3": argument("", optional=True),
        "value": argument(f"{rows} Dv", optional=True),
        "mask": mask_of(rows),
        "cu_seqlens": offsets_of("S"),
    }


_TABLES = {
    (packed, two): _table("N" if packed else "B T", "S" if packed else "B", "K" if two else "A")
    for packed in (False, True)
    for two in (False, True)
}


def _fake(inputs: TargetInputs, need_exact: bool) -> tuple[Tensor, ...]:
    query, key, value = inputs.query, inputs.key, inputs.value
    seqs, width = query.shape[0], (key if value is None else value).shape[-1]
    return (
        key.new_empty(seqs, 1, width),
        key.new_empty(seqs, 1, 2, dtype=torch.float32),
        key.new_empty(*key.shape[:-1], 1, dtype=torch.float32),
        key.new_empty((seqs, 1, width) if need_exact else 0, dtype=torch.float32),
    )


def _bwd(inputs: TargetInputs, *args: Any) -> list[Tensor | None]:
    out, lse, scores, exact, dout, dlse, dscores, *_, needs = args
    run = launcher("target_bwd.target_bwd")
    return cast("list[Tensor | None]", run(inputs, exact_of(out, exact), lse, scores, dout, dlse, dscores, needs))


_TARGET = Operator(
    "target",
    TargetInputs,
    differentiable="query key w_key w_product context w2 b2 v b3 value",
    choices="bool need_exact",
    results="out lse scores exact?need_exact",
    saved="out lse scores exact",
    forward=launcher("target.target_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=reference.target_attention,
)


@explicit
@jagged_history
@exports_from_one
@under_autocast("query", "key", "w1", "w2", "v", "b1", "b2", "b3", "value")
def target_attention(
    query: Tensor,
    key: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    v: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    b3: Tensor | None = None,
    value: Tensor | None = None,
    activation: str = "sigmoid",
    softmax: bool = False,
    scale: float = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Offsets | None = None,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Any, ...]:
    r"""Target attention (DIN): an MLP scores every key of a user's history beside the one query, the target.

    .. math:: u_j = act([q; \, k_j; \, q - k_j; \, q \odot k_j] W_1 + b_1), \quad u'_j = act(u_j W_2 + b_2), \quad
        s_j = scale \, (u'_j \cdot v + b_3), \quad o = \sum_j a_j \, value_j

    where :math:`a_j = s_j` as it is, or with `softmax` :math:`a = softmax(s)` over the history. A user without a
    visible key gets zeros, zero weights and zero gradients.

    With the rows of :math:`W_1` named by what they meet, the first layer is
    :math:`(W_k - W_d + diag(q) W_p)^T k_j + (W_q + W_d)^T q + b_1`: a matrix and a bias a user, of which the kernel
    makes the matrix on the chip.

    Parameters
    ----------
    query
        The target, ``(B, D)``; with `cu_seqlens` ``(S, D)``. float16, bfloat16 or float32; float64 by the reference
        only.
    key
        The history, ``(B, T, D)``; packed ``(N, D)`` with `cu_seqlens`; or a jagged ``torch.nested`` tensor, whose
        values, and a mask, are jagged too.
    w1, b1
        ``(4D, A)``, whose rows meet the query, the key, their difference and their product, and ``(A,)``: the order
        of DIN's published code, DeepCTR and RecBole.
    w2, b2
        ``(A, K)`` and ``(K,)``, or None for an MLP of one hidden layer.
    v, b3
        ``(K,)``, without `w2` ``(A,)``, and ``()``.
    value
        What is summed: ``(B, T, Dv)`` or ``(N, Dv)``; the keys where None.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu, of both layers. RecBole's Dice,
        which has no statistics and an alpha of 0, is silu.
    softmax
        Whether scores become weights by a softmax; by default, as in the paper, they are the weights.
    scale
        Factor on the scores: RecBole has D ** -0.5.
    mask
        bool ``(B, T)`` or ``(N,)``, True = may be attended. Keys and values that it hides are never read: they may be
        NaN. A query is read even if its user sees nothing.
    cu_seqlens
        int32 ``(S + 1,)``: the history of user s is the rows ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]`` of `key`.
    return_weights
        Return the weights too: of a softmax, or the scores, 0 where the mask hides.
    return_scores
        Return the scores too, in float32 (float64 where the inputs are), -inf where the mask hides.
    return_log_weights, return_lse, return_state
        Of a softmax alone, see `location_attention`.
    impl
        ``"auto"``: the Triton kernel on a GPU, PyTorch elsewhere, for float64 and for more than 128 units of the
        second layer. ``"triton"`` and ``"reference"`` never fall back.

    Returns
    -------
    Tensor, State or tuple
        The output ``(B, Dv)``, S for B where ragged, or the state alone, or a tuple of it and what is asked for, in
        the order weights, log weights, scores, lse. The first three are ``(B, T)``, packed ``(N,)``, or jagged as the
        history is; m, log_l and lse ``(B,)``. All are differentiable.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, what only a softmax has asked for without one, and an `impl` that cannot run
        here.

    References
    ----------
    Zhou et al. 2018, Deep Interest Network for click-through rate prediction.

    """
    cu_seqlens = as_offsets(cu_seqlens)
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state, return_log_weights)
    softmax = check_flag("softmax", softmax)
    for name in () if softmax else ("log_weights", "lse", "state"):
        if getattr(wanted, name):
            raise ValueError(f"return_{name}: expected False without softmax=True, which it is of; got True")
    _validate(query, key, w1, w2, v, b1, b2, b3, value, mask, cu_seqlens, activation)
    scale = check_scale(scale, query.dtype)

    of_query, of_key, of_difference, of_product = w1.chunk(4)
    of_all = of_query + of_difference
    context = query @ of_all if b1 is None else torch.addmm(b1, query, of_all)
    inputs = TargetInputs(
        query, key, of_key - of_difference, of_product, context, w2, b2, v, None if b3 is None else b3[None], value,
        mask, cu_seqlens, activation, softmax, scale,
    )  # fmt: skip
    unsupported = None
    if query.dtype == torch.float64:
        unsupported = "has no float64"
    elif w2 is not None and w2.shape[1] > MAX_UNITS:
        unsupported = f"holds at most {MAX_UNITS} units of the second layer"
    if use_triton(impl, query.device, unsupported):
        out, lse, scores, exact = _TARGET(inputs, keeps_exact(*inputs[:10], state=wanted.state))
        out, weights = wanted.output_of(out, exact), None
    else:
        out, lse, scores, weights = by_formula(_TARGET.formula, inputs, wanted)
    if wanted.weights and weights is None and softmax:
        weights = weights_of_rows(scores, lse, cu_seqlens)
    elif wanted.weights and weights is None:
        weights = scores if mask is None else scores.masked_fill(~mask[..., None], 0)

    log_weights = weights_of_rows(scores, lse, cu_seqlens, log=True) if wanted.log_weights else None
    of_keys = (None if x is None else x.squeeze(-1) for x in (weights, scores, log_weights))
    return returned(wanted, query.dtype, out.squeeze(1), lse.squeeze(1) if wanted.normaliser else None, *of_keys)


def _validate(
    query: Tensor, key: Tensor, w1: Tensor, w2: Tensor | None, v: Tensor, b1: Tensor | None, b2: Tensor | None,
    b3: Tensor | None, value: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None, activation: str,
) -> None:  # fmt: skip
    """Check every argument."""
    check = Checker(_TABLES[cu_seqlens is not None, w2 is not None])
    if cu_seqlens is not None:
        check("cu_seqlens", cu_seqlens)
        check.bind_sequences("S", cu_seqlens, "cu_seqlens")
    check("query", query)
    check("key", key)
    if cu_seqlens is not None:
        check_sequences(check, cu_seqlens, key)
    check.bind("4D", 4 * query.shape[1], "query")
    if w2 is None and b2 is not None:
        raise ValueError("b2: expected None without w2; got a tensor")
    for name, x in (
        ("w1", w1), ("w2", w2), ("v", v), ("b1", b1), ("b2", b2), ("b3", b3), ("value", value), ("mask", mask)
    ):  # fmt: skip
        check(name, x)
    check_activation("activation", activation)
