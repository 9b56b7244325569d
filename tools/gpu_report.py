"""Measures the project on a GPU in five minutes: its tests, the step, the loader, both together, and train.py.

    python tools/gpu_report.py                        # writes benchmarks/<card>/gpu_report.{md,json,png,log}
    python tools/gpu_report.py --quick --device cpu   # the same parts on tiny networks, to see that they run

Each part (tools/benchmarks/gpu_parts.py) runs in a process of its own, for a limited time: if it fails, hangs or runs
out of memory, only its own figures are missing, and the table says why.
"""

if not __package__:  # a script
    import environment  # noqa: F401

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from byolt.files.console import Parser, say
from byolt.files.paths import home_path
from byolt.model.run import provenance
from byolt.tools.benchmarks.gpu_parts import PARTS, ROOT, Job, Part, Row
from byolt.tools.benchmarks.picture import save_bars


def work(part: Part, job: Job, log: Path, sender: Connection) -> None:
    """Runs the part in this process and sends its rows; what it prints goes to the log."""
    os.setsid()  # so that its own processes end with it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    say(f"\n==== {part.name}")
    try:
        for row in part.run(job, *part.arguments):
            sender.send(row)
    except Exception as error:
        traceback.print_exc()
        sender.send(Row(None, "", f"{type(error).__name__}: {error}".split("\n")[0]))
    sender.close()


def rows_of(part: Part, job: Job, log: Path) -> Iterator[Row]:
    """Yields the rows of a part, which has job.seconds; one more if it was stopped or died."""
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + job.seconds
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(part, job, log, sender))
    process.start()
    assert process.pid
    sender.close()
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            yield receiver.recv()
        yield Row(None, "", f"stopped after its limit of {job.seconds:.0f} s")
    except EOFError:
        process.join(10)
        if process.exitcode:
            yield Row(None, "", f"its process ended with {process.exitcode}; gpu_report.log may say why")
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # all have ended, or it has not called setsid yet
            process.kill()
        process.join()


def line(name: str, row: Row) -> str:
    """A row of the Markdown table."""
    digits = 0 if row.value is None or abs(row.value) >= 100 or row.value % 1 == 0 else 2
    value = "not measured" if row.value is None else f"{row.value:,.{digits}f}"
    return f"| {name} | {value} | {row.unit} | {row.note.replace('|', '/')} |"


def write(out: Path, facts: dict[str, Any], rows: Sequence[tuple[str, Row]]) -> None:
    """Writes gpu_report.json, .md and .png."""
    document = facts | {"rows": [{"part": name, **row._asdict()} for name, row in rows]}
    (out / "gpu_report.json").write_text(json.dumps(document, indent=2) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = f"# {facts['hardware']}\n\n{facts['date']}, commit {facts['commit']}: `{facts['command']}`. {versions}.\n"
    table = ["| part | figure | unit | note |", "|---|---|---|---|", *(line(*row) for row in rows)]
    panels: dict[str, dict[str, float]] = {}
    for name, row in rows:
        if row.value is not None:
            bar = f"{name}: {row.note.partition(':')[0]}" if ":" in row.note else name
            panels.setdefault(row.unit, {})[bar] = row.value
    compared = [(unit, bars) for unit, bars in panels.items() if len(bars) > 1]
    table += ["\n![The figures as bars](gpu_report.png)"] if compared else []
    (out / "gpu_report.md").write_text("\n".join([head, *table, ""]))
    if compared:
        labeled = [(unit, bars, [f"{value:,.1f}" for value in bars.values()]) for unit, bars in compared]
        save_bars(out / "gpu_report.png", facts["hardware"], labeled)


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Returns the exit code: 0 if every part has its figures, 1 if one has not, 2 without a GPU."""
    parser = Parser(prog="gpu_report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny networks and images")
    parser.add_argument("--data", default="synthetic:10000:375x500", help="data.path of ResNet-50's parts")
    parser.add_argument("--seconds", type=float, default=300.0, help="of all parts together (default 300)")
    parser.add_argument(
        "--out", type=home_path, help="default: benchmarks/<card>; with --quick runs/gpu_report"
    )
    args, begun = parser.parse_args(argv), time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        say("gpu_report: torch finds no GPU; to try it without one: --quick --device cpu", file=sys.stderr)
        return 2
    device = torch.device(args.device)
    card = torch.cuda.get_device_name(device) if args.device == "cuda" else "cpu"
    slug = "-".join(re.findall(r"[a-z0-9]+", card.lower().removeprefix("nvidia")))
    out = args.out or (Path("runs", "gpu_report") if args.quick else Path("benchmarks", slug))
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu_report.log"
    log.write_text("")
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    facts = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip() or "unknown",
        "hardware": provenance.hardware(device),
        "versions": provenance.versions(),
        "command": " ".join(["tools/gpu_report.py", *(sys.argv[1:] if argv is None else argv)]),
    }
    rows: list[tuple[str, Row]] = []
    try:
        for part in parts:
            left = args.seconds - 5 - (time.monotonic() - begun)  # the picture takes a second or two
            job = Job(args.device, args.quick, args.data, min(part.seconds, left))
            late = [Row(None, "", f"not begun: --seconds {args.seconds:.0f} are over")]
            for row in rows_of(part, job, log) if left > 1 else late:
                rows.append((part.name, row))
                say(line(part.name, row))
    except KeyboardInterrupt:
        say("gpu_report: interrupted; writes what there is", file=sys.stderr)
    write(out, facts, rows)
    say(f"{out / 'gpu_report.md'}: {time.monotonic() - begun:.0f} s")
    return int(any(row.value is None for _, row in rows))


if __name__ == "__main__":
    sys.exit(main())
