"""What of a configuration must fit together for ranks to join and leave; pure. Imports errors."""

from __future__ import annotations

from typing import Any

from ray_ep.errors import ConfigError


def check_elastic(cfg: Any) -> None:
    """Raise ConfigError for keys (of the whole `Config`) that do not go together."""
    elastic, ranks = cfg.elastic, cfg.cluster.ranks
    if elastic.max_ranks and elastic.min_ranks > elastic.max_ranks:
        raise ConfigError(
            f"elastic.min_ranks={elastic.min_ranks} is more than elastic.max_ranks={elastic.max_ranks}: allowed is up "
            "to it"
        )
    if elastic.min_ranks > ranks:
        raise ConfigError(
            f"elastic.min_ranks={elastic.min_ranks} is more than cluster.ranks={ranks}: a run begins with that many, "
            "so allowed is up to it"
        )
    if elastic.max_ranks and elastic.max_ranks < ranks:
        raise ConfigError(
            f"elastic.max_ranks={elastic.max_ranks} is less than cluster.ranks={ranks}: a run begins with that many, "
            "so allowed is from it on, or 0"
        )
    if not 0 < elastic.efficiency <= 1:
        raise ConfigError(f"elastic.efficiency={elastic.efficiency!r}: must be above 0 and at most 1")
    _check_policy(cfg)


def _check_policy(cfg: Any) -> None:
    """Raise ConfigError for a policy that lacks what it decides by, or that can never be carried out."""
    elastic, ranks = cfg.elastic, cfg.cluster.ranks
    if elastic.policy != "fixed" and not elastic.max_ranks:
        raise ConfigError(
            f"elastic.policy={elastic.policy!r} needs elastic.max_ranks, the most ranks that it may take: give a "
            f"number from cluster.ranks={ranks} on"
        )
    if elastic.policy == "throughput" and not cfg.topology.measure:
        raise ConfigError(
            "elastic.policy='throughput' predicts steps by the measured links: it needs topology.measure=true"
        )
    if cfg.exchange.transport == "deepep":
        for key, wanted in (("policy", elastic.policy != "fixed"), ("evict_stragglers", elastic.evict_stragglers)):
            if wanted:
                raise ConfigError(
                    f"elastic.{key}={elastic[key]}: with exchange.transport=deepep the number of ranks stays as it is"
                )
        if elastic.max_ranks > ranks:
            raise ConfigError(
                f"elastic.max_ranks={elastic.max_ranks}: with exchange.transport=deepep the number of ranks stays as "
                f"it is: allowed are 0 and {ranks}"
            )
