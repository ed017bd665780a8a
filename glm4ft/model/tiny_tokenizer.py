"""The tokenizer of the built-in tiny bases: GLM-4's control tokens, and chat templates of our own wording."""

from __future__ import annotations

import functools
from typing import Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glm4ft.data.turn_format import FormatName

Architecture = Literal["Glm4ForCausalLM", "GlmForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"]

# GLM-4's control tokens in GLM-4's order (ids 151329 to 151342 in GLM-4); they too follow the ordinary vocabulary.
CONTROL_TOKENS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
# Those that GLM-4.5 has after them (ids 151343 to 151364).
MARKER_TOKENS = (
    "<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>",
    "<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>", "<tool_call>", "</tool_call>",
    "<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink",
    "<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>",
)  # fmt: skip

SAMPLED_MARKERS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
)  # fmt: skip

# Each piece is built left to right by merges, so the vocabulary holds the piece and all its prefixes. Runs of white
# space are included so that a newline encoded apart from its content gives other ids than one encoded together with it.
_PIECES = (
    "\n\n", "\n\n\n", "  ", "    ", "        ", " the", " there", " and", " answer", " assistant", " is", " it", " in",
    " of", " one", " on", " to", " you", " your", " what", " which", " a", " are", " be", " can", " city", " clear",
    " call", " degrees", " do", " for", " function", " have", " how", " like", " name", " not", " object", " river",
    " runs", " string", " that", " this", " through", " today", " tool", " type", " unit", " was", " weather", " will",
    "ing", "tion", "ment", "er", "ed", "es", "The", "What", "You", "It", "Hello", "Thanks", "\": \"", "\", \"", "{\"",
    "\"}", "。", "，", "！", "？", "的", "是", "你", "好", "我", "在", "有", "不", "了", "中", "国", "法", "首", "都",
    "河",
)  # fmt: skip

_PRE_TOKENS = r"\s*[\r\n]+| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# The templates render turns exactly as the chat formats do; the wording of the tool block is our own.
_TOOLS = (
    "<|system|>\n# Tools{% for tool in tools %}{% set f = tool.function or tool %}\n\n## {{ f.name or f.type }}\n\n"
    "{{ f | tojson(indent=4) }}\nArguments are given as JSON.{% endfor %}"
)
_TURN = "<|{{ m.role }}|>{{ m.metadata or '' }}\n{{ m.content }}"
_END = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def _systems_first(turn: str, end: str) -> str:
    return (
        "[gMASK]<sop>{% if tools %}" + _TOOLS + "{% endif %}"
        "{% for m in messages if m.role == 'system' %}" + turn + "{% endfor %}"
        "{% for m in messages if m.role in ('user', 'assistant', 'observation') %}" + turn + "{% endfor %}" + end
    )


