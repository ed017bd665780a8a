"""The package can be imported where Python has no Unix modules. Run: pytest tests/test_windows.py."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import glm4ft
from glm4ft.train.trainer import peak_memory_bytes

# Modules of the standard library that are "Availability: Unix".
UNIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Modules that are imported when a module is, and not when a function of it is called."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).partition(".")[0]
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from imported_at_once(node.body)


def test_no_module_needs_unix_to_be_imported() -> None:
    modules = list(Path(glm4ft.__file__).parent.rglob("*.py"))
    assert len(modules) > 100
    found = {str(path): UNIX_ONLY & set(imported_at_once(ast.parse(path.read_text("utf-8")).body)) for path in modules}
    assert not {path: names for path, names in found.items() if names}


def test_memory_is_measured_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_bytes() > 2**26  # torch alone takes more
