"""Judges the inputs of a recorded step: its rows and labels, its batches, and the model that they passed through."""

from __future__ import annotations

import re

import torch

from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.data.encoded_row import IGNORED
from glm4ft.testing.recording.trace import Forward, Tensors
from glm4ft.testing.replay.comparison import relative
from glm4ft.testing.replay.departure import Departure, Departures
from glm4ft.testing.replay.matching import RowSpan, is_part_of
from glm4ft.testing.replay.seen_row import SeenHidden, SeenRow
from glm4ft.testing.replay.step import ReplayedStep

# The judges for which all rows of a step have to be known.
UNKNOWN = ("batches", "loss", "gradient")
NULL_MEMBER = re.compile(r',\s*"[^"]+": null|"[^"]+": null,?\s*')
# The number of tokens that must agree at a row's beginning to say that the weights are right: a wrong weight changes
# the first token already, a wrong rotary angle the second.
SOUND_START = 8
CHANGED_BETWEEN = "the parameters were changed between the forward pass and the optimizer's step"
SHOWN = 3  # the number of tokens of a row that a message quotes


def judge_rows(step: ReplayedStep) -> Departures:
    """Report ids and trained labels that differ from the subject's encoding of the conversations."""
    for matches in step.row_matches:
        for ids in matches.unknown:
            yield _unknown_row(step, ids)
        for ids in matches.beside:
            text = f"{len(ids)} tokens stand beside a row, as {step.reference.show(ids[:SHOWN])}"
            yield step.depart("rows", text, _copied(step, ids), hides=UNKNOWN)
    yield from _wrong_ends(step)
    if step.step.num_detached and not step.step.forwards:
        text = "the final norm's output has no gradient in training, so nothing below the head is trained"
        cause = "the inputs of checkpointed layers require no gradient, or the adapters run without one"
        yield step.depart("model", text, cause, hides=("batches", "model", "loss", "gradient"))
    elif not step.step.forwards and step.history.previous:
        cause = "the optimizer steps more than once per gradient" * _is_same_gradient(step)
        text = "no forward pass is between this step and the one before"
        hidden = (*UNKNOWN, "clipping", "schedule")
        # from here on the steps of the run are no longer those that the schedule counts
        yield step.depart("update", text, cause, hides=hidden, hides_later=("schedule",))
    elif not step.seen:
        yield step.depart("rows", "no row of the data went through the model", hides=UNKNOWN)
    for row in step.seen if step.has_finite_loss else ():
        yield from _wrong_targets(step, row)


def _is_same_gradient(step: ReplayedStep) -> bool:
    previous = step.history.previous
    return previous is not None and relative(step.step.clipped, previous.clipped) == 0


def _unknown_row(step: ReplayedStep, ids: tuple[int, ...]) -> Departure:
    known = list(step.history.known.labels)
    whole = next((row for row in known if is_part_of(ids, row)), None)
    if whole:
        is_packed = bool(step.history.plan["packing"])
        stage, cause = ("batches", "packing cuts rows") if is_packed else ("rows", "truncation")
        text = f"a row was cut to {len(ids)} of its {len(whole)} tokens"
        return step.depart(stage, text, cause, hides=UNKNOWN)
    nearest = max(known, key=lambda row: common_prefix_length(row, ids))
    at = common_prefix_length(nearest, ids)
    found, expected = (step.reference.show(row[at : at + SHOWN]) for row in (ids, nearest))
    text = f"a row matches no encoded conversation: position {at} has {found}, expected {expected}"
    cause = "truncation" if at >= len(nearest) // 2 and at == len(ids) else _null_words(step, ids, nearest)
    return step.depart("rows", text, cause, hides=UNKNOWN)


def _copied(step: ReplayedStep, ids: tuple[int, ...]) -> str:
    """The cause if every row begins with the ids that stand beside one; "" otherwise."""
    is_prefix = all(row[: len(ids)] == ids for row in step.history.known.labels)
    return "what a row begins with is there twice" if is_prefix else ""


def _wrong_ends(step: ReplayedStep) -> Departures:
    """Report rows whose last token is another one, which is trained."""
    for row in step.seen:
        span, at = row.span, row.span.start + len(row.ids) - 1
        sequence = step.step.forwards[row.forward].input_ids_BT[span.b]
        if not span.is_short or at >= len(sequence):
            continue
        token = int(sequence[at])
        if int(row.targets.labels_T[-1]) == token:
            found, expected = (step.reference.show([id]) for id in (token, row.ids[-1]))
            text = f"a row ends in {found}, should end in {expected}"
            yield step.depart("rows", text, "another terminator", hides=UNKNOWN)


