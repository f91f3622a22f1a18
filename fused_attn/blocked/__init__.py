"""The PyTorch paths in blocks, for CPUs."""
