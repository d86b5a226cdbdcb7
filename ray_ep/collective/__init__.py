"""Groups of ranks: one small interface over gloo or NCCL, inside Ray (ray_backend) or under torchrun (from_torch)."""

from ray_ep.collective.epoch_group import EpochGroup
from ray_ep.collective.gloo_group import GlooGroup, from_torch, gloo
from ray_ep.collective.group import Group, SoloGroup
from ray_ep.collective.membership import Membership
from ray_ep.collective.nccl import NcclGroup
from ray_ep.collective.staged import StagedGroup
from ray_ep.collective.torch_group import TorchGroup
from ray_ep.collective.torch_nccl import TorchNcclGroup

__all__ = [
    "EpochGroup",
    "GlooGroup",
    "Group",
    "Membership",
    "NcclGroup",
    "SoloGroup",
    "StagedGroup",
    "TorchGroup",
    "TorchNcclGroup",
    "from_torch",
    "gloo",
]
