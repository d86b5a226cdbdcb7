"""The CPU's own layer: fused body, compiled kernels, matrix products, memory that is kept."""
