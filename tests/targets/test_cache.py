"""The cache of compiled kernels: what it keeps, what it drops, and that it never stands in the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgec.targets.cache import ObjectCache

pytestmark = pytest.mark.pure


def test_keeps_and_finds(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path / "a" / "b")
    assert cache.get("k") is None
    cache.put("k", b"data")
    cache.put("k", b"other")
    assert ObjectCache(tmp_path / "a" / "b").get("k") == b"other"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["k"]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:40] + b"x" + b[41:], lambda b: b"", lambda b: b[:20]]
)
def test_damaged_files_count_as_absent(damage: object, tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path)
    cache.put("k", b"0123456789" * 10)
    (tmp_path / "k").write_bytes(damage((tmp_path / "k").read_bytes()))  # type: ignore[operator]
    assert cache.get("k") is None
    cache.put("k", b"again")
    assert cache.get("k") == b"again"


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = ObjectCache(tmp_path, limit=1000)
    for number in range(10):
        cache.put(f"k{number}", bytes(68))  # 100 with the digest
        os.utime(tmp_path / f"k{number}", (number, number))
    cache.trim()
    assert len(list(tmp_path.iterdir())) == 10, "the limit itself is allowed"
    cache.put("k10", bytes(68))
    assert cache.get("k0") is not None, "which makes it the youngest"
    cache.trim()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k0", "k10", "k5", "k6", "k7", "k8", "k9"]


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEC_CACHE", str(tmp_path / "mine"))
    assert ObjectCache.of_user().folder == tmp_path / "mine"
    monkeypatch.setenv("EDGEC_CACHE", "0")
    off = ObjectCache.of_user()
    off.put("k", b"")
    off.trim()
    assert off.folder is None and off.get("k") is None
    monkeypatch.delenv("EDGEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert ObjectCache.of_user().folder == tmp_path / "xdg" / "edgec" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ObjectCache.of_user().folder == tmp_path / "home" / ".cache" / "edgec" / "kernels"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ObjectCache(tmp_path / "file" / "folder")
    cache.put("k", b"data")
    cache.trim()
    assert cache.get("k") is None


def test_many_processes(tmp_path: Path) -> None:
    """Writers of the same keys, and trimming among them, never show a wrong or partial file."""
    script = """
import sys
from pathlib import Path
from edgec.targets.cache import ObjectCache
cache = ObjectCache(Path(sys.argv[1]), limit=200_000)
for turn in range(60):
    key = str(turn % 7)
    data = key.encode() * 40_000
    found = cache.get(key)
    assert found in (None, data)
    cache.put(key, data)
    cache.trim()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    running = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".new")]
