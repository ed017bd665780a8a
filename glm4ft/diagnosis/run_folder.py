"""What ``glm4ft explain`` does: find what is left of a run, ours or another trainer's, and say what ails it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from glm4ft.data.chat_format import IGNORED, AssistantTurn, ChatFormat, EncodedRow
from glm4ft.data.dataset import data_path, fit_row
from glm4ft.data.encoded_rows import KEPT_TOKENS, ROWS_FILE, TrainedRow, read_rows, rows_of, token_origins, write_rows
from glm4ft.data.reader import read_conversations
from glm4ft.diagnosis.measure import MEASURED_ROWS, gather_evidence
from glm4ft.diagnosis.rules import Diagnosis, diagnose
from glm4ft.errors import ConfigError, ModelError
from glm4ft.model.base_model import load_base, load_format
from glm4ft.model.checkpoint import one_line, read_json
from glm4ft.model.generation import TurnRoundTrip, round_trip
from glm4ft.model.merge import require_adapter
from glm4ft.train.config import TrainConfig
from glm4ft.train.run import PreparedRun, RunObserver
from glm4ft.train.run_folder import BASE_FOLDER, CONFIG_FILE
from glm4ft.train.trajectory import FILE_NAME, read_trajectory

STATE_FILE, ADAPTER_CONFIG = "trainer_state.json", "adapter_config.json"
SHARED_OPTIONS = ("learning_rate", "weight_decay")
TRIED_TURNS = 16  # said back by the model


class RowsKeeper(RunObserver):
    """Keeps the first rows of a run beside its results, where ``glm4ft explain`` finds them."""

    def on_begin(self, run: PreparedRun) -> None:
        """Write ``rows.jsonl``."""
        write_rows(run.output / ROWS_FILE, rows_of(run.rows))


@dataclass(frozen=True)
class RunFiles:
    """What is left of a run on the disk.

    Args:
        log: a mapping per logged step.
        adapter: folder with the adapter; None if none was saved.
        rows_per_step: that one optimizer step saw, at least; None if it is not known.
        config: options of one of our runs; empty for another trainer's.
        rows: file of the rows as trained; None if there is none.
        num_rows: that were trained, of which the file may hold the first only; 0 if it is not known.
    """

    log: Sequence[Mapping[str, Any]]
    adapter: Path | None
    rows_per_step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Path | None = None
    num_rows: int = 0


@dataclass(frozen=True)
class Served:
    """Conversations as they should be encoded.

    Args:
        rows: those that are looked at.
        num_rows: of the whole file.
        num_dropped: conversations without a row.
        num_cut: conversations that lost their oldest turns.
    """

    rows: list[TrainedRow] = field(default_factory=list)
    num_rows: int = 0
    num_dropped: int = 0
    num_cut: int = 0


def explain_run(
    run: Path,
    *,
    data: str | None = None,
    rows: str | None = None,
    model: str | None = None,
    chat_format: str | None = None,
) -> Diagnosis:
    """Say why the loss of a run does not fall, or why its model does not stop.

    Args:
        run: folder of a run of ours, or of another trainer's: with ``trainer_state.json``, an adapter, or both.
        data: JSONL of conversations; by default what the run names.
        rows: file of the rows as trained, as ``glm4ft inspect --json`` writes them; by default what the run kept, or
            the conversations as they should be encoded.
        model: base; by default the one that run or adapter name.
        chat_format: by default the base's.
    Returns:
        The diagnosis.
    Raises:
        InputError: if the folder holds no run, or base or data cannot be found.
    """
    files = find_files(run)
    base_name = model or _base_name(run, files)
    tokenizer, format_name = load_format(base_name, chat_format or files.config.get("chat_format"))
    trained = _trained(files, rows)
    served = Served()
    if _has_data(files, data):
        wanted = {row.line for row in trained[:MEASURED_ROWS]}
        served = _served(files, data, ChatFormat(format_name, tokenizer, **_encoding(files)), wanted)
    looked_at = trained or served.rows
    if not looked_at:
        fix = "name the conversations with --data, or with --rows the rows as glm4ft inspect --json writes them"
        raise ConfigError("the run does not say what it was trained on", where="--data", fix=fix)
    adapted = _adapted(files, base_name, format_name)
    if adapted is not None:
        _require_known_ids(looked_at, adapted.config.vocab_size)
    # asked as serving asks, if the conversations are there to be rendered
    trips = (
        _say_back(adapted, ChatFormat(format_name, tokenizer), served.rows or trained) if adapted is not None else []
    )
    evidence = gather_evidence(
        adapted,
        looked_at,
        tokenizer,
        files.log,
        round_trips=trips,
        target_loss=_target(files.config),
        options=_options(files),
        served=served.rows,
        num_dropped=served.num_dropped,
        num_cut=served.num_cut,
        num_rows=served.num_rows if not trained else 0 if rows else files.num_rows,
    )
    return diagnose(evidence)


def find_files(run: Path) -> RunFiles:
    """Look through the folder of a run.

    Raises:
        ConfigError: if it holds neither a log nor an adapter.
    """
    checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name), reverse=True)
    folders = [run, *checkpoints]
    adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
    state = next((folder / STATE_FILE for folder in folders if (folder / STATE_FILE).is_file()), None)
    config = _config(run)
    log: Sequence[Mapping[str, Any]] = ()
    rows_per_step, num_rows = None, 0
    if (run / FILE_NAME).is_file():
        trajectory = read_trajectory(run / FILE_NAME)
        log, num_rows = trajectory.steps, int(trajectory.header.get("rows", 0))
        rows_per_step = int(config.get("micro_batch_size", 0)) * int(config.get("accumulation", 1))
    elif state is not None:
        content = read_json(state)
        log = [entry for entry in content.get("log_history") or [] if "loss" in entry]
        rows_per_step = content.get("train_batch_size")
    if adapter is None and not log:
        raise ConfigError(
            "there is no run to explain",
            where=str(run),
            found="no such folder" if not run.is_dir() else "neither a log nor an adapter",
            expected=f"{FILE_NAME} or {STATE_FILE}, and {ADAPTER_CONFIG}",
        )
    rows = run / ROWS_FILE
    return RunFiles(log, adapter, rows_per_step, config, rows if rows.is_file() else None, num_rows)


def _config(run: Path) -> dict[str, Any]:
    """Options of one of our runs; of another trainer's config.yaml the numbers whose names everybody shares."""
    path = run / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("cannot read the configuration", where=str(path), found=one_line(error)) from error
    known = content if isinstance(content, dict) else {}
    if (run / FILE_NAME).is_file():
        return known
    return {name: value for name, value in known.items() if name in SHARED_OPTIONS and isinstance(value, (int, float))}


