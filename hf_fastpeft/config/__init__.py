"""Axolotl-style YAML: a typed schema, its loader, and what each key becomes for TRL, PEFT and Trainer."""

from hf_fastpeft.config.loader import LoadedConfig, load_config, parse_config
from hf_fastpeft.config.method_table import methods_table
from hf_fastpeft.config.schema import DatasetConfig, FastpeftConfig, RunConfig, SoraOptions

__all__ = [
    "DatasetConfig",
    "FastpeftConfig",
    "LoadedConfig",
    "RunConfig",
    "SoraOptions",
    "load_config",
    "methods_table",
    "parse_config",
]
