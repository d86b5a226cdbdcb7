"""The section `lora` of the schema, and what goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray_ep.config.sections.option import opt
from ray_ep.errors import ConfigError


@dataclass
class LoraConfig:
    """Low-rank adapters beside frozen weights, as PEFT has them (docs/fine-tune.md)."""

    rank: int = opt(0, "rank of the adapters, which alone are trained then; 0: none")
    alpha: float = opt(16.0, "an adapter counts alpha / rank times")
    dropout: float = opt(0.0, "dropout before adapters of modules; adapters of experts have none, as in PEFT")
    targets: list[str] = opt(["q_proj", "k_proj", "v_proj", "o_proj"], "modules with an adapter: ends of their names")
    target_parameters: list[str] = opt(
        ["experts.gate_up_proj", "experts.down_proj"], "weights of experts with an adapter each: ends of their names"
    )


def check_lora(cfg: Any) -> None:
    """Raises ConfigError for settings that do not go together."""
    lora = cfg.lora
    if not lora.rank:
        return
    if not 0 <= lora.dropout < 1 or lora.alpha <= 0:
        raise ConfigError(f"lora.alpha={lora.alpha} must be above 0, lora.dropout={lora.dropout} from 0 up to below 1")
    if not cfg.model.path:
        raise ConfigError("lora.rank: adapters need the weights that they adapt: give model.path")
    if not lora.targets and not lora.target_parameters:
        raise ConfigError("lora.targets and lora.target_parameters are both empty: give what is to have an adapter")
    if lora.dropout and lora.target_parameters:
        raise ConfigError(
            f"lora.dropout={lora.dropout}: PEFT has no dropout for adapters of experts: give lora.dropout=0, or "
            "lora.target_parameters=[]"
        )
    if cfg.optim.freeze:
        raise ConfigError("optim.freeze: with lora.rank all weights but the adapters are frozen: give one of them")
