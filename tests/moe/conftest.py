"""Models here are tiny: without this their matrices would all be too small for oneDNN."""

import pytest

from ray_ep.moe import gemm


@pytest.fixture(autouse=True)
def _matrices_count_as_large(monkeypatch):
    monkeypatch.setattr(gemm, "_LARGE", 1)
