"""Makes the page that compares runs: results, the settings that differ, and the curves together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byolt.configs import fixed
from byolt.tools.reporting import figures, page
from byolt.tools.reporting.accuracy import read_evaluations
from byolt.tools.reporting.curves import CURVES
from byolt.tools.reporting.figures import MARKS
from byolt.tools.reporting.page import Figure, ReportSection
from byolt.tools.reporting.run import RunFiles


def render_comparison(runs: Sequence[RunFiles]) -> str:
    """The HTML page that compares two to ten runs."""
    names = distinct_names([run.folder for run in runs])
    named = dict(zip(names, runs, strict=True))
    notes = [f"{name}: {problem}" for name, run in named.items() for problem in run.problems]
    sections = [_results(named, notes), _differences(named), _curves(named)]
    return page.render(f"{len(runs)} runs compared", " · ".join(names), [], notes, sections)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            break
    return names


def _results(runs: Mapping[str, RunFiles], notes: list[str]) -> ReportSection:
    """One row for each run: how far it came, and its last figures."""
    section = ReportSection("Results")
    head = ("run", "state", "loss", "kNN top-1 %, training", "online probe %", "tools/evaluate.py, top-1 %")
    section.table = [head]
    for name, run in runs.items():
        found, problems = read_evaluations(run.folder)
        notes += [f"{name}: {problem}" for problem in problems]
        newest = max((each.step for each in found), default=0)
        evaluated = [f"{e.protocol}, {e.name}: {e.top1:.1f} ({e.encoder})" for e in found if e.step == newest]
        knn = [f"{value:.1f}" for _, value in run.series("knn_top1")]
        section.table.append([
            name, run.progress, _number(run.last("loss"), 4),
            " → ".join(dict.fromkeys([*knn[:1], *knn[-1:]])) or "-",
            _number(run.last("probe_top1"), 1), "; ".join(evaluated) or "-",
        ])  # fmt: skip
    return section


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _differences(runs: Mapping[str, RunFiles]) -> ReportSection:
    """Settings, hardware and versions that are not the same in all runs."""
    section = ReportSection("Settings that differ")
    unknown = [name for name, run in runs.items() if run.config is None]
    section.notes += [f"{name}: its settings are not known." for name in unknown]
    facts = [_facts(run) for run in runs.values()]
    rows = []
    for key in dict.fromkeys(key for each in facts for key in each):
        values = [each.get(key, "-") for each in facts]
        if len({*values}) > 1:
            rows.append([key, *values])
    if rows:
        section.table = [("setting", *runs), *rows]
    else:
        section.intro = "None but run.out: settings, hardware and versions are the same."
    return section


def _facts(run: RunFiles) -> dict[str, str]:
    """The settings by dotted key, without run.out, and facts about the last start."""
    settings = fixed.flatten(run.config.model_dump(mode="json")) if run.config else {}
    settings.pop("run.out", None)
    start: dict[str, Any] = run.starts[-1] if run.starts else {}
    facts: dict[str, Any] = {k: start[k] for k in ("hardware", "ranks", "precision", "backend") if k in start}
    if isinstance(versions := start.get("versions"), dict):
        facts |= {f"version of {key}": value for key, value in versions.items()}
    return {key: "null" if value is None else str(value) for key, value in (settings | facts).items()}


def _curves(runs: Mapping[str, RunFiles]) -> ReportSection:
    """One figure for each number of metrics.jsonl, with one curve for each run that has it."""
    section = ReportSection("Curves")
    last = max(1, *(run.step for run in runs.values()))
    for curve in CURVES:
        for key, name in curve.keys.items():
            series = {label: points for label, run in runs.items() if (points := run.series(key))}
            if series:
                title = curve.title if len(curve.keys) == 1 else f"{curve.title}, {name}"
                marks = [mark for mark, label in zip(MARKS, runs, strict=False) if label in series]
                png = figures.curves(series, last, curve.unit, marks=marks)
                section.figures.append(Figure(title, png, curve.caption))
    return section
