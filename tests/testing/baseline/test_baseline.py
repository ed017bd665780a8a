"""Recorded curves: what is refused, what is compared, and what an alarm says."""

import dataclasses
import json
import re
from typing import ClassVar

import pytest

from glm4ft.cli.main import run
from glm4ft.errors import ConfigError, DataError, RunError
from glm4ft.testing.baseline.baseline_file import read_baseline, write_baseline
from glm4ft.testing.baseline.compare import compare, compare_curves
from glm4ft.testing.baseline.environment import Tier
from glm4ft.testing.baseline.measure import PLAN, measure, record_baseline, require_recordable
from glm4ft.testing.subjects.plain_loop import Subject

pytest_plugins = ["pytester"]

PLAIN = "glm4ft.testing.subjects.plain_loop:Subject"
HERE = "tests.testing.baseline.test_baseline"
SHORT = {**PLAN, "steps": 4}
SEEDS = tuple(range(5))


class LargerGradient(Subject):
    """Trains on a loss that is a hundredth too large."""

    def loss_factor(self, batch, num_targets, num_micro_batches):
        return 1.01 * super().loss_factor(batch, num_targets, num_micro_batches)


class OneCharacterMore(Subject):
    """Encodes the third conversation with one more character."""

    def encode(self, messages, tools=None):
        if messages[0]["content"].startswith("question 2"):
            messages = [{**messages[0], "content": messages[0]["content"] + "!"}, *messages[1:]]
        return super().encode(messages, tools)


class TargetsInAnotherOrder(Subject):
    """Asks for the same adapters."""

    lora: ClassVar = {**Subject.lora, "target_modules": list(reversed(Subject.lora["target_modules"]))}


class SometimesOther(Subject):
    """Draws its order of the data from no seed."""

    calls = 0

    def epoch_order(self, num_items, epoch, seed, rank):
        SometimesOther.calls += 1
        return super().epoch_order(num_items, epoch, seed + SometimesOther.calls, rank)


@pytest.fixture(autouse=True)
def changed_repository(monkeypatch):
    """Whether this repository has changes that are not committed would decide the tier."""
    monkeypatch.setattr("glm4ft.testing.baseline.compare.uncommitted", lambda folder: ["train.py"])


@pytest.fixture(scope="module")
def healthy():
    return measure(PLAIN, plan=SHORT, seeds=SEEDS)


def changed(measured, **figures):
    """The curves with figures of the last step of the first seed replaced."""
    first, *others = measured.baseline.curves
    steps = (*first.steps[:-1], dataclasses.replace(first.steps[-1], **figures))
    return (dataclasses.replace(first, steps=steps), *others)


def test_a_baseline_is_read_as_it_was_written(healthy, tmp_path):
    write_baseline(tmp_path / "b.jsonl", healthy.baseline)
    found = read_baseline(tmp_path / "b.jsonl")
    assert found.curves == healthy.baseline.curves
    assert compare(found, healthy).outcome == "identical"


def test_figures_are_those_of_the_run(healthy):
    step = healthy.baseline.curves[0].steps[0]
    rows = healthy.rows
    assert 0 < step.supervised_tokens < step.tokens < sum(len(ids) for ids, _ in rows)
    # an untouched base knows nothing of the words: its loss is near that of guessing
    assert 6 < step.loss < 12
    assert [s.learning_rate for s in healthy.baseline.curves[0].steps] == pytest.approx([0, 2.5e-3, 5e-3, 2.5e-3])


def test_a_systematic_change_is_an_alarm_that_names_step_and_size(healthy):
    now = measure(f"{HERE}:LargerGradient", plan=SHORT, seeds=SEEDS)
    found = compare(healthy.baseline, now)
    assert found.is_alarm
    assert "at step 1, the gradient norm is 1.00% higher" in found.text
    assert found.p == found.level == 1 / 16


