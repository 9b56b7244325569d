"""Imports run one way. import-linter checks the layers (setup.cfg); this checks who may import which library."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    ROOT / "train.py",
    *(p for d in ("configs", "files", "model", "pipelines", "tools") for p in (ROOT / d).rglob("*.py")),
]
ALLOWED = {
    "nvidia": {"pipelines/dali_backend.py"},
    "torch.distributed": {"model/distributed.py"},
    "pydantic": {"configs/schema.py"},
    "omegaconf": {"configs/schema.py"},
    "webdataset": set(),
    "numba": {f"pipelines/kernels/cpu{part}.py" for part in ("", "_rows")},
    "llvmlite": set(),
    "triton": {
        *(f"pipelines/kernels/gpu{part}.py" for part in ("", "_pixels", "_byol", "_torchvision")),
        *(f"model/kernels/{operation}_triton.py" for operation in ("lars", "norm")),
        "tools/benchmarks/traffic.py",
    },
    "amp_C": {"model/kernels/lars_apex.py"},
    "apex": {"model/kernels/lars_apex.py"},
    "wandb": {"model/run/wandb_log.py"},
    "timm": {"model/timm_networks.py", "tools/exporting/libraries.py"},
    "transformers": {"tools/exporting/libraries.py"},
    "byolt.train": {"tools/ablate.py", "tools/benchmarks/startup.py"},
    "obstore": {"files/storage/store.py"},
    "boto3": {"files/storage/store.py"},
    "ffcv": {"pipelines/convert/ffcv_engine.py", "tools/benchmarks/beton.py"},
}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@functools.cache
def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("library", ALLOWED)
def test_only_its_own_files_import_it(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name == library or name.startswith(library + ".") for name in imported(path))
    }
    assert users <= ALLOWED[library]


def test_ffcv_is_not_imported_with_the_code() -> None:
    """It may not be installed: it is imported inside functions only."""
    for path in FILES:
        statements = [nodes(path)[0]]
        while statements:
            node = statements.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "ffcv"], path
            statements += ast.iter_child_nodes(node)


@pytest.mark.slow
def test_everything_is_imported_without_ffcv() -> None:
    """Where sys.modules holds None, importing it raises, whether it is installed or not."""
    names = [
        "byolt." + p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for p in FILES
        if p.name[0] != "_"
    ]
    check = f"import sys; sys.modules['ffcv'] = None\nfor name in {names}: __import__(name)\n"
    check += "assert 'byolt.pipelines.convert.ffcv_engine' in sys.modules and sys.modules['ffcv'] is None"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_run_imports_neither_torchs_compiler_nor_torchvision(tmp_path: Path) -> None:
    """They take 1.2 CPU s; torchvision's models, torch.optim and several functions of torch import the compiler."""
    settings = ["synthetic:16:16x16", "train.batch_size=8", "train.stop_at_step=1", "train.device=cpu"]
    settings += [
        "augment.size=16",
        "eval.path=null",
        "data.expected_images=null",
        f"run.out={tmp_path / 'run'}",
    ]
    settings[0] = f"data.path={settings[0]}"
    check = "import sys; from byolt.train import main; "
    check += f"assert main(['--config', 'configs/r8_cifar10.yaml', *{settings}]) == 0; "
    check += "assert not sys.modules.keys() & {'torch._dynamo', 'torch._inductor', 'torchvision', 'sympy'}"
    result = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_folder_holds_at_most_twelve_source_files() -> None:
    folders = [path.parent for path in FILES if path.name != "__init__.py"]
    assert max(folders.count(folder) for folder in set(folders)) <= 12


def test_relative_imports_are_not_used() -> None:
    relative = [p for p in FILES for n in nodes(p) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []
