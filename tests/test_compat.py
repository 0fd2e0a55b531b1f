"""Private names of other libraries are used in compat/ alone, and each is still what it was: a library that changes one is named here."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loops import training_epoch_loop
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

import meshformer
from meshformer.compat import torch as compat_torch
from meshformer.compat.lightning import FETCH, disable_signal_handling
from meshformer.compat.transformers import as_stored, draw_parameters

ROOT = Path(meshformer.__file__).parent
OF_MODULES = {"_modules", "_parameters", "_buffers"}  # nn.Module's, whoever else may have such a name
PUBLIC = {"os._exit", "_target_", "_partial_", "_replace", "_fields"}  # documented: the standard library's, a node's in Hydra, a named tuple's
MOST = 15


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Names with an underscore that this project defines itself."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found - OF_MODULES


def uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith(("meshformer", "__future__")):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                if any(map(is_private, name.split("."))):
                    yield node.lineno, name
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if any(map(is_private, alias.name.split("."))))
        elif isinstance(node, ast.Dict):  # settings of a library by name
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str) and is_private(key.value) and key.value not in own:
                    yield node.lineno, key.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr") and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and isinstance(name.value, str) and is_private(name.value) and name.value not in own:
                yield node.lineno, name.value


def private_names(root: Path) -> dict[str, list[str]]:
    """By file: `line name` of each use."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(root.rglob("*.py"))}
    own = own_names(trees)
    found: dict[str, list[str]] = {}
    for path, tree in trees.items():
        for line, name in uses(tree, own):
            if not PUBLIC & {name, name.rpartition(".")[2]}:
                found.setdefault(path.relative_to(root).as_posix(), []).append(f"{line} {name}")
    return found


def test_private_names_are_used_in_one_room() -> None:
    found = private_names(ROOT)
    assert not {file: names for file, names in found.items() if not file.startswith("compat/")}
    names = {name.partition(" ")[2].rpartition(".")[2] for file in found for name in found[file]}
    print(f"{len(names)} private names: {', '.join(sorted(names))}")
    assert 0 < len(names) <= MOST


@pytest.mark.parametrize(
    "line",
    ["import torch\ntorch._foreach_norm([])", "from hydra._internal.hydra import Hydra", "import torch._dynamo",
     "options = {'_micro_pipeline_tp': True}", "def f(x): return x._modules",
     "def f(x): return getattr(x, '_optimizer')", "def f(trainer): trainer._results = 1"],
)  # fmt: skip
def test_a_private_name_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "part.py").write_text(line)
    assert private_names(tmp_path)


def test_strategies_are_asked_by_a_declared_protocol() -> None:
    asked = re.compile(r"(get|has)attr\([\w.]*strategy\b")
    assert asked.search('getattr(self.trainer.strategy, "x", None)')
    assert not [path for path in ROOT.rglob("*.py") if asked.search(path.read_text(encoding="utf-8"))]


def test_private_methods_are_overridden_in_one_room() -> None:
    found: set[str] = set()
    for info in pkgutil.walk_packages([str(ROOT)], "meshformer."):
        if info.name.startswith(("meshformer.bench", "meshformer.__main__", "meshformer.compat")) or "submitit" in info.name:
            continue
        module = importlib.import_module(info.name)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if kind.__module__ != info.name:
                continue
            above = [base for base in kind.__mro__[1:] if not base.__module__.startswith("meshformer") and base is not object]
            found |= {f"{kind.__qualname__}.{name}" for name in vars(kind) if is_private(name) and any(name in vars(base) for base in above)}
    assert not {name for name in found if not name.endswith(("._abc_impl", "._is_protocol", "._backward_cls"))}


# --- each name is still there, and still does what it did


def told(library: str, name: str, doing: str) -> str:
    return f"{library} {importlib.metadata.version(library)} has changed {name}, which compat/ uses {doing}: look there for its reason"


NAMES: list[tuple[str, Any, str, str]] = [
    ("torch", torch, "_foreach_norm", "for the norm of all gradients in one call"),
    ("torch", DeviceMesh, "_flatten", "to name groups of axes"),
    ("torch", ParallelStyle, "_apply", "to define ways to cut a module"),
    ("torch", ColwiseParallel, "_partition_linear_fn", "to cut adapters with their layer"),
    ("torch", RowwiseParallel, "_partition_linear_fn", "to cut adapters with their layer"),
    ("torch", ColwiseParallel, "_prepare_output_fn", "for a head that returns a loss"),
    ("torch", torch, "_subclasses", "for tensors without memory"),
    ("torch", torch.utils, "_python_dispatch", "to see every operation"),
    ("lightning", pl.LightningModule, "_on_before_batch_transfer", "to call transfer hooks for each micro-batch"),
]


