"""Where a folder is read from: a local path, or any fsspec URL. Everything that reads a run or a study goes through it.

Must not import the writer; fsspec is imported only for a URL.
"""

from __future__ import annotations

import contextlib
import posixpath
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Remote(NamedTuple):
    """An fsspec filesystem and a path on it."""

    fs: Any
    path: str


def open_url(url: str) -> Remote:
    """Raises ValueError when the URL's protocol is unknown or its package is not installed."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ValueError(f"{url}: this kind of URL needs another package: {error}") from None
    except ValueError as error:
        raise ValueError(f"{url}: not a URL that fsspec can open: {error}") from None
    return Remote(fs, str(path).rstrip("/"))


class Place:
    """A folder somewhere. Names inside it are relative, with `/`."""

    def __init__(self, where: str | Path) -> None:
        self.text = str(where).rstrip("/") or "/"
        self.remote: Remote | None = open_url(self.text) if "://" in self.text else None

    @property
    def name(self) -> str:
        return posixpath.basename(self.remote.path) if self.remote else Path(self.text).absolute().name

    def __truediv__(self, name: str) -> Place:
        """A folder inside; `..` and, on a local place, an absolute path are followed."""
        if self.remote is None:
            return Place(Path(self.text) / name)
        scheme, _, rest = self.text.partition("://")
        return Place(f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}")

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None when it is missing."""
        try:
            if self.remote is None:
                return (Path(self.text) / name).read_bytes()
            return self.remote.fs.cat_file(f"{self.remote.path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, name: str) -> list[str]:
        """Names of the files in a folder ("" is this one), sorted, without `.tmp`; empty when the folder is missing."""
        try:
            if self.remote is None:
                found = [p.name for p in (Path(self.text) / name).iterdir()]
            else:
                self.remote.fs.invalidate_cache()
                folder = f"{self.remote.path}/{name}".rstrip("/")
                found = [posixpath.basename(p) for p in self.remote.fs.ls(folder, detail=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(file for file in found if not file.endswith(".tmp"))

    @contextlib.contextmanager
    def local(self, names: Sequence[str]) -> Iterator[list[Path]]:
        """Local paths of files, fetched to a temporary folder when the place is remote; without those gone since."""
        if self.remote is None:
            yield [p for p in (Path(self.text) / name for name in names) if p.exists()]
            return
        with tempfile.TemporaryDirectory(prefix="aftershock-") as scratch:
            paths = []
            for number, name in enumerate(names):
                data = self.read(name)
                if data is not None:
                    # numbered folders: the caller may rely on file names, and two names may end alike
                    path = Path(scratch) / str(number) / posixpath.basename(name)
                    path.parent.mkdir()
                    path.write_bytes(data)
                    paths.append(path)
            yield paths
