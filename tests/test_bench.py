"""tools/bench.py: the arithmetic in closed form, a run on a few synthetic images, and what it says when it cannot run."""

import builtins
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byolt.configs.schema import ViewConfig
from byolt.model.run import provenance
from byolt.pipelines.backends import make_backend
from byolt.pipelines.loader import CorruptBudgetError, Loader
from byolt.pipelines.sources import open_source
from byolt.pipelines.views import draw
from byolt.tools import bench
from byolt.tools.benchmarks import startup
from byolt.tools.benchmarks import together as bench_together
from byolt.tools.benchmarks.peers import CONFIG, ROOT, check_harness, compare, loader, run_harness
from byolt.tools.benchmarks.stages import OPERATIONS, PARTS, STAGES, Clock, Cost, differences, only
from byolt.tools.benchmarks.together import LONGEST_WAIT, bottleneck, median, stall, wait_until_idle

TINY = ["synthetic:8:40x50", "augment.size=16", "train.batch_size=4", "train.device=cpu", "data.threads=1"]
TINY += ["--batches", "1"]


@pytest.mark.parametrize(
    ("loader", "step", "both", "expected"),
    [(100, 50, 50, 0.0), (100, 50, 45, 0.1), (40, 80, 20, 0.5), (30, 60, 33, -0.1)],
)
def test_stall(loader: float, step: float, both: float, expected: float) -> None:
    speeds = {"loader": loader, "step": step, "both": both}
    costs = {name: Cost(1000 / speed, 0) for name, speed in speeds.items()}
    assert stall(costs) == pytest.approx(expected, abs=1e-12)


def test_parts_are_differences_and_add_up() -> None:
    cumulative = {"a": Cost(2.0, 3.0, 10.0), "b": Cost(2.5, 5.0, 40.0), "c": Cost(2.4, 5.5, 45.0)}
    parts = differences(cumulative)
    assert [part.cpu_ms for part in parts.values()] == [3.0, 2.0, 0.5]
    assert [part.gpu_us for part in parts.values()] == [10.0, 30.0, 5.0]
    assert sum(part.wall_ms for part in parts.values()) == pytest.approx(2.4)
    assert parts["b"].images_per_s == 2000
    assert parts["c"].images_per_s is None  # faster with one more operation: noise


def test_median_is_of_each_number() -> None:
    assert median([Cost(1, 9, 5), Cost(3, 7, 4), Cost(2, 8, 6)]) == Cost(2, 8, 5)
    assert median([Cost(1, 9), Cost(3, 7), Cost(2, 8)]) == Cost(2, 8, None)


def test_clock_counts_cpu_time_and_waiting_apart() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.measure(3):
        time.sleep(0.09)
    with clock.measure(1):
        pass
    cost = clock.cost()
    assert cost.wall_ms >= 90 / 4 and cost.cpu_ms < cost.wall_ms / 2 and cost.gpu_us is None


@pytest.mark.parametrize(("busy", "expected"), [(0.0, 0.1), (0.7, 0.8), (1e9, LONGEST_WAIT)])
def test_waiting_for_idle_threads_ends(busy: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a made-up clock: a thread of the process works for so many seconds."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        assert now < 20

    clock = SimpleNamespace(monotonic=lambda: now, process_time=lambda: min(now, busy), sleep=sleep)
    monkeypatch.setattr(bench_together, "time", clock)
    wait_until_idle()
    assert now == pytest.approx(expected, abs=0.11)


def test_only_switches_off_the_other_operations() -> None:
    view = ViewConfig(blur=1.0, solarize=1.0, jitter=1.0, gray=1.0)
    ids, sides = np.arange(5), np.full(5, 40)
    params = draw(view, 0, 0, ids, 0, sides, sides)
    assert PARTS["solarize"] == OPERATIONS and PARTS["crop + resize"] == ()
    part = only(params, PARTS["blur"])
    assert [bool(getattr(part, name).any()) for name in OPERATIONS] == [True, True, True, False]
    np.testing.assert_array_equal(part.sigma, params.sigma)
    np.testing.assert_array_equal(part.top, params.top)


def test_bottleneck_names_the_slower_and_the_longest_stage() -> None:
    costs = {name: Cost(0.1, 0.1) for name in STAGES} | {"decode": Cost(9.0, 1.2), "blur": Cost(0.1, 3.0)}
    costs |= {"loader": Cost(2.0, 2.0), "step": Cost(10.0, 10.0)}
    said = bottleneck(costs, on_gpu=False)
    assert said.startswith("The step is the bottleneck: 100 images/s; the loader makes 500")
    assert "blur takes 3.00 of its 4.80 CPU ms" in said  # 1.2 + 3.0 + 6 stages of 0.1
    said = bottleneck(costs | {"step": Cost(1.0, 1.0)}, on_gpu=True)
    assert said.startswith(
        "The loader is the bottleneck: 500 images/s; the step takes 1,000. In the loader decode"
    )


@pytest.mark.slow
def test_run_writes_table_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali")
    files = ["--json", str(tmp_path / "b.json"), "--picture", str(tmp_path / "b.png")]
    assert bench.main([*TINY, "--torchvision", *files]) == 0
    shown = capsys.readouterr().out
    assert "bottleneck" in shown and "times the loader's CPU time" in shown
    report = json.loads((tmp_path / "b.json").read_text())
    (result,) = report["results"]
    keys = [bench.JSON_KEYS.get(name, name) for name in STAGES]
    assert list(result["costs"]) == [*keys, "loader", "step", "both", "torchvision"]
    costs = result["costs"]
    assert all(costs[name]["cpu_ms"] > 0 for name in ("read", "draw", "decode", "loader", "step", "both"))
    slower = min(costs[name]["images_per_s"] for name in ("loader", "step"))
    assert result["stall"] == pytest.approx(1 - costs["both"]["images_per_s"] / slower)
    assert result["torchvision_ratio"] == costs["torchvision"]["cpu_ms"] / costs["loader"]["cpu_ms"]
    assert report["config"]["model"]["backbone"] == "resnet8" and report["config"]["train"]["batch_size"] == 4
    assert report["versions"] == provenance.versions() and "core" in report["hardware"]
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.width > 800 and picture.height > 600


def test_without_dali_one_clear_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("nvidia"):
            raise ImportError("No module named 'nvidia'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "byolt.pipelines.dali_backend", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert bench.main(TINY) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench: data.backend=dali needs NVIDIA DALI") and "pip install" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "nowhere"),
        (["--batches", "0"], "--batches"),
        (["--threads", "1", "0"], "--threads"),
        (["augment.sise=32"], "augment.sise"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_named(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench: ") and named in said


def test_too_many_undecodable_images_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spent(*_: object) -> None:
        raise CorruptBudgetError("101 undecodable images")

    monkeypatch.setattr(bench, "measure", spent)
    assert bench.main([*TINY, "data.backend=torch"]) == 2
    assert capsys.readouterr().err == "bench: 101 undecodable images\n"


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupt)
    assert bench.main([*TINY, "data.backend=torch"]) == 130
    assert capsys.readouterr().err == "bench: interrupted; nothing was written\n"


def test_peers_are_compared_with_ours() -> None:
    ours = {"peer": "byolt", "cpu_ms": 1.5, "images_per_s": 800.0}
    slow = {"peer": "slow", "cpu_ms": 12.0, "images_per_s": 100.0}
    broken = {"peer": "broken", "error": "no such package"}
    assert compare([slow, broken, ours]) == [ours | {"ratio": 1.0}, slow | {"ratio": 8.0}, broken]
    with pytest.raises(ValueError, match="could not run our loader: out of luck"):
        compare([{"peer": "byolt", "error": "out of luck"}])


@pytest.mark.slow
def test_startup_and_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "RUNS", 1)
    words = ["synthetic:64:32x32", "eval.path=synthetic:32:32x32", "train.batch_size=8", "train.device=cpu"]
    words += ["model.backbone=auto"]
    words += ["--startup", "--check", "--config", str(ROOT / "configs" / "r8_cifar10.yaml")]
    assert bench.main([*words, "--json", str(tmp_path / "b.json")]) == 0
    report = json.loads((tmp_path / "b.json").read_text())
    assert {*startup.PARTS} < report["startup"].keys()
    assert all(wall >= 0 <= cpu for wall, cpu in report["startup"].values())
    assert report["startup"]["kNN before training"][1] > 0 and report["startup"]["first step"][1] > 0
    assert report["check"]["network"]["cpu_ms"] > 0 and all(x > 0.2 for x in report["ratios"].values())
    assert "command to first step" in capsys.readouterr().out
    assert bench.main(["--startup", *words[1:4], str(tmp_path / "nothing")]) == 2
    assert "train.py ended before its first step: error: " in capsys.readouterr().err


