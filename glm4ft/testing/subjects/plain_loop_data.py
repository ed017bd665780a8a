"""The data part of the plain loop: encodes conversations to rows and collates rows to batches, epoch by epoch.

Shapes: B rows of a batch, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from transformers import AutoTokenizer

from glm4ft.data.control_tokens import PREFIX, STOPS, plain_text_tokenizer
from glm4ft.data.conversation import Conversation, Message
from glm4ft.data.encoded_row import IGNORED
from glm4ft.data.reader import from_messages

Features = dict[str, list[int]]  # input_ids and labels
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TextSegment:
    """A piece of a rendered conversation.

    Args:
        text: The text of one control token, or the body of a message.
        is_control: True for a control token; a body is encoded as plain text even if it contains marker text.
        supervised: True if the model must sample the segment.
    """

    text: str
    is_control: bool
    supervised: bool


class Data:
    """Encodes conversations in the format of GLM-4-0414 and collates them to batches.

    Args:
        base_dir: The Hugging Face model folder whose tokenizer is used.
    """

    chat_format = "glm-4-0414"
    max_length = 32768  # tokens; a longer conversation is refused, not cut
    pack_length = 4  # capacity of a pack, as a multiple of the longest row's length

    def __init__(self, base_dir: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir)
        self.control_ids = self.tokenizer.get_added_vocab()
        self.stop_ids = [self.control_ids[token] for token in STOPS]
        self._plain = plain_text_tokenizer(self.tokenizer)

    # --- conversation to row ---

    def encode(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Features:
        """Encode one conversation as ``input_ids`` and ``labels``."""
        return self.fit(self.label(self.render(self.read(messages, tools))))

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[int]:
        """The ids that a server sends to the model: the conversation so far, then the header of the next answer."""
        # a conversation needs an answer to be valid; this one and its stop token are removed again
        segments = self.render(self.read([*messages, {"role": "assistant", "content": "."}], tools))
        return self.label(segments[:-2])["input_ids"]

    def read(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> Conversation:
        """Validate the messages and make a conversation of them."""
        return from_messages(messages, tools)

    def render(self, conversation: Conversation) -> list[TextSegment]:
        """The prefix, then header and body of each message; the header after an answer is also its stop token."""
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
        """The messages with system messages first, as in the template of GLM-4-0414."""
        return sorted(messages, key=lambda message: message.role != "system")

    def require_stops(self, messages: Sequence[Message]) -> None:
        """Refuse an answer that is followed by a header other than a stop token."""
        for message, following in pairwise(messages):
            if message.role == "assistant" and following.role not in ("user", "observation"):
                raise NotImplementedError(f"an assistant turn is followed by role {following.role}")

    def is_trained(self, message: Message | None) -> bool:
        """Whether the model must sample this message."""
        return message is not None and message.role == "assistant" and message.loss

    def body(self, message: Message) -> str:
        """The text after a header; for a tool call its first line is the tool's name."""
        return f"{message.metadata}\n{message.content}"

    def tool_text(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The body of the system block that declares the tools, as the tokenizer's chat template renders it."""
        declared: list[Any] = list(tools)
        text = self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tools=declared, tokenize=False)
        return str(text).split("<|system|>", 1)[1].rsplit("<|user|>", 1)[0]

    def final_stop(self, message: Message) -> str:
        """The token that ends a conversation's last answer: a call waits for the tool, a reply for the user."""
        return "<|observation|>" if message.is_call else "<|user|>"

    def label(self, segments: Sequence[TextSegment]) -> Features:
        """Tokenise the segments; a token has a label if its segment is supervised."""
        row: Features = {"input_ids": [], "labels": []}
        for segment in segments:
            ids = self.tokenise(segment)
            row["input_ids"] += ids
            row["labels"] += ids if segment.supervised else [IGNORED] * len(ids)
        return row

    def tokenise(self, segment: TextSegment) -> list[int]:
        """The ids of one segment; a body is encoded by a tokenizer without control tokens."""
        if segment.is_control:
            return [self.control_ids[segment.text]]
        return list(self._plain.encode(segment.text, add_special_tokens=False).ids)

    def fit(self, row: Features) -> Features:
        """Refuse a row that is longer than ``max_length``."""
        if len(row["input_ids"]) > self.max_length:
            raise NotImplementedError(f"a conversation of {len(row['input_ids'])} tokens is refused, not cut")
        return row

    # --- rows to batches ---

    @property
    def pad_id(self) -> int:
        """The id that pads shorter rows."""
        return int(self.tokenizer.pad_token_id)

    def items(self, rows: Sequence[Features], packing: bool) -> list[list[Features]]:
        """The items that are shuffled: packs of rows, or single rows."""
        return self.pack(rows) if packing else [[row] for row in rows]

    def pack(self, rows: Sequence[Features]) -> list[list[Features]]:
        """Pack whole rows, in their given order, into packs of limited length."""
        capacity = self.pack_length * max(len(row["input_ids"]) for row in rows)
        packs: list[list[Features]] = [[]]
        for row in rows:
            if sum(len(r["input_ids"]) for r in (*packs[-1], row)) > capacity:
                packs.append([])
            packs[-1].append(row)
        return packs

    def epoch_order(self, num_items: int, epoch: int, seed: int, rank: int) -> list[int]:
        """The order of the items in one epoch: different in each epoch, the same on every rank."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return torch.randperm(num_items, generator=generator).tolist()

    def batch(self, items: Iterable[Sequence[Features]], packing: bool) -> Batch:
        """Collate items to a micro-batch."""
        rows = list(chain.from_iterable(items))
        return self.collate_packed(rows) if packing else self.collate(rows)

    def collate(self, rows: Sequence[Features]) -> Batch:
        """Pad rows on the right. The mask is made from lengths, since the pad token may be a target elsewhere."""
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": self.pad([row["input_ids"] for row in rows], self.pad_id),
            "labels": self.pad([row["labels"] for row in rows], IGNORED),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }

    def pad(self, lists: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        """Pad lists of different lengths to a tensor of shape (B, T)."""
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in lists], True, float(value))

    def collate_packed(self, rows: Sequence[Features]) -> Batch:
        """Concatenate rows to one sequence. Without an attention mask, the model separates them by their positions."""
        batch = {name: torch.tensor([list(chain.from_iterable(row[name] for row in rows))]) for name in rows[0]}
        return {**batch, "position_ids": self.positions(rows)}

    def positions(self, rows: Sequence[Features]) -> torch.Tensor:
        """Position ids of shape (1, T) that restart at each row."""
        return torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
