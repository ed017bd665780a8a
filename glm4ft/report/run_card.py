"""The model card of a run's adapter: base, data, figures and verdict, in place of the form that peft leaves blank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import glm4ft
from glm4ft.model.model_card import shown_base, table, write_card
from glm4ft.report.content import Content
from glm4ft.report.markdown import TONES
from glm4ft.text.markdown_text import code, prose
from glm4ft.train.best import describe_evaluations, read_best
from glm4ft.train.observer import PreparedRun
from glm4ft.train.trajectory import Trajectory

_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```"""


def write_run_card(run: PreparedRun, content: Content, trajectory: Trajectory) -> None:
    """Write the card into the folder of a run whose adapter is saved.

    Args:
        run: The run.
        content: What its report shows.
        trajectory: Its trajectory.
    """
    base = str(run.config.model)
    body = list(_body(run, content, trajectory, base))
    write_card(run.output, body, base=base, library="peft", relation="adapter")


def _body(run: PreparedRun, content: Content, trajectory: Trajectory, base: str) -> Iterator[str]:
    headline = content.headline
    yield f"# {code(run.output.name)}"
    yield f"\nA LoRA adapter of {shown_base(base)}, trained with glm4ft {glm4ft.__version__}.\n"
    yield f"{TONES[headline.tone]} **{prose(headline.text)}**\n"
    yield f"- supervised: {prose(headline.supervised)}"
    yield from (f"- {prose(fact)}" for fact in headline.happened)
    yield ""
    yield from table(dict(_figures(run, trajectory)))
    yield "\n## Use\n"
    yield f"`glm4ft chat FOLDER`; or, where BASE is {shown_base(base)} and FOLDER is this folder:\n"
    yield from _USE.split("\n")


def _figures(run: PreparedRun, trajectory: Trajectory) -> Iterator[tuple[str, str]]:
    config, lora, steps = run.config, run.config.lora, trajectory.steps
    yield "base", shown_base(str(config.model))
    if config.quantise:
        yield "base while training", f"quantised to {config.quantise}; on the plain base, losses differ by the rounding"
    yield "chat format", code(run.chat_format.name, in_table=True)
    supervised = f"{run.data.supervised_tokens:,} of {run.data.tokens:,} tokens supervised"
    yield "data", f"{_file(config.data)}: {run.data.rows:,} rows, {supervised}"
    yield "digest of the rows", code(str(trajectory.header.get("rows_sha256", "")), in_table=True)
    if config.eval_data:
        yield "held-out data", _file(config.eval_data)
    yield (
        "loss, nats per supervised token",
        f"{steps[0]['loss']:.4g} at step 1, {steps[-1]['loss']:.4g} at step {len(steps)}",
    )
    if trajectory.evaluations:
        yield "evaluations", prose(describe_evaluations(trajectory.evaluations, read_best(run.output)))
    targets = ", ".join(code(target, in_table=True) for target in run.adapters.num_adapted)
    yield "LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {targets}"
    yield "learning rate", f"{config.peak_learning_rate:g}, {config.schedule}"
    versions = trajectory.header.get("libraries", {})
    yield "versions", prose(", ".join(f"{name} {number}" for name, number in versions.items()))


def _file(data: object) -> str:
    return code(Path(str(data)).name, in_table=True)
