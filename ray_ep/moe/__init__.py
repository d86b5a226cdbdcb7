"""Expert parallelism for transformers models: torch, no Ray. Works in any torch process that has a group."""

from ray_ep.moe.balance import router_losses, update_bias
from ray_ep.moe.parallelize import ExpertParallel, find_experts, parallelize

__all__ = ["ExpertParallel", "find_experts", "parallelize", "router_losses", "update_bias"]
