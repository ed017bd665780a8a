"""``glm4ft init`` finds the trainer by what gives it away, renders what is whole, and leaves alone what is there.

Run: pytest tests/test_init_command.py  (the rendered suites run in environments of their own: tox run -e downstream)
"""

from __future__ import annotations

import ast
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from glm4ft.cli.main import run
from glm4ft.errors import ConfigError
from glm4ft.init_command import rendering
from glm4ft.init_command.detection import detect_trainer
from glm4ft.init_command.rendering import ADAPTER, NEAREST, TRAINERS, render_template, requirement
from glm4ft.model.tiny import tiny_tokenizer
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat
from glm4ft.testing.trial.runner import Result
from glm4ft.testing.trial.wiring import is_wired, unwired, yours_digest
from glm4ft.testing.trial.wording import headline

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
        ("train.py", "from transformers import Seq2SeqTrainer\n", "transformers"),
        (
            "train.py",
            "from transformers import (\n    AutoModel,  # the base\n    Seq2SeqTrainer as T,\n)\n",
            "transformers",
        ),
        ("train.py", "from transformers import AutoModel, \\\n    Trainer\n", "transformers"),
        ("train.py", "from transformers.trainer_seq2seq import Seq2SeqTrainer\n", "transformers"),
        ("train.py", "from transformers import AutoModel\nprint(Trainer)\n", "loop"),
        ("train.py", "from trl import (\n    SFTConfig,\n    SFTTrainer,\n)\n", "trl"),
        ("run.sh", "accelerate launch -m axolotl.cli.train glm4.yaml\n", "axolotl"),
        ("glm4.yaml", "base_model: zai-org/GLM-4-9B-0414\nsequence_len: 4096\n", "axolotl"),
        ("environment.yml", "dependencies:\n  - pip:\n    - axolotl[deepspeed]>=0.12\n", "axolotl"),
        ("sft.yaml", "stage: sft\nfinetuning_type: lora\n", "llamafactory"),
        ("train.py", "import lightning as L\nt = L.Trainer()\n", "lightning"),
        ("train.py", "import pytorch_lightning as pl\nt = pl.Trainer()\n", "lightning"),
        ("train.py", "from lightning.pytorch import (\n    Trainer,\n)\n", "lightning"),
        ("requirements.txt", "torch\npytorch-lightning==2.5\n", "lightning"),
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


@pytest.mark.parametrize("trainer", TRAINERS)
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
    test.write_text(test.read_text().replace("glm4ft_check()", "stale"))
    assert run(["init", str(tmp_path)]) == 0
    assert adapter.read_text() == "mine"
    assert "stale" not in test.read_text()


