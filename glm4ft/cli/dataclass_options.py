"""Options that are the fields of a dataclass: on the command line, in YAML files, and in both at once."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from glm4ft.cli.options import Parser
from glm4ft.cli.wording import describe_option, nearest
from glm4ft.errors import ConfigError, show

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Given:
    """An option that has been given.

    Args:
        name: The name of the field, with that of its group before it: ``lora.rank``.
        value: The value, checked.
        source: Where the option was given: a file, or the command line.
        keys: The keys below the field, if a single value of a dict was given.
    """

    name: str
    value: Any
    source: str
    keys: tuple[str, ...] = ()


class DataclassParser(Parser):
    """A parser whose options are the fields of a dataclass; ``given`` of its result lists what was given, in order.

    A field that is a dataclass itself is a group: ``--lora.rank 4``, or ``lora: {rank: 4}`` in a file. Of a field that
    is a dict, single keys can be given: ``--lora.options.use_rslora true``.

    Args:
        command: The name of the command.
    """

    def __init__(self, command: str) -> None:
        super().__init__(command, usage="%(prog)s [options]")
        self.fields: dict[str, Any] = {}

    def add_file_option(self, name: str, *, help: str) -> None:
        """Add an option that takes a YAML file with any of the fields.

        Args:
            name: The name of the option.
            help: The help text.
        """
        self._add(name, self._in_file, help)

    def add_fields(self, record: type, *, prefix: str = "") -> None:
        """Add every field of a dataclass, with the help text of its docstring.

        Args:
            record: The dataclass.
            prefix: What stands before the names: that of the group, with a dot.
        """
        annotations, texts = get_type_hints(record), _argument_texts(record)
        for field in fields(record):
            name, annotation, text = prefix + field.name, annotations[field.name], texts.get(field.name, "")
            self.fields[name] = annotation
            if is_dataclass(annotation):
                self._add(f"--{name}", functools.partial(self._in_text, name), describe_option(text, dict))
                self.add_fields(annotations[field.name], prefix=f"{name}.")
            else:
                default = field.default if field.default_factory is MISSING else field.default_factory()
                read = functools.partial(self._of_field, name, (), annotation)
                self._add(f"--{name}", read, describe_option(text, annotation, default))
                self.annotations[f"--{name}"] = annotation

    def accept(self, name: str) -> bool:
        """Add an option for a key of a field that is a dict."""
        for field, annotation in self.fields.items():
            if get_origin(annotation) is dict and name.startswith(f"--{field}."):
                keys = tuple(name.removeprefix(f"--{field}.").split("."))
                self._add(name, functools.partial(self._of_field, field, keys, Any), argparse.SUPPRESS)
                return True
        return False

    def _add(self, name: str, read: Callable[[str], list[Given]], help: str) -> None:
        # all of them add to one list, which keeps the order in which they were given
        metavar = name.removeprefix("--").rpartition(".")[2].upper()
        self.add_argument(name, type=read, dest="given", action="extend", default=[], metavar=metavar, help=help)

    def _of_field(self, name: str, keys: tuple[str, ...], annotation: Any, text: str) -> list[Given]:
        value = self.value_from_text(".".join([f"--{name}", *keys]), annotation, text)
        return [Given(name, value, COMMAND_LINE, keys)]

    def _in_text(self, name: str, text: str) -> list[Given]:
        group = self.value_from_text(f"--{name}", dict[str, Any], text)
        return list(self._in_mapping(group, COMMAND_LINE, f"{name}."))

    def _in_file(self, path: str) -> list[Given]:
        from glm4ft.cli.yaml_file import read_mapping

        return list(self._in_mapping(read_mapping(Path(path)), path))

    def _in_mapping(self, content: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[Given]:
        for key, value in content.items():
            name = f"{prefix}{key}"
            if name not in self.fields:
                near = nearest(name, self.fields)
                fix = "" if near else self.see_help
                raise ConfigError("unknown key", where=source, found=name, expected=near, fix=fix)
            if not is_dataclass(self.fields[name]):
                yield Given(name, self.checked(f"{source}: {name}", self.fields[name], value), source)
            elif isinstance(value, dict):
                yield from self._in_mapping(value, source, f"{name}.")
            else:
                raise ConfigError("a group of options has a plain value", where=source, found=f"{name}: {show(value)}")


def nested(given: Iterable[Given]) -> dict[str, Any]:
    """The values by their names, those of a group in a dict of their own; of two the later one counts.

    Args:
        given: The options in the order in which they were given.
    """
    values: dict[str, Any] = {}
    for option in given:
        *groups, name = *option.name.split("."), *option.keys
        inner = values
        for group in groups:
            outer, inner = inner, inner.get(group, {})
            inner = outer[group] = dict(inner) if isinstance(inner, dict) else {}
        inner[name] = option.value
    return values


def _argument_texts(record: type) -> dict[str, str]:
    """The entries below ``Args:`` in a docstring."""
    from docstring_parser import DocstringStyle, parse

    entries = parse(record.__doc__ or "", style=DocstringStyle.GOOGLE).params
    return {entry.arg_name: " ".join((entry.description or "").replace("``", "`").split()) for entry in entries}
