"""The geometries of the published GLM-4 checkpoints, and their numbers of parameters; needs no torch."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4ft.errors import ConfigError

RANDOM_PREFIX = "random:"

_NINE_B = {
    "vocab_size": 151_552,
    "hidden_size": 4096,
    "intermediate_size": 13_696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
}
_THIRTY_TWO_B = {
    **_NINE_B,
    "hidden_size": 6144,
    "intermediate_size": 23_040,
    "num_hidden_layers": 61,
    "num_attention_heads": 48,
    "attention_bias": False,
}
_LONG = {"max_position_embeddings": 131_072, "rms_norm_eps": 1.5625e-7, "rope_theta": 5e6}
_0414 = {"max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "rope_theta": 1e4}

# Values of config.json, in transformers' names. Sources: the config.json of the checkpoints' own repositories and of
# their published fine-tunes, the defaults of transformers' GlmConfig and Glm4Config; the parameter counts that follow
# from them, 9.400 and 32.57 billion, are those of the model cards.
GEOMETRIES: Mapping[str, Mapping[str, Any]] = {
    "glm-4-9b": {"architecture": "GlmForCausalLM", **_NINE_B, **_LONG},
    "glm-4-9b-0414": {"architecture": "Glm4ForCausalLM", **_NINE_B, **_0414},
    "glm-4-32b-0414": {"architecture": "Glm4ForCausalLM", **_THIRTY_TWO_B, **_0414},
}


def geometry(spec: str) -> dict[str, Any]:
    """The geometry that ``random:NAME`` names, as values of ``config.json``.

    Raises:
        ConfigError: If there is no geometry of this name.
    """
    name = spec.removeprefix(RANDOM_PREFIX)
    if name not in GEOMETRIES:
        near = difflib.get_close_matches(name, GEOMETRIES, n=1)
        legal = [RANDOM_PREFIX + known for known in near or GEOMETRIES]
        raise ConfigError("there is no such geometry", where="--glm4ft-model", found=spec, expected=" or ".join(legal))
    return dict(GEOMETRIES[name])


def num_parameters(config: Mapping[str, Any]) -> int:
    """The number of parameters of a dense GLM-4 with untied embeddings.

    Args:
        config: The values of ``config.json``, with the model class as ``architecture``.
    """
    hidden, heads, head_dim = (config[key] for key in ("hidden_size", "num_attention_heads", "head_dim"))
    query, key_value = heads * head_dim, config["num_key_value_heads"] * head_dim
    biases = (query + 2 * key_value) if config["attention_bias"] else 0
    attention = hidden * (query + 2 * key_value) + query * hidden + biases
    norms = hidden * (2 if config["architecture"] == "GlmForCausalLM" else 4)
    layer = attention + 3 * hidden * config["intermediate_size"] + norms
    return int(2 * config["vocab_size"] * hidden + config["num_hidden_layers"] * layer + hidden)


def size_of(spec: str) -> float:
    """The number of parameters of a base, as far as it is known without a download.

    Args:
        spec: The base, as for ``--glm4ft-model``: ``tiny``, ``tiny:FORMAT``, ``random:NAME``, a folder or a hub id.
    Returns:
        The number; 0 for ``tiny`` and its formats, infinite for a hub id and for a folder whose configuration does not
        determine it.
    """
    if spec.partition(":")[0] == "tiny":
        return 0
    if spec.startswith(RANDOM_PREFIX):
        return num_parameters(geometry(spec))
    try:
        config = json.loads((Path(spec).expanduser() / "config.json").read_text("utf-8"))
        return num_parameters({**config, "architecture": config["architectures"][0]})
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return math.inf
