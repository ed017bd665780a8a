"""Change the code in small ways, one at a time, and see whether a test notices.

A test that no change breaks proves nothing.

Run: python tests/mutation.py [--num 60] [--seed 0] [--only model.loss] [--json FILE]
Mutants are drawn with a fixed seed, as many from each module, and run against that module's fast tests. Exit status 1
if fewer than 90 % are caught. The heavy libraries are imported once; each mutant runs in a fork of that process.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
RUN = ["tests/train/test_run.py", "-k", "not killed_at_a_random_step"]
TESTS = {  # fastest first: -x stops at the first failure
    "data.chat_format": ["tests/data/test_chat_format.py", "tests/data/test_masks.py"],
    "data.render": ["tests/data/test_reasoning_masks.py"],
    "data.turn_format": ["tests/data/test_reasoning_masks.py"],
    "data.batching": ["tests/data/test_batching.py", *RUN],
    "model.loss": ["tests/model/test_loss.py", "tests/data/test_batching.py", *RUN],
    "train.trainer": RUN,
}
LEAST_CAUGHT = 0.9
UNSEEN = ("strict", "frozen")  # arguments that change nothing in a program that is right
TIMEOUT_FACTOR = 4  # of the time the unchanged module takes; an endless loop counts as caught

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Args:
        module: name of the module in ``glm4ft``.
        node: index of the changed node in ``ast.walk`` order.
        variant: which of the node's changes.
        line: of the node, from 1.
        before: the node as source.
        after: what stands there instead.
    """

    module: str
    node: int
    variant: int
    line: int
    before: str
    after: str


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Args:
        mutant: that was run.
        status: ``caught``, ``timeout`` (caught as well) or ``survived``.
        by: the first test that failed.
        seconds: it took.
    """

    mutant: Mutant
    status: str
    by: str
    seconds: float


# --- changes --------------------------------------------------------------------------------------------------------


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield changed(node, ops=[*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPS:
        yield changed(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield changed(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Call):
        optional = [keyword for keyword in node.keywords if keyword.arg not in UNSEEN]
        yield from (changed(node, keywords=[k for k in node.keywords if k is not gone]) for gone in optional)
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield changed(node, ifs=[])
    elif isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))


def changed(node: ast.AST, **fields: Any) -> ast.AST:
    """A copy of a node with other fields."""
    twin = copy.copy(node)
    for name, value in fields.items():
        setattr(twin, name, value)
    return twin


def skipped(tree: ast.Module) -> set[ast.AST]:
    """Nodes that are no behaviour: annotations, what an error says, and what keeps records and lists as they are."""
    tops: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            tops += [node.exc, node.cause]
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            tops.append(node.annotation)
        elif isinstance(node, ast.keyword) and node.arg in UNSEEN:
            tops.append(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            tops.append(node.returns)
    return {below for top in tops if top is not None for below in ast.walk(top)}


def all_mutants(module: str) -> list[Mutant]:
    """Every change of a module that this script knows."""
    tree = ast.parse(source_file(module).read_text("utf-8"))
    without = skipped(tree)
    return [
        Mutant(module, index, variant, getattr(node, "lineno", 0), unparsed(node), unparsed(change))
        for index, node in enumerate(ast.walk(tree))
        if node not in without
        for variant, change in enumerate(changes(node))
    ]


def unparsed(node: ast.AST) -> str:
    """The first line of a node's source."""
    return ast.unparse(ast.fix_missing_locations(node)).split("\n")[0][:100]


def mutated(mutant: Mutant) -> ast.Module:
    """The module's tree with the change in it."""
    tree = ast.parse(source_file(mutant.module).read_text("utf-8"))
    node = list(ast.walk(tree))[mutant.node]
    change = list(changes(node))[mutant.variant]
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, change)
            elif isinstance(value, list):
                setattr(parent, name, [change if item is node else item for item in value])
    return ast.fix_missing_locations(tree)


