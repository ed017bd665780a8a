"""One training run from its options to its results on disk."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from glm4ft.data.batching import Collator, PackedRows, RowSet
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.conversation import read_conversations
from glm4ft.data.dataset import Rows, data_path, fit_row, prepare_rows
from glm4ft.data.encoded_rows import ROWS_FILE, rows_of, write_rows
from glm4ft.errors import ConfigError, RunError
from glm4ft.files import require_unused, write_atomically
from glm4ft.floors.target import set_target
from glm4ft.model.base_model import Base, load_base, load_format, require_loadable
from glm4ft.model.generation import TurnRoundTrip, round_trip
from glm4ft.model.lora import attach_lora, audit_lora
from glm4ft.model.loss import install_supervised_loss
from glm4ft.model.tiny import write_tiny_base
from glm4ft.report.content import Content
from glm4ft.report.failure_card import explain_failure
from glm4ft.report.files import HTML_FILE
from glm4ft.report.run_report import RunReport
from glm4ft.train.config import TrainConfig
from glm4ft.train.trainer import COMPLETE_MARKER, SupervisedTrainer, checkpoint_step, checkpoints, last_checkpoint
from glm4ft.train.trajectory import FILE_NAME, Trajectory, append_row, read_trajectory, rewind

CONFIG_FILE = "config.yaml"
BASE_FOLDER = "base"  # where a run on the built-in base writes that base, so that others can load the adapter


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind.

    Args:
        output: folder with adapter, trajectory, config and checkpoints.
        trajectory: as on disk.
        round_trips: one per assistant turn, if they were asked for.
        target_loss: that was asked for, or None.
        content: of the report; None where this process wrote none.
    """

    output: Path
    trajectory: Trajectory
    round_trips: tuple[TurnRoundTrip, ...]
    target_loss: float | None
    content: Content | None = None

    @property
    def reached_target(self) -> bool:
        """True if the last step's loss is below the target, or none was asked for."""
        return self.target_loss is None or self.trajectory.steps[-1]["loss"] < self.target_loss

    @property
    def came_back(self) -> bool:
        """True if every trained turn that was tried came back exactly."""
        return all(turn.exact for turn in self.round_trips if turn.supervised)

    def describe(self) -> str:
        """The results as text; of a run that missed what was asked for, with the card that says why."""
        last = self.trajectory.steps[-1]
        goal = ""
        if self.target_loss is not None:
            goal = f", target {self.target_loss:g} {'reached' if self.reached_target else 'NOT reached'}"
        lines = [f"loss {last['loss']:.4f} at step {last['step']}{goal}"]
        if self.content and not (self.reached_target and self.came_back):
            lines.append(explain_failure(self.content))
        elif self.round_trips:
            num_exact = sum(turn.exact for turn in self.round_trips)
            lines.append(f"round trip: {num_exact} of {len(self.round_trips)} turns came back exactly")
            lines += [f"  {turn.describe()}" for turn in self.round_trips]
        lines.append(f"report: {self.output / HTML_FILE}")
        return "\n".join([*lines, f"adapter, trajectory and config: {self.output}"])


def chat_format_of(config: TrainConfig) -> ChatFormat:
    """The chat format of a run, from its checkpoint and options."""
    tokenizer, name = load_format(config.model, config.chat_format)
    return ChatFormat(
        name,
        tokenizer,
        final_stop=config.final_stop,
        train_on=config.train_on,
        allow_nonstop_terminator=config.allow_nonstop_terminator,
    )


