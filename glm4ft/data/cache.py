"""The cache of encoded files: entries that are whole and verified at each use, and a bound on their size.

An entry is a folder, named by a digest of all that its content depends on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glm4ft.errors import ConfigError, InputError
from glm4ft.folders import COMPLETE_MARKER, appearing_whole, clear, damage, is_unfinished, only_writer, seal

DEFAULT_LIMIT_GIB = 20.0


@dataclass(frozen=True)
class Entry:
    """One encoded file in the cache.

    Args:
        folder: The folder of the entry.
        num_bytes: The size of its files.
        used_s: When it was last used, in seconds since the epoch.
    """

    folder: Path
    num_bytes: int
    used_s: float


def default_cache() -> Path:
    """Where encoded files are kept: ``$GLM4FT_CACHE``, else ``glm4ft`` in the user's cache folder."""
    if "GLM4FT_CACHE" in os.environ:
        return Path(os.environ["GLM4FT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm4ft"


def limit_bytes() -> int:
    """The size that the cache may have: ``$GLM4FT_CACHE_GIB``, else 20 GiB.

    Raises:
        ConfigError: If the variable is no number.
    """
    given = os.environ.get("GLM4FT_CACHE_GIB", "")
    try:
        gib = float(given or DEFAULT_LIMIT_GIB)
        if not gib >= 0:
            raise ValueError
        return int(gib * 2**30)
    except (ValueError, OverflowError):
        raise ConfigError("the bound of the cache is no size", where="$GLM4FT_CACHE_GIB", found=given) from None


def entries(cache: Path) -> list[Entry]:
    """The entries of a cache, the one that was used last at the end.

    Args:
        cache: The folder of the cache.
    """
    found = []
    for folder in cache.glob("rows/*"):
        with contextlib.suppress(FileNotFoundError):  # another process may remove it at the same time
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            marker = folder / COMPLETE_MARKER
            used_s = (marker if marker.exists() else folder).stat().st_mtime
            found.append(Entry(folder, sum(sizes), used_s))
    return sorted(found, key=lambda entry: entry.used_s)


def find_or_write(cache: Path, name: str, write: Callable[[Path], None]) -> tuple[Path, str]:
    """Find an entry, or write it; processes that need the same one wait for the first.

    Args:
        cache: The folder of the cache.
        name: The name of the entry.
        write: A function that writes the content of the entry into the folder that it is given.
    Returns:
        The folder of the entry, and what was wrong with the one that had to be written anew; "" if nothing was.
    Raises:
        ConfigError: If the cache cannot be written.
    """
    folder, problem = cache / "rows" / name, ""
    if damage(folder):
        limit = limit_bytes()
        try:
            with only_writer(folder, COMPLETE_MARKER, wait=True):
                if found := damage(folder):  # still, now that no other process writes it
                    problem = found if (folder / COMPLETE_MARKER).exists() else ""
                    clear(folder)
                    with appearing_whole(folder, COMPLETE_MARKER) as unfinished:
                        write(unfinished)
                        seal(unfinished)
        except OSError as error:
            raise ConfigError(
                "the encoded conversations cannot be written",
                where=str(folder.parent),
                found=error.strerror or str(error),
                fix="free some space there, or set GLM4FT_CACHE to another folder",
            ) from error
        _tidy(cache, folder, limit)
    with contextlib.suppress(OSError):  # a cache that may only be read is used all the same
        os.utime(folder / COMPLETE_MARKER)
    return folder, problem


def empty(cache: Path) -> int:
    """Remove all entries that no process is writing.

    Args:
        cache: The folder of the cache.
    Returns:
        The size of what was removed, in bytes.
    """
    return sum(entry.num_bytes for entry in entries(cache) if _remove(entry.folder))


def _tidy(cache: Path, in_use: Path, limit: int) -> None:
    """Remove what killed processes left, then the entries that were not used for longest, beyond the bound."""
    others = [entry for entry in entries(cache) if entry.folder != in_use]
    for entry in others:
        if is_unfinished(entry.folder):
            _remove(entry.folder)
    excess = sum(entry.num_bytes for entry in entries(cache)) - limit
    for entry in others:
        if excess > 0 and entry.folder.exists() and _remove(entry.folder):
            excess -= entry.num_bytes


def _remove(folder: Path) -> bool:
    """Remove an entry, unless a process is writing it."""
    if not folder.is_dir():
        folder.unlink()
        return True
    try:
        with only_writer(folder, COMPLETE_MARKER):
            clear(folder)
    except InputError:
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True
