"""One HTML file about a run: settings, curves, pictures, and how its features lie. It opens offline, without scripts.

    python tools/report.py RUN_FOLDER [--data SHARDS] [--images 2000] [--out report.html]

Features are of --data, else of the run's eval.path, else of its training images; labels are used where there are
any. A run that is not finished, or has no labels, gets a shorter report that says what is missing.
"""

import argparse
import math
import statistics
import sys
from itertools import cycle
from pathlib import Path

from byolt.configs import schema
from byolt.files.atomic import replacing
from byolt.model.quality import spectrum
from byolt.pipelines.sources import open_source
from byolt.tools.reporting import figures, page
from byolt.tools.reporting.features import features, neighbours
from byolt.tools.reporting.run import Run, Sample, read_run, take_sample

_CORRUPT_SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake in what was asked for, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run.out of a run of train.py")
    parser.add_argument("--data", help="images for the features; default: the run's eval.path")
    parser.add_argument("--images", type=int, default=2000, help="at most so many, evenly spaced (2000)")
    parser.add_argument("--out", type=Path, help="the HTML file; default: RUN_FOLDER/report.html")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    try:
        if args.images < 2:
            raise ValueError(f"--images {args.images}: a spectrum needs at least 2")
        run = read_run(args.run)
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: its folder is not there; make it first")
        if out.exists() and not _is_report(out):
            raise ValueError(f"{out} exists and is no report: remove it, or give another file by --out")
        if args.data:
            open_source(args.data)  # what was asked for must be there; the run's own may be gone
        html = write(run, args.data, args.images)
        with replacing(out.absolute()) as temporary:
            temporary.write_text(html, encoding="utf-8", errors="replace")  # file names need not be UTF-8
        size = out.stat().st_size
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("report: interrupted, nothing was written", file=sys.stderr)
        return 130
    print(f"{out}: {size / 1e6:.1f} MB")
    return 0