def run_training(
    config: TrainConfig,
    *,
    resume: bool = False,
    say: Callable[[str], object] = print,
    sources: Mapping[str, str] | None = None,
) -> RunResult:
    """Train an adapter.

    Everything the user gave is read and checked before anything is written below ``config.output``.

    Args:
        config: the options; ``data`` and ``output`` are set.
        resume: continue the run in ``config.output`` after its last complete checkpoint.
        say: is given each line of the account for people.
        sources: option to where its value came from, for the report.
    Returns:
        The results.
    Raises:
        InputError: if an option, a conversation or the checkpoint cannot be used.
        RunError: if the run had to stop.
    """
    say = say if _is_main_process() else _silent
    output = Path(str(config.output))
    is_complete = resume and (output / COMPLETE_MARKER).exists()
    # a round trip is made anew: of the last one it is not known whether it came to its end, or what came of it
    if is_complete and not config.round_trip and (output / HTML_FILE).exists():
        say(f"the run in {output} is complete")
        return RunResult(output, read_trajectory(output / FILE_NAME), (), config.target)
    if not resume and _is_main_process():
        go_on = f", or continue that run with --resume {shlex.quote(str(output))}" * is_run(output)
        require_unused(output, f"choose another folder{go_on}")
    _require_trackers(config.report_to)
    require_loadable(config.model, config.dtype)  # before hours may go into encoding
    chat_format = chat_format_of(config)
    data = data_path(str(config.data))
    rows, report = prepare_rows(data, chat_format, max_length=config.max_length)
    say(report.describe())
    eval_rows = None
    if config.eval_data:
        eval_rows, eval_report = prepare_rows(data_path(config.eval_data), chat_format, max_length=config.max_length)
        say(eval_report.describe())
    base = load_base(config.model, dtype=config.dtype, chat_format=config.chat_format)
    model = _adapt(base, config, output)
    adapters = audit_lora(model, config.lora)
    say(adapters.describe())
    for warning in (*base.warnings, *adapters.warnings):
        say(f"warning: {warning}")
    config = set_target(config, rows, model, base.tokenizer, say)
    header = _header(rows, model)
    _require_disk_space(output, model, config.keep_checkpoints if config.save_every else 0)
    checkpoint = None
    if resume:
        checkpoint = _rewind(output, header) if _is_main_process() else last_checkpoint(output)
    elif _is_main_process():
        _begin(output, config, base, header, rows)
    trainer = make_trainer(config, base, model, rows, eval_rows, output)
    run_report = RunReport(output, config, chat_format, report, adapters.describe(), sources or {}, _is_main_process())
    is_alone = trainer.args.world_size == 1  # the others of a run in several processes do not know that this one broke
    with run_report.of_a_broken_run(model if is_alone else None), _writing(output):
        if is_complete:
            model.load_adapter(str(output), "default", is_trainable=True)
        else:
            if checkpoint and _is_last(checkpoint, config):
                model.load_adapter(str(checkpoint), "default", is_trainable=True)
            else:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            trainer.save_model(str(output))
            if _is_main_process():
                write_atomically(output / COMPLETE_MARKER, "")
    trips = []
    if config.round_trip:
        trained = (fit_row(c, chat_format, config.max_length)[0] for c in read_conversations(data))
        trips = round_trip(model, chat_format, (row for row in trained if row))
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    content = run_report.write(None if is_sharded else model, trips)
    return RunResult(output, read_trajectory(output / FILE_NAME), tuple(trips), config.target, content)


def make_trainer(
    config: TrainConfig, base: Base, model: PeftModel, rows: RowSet, eval_rows: RowSet | None, output: Path
) -> SupervisedTrainer:
    """The trainer of a run; its trajectory goes to ``output``."""
    trajectory = output / FILE_NAME
    return SupervisedTrainer(
        record=(lambda row: append_row(trajectory, row)) if _is_main_process() else _silent,
        target_loss=config.target,
        model=model,
        args=training_arguments(config, output, has_eval=eval_rows is not None, bf16=_is_bf16(base)),
        train_dataset=PackedRows(rows, config.max_length) if config.packing else rows,
        eval_dataset=eval_rows,
        data_collator=Collator(base.tokenizer.pad_token_id),
        processing_class=base.tokenizer,
    )


def training_arguments(config: TrainConfig, output: Path, *, has_eval: bool, bf16: bool) -> TrainingArguments:
    """Our options in transformers' words."""
    # passed only where asked for: transformers is renaming the option, and says so at every mention
    options: dict[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    checkpointing = options if config.gradient_checkpointing else {}
    with_warmup = config.schedule == "constant" and config.warmup_steps
    args = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=config.micro_batch_size,
        per_device_eval_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type="constant_with_warmup" if with_warmup else config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        # clipping to an infinite norm changes nothing but still measures
        max_grad_norm=config.max_grad_norm or math.inf,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        seed=config.seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        **checkpointing,
        eval_strategy="steps" if has_eval else "no",
        eval_steps=config.eval_every,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=config.keep_checkpoints,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        report_to=config.report_to or "none",
        remove_unused_columns=False,
        label_names=["labels"],
    )
    # one process drives one device; transformers would split batches over all it sees, past our forward
    args._n_gpu = min(args.n_gpu, 1)
    return args


