"""Published systems, built from the public modules: `python -m fused_attn.models NAME` trains one.

Each file has one system, and its docstring the formulas. Encoders are PyTorch's. With ``attention=False`` every
softmax is replaced by the uniform distribution over what is visible: the baseline that attention is compared with.
"""

from .acf import ACF, bpr_loss
from .can import CAN
from .crsum import CRSum
from .dadm import DADM
from .dipole import Dipole
from .entailment import Entailment
from .han import HAN
from .mil import GatedMIL
from .positional import PositionalAttention
from .rock import Rock

__all__ = [
    "ACF",
    "CAN",
    "DADM",
    "HAN",
    "CRSum",
    "Dipole",
    "Entailment",
    "GatedMIL",
    "PositionalAttention",
    "Rock",
    "bpr_loss",
]
