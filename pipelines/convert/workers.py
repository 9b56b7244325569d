"""Worker processes that Ctrl-C does not reach and that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


@contextmanager
def spread(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    setup: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[list[futures.Future[Result]]]:
    """Calls `function` for each task in spawned processes, or in one thread if one worker is enough.

    Leaving the block waits for the tasks that have begun, and drops the others. The function and the tasks are pickled.
    Each worker calls `setup` with `arguments` before its first task.
    """
    pool: futures.Executor
    if min(workers, len(tasks)) <= 1:
        pool = futures.ThreadPoolExecutor(1, initializer=setup, initargs=arguments)
    else:
        context = multiprocessing.get_context("spawn")
        pool = futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _start, (setup, arguments))
    try:
        with _interrupts_held():
            pending = [pool.submit(function, task) for task in tasks]
        yield pending
    finally:
        pool.shutdown(cancel_futures=True)


def collect(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> list[Result]:
    """The results of `spread`, in the order of the tasks."""
    with spread(function, tasks, workers) as pending:
        return [future.result() for future in pending]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started inside inherit the mask, also while they import: Ctrl-C reaches their parent alone."""
    held: list[int] = []
    # The mask is this thread's; the kernel then gives Ctrl-C to a library's thread, and Python to its handler.
    handler = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _start(setup: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if setup is not None:
        setup(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a child
    parent.join()
    os._exit(1)
