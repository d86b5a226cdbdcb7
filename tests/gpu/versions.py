"""Prints what this machine has for GPUs; ends with status 2 and a sentence if no GPU can be used. Needs torch only."""

import importlib
import importlib.metadata
import platform
import sys
import warnings

IMPORTED = ("torch", "triton", "cupy", "deep_ep")  # whether they can be is what is asked
INSTALLED = ("transformers", "ray", "numba", "pytest")


def version(name):
    """Of a package; why not, if it cannot be imported."""
    try:
        if name in INSTALLED:
            return importlib.metadata.version(name)
        return getattr(importlib.import_module(name), "__version__", "there")
    except ImportError:  # a package that was not found is one, too
        return "missing"
    except Exception as e:
        return f"broken ({type(e).__name__}: {str(e)[:80]})"


def cupy_nccl():
    try:
        from cupy.cuda import nccl
    except ImportError as e:
        return f"missing ({str(e)[:80]})"
    return f"{nccl.get_version()} (built with {nccl.get_build_version()})" if nccl.available else "CuPy finds none"


def main(device):
    warnings.simplefilter("ignore")
    print(f"python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {version(name)}" for name in IMPORTED + INSTALLED), flush=True)
    try:
        import torch
    except (ImportError, OSError) as e:
        sys.exit(f"no torch can be used here ({e}): `make setup`, or `make gpu PYTHON=...` of another environment")
    print(f"NCCL of CuPy {cupy_nccl()}")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        why = "was built without CUDA: install torch's build for CUDA (docs/gpu.md)"
        if torch.version.cuda:
            why = f"(for CUDA {torch.version.cuda}) sees none: look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        print(f"no GPU can be used here: torch {torch.__version__} {why}", file=sys.stderr)
        sys.exit(2)
    free, total = (b / 2**30 for b in torch.cuda.mem_get_info())
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    print(f"CUDA {torch.version.cuda}, NCCL of torch {'.'.join(map(str, torch.cuda.nccl.version()))}")
    print(
        f"{torch.cuda.device_count()} GPU(s): {torch.cuda.get_device_name()}, sm {capability}, "
        f"{free:.0f} of {total:.0f} GiB free"
    )


if __name__ == "__main__":
    main(sys.argv[1])
