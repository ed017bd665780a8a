"""Finds the parts of a causal language model that are recorded, by its structure and not by their names.

Hugging Face models state their embedding and their head; the final norm is the last norm outside of the layers, in the
smallest module that holds it and the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


class NotFound(ValueError):
    """The model has no decoder that can be recorded; the message says what it lacks."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a causal language model that every forward pass goes through.

    Args:
        body: The module from token ids to hidden states; it receives positions and mask.
        embedding: The module that looks token ids up.
        norm: The final norm, whose output the head multiplies.
        head: The output head, without an adapter around it.
    """

    body: nn.Module
    embedding: nn.Module
    norm: nn.Module
    head: nn.Module


def decoder_of(model: nn.Module, names: Sequence[str] = ()) -> Decoder:
    """Find the decoder of a model, wrapped or adapted or not.

    Args:
        model: The model.
        names: The names of embedding, final norm and head, for a model that does not state them; the ends suffice.
    Raises:
        NotFound: If a part is missing, or is there more than once.
    """
    if names:
        if len(names) != 3:
            raise NotFound(f"three names are needed, of embedding, final norm and head; there are {len(names)}")
        embedding, norm, head = (_named(model, name) for name in names)
        return Decoder(_smallest_with(model, embedding, norm), embedding, norm, _bare(head))
    found = list({id(parts.embedding): parts for parts in _stated(model)}.values())
    if len(found) != 1:
        raise NotFound(f"{type(model).__name__} has {len(found)} decoders that state an embedding and a head, not one")
    return found[0]


def _stated(model: nn.Module) -> Iterator[Decoder]:
    """The decoder of each module that states an embedding and a head; wrappers state those of what they wrap."""
    for module in model.modules():
        embedding, head = (_asked(module, f"get_{part}_embeddings") for part in ("input", "output"))
        if embedding is None or head is None or not {embedding, head} <= set(module.modules()):
            continue
        ancestors = [m for m in module.modules() if m is not embedding and embedding in set(m.modules())]
        for body in reversed([m for m in ancestors if head not in set(m.modules())]):  # the smallest first
            norm = _last_norm(body)
            if norm is not None:
                yield Decoder(body, _bare(embedding), norm, _bare(head))
                break


def _asked(module: nn.Module, method: str) -> nn.Module | None:
    if not hasattr(type(module), method):  # a wrapper passes on what it does not have itself
        return None
    try:
        found = getattr(module, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found if isinstance(found, nn.Module) else None


def _last_norm(body: nn.Module) -> nn.Module | None:
    """The last norm outside of lists of layers, in the order in which the modules were made."""
    last: nn.Module | None = None
    for child in map(_bare, body.children()):
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            continue
        found = child if "norm" in type(child).__name__.lower() and not list(child.children()) else _last_norm(child)
        last = found or last
    return last


def _bare(module: nn.Module) -> nn.Module:
    """The module without an adapter, or a trained copy, around it."""
    inner: Any = getattr(module, "base_layer", module)
    copies = getattr(inner, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict) and copies:
        inner = next(iter(copies.values()))
    if isinstance(inner, nn.Module):
        return inner
    return module


def _named(model: nn.Module, name: str) -> nn.Module:
    found: list[nn.Module] = [m for path, m in model.named_modules() if path == name or path.endswith(f".{name}")]
    if len(found) != 1:
        raise NotFound(f"{len(found)} modules are named {name}, not one")
    return found[0]


def _smallest_with(model: nn.Module, *parts: nn.Module) -> nn.Module:
    return [m for m in model.modules() if set(parts) <= set(m.modules())][-1]
