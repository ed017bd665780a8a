"""Measures a run: each token, the adapters, the loss curve and the floor."""

from __future__ import annotations

import contextlib
import enum
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tqdm import tqdm

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.encoded_rows import TokenOrigin, TrainedRow, token_origins, turn_markers
from glm4ft.diagnosis.evidence import (
    AdapterAudit,
    CurvePoint,
    Evaluation,
    Evidence,
    FirstLoss,
    GradientHealth,
    RenderingDifference,
    RowEvidence,
    TokenEvidence,
)
from glm4ft.diagnosis.gradient_norms import spike_ratios
from glm4ft.diagnosis.token_losses import measure_targets
from glm4ft.floors.find_floor import find_floor
from glm4ft.floors.floor import Floor
from glm4ft.floors.head import Head, frozen_head
from glm4ft.floors.solver import BF16, EXACT
from glm4ft.model.generation import TurnRoundTrip
from glm4ft.model.lora import adapted_name
from glm4ft.text.token_text import TokenDecoder, token_text

MEASURED_ROWS = 64  # whose tokens are looked at one by one
_SHOWN_TOKENS = 6
NOT_MEASURED = math.nan


class Trained(enum.Enum):
    """What a run trained of the model that is measured."""

    ADAPTERS = "adapters"
    WEIGHTS = "all weights, so that the base itself is not there"
    NOTHING = "nothing: the model is the base, and what was trained is not there"


def gather_evidence(
    model: Any,
    rows: Sequence[TrainedRow],
    tokenizer: Any,
    log: Sequence[Mapping[str, Any]],
    *,
    trained: Trained = Trained.ADAPTERS,
    round_trips: Sequence[TurnRoundTrip] = (),
    target_loss: float | None = None,
    options: Mapping[str, Any] | None = None,
    served: Sequence[TrainedRow] = (),
    num_dropped: int = 0,
    num_cut: int = 0,
    num_rows: int = 0,
) -> Evidence:
    """Measure a run.

    Args:
        model: The model, as ``trained`` says; None if only rows and log are left of the run.
        rows: The rows as they were trained; empty if they are not known.
        tokenizer: The tokenizer that made them; None without rows.
        log: One mapping per step or evaluation with any of ``step``, ``loss``, ``grad_norm``, ``lr``, ``epoch`` and
            ``eval_loss``.
        trained: What the run trained of the model.
        round_trips: The assistant turns that were tried.
        target_loss: The loss that the run was to reach.
        options: The options of the run; ``target_modules`` are compared with the adapters there are.
        served: The same conversations as serving renders them, if they are known; matched by their lines.
        num_dropped: The number of conversations that were left out.
        num_cut: The number of conversations that were shortened.
        num_rows: The number of rows in the data set, where ``rows`` are not all of them.
    Returns:
        The evidence.
    """
    options = dict(options or {})
    # only below a head that no run has trained is a bound of the head valid
    head = frozen_head(model) if model is not None and trained is Trained.ADAPTERS else None
    floor = _floor(head, model, rows, tokenizer)
    measured = rows[:MEASURED_ROWS]
    shown = tqdm(measured, desc="measuring", unit="row", delay=2, disable=None, leave=False)
    losses = [_losses(model, trained, row) for row in shown]
    evidence_rows = _with_shares(_rows(measured, losses, tokenizer, floor))
    curve, has_adapters = curve_of(log), model is not None and trained is Trained.ADAPTERS
    return Evidence(
        curve=curve,
        evaluations=evaluations_of(log),
        rows=evidence_rows,
        first_loss=_first_loss(curve, evidence_rows, tokenizer, model),
        gradients=gradient_health(curve),
        adapters=audit_adapters(model, options.get("target_modules") or ()) if has_adapters else None,
        round_trips=tuple(round_trips),
        floor=floor,
        target_loss=target_loss,
        options=options,
        differences=tuple(_differences(measured, served, TokenDecoder(tokenizer))) if rows else (),
        num_dropped=num_dropped,
        num_cut=num_cut,
        num_rows=max(num_rows, len(rows)),
        has_head=head is not None,
    )


