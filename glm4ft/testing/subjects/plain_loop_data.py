"""The data half of the plain loop: conversations to rows, rows to batches, in the order of an epoch.

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from transformers import AutoTokenizer

from glm4ft.data.chat_format import IGNORED, PREFIX, STOPS, plain_text_tokenizer
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.reader import from_messages

Features = dict[str, list[int]]  # input_ids and labels
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TextSegment:
    """A piece of a rendered conversation.

    Args:
        text: of one control token, or of a body.
        is_control: True for a control token; a body is plain text whatever it says.
        supervised: True if the model has to sample it.
    """

    text: str
    is_control: bool
    supervised: bool


class Data:
    """Encodes conversations in the format of GLM-4-0414 and makes batches of them.

    Args:
        base_dir: Hugging Face model folder, of which the tokenizer is used.
    """

    chat_format = "glm-4-0414"
    max_length = 32768  # tokens; a longer conversation is refused rather than cut
    pack_length = 4  # capacity of a pack, in lengths of the longest row

    def __init__(self, base_dir: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.control_ids = self.tokenizer.get_added_vocab()
        self.stop_ids = [self.control_ids[token] for token in STOPS]
        self._plain = plain_text_tokenizer(self.tokenizer)

    # --- conversation to row ---

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Features:
        """Ids and labels of one conversation."""
        return self.fit(self.label(self.render(self.read(messages, tools))))

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that serving sends: the conversation so far, then the header of the turn to generate."""
        # a conversation needs an answer to be valid; the stand-in and its stop token are taken off again
        segments = self.render(self.read([*messages, {"role": "assistant", "content": "."}], tools))
        return self.label(segments[:-2])["input_ids"]

    def read(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Conversation:
        """Validated messages."""
        return from_messages(messages, tools)

    def render(self, conversation: Conversation) -> list[TextSegment]:
        """Prefix, then header and body of each message; what follows an answer is the token that ends it."""
        messages = self.ordered(conversation.messages)
        self.require_stops(messages)
        segments = [TextSegment(token, True, False) for token in PREFIX]
        if conversation.tools:
            segments += [
                TextSegment("<|system|>", True, False),
                TextSegment(self.tool_text(conversation.tools), False, False),
            ]
        before: Message | None = None
        for message in messages:
            segments.append(TextSegment(f"<|{message.role}|>", True, self.is_trained(before)))
            segments.append(TextSegment(self.body(message), False, self.is_trained(message)))
            before = message
        if before and before.role == "assistant":
            segments.append(TextSegment(self.final_stop(before), True, self.is_trained(before)))
        return segments

    def ordered(self, messages: Sequence[Message]) -> list[Message]:
        """System messages first, as the template of GLM-4-0414 has them."""
        return sorted(messages, key=lambda message: message.role != "system")

    def require_stops(self, messages: Sequence[Message]) -> None:
        """Refuse an answer that is followed by a header which is no stop token."""
        for message, following in pairwise(messages):
            if message.role == "assistant" and following.role not in ("user", "observation"):
                raise NotImplementedError(f"an assistant turn is followed by role {following.role}")

    def is_trained(self, message: Message | None) -> bool:
        """Whether the model has to sample this message."""
        return message is not None and message.role == "assistant" and message.loss

    def body(self, message: Message) -> str:
        """What stands below a header; a tool call has the tool's name on the first line."""
        return f"{message.metadata}\n{message.content}"

    def tool_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The tool block's body, in the words of the tokenizer's own template."""
        declared: list[Any] = list(tools)
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=declared, tokenize=False)
        return str(text).split("<|system|>", 1)[1].rsplit("<|user|>", 1)[0]

    def final_stop(self, message: Message) -> str:
        """The token that ends a conversation's last answer: a call waits for the tool, a reply for the user."""
        return "<|observation|>" if message.is_call else "<|user|>"

    def label(self, segments: Sequence[TextSegment]) -> Features:
        """Tokenise the segments; a token is labelled if its segment is supervised."""
        row: Features = {"input_ids": [], "labels": []}
        for segment in segments:
            ids = self.tokenise(segment)
            row["input_ids"] += ids
            row["labels"] += ids if segment.supervised else [IGNORED] * len(ids)
        return row

    def tokenise(self, segment: TextSegment) -> list[int]:
        """Ids of one segment; a body is encoded by a tokenizer that knows no control tokens."""
        if segment.is_control:
            return [self.control_ids[segment.text]]
        return list(self._plain.encode(segment.text, add_special_tokens=False).ids)

    def fit(self, row: Features) -> Features:
        """A row as it may be trained."""
        if len(row["input_ids"]) > self.max_length:
            raise NotImplementedError(f"a conversation of {len(row['input_ids'])} tokens is refused, not cut")
        return row

    # --- rows to batches ---

    @property
    def pad_id(self) -> int:
        """What fills the slots behind shorter rows."""
        return int(self.tokenizer.pad_token_id)

    def items(self, rows: Sequence[Features], packing: bool) -> list[list[Features]]:
        """What is shuffled: packs of rows, or single rows."""
        return self.pack(rows) if packing else [[row] for row in rows]

    def pack(self, rows: Sequence[Features]) -> list[list[Features]]:
        """Whole rows in packs of bounded length, in the order in which they come."""
        capacity = self.pack_length * max(len(row["input_ids"]) for row in rows)
        packs: list[list[Features]] = [[]]
        for row in rows:
            if sum(len(r["input_ids"]) for r in (*packs[-1], row)) > capacity:
                packs.append([])
            packs[-1].append(row)
        return packs

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        """The order of one epoch, another in each and the same on every rank."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return torch.randperm(num_items, generator=generator).tolist()

    def batch(self, items: Iterable[Sequence[Features]], packing: bool) -> Batch:
        """A micro-batch."""
        rows = list(chain.from_iterable(items))
        return self.collate_packed(rows) if packing else self.collate(rows)

    def collate(self, rows: Sequence[Features]) -> Batch:
        """Pad on the right. The mask comes from lengths: the pad token may be a target elsewhere."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": self.pad([row["input_ids"] for row in rows], self.pad_id),
            "labels": self.pad([row["labels"] for row in rows], IGNORED),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }

    def pad(self, lists: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        """(B, T) from lists of unlike length."""
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in lists], True, float(value))

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        """One row of rows. The model keeps them apart by their positions, if it is given no attention mask."""
        batch = {name: torch.tensor([list(chain.from_iterable(row[name] for row in rows))]) for name in rows[0]}
        return {**batch, "position_ids": self.positions(rows)}

    def positions(self, rows: Sequence[Features]) -> torch.Tensor:
        """(1, T), starting anew at each row."""
        return torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
