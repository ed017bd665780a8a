"""The round trip says of each turn whether it came back, where it first differs, and on what it stopped.

Run: pytest tests/model/test_generation.py
What a trained model says back is in tests/train/test_overfit.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.reader import from_messages
from glm4ft.model.generation import OVERRUN, TurnRoundTrip, round_trip
from glm4ft.model.tiny import tiny_model
from glm4ft.model.tiny_tokenizer import tiny_tokenizer

CHAT_FORMAT = ChatFormat("glm-4-0414", tiny_tokenizer())
CONVERSATION = from_messages(
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "loss": False},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye"},
    ]
)
ROW = CHAT_FORMAT.encode(CONVERSATION)


class Parrot(torch.nn.Module):
    """Stands in for a trained model: whatever the prompt, it generates the given ids."""

    def __init__(self, says: list[int]) -> None:
        super().__init__()
        self.says, self.prompts, self.configs = says, list[list[int]](), list[Any]()
        self.device = torch.device("cpu")

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        self.prompts.append(input_ids[0].tolist())
        self.configs.append(generation_config)
        says = self.says[: generation_config.max_new_tokens]
        return torch.cat([input_ids, torch.tensor([says])], dim=1)


def answer(text: str, stop: str) -> list[int]:
    ids = CHAT_FORMAT.tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    return [*ids, CHAT_FORMAT.control_ids[stop]] if stop else ids


def try_last_turn(says: list[int]) -> TurnRoundTrip:
    return round_trip(Parrot(says), CHAT_FORMAT, [ROW])[1]  # type: ignore[arg-type]


def test_prompt_is_that_of_serving_and_decoding_is_greedy() -> None:
    parrot = Parrot(answer("Bye", "<|user|>"))
    round_trip(parrot, CHAT_FORMAT, [ROW])  # type: ignore[arg-type]
    assert parrot.prompts == [CHAT_FORMAT.prompt(CONVERSATION.messages[:n]) for n in (1, 3)]
    assert all(config.do_sample is False and config.num_beams == 1 for config in parrot.configs)
    assert all(config.eos_token_id == CHAT_FORMAT.stop_ids for config in parrot.configs)


def test_turn_that_comes_back_is_exact_with_its_stop() -> None:
    turn = try_last_turn(answer("Bye", "<|user|>"))
    assert turn.exact
    assert (turn.first_difference, turn.stop, turn.supervised) == (None, "<|user|>", True)
    assert "exact, stopped on <|user|>" in turn.describe()


def test_other_stop_is_a_difference_at_the_last_token() -> None:
    """The right words with the wrong next actor are not what was learnt."""
    turn = try_last_turn(answer("Bye", "<|observation|>"))
    assert turn.first_difference == len(answer("Bye", ""))
    assert turn.stop == "<|observation|>"


def test_turn_that_does_not_stop_is_shown_going_on() -> None:
    turn = try_last_turn(answer("Bye", "") + [5] * 99)
    assert turn.stop is None
    assert turn.first_difference == len(answer("Bye", ""))
    assert len(CHAT_FORMAT.tokenizer(turn.generated)["input_ids"]) <= len(answer("Bye", "<|user|>")) + OVERRUN
    assert "did NOT stop" in turn.describe()


def test_turn_cut_short_differs_where_it_ends() -> None:
    turn = try_last_turn([CHAT_FORMAT.control_ids["<|user|>"]])
    assert turn.first_difference == 0


def test_untrained_turn_is_tried_but_marked() -> None:
    first, last = round_trip(Parrot([5]), CHAT_FORMAT, [ROW])  # type: ignore[arg-type]
    assert (first.supervised, last.supervised) == (False, True)
    assert "not trained" in first.describe()


def test_hostile_text_is_shown_harmlessly() -> None:
    turn = try_last_turn(answer("\x1b[31m", "<|user|>"))
    assert "\x1b" not in turn.describe()


@pytest.mark.parametrize("training", [True, False])
def test_models_mode_is_left_as_it_was(training: bool) -> None:
    model = tiny_model().train(training)
    round_trip(model, CHAT_FORMAT, [ROW])
    assert model.training is training
