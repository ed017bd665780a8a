"""Workflows take no more rights than they need, pin what they use, and keep code of forks off the GPU machines.

Run: pytest tests/test_workflows.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the source distribution has no workflows")


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request: pytest.FixtureRequest) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load(request.param.read_text("utf-8"))
    return content


def test_rights_are_given_to_jobs_one_by_one(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {}
    assert all(job["permissions"] == {"contents": "read"} for job in workflow["jobs"].values())


def test_actions_are_pinned_to_commits(workflow: dict[Any, Any]) -> None:
    used = [step["uses"] for job in workflow["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []


def test_no_job_runs_for_ever(workflow: dict[Any, Any]) -> None:
    assert all(job["timeout-minutes"] <= 180 for job in workflow["jobs"].values())


def test_nothing_that_a_stranger_can_choose_is_pasted_into_a_script(workflow: dict[Any, Any]) -> None:
    scripts = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    expressions = {found for script in scripts for found in re.findall(r"\$\{\{\s*([^}]*?)\s*\}\}", script)}
    assert expressions <= {"matrix.env", "matrix.arguments"}


def test_a_failure_before_a_pipe_is_a_failure(workflow: dict[Any, Any]) -> None:
    """Only a step that names bash runs with pipefail."""
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if " | tee" in step.get("run", "") and step.get("shell") != "bash"] == []


def test_the_gpu_lane_runs_no_code_of_a_fork_and_is_red_if_it_runs_nothing() -> None:
    text = (FOLDER / "gpu.yml").read_text("utf-8")
    workflow = yaml.safe_load(text)
    assert set(workflow[True]) == {"push", "merge_group", "schedule", "workflow_dispatch"}  # YAML reads "on" as true
    assert workflow[True]["push"] == {"branches": ["main"]}
    (job,) = workflow["jobs"].values()
    assert "self-hosted" in job["runs-on"]
    assert "workflow_dispatch' && 'gpu-dispatch'" in job["environment"]  # whose reviewers vet a dispatch
    assert job["env"]["GLM4FT_GPU"] == "require"
    assert [step["name"] for step in job["steps"] if step.get("name", "").startswith("Preflight")] == [
        "Preflight: driver and free memory",
        "Preflight: torch sees the GPU",
    ]
