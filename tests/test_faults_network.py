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
from test_faults_ranks import SMOOTH, _list_ids, all_end
from whole_runs import Process, Run, write_images

from byolt.pipelines.order import global_batch, position

pytestmark = pytest.mark.faults
_TUNSETIFF, _TAP, _CLONE_NEWNET = 0x400454CA, 0x1002, 0x40000000  # linux/if_tun.h, sched.h


def enter(namespace: str) -> None:
    """Moves the calling thread, and threads and processes that it starts later, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def _on(namespace: str, before: Callable[[], None] | None) -> None:
    enter(namespace)
    if before:
        before()


class Machines:
    """Network namespaces with addresses 10.77.0.1, .2, ... and a switch between them, which runs in a thread.

    It stands in for tc netem, which many kernels lack.
    """

    def __init__(self, number: int, round_trip: float = 0.0, loss: float = 0.0) -> None:
        self._delay, self._loss = round_trip / 2, loss
        self.cut_off: set[int] = set()
        self.lost = 0  # frames
        self._stop = False
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
                frame, here = os.read(tap, 2048), self._taps.index(tap)
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
        self,
        run: Run,
        places: list[int],
        *arguments: str,
        before: Callable[[], None] | None = None,
        **more: str,
    ) -> list[Process]:
        """Starts a rank in the namespace of each of these places, with the variables that torchrun would set."""
        common = {
            "WORLD_SIZE": str(len(places)),
            "MASTER_ADDR": f"10.77.0.{places[0] + 1}",
            "MASTER_PORT": "29500",
        }
        common["GLOO_SOCKET_IFNAME"] = "tap0"
        return [
            run.start(
                *arguments,
                before=partial(_on, self.namespaces[place], before),
                **common,
                RANK=str(rank),
                LOCAL_RANK=str(places[:rank].count(place)),
                LOCAL_WORLD_SIZE=str(places.count(place)),
                **more,
            )
            for rank, place in enumerate(places)
        ]

    def close(self) -> None:
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


def test_a_slow_and_lossy_network_changes_no_bit(runs: Iterator[Run]) -> None:
    """Two machines with a rank each, 20 ms and 1 % loss, against two ranks of one machine."""
    options = ("train.stop_at_step=2",)
    near, far = next(runs), next(runs)
    alone = near.start_ranks(2, *options)
    with Machines(2, round_trip=0.02, loss=0.01) as machines:
        ranks = machines.start(far, [0, 1], *options)
        assert all_end(ranks) == all_end(alone) == [0, 0], ranks[0].text
        assert machines.lost > 10
    assert ranks[0].digest == alone[0].digest


def test_four_machines_of_two_ranks_train_as_one_process(runs: Iterator[Run]) -> None:
    near, far = next(runs), next(runs)
    options = (*SMOOTH, "train.stop_at_step=4")
    alone = near(*options)
    with Machines(4) as machines:
        ranks = machines.start(far, [0, 0, 1, 1, 2, 2, 3, 3], *options)
        assert all_end(ranks) == [0] * 8, ranks[0].text
    assert alone.wait() == 0 and "8 x cpu" in ranks[0].text
    losses = [np.array([row["loss"] for row in run.rows()]) for run in (near, far)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_machine_that_vanishes_is_named_and_the_others_continue(runs: Iterator[Run]) -> None:
    """Three machines; the second is cut off; the other two continue with the same batches."""
    run, batch = next(runs), 6
    options = ("--resume", "auto", f"train.batch_size={batch}", "train.timeout_minutes=0.1")
    seen: dict[int, list[int]] = {}
    with Machines(3) as machines:
        for places in ([0, 1, 2], [0, 2]):
            first = run.newest()[1]["step"] if seen else 0
            ids = run.folder / f"ids-{len(places)}"
            ids.mkdir()
            stop = () if len(places) == 3 else (f"train.stop_at_step={first + 3}",)
            ranks = machines.start(run, places, *options, *stop, before=_list_ids, IDS=str(ids))
            if len(places) == 3:
                ranks[0].wait_for("^step 3/")
                machines.cut_off.add(1)
                began = time.monotonic()
                assert [ranks[0].wait(), ranks[2].wait()] == [1, 1]
                assert time.monotonic() - began < 6 + 30
                ranks[1].signal(signal.SIGKILL)
                for rank in (0, 2):
                    last = ranks[rank].text.splitlines()[-1]
                    assert re.match(
                        rf"error: rank {rank}, step \d+: rank 1 did not reach this step: ", last
                    ), last
            else:
                assert all_end(ranks) == [0, 0], ranks[0].text
                assert f"steps {first} to {first + 3}" in ranks[0].text
            files = [
                ids / f"ids-{rank}.jsonl" for rank in range(len(places)) if len(places) == 2 or rank != 1
            ]
            parts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
            seen |= {first + k: list(chain(*step)) for k, step in enumerate(zip(*parts, strict=False))}
    steps = run.newest()[1]["step"]
    for step in range(steps):
        expected = global_batch(0, *position(step, 64, batch), 64, batch).tolist()
        if step >= steps - 3:
            assert seen[step] == expected
        else:  # the shares of ranks 0 and 2
            assert seen[step] == expected[:2] + expected[4:]
