"""The commit that curves were measured at, and whether it says what was measured; needs no torch."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(folder: Path) -> str:
    """The commit of the repository around a folder; "" outside of a repository, or before its first commit."""
    return _git(folder, "rev-parse", "HEAD").strip()


def uncommitted(folder: Path) -> list[str]:
    """The files of the repository around a folder that differ from its commit, or are not in it."""
    return [line[3:] for line in _git(folder, "status", "--porcelain").splitlines()]


def _git(folder: Path, *arguments: str) -> str:
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
