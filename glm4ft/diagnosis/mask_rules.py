"""Rules about the targets of training: the wrong tokens, or too few of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from glm4ft.diagnosis.evidence import Evidence, RowEvidence, TokenEvidence
from glm4ft.diagnosis.finding import Finding
from glm4ft.diagnosis.floor_rules import certified_reach, floor_facts
from glm4ft.floors.floor import HARD_TO_REACH

# A token is learnt once its probability is above 0.9. When the demo has reached a mean loss of 0.01, the worst token
# has 0.038 nats (2 seeds of the built-in base, x86-64 CPU, 2026-11-25).
LEARNT_TOKEN = 0.1
INSPECT = "glm4ft inspect shows the mask"
# The share of targets at which the model predicts another token of the row. A run that learnt predicts the next token
# at all of them; texts repeat letters, so a few per cent agree with a neighbour by chance.
SAYS_ANOTHER = 0.5


def zero_targets(evidence: Evidence) -> Finding | None:
    """Some or all rows have no supervised token."""
    empty = [row for row in evidence.rows if not any(token.supervised for token in row.tokens)]
    if not empty:
        return None
    is_all = len(empty) == len(evidence.rows)
    what = "No token is supervised" if is_all else f"{len(empty)} of {len(evidence.rows)} rows have no target"
    return Finding(
        "zero-targets",
        "rows",
        f"{what}, so nothing can be learnt from them; a logged loss of 0 only means that nothing was counted.",
        (f"rows without a target: {_lines(empty)}",),
        f"{INSPECT}; the end of a conversation may have been cut, or its roles not recognised",
        1.0 if is_all else 0.4,
    )


def header_supervised(evidence: Evidence) -> Finding | None:
    """The assistant's header is a target, although the prompt contains it at inference."""
    headers = [token for token in evidence.supervised if token.role == "assistant" and token.part == "header"]
    if not headers:
        return None
    name, reach = headers[0].text, certified_reach(evidence, headers[0])
    text = f"{name} is trained as a target, though the prompt always gives it at inference.{reach}"
    ends = _untrained_ends(evidence)
    if ends:
        text += f" {_names(ends)}, which ends the turn, is not trained: the terminator is never learned."
    facts = [
        f"{len(headers)} supervised headers hold {_share(headers)} of the loss, {_mean(headers):.2f} nats each",
        *floor_facts(evidence),
        *_end_facts(ends),
    ]
    return Finding(
        "header-supervised",
        "rows",
        text,
        tuple(facts),
        f"start the supervised span after the header and end it with the next control token; {INSPECT}",
    )


def prompt_supervised(evidence: Evidence) -> Finding | None:
    """Text of a system, user or tool message is a target."""
    wrong = [token for row in evidence.rows for token in _outside(row)]
    if not wrong:
        return None
    roles = ", ".join(sorted({token.role or "prefix" for token in wrong}))
    num_targets = sum(1 for _ in evidence.supervised)
    facts = [f"{len(wrong)} of {num_targets} targets are not the assistant's, and hold {_share(wrong)} of the loss"]
    return Finding(
        "prompt-supervised",
        "rows",
        f"Tokens of the prompt ({roles}) are trained as targets: the model learns to write its own questions.",
        (*facts, *floor_facts(evidence)),
        f"set the labels of everything but assistant turns to -100; {INSPECT}",
        # roles cannot be identified in a row whose headers are missing
        0.4 if evidence.differences else 1.0,
    )


def _outside(row: RowEvidence) -> Iterator[TokenEvidence]:
    """The targets that are not the assistant's; what a template writes behind a terminator is trained in vain only."""
    ends = {token.position for token in row.tokens if token.part == "terminator"}
    for token in row.tokens:
        is_behind = not token.role and token.position - 1 in ends
        if token.supervised and token.role != "assistant" and not is_behind:
            yield token


