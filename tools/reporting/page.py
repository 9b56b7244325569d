"""The report's page: one HTML file with its style inside, no script, nothing from elsewhere.

Every function here takes plain text and escapes it, except where a parameter is called `html` or `svg`.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

GENERATOR = '<meta name="generator" content="byolt report">'  # by which a page is known to be one of ours
# The policy lets a browser load nothing and run nothing, whatever the file names of a data set hold.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{generator}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #fff; --ink: #22262b; --soft: #626a73; --rule: #c9cdd2;
  --line: #e4e5e7; --accent: #2566b8; --second: #cf6a12; --good: #2c8a4b; --bad: #c62f2f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1d2125; --ink: #e4e7ea; --soft: #9aa3ad;
  --rule: #565e67; --line: #30363c; --accent: #6fa8f0; --second: #f0a05a; --good: #5dc07f; --bad: #f07070; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: .95rem; margin: 0 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .87rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
.tiles { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fit, minmax(8.3rem, 1fr)); margin: 1.2rem 0; }
.tile, figure, .note { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: .6rem .8rem; }
.tile.double { grid-column: span 2; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
figure { margin: 0; padding: .8rem .9rem .7rem; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto; stroke-linejoin: round; }
figure .wide { display: block; width: 100%; min-width: 34rem; border-radius: 4px; background: #fff; }
figcaption { margin-top: .4rem; }
.note { padding: .6rem .9rem; border-left: 4px solid var(--second); margin: .6rem 0; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
code, pre { font: .85rem/1.45 ui-monospace, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1rem; margin: .5rem 0 0; padding: 0;
  font-size: .85rem; }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .4rem; }
.sheet { border-spacing: 0; }
.sheet th, .sheet td { border: 0; padding: .2rem .25rem; text-align: center; vertical-align: top; }
.sheet td:first-child { padding-right: 1rem; }
.sheet img { display: block; width: 4.4rem; height: 4.4rem; object-fit: cover; border-radius: 5px;
  border: 3px solid var(--line); image-rendering: pixelated; margin: 0 auto; }
.sheet .right img { border-color: var(--good); }
.sheet .wrong img { border-color: var(--bad); border-style: dashed; }
.sheet span { display: block; width: 4.4rem; font-size: .74rem; line-height: 1.25; color: var(--soft);
  margin: .1rem auto 0; overflow-wrap: anywhere; }
.sheet .wrong span { color: var(--bad); }
@media (max-width: 40rem) { .sheet img, .sheet span { width: 3.05rem; } .sheet img { height: 3.05rem; }
  .sheet th, .sheet td { padding: .15rem .1rem; font-size: .75rem; } .sheet td:first-child { padding-right: .4rem; }
  .sheet span { font-size: .66rem; } th, td { padding-right: .6rem; } }
"""


class Picture(NamedTuple):
    """One image of the neighbours' sheet."""

    pixels: np.ndarray  # (H, W, 3) uint8
    caption: str
    verdict: str = ""  # "right", "wrong", or nothing where it is not known


def page(title: str, html: Iterable[str]) -> str:
    """The whole file from its parts."""
    return _PAGE.format(generator=GENERATOR, title=escape(title), style=_STYLE, body="\n".join(html))


def heading(name: str, subtitle: str) -> str:
    return f'<h1>{escape(name)}</h1>\n<p class="soft">{escape(subtitle)}</p>'


def section(title: str, html: Iterable[str], intro: str = "") -> str:
    """A titled part of the page."""
    first = f"<p>{escape(intro)}</p>\n" if intro else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{first}{chr(10).join(html)}\n</section>"


def tiles(numbers: Iterable[tuple[str, str]]) -> str:
    """Large numbers, each with what it is below: (number, meaning)."""
    cells = (
        f'<div class="tile{" double" * (len(n) > 9)}"><b>{escape(n)}</b><span>{escape(m)}</span></div>'
        for n, m in numbers
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def note(text: str) -> str:
    """Says what is missing, or what went wrong."""
    return f'<p class="note">{escape(text)}</p>'


def grid(html: Iterable[str], small: bool = False) -> str:
    """Figures side by side: on a wide screen two, or three small ones."""
    return f'<div class="grid{" small" * small}">\n{chr(10).join(html)}\n</div>'


def figure(title: str, svg: str, caption: str, legend: Mapping[str, str] | None = None) -> str:
    """A drawing with its title, a legend of names and colours, and a caption."""
    entries = "".join(
        f'<li><i style="background:{escape(color)}"></i>{escape(name)}</li>'
        for name, color in (legend or {}).items()
    )
    listed = f'<ul class="legend">{entries}</ul>\n' if entries else ""
    return f"<figure>\n<h3>{escape(title)}</h3>\n{svg}\n{listed}<figcaption>{escape(caption)}</figcaption>\n</figure>"


def picture(png: bytes, alt: str, caption: str) -> str:
    """A PNG file as a picture as wide as the page."""
    data = base64.b64encode(png).decode()
    image = f'<img class="wide" alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f'<figure><div class="scroll">{image}</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>'


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>\n" for name, value in rows)
    return f'<div class="scroll"><table>\n{cells}</table></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a head."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<tr>{top}</tr>\n{body}</table></div>'


def folded(summary: str, text: str) -> str:
    """Preformatted text behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def sheet(rows: Iterable[Sequence[Picture]]) -> str:
    """Rows of pictures: a query and its neighbours, the wrong ones marked by border, colour and a cross."""
    lines = []
    for query, *others in rows:
        lines.append("<tr>" + _cell(query) + "".join(map(_cell, others)) + "</tr>")
    body = "\n".join(lines)
    head = '<tr><th>query</th><th colspan="5">nearest first</th></tr>'
    return f'<figure class="scroll"><table class="sheet">\n{head}\n{body}\n</table></figure>'


def _cell(item: Picture) -> str:
    mark = {"wrong": "✗ ", "right": ""}.get(item.verdict, "")
    caption = escape(mark + item.caption)
    image = f'<img alt="{caption}" src="{_png(item.pixels)}">'
    return f'<td class="{escape(item.verdict)}">{image}<span>{caption}</span></td>'


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
