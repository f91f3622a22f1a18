"""Distance attention: the less query and key differ, the more a value weighs.

With p = 1 the Laplace attention of Attentive Neural Processes (Kim et al. 2019), with p = 2 a Gaussian kernel of
weighted distances. It is concat attention of q and -k with |z|^p for the activation, and runs by its kernels: an
element of the score is an addition and one or two more operations. The product form of p = 2, q² - 2 q k + k², would
lose what near rows differ in.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor

from ._checks import check_number, show
from ._habits import explicit
from ._jagged import jagged_pairs
from ._ops import Impl, exports_from_one, under_autocast
from ._pairs import check_pairs, pairs_tables
from ._results import check_wanted
from .concat import attend
from .kernels.inputs import ConcatInputs
from .segments import Offsets, as_offsets

_TABLES = pairs_tables("A", "A", shared=True, v="A?")
_FEATURES = {1.0: "abs", 2.0: "square"}


@explicit
@jagged_pairs
@exports_from_one
@under_autocast("query", "key", "value", "v")
def distance_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | Literal[False],
    v: Tensor | None = None,
    *,
    p: float = 1,
    mask: Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    score_bias: Tensor | None = None,
    cu_seqlens_q: Offsets | None = None,
    cu_seqlens_k: Offsets | None = None,
    dropout_p: float = 0.0,
    return_weights: bool = False,
    return_log_weights: bool = False,
    return_scores: bool = False,
    return_lse: bool = False,
    return_state: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Any, ...]:
    r"""Attention by weighted distances of queries and keys.

    .. math::
        s_{ij} = -\sum_a v_a |q_{ia} - k_{ja}|^p + \beta_{ij}, \quad o_i = \sum_j softmax_j(s_{ij}) \, value_j

    A query that sees no key gives zeros, zero weights and zero gradients. The gradient of \|z\| at 0 is 0, as
    `torch.abs` has it.

    Parameters
    ----------
    query, key
        ``(B, Tq, A)`` and ``(B, Tk, A)``, or with heads ``(B, H, Tq, A)`` and ``(B, H, Tk, A)``; packed ``(N, A)`` or
        ``(N, H, A)`` with both ``cu_seqlens``. Keys ``(B, 1, Tk, A)`` are those of all heads. float16, bfloat16,
        float32; float64 on a CPU or by the reference.
    value
        ``(B, Tk, Dv)``, ``(B, H, Tk, Dv)`` or ``(B, 1, Tk, Dv)``; packed ``(N, Dv)``, ``(N, H, Dv)``. False: no
        output, see `location_attention`.
    v
        ``(A,)``, or ``(H, A)``: what a difference in a feature counts. None: 1. Of a Laplace kernel with the scale b,
        1 / b.
    p
        1 or 2.
    mask, window, score_bias, cu_seqlens_q, cu_seqlens_k, dropout_p, impl
        As in `concat_attention`.
    return_weights, return_log_weights, return_scores, return_lse, return_state
        As in `concat_attention`.

    Returns
    -------
    Tensor, State or tuple
        Output ``(B, Tq, Dv)``, ``(B, H, Tq, Dv)``, packed ``(N, Dv)`` or ``(N, H, Dv)``; weights, log weights
        and scores ``(B, Tq, Tk)`` or ``(B, H, Tq, Tk)``; m, log_l and lse as the output, without Dv.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, a `p` that is neither 1 nor 2, and an `impl` that cannot run here.

    References
    ----------
    Kim et al. 2019, Attentive Neural Processes (p = 1).

    """
    offsets = as_offsets(cu_seqlens_q), as_offsets(cu_seqlens_k)
    structure = (score_bias, mask, *offsets, None)
    rows = query, key, cast("Tensor", value)
    inputs = ConcatInputs(*rows, cast("Tensor", v), *structure, "identity", None, None, dropout_p)
    wanted = check_wanted(return_weights, return_scores, return_lse, return_state, return_log_weights, value=value)
    inputs = check_pairs(_TABLES, inputs, {"v": v}, window, wanted)
    features = check_power("p", p)
    v = query.new_full(query.shape[-1:], -1.0) if v is None else -v
    return attend(inputs._replace(key=-key, v=v, activation=features), wanted, impl)


def check_power(name: str, value: float) -> str:
    """What of a difference is summed, by the name that the kernels use; ValueError unless `value` is 1 or 2."""
    power = check_number(name, value, "1 or 2", 1.0, 3.0)
    if power not in _FEATURES:
        raise ValueError(f"{name}: expected 1 or 2; got {show(value)}")
    return _FEATURES[power]
