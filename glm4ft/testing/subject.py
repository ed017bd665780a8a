"""The interface of a subject: the members that a fine-tuning pipeline provides so that the checks can judge it.

A *subject* is any object with the members below; no type of glm4ft has to be imported to write one. Members are
detected by their presence: a check that needs one the subject lacks is skipped and counted. In ``MODULE:ATTR`` on the
command line, the attribute is a subject, or a function or class that is called with ``base_dir`` and returns one.

Required
    ``name``: the name that reports show.
    ``tokenizer``: a transformers tokenizer.
    ``encode(messages, tools=None)``: returns ``{"input_ids": [...], "labels": [...]}``, plain lists, labels unshifted,
    -100 where a token is not supervised. It may add ``"weights"``, the weight of each token in the loss, where these
    are not all 1: then the weighted sum over a step is divided by the sum of the weights, or by the number of
    supervised tokens.

Optional
    ``chat_format``: ``"glm-4-9b-chat"`` or ``"glm-4-0414"``; without it only rules that hold for every template apply,
    the mask is judged by what the template of the base writes around an answer, and no tool calls are asked for.
    ``stop_ids``: the ids that end generation.
    ``prompt(messages, tools=None)``: returns the ids that serving sends for the next assistant turn.
    ``collate(rows)``: returns a batch of tensors from rows that ``encode`` returned.
    ``build_model(base_dir, seed)``: returns the base with adapters attached, on its device.
    ``lora``: the requested adapters, by peft's names (``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``,
    ``exclude_modules``, ``modules_to_save``, ``bias``, ``init_lora_weights``, ``use_rslora``, ``use_dora``,
    ``rank_pattern``, ``alpha_pattern``, ``layers_to_transform``); without it they are read from the model's own
    configuration. Requested dropout is judged by its rate, and held off otherwise.
    ``autocast``: ``"bf16"`` or ``"fp16"`` if forward passes are to run under autocast, ``None`` if they are not to;
    without it either is accepted.
    ``learning_rate_factors``: parts of parameters' names mapped to the factor of the plan's learning rate that these
    parameters have, as ``{"lora_B": 16}`` for LoRA+; the others have the plan's. Without it all have the plan's.
    ``train(model, conversations, plan)``: trains in place. A conversation is ``{"messages": [...], "tools": [...]}``.
    ``plan["seed"]`` seeds all its random numbers: checks apply dropout with hooks, and two such runs must be the same.
    It may return its log: a mapping per optimizer step with any of ``step`` (from 1 or from 0), ``loss``, ``grad_norm``
    (before clipping), ``learning_rate``, and ``eval_loss`` where it evaluated. Figures that are not logged are not
    judged.
    ``distributed``: True if ``train`` can run as one of several processes in the environment that torchrun sets
    (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), where it joins the process group itself, on a CPU with gloo.
    ``micro_batch_size`` and ``accumulation`` are then those of one process.
    ``evaluate(model, conversations)``: returns the mean loss over all supervised tokens, or a mapping with any of
    ``loss`` and ``accuracy``, the share of supervised tokens to which the model gives the highest probability.
    ``generate(model, messages, tools, max_new_tokens)``: returns the new ids of the next assistant turn, decoded
    greedily by the subject's own inference path, including the stop id if one was generated.
    ``save(model, folder)``, ``load(base_dir, folder)``: write an adapter, and return the base with the saved adapter.
    ``merge(base_dir, folder, output)``: writes a merged checkpoint from a base and a saved adapter.
    ``expected_failures``: check names mapped to the reason why the pipeline is known to fail the check, with the
    evidence. If the check passes, that is a failure, so outdated entries are noticed.

A member that raises ``NotImplementedError`` states that the pipeline does not offer what was requested: a conversation
that it refuses or drops is left out, and a check that cannot run without it is skipped, with the error's message.

``base_dir`` is a Hugging Face model folder that the harness wrote, so the harness knows the base and can load it on
its own. ``plan`` is a plain mapping with the keys of :data:`PLAN`. Checkpoints are folders ``checkpoint-<step>`` below
its ``output_dir``. With ``eval_every``, the training conversations are evaluated, in batches of any kind. Forward
passes without gradient count as an evaluation, but for those that every step makes over its own batch.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm4ft.errors import ConfigError

REQUIRED = ("name", "tokenizer", "encode")
OPTIONAL = (
    "chat_format", "stop_ids", "prompt", "collate", "build_model", "lora", "autocast", "learning_rate_factors", "train",
    "distributed", "evaluate", "generate", "save", "load", "merge",
)  # fmt: skip

PLAN: Mapping[str, Any] = {
    "steps": 10,  # optimizer steps
    "micro_batch_size": 2,  # rows in one forward pass
    "accumulation": 1,  # forward passes per optimizer step
    "learning_rate": 5e-3,  # the peak
    "schedule": "constant",  # or "linear", "cosine"
    "warmup_steps": 0,
    "max_grad_norm": 1.0,  # 0: no clipping
    "weight_decay": 0.0,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "seed": 0,
    "packing": False,
    "output_dir": None,  # a folder the trainer may write to
    "gradient_checkpointing": False,  # recompute activations; True leaves the kind to the trainer
    "log_every": 1,  # steps between entries of the log
    "eval_every": 0,  # steps between evaluations; 0: none
    "save_every": 0,  # steps between checkpoints in output_dir; 0: none. All of them are kept.
    "resume_from": None,  # a checkpoint to continue from, in another output_dir
}
# How to install the libraries that this package's own subjects need but it does not depend on, by module.
PEER_ENVIRONMENTS = {
    "trl": "pip install 'glm4ft[peers]', or tox run -e trl",
    "llamafactory": "tox run -e llamafactory",
    "ms_swift": "tox run -e ms-swift",
}


def make_plan(**changes: Any) -> dict[str, Any]:
    """Make a plan: the standard one with some keys changed.

    Raises:
        ConfigError: If a plan has no such key.
    """
    for key in changes:
        if key not in PLAN:
            raise ConfigError("a plan has no such key", found=key, expected=", ".join(PLAN))
    return {**PLAN, **changes}


def load_subject(spec: str, base_dir: Path) -> Any:
    """Load a subject by name.

    Args:
        spec: The subject as ``MODULE:ATTR``; modules in the working directory are found too.
        base_dir: The model folder of the base, passed to the attribute if that is a function or class.
    Returns:
        The subject.
    Raises:
        ConfigError: If the attribute cannot be imported, or is not a subject.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError("not the name of a subject", where="--subject", found=spec, expected="MODULE:ATTR")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "the subject cannot be imported",
            where="--subject",
            found=f"{spec}: {error}",
            fix=_how_to_import(module_name),
        ) from error
    subject = found(str(base_dir)) if inspect.isroutine(found) or inspect.isclass(found) else found
    require_subject(subject, spec)
    return subject


def _how_to_import(module: str) -> str:
    package, _, name = module.rpartition(".")
    if package == "glm4ft.testing.subjects" and name in PEER_ENVIRONMENTS:
        return f"it needs an environment of its own: {PEER_ENVIRONMENTS[name]}"
    return f"run `python -c 'import {module}'` here to see the cause; modules in the working directory are found"


def require_subject(subject: Any, spec: str = "") -> None:
    """Refuse an object that lacks a required member of a subject.

    Raises:
        ConfigError: If a member is missing; the message names it.
    """
    missing = [name for name in REQUIRED if getattr(subject, name, None) is None]
    if missing:
        raise ConfigError(
            "not a subject",
            where=spec or type(subject).__name__,
            found=f"no {', '.join(missing)}",
            expected=f"at least {', '.join(REQUIRED)}",
            fix="see the documentation of glm4ft.testing.subject",
        )


def parts(subject: Any) -> frozenset[str]:
    """The names of the members that a subject has, required and optional; ``distributed`` only if it is true."""
    return frozenset(name for name in (*REQUIRED, *OPTIONAL) if getattr(subject, name, None) not in (None, False))
