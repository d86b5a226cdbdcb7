"""What the processes of ranks get in their environment: whoever starts them sets it, since it is read at their start.

Imports nothing.
"""

from __future__ import annotations

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc keeps freed memory instead of giving it back and faulting it in again (docs/notes/layer.md)."""

ONE_BY_ONE = {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
"""transformers reads weights when they are needed; else its threads run ahead, and hold what they have read."""
RANK = {**ALLOCATOR, **ONE_BY_ONE, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
"""Of a rank: torch shall report a failed NCCL collective, not end the process."""
