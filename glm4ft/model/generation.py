"""Greedy round trip: whether the model, prompted as in serving, reproduces each assistant turn and then stops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from glm4ft.data.chat_format import ChatFormat
from glm4ft.data.control_tokens import common_prefix_length
from glm4ft.data.encoded_row import AssistantTurn, EncodedRow
from glm4ft.text.safe_text import visible

# A turn that does not stop is generated this many tokens further, to show how it continues.
OVERRUN = 16


@dataclass(frozen=True)
class TurnRoundTrip:
    """What the model generated for one assistant turn.

    Args:
        line: The line of the conversation in its file.
        message: The index of the turn in the conversation, without the turns that were cut to fit.
        supervised: False if the turn was not trained, and so need not be reproduced.
        expected: The text of the turn, its terminator by name.
        generated: The text that was generated, control tokens by name.
        first_difference: The position in the turn, in tokens, of the first difference; None if the turn was
            reproduced exactly, terminator included.
        stop: The stop token that ended the generation, or None if it had to be cut off.
    """

    line: int
    message: int
    supervised: bool
    expected: str
    generated: str
    first_difference: int | None
    stop: str | None

    @property
    def exact(self) -> bool:
        """True if every token was reproduced, the terminator included."""
        return self.first_difference is None

    def describe(self) -> str:
        """The result as one line, or three where the turn was not reproduced."""
        place = f"line {self.line}, messages[{self.message}]"
        stop = f"stopped on {self.stop}" if self.stop else "did NOT stop"
        if self.exact:
            return f"{place}: exact, {stop}: {visible(self.generated, newlines=False)}"
        kind = "differs" if self.supervised else "differs, not trained,"
        return (
            f"{place}: {kind} at token {self.first_difference}, {stop}\n"
            f"    expected:  {visible(self.expected, newlines=False)}\n"
            f"    generated: {visible(self.generated, newlines=False)}"
        )


def round_trip(
    model: PreTrainedModel | PeftModel, chat_format: ChatFormat, rows: Iterable[EncodedRow]
) -> list[TurnRoundTrip]:
    """Generate every assistant turn from its inference prompt and compare.

    Args:
        model: The model, in any mode; left in the mode it was in.
        chat_format: The chat format that the model was trained with.
        rows: The rows as trained; each of their assistant turns is tried after the true turns before it.
    Returns:
        One result per assistant turn, in order.
    """
    was_training = model.training
    model.eval()
    try:
        return [_try_turn(model, chat_format, row, turn) for row in rows for turn in row.turns]
    finally:
        model.train(was_training)


def greedy(
    model: PreTrainedModel | PeftModel, prompt: list[int], stop_ids: list[int], max_new_tokens: int
) -> list[int]:
    """Continue a prompt by the likeliest token each time; as ``generate`` with its defaults."""
    return generate(model, prompt, stop_ids, max_new_tokens)


def generate(
    model: PreTrainedModel | PeftModel,
    prompt: list[int],
    stop_ids: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    on_token: Callable[[int], object] | None = None,
) -> list[int]:
    """Continue a prompt.

    Args:
        model: The model, in eval mode.
        prompt: The ids of the prompt.
        stop_ids: The ids that end the generation; the first that is generated is kept.
        max_new_tokens: The number of new tokens after which the generation is cut off.
        temperature: The temperature of the sampling; 0 takes the likeliest token each time.
        on_token: A function that is given each new id as it comes.
    Returns:
        The new ids, a stop id included if one was generated.
    """
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0}
    config = GenerationConfig(
        **(sampling if temperature else {"do_sample": False}),
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
        use_cache=True,
    )
    input_ids = torch.tensor([prompt], device=model.device)
    generate: Any = model.generate
    with torch.no_grad():
        output = generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=_Streamer(on_token) if on_token else None,
        )
    return list(output[0, len(prompt) :].tolist())


class _Streamer(BaseStreamer):
    """Hands each new token on; transformers puts the whole prompt first."""

    def __init__(self, on_token: Callable[[int], object]) -> None:
        self.on_token, self.is_prompt = on_token, True

    def put(self, value: torch.Tensor) -> None:
        if not self.is_prompt:
            self.on_token(int(value))
        self.is_prompt = False

    def end(self) -> None:
        """Nothing is kept back here."""


def _try_turn(
    model: PreTrainedModel | PeftModel, chat_format: ChatFormat, row: EncodedRow, turn: AssistantTurn
) -> TurnRoundTrip:
    expected = row.input_ids[turn.start : turn.end + 1]
    # a terminator that is no stop token (a second <|assistant|>, where that was asked for) must end the turn here too
    stops = list(dict.fromkeys([*chat_format.stop_ids, expected[-1]]))
    generated = greedy(model, row.input_ids[: turn.start], stops, len(expected) + OVERRUN)
    first = None if generated == expected else common_prefix_length(expected, generated)
    tokenizer = chat_format.tokenizer
    return TurnRoundTrip(
        line=row.line,
        message=turn.message,
        supervised=turn.supervised,
        expected=str(tokenizer.decode(expected)),
        generated=str(tokenizer.decode(generated)),
        first_difference=first,
        stop=str(tokenizer.convert_ids_to_tokens(generated[-1])) if generated and generated[-1] in stops else None,
    )
