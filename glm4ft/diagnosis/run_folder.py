"""``glm4ft explain``: measure what is left of a run, ours or another trainer's, and diagnose it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm4ft.data.encoded_rows import (
    ROWS_FILE,
    TrainedRow,
    read_rows,
    rows_of,
    write_rows,
)
from glm4ft.data.formats import make_format
from glm4ft.data.inputs import data_inputs
from glm4ft.diagnosis.evidence import Evidence, FirstLoss, Sources
from glm4ft.diagnosis.measure import MEASURED_ROWS, Trained, gather_evidence
from glm4ft.diagnosis.rules import Diagnosis, diagnose
from glm4ft.diagnosis.run_files import ADAPTER_CONFIG, RunFiles, find_files, has_weights
from glm4ft.diagnosis.say_back import say_back
from glm4ft.diagnosis.served_rows import Served, encoding_options, served_rows
from glm4ft.diagnosis.start_rules import START_DIFFERENCE
from glm4ft.errors import ConfigError, InputError, ModelError
from glm4ft.model.adapter import load_adapter, require_adapter
from glm4ft.model.base_model import load_base, load_format
from glm4ft.model.checkpoint import TINY, read_json, weight_files
from glm4ft.train.observer import PreparedRun, RunObserver
from glm4ft.train.run_folder import BASE_FOLDER


class RowsKeeper(RunObserver):
    """Keeps the first rows of a run beside its results, where ``glm4ft explain`` finds them."""

    def on_begin(self, run: PreparedRun) -> None:
        """Write ``rows.jsonl``."""
        write_rows(run.output / ROWS_FILE, rows_of(run.rows))


def explain_run(
    run: Path,
    *,
    data: str | None = None,
    rows: str | None = None,
    model: str | None = None,
    chat_format: str | None = None,
    force_format: bool = False,
) -> Diagnosis:
    """Diagnose why the loss of a run does not fall, or why its model does not stop.

    Args:
        run: The folder of a run of ours, or of another trainer's with a log, an adapter, weights, or several of them.
        data: The JSONL file of conversations; by default the one that the run names.
        rows: The file of the rows as trained, in the form of ``glm4ft inspect --json``; by default what the run kept,
            or the conversations as they should be encoded.
        model: The base; by default the one that run or adapter name.
        chat_format: The chat format; by default the base's.
        force_format: Whether to go on with a format that the base's own chat template contradicts.
    Returns:
        The diagnosis. Without conversations it is that of the log alone, and says so.
    Raises:
        InputError: If the folder holds no run, or base or data cannot be found.
    """
    files = find_files(run)
    trained = _trained(files, rows)
    if trained or _has_data(files, data):
        evidence = _measured(files, trained, data, rows, model, chat_format, force_format=force_format)
    elif files.log is not None:
        evidence = _logged(files, model)
    else:
        fix = "name the conversations with --data, or with --rows the rows as glm4ft inspect --json writes them"
        raise ConfigError("the run does not say what it was trained on", where="--data", fix=fix)
    return diagnose(evidence)


def _logged(files: RunFiles, model: str | None) -> Evidence:
    """What the log alone shows."""
    log = files.log.entries if files.log else ()
    evidence = gather_evidence(None, (), None, log, target_loss=_target(files.config), options=_options(files))
    vocabulary = _vocabulary(files, model)
    first = replace(evidence.first_loss, uniform=math.log(vocabulary) if vocabulary else None)
    weights = files.adapter if files.adapter and has_weights(files.adapter) else files.weights
    unread = [f"the weights in {weights.name}: name conversations with --data"] if weights else []
    unknown = ["the conversations, their labels and the base: name them with --data or --rows, and --model"]
    return replace(evidence, first_loss=first, sources=_sources(files, [], unread, unknown))


def _measured(
    files: RunFiles,
    trained: list[TrainedRow],
    data: str | None,
    rows: str | None,
    model: str | None,
    chat_format: str | None,
    *,
    force_format: bool,
) -> Evidence:
    """What log, conversations and weights show."""
    base_name = model or _base_name(files)
    tokenizer, format_name = load_format(
        base_name,
        chat_format or files.config.get("chat_format"),
        force=force_format or bool(files.config.get("force_format")),
    )
    served = Served()
    if _has_data(files, data):
        wanted = {row.line for row in trained[:MEASURED_ROWS]}
        served = served_rows(files, data, make_format(format_name, tokenizer, **encoding_options(files)), wanted)
    looked_at = trained or served.rows
    loaded, what = _load(files, base_name, format_name)
    if loaded is not None:
        _require_known_ids(looked_at, loaded.config.vocab_size)
    # asked as serving asks, if the conversations are there to be rendered
    is_tried = what is not Trained.NOTHING
    trips = say_back(loaded, make_format(format_name, tokenizer), served.rows or trained) if is_tried else []
    evidence = gather_evidence(
        loaded,
        looked_at,
        tokenizer,
        files.log.entries if files.log else (),
        trained=what,
        round_trips=trips,
        target_loss=_target(files.config),
        options=_options(files),
        served=served.rows,
        num_dropped=served.num_dropped,
        num_cut=served.num_cut,
        num_rows=served.num_rows if not trained else 0 if rows else _num_rows(files),
    )
    seen = [f"{len(evidence.rows)} of {evidence.num_rows:,} rows, {'as trained' if trained else 'as they should be'}"]
    if loaded is not None:
        seen.append(f"the weights of {_named(files, base_name, what)}, token by token")
    unknown = [] if trained else ["the labels as the trainer made them: name them with --rows"]
    unknown += [] if is_tried else ["the model as trained, of which the folder has no weights"]
    is_sure = bool(trained) or is_tried or _is_confirmed(evidence.first_loss)
    return replace(evidence, are_rows_sure=is_sure, sources=_sources(files, seen, [], unknown))


def _is_confirmed(first: FirstLoss) -> bool:
    """Whether a run without weights had this base and these rows, by its first loss."""
    if first.base is None or first.logged is None:
        return False
    return abs(first.logged / first.base - 1) <= START_DIFFERENCE


def _sources(files: RunFiles, seen: Sequence[str], unread: Sequence[str], unknown: Sequence[str]) -> Sources:
    log, told = files.log, []
    if log is not None:
        steps = sum("loss" in entry for entry in log.entries)
        evaluations = sum("eval_loss" in entry for entry in log.entries)
        numbered = ", numbered as printed" if log.settings.get("steps_are_numbered") else ""
        told.append(f"{log.path.name}: {steps:,} logged steps{numbered}, {evaluations:,} evaluations")
    return Sources(
        looked_at=(*told, *seen),
        unread=(*unread, *(f"the weights in {name}, a format that is not opened" for name in files.closed)),
        unknown=(*unknown, *files.unread),
        checkpoints=files.checkpoints,
        resumed=log.resumed if log else (),
    )


def _base_name(files: RunFiles) -> str:
    """The base that the run names; a run on the built-in base has written it into its folder."""
    if (files.folder / BASE_FOLDER / "config.json").is_file():
        return str(files.folder / BASE_FOLDER)
    if files.weights is not None:
        return str(files.weights)
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
    if data is not None or not files.config.get("data"):
        return data is not None
    try:
        return bool(data_inputs(files.config["data"]))
    except InputError:
        return False


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


def _load(files: RunFiles, base_name: str, format_name: str) -> tuple[Any, Trained]:
    """The model as trained, or else its base; None if there are no weights at all."""

    def load(source: str) -> Any:
        # load_format has compared the format with the base's template
        dtype, quantise = str(files.config.get("dtype") or "auto"), files.config.get("quantise")
        return load_base(source, dtype=dtype, chat_format=format_name, force_format=True, quantise=quantise).model

    if files.adapter is None and files.weights is not None:
        return load(str(files.weights)), Trained.WEIGHTS
    if files.adapter is not None and has_weights(files.adapter):
        require_adapter(files.adapter)
        return load_adapter(load(base_name), files.adapter), Trained.ADAPTERS
    has_base = base_name == TINY or (Path(base_name).is_dir() and _has_all_weights(Path(base_name)))
    return load(base_name) if has_base else None, Trained.NOTHING


def _has_all_weights(folder: Path) -> bool:
    """Whether a base can be measured; for its own loss alone, nothing is downloaded and no shard is missed."""
    try:
        return bool(weight_files(folder))
    except ModelError:
        return False


def _named(files: RunFiles, base_name: str, what: Trained) -> str:
    if what is Trained.ADAPTERS and files.adapter is not None:
        return f"the adapter in {files.adapter.name} on {base_name}"
    return f"{files.weights.name}" if what is Trained.WEIGHTS and files.weights else f"the untouched base {base_name}"


def _vocabulary(files: RunFiles, model: str | None) -> int | None:
    """The number of rows of the head, as far as a folder at hand states it."""
    for folder in (files.weights, Path(model) if model else None):
        if folder is not None and (folder / "config.json").is_file():
            size = read_json(folder / "config.json").get("vocab_size")
            return size if isinstance(size, int) else None
    return None


def _num_rows(files: RunFiles) -> int:
    return int(files.log.settings.get("num_rows") or 0) if files.log else 0


def _target(config: Mapping[str, Any]) -> float | None:
    target = config.get("target_loss")
    return float(target) if isinstance(target, (int, float)) else None


def _options(files: RunFiles) -> dict[str, Any]:
    options = {**files.options, "rows_per_step": files.rows_per_step}
    if files.adapter is not None:
        options["target_modules"] = read_json(files.adapter / ADAPTER_CONFIG).get("target_modules") or []
    return options
