"""README, docs and CONTRIBUTING: links, files, settings, command lines and Python are held to the code."""

import argparse
import configparser
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import byolt
from byolt.configs import schema
from byolt.model.resnet import make_encoder
from byolt.model.run.trained import export_trained
from byolt.tools.make_shards import main as make_shards

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += sorted(ROOT.glob("benchmarks/**/README.md"))
SECTIONS = tuple(schema.Config.model_fields)
FOLDERS = ("benchmarks", "byolt", "configs", "docs", "files", "model", "pipelines", "tests", "tools")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The page's inline code, one line each."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "setup.cfg")
    return found


def commands(page: Path) -> list[str]:
    """Command lines in fenced blocks and in running text, without those that are shortened by an ellipsis."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [
        span for span in spans(page) if span.startswith(("python ", "torchrun --nproc", "make ", "pip "))
    ]
    return [line for line in lines if line.strip() and "..." not in line]


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and len(text.split()) <= 1500
    assert (ROOT / "docs" / "quickstart.png").stat().st_size <= 200_000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if not target.startswith("http")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    for span in spans(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]+", span) and not list(ROOT.glob(span.rstrip("/"))):
            missing.append(span)
        if re.fullmatch(r"byolt-[a-z-]+", span):
            assert f"\n{span} = " in setup()["options.entry_points"]["console_scripts"], span
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_exist(page: Path) -> None:
    """Every section.key in running text, alone or with a value."""
    pattern = rf"({'|'.join(SECTIONS)})((?:\.[a-z_0-9]+)+)(=.*)?"
    for span in itertools.chain.from_iterable(span.split() for span in spans(page)):
        match = re.fullmatch(pattern, span)
        if match and not match[2].endswith((".py", ".beton")):
            at: Any = schema.Config.model_fields[match[1]].annotation
            for key in match[2][1:].split("."):
                assert key in at.model_fields, span
                at = at.model_fields[key].annotation


def test_pages_have_commands_and_python() -> None:
    """The patterns above find what they are to check."""
    assert len(commands(ROOT / "README.md")) > 10 and len(blocks(ROOT / "docs/api.md", "python")) >= 5
    assert "python docs/picture.py runs/quickstart docs/quickstart.png" in commands(ROOT / "README.md")


class Parsed(Exception):
    """Stands for the work that a command would do after its arguments were understood."""


class Command(NamedTuple):
    page: str
    line: str


EVERY = list(dict.fromkeys(Command(name_of(page), line) for page in PAGES for line in commands(page)))


@pytest.mark.parametrize("command", EVERY, ids=lambda command: f"{command.page}: {command.line}")
def test_command_lines_are_understood(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script exists, its own parser takes the arguments, and the schema takes the settings."""
    words = shlex.split(command.line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    program, *rest = words
    program = re.sub(r"^\.?v(env)?/bin/", "", program)  # of an environment that a line before has made
    if program == "." or rest[:2] == ["-m", "venv"]:
        return
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
        assert {word.partition("=")[0] for word in rest if "=" in word} <= set(variables)
        return
    if program == "pip":
        extras = ",".join(re.findall(r"\.\[([a-z0-9,-]+)\]", " ".join(rest))).split(",")
        assert set(filter(None, extras)) <= set(setup()["options.extras_require"])
        assert "byolt" not in rest  # the project does not own that name at any package index
        assert all((ROOT / file).is_file() for option, file in itertools.pairwise(rest) if option == "-r")
        return
    if program == "torchrun":
        while rest[0].startswith("--"):
            del rest[0]
    elif program != "python":
        rest = [program, *rest]
    if rest[0] == "-m":
        rest[:2] = [rest[1].removeprefix("byolt.").replace(".", "/") + ".py"]
    script = ROOT / rest[0]
    assert script.is_file()
    if script.suffix != ".py" or "argparse" not in script.read_text():
        return
    understood: list[argparse.Namespace] = []

    def stop_after(original: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *args: Any) -> None:
            understood.append(original(self, *args))
            raise Parsed

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name)))
    # parse_intermixed_args calls other methods, which stay.
    monkeypatch.setattr(sys, "argv", [str(script), *rest[1:]])
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.chdir(ROOT)
    try:
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as error:  # argparse has said why
        pytest.fail(f"exit code {error.code}")
    (arguments,) = understood
    overrides = [word for words in vars(arguments).values() if isinstance(words, list) for word in words]
    overrides = [word for word in overrides if isinstance(word, str) and word.split(".")[0] in SECTIONS]
    config = getattr(arguments, "config", None)
    if overrides or config:
        schema.load(config or ROOT / "configs" / "throughput.yaml", [w for w in overrides if "=" in w])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: photos, datasets/photos and a trained encoder of the quickstart."""
    folder = tmp_path_factory.mktemp("workplace")
    random = np.random.default_rng(0)
    for i in range(24):
        (folder / "photos" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (100, 120, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"class{i % 2}" / f"{i}.jpg")
    assert make_shards([str(folder / "photos"), str(folder / "datasets" / "photos"), "--workers", "1"]) == 0
    config = schema.load(ROOT / "configs" / "quickstart.yaml")
    torch.manual_seed(0)
    (folder / "runs" / "quickstart").mkdir(parents=True)
    encoder = make_encoder(config.model.backbone, config.model.stem)
    export_trained(folder / "runs" / "quickstart" / "encoder.safetensors", encoder, config, 1250)
    return folder


PYTHON = [(page, number) for page in PAGES for number in range(len(blocks(page, "python")))]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), PYTHON, ids=lambda value: getattr(value, "name", str(value)))
def test_python_runs(page: Path, number: int, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block by itself, as a reader would paste it."""
    monkeypatch.chdir(workplace)
    exec(compile(blocks(page, "python")[number], f"{page.name} {number}", "exec"), {"__name__": "example"})


