"""Configuration: one schema, YAML files, dotted overrides, and messages that say what is wrong."""

from ray_ep.config.load import check, fields, from_dict, load_config
from ray_ep.config.schema import Config

__all__ = ["Config", "check", "fields", "from_dict", "load_config"]
