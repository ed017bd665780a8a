"""The output head and final norm of a base, read in pieces by memory map without the rest of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from glm4ft.data.format_check import detect_format
from glm4ft.data.turn_format import TEMPLATE, FormatName
from glm4ft.errors import ModelError
from glm4ft.model.architectures import is_llama_like
from glm4ft.model.base_model import load_tokenizer
from glm4ft.model.checkpoint import INDEX, SINGLE_FILE, TINY, find_checkpoint, listed, one_line, read_json
from glm4ft.model.tiny import tiny_model

HEAD, NORM, EMBEDDINGS = "lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"
_CHUNK_BYTES = 2**23  # size of the fp32 rows in memory at once
_SHOWN_ROWS = 10


@dataclass(frozen=True)
class Head:
    """A frozen head behind a frozen final norm.

    Args:
        weight: The V x D weight of the head; of a file a memory map, of which only what is used is read.
        norm_D: The weight of the norm, float64.
        num_rows: The number of rows V.
        dtype: The dtype of the run, to which rows stored in a finer dtype are rounded; None leaves them as stored.
        source: The name of the tensor and where it is from.
        is_tied: Whether the head is the matrix of the embeddings.
    """

    weight: torch.Tensor
    norm_D: torch.Tensor
    num_rows: int
    dtype: torch.dtype | None = None
    source: str = HEAD
    is_tied: bool = False

    @property
    def width(self) -> int:
        """The hidden size D."""
        return len(self.norm_D)

    @property
    def radius(self) -> float:
        """The largest length of a normed hidden state before the norm weight is applied, ``sqrt(D)``."""
        return float(self.width**0.5)

    @property
    def chunk_rows(self) -> int:
        """The largest number of rows of a chunk."""
        return max(1, _CHUNK_BYTES // (4 * self.width))

    def rows(self, ids: list[int]) -> torch.Tensor:
        """Return some rows times the norm weight, float64, len(ids) x D.

        Raises:
            ModelError: If one of the rows has entries that are NaN or infinite; the message names all such rows.
        """
        rows = self._rounded(self.weight[ids]).double() * self.norm_D
        if not rows.isfinite().all():
            raise self._not_finite()
        return rows

    def chunks(self, task: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Iterate over all rows in chunks; the norm weight is not applied, since that would take most of the time.

        Args:
            task: The label of the progress bar, which appears if the pass takes long.
        Yields:
            The id of the chunk's first row, and the chunk in fp32, which the next one overwrites.
        """
        # one small buffer: fresh memory for every chunk was measured to take longer than the arithmetic on it
        size = self.chunk_rows
        buffer = torch.empty(size, self.width)
        starts = range(0, self.num_rows, size)
        for start in tqdm(starts, desc=task, unit=" chunks", delay=2, disable=None, leave=False):
            rows = self._rounded(self.weight[start : min(start + size, self.num_rows)])
            yield start, buffer[: len(rows)].copy_(rows)

    def lengths(self, rows_CD: torch.Tensor) -> torch.Tensor:
        """Return the Euclidean norm of each row of a chunk, norm weight applied.

        Raises:
            ModelError: If a row has entries that are NaN, infinite, or too large for fp32; the message names all such
                rows.
        """
        length_C: torch.Tensor = torch.linalg.vector_norm(rows_CD * self.norm_D.float(), dim=1)
        if not length_C.isfinite().all():
            raise self._not_finite()
        return length_C

    def _not_finite(self) -> ModelError:
        """Describe the rows from which no bound can be computed."""
        bad: list[int] = []
        for start, rows_CD in self.chunks("rows that are not finite"):
            bad += (start + (~(rows_CD * self.norm_D.float()).norm(dim=1).isfinite()).nonzero()[:, 0]).tolist()
        more = f" and {len(bad) - _SHOWN_ROWS:,} more" if len(bad) > _SHOWN_ROWS else ""
        return ModelError(
            "the head has entries that are NaN or infinite, so nothing bounds a loss under it",
            where=self.source,
            found=f"{len(bad):,} of {self.num_rows:,} rows: {', '.join(map(str, bad[:_SHOWN_ROWS]))}{more}",
            expected="finite numbers",
            fix="download or convert the checkpoint again; if a run of yours saved it, its weights are broken",
        )

    def in_dtype(self, dtype: torch.dtype) -> Head:
        """Return the head as it is in a run of the given dtype."""
        return replace(self, norm_D=self.norm_D.to(dtype).double(), dtype=dtype)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.dtype is None else rows.to(self.dtype)


