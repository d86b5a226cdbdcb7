"""The local experts on CUDA: order of pairs, Triton kernels with their torch paths, grouped products, backward by hand."""