@pytest.mark.slow
def test_harness_runs_our_loader(tmp_path: Path) -> None:
    """The real harness, ours beside the peer that needs no library of its own."""
    for i in range(12):
        Image.effect_noise((40, 30), 5 * i).convert("RGB").save(tmp_path / f"{i}.jpg")
    overrides = [f"data.path={tmp_path}", "augment.size=16", "train.batch_size=4", "data.backend=torch"]
    config = bench.schema.load(ROOT / "configs" / "throughput.yaml", overrides)
    ours, peer = run_harness(["mocov3"], config, workers=1, batches=20, repeats=1)
    assert (ours["peer"], ours["ratio"], peer["peer"]) == ("byolt", 1.0, "mocov3")
    assert ours["images_per_s"] > 0 and peer["ratio"] == peer["cpu_ms"] / ours["cpu_ms"] > 0
    broken = tmp_path / "harness.py"
    broken.write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="ended with 3"):
        run_harness(["mocov3"], config, workers=1, batches=5, repeats=2, harness=broken)


def test_harness_is_given_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours follows all of the run's settings there: profile, views, seed and back end are not the default file's."""
    images, harness, kept = tmp_path / "images", tmp_path / "harness.py", tmp_path / "kept.yaml"
    images.mkdir()
    for i in range(6):
        Image.effect_noise((40, 30), 10 * i).convert("RGB").save(images / f"{i}.jpg")
    harness.write_text(
        "import json, os, shutil, sys\n"
        f"shutil.copy(os.environ[{CONFIG!r}], {str(kept)!r})\n"
        "rows = [{'peer': 'byolt', 'cpu_ms': 1.0, 'images_per_s': 1.0}]\n"
        "json.dump({'peers': rows}, open(sys.argv[sys.argv.index('--out') + 1], 'w'))\n"
    )
    overrides = [f"data.path={images}", "data.backend=torch", "run.seed=3", "train.batch_size=4"]
    overrides += ["augment.size=16", "augment.profile=torchvision", "augment.view1.blur=0.0"]
    config = bench.schema.load(ROOT / "configs" / "throughput.yaml", overrides)
    run_harness(["pil"], config, workers=1, batches=1, repeats=1, harness=harness)
    monkeypatch.setenv(CONFIG, str(kept))
    job = SimpleNamespace(data=str(images), batch_size=4, size=16, workers=1)
    first, second = next(loader(job))
    source, where = open_source(images), (torch.device("cpu"), torch.float32)
    with Loader(config, source, make_backend(config, *where)[0]) as batches:
        (expected,) = next(iter(batches))
    assert torch.equal(first, expected.view1) and torch.equal(second, expected.view2)


def test_missing_harness_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "check_harness", lambda: check_harness(Path("nowhere.py")))
    monkeypatch.setattr(bench, "run", lambda args: pytest.fail("it measured"))
    assert bench.main(["--peers"]) == 2 and "--peers needs nowhere.py" in capsys.readouterr().err


def test_missing_harness_is_named() -> None:
    config = bench.schema.load(ROOT / "configs" / "throughput.yaml")
    with pytest.raises(ValueError, match=r"--peers needs nowhere\.py"):
        run_harness([], config, workers=1, batches=1, repeats=1, harness=Path("nowhere.py"))
