"""The options of the commands: parsing them, and explaining what cannot be used."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from glm4ft.errors import ConfigError


def new_parser(command: str, description: str) -> ArgumentParser:
    """A parser of one command's options."""
    return ArgumentParser(prog=f"glm4ft {command}", description=description, exit_on_error=False)


def parse(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Parse and validate; ``argv`` of the result holds the arguments as they were given."""
    _refuse_unknown(parser, argv)
    try:
        options: Namespace = parser.instantiate(parser.parse_args(argv))
    except ArgumentError as error:
        raise _explain(error, parser.prog) from error
    options.argv = argv
    return options


def _explain(error: ArgumentError, prog: str) -> ConfigError:
    """The parser's message as ours: it names the option first and shows the value last."""
    fix = f"see {prog} --help"
    match = re.match(r'Parser key "(?P<key>[^"]+)":\s*(?P<text>.*)', str(error), re.DOTALL)
    if not match:
        fix = "give it a value; a switch takes true or false" if "expected one argument" in str(error) else fix
        return ConfigError("the options cannot be used", found=" ".join(str(error).split()), fix=fix)
    text = " ".join(match["text"].split())
    kinds = re.findall(r"Expected an? (.+?)(?:\. Got| - | Given|$)", text)
    names = [re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind) for kind in kinds]
    value = re.search(r"(?:Got|Given) value: (.*)$", text)
    return ConfigError(
        "an option has a value that cannot be used" if value else text,
        where=f"--{match['key']}",
        found=value[1] if value else "",
        expected=" or ".join({"NoneType": "null", "list": "a list, as [a,b]"}.get(name, name) for name in names),
        fix=fix,
    )


def _refuse_unknown(parser: ArgumentParser, argv: list[str]) -> None:
    """Name the nearest legal option for one that does not exist, on the command line or in a YAML file."""
    options = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    flags = {flag.removeprefix("--") for flag in options}
    for arg in argv:
        name = arg.removeprefix("--").partition("=")[0]
        if arg.startswith("--") and not _is_known(name, flags):
            raise ConfigError("unknown option", found=f"--{name}", expected="--" + nearest(name, flags))
    for path in config_files(argv):
        for name, value in yaml_keys(path).items():
            if any(flag.startswith(f"{name}.") for flag in flags) and not isinstance(value, dict):
                raise ConfigError("a group of options has a plain value", where=str(path), found=f"{name}: {value!r}")
            if not _is_known(name, flags):
                raise ConfigError("unknown key", where=str(path), found=name, expected=nearest(name, flags))


def _is_known(name: str, flags: set[str]) -> bool:
    # below lora.options stand peft's own names, which LoraOptions checks
    return name in flags or any(name.startswith(f"{flag}.") for flag in flags if flag == "lora.options")


def config_files(argv: list[str]) -> Iterator[Path]:
    """The files that ``--config`` names."""
    for i, arg in enumerate(argv):
        name, equals, value = arg.partition("=")
        if name == "--config" and (equals or argv[i + 1 :]):
            yield Path(value if equals else argv[i + 1])


def yaml_keys(path: Path) -> dict[str, Any]:
    """Every key with its value, those of a group with the group's name before them."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("cannot read the configuration", where=str(path), found=str(error)) from error
    if not isinstance(content, dict):
        raise ConfigError("not a configuration", where=str(path), found=type(content).__name__, expected="key: value")
    nested = {key: value for key, value in content.items() if isinstance(value, dict)}
    below = {f"{key}.{name}": value for key, group in nested.items() for name, value in group.items()}
    return {str(key): value for key, value in content.items()} | below


def nearest(name: str, legal: Iterable[str]) -> str:
    """The legal name that a wrong one was meant to be; all of them if that is not to be guessed."""
    names = sorted(legal)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return near[0] if near else " or ".join(names)


def with_underscores(arg: str) -> str:
    """An option by its name in YAML: ``--learning-rate`` is ``--learning_rate``."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
