"""Text files of rows: JSON lines, a JSON list, CSV and TSV. Long values (images in base64) stay in the file and are read again."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

from efficientvlm.checkpoints.files import open_plain, sha256
from efficientvlm.data.images import PICTURES
from efficientvlm.data.skips import Skips
from efficientvlm.data.tables import LONG, MemoryTable, encoded, encoded_list
from efficientvlm.errors import BadInput, shorten

INLINE = object()
LARGEST_ROW = 64 * 2**20  # bytes: what is held at once, pictures in base64 included
SKIPPED_AT_ONCE = 2**20
SEPARATORS = {".csv": ",", ".tsv": "\t"}
LONGEST_NAME = 200  # of a column
BOM = b"\xef\xbb\xbf"
Row = dict[str, Any]
Line = tuple[bytes | None, int]
"""A line of a file, or None for one that is too long to be held, and its bytes."""


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
            if is_long(value) or (isinstance(value, list) and any(map(is_long, value))):
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

    def images(self, row: int, name: str) -> list[bytes | Path]:
        value = self._values[name][row]
        return encoded_list(self._reread(row)[name] if value is INLINE else value, self.base, self.where(row))

    def where(self, row: int) -> str:
        return f"{self.path} line {self._lines[row]}"

    def _reread(self, row: int) -> Row:
        raise TypeError("a subclass says how")


def is_long(value: Any) -> bool:
    """Whether a value is not kept in memory: a picture, most likely."""
    return (isinstance(value, str) and len(value) > LONG) or isinstance(value, dict)


class JsonlTable(TextTable):
    """One JSON object a line."""

    def rows(self, file: IO[bytes], seen: Callable[[bytes], Any] = lambda line: None) -> Iterator[tuple[int, int, Row | BadInput]]:
        yield from json_rows(file, str(self.path), seen)

    def _reread(self, row: int) -> Row:
        with opened(self.path) as file:
            file.seek(self._offsets[row])
            found = json_row(file.readline(), self.where(row))
        if isinstance(found, BadInput):
            raise found
        return found


class CsvTable(TextTable):
    """A header, then one row a record; an empty cell is none. `.csv` has commas and quoted cells, `.tsv` has tabs and no quoting."""

    def rows(self, file: IO[bytes], seen: Callable[[bytes], Any] = lambda line: None) -> Iterator[tuple[int, int, Row | BadInput]]:
        return csv_rows(file, str(self.path), seen, keep_header=self._keep_header)

    def _keep_header(self, header: list[str]) -> None:
        self._header = header
        for name in header:
            self._values.setdefault(name, [])

    def _reread(self, row: int) -> Row:
        with opened(self.path) as file:
            file.seek(self._offsets[row])
            record = next(_records(file, str(self.path), lambda line: None, Header(self._header, first=False)))
        return dict(zip(self._header, map(cell, record.cells), strict=True))


@dataclass
class Header:
    """The columns of a CSV file, once they are known."""

    names: list[str] = field(default_factory=list)
    first: bool = True
    """Whether the next line is the first of the file."""


@dataclass
class Record:
    """Cells of a CSV file, the lines they stand in, and what is wrong with them, if anything is."""

    cells: list[str]
    lines: list[Line]
    problem: str = ""


def json_rows(file: IO[bytes], path: str, seen: Callable[[bytes], Any] = lambda line: None) -> Iterator[tuple[int, int, Row | BadInput]]:
    """Offset, line number and row (or why it is none) of a file of JSON lines."""
    offset = 0
    for number, (line, size) in enumerate(bounded(file, seen), 1):
        if line is None:
            yield offset, number, BadInput(f"{path} line {number}", too_long(size), "write one JSON object a line")
        elif line.strip():
            yield offset, number, json_row(line, f"{path} line {number}")
        offset += size


def bounded(file: IO[bytes], seen: Callable[[bytes], Any]) -> Iterator[Line]:
    """Lines and their bytes; None for one of more than `LARGEST_ROW`, which is passed over without being held. `seen` gets every byte."""
    while line := file.readline(LARGEST_ROW):
        seen(line)
        size = len(line)
        if size < LARGEST_ROW or line.endswith(b"\n"):
            yield line, size
            continue
        while not line.endswith(b"\n") and (line := file.readline(SKIPPED_AT_ONCE)):
            seen(line)
            size += len(line)
        yield None, size


def too_long(size: int) -> str:
    return f"it has {size:,} bytes, a row at most {LARGEST_ROW:,}"


def csv_rows(
    file: IO[bytes],
    path: str,
    seen: Callable[[bytes], Any] = lambda line: None,
    keep_header: Callable[[list[str]], None] = lambda header: None,
) -> Iterator[tuple[int, int, Row | BadInput]]:
    """Offset, line number and row (or why it is none) of a CSV or, by the name `path`, TSV file."""
    header = Header()
    offset, number = 0, 1
    for record in _records(file, path, seen, header):
        where = f"{path} line {number}"
        if not header.names:
            if record.cells or record.problem:
                _check_header(record, path)
                header.names = [name.strip() for name in record.cells]
                keep_header(header.names)
        elif record.problem:
            yield offset, number, BadInput(where, record.problem, "mend or remove the row")
        elif not all(map(is_unicode, record.cells)):
            yield offset, number, BadInput(where, "it is not UTF-8 text", "save the file as UTF-8")
        elif record.cells:
            yield offset, number, dict(zip(header.names, map(cell, record.cells), strict=True))
        offset, number = offset + sum(size for _, size in record.lines), number + len(record.lines)


def _records(file: IO[bytes], path: str, seen: Callable[[bytes], Any], header: Header) -> Iterator[Record]:
    return (_tab_records if separator(path) == "\t" else _comma_records)(file, seen, header)


def _tab_records(file: IO[bytes], seen: Callable[[bytes], Any], header: Header) -> Iterator[Record]:
    """A line is a row and a tab ends a cell, whatever quotes there are.

    Only a cell that has doubled quotes inside its outer ones was plainly quoted by a program, and is read as it was meant.
    """
    for line, size in bounded(file, seen):
        if line is None:
            yield Record([], [(line, size)], too_long(size))
            continue
        cells = _text(line, header).rstrip("\r\n").split("\t")
        cells = [_unquoted(text) if text[:1] == '"' else text for text in cells] if cells != [""] else []
        problem = _miscounted(cells, header)
        yield Record(cells, [(line, size)], f"{problem} (a cell of a .tsv holds no tab and no line end)" if problem else "")


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    return inner.replace('""', '"') if len(text) > 3 and text[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "") else text


def _comma_records(file: IO[bytes], seen: Callable[[bytes], Any], header: Header) -> Iterator[Record]:
    """Records of CSV as RFC 4180 has it.

    One that goes wrong in a later line than its first, as after a quote that is not closed, costs its first line only; so does one that
    swallows lines which are rows themselves, because another stray quote closes it. A line below that may be the end of such a cell, for
    it has a quote too many and does not look like a row, is refused as well.
    """
    csv.field_size_limit(LARGEST_ROW)
    source = bounded(file, seen)
    taken: list[Line] = []  # lines of the record that is being read
    again: list[Line] = []  # lines to be read once more, the next one last

    def lines() -> Iterator[str]:
        size = 0
        while line := again.pop() if again else next(source, None):
            taken.append(line)
            size += line[1]
            if line[0] is None or size > LARGEST_ROW:
                raise csv.Error(too_long(size))
            yield _text(line[0], header)

    reader = csv.reader(lines(), strict=True)
    before: list[str] = []
    torn = False  # whether a cell that was begun above may go on
    while True:
        taken.clear()
        try:
            cells = next(reader)
            problem = _miscounted(cells, header)
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = [], f"it is not CSV ({error})"
        if not problem and any(_is_row(line, before) for line in taken[1:]):
            problem = f"a quotation mark opens a cell of {len(taken)} lines, of which some are rows themselves"
        if problem:
            torn = _quotes(taken) > 0
        elif torn:
            torn = bool(again)
            if len(taken) == 1 and _quotes(taken) % 2 and not _is_row(taken[0], before):
                problem = "its quotation mark may close a cell that a line above opens"
        if header.names:
            if problem:
                again += taken[:0:-1]
                del taken[1:]
            elif cells:
                before = cells
        if problem or len(taken) > 1:
            reader = csv.reader(lines(), strict=True)
        yield Record(cells, list(taken), problem)


def _quotes(lines: list[Line]) -> int:
    return sum((line or b"").count(b'"') for line, _ in lines)


def _is_row(line: Line, before: list[str]) -> bool:
    """Whether a line is a row by itself: as many cells as the record before, and one of the same shape ahead of its first quotation mark.

    What stands behind that may be a record's that began in another line.
    """
    text = (line[0] or b"").decode("utf-8", "surrogateescape").rstrip("\r\n")
    ahead, quote, _ = text.partition('"')
    cells = ahead.split(",")[: -1 if quote else None]
    return text.count(",") + 1 == len(before) and any(
        _shape(one) == _shape(other) and any(map(str.isalnum, one)) for one, other in zip(cells, before, strict=False)
    )


def _shape(text: str) -> str:
    return re.sub(r"\d+", "0", text)


def _text(line: bytes, header: Header) -> str:
    if header.first:
        header.first, line = False, line.removeprefix(BOM)
    return line.decode("utf-8", "surrogateescape")


def _miscounted(cells: list[str], header: Header) -> str:
    return "" if not header.names or len(cells) in (0, len(header.names)) else f"it has {len(cells)} cells, the header {len(header.names)}"


def _check_header(record: Record, path: str) -> None:
    """:class:`BadInput` for a first line that names no columns, or what a spreadsheet saves by other choices: encoding, separator."""
    line, cells, wanted = record.lines[0][0] or b"", record.cells, separator(path)
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 3 * line.count(0) > len(line):
        raise BadInput(f"data {path}", "it is UTF-16 text", "save the file as UTF-8")
    other = next((mark for mark in ";,\t|" if mark != wanted and len(cells) == 1 and mark in cells[0]), None)
    if other:
        names = {";": "semicolons", ",": "commas", "\t": "tabs", "|": "bars"}
        fix = "save it as CSV with commas, or with tabs as .tsv"
        raise BadInput(f"data {path}", f"its columns are separated by {names[other]}, {names[wanted]} are read", fix)
    names_ = [name.strip() for name in cells]
    fix = "name the columns in the first line"
    if record.problem or len(set(names_)) < len(names_) or not all(map(is_unicode, names_)):
        raise BadInput(f"data {path}", f"its first line is no header of distinct column names ({shorten(', '.join(names_))})", fix)
    if value := next((name for name in names_ if len(name) > LONGEST_NAME or name.lower().endswith(PICTURES)), None):
        raise BadInput(f"data {path}", f"its first line is no header, it has values ({shorten(value, 60)})", fix)


def separator(path: str) -> str:
    """What stands between two cells of a file of this name."""
    return SEPARATORS.get(Path(path.partition("?")[0]).suffix.lower(), ",")


def cell(text: str) -> str | None:
    """A cell of a CSV file: None if empty."""
    return text or None


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
    parsed = read_json(path)
    if not isinstance(parsed, list):
        raise BadInput(f"data {path}", "it is no list of objects", "JSON lines belong in a file called .jsonl")
    for number, entry in enumerate(parsed, 1):
        if isinstance(entry, dict):
            rows.append(entry)
            numbers.append(number)
        else:
            skips.add(BadInput(f"{path} entry {number}", "it is not a JSON object", "write a list of objects"))
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    return MemoryTable(columns, path.parent, lambda row: f"{path} entry {numbers[row]}", sha256(path))


def read_json_list(path: Path, key: str | None = None) -> list[Any]:
    """The list in a JSON file, or the one it holds under `key`.

    Raises:
        BadInput: as :func:`read_json`, or no such list.
    """
    parsed = read_json(path)
    found = parsed.get(key) if key and isinstance(parsed, dict) else parsed
    if not isinstance(found, list):
        what = f"it holds no list called {key}" if key else "it is no list of objects"
        raise BadInput(f"data {path}", what, "JSON lines belong in a file called .jsonl" if not key else "")
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        BadInput: unreadable, not JSON, or larger than half of the free memory, as it is read as a whole.
    """
    with opened(path) as file:
        size, most = os.fstat(file.fileno()).st_size, free_memory() // 2
        if size > most:
            why = f"it has {size:,} bytes and is read as a whole, for which half of the free memory, {most:,} bytes, is not enough"
            raise BadInput(f"data {path} is too large", why, "write JSON lines, one object a line, in a file called .jsonl")
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
    return parsed


