"""One name, byolt, in a checkout, from a wheel and from an sdist; a user's own model.py and tools.py stay theirs."""

import ast
import configparser
import inspect
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import byolt

ROOT = Path(__file__).resolve().parent.parent
SITE = sysconfig.get_paths()["purelib"]
FOLDERS = ("configs", "files", "model", "pipelines", "tools")
CONTRACT = {
    "configs.schema": ["load"],
    "pipelines.order": ["global_batch"],
    "pipelines.views": ["draw"],
    "pipelines.torch_backend": [
        *("resize_bicubic", "brightness", "contrast", "saturation", "hue", "grayscale"),
        *("gaussian_blur", "solarize"),
    ],
    "model.byol": ["regression_loss", "MLP"],
    "model.optim": ["LARS", "ema_update_"],
    "model.schedules": ["learning_rate", "tau"],
}


def isolated(code: str, path: list[Path | str], cwd: Path, *flags: str) -> str:
    """What a fresh Python prints that finds modules in `path` and in the libraries alone.

    -S skips the .pth files, through which an editable install would offer byolt; -I ignores PYTHONPATH.
    """
    start = f"import sys; sys.path[:0] = {[str(p) for p in path]}; sys.path.append({SITE!r})\n"
    command = [sys.executable, "-I", "-S", *flags, "-c", start + code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def console_scripts() -> dict[str, str]:
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    return dict(line.split(" = ") for line in lines if line)


def test_public_names_are_found_when_used() -> None:
    """Importing byolt imports nothing; every public name is where `_MODULES` says; editors see each of them."""
    assert (
        isolated("import byolt; print(*(m for m in sys.modules if m[:6] == 'byolt.'))", [ROOT], ROOT) == "\n"
    )
    assert sorted(byolt.__all__) == byolt.__all__ or set(byolt.__all__) == set(byolt._MODULES)
    assert {name for name in dir(byolt) if name[:2] != "__"} == set(byolt.__all__)
    for name in byolt.__all__:
        assert getattr(byolt, name).__module__ == byolt._MODULES[name] and name in dir(byolt)
    (seen,) = (node for node in ast.parse(inspect.getsource(byolt)).body if isinstance(node, ast.If))
    assert {alias.name for node in seen.body for alias in node.names} == set(byolt.__all__)  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'Loader'"):
        byolt.Loader  # noqa: B018


@pytest.mark.slow
def test_contract_names_with_the_checkout_alone_on_the_path(tmp_path: Path) -> None:
    lines = [f"import {module}" for module in CONTRACT]
    lines += [f"assert callable({module}.{name})" for module, names in CONTRACT.items() for name in names]
    lines += ["print(pipelines.order.global_batch(0, 0, 0, 8, 4).shape)"]
    assert isolated("\n".join(lines), [ROOT], tmp_path) == "(4,)\n"


def write_users_folder(folder: Path) -> None:
    """A user's own modules and packages, each with a name that is also a folder of ours."""
    folder.mkdir()
    for name in ("model", "tools", "train"):
        (folder / f"{name}.py").write_text("MINE = True\n")
    for name in ("configs", "pipelines", "files"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("MINE = True\n")


SIDE_BY_SIDE = """
import configs, files, model, pipelines, tools, train
assert all(module.MINE for module in (configs, files, model, pipelines, tools, train))
import byolt
from byolt import BYOL, open_loader
from byolt.configs import schema
import byolt.tools.make_shards, byolt.train
assert byolt.tools.make_shards is not tools and byolt.train.main and not hasattr(byolt.train, "MINE")
assert BYOL.__module__ == "byolt.model.byol" and sys.modules["model"] is model
print(byolt.__file__)
"""


@pytest.mark.slow
def test_beside_a_users_own_modules(tmp_path: Path) -> None:
    """As an editable install has it: the link to the checkout's byolt, found from another folder."""
    write_users_folder(tmp_path / "mine")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "byolt").symlink_to(ROOT / "byolt")
    found = isolated(SIDE_BY_SIDE, [tmp_path / "mine", tmp_path / "lib"], tmp_path / "mine")
    assert found == f"{tmp_path}/lib/byolt/__init__.py\n"


@pytest.mark.parametrize(("script", "target"), console_scripts().items())
def test_console_scripts_start(script: str, target: str) -> None:
    """Each names a main without required arguments, whose answer becomes the exit code."""
    module, _, function = target.partition(":")
    (main,) = (
        node
        for node in ast.parse(
            (ROOT / f"{module.replace('byolt.', '').replace('.', '/')}.py").read_text()
        ).body
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    assert len(main.args.args) == len(main.args.defaults) and ast.unparse(main.returns or ast.Pass()) == "int"
    assert script == "byolt-" + module.split(".")[-1].replace("_", "-")


def built(kind: str, folder: Path) -> Path:
    """The wheel or sdist of the tracked files, made without the network."""
    source = folder / "source"
    if not source.exists():
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
        for name in names:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                target.symlink_to(os.readlink(ROOT / name))
            elif (ROOT / name).exists():
                target.write_bytes((ROOT / name).read_bytes())
    code = f"from setuptools.build_meta import build_{kind} as build; print(build({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split("\n")[-2]


@pytest.mark.slow
def test_wheel_and_sdist_hold_byolt_alone(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    wheel = zipfile.ZipFile(built("wheel", tmp_path))
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"byolt", "byolt-0.1.0.dist-info"}
    tracked = subprocess.check_output(["git", "ls-files", *FOLDERS], cwd=ROOT, text=True).split()
    modules = set(tracked) - {"tools/install_ffcv.sh"}  # which builds into the checkout
    assert {f"byolt/{name}" for name in modules | {"train.py", "__init__.py"}} == {
        name for name in names if name.startswith("byolt/")
    }
    assert wheel.read("byolt-0.1.0.dist-info/top_level.txt") == b"byolt\n"
    assert any(name.endswith("LICENSE") for name in names)
    with tarfile.open(built("sdist", tmp_path)) as archive:
        inside = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    assert {f"byolt/{name}" for name in modules | {"train.py"}} | {"setup.cfg", "LICENSE"} <= inside

    wheel.extractall(tmp_path / "installed")  # which is what pip does, but for the console scripts
    write_users_folder(tmp_path / "mine")
    found = isolated(SIDE_BY_SIDE, [tmp_path / "mine", tmp_path / "installed"], tmp_path / "mine")
    assert found == f"{tmp_path}/installed/byolt/__init__.py\n"


@pytest.mark.slow
def test_ablate_trains_from_a_wheel(tmp_path: Path) -> None:
    """The installed byolt-ablate starts the installed train.py, from a folder that is not the checkout."""
    zipfile.ZipFile(built("wheel", tmp_path)).extractall(tmp_path / "installed")
    write_users_folder(tmp_path / "mine")
    recipe = tmp_path / "installed/byolt/configs/quickstart.yaml"
    words = ["--config", str(recipe), "--out", "runs", "--only", "baseline", "data.path=synthetic:64:24x24"]
    words += ["eval.path=null", "train.batch_size=8", "train.epochs=1", "optimizer.warmup_epochs=0"]
    words += ["train.stop_at_step=2", "train.device=cpu", "data.backend=torch", "model.projector_hidden=16"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-m", "byolt.tools.ablate", *words]
    done = subprocess.run(command, cwd=tmp_path / "mine", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "mine/runs/baseline-0/encoder.safetensors").is_file()
