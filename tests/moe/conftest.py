"""Models here are tiny: without this their matrices would be too small for oneDNN, their experts for several blocks."""

import pytest

from ray_ep.moe.cpu import fused, gemm


@pytest.fixture(autouse=True)
def _matrices_count_as_large(monkeypatch):
    monkeypatch.setattr(gemm, "_LARGE", 1)
    monkeypatch.setattr(fused, "_ROWS", 12)
