"""The trajectory file is strict JSON whatever the numbers, and survives a killed writer.

Run: pytest tests/train/test_trajectory.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4ft.errors import DataError
from glm4ft.files import write_atomically
from glm4ft.train.trajectory import append_row, dump_row, read_trajectory, rewind


def write(path: Path, num_steps: int) -> Path:
    append_row(path, {"type": "header", "rows": 2})
    for step in range(1, num_steps + 1):
        append_row(path, {"type": "step", "step": step, "loss": 1 / step})
        append_row(path, {"type": "eval", "step": step, "eval_loss": 2.0})
    return path


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@given(loss=st.floats(), grad_norm=st.floats())
def test_rows_are_strict_json_and_finite_numbers_come_back(loss: float, grad_norm: float) -> None:
    row = json.loads(dump_row({"loss": loss, "grad_norm": grad_norm}), parse_constant=refuse_constant)
    finite = {name: abs(value) < float("inf") for name, value in (("loss", loss), ("grad_norm", grad_norm))}
    assert row["schema"] == 1
    assert row["loss"] == (loss if finite["loss"] else None)
    assert row["grad_norm"] == (grad_norm if finite["grad_norm"] else None)
    assert row.get("finite", True) == all(finite.values())


def test_rows_are_told_apart_by_type(tmp_path: Path) -> None:
    trajectory = read_trajectory(write(tmp_path / "t.jsonl", 3))
    assert trajectory.header["rows"] == 2
    assert [row["step"] for row in trajectory.steps] == [1, 2, 3]
    assert [row["eval_loss"] for row in trajectory.evaluations] == [2.0] * 3


def test_line_cut_off_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", 2)
    path.write_bytes(path.read_bytes() + b'{"schema": 1, "type": "st')
    assert len(read_trajectory(path).steps) == 2
    rewind(path, 1)
    append_row(path, {"type": "step", "step": 2, "loss": 0.5})
    assert [row["step"] for row in read_trajectory(path).steps] == [1, 2]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_rewind_keeps_the_header_and_what_is_up_to_the_step(tmp_path: Path, step: int) -> None:
    path = write(tmp_path / "t.jsonl", 3)
    before = path.read_text().splitlines()
    rewind(path, step)
    assert path.read_text().splitlines() == before[: 1 + 2 * step]
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_broken_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", 1)
    path.write_text(path.read_text() + "nonsense\n")
    with pytest.raises(DataError, match=r"(?s)t\.jsonl, line 4.*nonsense"):
        read_trajectory(path)
    with pytest.raises(DataError, match="cannot read the trajectory"):
        read_trajectory(tmp_path / "none.jsonl")


def test_error_of_a_failed_write_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write_atomically(tmp_path / "missing" / "floor.json", "{}")
    assert raised.value.filename == str(tmp_path / "missing" / "floor.json")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\n", b'{"type": "header"}\n5\n'], ids=["no text", "no object"])
def test_file_that_is_no_trajectory_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "trajectory.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="trajectory"):
        read_trajectory(tmp_path / "trajectory.jsonl")
