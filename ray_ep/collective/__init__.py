"""Groups of ranks: one small interface over gloo, inside Ray (ray_backend) or under torchrun (from_torch)."""

from ray_ep.collective.group import Group, SoloGroup, TorchGroup, from_torch, gloo

__all__ = ["Group", "SoloGroup", "TorchGroup", "from_torch", "gloo"]