@pytest.mark.parametrize("trainer", NEAREST)
def test_trainer_without_an_adapter_gets_the_nearest_one_and_is_told(
    trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    assert run(["init", str(tmp_path), "--trainer", trainer]) == 0
    nearest, why = NEAREST[trainer]
    assert f"{why}: rendered for {nearest}" in capsys.readouterr().out
    assert (tmp_path / ADAPTER).is_file()


def test_own_tox_ini_is_known_when_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    assert run(["init", str(tmp_path), "--trainer", "trl"]) == 0
    before = (tmp_path / "tox.ini").read_text()
    capsys.readouterr()
    assert run(["init", str(tmp_path), "--trainer", "trl"]) == 0
    said = capsys.readouterr().out
    assert "everything was there already" in said
    assert "tox.ini was there" not in said
    assert (tmp_path / "tox.ini").read_text() == before


# Files of repositories as one finds them, and what glm4ft init says of them.
LAYOUTS = {
    "tox.ini": ({"tox.ini": "[tox]\nenvlist = py311\n\n[testenv]\ncommands = pytest\n"}, "tox.ini was there"),
    "tox.toml": ({"tox.toml": 'env_list = ["py311"]\n'}, "tox is configured in tox.toml"),
    "pyproject": (
        {"pyproject.toml": '[project]\nname = "x"\n\n[tool.tox]\nlegacy_tox_ini = """[tox]"""\n'},
        "tox is configured in pyproject.toml",
    ),
    "setup.cfg": ({"setup.cfg": "[metadata]\nname = x\n\n[tox:tox]\nenvlist = py311\n"}, "configured in setup.cfg"),
    "workflows": (
        {
            ".github/workflows/conformance.yml": "name: conformance\non: push\njobs: {}\n",
            ".github/workflows/ci.yml": "name: ci\non: push\njobs: {}\n",
            ".pre-commit-config.yaml": "repos: []\n",
        },
        "kept .github/workflows/conformance.yml",
    ),
    "conformance": (
        {"conformance/README.md": "# About the C++ standard\n", "conformance/test_conformance.py": "import re\n"},
        "kept conformance/test_conformance.py",
    ),
    "project": (
        {"pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-q'\n", "README.md": "# x\n"},
        "wrote tox.ini",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_another_are_left_as_they_are(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first time and the second; tox goes on with the configuration that it had."""
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    files, told = LAYOUTS[layout]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for _ in range(2):
        assert run(["init", str(tmp_path), "--trainer", "loop"]) == 0
        said = capsys.readouterr().out
        assert {name: (tmp_path / name).read_text() for name in files} == files
        if "tox" in told and "wrote" not in told:
            assert told in said
            assert "conformance" in said.split(told)[1].split("next:")[0]
            assert (tmp_path / "tox.ini").exists() == ("tox.ini" in files)
    assert told in said or "wrote" in told
    assert (tmp_path / ADAPTER).is_file()
    assert "/" not in (tmp_path / ".copier-answers.yml").read_text().partition("\n")[2]  # no folder of this machine


def test_environment_that_was_added_is_not_asked_for_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    (tmp_path / "tox.ini").write_text("[testenv:conformance]\ncommands = pytest conformance\n")
    assert run(["init", str(tmp_path), "--trainer", "loop"]) == 0
    assert "tox.ini was there" not in capsys.readouterr().out


def test_nothing_compiled_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip compiles the modules of the template where it installs them."""
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    template = Path(shutil.copytree(rendering.TEMPLATES[1], tmp_path / "template"))
    (template / "files" / "conformance" / "__pycache__").mkdir(exist_ok=True)
    (template / "files" / "conformance" / "__pycache__" / "conftest.cpython-311.pyc").write_bytes(b"x")
    monkeypatch.setattr(rendering, "TEMPLATES", (template,))
    render_template(tmp_path / "demo", trainer="loop", name="x")
    assert not [path for path in (tmp_path / "demo").rglob("*") if "pyc" in path.name]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "glm4ft==1.2"),
        ({"url": "file:///home/me/glm4ft", "dir_info": {"editable": True}}, "glm4ft==1.2"),
        ({"url": "file:///tmp/glm4ft-1.2-py3-none-any.whl", "archive_info": {}}, "glm4ft==1.2"),
        ({"url": "file:///home/me/glm4ft", "vcs_info": {"vcs": "git", "commit_id": "abc"}}, "glm4ft==1.2"),
        ({"url": "https://example.org/g.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
         "glm4ft @ git+https://example.org/g.git@abc"),
        ({"url": "https://example.org/glm4ft.whl", "archive_info": {}}, "glm4ft @ https://example.org/glm4ft.whl"),
    ],
)  # fmt: skip
def test_requirement_never_names_a_file_of_this_machine(
    source: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = SimpleNamespace(version="1.2", read_text=lambda name: source and json.dumps(source))
    monkeypatch.setattr(rendering.metadata, "distribution", lambda name: distribution)
    asked: list[str] = []
    assert requirement() == expected
    is_local = bool(source) and source["url"].startswith("file:")
    answer = requirement(lambda question: asked.append(question) or " glm4ft @ git+https://my/fork ")
    assert bool(asked) == is_local
    assert answer == ("glm4ft @ git+https://my/fork" if is_local else expected)
    assert requirement(lambda question: "") == expected


# --- an adapter that is not wired yet ---


def rendered_adapter(trainer: str, folder: Path) -> str:
    pytest.importorskip("copier", reason="needs copier: pip install 'glm4ft[init]'")
    render_template(folder, trainer=trainer, name='my "own" pipeline')
    return (folder / ADAPTER).read_text()


@pytest.mark.parametrize("trainer", TRAINERS)
def test_rendered_adapter_is_not_wired_until_a_line_marked_yours_is_touched(trainer: str, tmp_path: Path) -> None:
    source = rendered_adapter(trainer, tmp_path)
    assert not is_wired(source)
    assert not is_wired(source.replace('name = "my', 'name = "our').replace('"glm-4-0414"  #', "None  #"))
    wired = [f"{source}\n", source.replace("class Subject", "X = 1\n\n\nclass Subject")]
    assert not any(map(is_wired, wired))  # nothing of the pipeline changed
    added = source.replace("    name =", "    train = mine\n    name =")
    assert is_wired(added)
    for line in source.splitlines():
        if "YOURS" in line and line.startswith("    ") and not line.strip().startswith("#") and '"""' not in line:
            assert is_wired(source.replace(line, line.replace("(", "(mine, ", 1).replace('": 8', '": 9'))), line


def test_loop_of_ones_own_is_wired_by_any_line_of_it(tmp_path: Path) -> None:
    source = rendered_adapter("loop", tmp_path)
    assert is_wired(source.replace("            scheduler.step()\n", ""))


def test_unwired_subject_is_said_to_be_and_others_are_not(tmp_path: Path) -> None:
    source = rendered_adapter("loop", tmp_path)
    for name, text in (("as_rendered", source), ("wired", source.replace('"r": 8', '"r": 4'))):
        (tmp_path / f"{name}.py").write_text(text)
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        subject = object.__new__(module.Subject)
        told = unwired(subject)
        assert told.startswith("Not wired to your code yet") == (name == "as_rendered")
    assert unwired(object()) == ""
    assert unwired(FoundingBugFormat("glm-4-0414", tiny_tokenizer())) == ""


def test_verdict_on_an_unwired_subject_is_not_right() -> None:
    passed = [Result("a", "rows", "passed", "", 0.1)]
    found = headline(passed, "", unwired="Not wired to your code yet: x.")
    assert (found.tone, found.text) == ("unsure", "Not wired to your code yet: x.")
    failed = [Result("a", "rows", "failed", "position 7", 0.1)]
    assert "Not wired to your code yet: x." in headline(failed, "", unwired="Not wired to your code yet: x.").happened
    assert yours_digest("not python (") == ""


def test_without_copier_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "copier", None)
    with pytest.raises(ConfigError, match=r"glm4ft\[init\]"):
        render_template(tmp_path, trainer="loop", name="x")


def test_unknown_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such trainer"):
        render_template(tmp_path, trainer="verl", name="x")


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
