"""How ``glm4ft record`` tells the processes of a command what to record and where; imports the standard library alone.

``sitecustomize`` loads this file before anything else is imported, in whichever Python the command runs.
"""

from __future__ import annotations

import os

FOLDER = "GLM4FT_RECORD"  # the folder of the recording
STEPS = "GLM4FT_RECORD_STEPS"  # the number of optimizer steps to record
MODULES = "GLM4FT_RECORD_MODULES"  # embedding, final norm and head by their names; unset: found by structure
COMMAND = "GLM4FT_RECORD_COMMAND"  # the command, as one line of shell
COMMIT = "GLM4FT_RECORD_COMMIT"  # the commit that is checked out, with UNCOMMITTED if files differ from it
UNCOMMITTED = "+"
DEFAULT_STEPS = 4
NOTE = "not-recorded.txt"  # in the folder of a rank: why it was not recorded


def rank_folder(folder: str) -> str:
    """The folder of this process's trace in that of the recording; torchrun and its like number the processes."""
    return os.path.join(folder, f"rank-{os.environ.get('RANK', '0')}")


def note(folder: str, why: str) -> None:
    """Note why this process is not recorded; what was noted before stays.

    Args:
        folder: The folder of this process's trace; made if it is not there.
        why: The reason, in one line.
    """
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, NOTE), "a", encoding="utf-8") as file:
        file.write(why + "\n")
