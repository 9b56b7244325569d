"""Weights & Biases: one run over all starts, no secret, and no failure that reaches the training."""

import importlib.util
import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_report import _config

from byolt import train
from byolt.configs import command_line, schema
from byolt.configs.schema import Config
from byolt.model.run import wandb_log
from byolt.model.run.log import MetricLog
from byolt.model.run.wandb_log import WandbLog


class FakeWandb(SimpleNamespace):
    """The package, as far as it is used; it records the calls, and fails at those that `broken` names."""

    def __init__(self, *broken: str, logged_in: bool = True) -> None:
        super().__init__(broken=broken, calls=[], step=0, url="https://wandb.example/1", offline=False)
        self.Settings = dict
        self.setup = lambda settings: None
        self.teardown = lambda: self._call("teardown")
        self.login = lambda prompt, verify: logged_in and not prompt and not verify

    def _call(self, name: str, *given: Any) -> None:
        self.calls.append((name, *given))
        if name in self.broken:
            raise RuntimeError(f"{name}\nfailed")

    def init(self, mode: str = "online", **given: Any) -> "FakeWandb":
        self._call(f"init {mode}", given)
        self.offline = mode == "offline"
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._call("log", step, values)
        self.step = step

    def logged(self) -> list[tuple[int, dict[str, float]]]:
        return [call[1:] for call in self.calls if call[0] == "log"]

    def finish(self, exit_code: int) -> None:
        self._call("finish", exit_code)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    (tmp_path / "run").mkdir()
    settings = _config(tmp_path / "run", tmp_path).model_dump(mode="json")
    settings["run"]["wandb"] = "team/project"
    settings["data"]["path"] = "https://me:hunter2@host/a.tar?signature=swordfish"
    return schema.from_settings(settings)


def write(config: Config, first_step: int, said: list[str], steps: range) -> None:
    """One start of a run: a row for each step, and kNN at the last."""
    with MetricLog(Path(config.run.out), first_step, WandbLog(config, first_step, said.append)) as log:
        for step in steps:
            log.add(step, {"loss": 4.0 - step})
        log.add(step, {"knn_top1": 50.0})
        log.close()


def steps_of(config: Config) -> list[int]:
    lines = Path(config.run.out, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_resumed_run_continues_the_same_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said: list[str] = []
    write(config, 0, said, range(1, 5))  # killed after step 4, with a checkpoint of step 2
    write(config, 2, said, range(3, 7))
    inits = [call[1] for call in fake.calls if call[0] == "init online"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    assert (inits[0]["entity"], inits[0]["project"], inits[0]["name"]) == ("team", "project", "run")
    logged = [(step, *values) for name, step, *values in fake.calls if name == "log"]
    assert [step for step, _ in logged] == [
        1,
        2,
        3,
        4,
        4,
        4,
        5,
        6,
        6,
    ]  # 3 was sent; 4 may be the sum of two rows
    assert logged[-1] == (6, {"knn_top1": 50.0})
    assert [call for call in fake.calls if call[0] == "finish"] == [("finish", 0)] * 2
    assert (
        said[0] == f"wandb: run {inits[0]['id']} of team/project: https://wandb.example/1" and len(said) == 2
    )
    assert "hunter2" not in str(fake.calls) and "swordfish" not in str(fake.calls)
    assert inits[0]["config"]["data"]["path"] == "https://***@host/a.tar?***"
    write(config, 0, said, range(1, 2))  # a new run in the same folder
    assert [call[1]["id"] for call in fake.calls if call[0] == "init online"][-1] != inits[0]["id"]


def test_a_run_that_gets_a_logger_later_sends_its_earlier_rows(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricLog(Path(config.run.out), 0) as log:
        log.add(1, {"loss": 3.0})
        log.add(2, {"loss": 2.0})
    write(config, 1, [], range(2, 3))
    assert fake.logged() == [(1, {"loss": 3.0}), (2, {"loss": 2.0}), (2, {"knn_top1": 50.0})]


@pytest.mark.parametrize(
    "broken", [("log",), ("finish",), ("init online", "init offline"), ("teardown", "init online")]
)
def test_no_failure_reaches_the_training(
    broken: tuple[str, ...], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb(*broken)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said: list[str] = []
    write(config, 0, said, range(1, 4))
    assert steps_of(config) == [1, 2, 3, 3]
    warnings = [line for line in said if "the run continues without it" in line]
    assert len(warnings) == 1 and all("\n" not in line for line in said)
    assert len(fake.logged()) == {"log": 1, "finish": 4}.get(broken[0], 0)


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (FakeWandb("init online"), "warning: wandb: init online failed: the run is recorded offline"),
        (
            FakeWandb(logged_in=False),
            "warning: wandb: nobody is logged in (wandb login): the run is recorded offline",
        ),
    ],
)
def test_without_network_or_login_it_is_recorded_offline(
    fake: FakeWandb, reason: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    said: list[str] = []
    write(config, 0, said, range(1, 3))
    assert said[0] == reason and f"offline; wandb sync {config.run.out}/wandb/offline-run-*-" in said[1]
    assert [step for step, _ in fake.logged()] == [1, 2, 2]


def test_a_run_that_fails_is_marked_as_failed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricLog(Path(config.run.out), 0, WandbLog(config, 0, print))
    with pytest.raises(FloatingPointError), log:
        raise FloatingPointError
    assert fake.calls[-1] == ("finish", 1)


def test_without_the_package_the_run_is_refused_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = SimpleNamespace(origin=None)  # one that wandb left behind
    command_line.check_logger(None)
    words = [
        "train.py",
        "--config",
        "quickstart",
        "data.path=synthetic:99:24x24",
        "eval.path=null",
        "run.wandb=p",
    ]
    monkeypatch.setattr(sys, "argv", [*words, f"run.out={tmp_path}/run"])
    for found in (None, folder):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
            assert train.main() == 2
        error = capsys.readouterr().err
        assert "run.wandb=p needs the package wandb" in error and "pip install -e '.[wandb]'" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["", "a/b/c", "what?", "x" * 129])
def test_a_name_that_is_no_project_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.wandb='.*': must be PROJECT or ENTITY/PROJECT"):
        schema.load("quickstart", [f"run.wandb={name}"])


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_the_package_itself_offline(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in {
        "WANDB_MODE": "offline",
        "HOME": str(tmp_path),
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    try:
        write(config, 0, said, range(1, 3))
        time.sleep(1)  # the folder of each start is named after the second
        write(config, 2, said, range(3, 4))
    finally:
        wandb.teardown()
    identity = json.loads(Path(config.run.out, wandb_log.FILE).read_text())["id"]
    files = sorted(Path(config.run.out, "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) == 2 and len(said) == 2 and not [line for line in said if "warning" in line]
    found = [record for path in files for record in records(path)]
    history = [
        {
            item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in found
        if record.WhichOneof("record_type") == "history"
    ]
    rows = [
        {key: value for key, value in row.items() if key in ("_step", "loss", "knn_top1")} for row in history
    ]
    assert rows == [
        {"_step": 1, "loss": 3.0},
        {"_step": 2, "loss": 2.0, "knn_top1": 50},
        {"_step": 3, "loss": 1.0, "knn_top1": 50},
    ]
    runs = {record.run.run_id: record.run for record in found if record.WhichOneof("record_type") == "run"}
    assert runs.keys() == {identity} and (runs[identity].project, runs[identity].entity) == (
        "project",
        "team",
    )
    assert (
        "https://***@host/a.tar?***" in str(found)
        and "hunter2" not in str(found)
        and "swordfish" not in str(found)
    )
