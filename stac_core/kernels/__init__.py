"""Hand-written kernels, each beside its contract and its PyTorch reference."""
