"""Bad input of `word_by_word_attention`."""

import pytest
import torch
from _compare import IMPLS

from fused_attn import word_by_word_attention


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def cu(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


B, TY, TH, D, DH, A = 2, 4, 3, 5, 6, 7


GOOD = {
    "premise": zeros(B, TY, D), "hypothesis": zeros(B, TH, DH), "w_y": zeros(D, A), "w_h": zeros(DH, A),
    "w_r": zeros(D, A), "w": zeros(A), "w_t": zeros(D, D),
}  # fmt: skip
PACKED = GOOD | {
    "premise": zeros(9, D), "hypothesis": zeros(8, DH), "cu_seqlens_premise": cu(0, 4, 9),
    "cu_seqlens_hypothesis": cu(0, 0, 8),
}  # fmt: skip
WRONG = [
    ("premise", GOOD, zeros(TY, D), ValueError),
    ("premise", GOOD, zeros(B, TY, 0), ValueError),
    ("premise", GOOD, None, TypeError),
    ("premise", GOOD, zeros(B, TY, D, dtype=torch.int64), TypeError),
    ("premise", PACKED, zeros(B, TY, D), ValueError),
    ("hypothesis", GOOD, zeros(B + 1, TH, DH), ValueError),
    ("hypothesis", GOOD, zeros(B, TH, DH, dtype=torch.float64), TypeError),
    ("hypothesis", PACKED, zeros(B, TH, DH), ValueError),
    ("w_y", GOOD, zeros(D + 1, A), ValueError),
    ("w_y", GOOD, zeros(D, A + 1), ValueError),
    ("w_h", GOOD, zeros(D, A), ValueError),
    ("w_r", GOOD, zeros(A, D), ValueError),
    ("w", GOOD, zeros(A, 1), ValueError),
    ("w", GOOD, zeros(0), ValueError),
    ("w", GOOD, [0.0] * A, TypeError),
    ("w_t", GOOD, zeros(D, A), ValueError),
    ("w_t", GOOD, zeros(D, D, dtype=torch.bfloat16), TypeError),
    ("state", GOOD, zeros(B, A), ValueError),
    ("state", PACKED, zeros(3, D), ValueError),
    ("mask", GOOD, zeros(B, TH, dtype=torch.bool), ValueError),
    ("mask", GOOD, zeros(B, TY), TypeError),
    ("mask", PACKED, zeros(9, dtype=torch.bool), ValueError),
    ("return_weights", PACKED, True, ValueError),
    ("cu_seqlens_premise", PACKED, None, ValueError),
    ("cu_seqlens_premise", PACKED, cu(0, 4, 8), ValueError),
    ("cu_seqlens_premise", PACKED, cu(0, 4, 9, dtype=torch.int64), TypeError),
    ("cu_seqlens_hypothesis", PACKED, None, ValueError),
    ("cu_seqlens_hypothesis", PACKED, cu(0, 8), ValueError),
    ("impl", GOOD, "cuda", ValueError),
]


@pytest.mark.parametrize(("name", "good", "bad", "error"), WRONG)
def test_bad_input_raises_an_error_with_the_name(name, good, bad, error, device):
    moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in {**good, name: bad}.items()}
    if name.startswith("cu_seqlens") and isinstance(bad, torch.Tensor) and device.type == "cuda":
        pytest.skip("wrong offsets stop the program there")
    with pytest.raises(error, match=rf"^{name}: expected .*; got "):
        word_by_word_attention(**moved)


@pytest.mark.parametrize("good", [GOOD, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_good_calls_are_good(impl, good, device):
    moved = {name: x.to(device) for name, x in good.items()}
    assert word_by_word_attention(**moved, impl=impl).shape == (*good["hypothesis"].shape[:-1], D)


def test_float64_is_an_error_for_the_kernel_only(device):
    double = {name: x.to(device).double() for name, x in GOOD.items()}
    with pytest.raises(ValueError, match=r"^impl: 'triton' has no float64"):
        word_by_word_attention(**double, impl="triton")
    assert word_by_word_attention(**double).dtype == torch.float64
