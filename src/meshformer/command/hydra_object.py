"""Create the Hydra object that composes configurations, by Hydra's public names."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Any, ClassVar

from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from meshformer.config import ConfigError
from meshformer.config.paths import conf_dir

Hydra = Any  # the object that `hydra.initialize` creates; its class has no public name


class UserFolder(SearchPathPlugin):
    """Puts `folder`, the command's --config-dir, in front of Hydra's search path."""

    folder: ClassVar[Path | None] = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.prepend("command-line", f"file://{self.folder}", SearchPathQuery(provider="main", path=None))


def make_hydra(config_dir: str | None = None) -> Hydra:
    """Create a Hydra object that searches the user's own folder first and then conf/."""
    GlobalHydra.instance().clear()
    OmegaConf.register_new_resolver("meshformer.run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("meshformer.suffix", lambda: secrets.token_hex(2), use_cache=True, replace=True)
    UserFolder.folder = None if config_dir is None else Path(config_dir).absolute()
    if UserFolder.folder is not None and not UserFolder.folder.is_dir():
        raise ConfigError("there is no such folder", "--config-dir", config_dir)
    if UserFolder not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(UserFolder)
    initialize_config_dir(str(conf_dir().absolute()), "meshformer", version_base="1.3")
    return GlobalHydra.instance().hydra


def run_name(*, _root_: DictConfig) -> str | None:
    """Return the name of the folder of runs: the experiment's, or that of the data where the command chose data and no experiment."""
    hydra = HydraConfig.get()
    overrides: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)  # an override may hold an interpolation
    typed = {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}
    choice = hydra.runtime.choices.get("experiment")
    if "experiment" in typed or "," in (data := typed.get("data", "shakespeare")) or data == "shakespeare":
        return choice
    settings: Any = OmegaConf.to_container(_root_["data"], resolve=False)
    files = settings.get("files") or settings.get("file") or data
    first = str(files[0] if isinstance(files, list) else files)
    if first == "???" or "$" in first:
        first = data
    return re.sub(r"[^\w.-]+", "_", Path(first).stem).strip("_.") or data
