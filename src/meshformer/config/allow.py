"""The allow-list of `_target_`: a configuration may come from an untrusted run folder, so only known kinds of classes and functions are built.

`check_target` checks the name before anything is imported; `check_object` (called by job/build.py) checks the imported object, because a module
also exposes the names that it imported itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshformer.config.errors import ConfigError

CLASSES = (
    "torch.optim",
    "torch.nn",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.profilers",
    "torchmetrics",
    "meshformer.model",
    "meshformer.data",
    "meshformer.optim",
    "meshformer.parallel",
    "meshformer.tasks",
    "meshformer.callbacks",
    "meshformer.huggingface.transformers_model",
)
# Functions are allowed only where they are components: YAML must not be able to call `torch.hub.load` or a function that writes files.
FUNCTIONS = ("meshformer.model", "meshformer.optim")


def check_target(target: Any, allow: Iterable[str] = (), key: str = "_target_", module: str | None = None) -> None:
    """Raise ConfigError unless `target` is an allowed dotted name. `module`: the module that defines it, if known."""
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError("must be the dotted name of a class or function", key, target)
    added = tuple(allow)
    # The defining module may be private (torch.optim._muon); the name in the configuration may not.
    for name, private in ((target, False), (f"{module}.{target.rpartition('.')[2]}" if module else target, True)):
        if not _allowed(name, added, private):
            raise ConfigError(
                "is not on the list of what a configuration may build",
                key,
                target if name == target else f"{target} (defined in {module})",
                fix=f"If you trust it, add allow=[{target.rpartition('.')[0]}] to the command.",
            )


def check_object(found: Any, target: str, allow: Iterable[str] = (), key: str = "_target_") -> None:
    """After the import, raise ConfigError for an object that the named module merely imported (`torch.nn.modules.module.Any`)."""
    module = getattr(found, "__module__", None)
    check_target(target, allow, key, module=module if isinstance(module, str) else "builtins")


def _allowed(name: str, added: tuple[str, ...], private: bool) -> bool:
    if any(_below(name, prefix) or name == prefix for prefix in added):
        return True
    last = name.rpartition(".")[2]
    if not private and any(part.startswith("_") for part in name.split(".")):
        return False
    return any(_below(name, prefix) for prefix in (CLASSES if last[:1].isupper() else FUNCTIONS))


def _below(name: str, prefix: str) -> bool:
    return name.startswith(prefix + ".")