@pytest.mark.parametrize(("library", "owner", "name", "doing"), NAMES, ids=[f"{case[0]} {case[2]}" for case in NAMES])
def test_the_name_is_still_there(library: str, owner: Any, name: str, doing: str) -> None:
    assert hasattr(owner, name), told(library, name, doing)


def test_lightning_tells_its_profiler_before_it_fetches_a_batch() -> None:
    source = inspect.getsource(training_epoch_loop)
    doing = told("lightning", "the name of a fetch", "to know where a recorded step begins")
    assert f"[{training_epoch_loop._TrainingEpochLoop.__name__}].train_dataloader_next" == FETCH, doing
    assert 'profiler.start(f"[{self.__class__.__name__}].train_dataloader_next")' in source, doing


def test_the_multi_tensor_norm_does_what_its_name_says() -> None:
    x = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
    assert [n.item() for n in compat_torch.foreach_norm(x, 2, dtype=torch.float32)] == [5.0, 2.0], told("torch", "_foreach_norm", "for norms")


def test_fake_tensors_have_sizes_and_no_values() -> None:
    with compat_torch.fake_tensor_mode():
        x = torch.ones(2**40, 8)
        assert hasattr(x, "fake_mode") and (x + x).untyped_storage().nbytes() == 2**45, told("torch", "_subclasses", "to plan memory")


def test_flex_attention_has_its_operator() -> None:
    assert "score_mod" in inspect.signature(type(compat_torch.flex_operator()).__call__).parameters, told("torch", "flex_attention", "on a CPU")


def test_torch_distributed_has_what_we_import() -> None:
    from meshformer.compat import torch_distributed

    for name in ("all_gather", "all_gather_autograd", "all_to_all_autograd", "wait_tensor"):
        assert callable(getattr(torch_distributed, name)), told("torch", "_functional_collectives", f"for {name}")
    import torch._inductor.config as inductor

    for name in torch_distributed.ASYNC_TENSOR_PARALLEL:
        assert isinstance(getattr(inductor, name), bool), told("torch", name, "for asynchronous tensor parallelism")


def test_lightning_leaves_signals_alone(tmp_path: Path) -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    for owner, name in ((trainer._signal_connector, "register_signal_handlers"), (trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")):
        assert callable(getattr(owner, name, None)), told("lightning", name, "to leave signals to callbacks.Preemption")
    source = inspect.getsource(type(trainer.fit_loop.epoch_loop).advance) + inspect.getsource(pl.Trainer._run)
    for name in ("_broadcast_sigterm_tensor()", "_signal_connector.register_signal_handlers()"):
        assert name in source, told("lightning", name, "to leave signals to callbacks.Preemption")
    disable_signal_handling(trainer)
    assert trainer._signal_connector.register_signal_handlers() is None


def test_transformers_models_draw_one_module_at_a_time() -> None:
    import transformers

    settings = transformers.LlamaConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    net = transformers.AutoModelForCausalLM.from_config(settings)
    before = net.lm_head.weight.clone()
    draw_parameters(net, net.lm_head)
    told = "transformers: PreTrainedModel._init_weights no longer initialises the module that it is given (compat/transformers.py)"
    assert not torch.equal(net.lm_head.weight, before), told


def test_transformers_gives_tensors_the_names_that_folders_store() -> None:
    import transformers

    sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    net = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=4, num_experts=2))
    names = as_stored(net, dict(net.state_dict()))
    said = told("transformers", "core_model_loading.revert_weight_conversion", "to store experts one by one, as every reader of folders expects")
    assert "model.layers.0.mlp.experts.1.gate_proj.weight" in names, said


def test_hydra_has_what_its_commands_are_made_of() -> None:
    from meshformer.command.compose import make_hydra
    from meshformer.compat import hydra

    for name in ("compose_config", "show_cfg", "show_info", "hydra_help", "shell_completion"):
        assert hasattr(make_hydra(), name), told("hydra-core", f"Hydra.{name}", "for the command line")
    assert {action.dest for action in hydra.get_args_parser()._actions} >= {"overrides", "multirun", "cfg"}
