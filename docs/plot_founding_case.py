"""Draws the founding case: the loss of one run with the right mask and with the founding bug, and its certified floor.

Run: python docs/plot_founding_case.py        (needs matplotlib; writes docs/founding_case.svg)
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.inputs import DEMO_DATA, data_inputs
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.floor import Floor
from glm4ft.floors.head import read_head
from glm4ft.model.base_model import load_format
from glm4ft.report.floor_view import encoded_rows
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.testing.subjects.founding_bug import FoundingBugFormat
from glm4ft.train.config import TrainConfig

RUN = TrainConfig(data="demo", learning_rate=5e-3, schedule="constant", max_steps=150, round_trip=True, save_every=0)


def train(chat_format: type[ChatFormat], folder: Path) -> ObservedRun:
    """Train 150 steps on the demo conversations, encoded by the given format."""
    environment = mock.patch.dict(os.environ, GLM4FT_CACHE=str(folder / "cache"))
    with environment, mock.patch("glm4ft.train.run.make_format", chat_format):
        return train_observed(TrainConfig(**{**vars(RUN), "output": str(folder / "run")}), say=lambda _: None)


def certified_floor(chat_format: type[ChatFormat]) -> Floor:
    """The certified lower bound of the loss for any adapter, known before training."""
    tokenizer, name = load_format("tiny")
    return find_floor(
        encoded_rows(data_inputs(DEMO_DATA), chat_format(name, tokenizer), RUN.max_length), tokenizer, read_head("tiny")
    )


def main() -> None:
    """Train with both masks and draw the losses."""
    matplotlib.rcParams.update({"svg.hashsalt": "glm4ft", "font.family": "sans-serif", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    curves = [
        ("founding bug: <|assistant|> trained, stop token not", FoundingBugFormat, "#c2410c"),
        ("right mask: stop token trained, <|assistant|> not", ChatFormat, "#15803d"),
    ]
    for label, chat_format, colour in curves:
        with tempfile.TemporaryDirectory() as folder:
            result = train(chat_format, Path(folder))
        losses = [row["loss"] for row in result.trajectory.steps]
        axes.plot(range(1, len(losses) + 1), losses, color=colour, linewidth=2, label=label)
        axes.annotate(f" {losses[-1]:.3g}", (len(losses), losses[-1]), color=colour, va="bottom")
        turns = result.round_trips
        exact = f"{sum(turn.exact for turn in turns)} of {len(turns)} turns exact"
        floor = certified_floor(chat_format)
        print(f"{label}: floor {floor.floor:.4f}, loss {losses[-1]:.4f} after {len(losses)} steps, {exact}")
        if floor.floor > 0.01:
            axes.axhspan(1e-4, floor.floor, color=colour, alpha=0.08, linewidth=0)
            axes.axhline(floor.floor, color=colour, linestyle=":", linewidth=1.5)
            words = f"certified before training: no adapter gets below {floor.floor:.4f} with <|assistant|> as a target"
            axes.annotate(words, (155, floor.floor * 0.9), color=colour, ha="right", va="top", fontsize=9)
    axes.axhline(0.01, color="#64748b", linestyle="--", linewidth=1)
    axes.annotate("0.01, the gate of the overfit test", (75, 0.0105), color="#64748b", ha="center", va="bottom")
    axes.set(
        yscale="log", xlabel="optimizer step", ylabel="loss, nats per supervised token", xlim=(1, 162), ylim=(3e-4, 12)
    )
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).parent / "founding_case.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
