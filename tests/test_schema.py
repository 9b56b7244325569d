"""Every shipped config loads; every mistake is named, all in one message."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from byolt.configs import schema
from byolt.configs.schema import Config, from_yaml, load

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
MINIMAL = """
run: {out: runs/x}
data: {path: images}
augment: {view1: {blur: 1.0, solarize: 0.0}, view2: {blur: 0.1, solarize: 0.2}}
model: {}
optimizer: {base_lr: 0.2, weight_decay: 0.0, base_tau: 0.99}
train: {epochs: 100, batch_size: 64}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_all_configs_are_there() -> None:
    names = {"r50_1000ep", "r50_300ep", "r50_100ep", "r18_cifar10", "r8_cifar10", "quickstart", "throughput"}
    names |= {"r18_stl10", "r18_imagenet100", "r50_imagenet100"}
    names.add("own_images")
    assert {path.stem for path in CONFIGS} == names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = tmp_path / "again.yaml"
    again.write_text(schema.to_yaml(config))
    assert load(again) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_opens_with_its_command(path: Path) -> None:
    head = path.read_text().split("\n\n")[0] + path.read_text().split("\n\nrun:")[0]
    assert head.startswith("#") and f"--config configs/{path.name}" in head


@pytest.mark.parametrize(
    ("name", "peak", "decay", "tau", "steps"),
    [
        ("r50_1000ep", 3.2, 1.5e-6, 0.996, 312784),
        ("r50_300ep", 4.8, 1e-6, 0.99, 93835),
        ("r50_100ep", 7.2, 1e-6, 0.99, 31278),
    ],
)
def test_presets_are_the_references(name: str, peak: float, decay: float, tau: float, steps: int) -> None:
    config = load(ROOT / "configs" / f"{name}.yaml")
    assert config.peak_lr == pytest.approx(peak)
    assert (config.optimizer.weight_decay, config.optimizer.base_tau) == (decay, tau)
    assert config.total_steps(1_281_167) == steps
    assert config.warmup_steps(1_281_167) == 3127
    assert config.augment.blur_taps == 23
    view1, view2 = config.augment.view1, config.augment.view2
    assert (view1.blur, view1.solarize, view2.blur, view2.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert view1.model_copy(update={"blur": 0.1, "solarize": 0.2}) == view2


def test_blur_taps_follow_the_size(minimal: Path) -> None:
    assert load(minimal, ["augment.size=32"]).augment.blur_taps == 3
    assert load(minimal, ["augment.size=96"]).augment.blur_taps == 9


def test_overrides_win(minimal: Path) -> None:
    config = load(minimal, ["train.batch_size=128", "augment.view2.blur=0.5", "eval.path=val"])
    assert (config.train.batch_size, config.augment.view2.blur, config.eval.path) == (128, 0.5, "val")
    assert config.augment.view2.solarize == 0.2


@pytest.mark.parametrize("key", ["data.path", "eval.path", "run.out"])
@pytest.mark.parametrize(
    "value",
    [
        "/d/set #2",
        "2024",
        "yes",
        "1e3",
        "a: b",
        "[a",
        "{a: b}",
        "'a'",
        '"a b"',
        " a ",
        "a=b",
        "#",
        "- a",
        "!x",
        "a\nb",
    ],
)
def test_a_path_is_what_follows_the_equals_sign(minimal: Path, key: str, value: str) -> None:
    config = load(minimal, [f"{key}={value}"])
    assert [config.data.path, config.eval.path, config.run.out][["d", "e", "r"].index(key[0])] == value
    assert from_yaml(schema.to_yaml(config)) == config  # as an exported encoder holds it


def test_null_is_a_name_unless_the_path_may_be_missing(minimal: Path) -> None:
    config = load(minimal, ["data.path=null", "run.out=null", "eval.path=null"])
    assert (config.data.path, config.run.out, config.eval.path) == ("null", "null", None)
    with pytest.raises(ValueError, match=r"override run\.out=: a path cannot be empty"):
        load(minimal, ["run.out="])


def test_a_mapping_merges_into_a_view(minimal: Path) -> None:
    view = load(minimal, ["augment.view1={blur: 0.5, crop_area: [0.2, 1]}"]).augment.view1
    assert (view.blur, view.crop_area, view.solarize, view.jitter) == (0.5, (0.2, 1.0), 0.0, 0.8)
    numbers = load(minimal, ["train.epochs=1e3", "model.predictor=no", "train.stop_at_step=null"])
    assert (numbers.train.epochs, numbers.model.predictor, numbers.train.stop_at_step) == (1000, False, None)


def test_home_and_environment_in_paths(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SETS", "/d/2024 #1")
    config = load(minimal, ["run.out=~/x", "data.path=~/a.beton, ~/b~.beton", "eval.path=${oc.env:SETS}/val"])
    assert config.run.out == "/home/me/x"
    assert config.data.path == "/home/me/a.beton, /home/me/b~.beton"
    assert config.eval.path == "/d/2024 #1/val"
    with pytest.raises(ValueError, match="Environment variable 'NOWHERE' not found"):
        load(minimal, ["run.out=${oc.env:NOWHERE}"])


def test_three_mistakes_make_one_message(minimal: Path) -> None:
    minimal.write_text(
        MINIMAL.replace("path: images", "path: images, thraeds: 3")
        .replace("blur: 0.1", "blur: plenty")
        .replace("base_tau: 0.99", "base_tau: 1.5")
    )
    with pytest.raises(ValueError, match="3 mistakes") as caught:
        load(minimal)
    message = str(caught.value)
    assert "data.thraeds: no such setting; did you mean data.threads?" in message
    assert "augment.view2.blur='plenty'" in message
    assert "optimizer.base_tau=1.5 must be at most 1" in message


@pytest.mark.parametrize(
    ("written", "meant"), [("datapath", "data.path"), ("base_lr", "optimizer.base_lr"), ("dta", "data")]
)
def test_a_key_without_its_section_is_recognized(written: str, meant: str, minimal: Path) -> None:
    with pytest.raises(ValueError, match=rf"{written}: no such setting; did you mean {meant}\?"):
        load(minimal, [f"{written}=1"])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.batch_size", "written section.key=value"),
        ("--resume", "written section.key=value"),
        ("train.batch_size=63", "not divisible by train.accumulation=2"),
        ("optimizer.warmup_epochs=100", "leaves nothing"),
        ("augment.view1.crop_area=[0.9,0.1]", "lower bound"),
        ("augment.view1.crop_area=[0,1]", "crop_area.0=0 must be above 0"),
        ("augment.size=4", "augment.size=4 must be at least 8"),
        ("data.threads=many", "data.threads='many' must be a whole number"),
        ("data.threads=1.5", "data.threads=1.5 must be a whole number"),
        ("train.epochs=", "train.epochs=null must be a number"),
        ("train.epochs=0", "train.epochs=0 must be above 0$"),
        ("train.epochs=1e7", "train.epochs=10000000.0 must be at most 1000000$"),
        ("train.epochs=.inf", "train.epochs=inf must be "),
        ("train.compile=maybe", "train.compile='maybe' must be true or false"),
        ("data={path: }", "data.path=null must be a path"),
        ("augment.mean=1", "augment.mean=1 must be a list"),
        ("augment.mean=[1, 2, 3, 4]", "must have 3 numbers"),
        ("augment.view1=5", "augment.view1=5 must be a mapping of settings"),
        ("train.batchsize=64", "train.batchsize: no such setting; did you mean train.batch_size?"),
        ("augment.profile=moco", "augment.profile='moco' must be 'byol' or 'torchvision'"),
        ("model.backbone=resnet49", "resnet50"),
        (
            "data={path: images, backend: torch, resident: always}",
            "data.resident=always: data.backend=torch keeps no images in memory: set data.backend=auto",
        ),
        ("nothing.here=1", "nothing: no such setting"),
    ],
)
def test_mistake_is_named(minimal: Path, override: str, part: str) -> None:
    with pytest.raises(ValueError, match=re.sub(r"([.?[])", r"\\\1", part)):
        load(minimal, ["train.accumulation=2", override])


