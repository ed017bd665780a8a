"""Locates the files of a checkpoint and checks that they are complete.

No weights are read, so a missing shard or a truncated file is refused before anything else is done.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from glm4ft.errors import ModelError
from glm4ft.folders import is_utf8
from glm4ft.reading import decode_json, read_text

TINY = "tiny"  # names the built-in base, which has no files
TINY_GLM4_IDS = "tiny-glm4-ids"  # names the same base with the ids of GLM-4's own vocabulary, for trials
HUB_ID = r"\w[\w.-]*(/\w[\w.-]*)?"  # one separator at most, and no leading dot, tilde or separator
SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def find_checkpoint(model: str, *, weights: bool = False) -> Path:
    """Return the local folder of a checkpoint; a hub checkpoint is downloaded first.

    Args:
        model: A local folder or a hub id.
        weights: Whether to download the weights too, not only the small text files.

    Returns:
        The folder.

    Raises:
        ModelError: If there is no such folder, or it cannot be downloaded from the hub.
    """
    path = Path(os.path.expanduser(model))
    if not is_utf8(path):
        raise ModelError("the name of the folder is not UTF-8", where="--model", found=model, fix="rename the folder")
    if os.path.isdir(path):
        return path.absolute()  # so that ./tiny is not mistaken for the built-in base
    if os.path.exists(path) or not re.fullmatch(HUB_ID, model):
        raise ModelError(
            "there is no such folder",
            where="--model",
            found=f"{model}, a file" if os.path.exists(path) else model,
            expected=f"a checkpoint's folder, a hub id such as zai-org/glm-4-9b-chat-hf, or {TINY!r}",
        )
    patterns = ["*.json", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except Exception as error:  # what it raises depends on the HTTP library below it
        raise ModelError(
            "no local folder has this name, and no checkpoint of this name can be downloaded from the hub",
            where="--model",
            found=f"{model}: {one_line(error)}",
            fix="check the spelling and the network; a gated checkpoint needs `hf auth login`",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file of a checkpoint or adapter.

    Raises:
        ModelError: If there is no file, or it does not hold a JSON object.
    """
    if not os.path.lexists(path):
        raise ModelError(f"the folder has no {path.name}", where=str(path.parent))
    text = read_text(path, ModelError, "the file is not JSON")
    try:
        content = decode_json(text)
    except ValueError as error:
        raise ModelError("the file is not JSON", where=str(path), found=one_line(error)) from error
    if not isinstance(content, dict):
        raise ModelError("the file holds no JSON object", where=str(path), found=type(content).__name__)
    return content


def require_whole_file(path: Path) -> list[str]:
    """Check that a safetensors file has the length that its header states; only the header is read.

    Args:
        path: The file.

    Returns:
        The names of its tensors.

    Raises:
        ModelError: If the file is truncated or not a safetensors file.
    """
    if not os.path.isfile(path):
        raise ModelError("this is not a file of weights", where=str(path), found="no such file, a folder or a device")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            is_pointer = raw.read(40).startswith(b"version https://git-lfs")
        raise ModelError(
            f"a file of weights is {'a git-lfs pointer' if is_pointer else 'truncated or corrupt'}",
            where=str(path),
            found=f"{path.stat().st_size:,} bytes; {one_line(error)}",
            expected="a safetensors file as long as its header says",
            fix="run `git lfs pull` in the folder" if is_pointer else "download or copy the file again",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a checkpoint's weights.

    Args:
        folder: The folder of the checkpoint.

    Returns:
        The single file, or all shards that the index names.

    Raises:
        ModelError: If a file is missing, or there are pickle files only.
    """
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX).exists():
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        raise ModelError(
            "the weights are in pickle files, which can run code" if pickles else "the folder has no weights",
            where=str(folder),
            found=listed(pickles),
            expected=f"safetensors: {SINGLE_FILE}, or {INDEX} and its shards",
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("the index of the shards is malformed", where=str(folder / INDEX), expected="a weight_map")
    names = sorted(set(map(str, weight_map.values())))
    missing = [name for name in names if "/" in name or not os.path.isfile(folder / name)]
    if missing:
        found = f"{len(missing)} of {len(names)} shards missing: {listed(missing)}"
        raise ModelError("the checkpoint is incomplete", where=str(folder), found=found, fix="download them again")
    return [folder / name for name in names]


def one_line(error: BaseException) -> str:
    """Format an error on one line of at most 300 characters, for the ``found`` of an ``InputError``."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def listed(names: Iterable[str]) -> str:
    """Format the first three names, and the number of further ones."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
