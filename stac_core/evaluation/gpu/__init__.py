"""Parts of the GPU benchmark: ceilings, kernels, the whole network."""
