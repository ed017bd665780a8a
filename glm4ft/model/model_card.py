"""The model card of a folder: ``README.md``, whose first lines tell the Hugging Face hub what the folder holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from glm4ft.files import write_atomically
from glm4ft.model.checkpoint import HUB_ID
from glm4ft.text.markdown_text import code

FILE_NAME = "README.md"
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def write_card(folder: Path, body: Sequence[str], *, base: str, library: str, relation: str) -> None:
    """Write the card of an adapter or a model.

    Args:
        folder: The folder, which the card replaces a card of peft in.
        body: The lines of the card, in Markdown.
        base: The base, as it was named; given to the hub only if it is one of the hub's.
        library: The library that loads the folder: ``peft`` or ``transformers``.
        relation: What the folder is to its base, in the hub's words: ``adapter`` or ``finetune``.
    """
    about: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["glm4ft", "lora"]}
    if is_on_hub(base):
        about = {"base_model": base, "base_model_relation": relation, **about}
    front = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    write_atomically(folder / FILE_NAME, f"---\n{front}---\n\n" + "\n".join(body) + "\n")


def own_body(folder: Path) -> list[str]:
    """The lines of a card that ``write_card`` wrote, without what is for the hub; none if there is no such card."""
    try:
        text = (folder / FILE_NAME).read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    front = _FRONT_MATTER.match(text)
    if not front or "glm4ft" not in front[0]:
        return []
    return text[front.end() :].strip().split("\n")


def shown_base(base: str) -> str:
    """The name of a base for a card: a hub id, or the last part of a folder, since cards leave this machine."""
    return code(base if is_on_hub(base) else Path(base).name or base)


def table(facts: Mapping[str, str]) -> list[str]:
    """A table of names and values; both are Markdown."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def is_on_hub(base: str) -> bool:
    """Whether a base is named by a hub id, and not by a folder."""
    return "/" in base and bool(re.fullmatch(HUB_ID, base)) and not Path(base).expanduser().is_dir()
