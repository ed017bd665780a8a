"""``glm4ft init`` finds the trainer by what gives it away, renders what is whole, and leaves alone what is there.

Run: pytest tests/test_init_command.py  (the rendered suites run in environments of their own: tox run -e downstream)
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import yaml

from glm4ft.cli.main import run
from glm4ft.errors import ConfigError
from glm4ft.init_command import SIGNS, detect_trainer, render_template, requirement

LONGEST_ADAPTER = 60  # lines of code, docstrings and comments aside


@pytest.mark.parametrize(
    ("file", "text", "trainer"),
    [
        ("train.py", "from transformers import Trainer, TrainingArguments\n", "transformers"),
        ("train.py", "import transformers\nt = transformers.Trainer()\n", "transformers"),
        ("train.py", "import transformers\nfrom trl import SFTTrainer\n", "trl"),
        ("requirements.txt", "transformers\ntrl>=1.0\n", "trl"),
        ("requirements-train.txt", "torch\nms_swift==4.6.0\n", "swift"),
        ("pyproject.toml", '[project]\ndependencies = [\n  "llamafactory==0.9.5",\n]\n', "llamafactory"),
        ("run.sh", "llamafactory-cli train sft.yaml\n", "llamafactory"),
        ("run.sh", "swift sft --model x\n", "swift"),
        ("loop.py", "loss.backward()\n", "loop"),
        ("train.py", "import control\nfrom swiftly import x\n", "loop"),
        (".venv/lib/trl.py", "import trl\n", "loop"),
    ],
)
def test_trainer_is_found_by_what_gives_it_away(file: str, text: str, trainer: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert detect_trainer(tmp_path).trainer == trainer


def test_detection_says_where_it_read_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os\nimport trl\n")
    assert detect_trainer(tmp_path).where == "train.py:2"
    assert detect_trainer(tmp_path / "nothing here").where == ""


@pytest.mark.parametrize("trainer", SIGNS)
def test_rendered_adapter_is_short_and_whole(trainer: str, tmp_path: Path) -> None:
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    written = render_template(tmp_path / "demo", trainer=trainer, name='a "quoted" name')
    adapter = (tmp_path / "demo" / "conformance" / "adapter.py").read_text()
    assert 'name = "a \\"quoted\\" name"' in adapter
    assert lines_of_code(adapter) <= LONGEST_ADAPTER
    for file in written:
        text = (tmp_path / "demo" / file).read_text()
        assert "{{" not in text, file
        assert "{%" not in text, file
    assert requirement() in (tmp_path / "demo" / "tox.ini").read_text()
    for workflow in (tmp_path / "demo" / ".github" / "workflows").iterdir():
        jobs = yaml.safe_load(workflow.read_text())
        assert jobs["permissions"] == {}
        assert "pull_request_target" not in workflow.read_text()


def test_init_finds_the_trainer_and_keeps_what_is_yours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second time renews the wiring and touches neither adapter nor tox.ini."""
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    (tmp_path / "train.py").write_text("import trl\n")
    (tmp_path / "tox.ini").write_text("[tox]\n")
    assert run(["init", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "trainer: trl (train.py:1)" in said
    assert "tox.ini was there" in said
    assert (tmp_path / "tox.ini").read_text() == "[tox]\n"
    adapter, test = tmp_path / "conformance" / "adapter.py", tmp_path / "conformance" / "test_conformance.py"
    adapter.write_text("mine")
    test.write_text("stale")
    assert run(["init", str(tmp_path)]) == 0
    assert adapter.read_text() == "mine"
    assert "parametrize_with_checks" in test.read_text()


def test_without_copier_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "copier", None)
    with pytest.raises(ConfigError, match=r"glm4ft\[init\]"):
        render_template(tmp_path, trainer="loop", name="x")


def test_unknown_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such trainer"):
        render_template(tmp_path, trainer="axolotl", name="x")


@pytest.mark.parametrize("subject", ["transformers_trainer", "trl", "llamafactory", "ms_swift", "official_script"])
def test_shipped_adapters_are_short(subject: str) -> None:
    """They are read, not imported: their trainers need not be there."""
    import glm4ft.testing.subjects as subjects

    text = (Path(subjects.__file__).parent / f"{subject}.py").read_text()
    assert lines_of_code(text) <= LONGEST_ADAPTER


def lines_of_code(text: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    tree = ast.parse(text)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docstrings |= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in docstrings for n, line in lines)
