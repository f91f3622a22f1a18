"""Activations of the score functions, and their derivatives, on float32 tiles.

`FAST` is a constexpr that only the launcher sets: on NVIDIA chips and 16-bit inputs `tanh` and `sigmoid` are
one special-function instruction (`tanh.approx.f32`, relative error 2^-11 at most by the PTX manual, under the
rounding of the inputs). Everywhere else, the interpreter too, they are plain maths that is right to float32.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def is_leaky(act):
    """Whether it is "leaky_relu", or "leaky_relu:0.1" with a slope of its own: see `reference.activate`."""
    return act.partition(":")[0] == "leaky_relu"


@triton.constexpr_function
def leaky_slope(act):
    return float(act.partition(":")[2] or 0.2)


@triton.jit
def tanh(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    # 1 - 2 / (1 + e^2x) cancels near 0, where five terms of the series are exact to float32.
    x2 = x * x
    series = x + x * x2 * (-0.33333333 + x2 * (0.13333333 + x2 * (-0.05396825 + x2 * 0.02186949)))
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
    return tl.where(x2 < 0.0625, series, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return 0.5 * tanh(0.5 * x, FAST) + 0.5
    return tl.sigmoid(x)


@triton.jit
def exp_less_one(x):
    """e^x - 1 of x <= 0, by its series where the difference would cancel: six terms are exact to float32."""
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * (0.008333334 + x * 0.0013888889)))))
    return tl.where(x > -0.25, series, tl.exp(x) - 1.0)


@triton.jit
def log_sigmoid(x):
    """log(1 / (1 + e^-x)) = min(x, 0) - log(1 + e), e = e^-|x|, whose logarithm is 2 atanh(e / (2 + e)).

    By the series of that, which ends at 1/3: a logarithm of 1 + e would have lost what of e is under float32's eps.
    """
    e = tl.exp(-tl.abs(x))
    t = e / (2.0 + e)
    t2 = t * t
    series = 1.0 + t2 * (
        0.33333334 + t2 * (0.2 + t2 * (0.14285715 + t2 * (0.11111111 + t2 * (0.09090909 + t2 / 13))))
    )
    return tl.minimum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - 2.0 * t * series


@triton.jit
def log_sigmoid_grad(y):
    """Derivative of log σ at x, 1 - σ(x), given y = log σ(x)."""
    return -exp_less_one(y)


@triton.jit
def activate(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """act(x), by the name that the public functions use; "abs" and "square" are of distance attention."""
    if ACT == "tanh":
        return tanh(x, FAST)
    elif ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "sigmoid":
        return sigmoid(x, FAST)
    elif is_leaky(ACT):
        return tl.where(x > 0, x, leaky_slope(ACT) * x)
    elif ACT == "elu":
        return tl.where(x > 0, x, exp_less_one(x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "silu":
        return x * sigmoid(x, FAST)
    elif ACT == "abs":
        return tl.abs(x)
    elif ACT == "square":
        return x * x
    else:
        tl.static_assert(ACT == "identity")
        return x


@triton.jit
def activate_grad(x, y, ACT: tl.constexpr, FAST: tl.constexpr):
    """Derivative of act at x, given y = act(x)."""
    if ACT == "tanh":
        return 1.0 - y * y
    elif ACT == "relu":
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == "sigmoid":
        return y * (1.0 - y)
    elif is_leaky(ACT):
        return tl.where(x > 0, 1.0, leaky_slope(ACT))
    elif ACT == "elu":
        return tl.where(x > 0, 1.0, y + 1.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "silu":
        s = sigmoid(x, FAST)
        return s + y * (1.0 - s)
    elif ACT == "abs":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))  # 0 at 0, as PyTorch has it; NaN stays
    elif ACT == "square":
        return 2.0 * x
    else:
        tl.static_assert(ACT == "identity")
        return tl.full(x.shape, 1.0, tl.float32)
