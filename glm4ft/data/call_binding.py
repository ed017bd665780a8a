"""Which result answers which call: by id, by the tool's name, or by position; GLM-4's formats know position alone.

OpenAI-like records bind a result to its call by an id and may list results in any order. GLM-4 writes calls and results
one after the other, so results are put into the order of their calls, and what does not match is refused or told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from glm4ft.data.source_message import SourceMessage
from glm4ft.errors import show


def bind_results(turns: Sequence[SourceMessage]) -> tuple[list[SourceMessage], list[str]]:
    """Put the results of each run of calls into the order of the calls.

    Args:
        turns: The turns of a conversation.
    Returns:
        The turns, and sentences about calls without a result and results without a call.
    Raises:
        DataError: If a result's id is that of no call before it, or of a call that has its result already.
    """
    bound, notes = list[SourceMessage](), list[str]()
    for calls, results, is_last in _exchanges(turns):
        bound += calls
        if calls and calls[-1].metadata:
            asked = [turn for turn in calls if turn.metadata]
            results = _in_order(asked, results)
            notes += _unmatched(asked, results, is_last=is_last)
        else:
            notes += [f"{turn.place.field} is a result without a call before it" for turn in results]
        bound += results
    return bound, notes


def _exchanges(turns: Sequence[SourceMessage]) -> Iterator[tuple[list[SourceMessage], list[SourceMessage], bool]]:
    """Cut the turns behind each run of results, and behind each run of calls that nothing answers.

    Yields:
        The turns that ask (of which the last run may be calls), the results, and whether nothing follows them.
    """
    asking, results = list[SourceMessage](), list[SourceMessage]()
    for turn in turns:
        if turn.role == "observation":
            results.append(turn)
            continue
        ends_calls = bool(asking) and bool(asking[-1].metadata) and not turn.metadata
        begins_calls = bool(turn.metadata) and bool(asking) and not asking[-1].metadata
        if results or ends_calls or begins_calls:
            yield asking, results, False
            asking, results = [], []
        asking.append(turn)
    yield asking, results, True


def _in_order(calls: list[SourceMessage], results: list[SourceMessage]) -> list[SourceMessage]:
    ids = [call.call_id for call in calls]
    if all(ids) and any(result.call_id for result in results):
        _require_ids(ids, results)
        by_id = all(result.call_id for result in results)
        return sorted(results, key=lambda result: ids.index(result.call_id)) if by_id else results
    names = [call.metadata for call in calls]
    by_name = len(set(names)) == len(names) and all(result.answers in names for result in results)
    return sorted(results, key=lambda result: names.index(result.answers)) if by_name else results


def _require_ids(ids: list[str], results: list[SourceMessage]) -> None:
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        place = results[0].place
        raise place.wrong("two calls have one id", twice, "an id for each call", "give each call its own id")
    seen = set[str]()
    for result in results:
        if result.call_id and result.call_id not in ids:
            fix = "put the result behind its call, or correct the id"
            at = result.place.key("tool_call_id")
            raise at.wrong(
                "a result without a call: its id is that of no call before it", result.call_id, f"{ids}", fix
            )
        if result.call_id in seen:
            at = result.place.key("tool_call_id")
            raise at.wrong("a call has two results", result.call_id, "one result for each call", "remove one of them")
        seen.update({result.call_id} - {""})


def _unmatched(calls: list[SourceMessage], results: list[SourceMessage], *, is_last: bool) -> Iterator[str]:
    names = [call.metadata for call in calls]
    for result in results:
        if result.answers and result.answers not in names:
            yield f"{result.place.field} is a result of {show(result.answers)}, which was not called before it"
    if len(results) > len(calls):
        yield f"{results[len(calls)].place.field} is a result without a call: {len(results)} for {len(calls)} calls"
    if len(results) < len(calls) and (results or not is_last):
        answered = {result.call_id for result in results}
        open_calls = [call for call in calls if call.call_id and call.call_id not in answered] or calls[len(results) :]
        for call in open_calls:
            yield f"{call.place.field} is a call without a result"
