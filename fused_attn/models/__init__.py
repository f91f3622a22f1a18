"""Published systems, built from the public modules: `python -m fused_attn.models NAME` trains one.

Each file has one system, and its docstring the formulas. Encoders are PyTorch's. With ``attention=False`` every
softmax is replaced by the uniform distribution over what is visible: the baseline that attention is compared with.
"""

__all__: list[str] = []
