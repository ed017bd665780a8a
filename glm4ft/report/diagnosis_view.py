"""Shows a diagnosis in a terminal: the verdict, the figures that support it, and the most costly tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glm4ft.diagnosis.evidence import Evidence
from glm4ft.diagnosis.finding import CERTAIN, Finding
from glm4ft.diagnosis.rules import Diagnosis
from glm4ft.errors import harmless
from glm4ft.files import write_atomically
from glm4ft.report.plain_words import NOTHING_WRONG
from glm4ft.text.safe_text import Ruled, json_text, visible

_TOKENS = 10
_LEAST_LOSS = 0.05  # tokens with a smaller loss are not listed


def show_diagnosis(diagnosis: Diagnosis, *, json_file: str | None = None) -> None:
    """Print a diagnosis, or write it as JSON.

    Args:
        diagnosis: The diagnosis of a run.
        json_file: The file to write the diagnosis to as JSON; ``-`` writes only the JSON to stdout.
    """
    text = json_text(diagnosis.record()) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
        return
    if json_file:
        write_atomically(Path(json_file), text)
    console = Console(highlight=False)
    for finding in diagnosis.findings:
        print_finding(console, finding)
    for fact in facts(diagnosis.evidence):
        console.print(Text(harmless(fact), style="dim"), soft_wrap=True)
    if table := token_table(diagnosis.evidence):
        console.print(table)


def facts(evidence: Evidence) -> Iterator[str]:
    """Yield the general figures that are shown with every diagnosis, a line each."""
    first, gradients, adapters, floor = evidence.first_loss, evidence.gradients, evidence.adapters, evidence.floor
    began = "not logged" if first.logged is None else f"{first.logged:.4f}"
    base = "not measured" if first.base is None else f"{first.base:.4f}"
    uniform = "not known" if first.uniform is None else f"{first.uniform:.2f}"
    now = f"{evidence.loss:.4f} now" + ("" if evidence.is_measured else ", as logged")
    yield f"loss: {now}; first {began}, the base's own {base}, ln V {uniform}"
    if floor:
        yield f"floor: {floor.floor:.4f} = entropy {floor.entropy:.4f} + head {floor.head:.4f} (gap {floor.gap:.1g})"
    if gradients:
        yield (
            f"gradient norm: first {gradients.first:.3g}, median {gradients.median:.3g}, last {gradients.last:.3g}, "
            f"largest {gradients.largest:.3g} at step {gradients.largest_step}, largest jump "
            f"{gradients.spike_ratio:.1f}-fold, {len(gradients.non_finite_steps)} steps not finite"
        )
    if adapters:
        targets = ", ".join(f"{number} {name}" for name, number in adapters.targets.items())
        yield f"adapters: {adapters.num_adapters} ({targets}), {len(adapters.dead)} of them without effect"
    if evidence.round_trips:
        exact = sum(turn.exact for turn in evidence.round_trips)
        stopped = sum(turn.stop is not None for turn in evidence.round_trips)
        yield f"round trip: {exact} of {len(evidence.round_trips)} turns came back exactly, {stopped} stopped"
    if evidence.evaluations:
        best = min(evidence.evaluations, key=lambda e: math.inf if math.isnan(e.loss) else e.loss)
        last = evidence.evaluations[-1]
        yield f"evaluations: best {best.loss:.4f} at step {best.step}, last {last.loss:.4f} at step {last.step}"
    sources = evidence.sources
    for name, told in (("looked at", sources.looked_at), ("not looked at", (*sources.unread, *sources.unknown))):
        if told:
            yield f"{name}: {'; '.join(visible(text, newlines=False) for text in told)}"


def token_table(evidence: Evidence) -> Table | None:
    """Make a table of the supervised tokens with the largest losses; None if no loss is above the limit."""
    worst = [token for token in evidence.worst_tokens if token.loss > _LEAST_LOSS][:_TOKENS]
    if not worst:
        return None
    # a border at the left of every line, so that no line starts with text from the data
    table = Table("line", "at", "part", "token", "loss", "floor", "p", "model says", "share", box=box.SQUARE)
    for token in worst:
        floor = "" if token.floor is None else f"{token.floor:.2f}"
        place = (str(token.line), str(token.position), f"{token.role} {token.part}".strip())
        figures = (f"{token.loss:.2f}", floor, f"{token.probability:.2g}")
        table.add_row(*place, Text(token.text), *figures, Text(token.predicted), f"{token.share:.0%}")
    return table


def print_finding(console: Console, finding: Finding) -> None:
    """Print one finding, in green if it finds nothing wrong."""
    is_certain = finding.strength >= CERTAIN
    style = "green" if finding.verdict in NOTHING_WRONG else "bold red" if is_certain else "yellow"
    head = f"{finding.verdict} ({finding.stage})" if is_certain else f"perhaps: {finding.verdict} ({finding.stage})"
    console.print(Text(head, style=style))
    lines = [finding.text, *(f"- {fact}" for fact in finding.evidence), f"what to do: {finding.remedy}"]
    console.print(Ruled(Text("\n".join(visible(line, newlines=False) for line in lines))))
