"""Bad input to attentive statistics pooling: an error that names the argument."""

import pytest
import torch

from fused_attn import statistics_pooling

B, T, D, A, N = 2, 5, 3, 4, 7


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


CU = torch.tensor([0, 3, N], dtype=torch.int32)
JAGGED = torch.nested.nested_tensor_from_jagged(zeros(N, D), CU.long())
PACKED = {"h": zeros(N, D), "cu_seqlens": CU}
EQUAL = {"w": None, "b": None, "v": None}

BAD = [
    ({"h": None}, TypeError, "h: expected a torch.Tensor; got NoneType"),
    ({"h": zeros(T, D)}, ValueError, "h: expected shape (B, T, D); got (5, 3); packed rows go with cu_seqlens"),
    ({"h": zeros(D), **EQUAL}, ValueError, "h: expected shape (B, T, D); got (3,)"),
    ({"h": zeros()}, ValueError, "h: expected shape (B, T, D); got ()"),
    ({"h": zeros(), **EQUAL}, ValueError, "h: expected shape (B, T, D); got ()"),
    (
        {"h": zeros(B, T, D, dtype=torch.int64)},
        TypeError,
        "h: expected dtype float16, bfloat16, float32, float64; got",
    ),
    ({"h": zeros(B, T, 0), "w": zeros(0, A)}, ValueError, "h: expected at least one feature"),
    ({"w": zeros(D + 1, A)}, ValueError, "w: expected shape (D, A)"),
    ({"w": zeros(D)}, ValueError, "w: expected shape (D, A)"),
    ({"w": None}, ValueError, "w: expected a tensor, w and v go together; got None"),
    ({"v": None}, ValueError, "v: expected a tensor, w and v go together; got None"),
    ({"w": None, "v": None}, ValueError, "b: expected None without w"),
    ({**EQUAL, "context": zeros(B, A)}, ValueError, "context: expected None without w"),
    ({"w": zeros(D, A, dtype=torch.float16)}, TypeError, "w: expected dtype float32; got float16"),
    ({"b": zeros(A + 1)}, ValueError, "b: expected shape (A,) with A = 4 from w; got (5,): A is 5"),
    (
        {"v": zeros(A + 1)},
        ValueError,
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 3 from h; got (5,): A is 5",
    ),
    (
        {"v": zeros(A, D + 1)},
        ValueError,
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 3 from h; got (4, 4): C is 4",
    ),
    (
        {"v": zeros(A, D), "values": zeros(B, T, 2)},
        ValueError,
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 2 from values; got (4, 3): C is 3",
    ),
    (
        {"v": zeros(A, 0)},
        ValueError,
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 3 from h; got (4, 0): C is 0",
    ),
    ({"v": 1.0}, TypeError, "v: expected a torch.Tensor; got float"),
    (
        {"context": zeros(B, A + 1)},
        ValueError,
        "context: expected shape (B, A) or (B, T, A) with B = 2 from h, A = 4 from w, T = 5 from h; got (2, 5)",
    ),
    (
        {**PACKED, "context": zeros(3, A)},
        ValueError,
        "context: expected shape (S, A) or (N, A) or (S, 1, A) or (1, N, A) with S = 2 from cu_seqlens, A = 4 from w",
    ),
    (
        {"values": zeros(B, T + 1, D)},
        ValueError,
        "values: expected shape (B, T, C) with B = 2 from h, T = 5 from h; got (2, 6, 3): T is 6",
    ),
    ({"values": zeros(B, T, 0)}, ValueError, "values: expected at least one channel"),
    ({"values": zeros(B, T, D, dtype=torch.float64)}, TypeError, "values: expected dtype float32; got float64"),
    ({"mask": zeros(B, T)}, TypeError, "mask: expected dtype bool; got float32; True = may be attended"),
    (
        {"mask": zeros(B, T + 1, dtype=torch.bool)},
        ValueError,
        "mask: expected shape (B, T) with B = 2 from h, T = 5 from h; got (2, 6): T is 6",
    ),
    ({"h": JAGGED, "mask": zeros(N, dtype=torch.bool)}, ValueError, "mask: expected None with a jagged h"),
    ({"cu_seqlens": CU}, ValueError, "h: expected shape (N, D); got (2, 5, 3)"),
    ({**PACKED, "cu_seqlens": CU.long()}, TypeError, "cu_seqlens: expected dtype int32; got int64"),
    (
        {**PACKED, "cu_seqlens": CU - 1, "impl": "reference"},
        ValueError,
        "cu_seqlens: expected non-decreasing offsets",
    ),
    ({"activation": "softplus"}, ValueError, "activation: expected one of identity, tanh"),
    ({"floor": -1e-6}, ValueError, "floor: expected a finite number of at least 0; got -1e-06"),
    ({"floor": float("nan")}, ValueError, "floor: expected a finite number of at least 0; got nan"),
    ({"floor": float("inf")}, ValueError, "floor: expected a finite number of at least 0; got inf"),
    ({"floor": None}, TypeError, "floor: expected a float; got NoneType"),
    ({"impl": "cuda"}, ValueError, "impl: expected one of auto, triton, reference; got 'cuda'"),
]


@pytest.mark.parametrize(
    ("changed", "error", "text"), BAD, ids=[f"{text[:40]}-{i}" for i, (_, _, text) in enumerate(BAD)]
)
def test_bad_input_raises_an_error_that_names_it(changed, error, text):
    good = {"h": zeros(B, T, D), "w": zeros(D, A), "b": zeros(A), "v": zeros(A)}
    with pytest.raises(error) as raised:
        statistics_pooling(**{**good, **changed})
    assert str(raised.value).startswith(text)


def test_float64_is_an_error_for_the_kernel_only(device):
    double = {"h": zeros(B, T, D).double().to(device), "w": None, "v": None}
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        statistics_pooling(**double, impl="triton")
    assert statistics_pooling(**double)[0].dtype == torch.float64
