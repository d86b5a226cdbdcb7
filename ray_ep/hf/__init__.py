"""ray_ep's MoE layer from inside transformers: importing this registers it for `DistributedConfig.ep_implementation`.

The layers of a model are in layers.py, experts that move between ranks in moving.py. No Ray, no driver: transformers
loads, shards, trains and saves the model.
"""

from ray_ep.hf.layers import NAME, register
from ray_ep.hf.moving import apply_placement, experts_of

__all__ = ["NAME", "apply_placement", "experts_of", "register"]

register()
