"""Another repository runs the suite as pytest tests: one test per check, known failures strict, failures explained.

Run: pytest tests/testing/test_conformance.py
"""

from __future__ import annotations

import pytest

from glm4ft.testing.checks import all_checks

# pytester forgets what is imported while a test runs in process, and torch crashes when it is imported a second time.
from glm4ft.testing.conformance import parametrize_with_checks
from glm4ft.testing.session.options import OPTIONS

parametrize_with_checks()  # which imports the modules of the checks, so that they register only once
pytest_plugins = ["pytester"]

# the three lines of the documentation
TEST = """
from glm4ft.testing.conformance import parametrize_with_checks

@parametrize_with_checks({arguments})
def test_conformance(glm4ft_check): glm4ft_check()
"""
# a subject that trains every token but the first, and raises an error where it should build a model
SUBJECT = """
from types import SimpleNamespace
from glm4ft.model.tiny_tokenizer import tiny_tokenizer
tokenizer = tiny_tokenizer()

def encode(messages, tools=None):
    ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}

def build_model(base_dir, seed):
    raise KeyError("lora")

subject = SimpleNamespace(name="bad", tokenizer=tokenizer, encode=encode, build_model=build_model, train=print)
subject.chat_format = "glm-4-0414"
listed = SimpleNamespace(**vars(subject), expected_failures={"mask_is_what_the_model_must_sample": "our issue 7"})
"""
MASK, LENGTHS = "mask_is_what_the_model_must_sample", "lists_have_one_length_and_labels_equal_ids_where_supervised"


@pytest.fixture(autouse=True)
def _a_repository_with_a_bad_pipeline(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    for option in OPTIONS:
        monkeypatch.delenv(option.variable, raising=False)
    pytester.makepyfile(bad_pipeline=SUBJECT)
    monkeypatch.syspath_prepend(str(pytester.path))


def run(pytester: pytest.Pytester, arguments: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(test_pipeline=TEST.format(arguments=arguments))
    return pytester.runpytest_inprocess(*options)


def test_every_check_is_a_test_with_its_stage_and_name(pytester: pytest.Pytester) -> None:
    result = run(pytester, "'bad_pipeline:subject'", "--collect-only", "-q")
    ids = [line.split("::")[1] for line in result.outlines if "::" in line]
    assert ids == [f"test_conformance[{check.stage}-{check.name}]" for check in all_checks()]


def test_a_failed_check_is_explained_in_a_section(pytester: pytest.Pytester) -> None:
    """The section has the claim, the incident that motivates the check, and no traceback through the harness."""
    result = run(pytester, "'bad_pipeline:subject', stages=['rows']", "-k", MASK)
    result.assert_outcomes(failed=1, deselected=len([c for c in all_checks() if c.stage == "rows"]) - 1)
    result.stdout.fnmatch_lines(
        [
            "conversation 1 (reply), wrong labels: *",
            f"*glm4ft: rows, {MASK}*",
            "claim:    Exactly the tokens after*",
            "incident: GLM-4 issue 342*",
            "subject:  bad_pipeline:subject",
            "bad_pipeline:subject: rows failed",
        ]
    )
    result.stdout.no_fnmatch_line("*raise CheckFailed*")


def test_a_known_failure_is_xfailed_and_one_that_passes_has_to_go(pytester: pytest.Pytester) -> None:
    known = f"expected_failures={{'{MASK}': 'our issue 7', '{LENGTHS}': 'our issue 8'}}"
    result = run(pytester, f"'bad_pipeline:subject', {known}", "-rx", "-k", f"{MASK} or {LENGTHS}")
    result.assert_outcomes(xfailed=1, failed=1, deselected=len(all_checks()) - 2)
    result.stdout.fnmatch_lines(["*our issue 8*but it passes: remove the entry", f"XFAIL *{MASK}* our issue 7*"])


def test_a_subject_may_list_its_known_failures_itself(pytester: pytest.Pytester) -> None:
    run(pytester, "'bad_pipeline:listed', stages=['rows']", "-k", MASK).assert_outcomes(
        xfailed=1, deselected=len([c for c in all_checks() if c.stage == "rows"]) - 1
    )


def test_a_known_failure_of_no_check_is_an_error(pytester: pytest.Pytester) -> None:
    result = run(pytester, "'bad_pipeline:subject', expected_failures={'maks': 'a slip'}")
    result.stdout.fnmatch_lines(["*an expected failure names no check*", "*maks*"])


def test_a_subject_that_breaks_down_shows_where(pytester: pytest.Pytester) -> None:
    result = run(pytester, "'bad_pipeline:subject', stages=['update']")
    result.stdout.fnmatch_lines(['*raise KeyError("lora")', "*SubjectBrokeDown: KeyError: 'lora'"])


def test_what_does_not_apply_is_skipped_with_the_reason(pytester: pytest.Pytester) -> None:
    result = run(pytester, "'bad_pipeline:subject'", "-rs", "-k", "adapter_is_unchanged_by_saving_and_loading")
    result.stdout.fnmatch_lines(["SKIPPED*the subject has no load, save"])


def test_the_command_line_names_the_subject_of_a_suite_that_names_none(pytester: pytest.Pytester) -> None:
    result = run(pytester, "stages=['rows']", "-k", MASK, "--glm4ft-subject=bad_pipeline:subject")
    result.stdout.fnmatch_lines(["bad_pipeline:subject: rows failed"])


def test_text_of_conversations_reaches_no_log_as_it_is(pytester: pytest.Pytester) -> None:
    """Escape sequences would act on a terminal, and lines that begin with two colons on a CI runner."""
    pytester.makepyfile(bad_pipeline=SUBJECT.replace('KeyError("lora")', 'NotImplementedError("a \\x1b[31m\\n::stop")'))
    result = run(pytester, "'bad_pipeline:subject', stages=['update']", "-rs")
    result.stdout.fnmatch_lines(["SKIPPED*does not offer this: a \\x1b*31m"])
    assert "\x1b" not in "".join(result.outlines)
    assert not any(line.startswith("::") for line in result.outlines)
