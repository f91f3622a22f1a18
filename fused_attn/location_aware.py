"""One step of location-aware attention: the last weights are part of the next score.

The loop is the user's: a decoder makes a query at a time.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._checks import Checker, argument, check_activation, check_dropout, mask_of
from ._habits import explicit
from ._operators import Operator, exact_of, launcher
from ._ops import Impl, keeps_exact, under_autocast, use_triton
from .kernels.inputs import LocationAwareInputs, LocationInputs

_TABLE = {
    "query": argument("B A", "first"),
    "key": argument("B Tk A"),
    "value": argument("B Tk Dv"),
    "v": argument("A", linear=True),
    "previous": argument("B Tk"),
    "conv_weight": argument("C K", hint="that of a `nn.Conv1d` of one channel without its middle axis"),
    "u": argument("C A", linear=True),
    "mask": mask_of("B Tk"),
    "score_bias": argument("B Tk", "bias", optional=True),
}


def _formula(inputs: LocationAwareInputs) -> tuple[Tensor, Tensor]:
    """A step on canonical arguments, in plain PyTorch: out ``(B, Dv)`` and weights ``(B, Tk)``."""
    query, key, value, v, previous, conv_weight, u, score_bias, mask, seed, activation, dropout_p = inputs
    wide = torch.promote_types(value.dtype, torch.float32)  # before sums of 16 bits overflow
    key, previous, conv_weight, u = (x.to(wide) for x in (key, previous, conv_weight, u))
    if mask is not None:  # what may be NaN, before it meets a number; a key that is hidden meets itself alone
        previous = previous.where(mask, 0)
    # The convolution is a product with the windows of the weights: on a GPU cuDNN's would follow a TF32 setting of
    # its own, which is on by default, and this one follows that of matrix products.
    half = conv_weight.shape[1] // 2
    padded = F.pad(previous, (half, half + 1))  # one more than is used: unfold refuses a signal shorter than a window
    windows = padded.unfold(1, conv_weight.shape[1], 1)[:, : key.shape[1]]
    key = torch.baddbmm(key, windows @ conv_weight.t(), u.expand(key.shape[0], -1, -1))
    score = key, None, None, v[:, None], None, None, query
    options = activation, "sigmoid", dropout_p, False
    pooled = LocationInputs(*score, value, score_bias, mask, None, seed, *options)
    out, weights = reference.location_attention(pooled, weights_only=True)
    return out[:, 0], weights[..., 0].to(value.dtype)


def _fake(inputs: LocationAwareInputs, need_exact: bool) -> tuple[Tensor, ...]:
    value = inputs.value
    rows = value.shape[:2]
    return (
        value.new_empty(value.shape[0], value.shape[2]),
        value.new_empty(rows),
        value.new_empty(rows if need_exact else (0,), dtype=torch.float32),
    )


def _bwd(inputs: LocationAwareInputs, *args: Any) -> list[Tensor | None]:
    _out, weights, exact, dout, dweights, _dexact, _, needs = args
    run = launcher("location_aware_bwd.location_aware_bwd")
    return cast("list[Tensor | None]", run(inputs, exact_of(weights, exact), dout, dweights, needs))


_STEP = Operator(
    "location_aware",
    LocationAwareInputs,
    differentiable="query key value v previous conv_weight u score_bias",
    choices="bool need_exact",
    results="out weights exact?need_exact",
    saved="out weights exact",
    forward=launcher("location_aware.location_aware_fwd"),
    backward=_bwd,
    fake=_fake,
    formula=_formula,
)


@explicit
@under_autocast("query", "key", "value", "v", "previous", "conv_weight", "u")
def location_aware_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    u: Tensor,
    *,
    activation: str = "tanh",
    mask: Tensor | None = None,
    score_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    r"""One step of location-aware attention: the score sees where the last step looked.

    .. math:: f_j = \sum_k F_k \, \alpha^{prev}_{j + k - (K - 1)/2}, \quad s_j = v \cdot act(q + k_j + f_j U), \quad
        \alpha = softmax_j(s), \quad o = \sum_j \alpha_j \, value_j

    A decoder calls this once a word, with the weights that the last call returned; gradients go back through them.
    The kernel makes f and f U in registers, and writes the output and the weights alone. The reference makes f,
    ``(B, Tk, C)``, and the keys of the step, ``(B, Tk, A)``, by a matrix product each. Products of float32 follow
    PyTorch's TF32 setting for matrix products. A bias of the score goes into the query or the keys.

    Parameters
    ----------
    query, key
        Projected to the width A of the score: ``(B, A)`` and ``(B, Tk, A)``. float16, bfloat16, float32; float64 on a
        CPU or by the reference.
    value
        ``(B, Tk, Dv)``.
    v
        ``(A,)``.
    previous
        The last weights, ``(B, Tk)``, or what is made of them, as their sum over all steps; zeros before the first.
    conv_weight
        F, ``(C, K)``, as `torch.nn.Conv1d` has it (a cross-correlation), K odd. Outside of the keys are zeros.
    u
        U, ``(C, A)``.
    activation
        identity, tanh, relu, sigmoid, leaky_relu (slope 0.2), elu, gelu or silu.
    mask
        bool ``(B, Tk)``, True = may be attended. What it hides of keys, values and `previous` may be NaN; the
        convolution takes it as zero.
    score_bias
        ``(B, Tk)``, added to the scores, in the dtype of `query` or float32.
    dropout_p
        Probability that a weight is dropped, 0 <= p < 1; it always applies. See `location_attention`.
    impl
        ``"auto"``: the Triton kernel on a GPU, the reference elsewhere and for float64. ``"triton"`` and
        ``"reference"`` never fall back.

    Returns
    -------
    (Tensor, Tensor)
        Output ``(B, Dv)`` and weights ``(B, Tk)``, as they are before dropout. A sequence without a visible key has
        zeros in both.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit, an even width of `conv_weight`, and an `impl` that cannot run here.

    References
    ----------
    Chorowski et al. 2015, Attention-based models for speech recognition; Shen et al. 2018 (Tacotron 2: the sum of all
    weights so far).

    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor; got {type(query).__name__}")
    _validate(query, key, value, v, previous, conv_weight, u, activation, mask, score_bias, dropout_p)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    tensors = query, key, value, v, previous, conv_weight, u, score_bias
    inputs = LocationAwareInputs(*tensors, mask, seed, activation, float(dropout_p))
    if not use_triton(impl, query.device, "has no float64" if query.dtype == torch.float64 else None):
        return _formula(inputs)
    out, weights, _ = _STEP(inputs, keeps_exact(*tensors))
    return out, weights


def _validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    previous: Tensor,
    conv_weight: Tensor,
    u: Tensor,
    activation: str,
    mask: Tensor | None,
    score_bias: Tensor | None,
    dropout_p: float,
) -> None:
    """Check every argument: `concat_attention` would call some by another shape."""
    check = Checker(_TABLE)
    for name, x in (
        ("query", query),
        ("key", key),
        ("value", value),
        ("v", v),
        ("previous", previous),
        ("conv_weight", conv_weight),
    ):
        check(name, x)
    C, K = conv_weight.shape
    if K % 2 == 0:
        raise ValueError(f"conv_weight: expected shape (C, K) with an odd width K; got {(C, K)}")
    check("u", u)
    check("mask", mask)
    check("score_bias", score_bias)
    check_activation("activation", activation)
    check_dropout("dropout_p", dropout_p)
