"""How many ranks a run may be asked to have, and the keys that say so. Pure: a function of the configuration."""

from __future__ import annotations

from ray_ep.config.exchange import most_tokens
from ray_ep.config.schema import Config


def fewest_ranks(cfg: Config, experts: int = 0) -> tuple[int, str]:
    """The fewest ranks that a run is asked down to, and the key that says so.

    Args:
        experts: of a layer; 0: not known.
    """
    least, slots, tokens = cfg.elastic.min_ranks, cfg.placement.slots_per_rank, cfg.exchange.tokens
    found = [(least, f"elastic.min_ranks={least}")]
    if slots:
        found.append((-(-experts // slots), f"placement.slots_per_rank={slots}, for {experts} experts"))
    if tokens:
        fits = next(n for n in range(1, cfg.cluster.ranks + 1) if most_tokens(cfg, n) <= tokens)
        found.append((fits, f"exchange.tokens={tokens}"))
    return max(found, key=lambda one: one[0])


def most_ranks(cfg: Config) -> tuple[int, str]:
    """The most ranks that a run grows to, and the key that says so."""
    if cfg.elastic.max_ranks:
        return cfg.elastic.max_ranks, f"elastic.max_ranks={cfg.elastic.max_ranks}"
    return cfg.cluster.ranks, f"elastic.max_ranks=0: as many as cluster.ranks={cfg.cluster.ranks}"


def scale_refusal(cfg: Config, ranks: int, experts: int = 0) -> str:
    """Why a run cannot have so many ranks; "": it can. `experts` as of `fewest_ranks`."""
    (least, because), (most, limit) = fewest_ranks(cfg, experts), most_ranks(cfg)
    if cfg.exchange.transport == "deepep" and ranks != cfg.cluster.ranks:
        return f"{ranks} ranks: with exchange.transport=deepep the number of ranks stays as it is"
    if ranks < least:
        return f"{ranks} ranks are too few: allowed are {least} to {most} ({because})"
    if ranks > most:
        return f"{ranks} ranks are too many: allowed are {least} to {most} ({limit})"
    return ""
