"""Ranks on several machines: network namespaces of this one, joined by a switch that delays, loses and cuts off."""

import ctypes
import fcntl
import heapq
import json
import os
import random
import re
import select
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain, count
from pathlib import Path

import numpy as np
import pytest
from test_faults_ranks import SMOOTH, _list_ids, all_end, become_torchrun
from torch import nn
from whole_runs import Process, Run, write_images

from byolt.model.resnet import ResNet8
from byolt.pipelines.order import global_batch, position

pytestmark = pytest.mark.faults
_TUNSETIFF, _TAP, _CLONE_NEWNET = 0x400454CA, 0x1002, 0x40000000  # linux/if_tun.h, sched.h


def enter(namespace: str) -> None:
    """Moves the calling thread, and threads and processes that it starts later, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def _on(namespace: str, options: list[str], before: Callable[[], None]) -> None:
    enter(namespace)
    become_torchrun(options, before)


class Machines:
    """Network namespaces with addresses 10.77.0.1, .2, ... and a switch between them, which runs in a thread.

    It stands in for tc netem, which many kernels lack.
    """

    def __init__(self, number: int, round_trip: float = 0.0, loss: float = 0.0) -> None:
        self._delay, self._loss = round_trip / 2, loss
        self.cut_off: set[int] = set()
        self.lost = 0  # frames
        self._stop = False
        self._agents: list[Process] = []
        self._holders: list[subprocess.Popen] = []
        self._taps: list[int] = []
        try:
            for place in range(number):
                self._holders.append(
                    subprocess.Popen(["unshare", "-n", "sleep", "600"], stderr=subprocess.DEVNULL)
                )
                self._plug_in(place)
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            pytest.skip(f"network namespaces are not allowed here: {error}")
        self.namespaces = [self._namespace(place) for place in range(number)]
        self._thread = threading.Thread(target=self._switch, daemon=True)
        self._thread.start()

    def _namespace(self, place: int) -> str:
        return f"/proc/{self._holders[place].pid}/ns/net"

    def _plug_in(self, place: int) -> None:
        """Gives a namespace the interface tap0, whose other end is the switch."""
        here = os.readlink("/proc/self/ns/net")
        for _ in range(500):  # until the holder has left our namespace
            if os.readlink(self._namespace(place)) != here or self._holders[place].poll() is not None:
                break
            time.sleep(0.01)
        failed: list[OSError] = []

        def make() -> None:
            try:
                enter(self._namespace(place))
                tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                self._taps.append(tap)
                fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", b"tap0", _TAP))
                for command in (
                    "link set lo up",
                    f"addr add 10.77.0.{place + 1}/24 dev tap0",
                    "link set tap0 up",
                ):
                    subprocess.run(["ip", *command.split()], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                failed.append(OSError(str(error)))

        thread = threading.Thread(target=make)  # a namespace is a thread's
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def _switch(self) -> None:
        chance, numbers = random.Random(0), count()
        waiting: list[tuple[float, int, int, bytes]] = []  # when, number, to, frame
        ports: dict[bytes, int] = {}  # by hardware address
        while not self._stop:
            pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for tap in select.select(self._taps, [], [], pause)[0]:
                frame, here = os.read(tap, 1 << 16), self._taps.index(tap)
                ports[frame[6:12]] = here
                to = [ports[frame[:6]]] if frame[:6] in ports else set(range(len(self._taps))) - {here}
                if chance.random() < self._loss:
                    self.lost += 1
                elif here not in self.cut_off:
                    for port in to:
                        heapq.heappush(waiting, (time.monotonic() + self._delay, next(numbers), port, frame))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, port, frame = heapq.heappop(waiting)
                with suppress(BlockingIOError):  # a full queue loses a frame too
                    if port not in self.cut_off:
                        os.write(self._taps[port], frame)

    def start(
        self, run: Run, place: int, options: list[str], *arguments: str, before: Callable[[], None]
    ) -> Process:
        """Starts torchrun on a machine; the first one keeps the rendezvous.

        Args:
            run: the run that the ranks train.
            place: number of the machine, from 0.
            options: further options of torchrun.
            arguments: of train.py.
            before: called first, to change what the ranks do.
        """
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500"]
        # The machines share a host name. Time-outs as in docs/multi-node.md, but machines are missed after 3 x 2 s.
        meeting += [f"--local-addr=10.77.0.{place + 1}"]
        meeting += [f"--rdzv-conf=is_host={place == 0},last_call_timeout=5,keep_alive_interval=2"]
        agent = run.start(
            *arguments,
            before=partial(_on, self.namespaces[place], [*meeting, *options], before),
            GLOO_SOCKET_IFNAME="tap0",
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            IDS=str(run.folder),
        )
        self._agents.append(agent)
        return agent

    def close(self) -> None:
        for agent in self._agents:  # and their ranks, where a test has failed
            with suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
        self._stop = True
        if hasattr(self, "_thread"):
            self._thread.join()
        for tap in self._taps:
            os.close(tap)
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def __enter__(self) -> "Machines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 64)


@pytest.fixture
def runs(tmp_path: Path, images: Path) -> Iterator[Run]:
    """Runs in folders of their own."""

    def make() -> Iterator[Run]:
        for number in count():
            (folder := tmp_path / str(number)).mkdir()
            yield Run(folder, images)

    return make()


def _only_the_stem() -> None:
    """Cuts the network to one convolution: each batch norm costs up to six reductions a step, each of them 0.3 s here.

    gloo's reduction over 8 ranks takes 14 rounds of about 20 ms; the lost frames add a tenth (measured).
    """

    def make(self: ResNet8, width: int, plain: Callable = ResNet8.__init__) -> None:
        plain(self, width)
        self.layer1 = self.layer2 = self.layer3 = nn.Sequential()
        self.fc = nn.Linear(width, 10)

    ResNet8.__init__ = make  # type: ignore[method-assign,assignment]


def _stem_and_ids() -> None:
    _only_the_stem()
    _list_ids()


def _global_batches(folder: Path, size: int, without: int | None = None) -> list[list[int]]:
    """The sample ids of each step that all ranks, but one, have begun."""
    files = [folder / f"ids-{rank}-of-{size}.jsonl" for rank in range(size) if rank != without]
    parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [list(chain(*step)) for step in zip(*parts, strict=False)]


def test_four_machines_on_a_slow_and_lossy_network_train_as_one(runs: Iterator[Run]) -> None:
    """torchrun on four machines of two ranks, 20 ms and 1 % loss.

    The digest is that of eight ranks on one machine, the losses are those of one process, and the order of the samples is
    the function's.
    """
    one, near, far = next(runs), next(runs), next(runs)
    options = (*SMOOTH, "optimizer.warmup_epochs=0", "train.stop_at_step=2")
    torchrun = ["--nnodes=4", "--nproc-per-node=2"]
    alone = one.start(*options, before=_only_the_stem)
    eight = near.start_ranks(8, *options, before=_only_the_stem)
    with Machines(4, round_trip=0.02, loss=0.01) as machines:
        agents = [machines.start(far, n, torchrun, *options, before=_stem_and_ids) for n in range(4)]
        assert all_end(agents, 120) == [0] * 4, agents[0].text
        assert machines.lost > 10
    assert all_end([alone, *eight]) == [0] * 9, eight[0].text
    assert "8 x cpu" in agents[0].text and agents[0].digest == eight[0].digest
    losses = [np.array([row["loss"] for row in run.rows()]) for run in (one, far)]
    assert len(losses[0]) == 2  # the second one depends on the gradients of the first step
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    expected = [global_batch(0, *position(step, 64, 16), 64, 16).tolist() for step in range(2)]
    assert _global_batches(far.folder, 8) == expected


def test_machine_that_vanishes_is_named_and_torchrun_continues_without_it(runs: Iterator[Run]) -> None:
    """Three machines; the second is cut off; the other two continue with the same batches, as docs/multi-node.md says."""
    run, batch, steps = next(runs), 6, 8
    torchrun = ["--nnodes=2:3", "--max-restarts=1"]
    options = (f"train.batch_size={batch}", f"train.stop_at_step={steps}", "train.timeout_minutes=0.1")
    with Machines(3) as machines:
        agents = [
            machines.start(run, n, torchrun, "--resume", "auto", *options, before=_list_ids) for n in range(3)
        ]
        agents[0].wait_for("^step 3/")
        machines.cut_off.add(1)
        began = time.monotonic()
        for rank in (0, 2):
            agents[rank].wait_for(rf"^error: rank {rank}, step \d+: rank 1 did not reach this step: ")
        assert time.monotonic() - began < 6 + 30
        agents[0].wait_for("steps . to 8 .* 2 x cpu")
        print(f"the others continue after {time.monotonic() - began:.1f} s")
        assert [agents[0].wait(), agents[2].wait()] == [0, 0], agents[0].text
    first, last = re.findall(r"steps (\d+) to 8 of .* (\d) x cpu", agents[0].text)
    assert first == ("0", "3") and last[1] == "2"
    resumed = int(last[0])
    assert 2 <= resumed <= steps - 2
    expected = [global_batch(0, *position(step, 64, batch), 64, batch).tolist() for step in range(steps)]
    assert _global_batches(run.folder, 2) == expected[resumed:]
    begun = _global_batches(run.folder, 3, without=1)[:resumed]
    assert begun == [ids[:2] + ids[4:] for ids in expected[:resumed]]
