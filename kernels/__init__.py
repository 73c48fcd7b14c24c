"""Fused kernels, each with the same computation in plain torch beside it."""