def _null_words(step: ReplayedStep, ids: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """The cause if two rows differ in members of JSON objects that are null; "" otherwise."""
    found, wanted = (step.reference.tokenizer.decode(list(row)) for row in (ids, expected))
    same = found != wanted and NULL_MEMBER.sub("", found) == NULL_MEMBER.sub("", wanted)
    return "tools or calls have members that are null, as a columnar data set fills in" if same else ""


def _wrong_targets(step: ReplayedStep, row: SeenRow) -> Departures:
    ids, expected, got = torch.tensor(row.ids), torch.tensor(step.labels_of(row.ids)), row.targets.labels_T.clone()
    got[0] = IGNORED  # predicted by the token before the row: judged with the batches
    trained = got != IGNORED
    if int((trained & (got != ids)).sum()) > int(trained.sum()) // 2:
        return  # the trained labels differ from the ids at their positions: judged with the gradient
    missing = (expected != IGNORED) & ~trained & step.is_unsure(row)
    if row.span.is_short and missing[-1]:
        text = f"a row was cut to {len(row.ids) - 1} of its {len(row.ids)} tokens"
        yield step.depart("rows", text, "truncation, or no terminator is appended", hides=UNKNOWN)
    extra = trained & (expected == IGNORED) & (got == ids)
    if missing.any() or extra.any():
        words = [
            f"{step.reference.show(row.ids[t : t + 1])} at position {t} is {'trained' if extra[t] else 'not trained'}"
            for t in (missing | extra).nonzero()[:, 0].tolist()[:4]
        ]
        yield step.depart(
            "rows",
            f"{int(extra.sum())} tokens are trained that should be ignored, "
            f"{int(missing.sum())} are not trained that should be: " + ", ".join(words),
            "" if extra.any() else _masked_by_id(step, set(ids[missing].tolist())),
            hides=("loss", "gradient"),
        )


def _masked_by_id(step: ReplayedStep, missing: set[int]) -> str:
    """The likely cause if the untrained tokens are exactly those with the padding id; "" otherwise."""
    pairs = zip(step.step.forwards, step.row_matches, strict=True)
    padding = {id for forward, matches in pairs for id in forward.input_ids_BT[matches.padding_BT].tolist()}
    if missing != padding:
        return ""
    return f"{step.reference.show(sorted(padding))} also pads the batches, and labels are ignored wherever it occurs"


def judge_batches(step: ReplayedStep) -> Departures:
    """Report rows repeated or left out within an epoch, trained padding, and rows that see neighbours or padding."""
    yield from _trained_padding(step)
    step.history.seen.update(row.ids for row in step.seen)
    for row in step.seen:
        step.history.seen_by.setdefault(row.ids, set()).add(step.step.forwards[row.forward].process)
    known = step.history.known.labels
    # a trainer may leave out rows without targets, but not repeat them
    must = [ids for ids, labels in known.items() if any(label != IGNORED for label in labels[1:])] or list(known)
    most, least = max(step.history.seen[ids] for ids in known), min(step.history.seen[ids] for ids in must)
    if most - least > 1:
        again = next(ids for ids in known if step.history.seen[ids] == most)
        who, cause = _repeated_by(step, again)
        text = f"a row ({len(again)} tokens) was seen {most} times{who}, another {least} times"
        yield step.depart("batches", text, cause)
    for found in step.hidden_states:
        row, size = found.row, found.size
        cause = _wrong_surroundings(step.step.forwards[row.forward], row.span)
        if cause or (row.span.start > 0 and _rows_in_front_agree(step)):
            where = "that follows another or padding" if row.span.start else "of a batch"
            text = f"the hidden states of a row {where} are {size:.1e} off those of the row alone"
            cause = cause or "packed rows or padding are attended to"
            yield step.depart("batches", text, cause, size, hides=("model", "gradient"))


def _repeated_by(step: ReplayedStep, ids: tuple[int, ...]) -> tuple[str, str]:
    """The processes that saw a row too often, in words, and the cause; of one process there is nothing to say."""
    cause, by = "an epoch repeats some rows, or leaves some out", sorted(step.history.seen_by[ids])
    if step.history.plan.get("processes", 1) == 1:
        return "", cause
    if len(by) == 1:
        return f" by process {by[0]}", f"{cause}: a process's share has some twice, or no process has them"
    return f" by processes {', '.join(map(str, by))}", f"{cause}: the processes' shares overlap"


def _trained_padding(step: ReplayedStep) -> Departures:
    """Report trained targets outside of rows: padding, and the first token of a packed row after another."""
    for forward, matches, targets in zip(step.step.forwards, step.row_matches, step.targets, strict=True):
        outside = matches.padding_BT.clone()
        for span in matches.rows:
            outside[span.b, span.start] = True
        labels_BT = torch.stack([row.labels_T[:-1] for row in targets])
        # a label that differs from the id at its position is judged with the gradient
        wrong = outside & (labels_BT != IGNORED) & (labels_BT == forward.input_ids_BT)
        if wrong.any():
            b, t = wrong.nonzero()[0].tolist()
            is_padding = bool(matches.padding_BT[b, t])
            text = f"{int(wrong.sum())} targets are outside of rows, e.g. id {int(labels_BT[b, t])} at position {t}"
            cause = "padding is supervised" if is_padding else "a packed row's end learns its neighbour's beginning"
            yield step.depart("batches", text, cause, hides=("loss", "gradient"))


def _wrong_surroundings(forward: Forward, span: RowSpan) -> str:
    """How the attention mask or the positions are wrong for a row; "" if they are right."""
    mask, positions = forward.attention_mask, forward.positions_BT
    if mask is not None and mask.dim() == 2:
        own = mask[span.b][span.positions] != 0
        if not own.all():
            return f"the mask hides {int((~own).sum())} of the row's own tokens"
    if positions is not None and positions.dim() == 2:
        own = positions[min(span.b, len(positions) - 1)][span.positions]
        if not torch.equal(own - own[0], torch.arange(len(own))):
            return "its positions do not count its tokens"
        if span.start and int(own[0]):
            return "its positions do not restart"
    if mask is not None and mask.dim() == 2 and span.start and (mask[span.b][: span.start] != 0).any():
        return "the mask lets it see the tokens before it"
    return ""


def _rows_in_front_agree(step: ReplayedStep) -> bool:
    in_front = [found.size for found in step.hidden_states if not found.row.span.start]
    return bool(in_front) and all(size <= step.limit("batches") for size in in_front)


def judge_model(step: ReplayedStep) -> Departures:
    """Report a base that differs from its files, adapters that act at the start, and unused parameters."""
    before, base = step.step.before, step.reference
    if step.number == 1:
        limit = step.limit("update")  # parameters are not rounded by forward passes
        acting = list[str]()
        for name, delta in base.deltas(before).items():
            weight = base.weights[name if name in base.weights else base.head_name]  # a tied head has none of its own
            if not float(delta.norm()) <= limit * float(weight.norm()):
                acting.append(name)
        if acting:
            yield step.depart("model", f"{len(acting)} adapters act before the first step, e.g. that of {acting[0]}")
    if step.step.whole is not None:
        first = step.sampled(step.step.whole)
        size = relative(before, first)
        text = f"the trained weights are {size:.1e} off those of the base's files"
        yield step.depart("model", text, "another base, or weights drawn anew", size, hides=("gradient",))
    if not all(forward.training for forward in step.step.forwards):
        yield step.depart("model", "the model is not in training mode")
    for found in step.hidden_states:
        cause = "" if found.size <= step.limit("model") else _other_model(step, found)
        text = f"the final norm's output is {found.size:.1e} off the specification"
        # what is done to the parameters outside of the step is no fault of the model
        stage = "update" if cause == CHANGED_BETWEEN else "model"
        yield step.depart(stage, text, cause, found.size, hides=("gradient",))
    unused = sorted(before.keys() - step.step.raw.keys())
    if unused and step.step.raw:
        text = f"no gradient reaches {len(unused)} of {len(before)} trained parameters, e.g. {unused[0]}"
        yield step.depart("model", text, "their output does not enter the loss", hides=("gradient",))


def _other_model(step: ReplayedStep, found: SeenHidden) -> str:
    """The other model, or the other rows, that a row's hidden states are those of; "" if none is found."""
    if found.num_right >= SOUND_START:
        return (
            f"the first {found.num_right:,} tokens of the row are right and the next is not, so the weights are: how "
            "far attention reaches, or the positions of a longer row"
        )
    others: dict[str, Tensors] = {"what is trained has no effect: the hidden states are those of the base": {}}
    if previous := step.history.previous:
        others[CHANGED_BETWEEN] = previous.after
    limit = step.limit("model")
    fitting = [words for words, trained in others.items() if step.size_off(found.row, trained) <= limit]
    return fitting[0] if len(fitting) == 1 else ""