def test_missing_setting_and_missing_file(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("base_lr: 0.2, ", ""))
    with pytest.raises(ValueError, match=r"optimizer\.base_lr: missing"):
        load(minimal)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("r50_100epo", "r50_100ep"),
        ("quickstart.yaml", "quickstart"),
        ("nowhere/quickstart.yml", "quickstart"),
        ("recipes/mimimal.yaml", "recipes/minimal.yaml"),
        ("recipes/r50_100.yaml", "recipes/r50_100ep.yaml"),
    ],
)
def test_nearest_config_is_suggested(
    written: str, meant: str, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(minimal.parent)
    Path("recipes").mkdir()
    for name in ("minimal", "r50_100ep"):
        Path(f"recipes/{name}.yaml").touch()
    with pytest.raises(ValueError, match=rf"{written} does not exist; did you mean {meant}\?$"):
        load(written)


def test_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("quickstart") == load(ROOT / "configs" / "quickstart.yaml")
    Path("quickstart").mkdir()
    assert load("quickstart") == load(ROOT / "configs" / "quickstart.yaml")


def test_mistakes_are_attributed_to_file_or_overrides(minimal: Path) -> None:
    def origin(*overrides: str) -> str:
        with pytest.raises(ValueError, match="mistake") as caught:
            load(minimal, [*overrides])
        return str(caught.value).partition(": ")[0].replace(str(minimal), "FILE")

    assert origin("nothing.here=1") == origin("train.epochs=0", "run.seed=1") == "overrides of FILE"
    assert origin("train.batch_size=63", "train.accumulation=2") == "FILE and its overrides"
    minimal.write_text(MINIMAL.replace("epochs: 100", "epochs: many"))
    assert origin() == origin("run.seed=1") == "FILE"
    assert origin("run.seed=x") == "FILE and its overrides"


@pytest.mark.parametrize("text", ["", "- 1\n- 2\n", "run: [", "just words", "run: {out: ${nowhere}}"])
def test_file_that_is_no_config(minimal: Path, text: str) -> None:
    minimal.write_text(text)
    with pytest.raises(ValueError, match=r"minimal\.yaml"):
        load(minimal)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("3", "not a valid YAML mapping"),
        ("[1, 2]", "the file must be a mapping of settings"),
        ("[" * 20_000, "more than 200 lists"),
        ("- " * 30_000, "more than 200 lists"),  # libyaml's stack overflowed
        ("a: &a [1]\nb: [*a, *a]", r"aliases \(\*name\)"),
        ("x" * 70_000, "70,000 characters"),
        ("run: {out: here}", "data: missing, and it has no default"),
    ],
)
def test_hostile_settings_are_one_line(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=part) as caught:
        from_yaml(text)
    assert "\n" not in str(caught.value)


