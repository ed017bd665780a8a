"""The options of one command: an ``argparse`` parser with checked values, whose errors are our own."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

from glm4ft.cli.commands import COMMANDS
from glm4ft.cli.wording import NO_DEFAULT, describe_option, describe_type, nearest
from glm4ft.errors import ConfigError, show


class Parser(argparse.ArgumentParser):
    """A parser of one command's arguments.

    Args:
        command: The name of the command.
        usage: The usage line; by default one that lists every option.
    """

    def __init__(self, command: str, *, usage: str | None = None) -> None:
        self.annotations: dict[str, Any] = {}
        super().__init__(
            prog=f"glm4ft {command}",
            description=COMMANDS[command].description,
            usage=usage,
            exit_on_error=False,
        )

    def add_argument(self, *names: str, annotation: Any = None, **settings: Any) -> argparse.Action:
        """Add an argument as ``argparse`` does, or one whose type is an annotation.

        Args:
            names: The name, with dashes in front if it is an option.
            annotation: The type annotation of the value, where ``type`` is not given.
            settings: Further settings as in ``argparse``; the annotation and the default are added to the help text.
        """
        self.annotations |= dict.fromkeys(names, annotation)
        if annotation is not None:
            settings["type"] = functools.partial(self.value_from_text, names[0], annotation)
            default = settings.get("default") if names[0].startswith("-") else NO_DEFAULT
            settings["help"] = describe_option(settings["help"], annotation, default)
        return super().add_argument(*names, **settings)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of the command.

        Args:
            argv: The arguments; ``--learning-rate`` and ``--learning_rate`` are the same.
        Raises:
            ConfigError: For an unknown option, with the nearest that exists, and for a value that cannot be used.
        """
        argv = [with_underscores(arg) for arg in argv]
        # beforehand, since argparse complains of arguments that are missing first, and takes abbreviations
        for name in (arg.partition("=")[0] for arg in argv if arg.startswith("--")):
            if name not in self.annotations and not self.accept(name):
                near = nearest(name, [known for known in self.annotations if known.startswith("--")])
                fix = "" if near else self.see_help
                if name.removeprefix("--") in self.annotations:  # an option of other commands, here the argument itself
                    near, fix = "", f"it is given without a name: {self.prog} {name.removeprefix('--').upper()}"
                raise ConfigError("unknown option", found=name, expected=near, fix=fix)
        try:
            return self.parse_args(argv)
        except argparse.ArgumentError as error:
            name = error.argument_name or ""
            annotation = self.annotations.get(name)
            raise ConfigError(
                f"an option cannot be used: {error.message}",
                where=name,
                expected="" if annotation is None else describe_type(annotation),
                fix=self.see_help,
            ) from None

    def accept(self, name: str) -> bool:
        """Add an option that was not named beforehand, if there may be one of this name.

        Args:
            name: The name, with its dashes.
        Returns:
            Whether there may.
        """
        return False

    def value_from_text(self, where: str, annotation: Any, text: str) -> Any:
        """The value of an option, written as in YAML; where text is allowed, it is taken to the letter.

        Args:
            where: The name of the option, for the error.
            annotation: The type annotation of the value.
            text: The value as it was typed.
        """
        from glm4ft.cli.yaml_file import from_yaml

        value = from_yaml(text)
        if isinstance(value, str) or (value is None and text != "null"):
            value = text
        try:
            return self.checked(where, annotation, value)
        except ConfigError:
            return self.checked(where, annotation, text)  # a folder may be called 2024

    def checked(self, where: str, annotation: Any, value: Any) -> Any:
        """The value, if its type is right: strictly, so that ``3.5`` and ``true`` are no int.

        Args:
            where: The place of the value, for the error.
            annotation: The type annotation.
            value: The value; a whole number becomes a float where that is asked for.
        Raises:
            ConfigError: If the type is wrong.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError:
            raise ConfigError(
                "an option has a value that cannot be used",
                where=where,
                found=value if isinstance(value, str) and len(value) <= 80 else show(value),
                expected=describe_type(annotation),
                fix=self.see_help,
            ) from None

    def error(self, message: str) -> NoReturn:
        """Raise what ``argparse`` would print."""
        raise ConfigError("the options cannot be used", found=message, fix=self.see_help)

    @property
    def see_help(self) -> str:
        """How to see the options that there are."""
        return f"see {self.prog} --help"


def with_underscores(arg: str) -> str:
    """An option by its name in YAML: ``--learning-rate`` is ``--learning_rate``.

    Args:
        arg: An argument of the command line.
    """
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
