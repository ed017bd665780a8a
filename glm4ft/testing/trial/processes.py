"""The run in two processes that several checks judge."""

from __future__ import annotations

from glm4ft.testing.recording.merging import first_difference, merge_ranks
from glm4ft.testing.recording.ranks import Job, run_ranks
from glm4ft.testing.recording.trace import Trace
from glm4ft.testing.subject import make_plan
from glm4ft.testing.trial.runs import RecordedRun
from glm4ft.testing.trial.stages import CheckFailed, NotApplicable
from glm4ft.testing.trial.trial import Trial

NUM_PROCESSES = 2
CHANGES = {"schedule": "linear", "micro_batch_size": 1, "accumulation": 4, "steps": 3, "max_grad_norm": 0.5}


def run_of_ranks(trial: Trial) -> tuple[RecordedRun, list[Trace]]:
    """The run as one process would have recorded it, and the trace of each process; it is recorded only once."""
    if "ranks" not in trial.shared:
        folder = str(trial.new_folder("ranks"))
        plan = make_plan(**{**trial.standard, **CHANGES}, output_dir=f"{folder}/output")
        job = Job(trial.importable_spec, str(trial.base_dir), trial.conversations, plan, folder)
        traces = run_ranks(job, NUM_PROCESSES)
        rows, weights = trial.weighted_rows(trial.conversations)
        plan = plan | trial.stated_rates | {"processes": NUM_PROCESSES}
        run = RecordedRun(plan, rows, merge_ranks(traces), [], None, trial.reference, weights=weights)
        trial.shared["ranks"] = run, traces
    found: tuple[RecordedRun, list[Trace]] = trial.shared["ranks"]
    return found


def require_ranks_stage(trial: Trial, stage: str) -> RecordedRun:
    """Fail if the run in several processes departs at a stage."""
    run, _ = run_of_ranks(trial)
    found = run.verdict.departures.get("gradient")
    if found and found.factor and trial.removes_factor:
        run.judge_again(factor_is_removed=True)
    if departures := run.verdict.at(stage):
        lines = [f"{departure} (in {NUM_PROCESSES} processes)" for departure in departures]
        raise CheckFailed("\n".join(lines), cause=departures[0].cause)
    if stage in run.verdict.hidden:
        raise NotApplicable(f"not judged: a departure at {run.verdict.hidden[stage]} hides it")
    return run


def require_ranks_agree(trial: Trial) -> None:
    """Fail if the processes hold different parameters after a step."""
    _, traces = run_of_ranks(trial)
    number, text = first_difference(traces)
    if number:
        why = "gradients are not averaged over the processes, or each process clips them differently"
        raise CheckFailed(f"step {number}: {text}: {why}")
