"""One training run from its options to its results on disk."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.integrations.integration_utils import get_available_reporting_integrations

from glm4ft.data.batching import Collator, PackedRows, RowSet
from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.dataset import prepare_rows
from glm4ft.data.format_check import format_warnings
from glm4ft.data.formats import make_format
from glm4ft.data.stored_rows import JoinedRows, Rows
from glm4ft.errors import ConfigError, RunError
from glm4ft.folders import only_writer, require_unused
from glm4ft.model.base_model import Base, load_base, load_format, require_loadable, write_built_in_base
from glm4ft.model.lora import attach_lora, audit_lora
from glm4ft.model.loss import install_supervised_loss
from glm4ft.model.portable import write_beside_adapter
from glm4ft.train import run_folder
from glm4ft.train.arguments import trainer_arguments
from glm4ft.train.best import WatchEvaluations, is_exhausted, restore_best
from glm4ft.train.config import TrainConfig
from glm4ft.train.observer import PreparedRun, RunObserver
from glm4ft.train.processes import (
    explaining_lost_processes,
    is_main_process,
    num_processes,
    require_same_sharding,
    sharding,
    shared_accumulation,
)
from glm4ft.train.run_folder import BASE_FOLDER, CONFIG_FILE, is_complete, last_checkpoint
from glm4ft.train.stop import StopAfterStep, StopRequest, stopping_after_a_step
from glm4ft.train.trainer import SupervisedTrainer
from glm4ft.train.trajectory import FILE_NAME, Trajectory, append_row, read_trajectory


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves behind.

    Args:
        output: The folder with adapter, trajectory, config and checkpoints.
        trajectory: The trajectory as on disk.
        target_loss: The target loss that was asked for, or None.
    """

    output: Path
    trajectory: Trajectory
    target_loss: float | None

    @property
    def reached_target(self) -> bool:
        """True if the last step's loss is below the target, or none was asked for."""
        return self.target_loss is None or self.trajectory.steps[-1]["loss"] < self.target_loss


def run_training(
    config: TrainConfig,
    *,
    observers: Sequence[RunObserver] = (),
    resume: bool = False,
    say: Callable[[str], object] = print,
) -> RunResult:
    """Train an adapter.

    Everything the user gave is read and checked before anything is written below ``config.output``.

    Args:
        config: The options, with ``data`` and ``output`` set. ``round_trip`` and a target relative to the floor are
            carried out by observers (``glm4ft.report.observed_run``).
        observers: What watches the run, called in this order.
        resume: Whether to continue the run in ``config.output`` after its last complete checkpoint.
        say: A function that is given each line of the account for people.
    Returns:
        The results.
    Raises:
        InputError: If an option, a conversation or the checkpoint cannot be used.
        RunError: If the run had to stop.
    """
    say, output = say if is_main_process() else _silent, Path(str(config.output))
    if not is_main_process():
        return _run(config, output, observers, say, resume=resume)
    if not resume:
        _require_unused(output)  # at once, or the lock would be in the way of whoever resumes that run
    with only_writer(output, CONFIG_FILE):
        if not resume:
            _require_unused(output)
        return _run(config, output, observers, say, resume=resume)


def _run(
    config: TrainConfig,
    output: Path,
    observers: Sequence[RunObserver],
    say: Callable[[str], object],
    *,
    resume: bool,
) -> RunResult:
    if resume and is_complete(output):
        run_folder.require_intact(output)
        if all(observer.is_done(output) for observer in observers):
            say(f"the run in {output} is complete")
            return RunResult(output, read_trajectory(output / FILE_NAME), config.target)
    run = _prepare(config, output, say)
    for observer in observers:
        observer.on_prepared(run)
    if run.config.target_above_floor is not None:
        raise ConfigError("no observer computes the floor", where="--target_loss", found=str(run.config.target_loss))
    header = _header(run.rows, run.model, run.config.quantise)
    _require_room(run)
    passes = run.config.accumulation
    if resume:
        run_folder.require_same_run(output, run.config, header)
        if not is_complete(output):
            passes = shared_accumulation(output, run.config, num_processes())
        if not is_complete(output) and run.is_main_process:
            run_folder.rewind_run(output, say)
            if run.base.is_built_in:
                write_built_in_base(output / BASE_FOLDER)  # peft reads it when it saves: damaged, it would end the run
    elif run.is_main_process:
        run_folder.begin(output, run.config, header, lambda folder: _write_beginning(run, observers, folder))
    try:
        with (
            run_folder.explaining_failed_writes(output),
            explaining_lost_processes(output),
            stopping_after_a_step() as stop,
        ):
            _train(run, replace(run.config, accumulation=passes), stop)
    except RunError as error:
        for observer in observers:
            observer.on_failure(run, error)
        raise
    for observer in observers:
        observer.on_end(run)
    return RunResult(output, read_trajectory(output / FILE_NAME), run.config.target)


def chat_format_of(config: TrainConfig) -> ChatFormat:
    """The chat format of a run, from its checkpoint and options."""
    tokenizer, name = load_format(config.model, config.chat_format, force=config.force_format)
    return make_format(
        name,
        tokenizer,
        final_stop=config.final_stop,
        train_on=config.train_on,
        allow_nonstop_terminator=config.allow_nonstop_terminator,
        reasoning=config.reasoning,
    )


