"""Claims about batches: which rows they hold, how often and in which order, and that rows do not affect each other."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from glm4ft.testing.replay.tolerances import LIMITS, within
from glm4ft.testing.specification.mask_oracle import IGNORED
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trial.leaks import Leak, watch_leaks
from glm4ft.testing.trial.processes import require_ranks_stage
from glm4ft.testing.trial.registry import check
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

NEEDS = ("build_model", "train")
# In a fp32 run of the built-in base a row's gradient at foreign tokens is exactly 0 (x86-64 CPU, torch 2.13).
LEAK_LIMIT = 1e-6


@check(stage="batches", needs=NEEDS, incident="accelerate 4071: the data order starts again; axolotl 1603, TRL 6357")
def check_every_row_is_seen_once_per_epoch(trial: Trial) -> None:
    """Each epoch contains each row exactly once, and padding is neither trained nor attended to."""
    for run in trial.require_plans("every_row_is_seen_once_per_epoch", "batches"):
        _require_all_seen(run)


@check(stage="batches", needs=NEEDS, incident="ms-swift 9902: the epoch never reached the sampler")
def check_row_order_is_shuffled_by_seed_and_epoch(trial: Trial) -> None:
    """The order of rows differs between epochs and between seeds, and is the same in two runs with one seed."""
    run = trial.run()
    epochs = _epochs(run)
    if len(epochs) < 2:
        raise NotApplicable(f"not judged: {len(run.order)} steps are less than two epochs")
    if epochs[0] == epochs[1]:
        raise CheckFailed("the rows come in the same order in the first and in the second epoch")
    again = trial.again.order
    first = next((i for i, (a, b) in enumerate(zip(run.order, again, strict=False), 1) if a != b), 0)
    if first:
        raise CheckFailed(f"two runs with one seed differ in their rows from step {first} on")
    if trial.run(seed=1, steps=4).order == run.order[:4]:
        raise CheckFailed("runs with seed 0 and seed 1 see the rows in the same order")


@check(stage="batches", needs=NEEDS, incident="the official GLM-4 tokenizer pads left; ChatGLM-Efficient-Tuning 170")
def check_padding_side_does_not_matter(trial: Trial) -> None:
    """A padded row has the hidden states that it has alone, whichever side the tokenizer pads on."""
    tokenizer = trial.subject.tokenizer
    side = tokenizer.padding_side
    try:
        for tokenizer.padding_side in ("left", "right"):
            run = trial.run_anew(steps=2, micro_batch_size=4)
            if departure := run.verdict.departures.get("batches"):
                raise CheckFailed(f"{departure} (with padding_side={tokenizer.padding_side})")
    finally:
        tokenizer.padding_side = side


@check(
    stage="batches", needs=NEEDS, incident="transformers 46634: an all-ones mask switches the isolation off; TRL 5076"
)
def check_packed_rows_are_isolated_and_whole(trial: Trial) -> None:
    """A packed row has the hidden states that it has alone, and packing loses no row and no part of a row."""
    runs = trial.require_plans("packed_rows_are_isolated_and_whole", "batches")
    if not any(run.verdict.packed for run in runs):
        raise NotApplicable("the trainer was asked to pack rows and did not")
    for run in runs:
        _require_all_seen(run)


@check(stage="batches", needs=NEEDS, incident="transformers masking_utils: a cache object switches the isolation off")
def check_no_gradient_leaks_between_packed_rows(trial: Trial) -> None:
    """The hidden states of a row have no gradient with respect to the embeddings of other rows or of padding.

    This holds in training mode and in evaluation mode.
    """
    rows = trial.run().known
    for packing, size in ((True, 1), (False, 4)):
        model = trial.subject.build_model(str(trial.base_dir), 0)
        output = str(trial.new_folder("leaks"))
        plan = make_plan(steps=2, packing=packing, micro_batch_size=size, output_dir=output, eval_every=1)
        with watch_leaks(model, rows) as leaks:
            trial.subject.train(model, trial.conversations, plan)
        if not leaks:
            raise NotApplicable("not judged: no row was recognised")
        if not all(math.isfinite(leak.size) for leak in leaks):
            raise NotApplicable("not judged: gradients are not finite, which is judged with the model and the gradient")
        worst = max(leaks, key=lambda leak: leak.size)
        if not within("batches: gradient at foreign tokens", worst.size, LEAK_LIMIT):
            raise CheckFailed(_explain_leak(worst))


@check(stage="batches", needs=(*NEEDS, "evaluate"), incident="packed rows leak in eval mode with the cache on, by 1.2")
def check_evaluation_keeps_rows_apart(trial: Trial) -> None:
    """While a run evaluates, each row has the hidden states that it has alone."""
    run = trial.run(steps=4, packing=True, micro_batch_size=1, eval_every=2)
    run.require_sound_model()
    if not run.evaluated:
        raise NotApplicable("the trainer was asked to evaluate and did not")
    limit = LIMITS[trial.dtype]
    if not all(row.size <= limit for row in run.evaluated if not row.span.start):
        raise NotApplicable("not judged: rows that follow no other are off, too, which the checks of the model report")
    for row in run.evaluated:
        if not within("batches: rows of an evaluation", row.size, limit):
            raise CheckFailed(
                f"evaluated after step {row.num_steps}, a row of {len(row.span.ids)} tokens at position "
                f"{row.span.start} is {row.size:.1e} off the same row alone: it attends to neighbours or padding"
            )


@check(
    stage="batches", needs=("collate",), incident="TRL 1625 and 3398, axolotl 3401: padding, cut rows, unlike lengths"
)
def check_collation_keeps_ids_labels_and_mask(trial: Trial) -> None:
    """Each row is whole, its mask has its length, padding has the label -100, and all fields have the same shape."""
    _require_collated(trial, trial.subject)


@check(
    stage="batches", needs=("collate",), incident="unsloth-zoo 439: pad id 0 was taken for none; TRL 6357: pad == stop"
)
def check_pad_id_may_be_zero_or_a_real_token(trial: Trial) -> None:
    """Whichever token pads, masks and labels of a batch are made from the rows' lengths, never from the pad id.

    A pipeline that pads with a token of its own choice may do so with every base; one that asks the tokenizer, always.
    """
    stop, own = trial.rows(trial.conversations)[0][0][-1], trial.subject.tokenizer.pad_token_id
    asks_tokenizer = _require_collated(trial, trial.subject) <= {own}
    for pad_id in (0, stop):
        other = _require_collated(trial, trial.subject_on(_with_pad_token(trial, pad_id))) - {pad_id}
        if other and asks_tokenizer:
            raise CheckFailed(f"padding holds id {min(other)}, not the pad id {pad_id}")


@check(stage="batches", needs=(*NEEDS, "distributed"), incident="accelerate 2694, 696 and 2434: shards overlapped")
def check_processes_see_each_row_once_per_epoch(trial: Trial) -> None:
    """Two processes together see each row exactly once per epoch."""
    _require_all_seen(require_ranks_stage(trial, "batches"))


def _require_all_seen(run: RecordedRun) -> None:
    counts = Counter(ids for rows in run.order for ids in rows)
    # a trainer may leave out rows without targets
    unseen = [ids for ids, labels in run.rows if not counts[ids] and any(label != IGNORED for label in labels[1:])]
    total = sum(counts.values())
    if unseen and total >= 2 * len(run.rows) - 1:
        raise CheckFailed(f"{len(unseen)} of {len(run.rows)} rows were never seen, though others were seen twice")
    num_sequences = sum(len(forward.input_ids_BT) for step in run.trace.steps for forward in step.forwards)
    if unseen and run.plan["packing"] and num_sequences >= len(run.rows):  # each holds a row at least
        raise CheckFailed(f"{len(unseen)} of {len(run.rows)} rows were not seen in {len(run.order)} steps of packs")


def _epochs(run: RecordedRun) -> list[list[frozenset[tuple[int, ...]]]]:
    """The steps of each complete epoch, each step as the set of its rows."""
    epochs, steps, seen = [], list[frozenset[tuple[int, ...]]](), 0
    for rows in run.order:
        steps.append(frozenset(rows))
        seen += len(rows)
        if seen >= len(run.rows):
            epochs.append(steps)
            steps, seen = [], 0
    return epochs


def _explain_leak(leak: Leak) -> str:
    mode = "training" if leak.training else "evaluation"
    relation = "after" if leak.position >= leak.span.start + len(leak.span.ids) else "before"
    return (
        f"in {mode}, a row at positions {leak.span.start} to {leak.span.start + len(leak.span.ids) - 1} depends on "
        f"position {leak.position} {relation} it ({leak.size:.1e} of its largest gradient); {leak.neighbours} row(s) "
        "are in the same sequence"
    )


def _require_collated(trial: Trial, subject: Any) -> set[int]:
    """Fail if a batch of two rows is not those rows; returns the ids that pad them."""
    encoded = [subject.encode(c["messages"], c.get("tools")) for c in trial.conversations]
    pair = [encoded[0], max(encoded, key=lambda row: len(row["input_ids"]))]
    batch = subject.collate(pair)
    shapes = {name: tuple(t.shape) for name, t in batch.items() if isinstance(t, torch.Tensor) and t.dim() == 2}
    if len(set(shapes.values())) > 1:
        raise CheckFailed(f"the fields of a batch differ in shape: {shapes}")
    # ids without the last token beside labels without the first: the loss then shifts nothing
    is_shifted = not _holds(pair[1]["input_ids"], batch["input_ids"])
    padding = set[int]()
    for row in pair:
        ids, labels = row["input_ids"], row["labels"]
        if is_shifted and not _holds(ids, batch["input_ids"]):
            ids = ids[:-1]
        labels = labels[1:] + [IGNORED] * (len(ids) - len(labels) + 1) if is_shifted else labels
        b, start = _find(ids, batch["input_ids"])
        padding |= _require_row(batch, labels, b, range(start, start + len(ids)))
    got, expected = (sum(label != IGNORED for labels in every for label in labels)
                     for every in (batch["labels"].tolist(), [row["labels"] for row in pair]))  # fmt: skip
    if got != expected:
        raise CheckFailed(f"the batch has {got} targets, its rows have {expected}")
    return padding


def _holds(row: list[int], ids_BT: torch.Tensor) -> bool:
    """Whether a sequence of a batch contains a row whole."""
    return any(ids[at : at + len(row)] == row for ids in ids_BT.tolist() for at in range(len(ids) - len(row) + 1))


def _find(row: list[int], ids_BT: torch.Tensor) -> tuple[int, int]:
    """Index of the sequence in a batch that contains a row, and the row's first position in it."""
    for b, ids in enumerate(ids_BT.tolist()):
        for start in range(len(ids) - len(row) + 1):
            if ids[start : start + len(row)] == row:
                return b, start
    raise CheckFailed(f"a row of {len(row)} tokens is not whole in its batch of {ids_BT.shape[1]}")


