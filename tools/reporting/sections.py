"""Makes the report, and its sections about the run itself: settings, curves, views and corrupt images."""

import statistics

from byolt.configs import schema
from byolt.model.quality import spectrum
from byolt.model.run.pictures import dark_frame
from byolt.pipelines.sources import open_source
from byolt.tools.reporting import figures, page
from byolt.tools.reporting.accuracy import accuracy_section
from byolt.tools.reporting.curves import CURVES
from byolt.tools.reporting.features import features_section, neighbors_section
from byolt.tools.reporting.page import Figure, ReportSection
from byolt.tools.reporting.run import ImageFeatures, RunFiles, compute_features

_CORRUPT_SHOWN = 20


def render_report(run: RunFiles, data: str | None, images: int) -> str:
    """The HTML page of a run, with features of at most `images` images of `data`, by default of the run's own."""
    computed, about = _features_of(run, data, images)
    rank, last = None, [ReportSection("Features and neighbors", notes=[about])]
    if computed:
        principal = spectrum.principal_axes(computed.features)
        rank = spectrum.effective_rank(principal.eigenvalues)
        last = [features_section(computed, principal, rank), neighbors_section(computed)]
        last[0].intro = about
    notes = list(run.problems)
    if not run.series("knn_top1"):
        notes.insert(0, "kNN accuracy: not measured (eval.path is not set, or not measured yet).")
    sections = [_settings(run), accuracy_section(run), _curves(run), _views(run), *last, _corrupt(run)]
    return page.render(run.folder.resolve().name, _subtitle(run), _tiles(run, rank), notes, sections)


def _features_of(run: RunFiles, data: str | None, images: int) -> tuple[ImageFeatures | None, str]:
    """The features and a sentence about them, or None and the reason."""
    if run.trained is None or run.config is None:
        return None, (
            "There is no encoder yet: the run has written neither encoder.safetensors nor a readable checkpoint "
            "(run.checkpoint_minutes sets how often it writes one)."
        )
    path = data or run.config.eval.path or run.config.data.path
    which = "--data" if data else "eval.path" if run.config.eval.path else "data.path, the training images"
    try:
        source = open_source(path, run.config.data.on_demand)
        found = compute_features(run, source, images)
    except (ValueError, OSError) as error:
        if data:
            raise
        return None, f"The images cannot be read ({which}): {error}. Give others with --data."
    count, dimensions = found.features.shape
    if not found.features.isfinite().all():
        return None, f"The features of {path} are not finite: the encoder ({run.encoder_origin}) is broken."
    if count < 2:
        return None, f"{path} holds {count} image that decodes; a spectrum needs at least 2."
    text = (
        f"{count} of {len(source)} images from {path} ({which}), evenly spaced, without augmentation; encoder: "
        f"{run.encoder_origin}; {dimensions} dimensions."
    )
    if count < found.tried:
        text += f" {found.tried - count} images do not decode and are left out."
    return found, text


def _subtitle(run: RunFiles) -> str:
    parts: list[str] = [run.config.model.backbone] if run.config else []
    parts += [f"{run.images:,} images"] if run.images else []
    return " · ".join([*parts, run.progress])


def _tiles(run: RunFiles, rank: float | None) -> list[tuple[str, str]]:
    """The report's large numbers, and the meaning of each."""
    tiles = []
    if accuracies := run.series("knn_top1"):
        (first, before), (last, now) = accuracies[0], accuracies[-1]
        knn = f"kNN top-1 (k = {run.config.eval.k})" if run.config else "kNN top-1"
        if first == 0 < last:
            tiles.append((f"{before:.1f} → {now:.1f} %", f"{knn}, untrained → step {last:,}"))
        else:
            tiles.append((f"{now:.1f} %", f"{knn} at step {last:,}" if last else f"{knn}, untrained"))
    for key, digits, meaning in (("loss", 3, "loss"), ("prediction_std", 4, "spread of predictions (std)")):
        if (value := run.last(key)) is not None:
            tiles.append((f"{value:.{digits}f}", meaning))
    if rank is not None:
        tiles.append((f"{rank:.1f}", "effective rank of the features"))
    speeds = [value for _, value in run.series("images_per_second")]
    waits = [value for _, value in run.series("data_wait_percent")]
    tiles += [(f"{statistics.median(speeds):,.0f}", "images/s, median")] if speeds else []
    tiles += [(f"{statistics.fmean(waits):.1f} %", "waiting for data, mean")] if waits else []
    return tiles