def _base_name(run: Path, files: RunFiles) -> str:
    """The base as the run names it; a run on the built-in base has it beside it."""
    if (run / BASE_FOLDER / "config.json").is_file():
        return str(run / BASE_FOLDER)
    if files.config.get("model"):
        return str(files.config["model"])
    named = read_json(files.adapter / ADAPTER_CONFIG).get("base_model_name_or_path") if files.adapter else None
    if not named:
        raise ConfigError(
            "the run does not name its base", where="--model", fix="name the folder or hub id of the base"
        )
    return str(named)


def _trained(files: RunFiles, rows: str | None) -> list[TrainedRow]:
    path = Path(rows) if rows else files.rows
    return read_rows(path) if path else []


def _has_data(files: RunFiles, data: str | None) -> bool:
    """Whether the conversations are known; a run's own may have been moved, and are then done without."""
    return data is not None or (bool(files.config.get("data")) and data_path(str(files.config["data"])).is_file())


def _encoding(files: RunFiles) -> dict[str, Any]:
    """Options of one of our runs that decide how it was encoded."""
    options = ("final_stop", "train_on", "allow_nonstop_terminator")
    return {key: files.config[key] for key in options if key in files.config}


def _served(files: RunFiles, data: str | None, encoder: ChatFormat, wanted: set[int]) -> Served:
    """The conversations as they should be encoded, and how many were dropped and cut.

    All are counted. Kept are the wanted lines, and the first ones, as many as are looked at: the rest of a large file
    would not fit into memory.
    """
    max_length = int(files.config.get("max_length") or TrainConfig().max_length)
    rows, num_rows, dropped, cut, num_tokens = list[TrainedRow](), 0, 0, 0, 0
    for conversation in read_conversations(data_path(data or str(files.config["data"]))):
        row, _ = fit_row(conversation, encoder, max_length)
        if row is None:
            dropped += 1
            continue
        cut += len(row.turns) < sum(m.role == "assistant" for m in conversation.messages)
        num_rows, num_tokens = num_rows + 1, num_tokens + len(row.input_ids)
        if not rows or num_tokens <= KEPT_TOKENS or row.line in wanted:
            rows.append(TrainedRow(row.line, row.input_ids, row.labels))
    return Served(rows, num_rows, dropped, cut)


