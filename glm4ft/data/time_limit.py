"""A bound on the time that a checkpoint's chat template runs: a template is a program, and may loop for years."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

TEMPLATE_LIMIT_S = 5.0  # a conversation takes milliseconds

Result = TypeVar("Result")


def within(limit_s: float, work: Callable[[], Result]) -> Result:
    """Do some work in at most a given time.

    Args:
        limit_s: The limit in seconds.
        work: A function, run in a thread of its own. It is stopped between two instructions of Python, which a single
            operation on huge values outlasts.
    Returns:
        What the function returns; what it raises is raised here.
    Raises:
        TimeoutError: If the function did not end in time.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        stop: Any = ctypes.py_object(SystemExit)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), stop)
        raise TimeoutError(f"stopped after {limit_s:g} s")
    if errors:
        raise errors[0]
    return results[0]