def make_trainer(
    config: TrainConfig, base: Base, model: PeftModel, rows: RowSet, eval_rows: RowSet | None, output: Path
) -> SupervisedTrainer:
    """The trainer of a run; its trajectory goes to ``output``."""
    trajectory = output / FILE_NAME
    return SupervisedTrainer(
        record=(lambda row: append_row(trajectory, row)) if is_main_process() else _silent,
        target_loss=config.target,
        keep_checkpoints=config.keep_checkpoints,
        model=model,
        args=trainer_arguments(config, output, has_eval=eval_rows is not None, bf16=base.model.dtype == torch.bfloat16),
        train_dataset=PackedRows(rows, config.max_length) if config.packing else rows,
        eval_dataset=eval_rows,
        data_collator=Collator(base.tokenizer.pad_token_id),
        write_beside=lambda folder: write_beside_adapter(
            base.tokenizer, base.folder, base.model.generation_config, folder
        ),
    )


def _require_unused(output: Path) -> None:
    go_on = f", or continue that run with --resume {shlex.quote(str(output))}" * run_folder.is_run(output)
    require_unused(output, f"choose another folder{go_on}")


def _prepare(config: TrainConfig, output: Path, say: Callable[[str], object]) -> PreparedRun:
    _require_trackers(config.report_to)
    require_loadable(config.model, config.dtype, config.quantise)  # before hours may go into encoding
    chat_format = chat_format_of(config)
    encode = functools.partial(
        prepare_rows, chat_format=chat_format, max_length=config.max_length, options=config.read_options
    )
    rows, data = encode(config.data or [])
    say(data.describe())
    eval_rows = None
    if config.eval_data:
        eval_rows, eval_data = encode(config.eval_data)
        say(eval_data.describe())
    base = load_base(
        config.model,
        dtype=config.dtype,
        chat_format=chat_format.name,
        force_format=config.force_format,
        quantise=config.quantise,
    )
    if base.is_built_in:
        # peft writes this into adapter_config.json: where whoever loads the adapter finds its base
        base.model.name_or_path = str((output / BASE_FOLDER).resolve())
    install_supervised_loss(base.model)
    config = replace(config, lora=config.lora.for_model(base.model))
    model = attach_lora(base.model, config.lora, seed=config.seed)
    adapters = audit_lora(model, config.lora)
    say(adapters.describe())
    if config.quantise:
        from glm4ft.model.quantisation import describe_quantised

        say(describe_quantised(model))
    about_format = format_warnings(chat_format.name, base.tokenizer, where=config.model)
    for warning in (*about_format, *base.warnings, *adapters.warnings):
        say(f"warning: {warning}")
    return PreparedRun(
        config,
        output,
        chat_format,
        rows,
        data,
        eval_rows,
        base,
        model,
        adapters,
        say,
        is_main_process=is_main_process(),
    )


def _write_beginning(run: PreparedRun, observers: Sequence[RunObserver], folder: Path) -> None:
    if run.base.is_built_in:
        write_built_in_base(folder / BASE_FOLDER)  # anew: the one in memory has adapters in it
    for observer in observers:
        observer.on_begin(replace(run, output=folder))  # from which all moves into the run's own folder at once


def _train(run: PreparedRun, config: TrainConfig, stop: StopRequest) -> None:
    """Train from where the folder stands to the end, and save the adapter; a finished run is only loaded."""
    output, model = run.output, run.model
    if is_complete(output):
        model.load_adapter(str(output), "default", is_trainable=True)
        return
    trainer = make_trainer(config, run.base, model, run.rows, run.eval_rows, output)
    run.is_distributed = trainer.args.world_size > 1
    run.is_sharded = bool(sharding(trainer))
    trainer.accelerator.wait_for_everyone()  # until the main process has brought the folder back to its checkpoint
    checkpoint = last_checkpoint(output)
    if checkpoint:
        require_same_sharding(checkpoint, sharding(trainer))
    if config.quantise and run.is_sharded:
        raise ConfigError("quantised weights cannot be sharded (FSDP, DeepSpeed)", where="--quantise")
    if config.keep_best or config.patience:
        trainer.add_callback(WatchEvaluations(trainer, output, keep_best=config.keep_best, patience=config.patience))
    is_at_end = checkpoint and (
        run_folder.is_last(checkpoint, config)
        or is_exhausted(read_trajectory(output / FILE_NAME).evaluations, config.patience)
    )
    if is_at_end:
        model.load_adapter(str(checkpoint), "default", is_trainable=True)
    else:
        trainer.add_callback(StopAfterStep(stop, trainer))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.is_answered:
            return
    if config.keep_best:
        trainer.accelerator.wait_for_everyone()
        restore_best(model, output)
    trainer.save_model(str(output))
    if run.is_main_process:
        run_folder.complete(output)


def _header(rows: Rows | JoinedRows, model: PeftModel, quantise: str | None) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    names = ["glm4ft", "torch", "transformers", "peft", "accelerate"]
    names += ["bitsandbytes"] * bool(quantise)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "type": "header",
        "rows_sha256": rows.sha256(),
        "rows": len(rows),
        "trained_parameters": trained,
        "processes": num_processes(),
        "device": device,
        "libraries": {name: version(name) for name in names},
    }


def _require_room(run: PreparedRun) -> None:
    adapter_bytes = sum(p.numel() * p.element_size() for p in run.model.parameters() if p.requires_grad)
    run_folder.require_disk_space(
        run.output, adapter_bytes, run.config.keep_checkpoints if run.config.save_every else 0
    )


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


def _silent(_: object) -> None:
    """Say nothing: this process is not the main one."""
