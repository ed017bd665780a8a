"""Which trainer a repository uses: looked for in requirements, project files, scripts, configurations and imports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_FILES = 2000  # enough to find an import in, few enough not to read a data folder
SKIPPED_FOLDERS = ("venv", "node_modules", "build", "dist", "site-packages", "conformance")

# Trainer to what gives it away, the most specific first: all of the others import transformers too. The first pattern
# of each is for the names that are imported, as `module.name`; the second for lines of requirements and scripts.
_REQUIRED = r"^\s*(?:-\s*)?[\"']?(?:{})\b\s*(?:[=<>~!\[,;\"'@]|$)"
SIGNS = {
    "llamafactory": (
        r"(llamafactory|llmtuner)\b",
        r"llamafactory-cli\b|^finetuning_type:|" + _REQUIRED.format("llamafactory"),
    ),
    "swift": (r"swift(\.|$)", r"\bswift (sft|pt|rlhf)\b|" + _REQUIRED.format("ms[-_]swift")),
    "axolotl": (
        r"axolotl\b",
        r"\baxolotl (train|preprocess)\b|-m axolotl\b|^sequence_len:|" + _REQUIRED.format("axolotl"),
    ),
    "trl": (r"trl(\.|$)", r"\btrl (sft|dpo)\b|" + _REQUIRED.format("trl")),
    "transformers": (r"transformers\.(.*\.)?(\w*Trainer|trainer|trainer_seq2seq)(\.|$)", r"(?!)"),
    "lightning": (
        r"(pytorch_lightning|lightning)(\.|$)",
        _REQUIRED.format("(?:pytorch[-_])?lightning"),
    ),
    "loop": (r"(?!)", r"\.backward\(\)"),
}
DEFAULT_TRAINER = "loop"


@dataclass(frozen=True)
class Detected:
    """The trainer a repository uses.

    Args:
        trainer: a key of ``SIGNS``.
        where: file and line that say so; "" if nothing does.
    """

    trainer: str
    where: str


def detect_trainer(folder: Path) -> Detected:
    """Look for a trainer in requirements, project files, scripts, configurations and imports.

    Args:
        folder: of the repository; it may be empty or not exist.
    """
    texts = [(path, path.read_text("utf-8", errors="replace")) for path in _sources(folder)]
    named = [(path, list(_imports(text)) if path.suffix == ".py" else [], text.splitlines()) for path, text in texts]
    for trainer, (imported, written) in SIGNS.items():
        for path, imports, lines in named:
            found = [number for number, name in imports if re.match(imported, name)]
            found += [number for number, line in enumerate(lines, start=1) if re.search(written, line)]
            if found:
                return Detected(trainer, f"{path.relative_to(folder)}:{min(found)}")
    return Detected(DEFAULT_TRAINER, "")


_FROM = re.compile(r"^[^\S\n]*from[^\S\n]+([\w.]+)[^\S\n]+import[^\S\n]*(\([^)]*\)|(?:[^\n\\]|\\\n)*)", re.MULTILINE)
_IMPORT = re.compile(r"^[^\S\n]*import[^\S\n]+([^\n]+)", re.MULTILINE)
_ATTRIBUTE = re.compile(r"\btransformers\.\w*Trainer\b")


def _imports(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of what a module imports, over several lines too; it need not be valid Python here."""
    for match in _FROM.finditer(text):
        names = re.sub(r"#[^\n]*", "", match[2]).strip("()")
        for name in re.split(r"[,\n]", names):
            if name.strip(" \\"):
                yield _line(text, match.start()), f"{match[1]}.{name.split()[0]}"
    for match in _IMPORT.finditer(text):
        for name in match[1].partition("#")[0].split(","):
            if name.strip():
                yield _line(text, match.start()), name.split()[0]
    for match in _ATTRIBUTE.finditer(text):
        yield _line(text, match.start()), match[0]


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _sources(folder: Path) -> Iterator[Path]:
    patterns = ("*.py", "*.toml", "*.cfg", "*.sh", "*requirements*.txt", "*.yml", "*.yaml", "Makefile")
    found = sorted({path for pattern in patterns for path in folder.rglob(pattern) if path.is_file()})
    own = [p for p in found if not any(_is_skipped(part) for part in p.relative_to(folder).parts[:-1])]
    yield from own[:MAX_FILES]


def _is_skipped(folder: str) -> bool:
    return folder.startswith(".") or folder in SKIPPED_FOLDERS
