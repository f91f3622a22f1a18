"""Files of a known format: where they are, and what is said of one that is not as it should be."""

from __future__ import annotations

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

TENTH = 10
"""Of training data without a validation split, every tenth example is for validation, from the first one on."""


LONGEST = 10_000_000
"""Characters of a CSV field; the csv module's own limit is shorter than some reviews."""


class DataError(ValueError):
    """A folder or a file is not what a loader reads."""


def fail(path: Path, line: int | None, what: str) -> NoReturn:
    """Raise DataError about a line of a file, numbered from 1, or about the whole file."""
    raise DataError(f"{path}:{line}: {what}" if line else f"{path}: {what}")


def choose(path: Path, formats: Mapping[str, str]) -> tuple[str, Path]:
    """Which format the data at `path` have, and their first file.

    formats: by name, the pattern of the file that is looked for, in a folder or as `path` itself; plain or .gz.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    looked_for = [f"{pattern} ({name})" for name, pattern in formats.items()]
    found = [
        (name, file)
        for name, pattern in formats.items()
        for file in files_in(path)
        if any(file.match(pattern + end) for end in ("", ".gz"))
    ]
    there = {file.name for _, file in found}
    # Some who unpack a file leave the .gz beside it, as torchvision does with MNIST's.
    found = [
        (name, file)
        for name, file in found
        if path == file or file.name.removesuffix(".gz") not in there - {file.name}
    ]
    if not found:
        raise DataError(f"{path}: looked for {', '.join(looked_for)}; found {_listing(path)}")
    if len(found) > 1:
        names = ", ".join(file.name for _, file in found)
        raise DataError(f"{path}: expected one of {', '.join(looked_for)}; found {names}: name the file")
    return found[0]


def files_in(path: Path) -> list[Path]:
    """The files of a folder, or the file itself."""
    try:
        return [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    except OSError as error:
        fail(path, None, f"cannot be read: {error.strerror}")


def beside(file: Path, name: str) -> Path:
    """The file of that name in the same folder, plain or .gz."""
    path = beside_if_there(file, name)
    if path is None:
        raise DataError(f"{file.parent}: looked for {name} beside {file.name}; found {_listing(file.parent)}")
    return path


def beside_if_there(file: Path, name: str) -> Path | None:
    """The same, or None."""
    plain = file.with_name(name.removesuffix(".gz"))
    return next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)


def _listing(path: Path, most: int = 12) -> str:
    """Names in a folder, for a message."""
    if path.is_file():
        return path.name
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """A plain or a .gz file, of which DataError says so if it can't be read to its end."""
    try:
        with cast("BinaryIO", gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # the latter two: a .gz that is cut off or broken
        fail(path, None, f"cannot be read: {error}")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Each line, without its end, which may be that of Windows, and its number from 1; without a byte order mark."""
    with open_binary(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                text = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode(encoding)
            except UnicodeDecodeError as error:
                fail(path, number, f"expected {encoding}: {error.reason}")
            yield number, text.removesuffix("\n").removesuffix("\r")


def fields_of(path: Path, number: int, text: str, separator: str, names: str) -> list[str]:
    """The fields of a line; `names` are theirs, with spaces between."""
    fields, expected = text.split(separator), names.split()
    if len(fields) != len(expected):
        fail(
            path, number, f"expected {len(expected)} fields ({names}), with {separator!r} between; got {len(fields)}"
        )
    return fields


def whole_number(path: Path, number: int, name: str, text: str) -> int:
    """A field that is a whole number of 64 bits."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not -(2**63) <= value < 2**63:
        fail(path, number, f"{name}: expected a whole number; got {text!r}")
    return value


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line and fields of each row; a row of several lines has the last one's number. All have as many fields."""
    csv.field_size_limit(LONGEST)
    reader = csv.reader((f"{text}\n" for _, text in lines(path)), strict=True)
    columns = 0
    try:
        for fields in reader:
            columns = columns or len(fields)
            if len(fields) != columns:
                fail(path, reader.line_num, f"expected {columns} columns, as above; got {len(fields)}")
            yield reader.line_num, fields
    except csv.Error as error:
        fail(path, reader.line_num, f"expected CSV: {error}")


def csv_table(path: Path, *columns: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and fields by name of each row under a header, which has these columns and may have others."""
    header: list[str] = []
    for number, fields in csv_rows(path):
        if header:
            yield number, dict(zip(header, fields, strict=True))
            continue
        header = fields
        missing = [name for name in columns if name not in header]
        if missing:
            fail(path, number, f"expected a header with {', '.join(columns)}; got {', '.join(header)}")
