"""One HTML file about a run: settings, curves, pictures, and how its features lie. It opens offline, without scripts.

    python tools/report.py RUN_FOLDER [--data SHARDS] [--images 2000] [--out report.html]

Features are of --data, else of the run's eval.path, else of its training images; labels are used where there are
any. A run that is not finished, or has no labels, gets a shorter report that says what is missing.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import numpy as np

from configs import schema
from model import geometry
from model.checkpoint import replacing
from pipelines.sources import Source, open_source
from tools import report_figures as figures
from tools import report_page as page
from tools.report_run import Run, Sample, read_run, take_sample

_NEIGHBOURS = 5
_QUERIES = 10
_CORRUPT_SHOWN = 20


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake in what was asked for."""
    parser = argparse.ArgumentParser(prog="report", description=__doc__.split("\n", 1)[0])
    parser.add_argument("run", type=Path, help="run.out of a run of train.py")
    parser.add_argument("--data", help="images for the features; default: the run's eval.path")
    parser.add_argument("--images", type=int, default=2000, help="at most so many, evenly spaced (2000)")
    parser.add_argument("--out", type=Path, help="the HTML file; default: RUN_FOLDER/report.html")
    args = parser.parse_args(argv)
    out = args.out or args.run / "report.html"
    try:
        if args.images < 2:
            raise ValueError(f"--images {args.images}: a spectrum needs at least 2")
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: its folder is not there; make it first")
        run = read_run(args.run)
        if args.data:
            open_source(args.data)  # what was asked for must be there; the run's own may be gone
        html = write(run, args.data, args.images)
        with replacing(out.absolute()) as temporary:
            temporary.write_text(html)
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(html.encode()) / 1e6:.1f} MB")
    return 0


def write(run: Run, data: str | None, images: int) -> str:
    """The page of a run.

    Args:
        run: its files.
        data: images for the features, or None for the run's own.
        images: at most so many.
    """
    sample, missing = _sample_of(run, data, images)
    rank, spectrum = None, ""
    if sample:
        principal = geometry.principal_axes(sample.features)
        rank = geometry.effective_rank(principal.eigenvalues)
        spectrum = _features(sample, principal, rank)
    name = run.folder.resolve().name
    parts = [_header(run, name, rank), *(page.note(problem) for problem in run.problems)]
    parts += [_how(run), _curves(run), _views(run)]
    if sample:
        parts += [page.section("Features", [missing, spectrum]), _neighbours(sample)]
    else:
        parts.append(page.section("Features and neighbours", [page.note(missing)]))
    parts.append(_corrupt(run))
    return page.page(f"{name} · byolt", parts)


def _sample_of(run: Run, data: str | None, images: int) -> tuple[Sample | None, str]:
    """The features and an HTML sentence about them, or None and plain text that says why there are none."""
    if run.encoder is None or run.config is None:
        return None, (
            "There is no encoder yet: the run has left neither encoder.safetensors nor a checkpoint that is whole "
            "(run.checkpoint_minutes says how often it writes one)."
        )
    path = data or run.config.eval.path or run.config.data.path
    which = "--data" if data else "eval.path" if run.config.eval.path else "data.path, the training images"
    try:
        source: Source = open_source(path)
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
    return sample, f"<p>{page.escape(text)}</p>"


def _header(run: Run, name: str, rank: float | None) -> str:
    total = run.total_steps
    state = "finished" if total and run.step >= total else "not finished"
    about = [f"step {run.step:,} of {total:,}, {state}" if total else f"step {run.step:,}"]
    if run.config:
        about.insert(0, run.config.model.backbone)
    if run.images:
        about.insert(1, f"{run.images:,} images")
    numbers = []
    accuracies = run.series("knn_top1")
    if accuracies:
        numbers.append((f"{accuracies[-1][1]:.1f} %", f"kNN top-1 at step {accuracies[-1][0]:,}"))
        if accuracies[0][0] == 0:
            numbers.append((f"{accuracies[0][1]:.1f} %", "kNN top-1 untrained"))
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
    missing = [] if accuracies else [page.note("kNN accuracy: not measured (eval.path is not set, or not yet).")]
    return "\n".join([page.heading(name, " · ".join(about)), page.tiles(numbers), *missing])


