"""Paths as people type them: ~ for the home folder, braces and wildcards for several files, addresses of storage."""

import argparse
import difflib
import glob
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any

_SCHEME = r"(?:[a-z][a-z0-9+.-]*:/|(?:https?|s3|gs|az|hf|file|pipe):)"  # as people write it: also HTTP:/host
_URL = re.compile(rf"(?:^|,)\s*({_SCHEME})", re.I)
_MOST = 100_000  # names of one pattern; ImageNet has 1,000 shards at most
_COPIES = {  # by scheme, the command that makes a local copy
    "s3": "aws s3 cp --recursive",
    "gs": "gcloud storage cp --recursive",
    "http": "wget",
    "https": "wget",
    "hf": "hf download",
    "file": "nothing: write the path without file://",
    "pipe": "that command, its output written to a file",
}


class MissingDataError(ValueError):
    """There is nothing at a data set's path."""


def home_path(text: str) -> Path:
    """The path with a leading ~ expanded, which shells leave as it is in --out=~/x; a type for argparse.

    Raises:
        ArgumentTypeError: It is a URL, which would make a folder of that name.
    """
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{without_secrets(text)} must be a local or mounted path")
    return Path(os.path.expanduser(text))  # Path.expanduser refuses a ~ without such a user


def expand_home(path: str) -> str:
    """Expands a ~ at the beginning of a path, or of each of several paths separated by commas."""
    return re.sub(r"(^|,\s*)(~[^/,]*)", lambda found: found[1] + os.path.expanduser(found[2]), path)


def expand_pattern(text: str) -> list[str]:
    """The files of a pattern: {00..09} and {a,b} as in bash, then the matches of *, ? and [...], sorted.

    A path that exists is itself, whatever its name.

    Raises:
        MissingDataError: the pattern matches no file.
        ValueError: its braces have more than 100,000 names.
    """
    if os.path.exists(text):
        return [text]
    found: list[str] = []
    for name in expand_braces(text):
        special = not os.path.exists(name) and re.search(r"[*?[]", name)
        matches = sorted(glob.glob(name)) if special else [name]
        if not matches:
            raise MissingDataError(f"data path {text!r}: {name!r} matches no file{searched(name)}")
        found += matches
    return found


def is_url(text: str) -> bool:
    """Whether a path, or one of several separated by commas, is an address (s3://..., https:..., pipe:...).

    A local path of that name counts more.
    """
    return bool(_URL.search(text)) and not os.path.exists(text)


def local_path(text: str) -> str:
    """The path with ~ expanded, for a setting that names a folder or file to write.

    Raises:
        ValueError: It is a URL, which would make a folder of that name.
    """
    if is_url(text):
        raise ValueError("must be a local or mounted folder; only data.path and eval.path are read from URLs")
    return expand_home(text)


def copy_first(text: str) -> str:
    """The remedy for an address that is not read: how to copy it."""
    scheme = _URL.search(text)
    assert scheme
    tool = _COPIES.get(scheme[1].lower().rstrip(":/"), "your tool for this kind of storage")
    if re.search(r"\.(safetensors|pt|pth|zip|tar|beton)$", text) and "," not in text:
        tool = tool.removesuffix(" --recursive")  # of a single file it would copy nothing
    return f"copy it first, with {tool}"


def without_secrets(text: str) -> str:
    """The text, in which user names, passwords, queries and fragments of URLs are replaced by ***.

    A password may contain any character: all up to the last @ of a URL is hidden. So may a query, which ends at a
    closing quote, a colon before a space, or the end of the line. Fields of .beton files stay.
    """
    return "".join(map(_redacted, re.split(rf"(?<![a-z0-9+.-])(?={_SCHEME})", text, flags=re.I)))


def hide_secrets(settings: Any) -> Any:
    """Settings, which may be nested, whose URLs hold no secrets."""
    if isinstance(settings, dict):
        return {key: hide_secrets(value) for key, value in settings.items()}
    return without_secrets(settings) if isinstance(settings, str) else settings


def _redacted(text: str) -> str:
    """Redacts a text that begins with a URL; others, which have no scheme, stay."""
    shown = r"(?:\*\*\*|(?:image|label)=[\w.-]+)"  # hidden before, or a field
    end = r"(?=[\s'\",:]|$)"
    query = rf"([?#;])(?=\S)({shown}(?:&{shown})*{end}|.+?(?=['\"](?:[\s:;,.)]|$)|:\s|,?\s*$))"
    found = re.match(rf"({_SCHEME}[/\\]*)(.*@)?(.*?)(?:{query}|$)", text, re.I | re.M)
    if not found:
        return text
    scheme, user, place, mark, query = found.groups("")
    if mark:
        pairs = query.split("&")
        fields = [pair for pair in pairs if mark == "?" and re.fullmatch(r"(image|label)=[\w.-]+", pair)]
        query = "&".join(fields + ["***"] * (len(fields) < len(pairs)))
    return f"{scheme}{user and '***@'}{place}{mark}{query}{text[found.end() :]}"


def searched(path: str) -> str:
    """ " in FOLDER" for a relative path, which a message says is missing there."""
    return "" if os.path.isabs(path) else f" in {os.getcwd()}"


def nearest(path: Path) -> Path | None:
    """The entry beside a missing path whose name is most like its own."""
    close = difflib.get_close_matches(path.name, [beside.name for beside in path.parent.glob("*")], n=1)
    return path.with_name(close[0]) if close else None


def expand_braces(text: str) -> list[str]:
    """ "a{08..10}" -> ["a08", "a09", "a10"], as bash expands it."""
    done, left = [], [text]
    while left:
        name = left.pop()
        match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", name)
        if not match:
            done.append(name)
            continue
        first, last, words = match.groups()
        if words is None:
            step = 1 if int(first) <= int(last) else -1
            width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
            numbers = range(int(first), int(last) + step, step)
            parts = [f"{number:0{width}d}" for number in islice(numbers, _MOST + 1)]
        else:
            parts = words.split(",")
        left += [name[: match.start()] + part + name[match.end() :] for part in reversed(parts)]
        if len(left) + len(done) > _MOST:
            raise ValueError(f"data path {text!r}: the braces have more than {_MOST:,} names")
    return done
