"""Expert parallelism for transformers models: torch, no Ray. Works in any torch process that has a group."""

from ray_ep.moe.balance.balancer import Balance, Limits
from ray_ep.moe.balance.router import router_losses, update_bias
from ray_ep.moe.draws import Draws
from ray_ep.moe.exchange.choose import Choice, choose, settle
from ray_ep.moe.exchange.meter import PHASES
from ray_ep.moe.exchange.ways import KINDS
from ray_ep.moe.families.find import find_experts
from ray_ep.moe.migrate import Moved, OwnedState, Rows, apply_placement
from ray_ep.moe.parallelize import ExpertParallel, parallelize
from ray_ep.moe.recorder import Answers, Recorder
from ray_ep.moe.regroup import regroup

__all__ = [
    "KINDS",
    "PHASES",
    "Answers",
    "Balance",
    "Choice",
    "Draws",
    "ExpertParallel",
    "Limits",
    "Moved",
    "OwnedState",
    "Recorder",
    "Rows",
    "apply_placement",
    "choose",
    "find_experts",
    "parallelize",
    "regroup",
    "router_losses",
    "settle",
    "update_bias",
]
