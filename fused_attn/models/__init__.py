"""Published systems, built from the public modules: `python -m fused_attn.models NAME` trains one.

Each file has one system, and its docstring the formulas. Encoders are PyTorch's. With ``attention=False`` every
softmax is replaced by the uniform distribution over what is visible: the baseline that attention is compared with.

Constructors raise ValueError for a size under 1 and for an option that there is not or that does not go with the
others. Calls raise ValueError or TypeError for shapes, dtypes, lengths and indices that do not fit, and for a tensor
that the constructor was told of and is missing, or the other way round.
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