def truncated_answers(evidence: Evidence) -> Finding | None:
    """Rows end in the middle of an answer, at one common length."""
    cut = [row for row in evidence.rows if _is_open(row)]
    lengths, whole = {row.length for row in cut}, [row for row in evidence.rows if not _is_open(row)]
    limit = evidence.options.get("max_length")
    is_common = len(lengths) == 1 and (len(cut) > 1 or bool(whole) or lengths == {limit})
    if not cut or not is_common or any(row.length > max(lengths) for row in whole):
        return None
    return Finding(
        "truncated-answers",
        "rows",
        f"{len(cut)} of {len(evidence.rows)} rows end in the middle of an answer, all at {max(lengths)} tokens: they "
        "were cut, so their ends, and the token that ends a turn, are never learned.",
        (
            f"cut rows: {_lines(cut)}",
            f"{evidence.num_cut} conversations were shortened, {evidence.num_dropped} dropped",
        ),
        "raise the length limit, or drop the oldest turns instead of the end",
    )


def terminator_never_learned(evidence: Evidence) -> Finding | None:
    """The token that ends an assistant turn is missing, or not trained, or not learnt although the text is."""
    ends, open_rows = _untrained_ends(evidence), [row for row in evidence.rows if _is_open(row)]
    unlearnt = [] if ends or open_rows else _unlearnt_ends(evidence)
    if not (ends or open_rows or unlearnt):
        return None
    runaways = [turn for turn in evidence.round_trips if turn.supervised and turn.stop is None]
    facts = [*_end_facts(ends), *_end_facts(unlearnt, "trained, but not learnt")]
    if open_rows:
        facts.append(f"no token that ends a turn follows the last answer of {_lines(open_rows)}")
    if runaways:
        facts.append(f"{len(runaways)} of {len(evidence.round_trips)} generated turns did not stop")
    what = f"{_names(ends or unlearnt)} is" if ends or unlearnt else "It is"
    return Finding(
        "terminator-never-learned",
        "rows",
        f"The token that ends an assistant turn is never learned, so the model does not stop. {what} "
        + ("not supervised." if ends else "missing from the rows." if open_rows else "supervised, but stays unlikely.")
        + _dead_end(evidence, open_rows),
        tuple(facts),
        f"train each turn up to and including the control token after it; {INSPECT}",
    )


def _dead_end(evidence: Evidence, open_rows: Sequence[RowEvidence]) -> str:
    """The token that stands in place of the terminator, if the frozen head cannot express it."""
    last = next((token for row in open_rows for token in reversed(row.tokens) if token.supervised), None)
    reach = certified_reach(evidence, last) if last else ""
    return f" {last.text} ends them instead.{reach}" if last and "an unreachable target" in reach else ""


def turns_not_trained(evidence: Evidence) -> Finding | None:
    """Some assistant turns have no target at all."""
    turns = [(row, turn, tokens) for row in evidence.rows for turn, tokens in _turns(row) if len(tokens) > 1]
    left_out = [(row, turn, tokens) for row, turn, tokens in turns if not any(t.supervised for t in tokens)]
    if not left_out or len(left_out) == len(turns):
        return None
    is_asked_for = evidence.options.get("train_on") == "last"
    losses = [token.loss for _, _, tokens in left_out for token in tokens if token.part != "header"]
    return Finding(
        "turns-not-trained",
        "rows",
        f"{len(left_out)} of {len(turns)} assistant turns are not trained"
        + (", as train_on: last asks." if is_asked_for else ": only part of each conversation is learnt."),
        (
            f"untrained: {', '.join(f'line {row.line}, turn {turn + 1}' for row, turn, _ in left_out[:5])}",
            f"their mean loss is {_average(losses):.2f}, that of the trained tokens {evidence.loss:.4f}",
        ),
        f"train every assistant turn, unless some are left out on purpose; {INSPECT}",
        0.3 if is_asked_for else 0.8,
    )


def not_as_served(evidence: Evidence) -> Finding | None:
    """The rows differ from the ids that serving sends and expects, although each may be consistent in itself."""
    found = evidence.differences
    if not found:
        return None
    first = found[0]
    return Finding(
        "not-as-served",
        "rows",
        f"{len(found)} of {len(evidence.rows)} rows are not what serving makes of the same conversation: the model "
        "learns answers to prompts that it will never see.",
        tuple(f"line {d.line}, position {d.position}: trained {d.trained!r}, served {d.served!r}" for d in found[:3]),
        f"render rows with the template that serving uses, once; the first difference is at position {first.position}",
        0.9,
    )


