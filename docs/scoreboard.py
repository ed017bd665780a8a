"""Writes docs/scoreboard.md: every peer judged by every check, in the tox environment that it needs.

Run: python docs/scoreboard.py [NAME ...]      (needs tox; without names it runs all peers: 13 minutes on two cores)

Results are kept in docs/scoreboard.json, so that a single peer can be run again. The exit status is 1 if a peer fails a
check that it is not known to fail, or passes one that it is known to fail.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from glm4ft.files import write_atomically
from glm4ft.model.checkpoint import TINY, TINY_GLM4_IDS
from glm4ft.testing.subjects import known_failures, known_failures_reasoning
from glm4ft.testing.subjects.known_failures import KnownFailure
from glm4ft.testing.trial.stages import STAGES

DOCS = Path(__file__).parent
SUBJECTS = "glm4ft.testing.subjects"
SIGNS = {"fault": "✗", "alternative": "≈", "unexpected": "‼", "passed": "✓", "skipped": "·"}
SHOWN_TOKENS = 30


@dataclass(frozen=True)
class Peer:
    """A pipeline on the scoreboard.

    Args:
        name: The name that the table shows.
        subject: ``MODULE:ATTR`` of the subject.
        env: The tox environment in which it runs.
        packages: The packages whose versions are stated.
        failures: The known failures.
        about: The configuration that is judged, in a sentence.
        base: The base, as ``glm4ft check --model`` takes it.
        stages: The stages that are judged.
    """

    name: str
    subject: str
    env: str
    packages: tuple[str, ...]
    failures: tuple[KnownFailure, ...] = ()
    about: str = ""
    base: str = TINY
    stages: Sequence[str] = STAGES

    @property
    def command(self) -> str:
        """The command that judges it."""
        return f"glm4ft check --subject {self.subject}" + f" --model {self.base}" * (self.base != TINY)


HF = ("transformers", "peft", "torch")
ROWS_OF_GLM_45 = ("tiny:glm-4.5", ("rows",))
PEERS = (
    Peer("glm4ft", f"{SUBJECTS}.own:Subject", "trl", ("glm4ft", *HF), about="This project's own trainer."),
    Peer(
        "transformers.Trainer",
        f"{SUBJECTS}.transformers_trainer:Subject",
        "trl",
        HF,
        known_failures.TRANSFORMERS,
        "The trainer alone: its rows are encoded by glm4ft, since it expects encoded rows.",
    ),
    Peer(
        "TRL",
        f"{SUBJECTS}.trl:Subject",
        "trl",
        ("trl", *HF),
        known_failures.TRL,
        "`SFTTrainer` with conversational prompt-completion data, the documented way for a model whose template it "
        "does not know. `max_length` is 32,768: the default of 1,024 cuts without a warning.",
    ),
    Peer(
        "LLaMA-Factory",
        f"{SUBJECTS}.llamafactory:Subject",
        "llamafactory",
        ("llamafactory", *HF, "trl"),
        known_failures.LLAMA_FACTORY,
        "`stage: sft`, `template: glm4`, `lora_target: all`; `neat_packing` where it packs. `cutoff_len` is 32,768 "
        "where it does not: the default of 2,048 cuts without a warning. `use_reentrant_gc` is off, since the suite "
        "can't follow gradients through reentrant checkpointing. torchvision is not installed, and torchaudio's "
        "compiled extension, which needs CUDA, is removed; text uses neither. Evaluation is not judged: the subject "
        "has none.",
    ),
    Peer(
        "ms-swift",
        f"{SUBJECTS}.ms_swift:Subject",
        "ms-swift",
        ("ms-swift", *HF),
        known_failures.MS_SWIFT,
        "`swift sft` with model type and template `glm4`, `target_modules: all-linear`. `lora_dropout` is 0, as a "
        "replay requires, and `data_seed` is the seed. Packing is not judged, since it needs flash attention and so a "
        "CUDA GPU, nor is evaluation: the subject has none.",
    ),
    Peer(
        "official script",
        f"{SUBJECTS}.official_script:Subject",
        "trl",
        HF,
        known_failures.OFFICIAL_SCRIPT,
        "The label rules of `finetune/finetune.py` (THUDM/GLM-4 at 9c0e421), restated for `combine: false`; not the "
        "script itself. Trained by plain `transformers.Trainer`.",
    ),
    Peer(
        "official script, combine",
        f"{SUBJECTS}.official_script:Combined",
        "trl",
        HF,
        known_failures.OFFICIAL_SCRIPT_COMBINED,
        "The same with `combine: true`.",
    ),
    *(
        Peer(
            f"glm4ft, {name}",
            f"{SUBJECTS}.own:Subject",
            "trl",
            ("glm4ft", *HF),
            about="This project's own trainer, on the built-in base of that format" + about,
            base=base,
        )
        for name, base, about in (
            ("GLM-Z1", "tiny:glm-z1-0414", ", which always thinks."),
            ("GLM-4.5", "tiny:glm-4.5", ", which has experts."),
            ("GLM-4.7", "tiny:glm-4.7", ", which has experts and the attention of GLM-4.7-Flash."),
        )
    ),
    Peer(
        "TRL, GLM-4.5",
        f"{SUBJECTS}.trl_reasoning:Subject",
        "trl",
        ("trl", *HF),
        known_failures_reasoning.TRL_REASONING,
        "`SFTTrainer` with `assistant_only_loss: true`: TRL recognises the template of GLM-4.5, as it has it, and "
        "replaces it with a training template of its own, whose marked parts are trained.",
        *ROWS_OF_GLM_45,
    ),
    Peer(
        "LLaMA-Factory, GLM-4.5",
        f"{SUBJECTS}.llamafactory_reasoning:Subject",
        "llamafactory",
        ("llamafactory", *HF, "trl"),
        known_failures_reasoning.LLAMA_FACTORY_REASONING,
        "`template: glm4_moe` with its default `enable_thinking: true`; reasoning stands in tags before the answer. A "
        "text and calls in one turn cannot be written in its format, so that such turns are not judged.",
        *ROWS_OF_GLM_45,
    ),
    Peer(
        "ms-swift, GLM-4.5",
        f"{SUBJECTS}.ms_swift_reasoning:Subject",
        "ms-swift",
        ("ms-swift", *HF),
        known_failures_reasoning.MS_SWIFT_REASONING,
        "Model type `glm4_moe`, template `glm4_5`; reasoning stands in tags before the answer.",
        *ROWS_OF_GLM_45,
    ),
    Peer(
        "renderers, GLM-4.5",
        f"{SUBJECTS}.renderers_reasoning:Subject",
        "renderers",
        ("renderers", "transformers"),
        known_failures_reasoning.RENDERERS_REASONING,
        "PrimeIntellect's `build_training_sample` with `ensure_final_stop=True`, which its documentation has for GLM.",
        *ROWS_OF_GLM_45,
    ),
    Peer(
        "NeMo AutoModel, GLM-4.5",
        f"{SUBJECTS}.nemo_automodel_reasoning:Subject",
        "nemo-automodel",
        ("nemo-automodel", "transformers"),
        known_failures_reasoning.NEMO_AUTOMODEL_REASONING,
        "`ChatDataset` with `mask_generation_prompt: true`. It refuses conversations whose earlier turns are rendered "
        "without their reasoning. Calls are not judged: it makes a string of their arguments, which the checkpoint's "
        "template cannot render.",
        *ROWS_OF_GLM_45,
    ),
    Peer(
        "official script, as a trainer",
        f"{SUBJECTS}.official_trainer:Subject",
        "trl",
        HF,
        known_failures.OFFICIAL_TRAINER,
        "The script's rows, collator, trainer and evaluation, restated for `combine: false`, on the built-in base with "
        "the ids of GLM-4's own vocabulary, since the script has ids written into its code. `max_input_length` and "
        "`max_output_length` are 16,384: those of its configurations, 512, cut without a warning.",
        TINY_GLM4_IDS,
    ),
)
INTRODUCTION = f"""# Scoreboard