def source_file(module: str) -> Path:
    return ROOT / "glm4ft" / f"{module.replace('.', '/')}.py"


# --- runs -----------------------------------------------------------------------------------------------------------


def run_tests(module: str, tree: ast.Module, timeout_s: float) -> tuple[str, str, float]:
    """Run a module's tests in a fork that imports the tree in its place.

    Returns:
        ``caught``, ``timeout`` or ``survived``; the first test that failed; seconds.
    """
    began_s = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if not child:
            in_the_fork(module, tree, output.fileno())
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() - began_s > timeout_s:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout", "", time.monotonic() - began_s
            time.sleep(0.05)
        output.seek(0)
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output.read(), re.MULTILINE)
    status = "caught" if os.waitstatus_to_exitcode(ended[1]) else "survived"
    return status, failed[1] if failed else "", time.monotonic() - began_s


def in_the_fork(module: str, tree: ast.Module, output: int) -> NoReturn:
    """Put the tree in the module's place, run its tests, and end the process with pytest's status."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        sys.meta_path.insert(0, Finder(f"glm4ft.{module}", tree))
        importlib.import_module(f"glm4ft.{module}")  # before pytest puts its own finder first
        import pytest

        status = int(pytest.main(["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-p", "no:xdist", *TESTS[module]]))
    except BaseException:
        status = 70
    os._exit(status)


class Finder:
    """Finds one module, and gives it the code of a tree."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name, self.tree = name, tree

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Answer the import system."""
        if name != self.name:
            return None
        file = str(source_file(name.removeprefix("glm4ft.")))
        loader = importlib.machinery.SourceFileLoader(name, file)
        loader.get_code = lambda _: compile(self.tree, file, "exec")  # type: ignore[method-assign]
        return importlib.util.spec_from_file_location(name, file, loader=loader)


def run_mutants(modules: list[str], num: int, seed: int) -> Iterator[Outcome]:
    """Draw mutants and run them, after the unchanged module's tests have passed."""
    for i, module in enumerate(modules):
        share = num // len(modules) + (i < num % len(modules))
        status, by, seconds = run_tests(module, ast.parse(source_file(module).read_text("utf-8")), 3600)
        if status != "survived":
            sys.exit(f"the tests of {module} fail without any change: {by}")
        for mutant in random.Random(seed).sample(all_mutants(module), share):
            outcome = Outcome(mutant, *run_tests(module, mutated(mutant), TIMEOUT_FACTOR * seconds))
            print(row(outcome), flush=True)
            yield outcome


def row(outcome: Outcome) -> str:
    """An outcome as a row of a Markdown table."""
    mutant = outcome.mutant
    shown = [text.replace("|", "\\|") for text in (mutant.before, mutant.after)]
    place = f"{mutant.module.replace('.', '/')}.py:{mutant.line}"
    return f"| {place} | `{shown[0]}` | `{shown[1]}` | {outcome.status} | {outcome.by.rpartition('::')[2]} |"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=60, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TESTS, help="one module")
    parser.add_argument("--json", type=Path, help="write the outcomes here")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutation", "HF_HUB_OFFLINE": "1"}
    for name in ("hypothesis", "numpy", "peft", "pytest", "torch", "transformers.trainer"):
        importlib.import_module(name)
    print("| place | before | after | status | caught by |\n|---|---|---|---|---|")
    outcomes = list(run_mutants([options.only] if options.only else list(TESTS), options.num, options.seed))
    caught = sum(outcome.status != "survived" for outcome in outcomes) / len(outcomes)
    print(f"\n{caught:.1%} of {len(outcomes)} mutants caught (seed {options.seed}); at least {LEAST_CAUGHT:.0%} needed")
    if options.json:
        result = {"schema": 1, "seed": options.seed, "caught": caught, "mutants": [asdict(o) for o in outcomes]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0 if caught >= LEAST_CAUGHT else 1


if __name__ == "__main__":
    sys.exit(main())
