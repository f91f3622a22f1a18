"""Triton kernels, one file a family. They know tensors and sizes only, and never import `fused_attn`."""