def test_another_row_is_told_as_data_with_the_row(healthy):
    found = compare(healthy.baseline, measure(f"{HERE}:OneCharacterMore", plan=SHORT, seeds=SEEDS[:1]))
    assert found.outcome == "not comparable"
    assert "ids or labels of row 3 differ (1 like it)" in found.text
    assert "question 2" in found.text


def test_the_order_of_the_targets_means_nothing(healthy):
    other = measure(f"{HERE}:TargetsInAnotherOrder", plan=SHORT, seeds=SEEDS[:1]).baseline.identity
    assert other.adapters == healthy.baseline.identity.adapters


def test_the_command_names_the_row_in_which_a_character_changed(healthy, tmp_path, capsys):
    file = tmp_path / "b.jsonl"
    write_baseline(file, dataclasses.replace(healthy.baseline, subject=f"{HERE}:OneCharacterMore"))
    assert run(["baseline", "compare", str(file)]) == 1
    told = capsys.readouterr().out
    assert told.startswith(f"{file}: not comparable (")
    assert "other data: ids or labels of row 3 differ (1 like it); it is now '[gMASK]<sop><|user|>" in told
    assert "question 2 why why why !" in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"plan": {"learning_rate": 1e-3}}, "another plan: learning_rate is 0.005, in the baseline 0.001"),
        ({"config": {"a_field": 1.0}}, ""),  # one that this version of transformers does not write
        ({"config": {"hidden_size": 1}}, "another base: hidden_size of config.json"),
        ({"weights": {"model.norm.weight": (1.0, 0.0)}}, "another base: the weights of model.norm.weight differ"),
        ({"weights": {"model.extra": (1.0, 0.0)}}, "another base: model.extra is in the baseline alone"),
        ({"adapters": {"r": 99}}, "other adapters: r is 8, in the baseline 99"),
        ({"trained": {"lora_A": (8, 128)}}, "the trained parameter lora_A is not there, in the baseline [8, 128]"),
        ({"tokenizer": "0"}, "another tokenizer"),
        ({"rows": ("0",)}, "other data: ids or labels of row 1 differ"),
    ],
)
def test_another_identity_is_told_before_any_curve(healthy, change, words):
    own = healthy.baseline.identity
    new = {
        name: {**getattr(own, name), **value} if isinstance(value, dict) else value for name, value in change.items()
    }
    before = dataclasses.replace(healthy.baseline, identity=dataclasses.replace(own, **new))
    found = compare(before, healthy)
    assert (found.outcome == "not comparable") == bool(words)
    assert words in found.text


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"loss": float("nan")}, "seed 0, step 4: the loss is nan"),
        ({"grad_norm": float("inf")}, "seed 0, step 4: the gradient norm is inf"),
        ({"tokens": 1}, "seed 0, step 4: 1 tokens"),
        ({"supervised_tokens": 1}, "seed 0, step 4: 1 supervised tokens"),
        ({"learning_rate": 1.0}, "seed 0, step 4: the learning rate is 1"),
        ({"learning_rate": float("nan")}, "seed 0, step 4: the learning rate is nan"),
    ],
)
def test_what_no_rounding_explains_is_an_alarm_at_one_seed(healthy, figures, words):
    found = compare_curves(healthy.baseline.curves, changed(healthy, **figures), Tier.OTHER)
    assert found.is_alarm
    assert words in found.text


def test_one_seed_with_other_last_bits_is_an_alarm_only_at_the_same_commit(healthy):
    now = changed(healthy, loss=healthy.baseline.curves[0].steps[-1].loss * (1 + 1e-12))
    assert compare_curves(healthy.baseline.curves, now, Tier.SAME_LIBRARIES).outcome == "no difference"
    found = compare_curves(healthy.baseline.curves, now, Tier.SAME_COMMIT)
    assert found.is_alarm
    assert "seed 0, first at step 4: loss is" in found.text


def test_a_missing_step_is_an_alarm(healthy):
    first, *others = healthy.baseline.curves
    now = (dataclasses.replace(first, steps=first.steps[:-1]), *others)
    assert "takes 3 optimizer steps, in the baseline 4" in compare_curves(healthy.baseline.curves, now, Tier.OTHER).text