Trainers by others, and ours for comparison, judged by `glm4ft check` on the built-in base, on a CPU, in fp32. Each runs
with the library versions that it requires, with its own encoding, collation and training code, in the configuration
that it documents for dense GLM-4; the peer's section states every departure from a default. No code of a peer is
patched. `python docs/scoreboard.py` writes this page. Of those that know GLM-4.5 the rows are judged too, on the
built-in base of that format, whose turns have reasoning and parallel calls.

{SIGNS["passed"]} all checks of the stage passed · {SIGNS["fault"]} a fault, with the number of checks that see it ·
{SIGNS["alternative"]} a convention that differs from the suite's and works · {SIGNS["skipped"]} not judged: the peer
does not offer it, or it cannot be determined here

The checks that a peer is known to fail are listed in
[`known_failures.py`](../glm4ft/testing/subjects/known_failures.py). The list is strict: when a listed check passes, the
peer's CI lane fails until the entry is removed. If you find a mistake in a row, see the peer's subject, a file of at
most 60 lines of code in the same folder.
"""


def main(names: Sequence[str]) -> int:
    """Judge the named peers, or all without names, and write the page; returns the exit status."""
    store = DOCS / "scoreboard.json"
    results = json.loads(store.read_text("utf-8")) if store.exists() else {}
    bad = []
    for peer in PEERS:
        if not names or peer.name in names:
            print(f"{peer.name} ...", flush=True)
            try:
                results[peer.name] = judge(peer)
            except subprocess.CalledProcessError as error:  # the former result stays, and the others are judged
                bad.append(f"{peer.name}: not judged: tox -e {peer.env} ended with status {error.returncode}")
            # at once: a run of all peers takes long, and may be ended
            write_atomically(store, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    known = [peer for peer in PEERS if peer.name in results]
    page = "\n".join([INTRODUCTION, *table(known, results), *(detail(peer, results[peer.name]) for peer in known)])
    (DOCS / "scoreboard.md").write_text(page.rstrip() + "\n", "utf-8")
    bad += [f"{peer.name}: {c['check']}: {c['message']}" for peer in known for c in unexpected(results[peer.name])]
    print("\n".join(bad))
    return 1 if bad else 0


def judge(peer: Peer) -> dict[str, Any]:
    """Run the checks of a peer in its tox environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        inside = ["python", str(Path(__file__)), "--collect", peer.name, str(file)]
        subprocess.run([sys.executable, "-m", "tox", "run", "-e", peer.env, "--", *inside], cwd=DOCS.parent, check=True)
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return found


