"""Proves that every training run leaves a report: learnt, missed or broken, with where each option came from.

Run: pytest tests/report/test_run_report.py
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from glm4ft.cli.main import run
from glm4ft.diagnosis.evidence import Evidence, FirstLoss
from glm4ft.diagnosis.finding import Finding
from glm4ft.diagnosis.rules import Diagnosis
from glm4ft.diagnosis.token_losses import measure_targets
from glm4ft.model.tiny import tiny_model
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
from glm4ft.report.content import Headline, Tone
from glm4ft.report.costly_tokens import token_parts
from glm4ft.report.wording import diagnosed_run
from glm4ft.train.trajectory import read_trajectory

TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <b>\x1b[31m"}]}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps(TALK) + "\n", "utf-8")
    return path


def page_of(folder: Path) -> str:
    """Text of the page: without tags, entities as they are read."""
    page = (folder / "report.html").read_text("utf-8")
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page[page.index("<body>") :])).split())


def test_a_learnt_run_says_so_first(learnt: Any) -> None:
    page = page_of(learnt.output)
    assert page.index("Right") < page.index("What was supervised") < page.index("Curves")
    assert "all 4 ends of assistant turns" in page
    assert "4 of 4 assistant turns came back word for word." in page
    assert "<|assistant|> headers 4 0 0" in page
    assert (learnt.output / "summary.md").read_text("utf-8").startswith("### ✅ ")


def test_losses_of_tokens_add_up_to_what_the_run_reached(learnt: Any) -> None:
    """After the last update the mean over all targets is at or below the last recorded loss, which came before it."""
    losses = [row.losses[at] for row in learnt.content.rows for at in row.targets]
    mean = sum(loss for loss in losses if loss is not None) / len(losses)
    assert len(losses) == 115
    assert mean < read_trajectory(learnt.output / "trajectory.jsonl").steps[-1]["loss"] * 1.05


def test_the_measured_loss_is_the_models_own() -> None:
    """Against transformers' loss on the whole row; what is likeliest is the argmax; the mode stays."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.train()
    ids = tokenizer("[gMASK]<sop><|user|>\nHello<|assistant|>\nThe river<|user|>")["input_ids"]
    targets = [at for at, part in enumerate(token_parts(ids, tokenizer)) if part in ("assistant", "terminator")]
    losses, said = measure_targets(model, ids, [0, *targets])
    labels = torch.tensor([[i if at in targets else -100 for at, i in enumerate(ids)]])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), labels=labels)
    measured = [loss for loss in losses if loss is not None]
    assert len(measured) == len(targets)
    assert sum(measured) / len(targets) == pytest.approx(float(output.loss), rel=1e-5)
    assert [said[at] for at in targets] == output.logits[0].argmax(-1)[[at - 1 for at in targets]].tolist()
    assert model.training


def test_a_missed_target_shows_the_card_and_a_wrong_page(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1, what held the loss on the screen, options with their sources, and no text that acts."""
    config, output = tmp_path / "two.yaml", tmp_path / "my runs" / "run"
    config.write_text(f"data: {data}\nmax_steps: 2\n", "utf-8")
    argv = ["train", f"--config={config}", f"--output={output}", "--target_loss=0.01", "--round_trip=true"]
    assert run(argv) == 1
    told = capsys.readouterr().out
    card = told[told.index("FAILED") :]
    for label in ("loss", "grad norm", "targets", "tokens", "round trip", "trained", "said", "adapter", "reproduce"):
        assert re.search(rf"^ *{label} +│ ", card, re.M), label
    assert "\x1b" not in card
    page = page_of(output)
    assert page.startswith("glm4ft training run · run Wrong")
    assert f"max_steps 2 {config}" in page
    assert "target_loss 0.01 command line" in page
    assert "micro_batch_size 2 default" in page
    assert "learning_rate 0.005 default" in page
    assert f"glm4ft train --config '{output}/config.yaml' --output NEW_FOLDER" in page
    raw = (output / "report.html").read_text("utf-8")
    assert "<mark>↵Hello &lt;b&gt;\\x1b[31m&lt;|user|&gt;</mark>" in raw
    assert "\x1b" not in raw


def test_a_broken_run_leaves_a_report_too(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why it stopped and on which rows; what was supervised is there all the same."""
    monkeypatch.setattr("accelerate.Accelerator.clip_grad_norm_", lambda *_, **__: torch.tensor(float("nan")))
    output = tmp_path / "run"
    assert run(["train", f"--data={data}", f"--output={output}", "--max_steps=3"]) == 1
    assert "at step 1" in capsys.readouterr().err
    page = page_of(output)
    assert page.startswith("glm4ft training run · run Wrong The run stopped: loss")
    assert "rows from line(s) 1; last good checkpoint: none" in page
    assert "<|assistant|> headers 1 0 0" in page


def finding(verdict: str, text: str, strength: float = 1.0) -> Finding:
    return Finding(verdict, "rows", text, (f"figures of {verdict}",), f"mend {verdict}", strength)


def headline_of(tone: Tone, *findings: Finding) -> Headline:
    account = Headline(tone, "The loss is 0.2.", "all of it.", ("The loss went from 8 to 0.2.", "0 turns came back."))
    evidence = Evidence((), (), FirstLoss(None, None, 6.3))
    return diagnosed_run(Diagnosis(findings, evidence), account)


def test_a_diagnosis_becomes_the_headline_with_its_evidence_and_remedies() -> None:
    """The first sentence is the headline; what is less than certain is left out; the account comes last."""
    worst, second = finding("a", "It is a. For 0.5 nats of reasons."), finding("b", "It is b.")
    found = headline_of("bad", worst, second, finding("c", "Perhaps c.", strength=0.2))
    assert found == Headline(
        "bad", "It is a.", "all of it.",
        ("For 0.5 nats of reasons.", "Figures of a.", "It is b.", "The loss went from 8 to 0.2.", "0 turns came back."),
        ("Mend a.", "Mend b."),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "before", "tone"),
    [("learnt", "good", "good"), ("learnt", "bad", "bad"), ("still-falling", "unsure", "unsure"),
     ("still-falling", "bad", "bad"), ("unexplained", "good", "unsure"), ("header-supervised", "good", "bad")],
)  # fmt: skip
def test_a_verdict_makes_a_run_worse_but_never_better(verdict: str, before: Tone, tone: Tone) -> None:
    assert headline_of(before, finding(verdict, "x.")).tone == tone
