"""Imports run one way. import-linter checks the layers (setup.cfg); this checks who may import which library."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    ROOT / "train.py",
    *(p for d in ("configs", "model", "pipelines", "tools") for p in (ROOT / d).glob("*.py")),
]
ALLOWED = {
    "nvidia": {"pipelines/dali_backend.py"},
    "torch.distributed": {"model/distributed.py"},
    "pydantic": {"configs/schema.py"},
    "omegaconf": {"configs/schema.py"},
    "webdataset": {"pipelines/sources.py", "tools/make_shards.py"},
    "numba": {"pipelines/kernels.py", "pipelines/kernel_llvm.py", "pipelines/kernel_rows.py"},
    "llvmlite": {"pipelines/kernel_llvm.py"},
    "triton": {f"pipelines/triton_{part}.py" for part in ("kernels", "pixels", "byol", "torchvision")},
    "train": set(),
    "ffcv": {"pipelines/sources.py", "tools/make_shards.py"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
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


def test_relative_imports_are_not_used() -> None:
    relative = [
        p
        for p in FILES
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.ImportFrom) and n.level
    ]
    assert relative == []
