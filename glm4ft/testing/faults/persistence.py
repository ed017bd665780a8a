"""Faults of saving, loading and resuming: the loaded state is not the one that was to be saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from glm4ft.testing.faults.model import set_lora_scale
from glm4ft.testing.faults.registry import MADE_UP, faults_at
from glm4ft.testing.subjects.plain_loop import LoopState, Subject, process_rank, world_size

ESCAPES = (
    "Checkpoints of sharded training, and resuming with another number of processes or another batch size, are not "
    "tried; random numbers of other libraries than torch are seen only if they affect the order of rows."
)
WEIGHTS = "adapter_model.safetensors"

fault = faults_at("persistence")


@fault("load-ignores-missing-keys", evidence="PEFT 2118", cause=r"loaded|base|nothing")
class LoadIgnoresMissingKeys(Subject):
    """The keys in the file have another prefix, so nothing is loaded, and no error reports it."""

    def load(self, base_dir: str, folder: str) -> Any:
        model = self.attach(self.load_base(base_dir), seed=0)
        tensors = load_file(Path(folder) / WEIGHTS)
        set_peft_model_state_dict(model, {f"module.{name}": tensor for name, tensor in tensors.items()})
        return model


@fault("adapter-name-substring", evidence="PEFT 3282, 2334", cause=r"saved|loaded|adapter")
class AdapterNameSubstring(Subject):
    """Tensors are selected by an adapter name that is also a substring of another adapter's name."""

    def save(self, model: Any, folder: str) -> None:
        super().save(model, folder)
        with torch.random.fork_rng():
            model.add_adapter("default_of_before", self.lora_config())
        found = {name: t for name, t in model.state_dict().items() if "lora_" in name and ".default" in name}
        tensors = {re.sub(r"\.default\w*", "", name): tensor.clone() for name, tensor in found.items()}
        model.delete_adapter("default_of_before")
        save_file(tensors, Path(folder) / WEIGHTS)


@fault("tokenizer-not-saved", evidence="functionary 289; axolotl 3112", cause=r"template|tokenizer")
class TokenizerNotSaved(Subject):
    """The adapter is saved without the tokenizer and the chat template that it was trained with."""

    def save(self, model: Any, folder: str) -> None:
        model.save_pretrained(folder)

    def merge(self, base_dir: str, folder: str, output: str) -> None:
        self.merged(self.load(base_dir, folder)).save_pretrained(output)


@fault("adapter-config-scale-lost", evidence="unsloth-zoo 806; PEFT 1930", cause=r"scale|alpha")
class AdapterConfigScaleLost(Subject):
    """The saved configuration contains the default alpha."""

    def save(self, model: Any, folder: str) -> None:
        super().save(model, folder)
        path = Path(folder) / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), "lora_alpha": 8}), "utf-8")


@fault("saved-template-is-another", evidence="LLaMA-Factory 5986, 7785; GLM-4 607", cause=r"template")
class SavedTemplateIsAnother(Subject):
    """Rows are built by code, while the saved chat template renders conversations without their tools."""

    def save(self, model: Any, folder: str) -> None:
        complete = str(self.tokenizer.chat_template)
        self.tokenizer.chat_template = re.sub(r"{% if tools %}.*?{% endif %}(?={% for)", "", complete, flags=re.S)
        super().save(model, folder)
        self.tokenizer.chat_template = complete


@fault("resume-optimizer-lost", evidence="FastChat 1280; ACE-Step 742; entrenar 293", cause=r"moment|optimi[sz]er")
class ResumeOptimizerLost(Subject):
    """The optimizer's moments are not restored."""

    def load_optimizer(self, run: LoopState, folder: Path) -> None:
        pass


@fault("resume-data-restarts", evidence="accelerate 4071; torchtune 278", cause=r"rows?|order|data")
class ResumeDataRestarts(Subject):
    """After a resume, the data start again at the beginning."""

    def skip_seen_items(self, stream: Iterator[int], num_items: int, run: LoopState) -> Iterator[int]:
        return stream


@fault("resume-skip-every-epoch", evidence="accelerate 1466", cause=r"rows?|order|data|epoch")
class ResumeSkipEveryEpoch(Subject):
    """The rows seen before the resume are skipped in every later epoch too."""

    def skip_seen_items(self, stream: Iterator[int], num_items: int, run: LoopState) -> Iterator[int]:
        done = run.step * run.plan["accumulation"] * run.plan["micro_batch_size"] * world_size()
        first, skipped = divmod(done, num_items)
        for epoch in count(first):
            order = self.epoch_order(num_items, epoch, run.plan["seed"], process_rank())
            yield from order[skipped + process_rank() :: world_size()]


@fault("resume-epoch-off-by-one", evidence="torchtune 2911", cause=r"steps|epoch|order|rows")
class ResumeEpochOffByOne(Subject):
    """A run resumed at the end of an epoch skips an epoch, since the saved epoch number is one too large."""

    def resume(self, run: LoopState, folder: Path) -> None:
        super().resume(run, folder)
        if run.step % steps_per_epoch(self, run) == 0:
            run.step += steps_per_epoch(self, run)


@fault("resume-random-state-lost", evidence="transformers 17032; ms-swift 9935", cause=r"random|dropout")
class ResumeRandomStateLost(Subject):
    """A run resumed at the end of an epoch draws the random numbers of its first epoch again."""

    def resume(self, run: LoopState, folder: Path) -> None:
        fresh = torch.get_rng_state()
        super().resume(run, folder)
        if run.step % steps_per_epoch(self, run) == 0:
            torch.set_rng_state(fresh)


@fault("scale-applied-twice-on-resume", evidence=MADE_UP, cause=r"scale|alpha")
class ScaleAppliedTwiceOnResume(Subject):
    """The adapters of a resumed run are multiplied by alpha / r twice."""

    def resume(self, run: LoopState, folder: Path) -> None:
        super().resume(run, folder)
        set_lora_scale(run.model, (self.lora["lora_alpha"] / self.lora["r"]) ** 2)


def steps_per_epoch(subject: Subject, run: LoopState) -> int:
    """The number of optimizer steps after which every row has been seen once."""
    size = int(run.plan["accumulation"] * run.plan["micro_batch_size"]) * world_size()
    return max(1, len(subject.items(run.rows, run.plan["packing"])) // size)
