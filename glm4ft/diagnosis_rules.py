"""The rules of a diagnosis: each looks at the evidence for one thing that can be wrong, in a fixed order."""

from __future__ import annotations

from glm4ft.diagnosis import Finding, Rule
from glm4ft.evidence import Evidence

LEARNT_LOSS = 0.01  # of the overfit test: what is below it has been learnt by heart


def header_supervised(evidence: Evidence) -> Finding | None:
    """The assistant's header is a target, though inference gives it."""
    headers = [token for token in evidence.supervised if token.role == "assistant" and token.part == "header"]
    if not headers:
        return None
    share = sum(token.share for token in headers)
    return Finding(
        verdict="header-supervised",
        stage="rows",
        text=f"{headers[0].text} is trained as a target, though the prompt always gives it at inference.",
        evidence=(f"{len(headers)} supervised headers hold {share:.0%} of the loss",),
        remedy="start the supervised span after the header: glm4ft inspect shows the mask",
    )


def nothing_found(evidence: Evidence) -> Finding | None:
    """What is left when no rule before it found anything."""
    loss = evidence.loss
    if loss < LEARNT_LOSS:
        return Finding("learnt", "outcome", f"Nothing is wrong: the loss is {loss:.4f}.", (), "nothing to do")
    return Finding("unexplained", "outcome", f"The loss is {loss:.4f}, and no rule says why.", (), "look at the tokens")


RULES: tuple[Rule, ...] = (header_supervised, nothing_found)