def _how(run: Run) -> str:
    """Command, hardware, versions and settings."""
    parts = []
    if run.starts:
        start = run.starts[-1]
        versions = start.get("versions", {})
        ranks = f"{start.get('ranks', 1)} rank(s), {start.get('precision', 'precision not recorded')}"
        rows = [
            ("command", str(start.get("command"))),
            ("started", f"{start.get('time')} at step {start['step']:,}"),
            ("hardware", f"{start.get('hardware')}; {ranks}"),
            ("images", str(start.get("backend"))),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
        if len(run.starts) > 1:
            earlier = "; ".join(f"step {row['step']:,}: {row.get('time')}" for row in run.starts[:-1])
            rows.insert(2, ("started before", earlier))
        parts.append(page.facts(rows))
    else:
        parts.append(page.note("Command, hardware and versions: not recorded by the version that made this run."))
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
    accuracies = {key: key.removesuffix("_top1") + " top-1" for row in run.rows for key in row if "_top1" in key}
    gauges = {"prediction": "prediction", "projection": "target's projection"}
    drawings = [
        ("Loss", {"loss": ""}, "loss", "4 where predictions and targets have nothing in common, 0 where they agree.", None),
        ("Accuracy", accuracies, "per cent", "On held-out images, of the frozen encoder.", None),
        ("Learning rate", {"lr": ""}, "learning rate", "Before LARS scales it for each layer.", None),
        ("tau", {"tau": ""}, "tau", "The target keeps this share of itself at each step.", None),
        ("Speed", {"images_per_second": ""}, "images/s", "Of training alone, all ranks together.", None),
        ("Waiting for data", {"data_wait_percent": ""}, "per cent", "Share of the time that a step waited for images.", None),
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
        lines = [figures.Line(points, name, title == "Accuracy") for name, points in series.items()]
        drawn.append(page.figure(title, figures.curves(title, lines, unit, hint), caption))
    parts = [page.grid(drawn)] if drawn else []
    if missing:
        parts.append(page.note(f"Not in metrics.jsonl: {', '.join(missing)}."))
    return page.section("Curves", parts)


def _views(run: Run) -> str:
    path = run.folder / "views.png"
    if not path.is_file():
        return page.section("What the network saw", [page.note("views.png is not there: no step was taken yet.")])
    caption = "The first images of the first batch: each column is one image, as view 1 and as view 2."
    return page.section("What the network saw", [page.picture(path.read_bytes(), "pairs of views", caption)])


def _features(sample: Sample, principal: geometry.Principal, rank: float) -> str:
    """Spectrum and maps, as HTML."""
    samples, dimensions = sample.features.shape
    eigenvalues = principal.eigenvalues.numpy()
    if eigenvalues[0] <= 0:
        return page.note("All features are one point: the encoder has collapsed. There is no spectrum to draw.")
    shares = eigenvalues / eigenvalues.sum()
    drawings = [
        page.figure(
            "Spectrum",
            figures.spectrum("Spectrum of the features", eigenvalues, rank),
            f"Eigenvalues λ of the covariance. Effective rank: exp(-Σ p ln p), p = λ/Σλ (Roy & Vetterli, EUSIPCO "
            f"2007, of the covariance): {rank:.1f} of at most {min(samples - 1, dimensions)}; 90 % of the variance is "
            f"in the first {int(np.searchsorted(shares.cumsum(), 0.9)) + 1}.",
        )
    ]
    colors, chosen = figures.colors_of(sample.labels)
    legend = {sample.name(label): color for label, color in chosen.items()}
    others = set(sample.labels.tolist()) - chosen.keys()
    if not chosen:
        coloured = "There are no labels, so all points have one colour."
    elif others:
        legend["others"] = figures.OTHER_COLOR
        coloured = f"Coloured by class: the {len(chosen)} most frequent of {len(chosen) + len(others - {-1})}."
    else:
        coloured = "Coloured by class."
    maps = [("PCA", geometry.project(sample.features, principal).numpy(), f"The two largest axes. {coloured}")]
    labels = {"PCA": tuple(f"axis {i + 1}, {100 * share:.0f} % of the variance" for i, share in enumerate(shares[:2]))}
    embedded = _tsne(sample)
    if embedded is None:
        maps[0] = (*maps[0][:2], f"{maps[0][2]} A t-SNE map is drawn too where scikit-learn is installed.")
    else:
        maps.append(("t-SNE", embedded, f"scikit-learn's, by cosine; distances far apart mean nothing. {coloured}"))
    for title, points, caption in maps:
        if points.shape[1] == 2:
            svg = figures.scatter(f"{title} map", points, colors, labels.get(title, ("", "")))
            drawings.append(page.figure(f"Map: {title}", svg, caption, legend))
    return page.grid(drawings)


def _tsne(sample: Sample) -> np.ndarray | None:
    """A t-SNE map (N, 2), or None where scikit-learn is not installed or there are too few images."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    if len(sample.features) < 10:
        return None
    perplexity = min(30.0, (len(sample.features) - 1) / 3)
    return TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0).fit_transform(
        sample.features.numpy()
    )


def _neighbours(sample: Sample) -> str:
    """Queries and their nearest images."""
    indices, cosines = geometry.nearest(sample.features, _NEIGHBOURS)
    known = sorted(set(sample.labels.tolist()) - {-1})
    if known:
        chosen = [known[i] for i in np.linspace(0, len(known), min(_QUERIES, len(known)), endpoint=False).astype(int)]
        queries = [int(np.argmax(sample.labels == label)) for label in chosen]
        which = "the first image of each class" if len(chosen) == len(known) else f"of {len(chosen)} classes the first image"
    else:
        count = min(_QUERIES, len(sample.labels))
        queries = np.linspace(0, len(sample.labels), count, endpoint=False).astype(int).tolist()
        which = "evenly spaced"
    rows = []
    for query in queries:
        label = int(sample.labels[query])
        row = [page.Picture(sample.thumbnails[query], sample.name(label))]
        for other, cosine in zip(indices[query].tolist(), cosines[query].tolist(), strict=True):
            theirs = int(sample.labels[other])
            verdict = "" if min(label, theirs) < 0 else "right" if label == theirs else "wrong"
            row.append(page.Picture(sample.thumbnails[other], f"{sample.name(theirs)} {cosine:.2f}", verdict))
        rows.append(row)
    intro = f"The {_NEIGHBOURS} nearest of the same images by cosine (the number below each). Queries, not picked: {which}."
    parts = [page.sheet(rows)]
    if known:
        right, chance = neighbour_precision(sample.labels, indices.numpy())
        intro += (
            f" Of all labelled images, {100 * right:.1f} % of these neighbours are of the image's class; chance is "
            f"{100 * chance:.1f} %. A neighbour of another class has a dashed red border and a cross."
        )
    else:
        parts.insert(0, page.note("There are no labels: which neighbours are wrong is for the eye to judge."))
    return page.section("Nearest neighbours", parts, intro)


def neighbour_precision(labels: np.ndarray, indices: np.ndarray) -> tuple[float, float]:
    """Share of neighbours that have the label of their query, and what random neighbours would give.

    Args:
        labels: (N,) int64, -1 where unknown; at least one is known.
        indices: (N, k) int64, neighbours among the N.

    Returns:
        Two numbers in 0 .. 1, over the pairs whose labels are both known; NaN if there is none.
    """
    known = labels >= 0
    pairs = known[:, None] & known[indices]
    right = (labels[:, None] == labels[indices]) & pairs
    counts = np.unique(labels[known], return_counts=True)[1]
    total = counts.sum()
    chance = float((counts * (counts - 1)).sum() / (total * (total - 1))) if total > 1 else math.nan
    return float(right.sum() / pairs.sum()) if pairs.any() else math.nan, chance


def _corrupt(run: Run) -> str:
    count = int(run.last("corrupt_images") or 0)
    if not run.corrupt and not count:
        return page.section("Corrupt images", [page.facts([("met in training", "none")])])
    rows = [[str(row.get(key, "")) for key in ("id", "where", "reason")] for row in run.corrupt]
    parts = [page.table(("id", "where", "reason"), rows[:_CORRUPT_SHOWN])] if rows else []
    listed = f"{len(rows)} images could not be decoded in training and were replaced by the next sound one"
    if len(rows) > _CORRUPT_SHOWN:
        listed += f"; the first {_CORRUPT_SHOWN} are below, all in corrupt.jsonl"
    if not rows:
        listed = f"{count} images could not be decoded in training; corrupt.jsonl, which names them, is not there"
    return page.section("Corrupt images", parts, f"{listed}.")


if __name__ == "__main__":
    sys.exit(main())
