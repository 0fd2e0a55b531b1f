"""Installed from the wheel and used outside the checkout, meshformer finds its `conf/` and trains."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # No PYTHONPATH: the checkout's src must not stand in for what the wheel lacks.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=CHECKOUT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment that has the wheel, and everything but meshformer from this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", binaries / "python", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site = run(binaries / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).stdout.strip()
    # A .pth adds one folder and does not follow the .pth files in it, so an editable meshformer here stays invisible there.
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run(binaries / "python", "-c", "import meshformer; print(meshformer.__file__)", cwd=folder).stdout
    assert where.startswith(str(folder)), f"{where} is not the wheel's copy"
    return binaries


def test_wheel_holds_every_conf_file_and_module_but_the_benchmarks(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    conf = {f"meshformer/conf/{path.relative_to(CHECKOUT / 'conf').as_posix()}" for path in (CHECKOUT / "conf").rglob("*.yaml")}
    code = {path.relative_to(CHECKOUT / "src").as_posix() for path in (CHECKOUT / "src" / "meshformer").rglob("*.py")}
    assert conf and code
    benchmarks = {name for name in code if name.startswith("meshformer/bench/")}
    assert benchmarks and not benchmarks & inside
    assert conf | code - benchmarks <= inside, sorted((conf | code - benchmarks) - inside)


def test_wheel_says_that_the_package_is_typed(wheel):
    assert "meshformer/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_installed_command_composes_outside_the_checkout(installed, tmp_path):
    shown = run(installed / "meshformer", "train", "--cfg", "job", cwd=tmp_path).stdout
    assert "\ntrainer:" in f"\n{shown}" and "max_steps:" in shown


def test_installed_command_trains_outside_the_checkout(installed, tmp_path):
    text = tmp_path / "fables.txt"
    text.write_text("".join(f"Fable {n}: the fox and the {n % 7} grapes, told once more.\n" for n in range(600)))
    run(
        installed / "meshformer",
        "train",
        "trainer.max_steps=2",
        "trainer.devices=1",
        "data=text",
        f"data.files=[{text}]",
        "model=nano",
        "data.batch_size=4",
        "data.context_length=16",
        f"paths.data={tmp_path / 'cache'}",
        f"paths.runs={tmp_path / 'runs'}",
        cwd=tmp_path,
    )
    (record,) = (tmp_path / "runs").rglob("run.json")
    assert json.loads(record.read_text())["state"] == "finished"
    assert (record.parent / "config.yaml").is_file()
