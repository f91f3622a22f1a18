"""Short names for the tables of cases."""

import torch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
