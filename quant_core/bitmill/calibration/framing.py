"""How the windows of a text begin and what they are cut from.

    tokenizer  what the tokenizer puts before every text (one token for Gemma and Llama, none for
               SmolLM2), then the next tokens of the text
    none       the next tokens of the text
    chat       the beginning of a conversation in the tokenizer's chat template, whose turns, of
               user and assistant in turn, are the next paragraphs of the text

In all of them the tokens of a window but the first are predicted. A text is used from its start to
its end; what does not fill a window is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from bitmill.config.quantization import Framing
from bitmill.errors import CalibrationError

TURN_CHARACTERS = 2000
"""Longer paragraphs are divided, at spaces."""


def beginning(tokenizer: Any, framing: Framing = "tokenizer") -> list[int]:
    """The special tokens that every window begins with; those of a chat template are not told."""
    if framing != "tokenizer":
        return []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for count in range(len(whole)):
        if plain and whole[count : count + len(plain)] == plain:
            return list(whole[:count])
    return []


def described(tokenizer: Any, framing: Framing) -> str:
    """What a report says of how windows begin."""
    if framing == "chat":
        return "chat template"
    return "".join(tokenizer.convert_ids_to_tokens(beginning(tokenizer, framing))) or "nothing"


def framed(text: str, tokenizer: Any, length: int, framing: Framing) -> list[list[int]]:
    """Windows of `length` tokens each, in the text's order; maybe none.

    Raises `CalibrationError` where there is no chat template, or it refuses the conversation.
    """
    if framing == "chat":
        return _conversations(text, tokenizer, length)
    first = beginning(tokenizer, framing)
    own = max(1, length - len(first))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [first + ids[i : i + own] for i in range(0, len(ids) - own + 1, own)]


def _conversations(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    if not tokenizer.chat_template:
        raise CalibrationError(
            "the tokenizer has no chat template: use the framing 'tokenizer', or a model with one",
            code="no_chat_template",
            param="framing",
        )
    turns = _turns(text)
    counts = [len(ids) for ids in tokenizer(turns, add_special_tokens=False)["input_ids"]]
    windows: list[list[int]] = []
    start = 0
    while start < len(turns):
        stop, found = start, list[int]()
        while len(found) < length and stop < len(turns):
            missing, stop = length - len(found), stop + 2
            while stop < len(turns) and sum(counts[start:stop]) < missing:
                stop += 2
            found = _conversation(turns[start:stop], tokenizer)
        if len(found) >= length:
            windows.append(found[:length])
        start = stop
    return windows


def _conversation(turns: Sequence[str], tokenizer: Any) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise CalibrationError(
            f"the chat template refuses a conversation of user and assistant: {error}",
            code="bad_chat_template",
            param="framing",
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _turns(text: str) -> list[str]:
    paragraphs = (part.strip() for part in re.split(r"\n\s*\n", text))
    turns = []
    for paragraph in paragraphs:
        while len(paragraph) > TURN_CHARACTERS:
            cut = paragraph.rfind(" ", 0, TURN_CHARACTERS)
            cut = cut if cut > 0 else TURN_CHARACTERS
            turns.append(paragraph[:cut])
            paragraph = paragraph[cut:].strip()
        if paragraph:
            turns.append(paragraph)
    return turns
