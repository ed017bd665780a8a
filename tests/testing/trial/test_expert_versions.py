"""Models with experts are refused, not misjudged, where libraries computed them otherwise than the specification does.

Run: pytest tests/testing/trial/test_expert_versions.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from glm4ft.cli.main import run
from glm4ft.errors import ModelError
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.recording.description import describe
from glm4ft.testing.recording.record import record
from glm4ft.testing.recording.trace_file import write_trace
from glm4ft.testing.specification import routed_experts
from glm4ft.testing.specification.routed_experts import too_old
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects import own
from glm4ft.testing.trial.recorded import judge_recording
from glm4ft.testing.trial.runner import trial_of

OWN = "glm4ft.testing.subjects.own:Subject"
ENOUGH = {"transformers": "5.14.0", "peft": "0.19.1"}
OLD = ENOUGH | {"peft": "0.18.1"}


class RowsAlone:
    """A subject that has rows and no model."""

    name = "rows alone"

    def __init__(self, base_dir: str) -> None:
        whole = own.Subject(base_dir)
        self.tokenizer, self.encode = whole.tokenizer, whole.encode


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    return write_tiny_base(tmp_path / "base", architecture="Glm4MoeForCausalLM")


def install(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str]) -> None:
    monkeypatch.setattr(routed_experts, "version", versions.__getitem__)


@pytest.mark.parametrize(
    ("found", "old"),
    [
        (ENOUGH, set()),
        ({"transformers": "5.9.1", "peft": "0.20.0"}, {"transformers"}),
        ({"transformers": "5.14.0.dev0", "peft": "0.19.0"}, {"peft"}),
        ({"transformers": "6.0", "peft": "1.0rc1", "torch": "2.6"}, set()),
        ({"torch": "2.6"}, set()),
    ],
)
def test_versions_are_compared_as_numbers(found: Mapping[str, str], old: set[str]) -> None:
    assert set(too_old(found)) == old


def test_trial_is_refused_with_what_was_found_what_is_expected_and_how_to_fix_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, OLD)
    assert run(["check", "--subject", OWN, "--model", "tiny:glm-4.5", "--stages", "clipping"]) == 2
    told = capsys.readouterr().err
    assert "a model with experts cannot be judged" in told
    assert "found:    peft 0.18.1 (installed)\n" in told
    assert "expected: transformers>=5.14, peft>=0.19.1\n" in told
    assert "fix:      pip install 'transformers>=5.14' 'peft>=0.19.1'\n" in told


@pytest.mark.parametrize(("spec", "base"), [(OWN, "tiny"), (f"{__name__}:RowsAlone", "tiny:glm-4.5")])
def test_dense_base_and_rows_alone_are_judged(spec: str, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, OLD)
    with trial_of(spec, base) as trial:
        assert trial.rows(trial.demo)


@pytest.mark.parametrize(
    ("recorded", "installed", "words"),
    [(OLD, ENOUGH, r"\(recorded\)[^$]*record the run again"), (ENOUGH, OLD, r"\(installed\)")],
)
def test_recording_is_refused_by_the_versions_of_the_run_and_of_the_judge(
    recorded: Mapping[str, str], installed: Mapping[str, str], words: str, experts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    subject = own.Subject(str(experts))
    model = subject.build_model(str(experts), 0)
    conversation = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    with record(model, 1) as trace:
        subject.train(model, [conversation], make_plan(steps=1, output_dir=str(tmp_path / "run")))
    write_trace(trace, tmp_path / "recording" / "rank-0", describe(model, {}) | {"versions": dict(recorded)})
    install(monkeypatch, installed)
    with pytest.raises(ModelError, match=words):
        judge_recording(tmp_path / "recording", str(experts))
