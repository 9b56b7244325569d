"""URLs of remote data sets: which are read, their parts, and what is refused before any request."""

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from byolt.files.paths import copy_first, expand_braces, is_url, without_secrets

SCHEMES = ("s3", "gs", "az", "http", "https")


@dataclass(frozen=True)
class RemotePath:
    """A data set at a URL."""

    text: str  # what the user wrote
    folder: str  # URL of the folder, without a final slash
    names: list[str] = field(default_factory=list)  # of the files, in order; empty for the whole folder
    fields: dict[str, str] = field(default_factory=dict)  # of .beton files, see `formats.beton.split_path`


def is_remote(text: str | os.PathLike[str]) -> bool:
    """Whether the text is a URL, or a pipe of WebDataset; a local path of that name counts more."""
    return is_url(os.fspath(text))


def parse(text: str) -> RemotePath:
    """Parses "s3://bucket/train", "https://host/shard-{000000..000099}.tar" or "gs://bucket/a.beton,gs://bucket/b.beton".

    Raises:
        ValueError: the scheme is not read, the URL holds a password or a query, it names files of several folders, or
            obstore is not installed. A message never repeats a password or a query.
    """
    shown = without_secrets(text)
    text = re.sub(r"(^|,)\s*([A-Za-z0-9+.-]+):", lambda found: f"{found[1]}{found[2].lower()}:", text)
    scheme = re.match("([a-z0-9+.-]+):", text)
    if scheme and scheme[1] not in SCHEMES:
        raise ValueError(
            f"data path {shown!r}: URLs are read as {', '.join(SCHEMES)} (docs/remote.md): {copy_first(text)}"
        )
    if "@" in text:
        raise ValueError(
            f"data path {shown!r} holds a user name or a password: remove it, and give credentials through the "
            "environment (docs/remote.md); write an @ in the name of a folder as %40"
        )
    text, mark, query = text.partition("?")
    fields = dict(part.partition("=")[::2] for part in query.split("&")) if mark else {}
    if mark and not (
        text.endswith(".beton") and fields.keys() <= {"image", "label"} and all(fields.values())
    ):
        raise ValueError(
            f"data path {shown!r}: a query after the question mark (a signature, a token) is not read, only "
            "image=FIELD and label=FIELD after .beton: give credentials through the environment (docs/remote.md)"
        )
    urls = [url for part in re.split(r",(?![^{}]*\})", text) for url in expand_braces(part.strip())]
    for url in urls:
        _check(url, shown)
    if any("*" in url for url in urls):
        raise ValueError(
            f"data path {shown!r}: a URL has no wildcards: name the folder, or use braces {{00..09}}"
        )
    _require_obstore(shown)
    urls = [url.rstrip("/") for url in urls]
    files = [url for url in urls if url.endswith((".tar", ".beton"))]
    if not files and len(urls) == 1 and urlsplit(urls[0]).netloc:
        return RemotePath(shown, urls[0])
    folders = {url.rpartition("/")[0] for url in urls}
    if files != urls or len(folders) != 1:
        raise ValueError(f"data path {shown!r}: name one folder, or .tar or .beton files of one folder")
    return RemotePath(shown, folders.pop(), [url.rpartition("/")[2] for url in urls], fields)


def _check(url: str, shown: str) -> None:
    """Refuses a URL that has no host, an invalid one, or parts that name no object."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in SCHEMES and url.startswith(f"{parts.scheme}://") and parts.port != 0
        sound = sound and bool(re.fullmatch(r"[\w.:-]+", parts.hostname or ""))
    except ValueError:  # of its host or port
        sound = False
    if not sound:
        raise ValueError(
            f"data path {shown!r} is not a valid URL: name one folder as scheme://host/folder, with a port up to 65535"
        )
    if "#" in url or ";" in url:
        raise ValueError(
            f"data path {shown!r}: what follows # or ; does not name an object: remove it, or write the characters "
            "as %23 and %3B"
        )


def _require_obstore(shown: str) -> None:
    if importlib.util.find_spec("obstore") is None:
        raise ValueError(
            f"data path {shown!r}: URLs are read with the library obstore, which {sys.executable} does not have: "
            "pip install -e '.[remote]'"
        )
