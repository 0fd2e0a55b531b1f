"""What `_target_` in a configuration may name. A configuration can come from a stranger's run folder: only known kinds of things are built.

Two checks: of the name before anything is imported, and (in job/build.py) of the object, since a module also holds what it imported.
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
)
# Functions only where they are components: a function such as `torch.hub.load` or one that writes files must not be callable from YAML.
FUNCTIONS = ("meshformer.model", "meshformer.optim")


def check_target(target: Any, allow: Iterable[str] = (), key: str = "_target_", module: str | None = None) -> None:
    """Raise ConfigError unless `target` is an allowed dotted name. `module`: where it is really defined, when that is known."""
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError("must be the dotted name of a class or function", key, target)
    added = tuple(allow)
    # The definition may sit in a private module (torch.optim._muon), the name in the configuration may not.
    for name, private in ((target, False), (f"{module}.{target.rpartition('.')[2]}" if module else target, True)):
        if not _allowed(name, added, private):
            raise ConfigError(
                "is not on the list of what a configuration may build",
                key,
                target if name == target else f"{target} (defined in {module})",
                fix=f"If you trust it, add allow=[{target.rpartition('.')[0]}] to the command.",
            )


def check_object(found: Any, target: str, allow: Iterable[str] = (), key: str = "_target_") -> None:
    """After import: refuse an object that only passes through the named module (`torch.nn.modules.module.Any`)."""
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