def curve_of(log: Sequence[Mapping[str, Any]]) -> tuple[CurvePoint, ...]:
    """The steps of a log; evaluations and other entries without a loss are passed over."""
    return tuple(
        CurvePoint(
            step=int(entry.get("step", number)),
            loss=_number(entry, "loss"),
            grad_norm=_number(entry, "grad_norm"),
            lr=_number(entry, "lr", "learning_rate"),
            epoch=_number(entry, "epoch"),
        )
        for number, entry in enumerate((e for e in log if "loss" in e), start=1)
    )


def evaluations_of(log: Sequence[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    """The evaluations of a log."""
    found = [(int(entry["step"]), _number(entry, "eval_loss")) for entry in log if "eval_loss" in entry]
    return tuple(Evaluation(step, loss) for step, loss in found if loss is not None)


def gradient_health(curve: Sequence[CurvePoint]) -> GradientHealth | None:
    """The gradient norms in a few figures; None where none was logged."""
    bad = tuple(p.step for p in curve if not all(x is None or math.isfinite(x) for x in (p.loss, p.grad_norm)))
    known = [(p.step, p.grad_norm) for p in curve if p.grad_norm is not None and math.isfinite(p.grad_norm)]
    if not known:
        return GradientHealth(math.nan, math.nan, math.nan, math.nan, 0, math.nan, 0, bad) if bad else None
    norms = [norm for _, norm in known]
    largest_step, largest = max(known, key=lambda pair: pair[1])
    ratios = spike_ratios(norms) or [1.0]
    spike = max(range(len(ratios)), key=ratios.__getitem__)
    spike_step = known[min(spike + 1, len(known) - 1)][0]
    median = statistics.median(norms)
    return GradientHealth(norms[0], norms[-1], median, largest, largest_step, ratios[spike], spike_step, bad)


def audit_adapters(model: Any, wanted: Sequence[str] | str) -> AdapterAudit:
    """Find which adapters a model has, and which of them do nothing.

    Args:
        model: The model with its adapters.
        wanted: The names of the targets that were asked for; one regular expression or a catch-all is not compared.
    """
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
    adapters: dict[str, Any] = {adapted_name(name, module): module for name, module in layers}
    targets: dict[str, int] = {}
    dead, broken = [], []
    for name, module in adapters.items():
        target = name.rpartition(".")[2]
        targets[target] = targets.get(target, 0) + 1
        matrices = [p for key, p in module.named_parameters() if "lora_" in key]
        if any(not bool(p.any()) for p in matrices):
            dead.append(name)
        if any(not bool(p.isfinite().all()) for p in matrices):
            broken.append(name)
    asked = [] if isinstance(wanted, str) else list(wanted)
    missing = tuple(target for target in asked if not any(f".{name}".endswith(f".{target}") for name in adapters))
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return AdapterAudit(len(adapters), targets, tuple(dead), tuple(broken), num_trainable, missing)


def _number(entry: Mapping[str, Any], *names: str) -> float | None:
    """A figure of the log; what our trajectory writes as null beside ``finite: false`` was not finite."""
    for name in names:
        if name in entry:
            value = entry[name]
            return (math.nan if entry.get("finite") is False else None) if value is None else float(value)
    return None


def _floor(head: Head | None, model: Any, rows: Sequence[TrainedRow], tokenizer: Any) -> Floor | None:
    if not any(label != IGNORED for row in rows for label in row.labels[1:]):
        return None
    if head is not None and model.dtype == torch.bfloat16:
        return find_floor(rows, tokenizer, head.in_dtype(torch.bfloat16), precision=BF16)
    return find_floor(rows, tokenizer, head, precision=EXACT)


def _losses(model: Any, trained: Trained, row: TrainedRow) -> tuple[list[float], list[int], list[float]]:
    """Loss and likeliest token at each position of a row, and the base's loss; NaN where nothing was measured."""
    length = len(row.input_ids)
    unknown, positions = [NOT_MEASURED] * length, range(1, length)
    own, likeliest, base = unknown, [IGNORED] * length, unknown
    if model is not None and trained is not Trained.NOTHING:
        losses, best = measure_targets(model, row.input_ids, positions)
        own, likeliest = [_or_nan(x) for x in losses], [IGNORED if x is None else x for x in best]
    if model is not None and trained is not Trained.WEIGHTS:
        # a model whose adapters were lost is its own base
        with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
            losses, _ = measure_targets(model, row.input_ids, positions)
        base = [_or_nan(x) for x in losses]
    return own, likeliest, base


def _differences(
    rows: Sequence[TrainedRow], served: Sequence[TrainedRow], decoder: TokenDecoder
) -> Iterator[RenderingDifference]:
    by_line = {row.line: list(row.input_ids) for row in served}
    for row in rows:
        own, other = list(row.input_ids), by_line.get(row.line)
        if other is None or own == other:
            continue
        at = common_prefix_length(own, other)
        trained, expected = (
            "".join(token_text(decoder, token) for token in ids[at : at + _SHOWN_TOKENS]) for ids in (own, other)
        )
        yield RenderingDifference(row.line, at, trained, expected)


def _rows(rows: Sequence[TrainedRow], losses: Sequence[Any], tokenizer: Any, floor: Floor | None) -> list[RowEvidence]:
    if not rows:
        return []
    decoder, markers = TokenDecoder(tokenizer), turn_markers(tokenizer)
    floors = iter(floor.per_target.tolist() if floor else [])
    found = []
    for row, (own, likeliest, base) in zip(rows, losses, strict=True):
        where = token_origins(row.input_ids, markers)
        tokens = []
        for at in range(1, len(row.input_ids)):
            is_target = row.labels[at] != IGNORED
            bound = next(floors, None) if is_target else None
            tokens.append(_token(row, at, where[at], own[at], likeliest[at], base[at], bound, decoder))
        targets = [token.loss for token in tokens if token.supervised]
        found.append(RowEvidence(row.line, tuple(tokens), statistics.fmean(targets) if targets else math.nan))
    return found


def _token(
    row: TrainedRow,
    at: int,
    place: TokenOrigin,
    loss: float,
    likeliest: int,
    base_loss: float,
    floor: float | None,
    decoder: TokenDecoder,
) -> TokenEvidence:
    return TokenEvidence(
        line=row.line,
        turn=place.turn,
        position=at,
        id=row.input_ids[at],
        text=token_text(decoder, row.input_ids[at]),
        role=place.role,
        part=place.part,
        supervised=row.labels[at] != IGNORED,
        label=row.labels[at],
        loss=loss,
        probability=math.exp(-loss),
        predicted_id=likeliest,
        predicted=token_text(decoder, likeliest) if likeliest >= 0 else "",
        base_loss=base_loss,
        share=0.0,
        floor=floor,
    )


def _with_shares(rows: list[RowEvidence]) -> tuple[RowEvidence, ...]:
    """Each supervised token's share of the loss, now that all of it is known."""
    total = math.fsum(t.loss for row in rows for t in row.tokens if t.supervised) or math.nan
    return tuple(
        RowEvidence(
            row.line,
            tuple(TokenEvidence(**{**vars(t), "share": t.loss / total}) if t.supervised else t for t in row.tokens),
            row.loss,
        )
        for row in rows
    )


def _first_loss(curve: Sequence[CurvePoint], rows: Sequence[RowEvidence], tokenizer: Any, model: Any) -> FirstLoss:
    base = [token.base_loss for row in rows for token in row.tokens if token.supervised]
    known = [loss for loss in base if not math.isnan(loss)]
    vocabulary = model.config.get_text_config().vocab_size if model is not None else len(tokenizer or ())
    return FirstLoss(
        next((point.loss for point in curve if point.loss is not None), None),
        statistics.fmean(known) if known else None,
        math.log(vocabulary) if vocabulary else None,
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
