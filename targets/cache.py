"""Compiled kernels on disk, by content: what was compiled once is not compiled again, by any process of the user."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

# The folder's name, or 0 for no cache.
VARIABLE = "EDGEC_CACHE"
LIMIT = 256 << 20
DIGEST = 32


class ObjectCache:
    """A folder of files named by the hash of what they were made from.

    Safe for processes that use it at the same time: a file appears complete or not at all, and one that vanishes or is
    damaged counts as absent. Nothing here fails: a folder that cannot be written holds nothing.

    folder: None keeps nothing. limit: bytes above which the files that were not used for longest go.
    """

    def __init__(self, folder: Path | None, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit

    @staticmethod
    def of_user() -> ObjectCache:
        """The cache that EDGEC_CACHE names, else `edgec/kernels` in the user's cache folder."""
        given = os.environ.get(VARIABLE)
        if given:
            return ObjectCache(None if given == "0" else Path(given))
        base = os.environ.get("XDG_CACHE_HOME")
        try:
            return ObjectCache(Path(base or Path.home() / ".cache") / "edgec" / "kernels")
        except RuntimeError:  # a user without a home
            return ObjectCache(None)

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or None."""
        if self.folder is None:
            return None
        path = self.folder / key
        try:
            content = path.read_bytes()
            if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
                return None
            os.utime(path)
        except OSError:
            return None
        return content[DIGEST:]

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`, where the disk allows it."""
        if self.folder is None:
            return
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".new-", dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(temporary, self.folder / key)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def trim(self) -> None:
        """Remove what was not used for longest until the folder keeps to three quarters of its limit."""
        if self.folder is None:
            return
        files = []
        with contextlib.suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    state = entry.stat(follow_symlinks=False)
                    files.append((state.st_mtime_ns, state.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total <= self.limit:
            return
        for _, size, path in sorted(files):
            if total <= self.limit * 3 // 4:
                return
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
