"""What of a configuration must fit together for the exchange; pure. Imports errors."""

from __future__ import annotations

from typing import Any

from ray_ep.errors import ConfigError

_MOST_CHUNKS = 32
"""Streams that torch has on a GPU; and each part has exchanges of its own, so many parts only cost time."""
_BETWEEN_GPUS = ("nccl", "torch_nccl", "deepep")
_OF_DEEPEP = {
    "model.dtype": ("bfloat16",),
    "exchange.kind": ("auto", "flat"),
    "exchange.chunks": (1,),
    "exchange.float8": (False,),
    "balance.in_step": ("auto", "off"),
    "snapshot.to_disk": (False,),
}
"""Values that keys may have with exchange.transport=deepep."""


def check_exchange(cfg: Any) -> None:
    """Raise ConfigError for keys (of the whole `Config`) that do not go together."""
    exchange, cluster = cfg.exchange, cfg.cluster
    if exchange.chunks > _MOST_CHUNKS:
        raise ConfigError(f"exchange.chunks={exchange.chunks}: must be from 1 to {_MOST_CHUNKS}")
    if exchange.transport in _BETWEEN_GPUS and cluster.device == "cpu":
        raise ConfigError(
            f"exchange.transport={exchange.transport!r} moves tensors between GPUs; with cluster.device='cpu' allowed "
            "are auto, gloo"
        )
    if exchange.transport == "deepep":
        for key, allowed in _OF_DEEPEP.items():
            section, _, name = key.partition(".")
            value = cfg[section][name]
            if value not in allowed:
                raise ConfigError(
                    f"{key}={value}: with exchange.transport=deepep allowed is {' or '.join(map(str, allowed))}"
                )
    most = most_tokens(cfg, cluster.ranks)
    if exchange.tokens and exchange.tokens < most:
        raise ConfigError(
            f"exchange.tokens={exchange.tokens}: a rank has up to {most} tokens in one pass (batch.sequences, "
            f"batch.length, eval.sequences, exchange.chunks): give at least {most}, or 0"
        )


def settle_exchange(cfg: Any) -> None:
    """Put in place what the exchange leaves no choice of: DeepEP lends no experts, and cannot go on without a rank.

    Its kernels end the process's use of the GPU when a peer does not answer.
    """
    if cfg.exchange.transport == "deepep":
        cfg.balance.in_step, cfg.snapshot.every = "off", 0


def most_tokens(cfg: Any, ranks: int) -> int:
    """Most tokens of a rank in one exchange, of training and evaluation."""
    passes = [cfg.batch.sequences // cfg.batch.accumulation, cfg.eval.sequences if cfg.eval.every else 0]
    tokens = -(-max(passes) // ranks) * cfg.batch.length
    return int(-(-tokens // cfg.exchange.chunks))
