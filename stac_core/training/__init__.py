"""Training of a `CausalVGGT` on synthetic worlds; uses the network, never used by it."""