def labels_shifted(evidence: Evidence) -> Finding | None:
    """The minimised loss is not that of the next token but of a neighbouring one."""
    other = [token for token in evidence.supervised if token.label != token.id]
    said = {name: _said(evidence, offset) for name, offset in (("the next", 0), ("after the next", 1), ("its own", -1))}
    name = max(said, key=said.__getitem__)
    is_beside = name != "the next" and said[name] > SAYS_ANOTHER > said["the next"]
    if not other and not is_beside:
        return None
    facts = [f"{len(other)} labels differ from the token at their position"] if other else []
    if is_beside:
        facts.append(
            f"at {said[name]:.0%} of the targets the model predicts the token {name}, "
            f"at {said['the next']:.0%} the next"
        )
    return Finding(
        "labels-shifted",
        "gradient",
        "The model has learnt to predict a token other than the next one: labels and predictions are shifted against "
        "each other.",
        tuple(facts),
        "put each label at the position of its token, and let exactly one of data code and model shift them",
        1.0 if is_beside else 0.6,
    )


def _said(evidence: Evidence, offset: int) -> float:
    """Return the share of targets at which the model predicts the token ``offset`` positions after the target."""
    hits = [
        row.tokens[i + offset].id == token.predicted_id
        for row in evidence.rows
        for i, token in enumerate(row.tokens)
        if token.supervised and 0 <= i + offset < len(row.tokens)
    ]
    return sum(hits) / len(hits) if hits else 0.0


def _untrained_ends(evidence: Evidence) -> list[TokenEvidence]:
    """List the terminators that are not supervised although their turn is, and that the model does not predict."""
    return [
        token
        for row in evidence.rows
        for _, tokens in _turns(row)
        for token in tokens
        if token.part == "terminator"
        and not token.supervised
        and any(t.supervised for t in tokens)
        # NaN, where nothing could be measured, counts as not predicted
        and not token.loss < LEARNT_TOKEN
    ]


def _unlearnt_ends(evidence: Evidence) -> list[TokenEvidence]:
    """List the supervised terminators that stay unlikely although the text before them is learnt."""
    body = [token.loss for token in evidence.supervised if token.part == "body"]
    ends = [token for token in evidence.supervised if token.part == "terminator"]
    if not body or not ends or not _average(body) < LEARNT_TOKEN:
        return []
    return [token for token in ends if token.loss > 5 * LEARNT_TOKEN and not (token.floor or 0) > HARD_TO_REACH]


def _is_open(row: RowEvidence) -> bool:
    """Whether a row ends within a trained assistant turn."""
    return bool(row.tokens) and row.tokens[-1].role == "assistant" and row.tokens[-1].part == "body"


def _turns(row: RowEvidence) -> Iterable[tuple[int, list[TokenEvidence]]]:
    turns: dict[int, list[TokenEvidence]] = {}
    for token in row.tokens:
        if token.turn is not None:
            turns.setdefault(token.turn, []).append(token)
    return turns.items()


def _end_facts(ends: Sequence[TokenEvidence], how: str = "not supervised") -> list[str]:
    return [f"{len(ends)} ends of turns are {how}; their mean loss is {_mean(ends):.2f} nats"] if ends else []


def _names(tokens: Sequence[TokenEvidence]) -> str:
    return " or ".join(text for text, _ in Counter(token.text for token in tokens).most_common(3))


def _lines(rows: Sequence[RowEvidence]) -> str:
    shown = ", ".join(str(row.line) for row in rows[:8])
    return f"line{'s' * (len(rows) > 1)} {shown}" + f" and {len(rows) - 8} more" * (len(rows) > 8)


def _share(tokens: Sequence[TokenEvidence]) -> str:
    share = sum(token.share for token in tokens)
    return f"{share:.0%}" if math.isfinite(share) else "an unknown share"


def _mean(tokens: Sequence[TokenEvidence]) -> float:
    return _average([token.loss for token in tokens])


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