def first_mark(path: Path) -> bytes:
    """The first character of a text file that is no space; none of one that has only spaces at its beginning, or cannot be read."""
    try:
        with opened(path) as file:
            return file.read(4096).removeprefix(BOM).lstrip()[:1]
    except BadInput:
        return b""


def free_memory() -> int:
    """Bytes that a process can still take on this machine."""
    free = [2**63]
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # of a container
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    with suppress(OSError, ValueError, AttributeError):  # what there is, where nothing says what is free
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free)


def lines_of(text: str) -> list[str]:
    """The lines of a text, as Python reads them from a file; `str.splitlines` ends some at marks that belong into a line."""
    return io.StringIO(text, newline=None).read().removesuffix("\n").split("\n")


def caption_lines(content: bytes) -> list[str]:
    """The captions in a `.txt`, one a line; :class:`UnicodeDecodeError` if it is not UTF-8."""
    return [line.strip() for line in lines_of(content.decode("utf-8-sig")) if line.strip()]


def is_unicode(text: str) -> bool:
    """False for text with lone surrogates, which no file and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes.

    Raises:
        BadInput: a folder, pipe or device, or a file that cannot be opened or read on.
    """
    try:
        file = open_plain(path)
    except BadInput as error:
        raise BadInput(f"data {path} cannot be read", error.why, error.fix) from None
    with file:
        try:
            yield file
        except OSError as error:
            raise BadInput(f"data {path} cannot be read", (error.strerror or "unknown reason").lower(), "check the path") from None
