"""Types, defaults and names of options, in words."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

NO_DEFAULT = object()  # of an argument that has to be given
_NAMES = {bool: "true or false", NoneType: "null", list: "a list, as [a,b]", dict: "a mapping, as {a: b}"}


def describe_type(annotation: Any) -> str:
    """What a value may be.

    Args:
        annotation: The type annotation of the value.
    """
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(describe_type(part) for part in get_args(annotation))
    if get_origin(annotation) is Literal:
        return ", ".join(repr(value) for value in get_args(annotation))
    return _NAMES.get(get_origin(annotation) or annotation, getattr(annotation, "__name__", str(annotation)))


def describe_option(text: str, annotation: Any, default: Any = NO_DEFAULT) -> str:
    """The help text of an option, as ``argparse`` takes it: with its type and default.

    Args:
        text: What the option decides.
        annotation: The type annotation of the value.
        default: The default, or ``NO_DEFAULT``.
    """
    shown = default if isinstance(default, str) else json.dumps(default) if default is not NO_DEFAULT else ""
    return f"{text} ({describe_type(annotation)}{'; default: ' * bool(shown)}{shown})".replace("%", "%%")


def nearest(name: str, legal: Iterable[str]) -> str:
    """The legal name that a wrong one was meant to be; "" if that cannot be guessed.

    Args:
        name: The wrong name.
        legal: The legal names.
    """
    plain = {one.removeprefix("--"): one for one in legal}  # the dashes would make any two options alike
    return (
        plain[near[0]] if (near := difflib.get_close_matches(name.removeprefix("--"), plain, n=1, cutoff=0.5)) else ""
    )
