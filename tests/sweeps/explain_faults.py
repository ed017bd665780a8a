"""Does ``glm4ft explain`` say first what is wrong? On runs of faults that leave a trace in the loss or the round trip.

Run: python tests/sweeps/explain_faults.py [--faults id ...] [--json FILE]

The list was fixed before the figure was taken: the faults that the catalogue says a plain overfit test sees, and those
whose run on the bundled conversations does not come back word for word when asked as serving asks. Left out: what a run
on the disk cannot show (`metric-not-shifted` is an accuracy that is computed wrongly beside a right run). Each fault
trains the plain loop for 60 steps; its folder then holds what another trainer would leave: an adapter, the log as
transformers writes it, and the rows as its own code made them. Exits with 1 below 85 %.

Measured on an x86-64 CPU, 2026-11-25: 31 of 33 right first (94 %), in 168 s on one core. The two others begin at a loss
that is 0.5 % and 0.9 % off the base's, while bf16 alone moves it by up to 2.9 % on two rows of a real base, so no rule
can tell them by their start: a base that was rounded (`cast-to-packed-dtype`) learns nevertheless, and its adapter does
the same on the true one; the swapped norm is told as a model that reloads as another.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from glm4ft.data.encoded_rows import TrainedRow, write_rows
from glm4ft.data.inputs import DEMO_DATA
from glm4ft.diagnosis.rules import Diagnosis
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.model.tiny import write_tiny_base
from glm4ft.testing.faults.registry import all_faults
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects.plain_loop import Subject

LEAST_SHARE = 0.85
STEPS = 60


@dataclass(frozen=True)
class Case:
    """A fault and what has to be said of it first.

    Args:
        verdict: slug.
        plan: what differs from the standard plan, where the fault needs it.
        data: conversations that the fault needs, in place of the bundled ones: ``long`` or ``so``.
        options: of the run that its folder states in config.yaml.
    """

    verdict: str
    plan: Mapping[str, Any] = field(default_factory=dict)
    data: str = "demo"
    options: Mapping[str, Any] = field(default_factory=dict)


ACCUMULATED = {"micro_batch_size": 1, "accumulation": 2}
CASES = {
    # what a plain overfit test sees
    "prompt-tokens-trained": Case("prompt-supervised"),
    "adapter-loaded-frozen": Case("adapters-dead"),
    "kbit-prepare-refreezes": Case("adapters-dead"),
    "new-token-rows-untrained": Case("unreachable-target", data="so"),
    "dora-magnitude-uninitialised": Case("numerics"),
    "cast-to-packed-dtype": Case("wrong-start"),
    "zero-grad-every-micro": Case("samples-not-learnt", ACCUMULATED),
    "micro-batch-lost": Case("samples-not-learnt", ACCUMULATED),
    "params-not-in-optimizer": Case("adapters-dead"),
    "l2-in-place-of-decoupled": Case("held-by-decay", {"weight_decay": 0.1}, options={"weight_decay": 0.1}),
    # what leaves a wrong round trip
    "assistant-header-trained": Case("header-supervised"),
    "stop-token-owned-by-next-turn": Case("terminator-never-learned"),
    "wrong-stop-id": Case("terminator-never-learned"),
    "stop-token-masked-as-pad": Case("terminator-never-learned"),
    "stop-token-not-appended": Case("terminator-never-learned"),
    "last-answer-token-masked": Case("header-supervised"),
    "only-last-turn-trained": Case("turns-not-trained"),
    "default-max-length": Case("truncated-answers", data="long"),
    "system-prompt-dropped": Case("not-as-served"),
    "tool-schema-format-drift": Case("not-as-served"),
    "per-message-slice-eats-header": Case("not-as-served"),
    "template-not-prefix-preserving": Case("not-as-served"),
    "truncate-after-padding": Case("not-as-served"),
    "labels-not-shifted": Case("labels-shifted"),
    "double-shift": Case("labels-shifted"),
    "left-pad-attended": Case("rows-depend-on-their-batch"),
    "rope-not-partial": Case("reload-differs"),
    "rope-base-differs": Case("reload-differs"),
    "norm-variant-swapped": Case("wrong-start"),
    "square-weight-transposed": Case("reload-differs"),
    "lora-scale-missing": Case("reload-differs"),
    "rslora-scale-mixed": Case("reload-differs"),
    "adapter-config-scale-lost": Case("reload-differs"),
}


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def conversations(name: str) -> list[dict[str, Any]]:
    if name == "so":
        return [talk("why?", "it is so and so it stays so"), talk("how?", "so they say it is")]
    if name == "long":
        return [talk(f"count {i}", " ".join(f"{(7 * n + i) % 10}" for n in range(300))) for i in (1, 2)]
    return [json.loads(line) for line in DEMO_DATA.read_text("utf-8").splitlines()]


def leave_run(subject: Any, base: Path, case: Case, folder: Path) -> None:
    """Train, and write what another trainer would leave."""
    plan = make_plan(steps=STEPS, output_dir=str(folder / "checkpoints"), **case.plan)
    data, model = conversations(case.data), subject.build_model(str(base), plan["seed"])
    log = subject.train(model, data, plan)
    subject.save(model, str(folder))
    rows = []
    for line, conversation in enumerate(data, start=1):
        batch = subject.collate([subject.encode(conversation["messages"], conversation.get("tools"))])
        rows.append(TrainedRow(line, batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    write_rows(folder / "rows.jsonl", rows)
    state = {"log_history": log, "train_batch_size": plan["micro_batch_size"]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    if case.options:
        (folder / "config.yaml").write_text(yaml.safe_dump(dict(case.options)))
    lines = [json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in data]
    (folder / "data.jsonl").write_text("".join(lines), "utf-8")


def explain(folder: Path, base: Path, case: Case) -> Diagnosis:
    # a word that the base's tokenizer does not have cannot be rendered as serving with the new one would
    data = None if case.data == "so" else str(folder / "data.jsonl")
    return explain_run(folder, data=data, model=str(base))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", nargs="*", default=list(CASES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    faults, results = all_faults(), {}
    with tempfile.TemporaryDirectory() as name:
        base = write_tiny_base(Path(name) / "base")
        for fault_id in options.faults:
            case, folder = CASES[fault_id], Path(name) / fault_id
            leave_run(faults[fault_id].subject(str(base)), base, case, folder)
            diagnosis = explain(folder, base, case)
            results[fault_id] = diagnosis.verdict
            word = "right" if diagnosis.verdict == case.verdict else f"WRONG, should be {case.verdict}"
            print(f"{fault_id:<34} {diagnosis.verdict:<28} {word}", flush=True)
        healthy = Path(name) / "healthy"
        leave_run(Subject(str(base)), base, Case("learnt"), healthy)
        print(f"{'no fault':<34} {(clean := explain(healthy, base, Case('learnt')).verdict):<28}")
    right = sum(CASES[fault_id].verdict == verdict for fault_id, verdict in results.items())
    print(f"{right} of {len(results)} right first ({right / len(results):.0%}), at least {LEAST_SHARE:.0%} wanted")
    if options.json:
        options.json.write_text(json.dumps({"right": right, "verdicts": results, "clean": clean}, indent=1))
    sys.exit(not (right >= LEAST_SHARE * len(results) and clean == "learnt"))


if __name__ == "__main__":
    main()
