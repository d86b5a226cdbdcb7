"""Which losses balance the router, and by how much: what the configuration says, else what the model was trained with.

A function of both configurations alone, so that the driver and every rank answer the same; no tensors here.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from dataclasses import dataclass
from types import ModuleType

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ray_ep.config.schema import Config
from ray_ep.rank.pretrained.hub import directory

SCRATCH = 0.05
"""Weight of the loss a layer where neither the configuration nor the model names one."""

SOURCE = "the default without model.path"
"""Where the coefficient comes from, in words, when nobody names one."""

TRANSFORMERS_KEY = "router_aux_loss_coef"
"""transformers' own name of the coefficient; its loss is over all layers at once."""

BY_LAYER = ("aux_loss_alpha", "moe_aux_loss_coeff", "moe_aux_loss_coef", "aux_loss_coef")
"""Other families' names: a loss a layer that is 1, not K, at perfect balance (DeepSeek-V2, Megatron)."""


@dataclass(frozen=True, slots=True)
class Balancing:
    """Form of the load-balancing loss (`ray_ep.moe.router_losses`), its weight, that of the z-loss; all in words."""

    form: str
    coefficient: float
    z: float
    words: str


def balancing(cfg: Config, config: PreTrainedConfig) -> Balancing:
    """The balancing of a run: each key of the configuration that is set wins, the others are the model's own.

    That is what it was trained with (model.path), or what model.overrides names; else the defaults.
    """
    router, text = cfg.router, config.get_text_config()
    named = any(name in cfg.model.overrides for name in (TRANSFORMERS_KEY, *BY_LAYER))
    form, coefficient, source = _own(config) if cfg.model.path or named else ("layer", SCRATCH, SOURCE)
    source = _where(cfg, config, source) if source in (TRANSFORMERS_KEY, *BY_LAYER) else source
    if router.aux_coefficient is not None:
        coefficient, source = float(router.aux_coefficient), "router.aux_coefficient"
        form = "layer" if form == "off" and coefficient else form
    if router.aux_loss != "auto":
        if form == "off" != router.aux_loss and router.aux_coefficient is None:
            coefficient, source = SCRATCH, "the default where the model names none"
        form, source = router.aux_loss, "router.aux_loss=off" if router.aux_loss == "off" else source
    z, z_source = float(getattr(text, "router_z_loss_coef", None) or 0), "router_z_loss_coef"
    if router.z_coefficient is not None or not cfg.model.path:
        z, z_source = float(router.z_coefficient or 0), "router.z_coefficient"
    coefficient = 0.0 if form == "off" else coefficient
    kind = "auxiliary loss a layer" if form == "layer" else "pooled auxiliary loss"
    words = f"balancing: {f'{kind} x {coefficient:g}' if coefficient else 'no auxiliary loss'} ({source})"
    words += f"; z-loss x {z:g} ({z_source})" if z else ""
    return Balancing(form, coefficient, z, words)


def _own(config: PreTrainedConfig) -> tuple[str, float, str]:
    """Form, weight and name of the loss that a model was trained with, by its transformers config."""
    text = config.get_text_config()
    coefficient = getattr(text, TRANSFORMERS_KEY, None)
    if hasattr(_modeling(config), "load_balancing_loss_func") and coefficient is not None:
        return "transformers", float(coefficient), TRANSFORMERS_KEY
    if _biased(config):
        return "off", 0.0, "balanced by its correction bias"
    if coefficient is not None:
        return "pooled", float(coefficient), TRANSFORMERS_KEY
    for name in BY_LAYER:
        if (coefficient := getattr(text, name, None)) is not None:
            return "layer", float(coefficient) / int(getattr(text, "num_experts_per_tok", None) or 1), name
    return "off", 0.0, "its config names none; router.aux_coefficient gives one"


def _where(cfg: Config, config: PreTrainedConfig, name: str) -> str:
    """Where a coefficient of the model comes from, in words."""
    share = "" if name == TRANSFORMERS_KEY else ", divided by the experts of a token"
    if cfg.model.overrides.get(name) == getattr(config.get_text_config(), name):
        return f"{name} of model.overrides{share}"
    try:
        tree = json.loads((directory(cfg.model.path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = {}
    stated = name in tree or any(isinstance(v, dict) and name in v for v in tree.values())
    return f"{name} of {cfg.model.path}/config.json{share}" if stated else f"{name}, default of {type(config).__name__}"


def _biased(config: PreTrainedConfig) -> bool:
    """Whether its routers choose by a bias that is balanced without a loss."""
    module = _modeling(config)
    return module is not None and bool(re.search("correction_bias|expert_bias", inspect.getsource(module)))


def _modeling(config: PreTrainedConfig) -> ModuleType | None:
    """transformers' module of the model, None if it has none."""
    try:
        return sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    except KeyError:
        return None
