"""YAML as people write it: ``1e-4`` is a number, ``010`` is ten, and ``12:30`` is text."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml

from glm4ft.errors import ConfigError, show
from glm4ft.reading import read_text

# Nobody needs more; nine of them, each a list of nine of the one before, stand for 400 million values.
_MAX_ALIASES = 20

# ValueError: bytes that are not UTF-8, a date such as 2024-99-99
_UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)


class Loader(yaml.SafeLoader):
    """A safe loader of YAML 1.1, but for its numbers: no point is needed before an exponent, no base is 8 or 60."""

    num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, and refuse a document that grows by its aliases."""
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > _MAX_ALIASES:
                raise yaml.YAMLError(f"it has more than {_MAX_ALIASES} aliases")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


def _whole_number(loader: Loader, node: yaml.ScalarNode) -> int | str:
    text = str(loader.construct_scalar(node))
    for base in (10, 0):  # 0: as the prefix says, 0x10
        with contextlib.suppress(ValueError):
            return int(text, base)
    return text


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def from_yaml(text: str) -> Any:
    """A value written as in YAML; text that is no YAML stands for itself.

    Args:
        text: The value as it was typed.
    """
    try:
        return yaml.load(text, Loader)
    except _UNREADABLE:
        return text


def read_mapping(path: Path) -> dict[str, Any]:
    """The content of a file of options.

    Args:
        path: The file.
    Raises:
        ConfigError: If the file cannot be read, is not YAML, or holds anything but keys with values.
    """
    text = read_text(path, ConfigError, "cannot read the configuration")
    try:
        content = yaml.load(text, Loader)
    except _UNREADABLE as error:
        found = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        fix = "correct the file, or restore it from a copy"
        raise ConfigError("cannot read the configuration", where=str(path), found=found[:500], fix=fix) from error
    if not isinstance(content, dict) or not content:
        raise ConfigError("not a configuration", where=str(path), found=show(content), expected="key: value")
    return content