def is_run(output: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (output / CONFIG_FILE).is_file()


def new_output() -> str:
    """A folder below ``runs`` that does not exist yet, named by the time."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    names = [f"runs/{stamp}", *(f"runs/{stamp}-{i}" for i in range(2, 100))]
    return next(name for name in names if not Path(name).exists())


def _adapt(base: Base, config: TrainConfig, output: Path) -> PeftModel:
    if base.source == "tiny":
        # peft writes this into adapter_config.json: where whoever loads the adapter finds its base
        base.model.name_or_path = str((output / BASE_FOLDER).resolve())
    install_supervised_loss(base.model)
    return attach_lora(base.model, config.lora, seed=config.seed)


def _begin(output: Path, config: TrainConfig, base: Base, header: dict[str, Any], rows: Rows) -> None:
    """Write what a run has before its first step; leave nothing behind if that fails."""
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        if base.source == "tiny":
            write_tiny_base(output / BASE_FOLDER)  # anew: the one in memory has adapters in it
        write_atomically(output / CONFIG_FILE, yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        write_rows(output / ROWS_FILE, rows_of(rows))
        append_row(output / FILE_NAME, header)
    except (OSError, SafetensorError) as error:
        if existed:
            shutil.rmtree(output / BASE_FOLDER, ignore_errors=True)
            for name in (CONFIG_FILE, ROWS_FILE, FILE_NAME):
                (output / name).unlink(missing_ok=True)
        else:
            shutil.rmtree(output, ignore_errors=True)
        raise ConfigError("the run cannot be written", where=str(output), found=str(error)) from error


@contextlib.contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Say what is left where a disk fills up in mid-run."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a failed write as a RuntimeError of its archive writer
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        left = last_checkpoint(output)
        raise RunError(
            f"the run cannot be written: {error}; last good checkpoint: {left or 'none'}; when there is room, continue "
            f"with --resume {shlex.quote(str(output))}"
        ) from error


def _is_last(checkpoint: Path, config: TrainConfig) -> bool:
    """Whether a run has nothing to train after a checkpoint; transformers would take one step more."""
    state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
    steps = read_trajectory(checkpoint.parent / FILE_NAME).steps
    has_target = config.target is not None and bool(steps) and steps[-1]["loss"] < config.target
    return bool(state["global_step"] >= state["max_steps"]) or has_target


def _rewind(output: Path, header: dict[str, Any]) -> Path | None:
    """Bring a run back to its last complete checkpoint; one that has made its last step stays as it is."""
    path = output / FILE_NAME
    before = read_trajectory(path).header
    if before["rows_sha256"] != header["rows_sha256"]:
        raise ConfigError(
            "the data are not those of the run to resume",
            where=str(output),
            found=header["rows_sha256"],
            expected=before["rows_sha256"],
            fix="restore the data file, or start a new run with another --output",
        )
    if (output / COMPLETE_MARKER).exists():
        return None
    checkpoint = last_checkpoint(output)
    step = checkpoint_step(checkpoint) if checkpoint else 0
    for other in checkpoints(output):
        if checkpoint_step(other) > step:
            shutil.rmtree(other)
    rewind(path, step)
    return checkpoint


def _header(rows: Rows, model: PeftModel) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    libraries = {name: version(name) for name in ("glm4ft", "torch", "transformers", "peft", "accelerate")}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "type": "header",
        "rows_sha256": rows.sha256(),
        "rows": len(rows),
        "trained_parameters": trained,
        "device": device,
        "libraries": libraries,
    }


def _require_trackers(names: Sequence[str]) -> None:
    available = get_available_reporting_integrations()
    for name in names:
        if name not in (*available, "all", "none"):
            raise ConfigError(
                "the experiment tracker is unknown or not installed",
                where="--report_to",
                found=name,
                expected=", ".join(available) or "none: no tracker is installed",
                fix="install the tracker's package, or leave it out",
            )


def _require_disk_space(output: Path, model: PeftModel, keep_checkpoints: int) -> None:
    """Fail before the first step rather than at the first checkpoint."""
    adapter_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # a checkpoint holds the adapter and AdamW's two moments; one more than is kept exists while one is written
    needed = adapter_bytes * (1 + 3 * (keep_checkpoints + bool(keep_checkpoints))) + 2**24
    existing = next(parent for parent in [output.resolve(), *output.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if not free >= needed:
        raise ConfigError(
            "not enough room on the disk for the run",
            where=str(output),
            found=f"{free / 2**20:,.0f} MiB free",
            expected=f"{needed / 2**20:,.0f} MiB",
            fix="free some space, choose another --output, or lower --keep_checkpoints",
        )


def _is_bf16(base: Base) -> bool:
    return base.model.dtype == torch.bfloat16


def _is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _silent(_: object) -> None:
    """Say nothing: this process is not the first."""
