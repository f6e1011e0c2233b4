"""How sound files are spoilt: as bytes, as JSON, as tensors, and as what is no file. Every draw comes from the case's seed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Draw = random.Random

DEEP = 3000
SCALARS: list[Callable[[Draw], Any]] = [
    lambda _: None,
    lambda draw: draw.choice([True, False]),
    lambda draw: draw.choice([0, 1, -1, 2, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30]),
    lambda draw: draw.choice([float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324, -0.0, 0.5, 1.0, 1e-9]),
    lambda draw: draw.choice([10**400, -(10**400), 10**4000, 3_000_000_000, 20_000_000, 300_000_000, 10_000]),
    lambda draw: draw.choice(["", " ", "x", "\0", "é", "e\u0301", "\u202e", "\ufeff", "红", "😀", "a\nb", "\r", "\x1b]0;x\x07", "\x9b31m"]),
    lambda draw: draw.choice(
        ["\ud800", "../../x", "/dev/zero", "/etc/passwd", "/", ".", "..", "~", "~nobody/x", "file:///etc/passwd", "C:\\x"]
    ),
    lambda draw: draw.choice(["1", "-1", "1e5", "0x10", "true", "null", "nan", "inf", "1_000", "٣", "12,5", "2001-99-99", "9" * 5000]),
    lambda draw: draw.choice(
        ["a" * 300, "a" * 100_000, "word " * 20_000, "<b>x</b>", "[bold]x", "[/x]", "%s%n", "{0}", "${HOME}", "$(id)", "`id`"]
    ),
    lambda draw: draw.choice(
        ["*", "?", "[", "[ab", "**", "a**b", "{a,b}", "{1..999999999}", "::{1..2}", "stream:", "hub:", "bundled:", "bundled:../x"]
    ),
    lambda draw: draw.choice([[], {}, [[]], [None], {"": ""}, [1, "a", None], {"a": {"b": 1}}, [[1, 2], [3]], [{}], [True]]),
    lambda draw: list(range(draw.choice([3, 1000, 20_000]))),
    lambda draw: {str(n): n for n in range(draw.choice([3, 1000, 20_000]))},
    lambda draw: nested(draw.choice([5, 200, DEEP]), draw.choice("ld")),
]


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "l" else {"a": value}
    return value


def scalar(draw: Draw) -> Any:
    return draw.choice(SCALARS)(draw)


def text(draw: Draw) -> str:
    """An argument of a command line: no NUL, which the system does not let through."""
    value = scalar(draw)
    said = value if isinstance(value, str) else dump(value)
    said = said.replace("\0", "")[: 1 << 16]
    return os.fsdecode(said.encode("utf-8", "replace") + draw.choice([b"", b"", b"", b"\xff", b"\xed\xa0\x80"]))


def dump(value: Any) -> str:
    """JSON of any depth and any number."""
    try:
        return json.dumps(value)
    except (RecursionError, ValueError):  # too deep, or a number of too many digits, for the writer
        pass
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{dump(one)}" for key, one in value.items()) + "}" if _flat(value) else _deep(value)
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]" if _flat(value) else _deep(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**4000:
        return ("-" * (value < 0)) + "1" + "0" * 4000
    return json.dumps(value) if not isinstance(value, int) or isinstance(value, bool) else _digits(value)


def _digits(value: int) -> str:
    return str(value) if abs(value) < 10**4000 else ("-" * (value < 0)) + "1" + "0" * 4000


def _flat(value: Any) -> bool:
    depth = 0
    while isinstance(value, dict | list) and value and depth < 100:
        value, depth = next(iter(value.values() if isinstance(value, dict) else value)), depth + 1
    return depth < 100


def _deep(value: Any) -> str:
    before, after = "", ""
    while isinstance(value, dict | list) and value:
        before, after = (before + "[", "]" + after) if isinstance(value, list) else (before + '{"a":', "}" + after)
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return before + json.dumps(value) + after


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values inside JSON, of long lists only to the first few."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, one in list(items)[:200]:
        found += places(one, (*path, key))
    return found


def respelt(draw: Draw, value: Any) -> Any:
    """Something near: of another type, or scaled."""
    if isinstance(value, bool) or value is None:
        return draw.choice([str(value).lower(), int(bool(value)), [value], not value])
    if isinstance(value, int | float):
        return draw.choice(
            [-value, value * 1000, value + 1, value - 1, str(value), [value], value / 2, 0, float(value), {"value": value}, value * 10**9]
        )
    if isinstance(value, str):
        return draw.choice(
            [
                value + "x",
                value[:-1],
                value.upper(),
                [value],
                value * 1000,
                {"value": value},
                value + "\0",
                f" {value} ",
                value.encode().hex(),
            ]
        )
    if isinstance(value, list):
        return draw.choice([value * 2, value[:-1], value[::-1], dict(enumerate(map(str, value))), [value], value * 500, [*value, None]])
    return draw.choice(
        [[value], list(value.items())[:9], {key.upper(): one for key, one in value.items()}, {**value, "extra": 1}, list(value)]
    )


def changed(draw: Draw, value: Any, under: tuple[Any, ...] = ()) -> Any:
    """A copy of JSON in which one value, below `under`, is another, is missing, or has a companion."""
    path = draw.choice([path for path in places(value) if path[: len(under)] == under] or [()])
    if not path:
        return scalar(draw)
    copy = json.loads(json.dumps(value))
    target = copy
    for key in path[:-1]:
        target = target[key]
    kind, last = draw.randrange(8), path[-1]
    if kind == 0:
        del target[last]
    elif kind == 1 and isinstance(target, dict):
        target[draw.choice(["extra", "", "__class__", str(last) + " ", str(last).upper(), "auto_map", "_name_or_path"])] = scalar(draw)
    elif kind <= 4:
        target[last] = respelt(draw, target[last])
    else:
        target[last] = scalar(draw)
    return copy


def json_text(draw: Draw, value: Any) -> bytes:
    """JSON written in one of the ways that JSON may not be, or may just about be."""
    said = dump(value)
    kind = draw.randrange(24)
    if kind == 0:
        return b"\xef\xbb\xbf" + said.encode("utf-8", "surrogatepass")
    if kind == 1:
        return said.encode(draw.choice(["utf-16", "utf-16-be", "utf-32", "utf-7"]), "surrogatepass")
    if kind == 2:
        return (said + draw.choice([",", "}", said, "\0", "// x", "\n\n{}"])).encode("utf-8", "surrogatepass")
    if kind == 3:
        return said.replace('"', "'").encode("utf-8", "surrogatepass")
    if kind == 4 and said.startswith("{"):
        return ('{"a":1,"a":2,' + said[1:]).encode("utf-8", "surrogatepass")
    if kind == 5:
        return (draw.choice(["[", '{"a":', '{"a":['])).encode() * draw.choice([1000, 100_000]) + said.encode("utf-8", "surrogatepass")
    return said.encode("utf-8", "surrogatepass")


def damaged(draw: Draw, content: bytes) -> bytes:
    """Bytes of which some are flipped, cut, doubled, moved or replaced."""
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        at = draw.randrange(len(content) + 1)
        end = min(len(content), at + draw.choice([1, 1, 4, 40, 4000]))
        kind = draw.randrange(9)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + content[end:]
        elif kind == 2:
            content = content[:at] + draw.randbytes(draw.choice([1, 4, 100])) + content[at:]
        elif kind == 3:
            content = content[:at] + bytes(end - at) + content[end:]
        elif kind == 4:
            content = content[:end] + content[at:]
        elif kind == 5:
            content = (
                content[:at]
                + draw.choice([b"\xff\xfe", b"\0", b'"', b"\n", b"{", b"\xed\xa0\x80", b"-", b"9" * 400, b"\x1b[31m"])
                + content[end:]
            )
        elif kind == 6 and draw.randrange(4) == 0:
            content = draw.choice(
                [b"", b"\0" * 4096, draw.randbytes(500), b"PK\x03\x04", b"\x80\x02cposix\nsystem\n", b"<html></html>", b"\x1f\x8b\x08"]
            )
        elif content and at < len(content):
            content = content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    return content


YAML_LINES = r"""
!!int ''
!!float ''
!!timestamp x
!!bool x
!!set [a]
!!map [1]
!!python/object/apply:os.system ['touch pwned']
!!binary x
!<x> y
&a [*a]
*nothing
<<: 1
? [a]
'\ud800'
"\UFFFFFFFF"
1:59:59.5
0o9
2001-99-99
{a: 1, a: 2}
%YAML 9.9
---
.nan
-.inf
~
''
@nothing
@teacher/x
@../x
null
yes
[1, 2
{a: }
"""
YAML_ENDLESS = ("[" * 2000, "- " * 500, "|\n  x", "\t", "0x" + "f" * 5000, "1" * 5000, "\0", "1" + ":59" * 5000 + ".5")
YAML = (*YAML_LINES.strip().split("\n"), *YAML_ENDLESS)

SPECIAL = (
    *("missing", "empty", "folder", "fifo", "socket", "loop", "dangling", "zero"),
    *("full", "sparse", "device", "proc", "closed", "tty", "crowd"),
)


def special(draw: Draw, path: Path, kinds: tuple[str, ...] = SPECIAL) -> str:
    """Put something in the place of a file that is no file, or no usual one. Returns what."""
    kind = draw.choice(kinds)
    content = path.read_bytes() if path.is_file() else b""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        return "left as it is"
    if kind == "empty":
        path.touch()
    elif kind in ("folder", "crowd"):
        path.mkdir()
        if kind == "crowd":
            (path / path.name).write_bytes(content)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as one:
            here = os.getcwd()
            os.chdir(path.parent)
            try:
                one.bind(path.name[:90])
            finally:
                os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind in ("zero", "full", "tty"):
        path.symlink_to(f"/dev/{kind}")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.write(content)
            file.truncate(20_000_000_000)
    elif kind == "device":
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        except PermissionError:
            path.symlink_to("/dev/zero")
    elif kind == "proc":
        path.symlink_to(draw.choice(["/proc/self/mem", "/proc/self/environ", "/proc/self/fd/0", "/sys/kernel/notes"]))
    elif kind == "closed":
        path.write_bytes(content)
        path.chmod(0)
    return kind


def tensors(draw: Draw, content: bytes) -> bytes:
    """A safetensors file with something wrong in its header, its numbers or its length."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    one, kind = header[name], draw.randrange(16)
    begin, end = one["data_offsets"]
    if kind == 0:
        one["dtype"] = draw.choice(["F16", "BF16", "F64", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", "", 7, None])
    elif kind == 1:
        one["shape"] = draw.choice(
            [[], [1], one["shape"][::-1], [*one["shape"], 1], [-1], [0], [2**40], [2**63, 2], ["4"], None, [10**30], [1] * 100]
        )
    elif kind == 2:
        one["data_offsets"] = draw.choice(
            [[0, 0], [end, begin], [begin, end + 4], [0, 2**62], [-4, end], [begin], None, [begin + 1, end + 1]]
        )
    elif kind == 3:
        header[draw.choice(["x", name + ".x", "", "../x", name.upper(), "\x1b[31m"])] = header.pop(name)
    elif kind == 4:
        del header[name]
    elif kind == 5:
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    elif kind == 6:
        header["__metadata__"] = draw.choice([{"format": "tf"}, {"a": 1}, [], {"format": "pt", "x": "y" * 100_000}, None, {}])
    elif kind == 7:
        return struct.pack("<Q", draw.choice([0, 1, size + 1, size - 1, 2**62, 2**64 - 1, 100_000_000])) + content[8:]
    elif kind == 8 and end > begin:
        value = draw.choice([b"\xff", b"\x7f", b"\0"])
        data[begin:end] = value * (end - begin)
    elif kind == 9 and end - begin >= 4:
        data[begin : begin + 4] = struct.pack("<f", draw.choice([float("nan"), float("inf"), -1e38, 1e38, 3e38]))
    elif kind == 10:
        return content + draw.randbytes(draw.choice([1, 8, 4096]))
    elif kind == 11:
        return content[: draw.randrange(len(content))]
    elif kind == 12:
        header[f"added.{draw.randrange(99)}"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
    elif kind == 13:
        return damaged(draw, content)
    elif kind == 14:
        one["dtype"], one["shape"] = "U8", [end - begin]
    elif data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    head = dump(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(head)) + head + bytes(data)


def seal(folder: Path, **over: Any) -> None:
    """Make a manifest fit the files beside it again, as whoever made the folder would have."""
    from efficientvlm.checkpoints import manifest

    path = folder / manifest.MANIFEST
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 26:
        return
    try:
        values = json.loads(path.read_text("utf-8")) | over
        for name in values["files"]:
            if stat.S_ISREG((folder / name).lstat().st_mode) and (folder / name).stat().st_size < 1 << 26:
                content = (folder / name).read_bytes()
                values["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        values["digest"] = manifest.digest(values)
        path.write_text(json.dumps(values, ensure_ascii=False), "utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # what was spoilt is the manifest itself


def spoil(draw: Draw, path: Path, how: str = "") -> str:
    """Spoil one file in a way that suits its kind. Returns what was done."""
    if not how:
        how = draw.choice(["bytes", "suited", "suited", "suited", "special"]) if path.stat().st_size else "special"
    if how == "special":
        return special(draw, path)
    content = path.read_bytes()
    if how == "suited" and path.suffix == ".json":
        try:
            path.write_bytes(json_text(draw, changed(draw, json.loads(content))))
            return "changed JSON"
        except ValueError:
            pass
    if how == "suited" and path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        path.write_bytes(b"\n".join(json_text(draw, line) for line in changed_rows(draw, lines)))
        return "changed lines"
    if how == "suited" and path.suffix == ".safetensors":
        path.write_bytes(tensors(draw, content))
        return "changed tensors"
    path.write_bytes(damaged(draw, content))
    return "damaged bytes"


def changed_rows(draw: Draw, lines: list[Any]) -> list[Any]:
    """Rows of which one, some or all have a wrong value."""
    kind = draw.randrange(3)
    if kind == 0:
        at = draw.randrange(len(lines))
        return [*lines[:at], changed(draw, lines[at]), *lines[at + 1 :]]
    if kind == 1 and isinstance(lines[0], dict):
        name, value = draw.choice(list(lines[0])), scalar(draw)
        return [{**line, name: value} for line in lines]
    return [changed(draw, line) if draw.randrange(2) else line for line in lines]