def _require_row(batch: Any, row_labels: list[int], b: int, places: range) -> set[int]:
    ids, labels, mask = batch["input_ids"][b], batch["labels"][b], batch.get("attention_mask")
    if labels[places.start : places.stop].tolist() != row_labels:
        raise CheckFailed("a row's labels are not those it was encoded with: masked by id, shifted, or cut")
    if mask is not None and mask.dim() == 2 and len(batch["input_ids"]) > 1:
        # behind the row a mask decides nothing: no token of the row attends to what follows it
        wrong = [t for t in range(places.stop) if bool(mask[b][t]) != (t in places)]
        if wrong:
            word = "hidden" if wrong[0] in places else "attended to"
            raise CheckFailed(
                f"the mask of a row of {len(places)} tokens is wrong at {len(wrong)} positions: {wrong[0]} is {word}"
            )
        padding = [t for t in range(len(ids)) if t not in places]
        wrong = [t for t in padding if int(labels[t]) != IGNORED]
        if wrong:
            raise CheckFailed(
                f"{len(wrong)} padding positions are supervised, as {wrong[0]} with {int(labels[wrong[0]])}"
            )
        return {int(ids[t]) for t in padding}
    return set()


def _with_pad_token(trial: Trial, pad_id: int) -> Path:
    """The base with another pad token in its tokenizer and configuration."""
    from transformers import AutoConfig, AutoTokenizer

    folder = trial.copy_of_base("pad")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = pad_id
    config.save_pretrained(folder)
    return folder