def test_config_is_frozen(minimal: Path) -> None:
    config = load(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 2  # type: ignore[misc]


@pytest.mark.parametrize(("world", "accumulation", "images"), [(1, 1, 64), (2, 1, 32), (4, 2, 8)])
def test_images_per_rank(minimal: Path, world: int, accumulation: int, images: int) -> None:
    assert load(minimal, [f"train.accumulation={accumulation}"]).images_per_rank(world) == images


def test_batch_that_does_not_divide(minimal: Path) -> None:
    with pytest.raises(ValueError, match=r"not divisible by 3 ranks .* example 63, or start 2 or 4 ranks$"):
        load(minimal).images_per_rank(3)
    with pytest.raises(ValueError, match=r"needs at least 2: raise it, or start 32 ranks$"):
        load(minimal).images_per_rank(64)


def test_ranks_wait_longer_than_requests_are_repeated(minimal: Path) -> None:
    url = "data.path=https://example.org/train"
    load(minimal, [url]).check_ranks(2)
    late = [url, "train.timeout_minutes=8"]
    load(minimal, late).check_ranks(1)
    load(minimal, late[1:]).check_ranks(2)
    with pytest.raises(
        ValueError, match=r"data\.remote_minutes=8 must be below train\.timeout_minutes=8: 2 ranks"
    ):
        load(minimal, late).check_ranks(2)


def test_several_ranks_do_not_compile(minimal: Path) -> None:
    load(minimal, ["train.compile=true"]).check_ranks(1)
    load(minimal).check_ranks(2)
    with pytest.raises(ValueError, match=r"train\.compile=true .* 2 ranks.*Set train\.compile=false"):
        load(minimal, ["train.compile=true"]).check_ranks(2)
    with pytest.raises(ValueError, match="not divisible by 3 ranks"):
        load(minimal).check_ranks(3)


def test_every_setting_is_documented() -> None:
    undocumented = [
        f"{name}.{key}"
        for name, section in Config.model_fields.items()
        if hasattr(section.annotation, "model_fields")
        for key, field in section.annotation.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


def test_wrong_config_is_refused_before_torch_is_imported(minimal: Path) -> None:
    """Exit code 2, one message, no traceback; torch made unimportable shows that nobody asked for it."""
    minimal.write_text(MINIMAL.replace("epochs: 100", "epoch: 100"))
    (minimal.parent / "torch.py").write_text("raise RuntimeError('torch was imported')")
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", str(minimal)],
        env={**os.environ, "PYTHONPATH": f"{minimal.parent}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "train.epoch: no such setting; did you mean train.epochs?" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start < 30  # it takes half a second; the bound detects a hang


@pytest.mark.parametrize("text", ["[" * 100_000, "a: " + "{a: " * 500 + "1" + "}" * 500, "- " * 100_000])
def test_deeply_nested_yaml_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    """libyaml parses by recursion: 100,000 levels ended the process by SIGSEGV."""
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"deep\.yaml .* more than 200 lists and mappings$"):
        load(tmp_path / "deep.yaml")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("augment.mean=" + "[" * 100_000, "more than 200 lists and mappings"),
        ("augment.mean=" + "[" * 190 + "]" * 190, "it is nested too deeply"),
        ("a." * 3000 + "b=1", "it is nested too deeply"),
        ("run.out=" + "[" * 100_000, None),  # a path is not YAML
    ],
)
def test_deeply_nested_override_is_refused_in_one_line(
    override: str, reason: str | None, minimal: Path
) -> None:
    if reason is None:
        assert load(minimal, [override]).run.out == override.partition("=")[2]
        return
    with pytest.raises(ValueError, match=f"^override {override[:9]}.*{reason}$") as caught:
        load(minimal, [override])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [10**12 * 2, 2**63, 10**400, -(2**63)])