def head_of(model: PreTrainedModel) -> Head:
    """Return the head of a model in memory; adapters on the head are not included.

    Raises:
        ModelError: If the head is quantised, or the norm is not finite.
    """
    base: Any = model
    weight = base.get_output_embeddings().weight.detach()
    source = f"{HEAD} of {base.name_or_path or type(base).__name__}"
    if not weight.is_floating_point() or weight.dim() != 2 or len(weight) != base.get_output_embeddings().out_features:
        raise _quantised(HEAD, source, str(weight.dtype).removeprefix("torch."))
    is_tied = weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    norm_D = _finite_norm(base.model.norm.weight.detach().cpu().double(), source.replace(HEAD, NORM))
    return Head(weight.cpu(), norm_D, len(weight), source=source, is_tied=is_tied)


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
        ModelError: If the tensors are missing, are quantised, do not fit each other, or the norm is not finite.
    """
    if model == TINY:
        return head_of(tiny_model())
    folder = find_checkpoint(model)
    config = read_json(folder / "config.json")
    shards = _weight_map(folder, model)
    is_tied = HEAD not in shards and _ties_embeddings(config)
    name = EMBEDDINGS if is_tied else HEAD
    if not is_tied and HEAD not in shards and (packed := [key for key in shards if key.startswith("lm_head.")]):
        raise _quantised(HEAD, str(folder), listed(packed))
    weight, path = _tensor(model, folder, shards, name)
    norm, norm_path = _tensor(model, folder, shards, NORM)
    if weight.dim() != 2 or norm.shape != weight.shape[1:]:
        found = f"{name} {list(weight.shape)}, {NORM} {list(norm.shape)}"
        raise ModelError("head and final norm do not fit each other", where=str(folder), found=found)
    norm_D = _finite_norm(norm.double(), f"{norm_path}: {NORM}")
    return Head(weight, norm_D, len(weight), source=f"{path}: {name}", is_tied=is_tied)


def _ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the head is the matrix of the embeddings; what config.json leaves out is the architecture's default."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    name = str(config.get("model_type"))
    return name in CONFIG_MAPPING and bool(getattr(CONFIG_MAPPING[name](), "tie_word_embeddings", False))


def _finite_norm(norm_D: torch.Tensor, source: str) -> torch.Tensor:
    bad = (~norm_D.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        found = f"{len(bad):,} of {len(norm_D):,} entries, the first at {bad[0]}"
        raise ModelError("the final norm has entries that are NaN or infinite", where=source, found=found)
    return norm_D


def _quantised(name: str, where: str, found: str) -> ModelError:
    fix = "give the base that this checkpoint was quantised from"
    return ModelError(
        f"{name} is quantised, and a floor is certified for plain numbers", where=where, found=found, fix=fix
    )


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
    if is_llama_like(model):
        return TEMPLATE
    stated = read_json(find_checkpoint(model) / "config.json").get("architectures")
    return detect_format(stated if isinstance(stated, list) else [], load_tokenizer(model), where=model)


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


def _tensor(model: str, folder: Path, shards: dict[str, str], name: str) -> tuple[torch.Tensor, Path]:
    """Map a tensor into memory, so that only what is used of it is read; return it with its file."""
    if name not in shards:
        found = listed(shards) if shards else ""
        raise ModelError(f"the checkpoint has no {name}", where=str(folder), found=found)
    path = _file(model, folder, shards[name])
    with _opened(path) as file:
        try:
            stored_as = file.get_slice(name).get_dtype()
            tensor: torch.Tensor = file.get_tensor(name)
        except Exception as error:  # safetensors raises its own error, which names no file
            raise ModelError(f"the shard has no {name}", where=str(path), found=one_line(error)) from error
    if stored_as not in ("BF16", "F16", "F32", "F64"):
        raise _quantised(name, str(path), stored_as)
    return tensor, path


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
