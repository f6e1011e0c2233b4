"""Text files of rows: JSON lines, a JSON list, CSV and TSV. Long values (images in base64) stay in the file and are read again."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import LONG, MemoryTable, encoded
from efficientvlm.errors import BadInput

INLINE = object()
LARGEST_CELL = 2**31 - 1
BOM = b"\xef\xbb\xbf"
Row = dict[str, Any]


class TextTable:
    """Rows of a text file; an image is a path relative to the file, or base64."""

    licence = "unknown"

    def __init__(self, path: Path, skips: Skips) -> None:
        self.path, self.base = path, path.parent
        self._offsets: list[int] = []
        self._lines: list[int] = []
        self._values: dict[str, list[Any]] = {}
        digest = hashlib.sha256()
        with opened(path) as file:
            for offset, number, row in self.rows(file, digest.update):
                if isinstance(row, BadInput):
                    skips.add(row)
                else:
                    self._add(row, offset, number)
        self.digest = digest.hexdigest()
        for values in self._values.values():
            values.extend([None] * (len(self) - len(values)))
        self.columns = list(self._values)

    def rows(self, file: IO[bytes], seen: Callable[[bytes], Any] = lambda line: None) -> Iterator[tuple[int, int, Row | BadInput]]:
        """Offset, line number (from 1) and row, or why it is none; `seen` gets every byte."""
        raise TypeError("a subclass says what a row looks like")

    def _add(self, row: Row, offset: int, number: int) -> None:
        position = len(self._offsets)
        for name, value in row.items():
            if (isinstance(value, str) and len(value) > LONG) or isinstance(value, dict):
                value = INLINE
            values = self._values.setdefault(name, [])
            values.extend([None] * (position - len(values)))
            values.append(value)
        self._offsets.append(offset)
        self._lines.append(number)

    def __len__(self) -> int:
        return len(self._offsets)

    def column(self, name: str) -> list[Any]:
        return [self._reread(row)[name] if value is INLINE else value for row, value in enumerate(self._values[name])]

    def image(self, row: int, name: str) -> bytes | Path:
        value = self._values[name][row]
        return encoded(self._reread(row)[name] if value is INLINE else value, self.base, self.where(row))

    def where(self, row: int) -> str:
        return f"{self.path} line {self._lines[row]}"

    def _reread(self, row: int) -> Row:
        raise TypeError("a subclass says how")


class JsonlTable(TextTable):
    """One JSON object a line."""

    def rows(self, file: IO[bytes], seen: Callable[[bytes], Any] = lambda line: None) -> Iterator[tuple[int, int, Row | BadInput]]:
        offset = 0
        for number, line in enumerate(file, 1):
            seen(line)
            if line.strip():
                yield offset, number, json_row(line, f"{self.path} line {number}")
            offset += len(line)

    def _reread(self, row: int) -> Row:
        with opened(self.path) as file:
            file.seek(self._offsets[row])
            found = json_row(file.readline(), self.where(row))
        if isinstance(found, BadInput):
            raise found
        return found


class CsvTable(TextTable):
    """A header, then one row a record, separated by commas or, in `.tsv`, by tabs; a cell may be a JSON list, and an empty one is none."""

    def rows(self, file: IO[bytes], seen: Callable[[bytes], Any] = lambda line: None) -> Iterator[tuple[int, int, Row | BadInput]]:
        return csv_rows(file, str(self.path), seen, keep_header=self._keep_header)

    def _keep_header(self, header: list[str]) -> None:
        self._header = header
        for name in header:
            self._values.setdefault(name, [])

    def _reread(self, row: int) -> Row:
        with opened(self.path) as file:
            file.seek(self._offsets[row])
            cells = next(csv.reader((line.decode("utf-8") for line in file), **dialect(str(self.path))))
        return {name: cell(text) for name, text in zip(self._header, cells, strict=True)}


def csv_rows(
    file: IO[bytes],
    path: str,
    seen: Callable[[bytes], Any] = lambda line: None,
    keep_header: Callable[[list[str]], None] = lambda header: None,
) -> Iterator[tuple[int, int, Row | BadInput]]:
    """Offset, line number and row (or why it is none) of a CSV or, by the name `path`, TSV file.

    A row that goes wrong in a later line than its first, as after a quote that is not closed, costs its first line only.
    """
    csv.field_size_limit(LARGEST_CELL)
    taken: list[bytes] = []  # lines of the row that is being read
    again: list[bytes] = []  # lines to be read once more, the next one last

    def lines() -> Iterator[str]:
        while again or (line := next(file, b"")):
            if again:
                line = again.pop()
            else:
                seen(line)
            taken.append(line)
            yield (line.removeprefix(BOM) if number + len(taken) == 2 else line).decode("utf-8", "surrogateescape")

    offset, number = 0, 1
    reader = csv.reader(lines(), **dialect(path))
    header: list[str] | None = None
    while True:
        taken.clear()
        try:
            cells = next(reader)
            problem = "" if header is None or len(cells) in (0, len(header)) else f"it has {len(cells)} cells, the header {len(header)}"
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"it is not CSV ({error})"
        if header is None and (cells or problem):
            _check_header(taken, cells, path)
            header = [name.strip() for name in cells]
            if problem or len(set(header)) < len(header) or not all(map(is_unicode, header)):
                raise BadInput(f"data {path}", "its first line is no header of distinct column names", "name the columns in the first line")
            keep_header(header)
        elif problem:
            again += taken[:0:-1]
            del taken[1:]
            reader = csv.reader(lines(), **dialect(path))
            yield offset, number, BadInput(f"{path} line {number}", problem, "mend or remove the row")
        elif not all(map(is_unicode, cells)):
            yield offset, number, BadInput(f"{path} line {number}", "it is not UTF-8 text", "save the file as UTF-8")
        elif cells and header is not None:
            yield offset, number, {name: cell(text) for name, text in zip(header, cells, strict=True)}
        offset, number = offset + sum(map(len, taken)), number + len(taken)


def _check_header(lines: list[bytes], cells: list[str], path: str) -> None:
    """:class:`BadInput` for what a spreadsheet saves by other choices: another encoding, another separator."""
    if lines[0].startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * lines[0].count(0) > len(lines[0]):
        raise BadInput(f"data {path}", "it is UTF-16 text", "save the file as UTF-8")
    wanted = dialect(path)["delimiter"]
    other = next((mark for mark in ";,\t|" if mark != wanted and len(cells) == 1 and mark in cells[0]), None)
    if other:
        names = {";": "semicolons", ",": "commas", "\t": "tabs", "|": "bars"}
        fix = "save it as CSV with commas, or with tabs as .tsv"
        raise BadInput(f"data {path}", f"its columns are separated by {names[other]}, {names[wanted]} are read", fix)


def dialect(path: str) -> dict[str, Any]:
    return {"delimiter": "\t" if path.endswith(".tsv") else ",", "strict": True}


def cell(text: str) -> Any:
    """A cell of a CSV file: None if empty, a list if it is one in JSON, else its text."""
    if not text:
        return None
    if text.startswith("[") and text.rstrip().endswith("]"):
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return found if isinstance(found, list) and is_unicode(json.dumps(found, ensure_ascii=False)) else text
    return text


def json_row(line: bytes, where: str) -> Row | BadInput:
    """The JSON object in a line, or why there is none."""
    fix = "write one JSON object a line"
    try:
        parsed = json.loads(line.removeprefix(BOM).decode("utf-8"))
        usable = b"\\u" not in line or is_unicode(json.dumps(parsed, ensure_ascii=False))
    except UnicodeDecodeError:
        return BadInput(where, "it is not UTF-8 text", "save the file as UTF-8")
    except RecursionError:
        return BadInput(where, "it is not JSON (nested too deeply)", fix)
    except ValueError as error:
        return BadInput(where, f"it is not JSON ({error})", fix)
    if not isinstance(parsed, dict):
        return BadInput(where, "it is not a JSON object", fix)
    return parsed if usable else BadInput(where, "it holds half of a surrogate pair", "save the file as UTF-8")


def json_list(path: Path, skips: Skips) -> MemoryTable:
    """A file that is one JSON list of objects.

    Raises:
        BadInput: it is not.
    """
    rows, numbers = [], []
    for number, entry in enumerate(read_json_list(path), 1):
        if isinstance(entry, dict):
            rows.append(entry)
            numbers.append(number)
        else:
            skips.add(BadInput(f"{path} entry {number}", "it is not a JSON object", "write a list of objects"))
    names = list(dict.fromkeys(name for row in rows for name in row))
    with opened(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return MemoryTable(
        {name: [row.get(name) for row in rows] for name in names}, path.parent, lambda row: f"{path} entry {numbers[row]}", digest
    )


def read_json_list(path: Path, key: str | None = None) -> list[Any]:
    """The list in a JSON file, or the one it holds under `key`.

    Raises:
        BadInput: unreadable, not JSON, or no such list.
    """
    with opened(path) as file:
        content = file.read()
    try:
        parsed = json.loads(content.removeprefix(BOM).decode("utf-8"))
        if b"\\u" in content and not is_unicode(json.dumps(parsed, ensure_ascii=False)):
            raise BadInput(f"data {path}", "it holds half of a surrogate pair", "save the file as UTF-8")
    except UnicodeDecodeError:
        raise BadInput(f"data {path}", "it is not UTF-8 text", "save the file as UTF-8") from None
    except RecursionError:
        raise BadInput(f"data {path}", "it is not JSON (nested too deeply)", "write a list of flat objects") from None
    except ValueError as error:
        raise BadInput(f"data {path}", f"it is not JSON ({error})", "JSON lines belong in a file called .jsonl") from None
    found = parsed.get(key) if key and isinstance(parsed, dict) else parsed
    if not isinstance(found, list):
        what = f"it holds no list called {key}" if key else "it is no list of objects"
        raise BadInput(f"data {path}", what, "JSON lines belong in a file called .jsonl" if not key else "")
    return found


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which no file and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def opened(path: Path) -> io.BufferedReader:
    """`path`, open for reading bytes.

    Raises:
        BadInput: it cannot be.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise BadInput(f"data {path} cannot be read", (error.strerror or "unknown reason").lower(), "check the path") from None