def _require_known_ids(rows: Sequence[TrainedRow], vocab_size: int) -> None:
    """Rows of one tokenizer and a base with another would end in an index error, or on a GPU in less."""
    highest = max((number for row in rows for number in (*row.input_ids, *row.labels)), default=0)
    if highest >= vocab_size:
        raise ConfigError(
            "the rows have tokens that the base has no row for",
            where="--rows",
            found=f"highest token id {highest:,}, vocab_size {vocab_size:,}",
            fix="name the base that the rows were made for with --model",
        )


def _adapted(files: RunFiles, base_name: str, format_name: str) -> Any:
    """The base with the run's adapter, or None if none was saved."""
    if files.adapter is None:
        return None
    require_adapter(files.adapter)
    base = load_base(base_name, dtype=str(files.config.get("dtype") or "auto"), chat_format=format_name)
    try:
        return PeftModel.from_pretrained(base.model, str(files.adapter))
    except Exception as error:  # peft, safetensors and torch each raise their own
        raise ModelError(
            "the adapter does not fit its base", where=str(files.adapter), found=one_line(error)
        ) from error


def _say_back(model: Any, chat_format: ChatFormat, rows: Sequence[TrainedRow]) -> list[TurnRoundTrip]:
    """Have the model say the first assistant turns."""
    encoded, num_turns = [], 0
    for row in rows:
        turns = assistant_turns(row, chat_format)
        if turns and num_turns < TRIED_TURNS:
            kept = turns[: TRIED_TURNS - num_turns]
            num_turns += len(kept)
            supervised = [label != IGNORED for label in row.labels]
            encoded.append(EncodedRow(list(row.input_ids), supervised, (), tuple(kept), row.line))
    with torch.no_grad():
        return round_trip(model, chat_format, encoded)


def assistant_turns(row: TrainedRow, chat_format: ChatFormat) -> list[AssistantTurn]:
    """The assistant turns of a row that have a body and an end.

    Args:
        row: of any trainer.
        chat_format: names the control tokens.
    Returns:
        Turns, ``message`` counting the headers before them; a turn is supervised if one of its words is.
    """
    where = token_origins(row.input_ids, chat_format.control_ids)
    turns, num_messages, start = [], -1, None
    for at, place in enumerate(where):
        if place.part == "header":
            num_messages += 1
            start = at + 1 if place.role == "assistant" else None
        elif place.part == "terminator" and start is not None:
            is_supervised = any(label != IGNORED for label in row.labels[start:at])
            turns.append(AssistantTurn(num_messages, start, at, is_supervised))
            is_header = row.input_ids[at] in chat_format.header_ids.values()
            num_messages, start = num_messages + is_header, None
    return turns


def _target(config: Mapping[str, Any]) -> float | None:
    target = config.get("target_loss")
    return float(target) if isinstance(target, (int, float)) else None


def _options(files: RunFiles) -> dict[str, Any]:
    options = {**files.config, "rows_per_step": files.rows_per_step}
    if files.adapter is not None:
        options["target_modules"] = read_json(files.adapter / ADAPTER_CONFIG).get("target_modules") or []
    return options