def test_a_run_that_does_not_repeat_is_refused():
    found = measure(f"{HERE}:SometimesOther", plan=SHORT, seeds=(0,))
    with pytest.raises(RunError, match="two runs of seed 0 in one environment differ, first at step 1"):
        require_recordable(found)


def test_a_run_that_no_longer_repeats_is_an_alarm(healthy):
    """Its differences have no sign in common, so that no test of the curves would tell."""
    found = compare(healthy.baseline, measure(f"{HERE}:SometimesOther", plan=SHORT, seeds=SEEDS))
    assert found.is_alarm
    assert "two runs of seed 0 in one environment differ, first at step 1" in found.text


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_run_that_is_not_finite_is_refused(healthy, loss):
    found = dataclasses.replace(healthy.baseline, curves=changed(healthy, loss=loss))
    with pytest.raises(RunError, match="seed 0 has figures that are not finite"):
        require_recordable(dataclasses.replace(healthy, baseline=found))


def test_a_dirty_repository_is_refused(tmp_path, monkeypatch):
    import subprocess

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "train.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"not committed(?s:.*)train\.py"):
        record_baseline(tmp_path / "baselines" / "b.jsonl", PLAIN, "tiny", SHORT, 5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [], "the baseline is empty"),
        (lambda lines: lines[1:], "line 1: schema"),
        (lambda lines: lines[:-1], "3 steps of seed 4"),
        (lambda lines: [*lines[:3], lines[3].replace('"step": 3', '"step": "3x"'), *lines[4:]], "line 4: step"),
        (lambda lines: [lines[0].replace('"schema": 1', '"schema": 9'), *lines[1:]], "another version's baseline"),
        (lambda lines: [*lines[:2], "{", *lines[3:]], "line 3"),
    ],
)
def test_a_damaged_file_is_an_error_with_its_line(healthy, tmp_path, damage, words):
    file = tmp_path / "b.jsonl"
    write_baseline(file, healthy.baseline)
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(DataError, match=words):
        read_baseline(file)


def test_compare_runs_the_baseline_again_and_history_draws_what_was_kept(healthy, tmp_path, capsys):
    file, keep = tmp_path / "plain.jsonl", tmp_path / "kept"
    write_baseline(file, healthy.baseline)
    assert run(["baseline", "compare", str(file), "--keep", str(keep), "--json", str(tmp_path / "c.json")]) == 0
    (record,) = json.loads((tmp_path / "c.json").read_text())["comparisons"]
    assert record["outcome"] == "identical"
    assert run(["baseline", "history", str(file), str(keep / "plain.jsonl"), "--report", str(tmp_path)]) == 0
    assert "page: " in capsys.readouterr().out
    page = (tmp_path / "history.html").read_text()
    assert page.count("<svg") == 4
    assert re.search(r"loss of the last step, nats per supervised token: [\d.]+ throughout", page)
    assert "<title>recording 2: largest memory, MiB" in page
    assert f"{PLAIN} on tiny" in page


def test_the_fixture_fails_on_an_alarm_and_skips_without_baselines(healthy, pytester):
    larger = dataclasses.replace(healthy.baseline, curves=changed(healthy, tokens=1))
    for name, baseline in (("same", healthy.baseline), ("other", larger)):
        write_baseline(pytester.path / "baselines" / f"{name}.jsonl", baseline)
    pytester.makepyfile(
        """
        import pytest
        @pytest.mark.parametrize("name", ["same", "other"])
        def test_curves(glm4ft_baseline, name): glm4ft_baseline(name)
        """
    )
    pytester.runpytest_inprocess("-p", "no:randomly", "--glm4ft-baseline=baselines").assert_outcomes(passed=1, failed=1)
    found = pytester.runpytest_inprocess("-rs")
    found.assert_outcomes(skipped=2)
    found.stdout.fnmatch_lines(["*needs recorded curves; found neither --glm4ft-baseline nor GLM4FT_BASELINE*"])
