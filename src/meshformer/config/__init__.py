"""The typed schema of a configuration, the allow-list and the values of `auto`. Imports neither torch nor Hydra nor its sibling packages."""

from meshformer.config.allow import check_object, check_target
from meshformer.config.errors import ConfigError
from meshformer.config.resolve import resolve
from meshformer.config.schema import Convert, Evaluate, Export, Generate, Root, validate
from meshformer.config.suggest import did_you_mean

__all__ = [
    "ConfigError",
    "Convert",
    "Evaluate",
    "Export",
    "Generate",
    "Root",
    "check_object",
    "check_target",
    "did_you_mean",
    "resolve",
    "validate",
]