def test_every_whole_number_has_both_bounds(value: int, minimal: Path) -> None:
    """A width of 10**12 was a traceback, of 2**63 C++ frames."""
    keys = [
        f"{section}.{name}"
        for section, model in Config.model_fields.items()
        for name, field in model.annotation.model_fields.items()  # type: ignore[union-attr]
        if "int" in str(field.annotation)
    ]
    assert {"model.projector_hidden", "train.stop_at_step", "run.seed"} < set(keys)
    keys = [key for key in keys if key != "run.seed" or not 0 <= value < 2**63]
    with pytest.raises(ValueError, match=f": {len(keys)} mistakes") as caught:
        load(minimal, [f"{key}={value}" for key in keys])
    for key, line in zip(sorted(keys), sorted(str(caught.value).splitlines()[1:]), strict=True):
        assert re.match(f"  {key}=-?[0-9]+ must be (at least|at most|above|below) ", line)


@pytest.mark.parametrize("value", [1e308, 1e7, -1e308])
def test_every_real_number_has_both_bounds(value: float, minimal: Path) -> None:
    def reals(model: Any, prefix: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                yield from reals(field.annotation, f"{prefix}{name}.")
            elif "float" in str(field.annotation):
                numbers = re.match(r"tuple\[(.*)\]", str(field.annotation))
                yield f"{prefix}{name}" + (f":{numbers[1].count('float')}" if numbers else "")

    keys = list(reals(Config, ""))
    assert {"optimizer.base_lr", "augment.view2.hue", "augment.std:3", "augment.view1.blur_sigma:2"} < set(
        keys
    )
    overrides = [f"{key}={value}" for key in keys if ":" not in key]
    overrides += [
        f"{k}=[{', '.join([str(value)] * int(n))}]" for k, n in (key.split(":") for key in keys if ":" in key)
    ]
    with pytest.raises(ValueError, match=" mistakes") as caught:
        load(minimal, overrides)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == sum(int(key.partition(":")[2] or 1) for key in keys)
    for line in lines:
        assert re.search(r"=-?[0-9.e+]+ must be (at least|at most|above|below) ", line), line


@pytest.mark.parametrize(("ranks", "threads"), [(None, 12), ("4", 3), ("16", 1)])
def test_threads_are_the_cores_of_a_rank(
    ranks: str | None, threads: int, minimal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert load(minimal).data.threads == threads
    assert load(minimal, ["data.threads=5"]).data.threads == 5
