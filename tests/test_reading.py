"""Files that are read whole: up to a limit, and only where reading them comes to an end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from efficientvlm import manifest
from efficientvlm.errors import BadInput
from efficientvlm.files import open_plain, read_limited, sha256


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_limited(tmp_path / "a", 5, "a note") == read_limited(tmp_path / "link", 5, "a note") == b"12345"
    with pytest.raises(BadInput, match="5 bytes; a note may have 4 bytes"):
        read_limited(tmp_path / "a", 4, "a note")
    assert read_limited(Path("/proc/self/status"), 10**6, "a note").startswith(b"Name:"), "its size is said to be 0"
    with pytest.raises(BadInput, match="goes on beyond that; a note may have 3 bytes"):
        read_limited(Path("/proc/self/status"), 3, "a note")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for name, why in {"pipe": "a pipe", "folder": "a folder", "zero": "a device", "socket": "a socket", "gone": "no such file"}.items():
        for read in (open_plain, sha256, lambda path: read_limited(path, 10, "a note")):
            with pytest.raises(BadInput, match=why):
                read(tmp_path / name)
    with pytest.raises(BadInput, match="null"):
        read_limited(Path("a\0b"), 10, "a note")


def test_a_pipe_with_a_writer_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    slow = "import sys, time\nwith open(sys.argv[1], 'w') as f:\n f.write('a'); f.flush(); time.sleep(0.3); f.write('b' * 200_000)"
    for limit in (200_001, 200_000):
        holder = os.open(tmp_path / "pipe", os.O_RDWR)  # so that the writer need not wait for us, nor we for it
        writer = subprocess.Popen([sys.executable, "-c", slow, str(tmp_path / "pipe")])
        first = os.read(holder, 1)
        assert first == b"a"
        os.write(holder, first)
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # keeps what was written while the holder leaves
        os.close(holder)
        if limit > 200_000:
            assert read_limited(tmp_path / "pipe", limit, "a note") == b"a" + b"b" * 200_000
        else:
            with pytest.raises(BadInput, match="goes on beyond"):
                read_limited(tmp_path / "pipe", limit, "a note")
        os.close(reader)
        writer.wait()


def test_a_manifest_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / manifest.MANIFEST).open("wb") as file:
        file.truncate(8_000_000_000)
    with pytest.raises(BadInput, match="64 MiB"):
        manifest.read(tmp_path)