def collect(peer: Peer, file: Path) -> None:
    """Run the checks and encode the minimal conversations; called by ``judge`` in the peer's environment."""
    from glm4ft.testing.checks import all_checks
    from glm4ft.testing.trial.runner import results_record, run_checks, trial_of

    with trial_of(peer.subject, peer.base) as trial:
        results = list(run_checks(trial, all_checks(), stages=peer.stages))
        rows = {f.check: show_row(trial.subject, f) for f in peer.failures if f.messages}
    found = results_record(peer.subject, results, round(sum(result.seconds for result in results), 1))
    found["versions"] = {name: metadata.version(name).partition("+")[0] for name in peer.packages}
    found["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    file.write_text(json.dumps({**found, "rows": rows}, ensure_ascii=False), "utf-8")


def show_row(subject: Any, failure: KnownFailure) -> str:
    """The last tokens of a minimal conversation; trained ones in brackets, with the label if it differs from the id."""
    row = subject.encode([dict(message) for message in failure.messages], list(failure.tools) or None)
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    words = [_word(subject.tokenizer, *pair) for pair in pairs[-SHOWN_TOKENS:]]
    return " ".join(["…"] * (len(pairs) > SHOWN_TOKENS) + words)


def _word(tokenizer: Any, token: int, label: int) -> str:
    text, trained = (json.dumps(tokenizer.decode([i]), ensure_ascii=False)[1:-1] for i in (token, max(label, 0)))
    if label < 0:
        return text
    return f"[{text}]" if label == token else f"[{trained} over {text}]"


def unexpected(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The checks whose failure, or whose passing, is not in the list of known failures."""
    return [check for check in result["checks"] if check["status"] in ("failed", "error")]


def table(peers: Sequence[Peer], results: dict[str, Any]) -> Iterator[str]:
    """The lines of the table of peers and stages."""
    yield "| peer | " + " | ".join(STAGES) + " |"
    yield "|---" * (len(STAGES) + 1) + "|"
    for peer in peers:
        anchor = peer.name.lower().replace(" ", "-").replace(".", "").replace(",", "")
        yield f"| [{peer.name}](#{anchor}) | " + " | ".join(cells(peer, results[peer.name])) + " |"


def cells(peer: Peer, result: dict[str, Any]) -> Iterator[str]:
    """One sign per stage, that of its worst check."""
    kinds = {failure.check: failure.kind for failure in peer.failures}
    for stage in STAGES:
        found = [_kind(check, kinds) for check in result["checks"] if check["stage"] == stage]
        worst = next((sign for sign in SIGNS if sign in found), "skipped")
        count = f" {found.count(worst)}" if worst in ("fault", "alternative", "unexpected") else ""
        yield SIGNS[worst] + count


def _kind(check: dict[str, Any], kinds: dict[str, Any]) -> str:
    named = {"passed": "passed", "skipped": "skipped", "expected-failure": kinds.get(check["check"], "fault")}
    return str(named.get(check["status"], "unexpected"))


def detail(peer: Peer, result: dict[str, Any]) -> str:
    """The section of a peer: versions, counts and failures."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    counts = [sum(check["status"] == status for check in result["checks"]) for status in ("passed", "skipped")]
    told = f"{result['date']}: {versions}. {counts[0]} checks passed, {counts[1]} were not judged, "
    lines = [f"\n## {peer.name}\n", peer.about, "", f"{told}{len(result['checks']) - sum(counts)} failed.", ""]
    failed = {check["check"]: check for check in result["checks"] if check["status"] == "expected-failure"}
    for failure in peer.failures:
        if failure.check in failed:
            lines += [*explain(peer, failure, failed[failure.check], result["rows"].get(failure.check, "")), ""]
    for check in unexpected(result):
        lines += [f"**{SIGNS['unexpected']} {check['check']}** (not known before): {check['message']}", ""]
    return "\n".join(lines)


def explain(peer: Peer, failure: KnownFailure, check: dict[str, Any], row: str) -> Iterable[str]:
    """The lines of one failure: what it is, a conversation, the consequence, the remedy, and how to reproduce it."""
    yield f"**{SIGNS[failure.kind]} {failure.check.replace('_', ' ')}** ({check['stage']})\n"
    yield f"- What: {failure.what}."
    if failure.messages:
        yield f"- Conversation: `{json.dumps(failure.messages, ensure_ascii=False)}`"
        yield f"- Tokens, trained ones in brackets: `` {row} ``"
    else:
        found = check["message"].removeprefix(f"{failure.kind}, {failure.what}: ").partition("\n")[0]
        yield f"- Found: `` {found} ``"
    yield f"- For a user: {failure.consequence}."
    if failure.remedy:
        yield f"- Instead: {failure.remedy}."
    yield f"- See it: `tox run -e {peer.env} -- {peer.command} --stages {check['stage']}`"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--collect"]:
        collect(next(peer for peer in PEERS if peer.name == sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
