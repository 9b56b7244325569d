"""The report's page: sections of plain text and pictures, which a template lays out and escapes."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image

from byolt.tools.reporting.figures import Mark

GENERATOR = '<meta name="generator" content="byolt report">'  # by which a page is known to be one of ours


class Figure(NamedTuple):
    """A plot with its title, caption, and a legend of names."""

    title: str
    png: bytes
    caption: str
    legend: Sequence[tuple[Mark, str]] = ()


class Thumbnail(NamedTuple):
    """One image of the sheet of neighbors."""

    pixels: np.ndarray  # (H, W, 3) uint8
    caption: str
    verdict: str = ""  # "right", "wrong", or "" if a label is unknown
    file: str = ""  # shown where the pointer is


@dataclass
class ReportSection:
    """A titled part of the page; the parts that are not empty are shown in this order."""

    title: str
    intro: str = ""
    notes: list[str] = field(default_factory=list)  # about missing or damaged files
    facts: list[tuple[str, str]] = field(default_factory=list)  # a table of names and values
    details: tuple[str, str] | None = None  # title and text that is folded away
    table: list[Sequence[str]] = field(default_factory=list)  # the first row is the head
    figures: list[Figure] = field(default_factory=list)
    picture: tuple[bytes, str] | None = None  # PNG as wide as the page, and its caption
    sheets: list[list[list[Thumbnail]]] = field(default_factory=list)  # rows of a query and its neighbors


def render(
    name: str,
    subtitle: str,
    tiles: Sequence[tuple[str, str]],
    notes: Sequence[str],
    sections: Sequence[ReportSection],
) -> str:
    """The HTML page: one file with its style inside, without scripts, which loads nothing from elsewhere.

    `tiles` are large numbers and their meanings; `notes` tell the reader of missing and damaged files.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = _data_uri
    return environment.get_template("report.html").render(
        generator=GENERATOR, name=name, subtitle=subtitle, tiles=tiles, notes=notes, sections=sections,
    )  # fmt: skip


def _data_uri(png: bytes | np.ndarray) -> str:
    if isinstance(png, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(png).save(file, format="PNG", optimize=True)
        png = file.getvalue()
    return "data:image/png;base64," + base64.b64encode(png).decode()
