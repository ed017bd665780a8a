"""Draws which part of the package imports which, as read from the code.

Run: python docs/draw_architecture.py      (needs the dependency groups docs and lint, for matplotlib and grimp)

The layers are those that import-linter enforces (``pyproject.toml``); the arrows are the actual imports, without those
that a longer path implies.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import grimp
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]
PANELS = {"glm4ft": "glm4ft", "glm4ft.testing": "inside glm4ft.testing"}
BOX_WIDTH, BOX_HEIGHT, ROW = 1.5, 0.56, 1.0
ACCENT, INK, PAPER = "#2b6cb0", "#1a202c", "#edf2f7"

Edges = Mapping[str, set[str]]


def layers_of(container: str) -> list[list[str]]:
    """The layers of a package, the lowest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    (contract,) = [c for c in settings["contracts"] if c.get("containers") == [container]]
    return [[part.strip() for part in layer.split("|")] for layer in reversed(contract["layers"])]


def edges_of(graph: grimp.ImportGraph, container: str) -> dict[str, set[str]]:
    """Parts of a package mapped to the parts that they import."""
    parts = {module.rpartition(".")[2] for module in graph.find_children(container)}
    edges: dict[str, set[str]] = {part: set() for part in parts}
    for part in parts:
        own = f"{container}.{part}"
        for module in {own, *graph.find_descendants(own)}:
            for imported in graph.find_modules_directly_imported_by(module):
                other = imported.removeprefix(f"{container}.").split(".")[0]
                if imported.startswith(f"{container}.") and other != part:
                    edges[part].add(other)
    return edges


def reduced(edges: Edges) -> dict[str, set[str]]:
    """The edges without those that a longer path implies."""

    def reachable(part: str) -> set[str]:
        return edges[part].union(*(reachable(other) for other in edges[part]))

    return {
        part: {other for other in others if not any(other in reachable(between) for between in others - {other})}
        for part, others in edges.items()
    }


def size_of(package: Path, part: str) -> str:
    """Number of modules and lines of a part."""
    path = package / part
    files = [file for file in path.rglob("*.py") if file.stat().st_size] if path.is_dir() else [path.with_suffix(".py")]
    num_lines = sum(len(file.read_text("utf-8").splitlines()) for file in files)
    return f"{len(files)} module{'s' * (len(files) != 1)}, {num_lines:,} lines"


def draw(axes: Axes, title: str, layers: Sequence[Sequence[str]], edges: Edges, package: Path) -> None:
    """Draw the layers from the bottom up and an arrow for each edge."""
    places = {
        part: ((column - (len(layer) - 1) / 2) * (BOX_WIDTH + 0.3), row * ROW)
        for row, layer in enumerate(layers)
        for column, part in enumerate(layer)
    }
    levels = {part: row for row, layer in enumerate(layers) for part in layer}
    for part, others in edges.items():
        for other in others:
            (x0, y0), (x1, y1) = places[part], places[other]
            bend = 0.0 if levels[part] - levels[other] == 1 else (0.35 if levels[part] % 2 else -0.35)
            axes.annotate(
                "",
                xy=(x1, y1 + BOX_HEIGHT / 2),
                xytext=(x0, y0 - BOX_HEIGHT / 2),
                arrowprops={
                    "arrowstyle": "-|>", "color": ACCENT, "lw": 1.1, "shrinkA": 0, "shrinkB": 0,
                    "connectionstyle": f"arc3,rad={bend}",
                },
                zorder=1,
            )  # fmt: skip
    for part, (x, y) in places.items():
        corner = (x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2)
        box = FancyBboxPatch(corner, BOX_WIDTH, BOX_HEIGHT, boxstyle="round,pad=0,rounding_size=0.08", zorder=2)
        box.set(facecolor=PAPER, edgecolor=ACCENT)
        axes.add_patch(box)
        axes.text(x, y + 0.09, part, ha="center", va="center", fontsize=10, color=INK, weight="bold", zorder=3)
        axes.text(x, y - 0.14, size_of(package, part), ha="center", va="center", fontsize=7, color=INK, zorder=3)
    axes.set(title=title, aspect="equal", xlim=(-2.9, 2.9), ylim=(-0.5, ROW * (len(layers) - 1) + 0.5))
    axes.axis("off")


def main() -> None:
    """Write ``docs/architecture.svg``."""
    plt.rcParams["svg.hashsalt"] = "glm4ft"
    graph = grimp.build_graph("glm4ft")
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 10.5), facecolor="white")
    for axes, (container, title) in zip(panels, PANELS.items(), strict=True):
        package = ROOT / container.replace(".", "/")
        draw(axes, title, layers_of(container), reduced(edges_of(graph, container)), package)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
