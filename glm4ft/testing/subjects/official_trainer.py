"""The official GLM-4 script as a trainer: rows with GLM-4's ids written into the code, its collator and evaluation.

Source: ``finetune/finetune.py`` of THUDM/GLM-4 at commit 9c0e421, ``combine: false``, restated. The ids are those of
GLM-4's vocabulary, so it needs a base with these: ``--model tiny-glm4-ids``. Rows are cut behind ``max_input_length +
max_output_length + 1`` tokens, which are set as large here as the context. LoRA adapters, precision and hyperparameters
are the harness's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    EvalPrediction,
    GenerationConfig,
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from glm4ft.data.encoded_row import IGNORED
from glm4ft.errors import ModelError
from glm4ft.testing.subject import make_plan
from glm4ft.testing.subjects import official_script
from glm4ft.testing.subjects.building_blocks import training_arguments
from glm4ft.testing.subjects.known_failures import OFFICIAL_TRAINER, reasons

PREFIX, USER, PAD, STOPS = [151331, 151333], 151336, 151329, [151329, 151336, 151338]
MAX_INPUT, MAX_OUTPUT = 16_384, 16_384  # max_input_length and max_output_length
NEW_TOKENS = 32  # that an evaluation generates


class Collator(DataCollatorForSeq2Seq):
    """Pads rows as the tokenizer does, on the left, and the answers of an evaluation on the right."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        """Make a batch of rows, or of prompts and their answers."""
        answers = [feature["output_ids"] for feature in features if "output_ids" in feature]
        rows = [{name: ids for name, ids in feature.items() if name != "output_ids"} for feature in features]
        pad: Any = super()
        batch = pad.__call__(rows, return_tensors)
        if answers:
            width = max(map(len, answers))
            batch["output_ids"] = torch.tensor([[*ids, *[PAD] * (width - len(ids))] for ids in answers])
        return batch


class AnswersTrainer(Seq2SeqTrainer):
    """Evaluates by generation: the answers of the prompts in a batch, beside the right ones, and no loss."""

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **options: Any
    ) -> Any:
        """Generate; the prompts are taken off what was generated."""
        answers, width = inputs.pop("output_ids"), inputs["input_ids"].shape[1]
        inputs.pop("labels", None)
        loss, generated, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **options)
        return loss, None if generated is None else generated[:, width:], answers


class Subject(official_script.Subject):
    """The script's trainer on a base folder with GLM-4's own ids.

    Args:
        base_dir: The Hugging Face model folder of the base.
    Raises:
        ModelError: If the base has other ids.
    """

    name = "official script, as a trainer"
    expected_failures = reasons(OFFICIAL_TRAINER)

    def __init__(self, base_dir: str) -> None:
        super().__init__(base_dir)
        written = {"[gMASK]": PREFIX[0], "<sop>": PREFIX[1], "<|user|>": USER, "<|endoftext|>": PAD}
        found = {token: self.tokenizer.convert_tokens_to_ids(token) for token in written}
        if found != written:
            raise ModelError(
                "the script has the ids of GLM-4's vocabulary written into its code, and the base has others",
                where=base_dir, found=str(found), expected=str(written), fix="judge it on --model tiny-glm4-ids",
            )  # fmt: skip

    def encode(self, messages: Any, tools: Any = None) -> dict[str, list[int]]:
        """Encode one conversation, cut behind the longest prompt and answer."""
        row = super().encode(messages, tools)
        return {name: values[: MAX_INPUT + MAX_OUTPUT + 1] for name, values in row.items()}

    def _render(self, messages: Any, tools: Any) -> tuple[list[int], list[bool]]:
        ids, trained = super()._render(messages, tools)
        return [*PREFIX, *ids[2:]], trained

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """A padded batch, made by the script's collator."""
        return dict(self._collator()([dict(row) for row in rows], return_tensors="pt"))

    def _collator(self) -> Collator:
        return Collator(self.tokenizer, padding="longest", label_pad_token_id=IGNORED)

    def train(
        self, model: Any, conversations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Train the model in place according to the plan."""
        trainer = self._trainer(model, conversations, plan)
        trainer.train(resume_from_checkpoint=plan["resume_from"])
        return list(trainer.state.log_history)

    def evaluate(self, model: Any, conversations: Sequence[Mapping[str, Any]]) -> Any:
        """The share of answers that are generated exactly; the script's evaluation computes no loss."""
        found = self._trainer(model, conversations, make_plan()).evaluate()
        return {"exact": found["eval_exact"]}

    def _trainer(
        self, model: Any, conversations: Sequence[Mapping[str, Any]], plan: Mapping[str, Any]
    ) -> AnswersTrainer:
        rows: Any = [self.encode(c["messages"], c.get("tools")) for c in conversations]
        prompts: Any = [prompt for c in conversations for prompt in self._prompts(c["messages"], c.get("tools"))]
        options = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD, eos_token_id=STOPS)
        args = Seq2SeqTrainingArguments(
            **training_arguments(plan), use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
            predict_with_generate=True, generation_config=options,
        )  # fmt: skip
        trainer = AnswersTrainer(
            model=model, args=args, train_dataset=rows, eval_dataset=prompts, data_collator=self._collator(),
            compute_metrics=_share_of_exact,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _prompts(self, messages: Any, tools: Any) -> list[dict[str, list[int]]]:
        """The prompt and the answer of each assistant turn, as the script's evaluation has them."""
        found, ids = list[dict[str, list[int]]](), list(PREFIX)
        for index, message in enumerate(messages):
            new = self._ids([message], None if index else tools)[2:]
            if message["role"] == "assistant":
                found.append({"input_ids": [*ids[:MAX_INPUT], new[0]], "output_ids": [*new[1:], USER][:MAX_OUTPUT]})
            ids += new
        return found


def _share_of_exact(found: EvalPrediction) -> dict[str, float]:
    pairs = zip(np.asarray(found.predictions), np.asarray(found.label_ids), strict=True)
    return {"exact": float(np.mean([_text(said) == _text(meant) for said, meant in pairs]))}


def _text(ids: Any) -> list[int]:
    return [int(token) for token in ids if token not in (IGNORED, PAD)]
