"""Tests. Without a GPU Triton's kernels run in its interpreter, which has to be said before anything imports Triton."""

import os
from contextlib import suppress

with suppress(ImportError, OSError):  # without a torch that can be loaded `make gpu` says so in words
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
