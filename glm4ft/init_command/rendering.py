"""``glm4ft init``: put another repository's trainer on trial, by rendering the template that the package carries."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import glm4ft
from glm4ft.errors import ConfigError
from glm4ft.init_command.detection import Detected, detect_trainer

# In a wheel the template lies inside of the package, in a checkout beside it.
TEMPLATES = (Path(glm4ft.__file__).parent / "_template", Path(glm4ft.__file__).parents[1] / "template")
ADAPTER, ANSWERS = "conformance/adapter.py", ".copier-answers.yml"
MARK = "Rendered by `glm4ft init`"  # in what is rendered again, and in tox.ini
TRAINERS = ("transformers", "trl", "llamafactory", "swift", "loop")  # those that there is an adapter for
# Trainers without an adapter of their own: the adapter that comes nearest, and why.
NEAREST = {
    "axolotl": ("transformers", "axolotl has no adapter of its own; its trainer is a subclass of transformers.Trainer"),
    "lightning": ("loop", "Lightning has no adapter of its own; its training_step goes into a loop"),
}


def requirement(ask: Callable[[str], str] | None = None) -> str:
    """How others install this very glm4ft, as a requirement of pip: its address, or its version.

    Args:
        ask: A function that asks the user; it is given the question, and is called only where glm4ft was installed from
            files of this machine, whose address is of no use elsewhere. None to take the version then.
    """
    distribution = metadata.distribution("glm4ft")
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    released, url = f"glm4ft=={distribution.version}", str(source.get("url", ""))
    if not url:
        return released
    if not url.startswith("file:"):
        vcs = source.get("vcs_info")
        return f"glm4ft @ {vcs['vcs']}+{url}@{vcs['commit_id']}" if vcs else f"glm4ft @ {url}"
    given = (
        ask(f"glm4ft was installed from files of this machine. How do others install it? [{released}] ") if ask else ""
    )
    return given.strip() or released


def render_template(folder: Path, *, trainer: str, name: str, required: str | None = None) -> list[str]:
    """Render the template into a repository. What is there and was not rendered before is left alone.

    Args:
        folder: of the repository; is made if need be.
        trainer: one of ``TRAINERS``.
        name: of the pipeline in reports.
        required: how glm4ft is installed, as a requirement of pip; None to take ``requirement``.
    Returns:
        The files that are new or have changed, by their names in the repository.
    Raises:
        ConfigError: if copier is missing, or there is no such trainer.
    """
    if trainer not in TRAINERS:
        raise ConfigError("there is no such trainer", where="--trainer", found=trainer, expected=", ".join(TRAINERS))
    try:
        from copier import run_copy
    except ImportError as error:
        raise ConfigError(
            "rendering the template needs copier", found=str(error), fix="pip install 'glm4ft[init]'"
        ) from error
    before = _contents(folder)
    answers = {"name": name, "trainer": trainer, "requirement": required or requirement()}
    kept = foreign_files(folder) + (["tox.ini"] if tox_configuration(folder) else [])
    run_copy(
        str(_template()), folder, data=answers, defaults=True, overwrite=True, quiet=True, skip_if_exists=kept,
        exclude=["tox.ini"] if tox_configuration(folder) else [],
    )  # fmt: skip
    return sorted(file for file, content in _contents(folder).items() if before.get(file) != content)


def foreign_files(folder: Path) -> list[str]:
    """The files of a repository that have a name of the template's, but were not rendered from it."""
    names = [f".github/workflows/{name}" for name in ("conformance.yml", "conformance-gpu.yml")]
    names += [f"conformance/{name}" for name in ("README.md", "test_conformance.py", "test_conformance_gpu.py")]
    return [name for name in names if (folder / name).is_file() and MARK not in _text(folder / name)]


def tox_configuration(folder: Path) -> str:
    """The file that configures tox already, where tox.ini would take its place or is another's; "" if there is none."""
    if (folder / "tox.ini").is_file():
        return "" if MARK in _text(folder / "tox.ini") else "tox.ini"
    if (folder / "tox.toml").is_file():
        return "tox.toml"
    if re.search(r"^\[tox:tox\]", _text(folder / "setup.cfg"), re.MULTILINE):
        return "setup.cfg"
    try:
        project = tomllib.loads(_text(folder / "pyproject.toml"))
    except tomllib.TOMLDecodeError:
        project = {}
    return "pyproject.toml" if "tox" in project.get("tool", {}) else ""


def describe_rendering(
    folder: Path, *, trainer: str | None = None, name: str | None = None, required: str | None = None
) -> str:
    """Render the template and say what was done, and what is to be done.

    Args:
        folder: of the repository; is made if need be.
        trainer: a key of ``SIGNS``; None to look for it.
        name: of the pipeline in reports; None for the folder's.
        required: how glm4ft is installed, as a requirement of pip; None to find out, and to ask if need be.
    """
    detected = Detected(trainer, "--trainer") if trainer else detect_trainer(folder)
    rendered, why = NEAREST.get(detected.trainer, (detected.trainer, ""))
    has_tox = (folder / "tox.ini").exists()
    needs_requirement = not has_tox and not tox_configuration(folder)
    required = required or requirement(input if needs_requirement and sys.stdin.isatty() else None)
    foreign, tox = foreign_files(folder), tox_configuration(folder)
    written = render_template(folder, trainer=rendered, name=name or folder.resolve().name, required=required)
    lines = [f"trainer: {detected.trainer} ({detected.where or 'nothing names one; --trainer does'})"]
    lines += [f"  {why}: rendered for {rendered}"] if why else []
    lines += [f"  wrote {file}" for file in written] or ["  everything was there already"]
    lines += [f"  kept {file}, which is not from here: move it away to have it rendered" for file in foreign]
    if tox:
        place = "tox.ini was there" if tox == "tox.ini" else f"tox is configured in {tox}"
        lines += [f"  {place}: add this environment to it", *_environment(tox, required)]
    elif not has_tox and required == requirement() and _is_local():
        lines.append(f"  tox.ini installs {required}: if that is not released, name another by --requirement")
    lines.append(f"next: cd {folder} && pip install tox && tox run -e conformance")
    return "\n".join(
        [*lines, f"then: let the lines marked YOURS in {ADAPTER} call your own code; until then it is not judged"]
    )


def _is_local() -> bool:
    source = json.loads(metadata.distribution("glm4ft").read_text("direct_url.json") or "{}")
    return str(source.get("url", "")).startswith("file:")


def _environment(tox: str, required: str) -> list[str]:
    """The environment for another tox configuration, in its language."""
    commands = 'pytest conformance -m "not gpu"'
    if tox.endswith(".toml"):
        table = "env.conformance" if tox == "tox.toml" else "tool.tox.env.conformance"
        return [
            f"    [{table}]",
            '    package = "skip"',
            f'    deps = [{json.dumps(required)}, "pytest>=8.4"]',
            '    commands = [["pytest", "conformance", "-m", "not gpu"]]',
        ]
    return [
        "    [testenv:conformance]",
        "    package = skip",
        f"    deps = {required}",
        "           pytest>=8.4",
        f"    commands = {commands}",
    ]


def _text(path: Path) -> str:
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _template() -> Path:
    return next(path for path in TEMPLATES if (path / "copier.yml").is_file())


def _contents(folder: Path) -> dict[str, bytes]:
    """What the template may write: its own folders and the files at the top."""
    places = [*folder.glob("*"), *folder.glob("conformance/**/*"), *folder.glob(".github/**/*")]
    places += list(folder.glob(ANSWERS))
    return {str(path.relative_to(folder)): path.read_bytes() for path in places if path.is_file()}