def _with_thinking(gap: str, empty: str, prompt: str, silent_prompt: str, switch: str) -> str:
    """The template of a model that thinks before it answers, unless told not to.

    Args:
        gap: What stands between the parts of a turn.
        empty: What stands in place of reasoning.
        prompt: The end of a prompt, after the header.
        silent_prompt: The same, if the model shall not think.
        switch: What is written behind the user's text in that case.
    """
    template = (
        "[gMASK]<sop>{% if tools %}{{ '<|system|>\n# Tools' }}{% for tool in tools %}"
        "{{ '\n' + tool | tojson(ensure_ascii=False) }}{% endfor %}{{ '\nA call reads <tool_call>name' }}"
        "<arg_key>argument</arg_key><arg_value>value</arg_value></tool_call>{% endif %}"
        "{% set asked = namespace(last=-1) %}{% set silent = enable_thinking is defined and not enable_thinking %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ '<|system|>GAP' + m.content }}"
        "{% elif m.role == 'user' %}{{ '<|user|>GAP' + m.content }}"
        "{% if silent and not m.content.endswith('SWITCH') %}SWITCH{% endif %}"
        "{% elif m.role == 'tool' %}"
        "{% if loop.first or loop.previtem.role != 'tool' %}<|observation|>{% endif %}"
        "{{ 'GAP<tool_response>GAP' + m.content + 'GAP</tool_response>' }}"
        "{% elif m.role == 'assistant' %}"
        "{% set answer = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
        "{% if not thought and '</think>' in answer %}"
        "{% set thought = answer.split('</think>')[0].split('<think>')[-1] %}"
        "{% set answer = answer.split('</think>')[-1] %}{% endif %}"
        "{% set kept = loop.index0 > asked.last or (clear_thinking is defined and not clear_thinking) %}"
        "<|assistant|>{{ 'GAP<think>' + thought.strip() + '</think>' if thought and kept else 'EMPTY' }}"
        "{% if answer.strip() %}{{ 'GAP' + answer.strip() }}{% endif %}"
        "{% for call in m.tool_calls or [] %}{{ 'GAP<tool_call>' + call.function.name + 'GAP' }}"
        "{% for key, value in call.function.arguments.items() %}{{ '<arg_key>' + key + '</arg_key>GAP<arg_value>' }}"
        "{{ value if value is string else value | tojson(ensure_ascii=False) }}{{ '</arg_value>GAP' }}{% endfor %}"
        "</tool_call>{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ 'SILENT' if silent else 'PROMPT' }}{% endif %}"
    )
    words = {"GAP": gap, "EMPTY": empty, "PROMPT": prompt, "SILENT": silent_prompt, "SWITCH": switch}
    return functools.reduce(lambda text, word: text.replace(word, words[word]), words, template)


CHAT_TEMPLATES: dict[FormatName, str] = {
    "glm-4-9b-chat": "[gMASK]<sop>{% for m in messages %}{% if m.tools is defined %}{% set tools = m.tools %}"
    + _TOOLS
    + "{% endif %}{% if m.content %}"
    + _TURN
    + "{% endif %}{% endfor %}"
    + _END,
    "glm-4-0414": _systems_first(_TURN, _END),
    # reasoning is cut out of every turn, the last one included
    "glm-z1-0414": _systems_first(
        "<|{{ m.role }}|>{{ m.metadata or '' }}\n{{ m.content.split('</think>')[-1].strip() }}",
        "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>' }}{% endif %}",
    ),
    "glm-4.5": _with_thinking("\\n", "\\n<think></think>", "", "\\n<think></think>", "/nothink"),
    "glm-4.7": _with_thinking("", "</think>", "<think>", "</think>", ""),
}
FORMAT_OF: dict[Architecture, FormatName] = {
    "GlmForCausalLM": "glm-4-9b-chat",
    "Glm4ForCausalLM": "glm-4-0414",
    "Glm4MoeForCausalLM": "glm-4.5",
    "Glm4MoeLiteForCausalLM": "glm-4.7",
}


def tiny_tokenizer(
    architecture: Architecture = "Glm4ForCausalLM", *, chat_format: FormatName | None = None
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer with GLM-4's control tokens and a chat template of our own wording.

    Args:
        architecture: The transformers class, which decides the chat template: that of ``Glm4ForCausalLM`` accepts tools
            as an argument and puts system messages first, that of ``GlmForCausalLM`` reads tools from a message.
        chat_format: The chat format of the template, if not the architecture's first. GLM-4.5 and 4.7 have their
            markers as tokens, as in the checkpoints; in the others they are text.
    Returns:
        A tokenizer whose pad token is ``<|endoftext|>``, as in the family's checkpoints, but which pads on the right.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for piece in _PIECES:
        symbols = byte_level.pre_tokenize_str(piece)[0][0]
        for end in range(1, len(symbols)):
            left, right = symbols[:end], symbols[end]
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append((left, right))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(Regex(_PRE_TOKENS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    name = chat_format or FORMAT_OF[architecture]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    if name in ("glm-4.5", "glm-4.7"):
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKER_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    return tokenizer
