"""``glm4ft cache``: the encoded files that are kept for later runs."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Sequence

from glm4ft.cli.options import Parser
from glm4ft.cli.output import say
from glm4ft.data.cache import Entry, default_cache, empty, entries, limit_bytes
from glm4ft.folders import damage


def parse(argv: Sequence[str]) -> Namespace:
    """Read the arguments.

    Args:
        argv: The arguments after the command's name.
    """
    parser = Parser("cache")
    parser.add_argument("--clear", action="store_true", help="Remove all of them.")
    return parser.parse(argv)


def run(options: Namespace) -> bool:
    """Show the cache, or empty it.

    Args:
        options: The arguments.
    """
    cache = default_cache()
    if options.clear:
        say(f"removed {_mib(empty(cache))} from {cache}")
        return True
    found = entries(cache)
    total, limit = sum(entry.num_bytes for entry in found), limit_bytes()
    say(f"{cache}: {len(found)} encoded files, {_mib(total)} of at most {_mib(limit)} ($GLM4FT_CACHE_GIB)")
    for entry in reversed(found):
        say(f"  {_describe(entry)}")
    return True


def _describe(entry: Entry) -> str:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_s))
    problem = damage(entry.folder)
    return f"{entry.folder.name}  {_mib(entry.num_bytes)}, last used {used}{f': {problem}' if problem else ''}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
