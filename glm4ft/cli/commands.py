"""The table of commands: what each is called, what it does, and which module runs it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        description: What the command does, in one sentence.
        module: The module of the command, imported when it is called. It has ``parse``, which reads and checks the
            arguments and imports nothing that is slow to load, and ``run``, which does the work and returns whether
            it succeeded.
    """

    description: str
    module: str


COMMANDS = {
    "train": Command("Train a LoRA adapter; without --data and --config, on the bundled demo.", "glm4ft.cli.train"),
    "inspect": Command("Show which tokens of each conversation are supervised.", "glm4ft.cli.inspect"),
    "floor": Command("Say, before training, how low the loss can go, and which tokens keep it up.", "glm4ft.cli.floor"),
    "explain": Command(
        "Say why the loss of a run does not fall, or why its model does not stop.", "glm4ft.cli.explain"
    ),
    "chat": Command("Talk to a run, a merged checkpoint or a base.", "glm4ft.cli.chat"),
    "merge": Command("Merge an adapter into its base, for plain transformers.", "glm4ft.cli.merge"),
    "cache": Command("Show the encoded files that are kept for later runs, or remove them.", "glm4ft.cli.cache"),
    "check": Command("Put a fine-tuning pipeline on trial; by default, this project's own.", "glm4ft.cli.check"),
    "record": Command("Record the first optimizer steps of any training command, unchanged.", "glm4ft.cli.record"),
    "judge": Command("Judge a recorded run: the first stage that departs, and the likely cause.", "glm4ft.cli.judge"),
    "baseline": Command(
        "Keep the curves of a pipeline, and say later whether its training is still the same.", "glm4ft.cli.baseline"
    ),
    "faults": Command(
        "Prove the checks: put known bugs into a healthy loop and see that each is caught.", "glm4ft.cli.faults"
    ),
    "init": Command(
        "Render adapter, tests, tox.ini and workflows into a repository, to put its trainer on trial.",
        "glm4ft.cli.init",
    ),
}
