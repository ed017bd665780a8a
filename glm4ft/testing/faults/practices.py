"""Measures which faults the common practices notice: they see only what a run logs and what its model answers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.faults.warm import warm_base
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.plain_loop import Subject
from glm4ft.testing.trial.conversations import all_conversations
from glm4ft.testing.trial.trial import LOSS_LIMIT

STEPS = 60
# A golden curve is compared with a relative tolerance of 1e-3, as transformers' and torchtune's recipes do; the healthy
# loop is reproduced bit by bit on one machine.
CURVE_LIMIT = 1e-3
LIMIT_OF_ANSWER = 128

PRACTICES = (
    "overfit two conversations, finite gradient norms",
    "... and the answers are reproduced and stop",
    "... and loss and norm follow a golden curve",
)


@dataclass(frozen=True)
class Noticed:
    """Which practices notice a fault.

    Args:
        id: The id of the fault.
        by: Whether the fault is noticed, for each of ``PRACTICES`` together with those before it.
    """

    id: str
    by: tuple[bool, ...]


def try_practices(id: str) -> Noticed:
    """Train a faulty pipeline on the two bundled conversations and apply each practice to the result.

    Args:
        id: The id of the fault.
    """
    try:
        subject, model, log = overfit(all_faults()[id].subject)
    except Exception:  # every practice notices a run that raises an exception
        return Noticed(id, (True,) * len(PRACTICES))
    found = [not is_overfit(log), not reproduces_answers(subject, model), not follows(log, golden_curve())]
    return Noticed(id, tuple(any(found[: i + 1]) for i in range(len(found))))


def overfit(kind: type[Subject]) -> tuple[Subject, Any, list[dict[str, Any]]]:
    """Train a pipeline on the two bundled conversations; returns the pipeline, its trained model and its log."""
    subject = kind(str(warm_base()))
    with tempfile.TemporaryDirectory(prefix="glm4ft-practice-") as folder:
        plan = make_plan(steps=STEPS, output_dir=folder)
        model = subject.build_model(str(warm_base()), plan["seed"])
        return subject, model, subject.train(model, all_conversations()["demo"], plan)


def is_overfit(log: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last logged loss is below the limit and every gradient norm that is logged is finite."""
    return log[-1]["loss"] < LOSS_LIMIT and all(math.isfinite(entry.get("grad_norm", 0.0)) for entry in log)


def reproduces_answers(subject: Subject, model: Any) -> bool:
    """Whether the pipeline's own inference generates every trained answer and stops after it."""
    try:
        for conversation in all_conversations()["demo"]:
            for i, message in enumerate(conversation["messages"]):
                if message["role"] == "assistant":
                    history = conversation["messages"][:i]
                    ids = subject.generate(model, history, conversation.get("tools"), LIMIT_OF_ANSWER)
                    said = str(subject.tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False))
                    if ids[-1] not in subject.stop_ids or not said.endswith(message["content"].split("\n")[-1]):
                        return False
    except Exception:  # inference that fails does not reproduce the answers
        return False
    return True


def follows(log: Sequence[Mapping[str, Any]], golden: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the logged losses and gradient norms equal those of a recorded run, within ``CURVE_LIMIT``."""
    steps = zip(log, golden, strict=True)
    pairs = [(entry[n], right[n]) for entry, right in steps for n in ("loss", "grad_norm") if n in entry]
    return all(abs(got - expected) <= CURVE_LIMIT * abs(expected) for got, expected in pairs)


@cache
def golden_curve() -> list[dict[str, Any]]:
    """The log of the healthy loop, recorded once per process."""
    return overfit(Subject)[2]
