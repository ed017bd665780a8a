"""Mutations of valid files: of their bytes, and of the values in their JSON."""

from __future__ import annotations

import json
import random
from typing import Any

TOKENS = [
    b"[" * 2000, b'{"a":' * 2000, b"9" * 5000, b"-" + b"9" * 5000, b"1e999", b"NaN", b"-Infinity", b"\x00", b"\xff\xfe",
    b"\xef\xbb\xbf", b"null", b"true", b"[]", b"{}", b'""', b"0", b"-1", b"2.5", b'"\\ud800"', b"\xf0\x9f\x98\x80",
    b"\n", b"\r\n", b"\xe2\x80\xa8", b"\x1b[2J", b"::error::x", b"../../etc/passwd", b"/dev/zero", b"&a [*a]",
    b"!!python/name:os", b"{{ 1/0 }}", b"{% for i in range(9) %}", b'"', b"'", b"\\", b",", b":", b"- ", b"? ",
    b"|", b">", b"\t", b"~",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, 0.5, -1e308, "", "a", "\ud83d", "1", "x" * 300, [], [1], [None],
    [[[]]], {}, {"a": 1}, {"": None}, [{"a": []}], "a/b", "..", "\x1b[2J", ["a", 1, None],
]  # fmt: skip


def mutated(content: bytes, seed: int) -> bytes:
    """A file with one to four mutations, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = _in_json(content, rng) if rng.random() < 0.5 else _in_bytes(content, rng)
    return content


def _in_bytes(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    end = min(end, start + rng.choice((1, 1, 8, 64, 10**6)))
    kind = rng.randrange(6)
    if kind == 0:  # cut off
        return content[:start]
    if kind == 1:  # flip a bit
        flipped = bytearray(content)
        if flipped:
            flipped[start % len(flipped)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 2:  # double
        return content[:end] + content[start:end] + content[end:]
    inserted = rng.choice(TOKENS) if kind > 3 else b""
    return content[:start] + inserted + content[end if kind != 5 else start :]


def _in_json(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or add a value in a JSON document, or in one line of a file of them."""
    lines = content.splitlines(keepends=True)
    try:
        json.loads(content)
        at, text = None, content
    except ValueError:
        at = rng.randrange(len(lines)) if lines else None
        text = lines[at] if at is not None else b""
    except RecursionError:
        return content
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return _in_bytes(content, rng)
    changed = json.dumps(_changed(document, rng)).encode()
    if at is None:
        return changed
    return b"".join([*lines[:at], changed + b"\n", *lines[at + 1 :]])


def _changed(value: Any, rng: random.Random) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.15:
        return rng.choice(VALUES)
    changed: Any = value.copy()
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.15:
        del changed[key]
    elif kind < 0.25 and isinstance(value, dict):
        changed[rng.choice(("a", "", "\x1b", "type", str(key) + "s"))] = rng.choice(VALUES)
    else:
        changed[key] = _changed(value[key], rng)
    return changed