@pytest.mark.slow
def test_features_of_a_folder_are_those_of_its_images(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page says of shapes, labels and the saved file."""
    monkeypatch.chdir(workplace)
    namespace: dict[str, Any] = {}
    exec(blocks(ROOT / "docs" / "api.md", "python")[0], namespace)
    features, labels = namespace["features"], namespace["labels"]
    assert features.shape == (24, 64) and features.dtype == torch.float32
    assert sorted(labels.tolist()) == [0] * 12 + [1] * 12
    assert np.load("features.npz")["classes"].tolist() == ["class0", "class1"]


def test_repository_files_agree_with_one_another() -> None:
    """The hooks run what make lint runs, the workflow runs .ci/run, versions and license are the package's."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    linters = {
        line.strip().replace("$(BIN)/", "").replace(" --check .", "").removesuffix(" .")
        for line in recipe[1].splitlines()
    }
    assert {hook["entry"].removeprefix(".venv/bin/") for hook in hooks} == linters
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert {"run": ".ci/run"} in steps
    for template in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir():
        assert {"name", "description", "body"} <= yaml.safe_load(template.read_text()).keys()
    citation, package = yaml.safe_load((ROOT / "CITATION.cff").read_text()), setup()["metadata"]
    assert (citation["version"], citation["license"]) == (byolt.__version__, package["license"])
    assert package["version"] == "attr: byolt.__version__"
    assert f"## {byolt.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_no_message_advises_a_package_index() -> None:
    """The project does not own the name byolt there: messages say `pip install -e '.[extra]'`."""
    files = [
        *ROOT.glob("*.py"),
        *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if p.is_file()),
    ]
    wrong = [
        p for p in files if re.search(r"""pip install ["']?byolt\b""", p.read_text()) and p != Path(__file__)
    ]
    assert not wrong


def test_the_pictures_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (60, 30)).save(tmp_path / "views.png")
    rows = ['{"step": 0, "knn_top1": 20.0}', '{"step": 1, "loss": 3.5, "projection_std": 0.1}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(sys, "argv", ["picture.py", str(tmp_path), str(tmp_path / "out.png")])
    runpy.run_path(str(ROOT / "docs" / "picture.py"), run_name="__main__")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width == 1000 and picture.height > 500
