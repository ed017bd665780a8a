"""The base that tests run on, and the reduced set of checks for a base of the true size.

The header of every test run imports this module, so heavy imports wait until a base is written.
"""

from __future__ import annotations

import json
from pathlib import Path

from glm4ft.errors import ConfigError
from glm4ft.testing.bases.geometry import RANDOM_PREFIX, size_of

TINY = "tiny"
TINY_PREFIX = "tiny:"  # before the name of a chat format, for the built-in base of the models that use it
# The number of parameters from which a base counts as large: a run then loads gigabytes, and a GPU of 80 GB holds only
# one model beside the specification.
LARGE = 1e9

# The checks that run on a large base. The others would need further runs, a second model or several processes, and
# their results do not depend on the size.
REDUCED = frozenset(
    {
        "lists_have_one_length_and_labels_equal_ids_where_supervised",
        "mask_is_what_the_model_must_sample",
        "prefix_occurs_once",
        "every_turn_ends_in_one_stop",
        "content_never_becomes_a_control_token",
        "supervised_text_is_the_answer",
        "every_message_is_in_the_row",
        "row_begins_with_the_serving_prompt",
        "earlier_turns_do_not_change",
        "loss_flag_is_honoured",
        "conversation_without_targets_is_not_trained",
        "mask_reaches_the_loss",
        "every_row_is_seen_once_per_epoch",
        "packed_rows_are_isolated_and_whole",
        "model_computes_what_was_requested",
        "gradient_is_that_of_the_token_mean",
        "accumulation_does_not_change_the_gradient",
        "logged_loss_is_the_loss",
        "gradient_is_clipped_to_its_global_norm",
        "logged_gradient_norm_is_the_one_before_clipping",
        "logged_learning_rate_is_the_one_applied",
        "update_follows_adamw",
        "optimizer_holds_every_trained_parameter",
        "base_is_unchanged_by_training",
        "saved_adapter_is_complete",
        "adapter_is_unchanged_by_saving_and_loading",
        "two_conversations_reach_a_loss_below_a_hundredth",
        "every_turn_has_learned_to_stop",
        "header_is_not_learned",
        "every_turn_is_reproduced_and_stops",
        "gradient_norms_are_stable",
    }
)


def is_large(spec: str) -> bool:
    """Whether a base is so large that it gets the reduced set of checks.

    Args:
        spec: The base, as for ``--glm4ft-model``.
    """
    return size_of(spec) >= LARGE


def why_left_out(spec: str, check: str, dtype: str) -> str:
    """The reason why a check is left out on a base; "" if it runs.

    Args:
        spec: The base, as for ``--glm4ft-model``.
        check: The name of the check.
        dtype: The requested dtype, ``bf16`` or ``fp32``; "" for that of the base.
    """
    if is_large(spec) and check not in REDUCED:
        return f"not in the reduced set, which {spec} gets for its size"
    if is_large(spec) and dtype == "fp32" and spec.startswith(RANDOM_PREFIX):
        return f"{spec} is judged in bf16: in fp32 a GPU of 80 GB does not hold it beside the specification"
    stored = stored_dtype(spec)
    return f"{spec} is stored in {stored}" if dtype and stored not in ("", dtype) else ""


def stored_dtype(spec: str) -> str:
    """The dtype of a checkpoint's folder, ``bf16`` or ``fp32``; "" for a base that is not written yet or a hub id."""
    config = Path(spec).expanduser() / "config.json"
    if not config.is_file():
        return ""
    content = json.loads(config.read_text("utf-8"))
    return "bf16" if "bfloat16" in (content.get("dtype"), content.get("torch_dtype")) else "fp32"


def describe_lane(spec: str) -> str:
    """One line that states whether a base gets the full or the reduced set of checks."""
    if not is_large(spec):
        return f"full set of checks on {spec}"
    size = size_of(spec)
    told = f"{size / 1e9:.2f} billion parameters" if size < float("inf") else "size unknown before it is loaded"
    return f"reduced set of {len(REDUCED)} checks on {spec} ({told})"


class Bases:
    """The base of a session, written once for each dtype that tests request.

    Args:
        spec: The base: ``tiny``, ``tiny:FORMAT``, ``random:NAME``, a folder or a hub id.
        folder: The folder for the bases that are written; it is created.
    """

    def __init__(self, spec: str, folder: Path) -> None:
        self.spec, self.folder = spec, folder

    def get(self, dtype: str = "") -> str:
        """Make the base available.

        Args:
            dtype: The dtype of a base that is written, ``bf16`` or ``fp32``; by default fp32, or bf16 for a large base.
                A checkpoint keeps its own.
        Returns:
            The folder of the base; or the hub id, which is downloaded when it is loaded.
        """
        if self.spec != TINY and not self.spec.startswith((TINY_PREFIX, RANDOM_PREFIX)):
            return self.spec
        stored = dtype or ("bf16" if is_large(self.spec) else "fp32")
        folder = self.folder / f"{self.spec.removeprefix(RANDOM_PREFIX).replace(':', '-')}-{stored}"
        if not folder.exists():
            _write(self.spec, folder, stored)
        return str(folder)


def _write(spec: str, folder: Path, dtype: str) -> None:
    from glm4ft.model.base_model import DTYPES
    from glm4ft.model.tiny import TINY_BASES, write_tiny_base
    from glm4ft.testing.bases.random_base import write_random_base

    if spec.startswith(RANDOM_PREFIX):
        write_random_base(spec, folder, dtype=DTYPES[dtype])
    elif spec in TINY_BASES:
        write_tiny_base(folder, dtype=DTYPES[dtype], **TINY_BASES[spec])
    else:
        legal = ", ".join(TINY_BASES)
        raise ConfigError("there is no such built-in base", where="--glm4ft-model", found=spec, expected=legal)
