"""Folders that have one writer, appear whole or not at all, and are sealed: whether they still hold what was written.

A folder that is being written has two hidden entries, which end with the writing: a lock, and a folder in which its
content is made. A writer that was killed leaves them behind; the next one clears them away.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from glm4ft.errors import ConfigError
from glm4ft.files import write_atomically
from glm4ft.reading import decode_json

COMPLETE_MARKER = "complete"  # the seal, written into a folder when everything else is there
_LOCK, _UNFINISHED = ".lock", ".unfinished"


def require_unused(output: Path, fix: str = "choose another folder") -> None:
    """Refuse to write into a folder that is not empty; what a killed writer left behind does not count.

    Args:
        output: The folder that a checkpoint or a run will be written to.
        fix: The advice to the user if the folder is in use.
    Raises:
        ConfigError: If the folder exists and is not empty, or the path is not a folder.
    """
    if output.exists() and (not output.is_dir() or any(p.name not in (_LOCK, _UNFINISHED) for p in output.iterdir())):
        raise _in_use(output, fix)


@contextlib.contextmanager
def only_writer(output: Path, first: str, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes from writing a folder, and put right what a killed writer left in it.

    The lock is the system's and ends with the process that holds it, however that ends.

    Args:
        output: The folder; created if it is missing, and removed again if it is still empty at the end.
        first: The entry that appears first, as for ``appearing_whole``.
        wait: Whether to wait for another writer instead of raising an error.
    Raises:
        ConfigError: If another process is writing the folder, or it cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise _in_use(output, "choose another folder")
    created = [folder for folder in (output, *output.parents) if not folder.exists()]
    lock = FileLock(output / _LOCK, timeout=-1 if wait else 0)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        fix = "wait until it ends, or choose another folder"
        raise ConfigError("another process is writing to the folder", where=str(output), fix=fix) from None
    except OSError as error:
        raise ConfigError("the folder cannot be written", where=str(output), found=str(error)) from error
    try:
        if (output / first).exists():
            _move_up(output, first)
        else:
            shutil.rmtree(output / _UNFINISHED, ignore_errors=True)
        yield
    finally:
        # while the lock is held: whoever has opened the file meanwhile finds that it is no longer there
        (output / _LOCK).unlink(missing_ok=True)
        lock.release()
        for folder in created:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def appearing_whole(output: Path, first: str) -> Iterator[Path]:
    """Yield a hidden folder whose content moves up into the output at the end, or vanishes on any error.

    To be called within ``only_writer``, which finishes the move if this process is killed in the midst of it.

    Args:
        output: The folder to write; without content.
        first: The entry that is moved first: from then on the folder counts as written.
    """
    unfinished = output / _UNFINISHED
    try:
        unfinished.mkdir()
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                _reach_disk(path)
        _move_up(output, first)
    except BaseException:
        if not (output / first).exists():
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def clear(folder: Path) -> None:
    """Remove the content of a folder, but for its lock; to be called within ``only_writer``."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is being written, or its writer was killed."""
    return (folder / _UNFINISHED).exists() or (folder / _LOCK).exists()


def seal(folder: Path, paths: Iterable[Path] | None = None, *, grown: Path | None = None) -> None:
    """Write sizes and digests of a folder's files into its marker, once they have reached the disk.

    Args:
        folder: The folder.
        paths: The files to seal; by default all below the folder.
        grown: A file elsewhere that only grows, of which the present content is sealed too.
    """
    names = [path for path in (folder.rglob("*") if paths is None else paths) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): _identity(path) for path in sorted(names)}
    files.pop(COMPLETE_MARKER, None)
    for path in names:
        _reach_disk(path)
    content: dict[str, Any] = {"schema": 1, "files": files}
    if grown is not None:
        _reach_disk(grown)
        content["grown"] = _identity(grown)
    write_atomically(folder / COMPLETE_MARKER, json.dumps(content, indent=1) + "\n")


def damage(folder: Path, *, grown: Path | None = None) -> str:
    """Compare a folder with its seal.

    Args:
        folder: The folder.
        grown: The file elsewhere that only grows, if one was sealed too.
    Returns:
        What is wrong with it, in words; "" if each sealed file is what was written.
    """
    if not (folder / COMPLETE_MARKER).is_file():
        return "it was not written to its end"
    try:
        content = decode_json((folder / COMPLETE_MARKER).read_text("utf-8"))
        sealed = content["files"]
        wrong = [problem for name, identity in sealed.items() if (problem := _difference(folder, name, identity))]
        if grown is not None and _identity(grown, content["grown"]["bytes"]) != content["grown"]:
            wrong.append(f"{grown.name} is not what was written before it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its file {COMPLETE_MARKER} cannot be read"
    return "; ".join(wrong[:3]) if sealed else f"its file {COMPLETE_MARKER} lists no files"


def _in_use(output: Path, fix: str) -> ConfigError:
    return ConfigError(
        "the output folder is already in use",
        where="--output",
        found=str(output),
        expected="a folder that is empty or does not exist",
        fix=fix,
    )


def _difference(folder: Path, name: str, identity: dict[str, Any]) -> str:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != identity["bytes"]:
        return f"{name} has {path.stat().st_size:,} bytes of {identity['bytes']:,}"
    return "" if _identity(path) == identity else f"{name} is not what was written: its digest differs"


def _identity(path: Path, num_bytes: int | None = None) -> dict[str, Any]:
    """Size and digest of a file, or of its first bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if num_bytes is None else num_bytes
    size = left
    with path.open("rb") as file:
        while block := file.read(min(left, 2**20)):
            digest.update(block)
            left -= len(block)
    return {"bytes": size - left, "sha256": digest.hexdigest()}


def _move_up(output: Path, first: str) -> None:
    unfinished = output / _UNFINISHED
    entries = sorted(unfinished.iterdir(), key=lambda path: path.name != first) if unfinished.is_dir() else []
    for path in entries:
        os.replace(path, output / path.name)
    if unfinished.is_dir():
        unfinished.rmdir()


def _reach_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
