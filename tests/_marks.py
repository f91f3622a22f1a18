"""Tables of one factor that many test files have."""

import pytest
import torch

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
both_forms = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
