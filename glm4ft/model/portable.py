"""Folders that transformers 4 and 5, vLLM and llama.cpp's converter read alike.

transformers 5 renamed what it writes: ``rope_theta`` became a part of ``rope_parameters``, ``torch_dtype`` became
``dtype``, and the class of a tokenizer became ``TokenizersBackend``. transformers 4 takes a default for a name that it
does not find, without an error, and so computes with another rotary base; a class that it does not know it refuses
(modelscope/ms-swift 8098, hiyouga/LLaMA-Factory 10310). What is written here carries both names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from glm4ft.errors import RunError
from glm4ft.files import write_atomically
from glm4ft.model.checkpoint import read_json

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TOKENIZER_CLASS = "PreTrainedTokenizerFast"  # the one class of a tokenizer.json that both major versions know

# Copied byte for byte: saved again, they would carry names of this transformers version and our padding side.
_TOKENIZER_FILES = (
    "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip
# What the configurations of transformers 4 take for a name that is missing; the theta is that of Llama's too. The
# architectures that are not listed rotate all dimensions (GLM-4.7-Flash: of the part of a head that is rotated).
# Source: transformers 4.51 to 4.57, configuration_glm.py, configuration_glm4.py and configuration_glm4_moe.py.
_DEFAULT_THETA, _ROTARY_SHARES = 10000.0, {"glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5}


@dataclass(frozen=True)
class Reading:
    """What a reader takes from the files of a checkpoint, weights and vocabulary aside.

    Args:
        rope_theta: The base of the rotary frequencies.
        rotary_share: The share of each head's dimensions that is rotated, from 0 to 1.
        rope_scaling: The type of the rotary scaling and its parameters; a plain one has its type only.
        dtype: The dtype of the weights, without ``torch.``.
        stops: The ids that end a generation, ascending.
        tokenizer_class: The name of the tokenizer's class, or that it does not exist.
        special_tokens: The further special tokens that the tokenizer's configuration names.
    """

    rope_theta: float
    rotary_share: float
    rope_scaling: dict[str, Any]
    dtype: str
    stops: tuple[int, ...]
    tokenizer_class: str
    special_tokens: tuple[str, ...]


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


def write_both_names(folder: Path) -> None:
    """Write into ``config.json`` the names of transformers 4 beside those of transformers 5.

    Args:
        folder: A folder that ``save_pretrained`` of transformers 5 has written a model into.
    """
    config = read_json(folder / CONFIG)
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")
    share = rope.pop("partial_rotary_factor", _rotary_share(config))
    if share != 1 or config.get("model_type") in _ROTARY_SHARES:  # others need not know the name
        config["partial_rotary_factor"] = share
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if rope.get("rope_type") == "yarn":
        # transformers 4 takes this quotient for the factor, and does not read the factor itself
        config["max_position_embeddings"] = round(rope["factor"] * rope["original_max_position_embeddings"])
    config["torch_dtype"] = config["dtype"]
    _write_json(folder / CONFIG, config)


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path | None, folder: Path) -> None:
    """Write a checkpoint's tokenizer and chat template into another folder.

    Args:
        tokenizer: The tokenizer as loaded; saved only as far as the checkpoint has no files of it.
        source: The folder of the checkpoint; None for the built-in base.
        folder: The folder to write into.
    """
    if source is None or not (source / TOKENIZER_CONFIG).is_file():
        tokenizer.save_pretrained(folder)
    for path in (source / name for name in _TOKENIZER_FILES) if source else ():
        if path.exists():
            shutil.copyfile(path, folder / path.name)
    stored = read_json(folder / TOKENIZER_CONFIG)
    portable = _portable_tokenizer(stored)
    if portable != stored:
        _write_json(folder / TOKENIZER_CONFIG, portable)


def write_beside_adapter(
    tokenizer: PreTrainedTokenizerBase, source: Path | None, generation: GenerationConfig, folder: Path
) -> None:
    """Write what a server needs beside an adapter: the tokenizer with its template, and all stop tokens.

    Args:
        tokenizer: The base's tokenizer.
        source: The folder of the base's files; None for the built-in base.
        generation: The base's generation config, with all stop tokens.
        folder: The folder of the adapter.
    """
    write_tokenizer(tokenizer, source, folder)
    generation.save_pretrained(folder)


def require_same_reading(folder: Path) -> None:
    """Read a checkpoint back by the rules of both major versions of transformers, and compare.

    Raises:
        RunError: If the two differ.
    """
    four, five = asdict(read_as_transformers_4(folder)), asdict(read_as_transformers_5(folder))
    differing = [f"{name}: {value!r} and {five[name]!r}" for name, value in four.items() if value != five[name]]
    if differing:
        raise RunError(
            f"nothing written: transformers 4 and 5 would read the checkpoint differently ({'; '.join(differing)})"
        )


def read_as_transformers_4(folder: Path) -> Reading:
    """Read the files of a checkpoint by the rules of transformers 4, which knows no ``rope_parameters``.

    Args:
        folder: The folder of the checkpoint.
    """
    config, tokenizer = read_json(folder / CONFIG), read_json(folder / TOKENIZER_CONFIG)
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    if scaling.get("rope_type") == "yarn":  # modeling_rope_utils.py, _compute_yarn_parameters
        longest = config["max_position_embeddings"]
        original = scaling.get("original_max_position_embeddings", longest)
        factor = longest / original if "original_max_position_embeddings" in scaling else scaling["factor"]
        scaling = {**scaling, "factor": factor, "original_max_position_embeddings": original}
    return Reading(
        rope_theta=config.get("rope_theta", _DEFAULT_THETA),
        rotary_share=config.get("partial_rotary_factor", _rotary_share(config)),
        rope_scaling=scaling,
        dtype=str(config.get("torch_dtype", "float32")),
        stops=_sorted_ids(read_json(folder / GENERATION_CONFIG).get("eos_token_id")),
        tokenizer_class=_known(tokenizer.get("tokenizer_class"), is_known=lambda name: name == TOKENIZER_CLASS),
        special_tokens=tuple(map(str, tokenizer.get("additional_special_tokens") or ())),
    )


def read_as_transformers_5(folder: Path) -> Reading:
    """Read the files of a checkpoint as the transformers version installed here does.

    Args:
        folder: The folder of the checkpoint.
    """
    config: Any = AutoConfig.from_pretrained(folder)
    rope, tokenizer = dict(config.rope_parameters), read_json(folder / TOKENIZER_CONFIG)
    special = tokenizer.get("extra_special_tokens") or tokenizer.get("additional_special_tokens") or ()
    return Reading(
        rope_theta=rope.pop("rope_theta"),
        rotary_share=rope.pop("partial_rotary_factor", _rotary_share(read_json(folder / CONFIG))),
        rope_scaling=rope,
        dtype=str(config.dtype).removeprefix("torch."),
        stops=_sorted_ids(GenerationConfig.from_pretrained(folder).eos_token_id),
        tokenizer_class=_known(tokenizer.get("tokenizer_class"), is_known=lambda name: hasattr(transformers, name)),
        special_tokens=tuple(map(str, special)),
    )


def _rotary_share(config: dict[str, Any]) -> float:
    """The share of rotated dimensions that an architecture takes for a name that is missing."""
    return _ROTARY_SHARES.get(str(config.get("model_type")), 1.0)


def _drop_unused_sampling(config: Any) -> None:
    """Remove settings of a sampling that is off: transformers refuses to save them once anything else has changed."""
    if not config.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            if getattr(config, name, None) is not None:
                setattr(config, name, None)


def _portable_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """Name the class that both versions know, and give further special tokens their older name, which both read."""
    portable = {**config, "tokenizer_class": TOKENIZER_CLASS}
    portable.pop("auto_map", None)  # names code, which is neither copied nor run
    # transformers 4 wants a mapping here and fails on the list that transformers 5 writes
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    return portable


def _known(tokenizer_class: object, *, is_known: Callable[[str], bool]) -> str:
    return str(tokenizer_class) if is_known(str(tokenizer_class)) else f"{tokenizer_class}, which does not exist there"


def _sorted_ids(stated: int | list[int] | None) -> tuple[int, ...]:
    return tuple(sorted(stated if isinstance(stated, list) else [] if stated is None else [stated]))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
