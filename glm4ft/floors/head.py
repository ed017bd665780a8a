"""The output head and final norm of a base, read in pieces by memory map without the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

from glm4ft.data.chat_format import FormatName, detect_format
from glm4ft.errors import ModelError
from glm4ft.model.base_model import load_tokenizer
from glm4ft.model.checkpoint import INDEX, SINGLE_FILE, TINY, find_checkpoint, listed, one_line, read_json
from glm4ft.model.tiny import tiny_model

HEAD, NORM, EMBEDDINGS = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
_CHUNK_BYTES = 2**27  # size of the fp32 rows in memory at once


@dataclass(frozen=True)
class Head:
    """A frozen head behind a frozen final norm.

    Args:
        weight: The V x D weight of the head, a tensor or a slice of a safetensors file: ``weight[a:b]`` gives rows.
        norm_D: The weight of the norm, float64.
        num_rows: The number of rows V.
        dtype: The dtype of the run, to which rows stored in a finer dtype are rounded; None leaves them as stored.
    """

    weight: Any
    norm_D: torch.Tensor
    num_rows: int
    dtype: torch.dtype | None = None

    @property
    def width(self) -> int:
        """The hidden size D."""
        return len(self.norm_D)

    @property
    def radius(self) -> float:
        """The largest length of a normed hidden state before the norm weight is applied, ``sqrt(D)``."""
        return float(self.width**0.5)

    def rows(self, ids: list[int]) -> torch.Tensor:
        """Return some rows times the norm weight, float64, len(ids) x D."""
        return self._rounded(torch.cat([self.weight[i : i + 1] for i in ids])).double() * self.norm_D

    def chunks(self, task: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Iterate over all rows times the norm weight, in chunks.

        Args:
            task: The label of the progress bar, which appears if the pass takes long.
        Yields:
            The id of the chunk's first row, and the chunk in fp32.
        """
        size = max(1, _CHUNK_BYTES // (4 * self.width))
        norm_D = self.norm_D.float()
        starts = range(0, self.num_rows, size)
        for start in tqdm(starts, desc=task, unit=" pieces of the head", delay=2, disable=None, leave=False):
            yield start, self._rounded(self.weight[start : min(start + size, self.num_rows)]).float() * norm_D

    def in_dtype(self, dtype: torch.dtype) -> Head:
        """Return the head as it is in a run of the given dtype."""
        return replace(self, norm_D=self.norm_D.to(dtype).double(), dtype=dtype)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.dtype is None else rows.to(self.dtype)


def head_of(model: PreTrainedModel) -> Head:
    """Return the head of a model in memory; adapters on the head are not included."""
    base: Any = model
    weight = base.get_output_embeddings().weight.detach().cpu()
    return Head(weight, base.model.norm.weight.detach().cpu().double(), len(weight))


def frozen_head(model: Any) -> Head | None:
    """Return the head of a model if the run does not train it.

    Args:
        model: A model of transformers, with or without adapters of peft, about to be trained or read from the disk.
    Returns:
        The head; None if head or final norm are trained, have been trained, or are not found.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules: list[Any] = [base.get_output_embeddings(), getattr(getattr(base, "model", None), "norm", None)]
    if None in modules or any(map(_is_trained, modules)):
        return None
    return head_of(base)


def _is_trained(module: Any) -> bool:
    # Parameters read from the disk require no gradient. But peft wraps each module that it trains in a module of its
    # own: an adapter, or a copy for modules_to_save.
    return any(parameter.requires_grad or "." in name for name, parameter in module.named_parameters())


def read_head(model: str) -> Head:
    """Read only the head and final norm of a base; a 4-bit base works too if its head is stored in bf16.

    Args:
        model: The base: ``tiny`` for the built-in one, a local folder, or a hub id.
    Returns:
        The head.
    Raises:
        ModelError: If the tensors are missing, are quantised, or do not fit each other.
    """
    if model == TINY:
        return head_of(tiny_model())
    folder = find_checkpoint(model)
    config = read_json(folder / "config.json")
    shards = _weight_map(folder, model)
    name = EMBEDDINGS if config.get("tie_word_embeddings") and HEAD not in shards else HEAD
    weight, shape = _tensor(model, folder, shards, name)
    norm, norm_shape = _tensor(model, folder, shards, NORM)
    if len(shape) != 2 or norm_shape != [shape[1]]:
        found = f"{name} {shape}, {NORM} {norm_shape}"
        raise ModelError("head and final norm do not fit each other", where=str(folder), found=found)
    return Head(weight, norm[:].double(), shape[0])


def format_of(model: str) -> FormatName | None:
    """Detect the chat format of a base from its config and template.

    Args:
        model: The base: ``tiny`` for the built-in one, a local folder, or a hub id.
    Returns:
        The name of the format; None for the built-in base, which has no files.
    Raises:
        ModelError: If the format is not supported.
    """
    if model == TINY:
        return None
    config = read_json(find_checkpoint(model) / "config.json")
    stated = config.get("architectures")
    return detect_format(stated if isinstance(stated, list) else [], load_tokenizer(model).chat_template, where=model)


def _weight_map(folder: Path, model: str) -> dict[str, str]:
    """Map the names of the tensors to the names of their files; a single file before an index, as transformers does."""
    if (folder / INDEX).exists() and not (folder / SINGLE_FILE).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError("the index of the shards is malformed", where=str(folder / INDEX), expected="a weight_map")
        return {str(name): str(file) for name, file in weight_map.items()}
    path = _file(model, folder, SINGLE_FILE)
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), SINGLE_FILE)


def _tensor(model: str, folder: Path, shards: dict[str, str], name: str) -> tuple[Any, list[int]]:
    """Open a tensor lazily, so that only its slices are read; return it with its shape."""
    if name not in shards:
        found = listed(shards) if shards else ""
        raise ModelError(f"the checkpoint has no {name}", where=str(folder), found=found)
    path = _file(model, folder, shards[name])
    with _opened(path) as file:
        try:
            tensor = file.get_slice(name)
        except Exception as error:  # safetensors raises its own error, which names no file
            raise ModelError(f"the shard has no {name}", where=str(path), found=one_line(error)) from error
    if tensor.get_dtype() not in ("BF16", "F16", "F32", "F64"):
        fix = "give the base that this checkpoint was quantised from"
        raise ModelError(f"{name} is quantised", where=str(path), found=tensor.get_dtype(), fix=fix)
    return tensor, list(tensor.get_shape())


def _file(model: str, folder: Path, name: str) -> Path:
    """Return the path of a file of the checkpoint; only the needed shards of a hub checkpoint are downloaded."""
    path = folder / name
    if path.is_file():
        return path
    if Path(model).expanduser().is_dir() or "/" in name or "\\" in name:
        raise ModelError("the folder has no such file of weights", where=str(folder), found=f"no {name}")
    try:
        return Path(hf_hub_download(model, name))
    except Exception as error:  # what it raises depends on the HTTP library below it
        raise ModelError("the file cannot be downloaded", where=model, found=f"{name}: {one_line(error)}") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise ModelError("a file of weights is truncated or corrupt", where=str(path), found=one_line(error)) from error
