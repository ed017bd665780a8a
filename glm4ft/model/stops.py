"""The stop tokens that a checkpoint's configurations name."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def complete_stops(
    model: PreTrainedModel, stop_ids: list[int], tokenizer: PreTrainedTokenizerBase, source: str
) -> list[str]:
    """Add missing stop tokens to both configs, since engines differ in which one they read.

    Args:
        model: The model, changed in place.
        stop_ids: The ids that end a turn.
        tokenizer: Its tokenizer.
        source: The name of the base, for the warnings.

    Returns:
        A warning for each config that lacked some.
    """
    warnings = []
    configs: list[tuple[str, Any]] = [("generation_config", model.generation_config), ("config", model.config)]
    for name, config in configs:
        stated = config.eos_token_id
        known = stated if isinstance(stated, list) else [] if stated is None else [stated]
        lacking = [str(tokenizer.convert_ids_to_tokens(i)) for i in stop_ids if i not in known]
        if lacking:
            others = [i for i in known if i < model.config.vocab_size]  # a default of the config class can exceed it
            config.eos_token_id = list(dict.fromkeys([*stop_ids, *others]))
            warnings.append(
                f"{source}: eos_token_id of {name} lacks {' and '.join(lacking)}, so a server would not stop there; "
                "here, and in what is merged from it, it has all of them"
            )
    _drop_unused_sampling(model.generation_config)
    return warnings


def _drop_unused_sampling(config: Any) -> None:
    """Remove settings of a sampling that is off: transformers refuses to save them once anything else has changed."""
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)
