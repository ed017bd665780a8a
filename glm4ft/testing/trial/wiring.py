"""Whether an adapter that ``glm4ft init`` rendered calls any code of its repository yet.

As rendered it runs a plain trainer, on which every claim holds: a verdict that says nothing about the repository. The
template ends with a digest of its own lines marked YOURS; while the lines fit it, none was touched.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK, WHOLE = "YOURS", "YOURS, all of it"
_STATED = re.compile(r"^# YOURS as rendered: ([0-9a-f]{12})\b", re.MULTILINE)
_NOT_WIRING = ("name", "chat_format")  # what one sets without wiring anything


def unwired(subject: Any) -> str:
    """A sentence saying that a subject is not wired to its repository's code yet; "" if it is, or was not rendered.

    Args:
        subject: The subject on trial.
    """
    try:
        file = inspect.getsourcefile(type(subject))
        source = Path(file).read_text("utf-8") if file else ""
    except (OSError, TypeError, UnicodeDecodeError):
        return ""
    if file is None or is_wired(source):
        return ""
    return (
        f"Not wired to your code yet: the lines marked {MARK} in {Path(file).name} are as glm4ft init wrote them, so "
        "a plain trainer was on trial, and not yours."
    )


def is_wired(source: str) -> bool:
    """Whether a line marked YOURS differs from what was rendered; True for an adapter that was not rendered.

    Args:
        source: The source of the adapter.
    """
    stated = _STATED.search(source)
    return stated is None or stated[1] != yours_digest(source)


def yours_digest(source: str) -> str:
    """The digest of what wires an adapter: its lines marked YOURS, and which members it defines.

    Args:
        source: The source of the adapter.
    """
    try:
        classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    except SyntaxError:
        return ""
    lines = source.split("\n")
    wiring = [line.strip() for node in classes for statement in node.body for line in _wiring(statement, lines)]
    return hashlib.sha256("\n".join(wiring).encode()).hexdigest()[:12]


def _wiring(statement: ast.stmt, lines: list[str]) -> Iterator[str]:
    mine = lines[statement.lineno - 1 : statement.end_lineno]
    if isinstance(statement, ast.FunctionDef):
        is_whole = WHOLE in (ast.get_docstring(statement) or "")
        yield from (line for n, line in enumerate(mine) if n == 0 or is_whole or MARK in line)
    elif isinstance(statement, ast.Assign) and any(getattr(t, "id", "") in _NOT_WIRING for t in statement.targets):
        return
    elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
        yield from mine
