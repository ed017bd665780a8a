"""What a fine-tuning pipeline has to offer to be put on trial.

A *subject* is any object with the members below; no type of ours has to be imported to write one. Its parts are found
by presence: a check that needs a part the subject lacks is skipped and counted. Named ``MODULE:ATTR`` on the command
line, the attribute is a subject, or a function that is given ``base_dir`` and returns one.

Required
    ``name``: shown in reports.
    ``tokenizer``: a transformers tokenizer.
    ``encode(messages, tools=None)``: ``{"input_ids": [...], "labels": [...]}``, plain lists, labels unshifted, -100
    where a token is not supervised.

Optional
    ``chat_format``: ``"glm-4-9b-chat"`` or ``"glm-4-0414"``; without it only rules that hold for every template apply.
    ``stop_ids``: ids that end generation.
    ``prompt(messages, tools=None)``: ids that serving sends for the next assistant turn.
    ``collate(rows)``: a batch of tensors from what ``encode`` returned.
    ``build_model(base_dir, seed)``: the base with adapters attached, on its device.
    ``lora``: what the user asked for, by peft's names (``r``, ``lora_alpha``, ``target_modules``, ``use_rslora``,
    ``rank_pattern``, ``alpha_pattern``, ``layers_to_transform``); without it the model's own configuration is believed.
    ``train(model, conversations, plan)``: trains in place. A conversation is ``{"messages": [...], "tools": [...]}``.
    ``plan["seed"]`` seeds all its random numbers: checks of what a save, an evaluation or a resume changes put dropout
    on the embeddings from outside, and give it up where two such runs are not the same.
    It may return its log: a mapping per optimizer step with any of ``step``, ``loss``, ``grad_norm`` (before clipping),
    ``learning_rate``, and ``eval_loss`` where it evaluated. Logged figures are not judged without it.
    ``distributed``: True if ``train`` can run as one of several processes in the environment that torchrun sets
    (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), where it joins the process group by itself, on a CPU with gloo.
    ``micro_batch_size`` and ``accumulation`` are then those of one process.
    ``evaluate(model, conversations)``: the mean loss over all supervised tokens, or ``{"loss": ..., "accuracy": ...}``,
    the accuracy being the share of supervised tokens that are the likeliest.
    ``generate(model, messages, tools, max_new_tokens)``: the new ids of the next assistant turn, decoded greedily by
    the subject's own inference path; the stop id included if one came.
    ``save(model, folder)``, ``load(base_dir, folder)``: an adapter to disk and back.
    ``merge(base_dir, folder, output)``: a merged checkpoint from a base and a saved adapter.
    ``expected_failures``: check to the reason why the pipeline is known to fail it, with the evidence. An entry whose
    check passes is a failure, so that it goes when the fault does.

A member that raises ``NotImplementedError`` says that the pipeline does not offer what it was asked for: a conversation
that it refuses or drops is left out, and a check that cannot do without is skipped, with the error's message.

``base_dir`` is a Hugging Face model folder that the harness wrote, so the harness knows the base and can load it on
its own. ``plan`` is a plain mapping with the keys of :data:`PLAN`. Checkpoints are folders ``checkpoint-<step>`` below
its ``output_dir``. With ``eval_every`` it is the training conversations that are evaluated, in whatever batches.
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
    "chat_format", "stop_ids", "prompt", "collate", "build_model", "lora", "train", "distributed", "evaluate",
    "generate", "save", "load", "merge",
)  # fmt: skip

PLAN: Mapping[str, Any] = {
    "steps": 10,  # optimizer steps
    "micro_batch_size": 2,  # rows in one forward pass
    "accumulation": 1,  # forward passes per optimizer step
    "learning_rate": 5e-3,
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
# Adapters of this package for what it does not install.
PEER_ENVIRONMENTS = {
    "trl": "pip install 'glm4ft[peers]', or tox run -e trl",
    "llamafactory": "tox run -e llamafactory",
    "ms_swift": "tox run -e ms-swift",
}


def make_plan(**changes: Any) -> dict[str, Any]:
    """A plan with some keys changed.

    Raises:
        ConfigError: if a key is not one of a plan's.
    """
    for key in changes:
        if key not in PLAN:
            raise ConfigError("a plan has no such key", found=key, expected=", ".join(PLAN))
    return {**PLAN, **changes}


def load_subject(spec: str, base_dir: Path) -> Any:
    """Find a subject by name.

    Args:
        spec: ``MODULE:ATTR``; modules of the working directory are found too.
        base_dir: given to the attribute if it is a function.
    Returns:
        The subject.
    Raises:
        ConfigError: if there is no such attribute, or it is no subject.
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
    return f"see what `python -c 'import {module}'` says here; modules of the working directory are found"


def require_subject(subject: Any, spec: str = "") -> None:
    """Refuse an object that lacks a required member.

    Raises:
        ConfigError: naming what is missing.
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
    """The members a subject has, required and optional; ``distributed`` only counts if it is true."""
    return frozenset(name for name in (*REQUIRED, *OPTIONAL) if getattr(subject, name, None) not in (None, False))
