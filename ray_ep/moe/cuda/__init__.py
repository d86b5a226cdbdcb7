"""The local experts on CUDA: order of pairs, Triton kernels and their torch paths, products, backward by hand."""