def _settings(run: RunFiles) -> ReportSection:
    """Command, hardware, versions and settings."""
    section = ReportSection("How it was made")
    if run.starts:
        *earlier, start = run.starts
        versions = start.get("versions")
        named = versions.items() if isinstance(versions, dict) else []
        number = start.get("ranks", 1)
        ranks = f"{number} rank{'s' * (number != 1)}, {start.get('precision', 'precision not recorded')}"
        before = "; ".join(f"step {row['step']:,}: {row.get('time')}" for row in earlier)
        section.facts = [
            ("command", str(start.get("command"))),
            ("started", f"{start.get('time')} at step {start['step']:,}"),
            *([("started before", before)] if before else []),
            ("hardware", f"{start.get('hardware')}; {ranks}"),
            ("data", str(start.get("backend"))),
            ("versions", ", ".join(f"{name} {version}" for name, version in named)),
        ]
    else:
        section.notes.append("Command, hardware and versions: not recorded in starts.jsonl.")
    if run.config:
        section.details = ("All settings", schema.to_yaml(run.config))
    else:
        section.notes.append("Settings: not known; the run has no readable checkpoint.")
    return section


def _curves(run: RunFiles) -> ReportSection:
    """Every number of metrics.jsonl over the steps."""
    section, missing = ReportSection("Curves"), []
    for curve in CURVES:
        series = {name: points for key, name in curve.keys.items() if (points := run.series(key))}
        if series:
            size = run.config.model.projector_size if run.config and curve.spread else None
            hint = curve.spread(size) if curve.spread and size else None
            png = figures.curves(series, max(run.step, 1), curve.unit, hint)
            section.figures.append(Figure(curve.title, png, curve.caption))
        else:
            missing.append(curve.title.lower())
    if missing:
        section.notes.append(f"Not in metrics.jsonl: {', '.join(missing)}.")
    return section


def _views(run: RunFiles) -> ReportSection:
    section, path = ReportSection("Training views"), run.folder / "views.png"
    if path.is_file():
        caption = "The first images of the first batch: each column is one image, as view 1 and as view 2."
        if run.config and (frame := dark_frame(run.config.augment)):
            caption += f" {frame}"
        section.picture = (path.read_bytes(), caption)
    else:
        section.notes.append("views.png does not exist; train.py writes it at the first step.")
    return section


def _corrupt(run: RunFiles) -> ReportSection:
    section, rows = ReportSection("Corrupt images"), run.corrupt
    count = len(rows) or int(run.last("corrupt_images") or 0)
    if not count:
        section.facts = [("found in training", "none")]
        return section
    section.intro = (
        f"{count} image{'s' * (count > 1)} could not be decoded in training; each was replaced by the next one that "
        "decodes"
    )
    if len(rows) > _CORRUPT_SHOWN:
        section.intro += f"; the first {_CORRUPT_SHOWN} are listed here, all of them in corrupt.jsonl"
    elif not rows:
        section.intro += "; corrupt.jsonl, which lists them, does not exist"
    section.intro += "."
    keys = (
        ["id", "where", "file", "reason"] if any("file" in row for row in rows) else ["id", "where", "reason"]
    )
    shown = [[str(row.get(key, "")) for key in keys] for row in rows[:_CORRUPT_SHOWN]]
    section.table = [keys, *shown] if shown else []
    return section
