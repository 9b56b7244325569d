"""Labels that text states: the .cls of a sample, or a list with a line for each image."""

import csv
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

UNLABELED = -1
_LARGEST = 2**31 - 1  # a label is an int32
_BOX = re.compile(r"(\S+)( -?\d+){4}( .*)?")  # class and box of ImageNet's LOC_*_solution.csv


def class_names(labels: Iterable[str | None]) -> list[str] | None:
    """The class names that a data set's labels are, sorted; None if most of the labels are integers."""
    stated = [text for text in labels if text not in (None, "", "-1")]
    if 2 * sum(map(_is_integer, stated)) >= len(stated):
        return None
    return sorted(set(stated))


def numbers_of(classes: list[str] | None) -> dict[str, int] | None:
    """The number of each class name, for `label_number`."""
    return None if classes is None else {name: number for number, name in enumerate(classes)}


def label_number(text: str | None, numbers: dict[str, int] | None) -> int:
    """The label that a text states: UNLABELED for None or "-1", the number of a name, or an integer.

    Raises:
        ValueError: It is not an integer, or not one of the names.
    """
    if text is None or text == "-1":
        return UNLABELED
    if numbers is None:
        if not _is_integer(text):
            raise ValueError(f"its label is {text!r}, not an integer")
        return int(text)
    if text not in numbers:
        raise ValueError(f"its label is {text!r}, not a class name")
    return numbers[text]


def _is_integer(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) <= _LARGEST


def listed_labels(path: Path, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Reads a list of lines "name label", separated by a comma, a tab or a space; a heading may be first.

    A name is that of a file, one of the relative `names`, with or without its folder and extension.

    Returns:
        The label of each file that is listed, and the names in the list that are not of a file.

    Raises:
        ValueError: It cannot be read, lists no file, has a line without a label, or two labels for a file.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--labels {path} cannot be read: {error}") from None
    known: dict[str, str] = {}  # "" for a name that several files share
    for name in names:
        base = name.rpartition("/")[2]
        for alias in {name, base, _stem(name), _stem(base)}:
            known[alias] = name if known.get(alias, name) == name else ""
    known |= {name: name for name in names}
    rows = {number: line for number, line in enumerate(lines, 1) if line.strip()}

    def fit(separator: str | None) -> int:
        """How many names and labels it finds."""
        found = [_fields(line, separator) for line in rows.values()]
        return sum((name in known) + bool(label) for name, label in found)

    separator = max((",", "\t", None), key=fit)
    labels: dict[str, str] = {}
    unmatched = []
    for place, (number, line) in enumerate(rows.items()):
        entry, label = _fields(line, separator)
        if not label:
            raise ValueError(f"--labels {path}, line {number}: {line[:80]!r} is not a name and a label")
        if box := _BOX.fullmatch(label):
            label = box[1]
        if entry not in known:
            unmatched += [entry] if place else []  # the first may be a heading
        elif not known[entry]:
            raise ValueError(
                f"--labels {path}, line {number}: several files are named {entry!r}: add their folders"
            )
        elif labels.setdefault(known[entry], label) != label:
            raise ValueError(f"--labels {path}, line {number}: {entry!r} has another label above")
    if not labels:
        raise ValueError(f"--labels {path} names none of the {len(names)} files, for example {names[0]}")
    return labels, unmatched


def _fields(line: str, separator: str | None) -> tuple[str, str]:
    """Name and label; "" for what is missing."""
    try:
        fields = next(csv.reader([line])) if separator == "," else line.split(separator, 1)
    except csv.Error:  # a field of more than 128 KB
        fields = []
    name, label = [*map(str.strip, fields), "", ""][:2]
    return name, label


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name
