"""Wrong shapes of rows under the format ``template``, each of which a check must tell from the right one.

On a real pretrained head they look different than on the built-in base: see ``docs/real-weights.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

from transformers import PreTrainedTokenizerBase

from glm4ft.data.conversation import Conversation
from glm4ft.data.encoded_row import EncodedRow
from glm4ft.data.template_format import TemplateFormat
from glm4ft.model.lora_options import LoraOptions
from glm4ft.report.observed_run import ObservedRun, train_observed
from glm4ft.train.config import TrainConfig


class HeaderIn(TemplateFormat):
    """The founding shape, header in and stop out: each turn is supervised from its header to before its terminator."""

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation with right ids and wrong labels."""
        row, length = super().encode(conversation), len(self.headers["assistant"])
        supervised = [False] * len(row.input_ids)
        for turn in row.turns:
            supervised[turn.start - length : turn.end] = [turn.supervised] * (turn.end - turn.start + length)
        return replace(row, supervised=supervised)


class NoTerminator(TemplateFormat):
    """The terminator of each turn is not supervised."""

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation with right ids and wrong labels."""
        row = super().encode(conversation)
        ends = {turn.end for turn in row.turns}
        return replace(row, supervised=[keep and at not in ends for at, keep in enumerate(row.supervised)])


class OtherStop(TemplateFormat):
    """Each turn ends with another control token: one that was never trained, so that no hidden state singles it out."""

    stop = "<file_sep>"

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, **options: object) -> None:
        super().__init__(name, tokenizer, **options)  # type: ignore[arg-type]
        self.stop_ids = [self.control_ids[self.stop], *self.stop_ids]

    def encode(self, conversation: Conversation) -> EncodedRow:
        """Encode a conversation with right labels and another token at the end of each turn."""
        row = super().encode(conversation)
        ends = {turn.end for turn in row.turns}
        return replace(row, input_ids=[self.stop_ids[0] if at in ends else i for at, i in enumerate(row.input_ids)])


# The cheapest run that learns by heart: gradients reach the last two of thirty layers only.
LAST_TWO_LAYERS = LoraOptions(options={"layers_to_transform": [28, 29]})
SHAPES = {"right": TemplateFormat, "header-in": HeaderIn, "no-terminator": NoTerminator, "dead-stop": OtherStop}
ANSWERS = {
    "Which rivers meet in Lyon?": "The Rhône and the Saône.",
    "Capital of Japan?": "Tokyo",
    "Boiling point of water at sea level?": "100 degrees Celsius.",
    "Who wrote Faust?": "Goethe wrote it, over sixty years.",
    "A prime number above 90?": "97",
    "Largest planet?": "Jupiter.",
    "What is the opposite of early?": "Late",
    "Say hello in Italian.": "Ciao!",
    "How many strings has a violin?": "Four strings.",
    "Metal that is liquid at room temperature?": "Mercury",
    "First month of the year?": "January is the first.",
    "Colour of a ripe lemon?": "Yellow.",
    "What do bees make?": "They make honey and wax.",
    "Square root of 144?": "12",
    "Ocean between Africa and America?": "The Atlantic Ocean.",
    "Shortest day of the year in the north?": "Around 21 December.",
}


def write_conversations(path: Path, count: int) -> Path:
    """Write some of the short conversations that the runs on real weights learn by heart."""
    system = {"role": "system", "content": "Be brief."}
    talks = [
        [system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in list(ANSWERS.items())[:count]
    ]
    path.write_text("".join(json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in talks), "utf-8")
    return path


def train_shape(
    shape: str, base: Path, data: Path, output: Path, *, steps: int, batch: int = 2, resume: bool = False,
    target_loss: float | None = None, save_every: int = 0, say: Callable[[str], object] = lambda _: None,
) -> ObservedRun:  # fmt: skip
    """Train as ``glm4ft train`` does, on rows of one of ``SHAPES``.

    Args:
        shape: The name of the shape.
        base: The folder of the base.
        data: The JSONL file of conversations.
        output: The folder of the run.
        steps: The number of optimizer steps.
        batch: The number of rows in one step.
        resume: Whether to continue the run in ``output``.
        target_loss: The loss below which training stops.
        save_every: The number of steps between checkpoints; 0 writes none.
        say: A function that is given each line of the account for people.
    """
    config = TrainConfig(
        data=str(data), model=str(base), output=str(output), lora=LAST_TWO_LAYERS, learning_rate=5e-3,
        schedule="constant", max_steps=steps, micro_batch_size=batch, accumulation=1, round_trip=True,
        target_loss=target_loss, save_every=save_every,
    )  # fmt: skip
    with mock.patch("glm4ft.train.run.make_format", SHAPES[shape]):
        return train_observed(config, resume=resume, say=say)
