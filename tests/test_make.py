"""make's choice of a torch, with stand-ins for pip, Python and the NVIDIA driver."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIP = """#!/bin/sh
echo "$*" >> pip.log
case "$*" in *--index-url*) [ -e reachable ] || { echo ERROR >&2; exit 1; }; touch cpu;; esac
"""
PYTHON = "#!/bin/sh\n[ -e cpu ] || echo 13.0\n"


@pytest.mark.parametrize(
    ("arguments", "driver", "reachable", "indexed", "said"),
    [
        ([], False, True, True, ""),
        ([], False, False, True, "https://download.pytorch.org/whl/cpu has none for CPUs"),
        ([], True, True, False, ""),
        (["TORCH=cpu", "TORCH_CPU=file:///wheels"], True, True, True, ""),
        (["TORCH=cuda"], False, True, False, ""),
    ],
)
def test_torch_is_the_build_for_cpus_where_there_is_no_gpu(
    arguments: list[str], driver: bool, reachable: bool, indexed: bool, said: str, tmp_path: Path
) -> None:
    for name in ("Makefile", "setup.cfg", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    bin, path = tmp_path / ".venv/bin", tmp_path / "path"
    programs = {bin / "pip": PIP, bin / "python": PYTHON}
    programs[path / "nvidia-smi"] = f"#!/bin/sh\nexit {0 if driver else 9}\n"
    for file, text in programs.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    if reachable:
        (tmp_path / "reachable").touch()
    # Without what an outer make, which runs the tests, passes to inner ones: they would print their folders.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    environment["PATH"] = f"{path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", ".venv/main.done", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / ".venv/main.done").exists(), done.stderr
    calls = (tmp_path / "pip.log").read_text().splitlines()
    assert [("--index-url" in call and "--no-deps" in call) for call in calls] == [True] * indexed + [
        False
    ] * 3
    assert ".[dali-cuda130]" in calls[-1] and calls[-3].endswith("constraints.txt torch torchvision")
    lines = done.stdout.splitlines()
    assert len(lines) == (2 if said else 1) and lines[-1].endswith(said)
    if "TORCH_CPU=file:///wheels" in arguments:
        assert "--index-url file:///wheels torch torchvision" in calls[0]
