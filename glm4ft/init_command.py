"""``glm4ft init``: put another repository's trainer on trial, by rendering the template that the package carries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import glm4ft
from glm4ft.errors import ConfigError

# In a wheel the template lies inside of the package, in a checkout beside it.
TEMPLATES = (Path(glm4ft.__file__).parent / "_template", Path(glm4ft.__file__).parents[1] / "template")
ADAPTER = "conformance/adapter.py"
MAX_FILES = 2000  # enough to find an import in, few enough not to read a data folder
SKIPPED_FOLDERS = ("venv", "node_modules", "build", "dist", "site-packages", "conformance")

# Trainer to what gives it away, the most specific first: all of the others import transformers too.
SIGNS = {
    "llamafactory": r"^\s*(from|import)\s+llamafactory\b|llamafactory-cli|^\s*[\"']?llamafactory\b",
    "swift": r"^\s*(from|import)\s+swift\b|\bswift sft\b|^\s*[\"']?ms[-_]swift\b",
    "trl": r"^\s*(from|import)\s+trl\b|^\s*[\"']?trl\b\s*([=<>~!\[,\"']|$)",
    "transformers": r"^\s*from\s+transformers\b.*\bTrainer\b|\btransformers\.(Seq2Seq)?Trainer\b|\bTrainer\(",
    "loop": r"\.backward\(\)",
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
    """Look for a trainer in requirements, project files, scripts and imports.

    Args:
        folder: of the repository; it may be empty or not exist.
    """
    texts = [(path, path.read_text("utf-8", errors="replace").splitlines()) for path in _sources(folder)]
    for trainer, pattern in SIGNS.items():
        sign = re.compile(pattern)
        for path, lines in texts:
            for number, line in enumerate(lines, start=1):
                if sign.search(line):
                    return Detected(trainer, f"{path.relative_to(folder)}:{number}")
    return Detected(DEFAULT_TRAINER, "")


def _sources(folder: Path) -> Iterator[Path]:
    patterns = ("*.py", "*.toml", "*.cfg", "*.sh", "*requirements*.txt")
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())
    own = [p for p in found if not any(_is_skipped(part) for part in p.relative_to(folder).parts[:-1])]
    yield from own[:MAX_FILES]


def _is_skipped(folder: str) -> bool:
    return folder.startswith(".") or folder in SKIPPED_FOLDERS


def requirement() -> str:
    """How to install this very glm4ft, as a requirement of pip: from where it was installed, or by its version."""
    distribution = metadata.distribution("glm4ft")
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "vcs_info" in source:
        return f"glm4ft @ {source['vcs_info']['vcs']}+{source['url']}@{source['vcs_info']['commit_id']}"
    return f"glm4ft @ {source['url']}" if source else f"glm4ft=={distribution.version}"


def render_template(folder: Path, *, trainer: str, name: str) -> list[str]:
    """Render the template into a repository. Adapter, conftest and tox.ini are left alone where they exist.

    Args:
        folder: of the repository; is made if need be.
        trainer: a key of ``SIGNS``.
        name: of the pipeline in reports.
    Returns:
        The files that are new or have changed, by their names in the repository.
    Raises:
        ConfigError: if copier is missing, or there is no such trainer.
    """
    if trainer not in SIGNS:
        raise ConfigError("there is no such trainer", where="--trainer", found=trainer, expected=", ".join(SIGNS))
    try:
        from copier import run_copy
    except ImportError as error:
        raise ConfigError(
            "rendering the template needs copier", found=str(error), fix="pip install 'glm4ft[init]'"
        ) from error
    before = _contents(folder)
    answers = {"name": name, "trainer": trainer, "requirement": requirement()}
    run_copy(str(_template()), folder, data=answers, defaults=True, overwrite=True, quiet=True)
    return sorted(file for file, content in _contents(folder).items() if before.get(file) != content)


def describe_rendering(folder: Path, *, trainer: str | None = None, name: str | None = None) -> str:
    """Render the template and say what was done, and what is to be done.

    Args:
        folder: of the repository; is made if need be.
        trainer: a key of ``SIGNS``; None to look for it.
        name: of the pipeline in reports; None for the folder's.
    """
    detected = Detected(trainer, "--trainer") if trainer else detect_trainer(folder)
    written = render_template(folder, trainer=detected.trainer, name=name or folder.resolve().name)
    lines = [f"trainer: {detected.trainer} ({detected.where or 'nothing names one; --trainer does'})"]
    lines += [f"  wrote {file}" for file in written] or ["  everything was there already"]
    if "tox.ini" not in written:
        lines.append("  tox.ini was there: take over the environments of the one that `glm4ft init` writes elsewhere")
    lines.append(f"next: cd {folder} && pip install tox && tox run -e conformance")
    return "\n".join([*lines, f"then: let the lines marked YOURS in {ADAPTER} call your own code"])


def _template() -> Path:
    return next(path for path in TEMPLATES if (path / "copier.yml").is_file())


def _contents(folder: Path) -> dict[str, bytes]:
    """What the template may write: its own folders and the files at the top."""
    places = [*folder.glob("*"), *folder.glob("conformance/**/*"), *folder.glob(".github/**/*")]
    places += list(folder.glob(".copier-answers.yml"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in places if path.is_file()}