def _is_report(path: Path) -> bool:
    """Whether an earlier report is there, which may be replaced: our page begins with our name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return page.GENERATOR.encode() in file.read(1024)


def write(run: Run, data: str | None, images: int) -> str:
    """The page of a run.

    Args:
        run: its files.
        data: images for the features, or None for the run's own.
        images: at most so many.
    """
    sample, about = _sample_of(run, data, images)
    name = run.folder.resolve().name
    rank, last = None, [page.section("Features and neighbours", [page.note(about)])]
    if sample:
        principal = spectrum.principal_axes(sample.features)
        rank = spectrum.effective_rank(principal.eigenvalues)
        last = [page.section("Features", [features(sample, principal, rank)], about), neighbours(sample)]
    first = [_header(run, name, rank), *(page.note(problem) for problem in run.problems)]
    parts = [*first, _how(run), _curves(run), _views(run), *last, _corrupt(run)]
    return page.page(f"{name} · byolt", parts)


def _sample_of(run: Run, data: str | None, images: int) -> tuple[Sample | None, str]:
    """The features and what they are of, or None and why there are none."""
    if run.trained is None or run.config is None:
        return None, (
            "There is no encoder yet: the run has left neither encoder.safetensors nor a checkpoint that is whole "
            "(run.checkpoint_minutes says how often it writes one)."
        )
    path = data or run.config.eval.path or run.config.data.path
    which = "--data" if data else "eval.path" if run.config.eval.path else "data.path, the training images"
    try:
        source = open_source(path)
        sample = take_sample(run, source, images)
    except (ValueError, OSError) as error:
        if data:
            raise
        return None, f"The images are not there ({which}): {error}. Give others with --data."
    if not sample.features.isfinite().all():
        return None, f"The features of {path} are not finite: the encoder ({run.encoder_origin}) is broken."
    if len(sample.features) < 2:
        return None, f"{path} holds {len(sample.features)} image that decodes; a spectrum needs at least 2."
    text = (
        f"Of {len(sample.features)} of {len(source)} images from {path} ({which}), evenly spaced, without "
        f"augmentation; encoder: {run.encoder_origin}; {sample.features.shape[1]} dimensions."
    )
    if len(sample.features) < sample.asked:
        text += f" {sample.asked - len(sample.features)} images do not decode and are left out."
    return sample, text


def _header(run: Run, name: str, rank: float | None) -> str:
    total = run.total_steps
    stopped = run.config is not None and run.step == run.config.train.stop_at_step
    state = "stopped there by train.stop_at_step" if stopped else "not finished"
    state = "finished" if total and run.step >= total else state
    about = [f"step {run.step:,} of {total:,}, {state}" if total else f"step {run.step:,}"]
    if run.config:
        about.insert(0, run.config.model.backbone)
    if run.images:
        about.insert(1, f"{run.images:,} images")
    numbers = []
    accuracies = run.series("knn_top1")
    if accuracies:
        (first, before), (last, now) = accuracies[0], accuracies[-1]
        if first == 0 < last:
            numbers.append((f"{before:.1f} → {now:.1f} %", f"kNN top-1, untrained → step {last:,}"))
        else:
            numbers.append(
                (f"{now:.1f} %", f"kNN top-1 at step {last:,}" if last else "kNN top-1, untrained")
            )
    for key, digits, meaning in (
        ("loss", 3, "loss"),
        ("prediction_std", 4, "spread of predictions (std)"),
    ):
        value = run.last(key)
        if value is not None:
            numbers.append((f"{value:.{digits}f}", meaning))
    if rank is not None:
        numbers.append((f"{rank:.1f}", "effective rank of the features"))
    speeds = [value for _, value in run.series("images_per_second")]
    if speeds:
        numbers.append((f"{statistics.median(speeds):,.0f}", "images/s, median"))
        waits = [value for _, value in run.series("data_wait_percent")]
        numbers.append((f"{statistics.fmean(waits):.1f} %", "waiting for data, mean"))
    missing = (
        [] if accuracies else [page.note("kNN accuracy: not measured (eval.path is not set, or not yet).")]
    )
    return "\n".join([page.heading(name, " · ".join(about)), page.tiles(numbers), *missing])


def _how(run: Run) -> str:
    """Command, hardware, versions and settings."""
    parts = []
    if run.starts:
        start = run.starts[-1]
        versions = start.get("versions")
        named = versions.items() if isinstance(versions, dict) else []
        ranks = f"{start.get('ranks', 1)} rank(s), {start.get('precision', 'precision not recorded')}"
        rows = [
            ("command", str(start.get("command"))),
            ("started", f"{start.get('time')} at step {start['step']:,}"),
            ("hardware", f"{start.get('hardware')}; {ranks}"),
            ("images", str(start.get("backend"))),
            ("versions", ", ".join(f"{name} {version}" for name, version in named)),
        ]
        if len(run.starts) > 1:
            earlier = "; ".join(f"step {row['step']:,}: {row.get('time')}" for row in run.starts[:-1])
            rows.insert(2, ("started before", earlier))
        parts.append(page.facts(rows))
    else:
        parts.append(
            page.note("Command, hardware and versions: not recorded by the version that made this run.")
        )
    if run.config:
        parts.append(page.folded("All settings", schema.to_yaml(run.config)))
    else:
        parts.append(page.note("Settings: not known; the run has left no checkpoint that is whole."))
    return page.section("How it was made", parts)


def _curves(run: Run) -> str:
    """Everything that metrics.jsonl holds over the steps."""
    size = run.config.model.projector_size if run.config else None
    spread = 1 / math.sqrt(size) if size else None
    cosine = math.sqrt(2 / (math.pi * size)) if size else None
    dashed = " (dashed)" if size else ""
    accuracies = {key: key.removesuffix("_top1") for row in run.rows for key in row if key.endswith("_top1")}
    accuracies = {key: "kNN" if name == "knn" else name for key, name in accuracies.items()}
    gauges = {"prediction": "prediction", "projection": "target's projection"}
    drawings = [
        ("Loss", {"loss": ""}, "loss", "4: predictions and targets have nothing in common; 0: they agree.", None),
        ("Accuracy", accuracies, "top-1, per cent", "kNN: held-out images by the frozen encoder.", None),
        ("Learning rate", {"lr": ""}, "learning rate", "Before LARS scales it for each layer.", None),
        ("tau", {"tau": ""}, "tau", "The target keeps this share of itself at each step.", None),
        ("Speed", {"images_per_second": ""}, "images/s", "Of training alone, all ranks together.", None),
        ("Waiting for data", {"data_wait_percent": ""}, "per cent", "Share of the time that training waited.", None),
        ("Collapse: spread", {f"{k}_std": v for k, v in gauges.items()}, "std",
         f"Of each normalised dimension over a batch: 0 if collapsed, 1/√D if spread over the sphere{dashed}.", spread),
        ("Collapse: cosine", {f"{k}_cosine": v for k, v in gauges.items()}, "mean |cosine|",
         f"Between different images: 1 if collapsed, √(2/πD) if spread over the sphere{dashed}.", cosine),
        ("Gradient", {"gradient_norm": ""}, "norm", "Over all parameters, before LARS.", None),
    ]  # fmt: skip
    drawn, missing = [], []
    for title, keys, unit, caption, hint in drawings:
        series = {name: run.series(key) for key, name in keys.items() if run.series(key)}
        if not series:
            missing.append(title.lower())
            continue
        lines = [figures.Line(points, title == "Accuracy") for points in series.values()]
        svg = figures.curves(title, lines, max(run.step, 1), unit, hint)
        legend = dict(zip(filter(None, series), cycle(figures.LINE_INKS), strict=False))
        drawn.append(page.figure(title, svg, caption, legend))
    parts = [page.grid(drawn, small=True)] if drawn else []
    if missing:
        parts.append(page.note(f"Not in metrics.jsonl: {', '.join(missing)}."))
    return page.section("Curves", parts)


def _views(run: Run) -> str:
    path = run.folder / "views.png"
    if not path.is_file():
        return page.section(
            "What the network saw",
            [page.note("views.png is not there; train.py writes it at the first step.")],
        )
    caption = "The first images of the first batch: each column is one image, as view 1 and as view 2."
    return page.section("What the network saw", [page.picture(path.read_bytes(), "pairs of views", caption)])


def _corrupt(run: Run) -> str:
    count = int(run.last("corrupt_images") or 0)
    if not run.corrupt and not count:
        return page.section("Corrupt images", [page.facts([("met in training", "none")])])
    rows = [[str(row.get(key, "")) for key in ("id", "where", "reason")] for row in run.corrupt]
    parts = [page.table(("id", "where", "reason"), rows[:_CORRUPT_SHOWN])] if rows else []
    number = f"{len(rows) or count} image{'s' * ((len(rows) or count) > 1)} could not be decoded in training"
    listed = f"{number}; the next sound one took the place of each"
    if len(rows) > _CORRUPT_SHOWN:
        listed += f"; the first {_CORRUPT_SHOWN} are below, all in corrupt.jsonl"
    if not rows:
        listed = f"{number}; corrupt.jsonl, which names them, is not there"
    return page.section("Corrupt images", parts, f"{listed}.")


if __name__ == "__main__":
    sys.exit(main())
