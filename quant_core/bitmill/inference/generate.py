"""Text from a model, token by token.

    next token ~ softmax(logits / temperature), or the most likely one at temperature 0

Text is handed out as soon as the tokens that spell it are complete: a character whose bytes are
spread over several tokens waits for the last of them.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.calibration.windows import check_token_ids
from bitmill.errors import InputError, ModelError, absent
from bitmill.inference.load import is_packed, load, load_plain
from bitmill.inference.positions import check_positions
from bitmill.models.convert_gguf import convert_gguf
from bitmill.models.tokenizer import load_tokenizer
from bitmill.plan.config_json import CONFIG_FILE
from bitmill.runtime.device import device_of

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def stream(
    folder: str | Path,
    prompt: str,
    *,
    gguf: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces, without the prompt.

    folder: a packed model, a model's own, or an export. gguf: name of the GGUF file in it that
    holds the model. chat: put the prompt into the tokenizer's chat template as the user's message.

    Raises ModelError for a file that cannot be read, InputError for an empty prompt, one that is
    too long for a model with learned positions, a negative temperature or number of tokens, or a
    chat template that the tokenizer has not; FormatError where the folder cannot
    be loaded.
    """
    for what, value in {"temperature": temperature, "max_new_tokens": max_new_tokens}.items():
        if not 0 <= value < math.inf:
            raise InputError(f"{what} is {value}: give 0 or more", param=what)
    device = device_of(device)
    with tempfile.TemporaryDirectory(prefix="bitmill-generate-") as scratch:
        folder = Path(folder)
        if gguf is not None:
            convert_gguf(folder / gguf, Path(scratch, "model"))
            folder = Path(scratch, "model")
        if not (folder / CONFIG_FILE).is_file():
            raise ModelError(f"{absent(folder / CONFIG_FILE)}: give the folder of a model")
        tokenizer = load_tokenizer(folder)
        tokens = _encode(tokenizer, prompt, chat)
        ready = load if is_packed(folder) else load_plain
        model = ready(folder, device=device, dtype=dtype)
    rows = model.config.get_text_config().vocab_size
    check_token_ids(tokens[0].tolist(), tokenizer, rows, "prompt")
    length = tokens.shape[1] + max(max_new_tokens - 1, 0)
    check_positions(model, length, "the prompt with max_new_tokens - 1")
    generator = torch.Generator().manual_seed(seed)
    ids = _sample(model, tokens.to(device), max_new_tokens, temperature, generator)
    return _pieces(tokenizer, ids)


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids int64 [1, T] of a prompt."""
    if chat:
        if not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template: leave `chat` off", param="chat")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat)
    tokens: Tensor = encoded["input_ids"].long()
    if tokens.shape[1] == 0:
        raise InputError("the prompt holds no tokens: give some text", param="prompt")
    return tokens


def _sample(
    model: Any, tokens: Tensor, count: int, temperature: float, generator: torch.Generator
) -> Iterator[int]:
    """Up to `count` token ids, ending before an end-of-sequence token."""
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    cache = None
    for _ in range(count):
        with torch.inference_mode():
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = _choose(output.logits[0, -1].float().cpu(), temperature, generator)
        if token in stop:
            return
        yield token
        tokens = torch.tensor([[token]], device=tokens.device)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _pieces(tokenizer: Any, ids: Iterator[int]) -> Iterator[str]:
    """New text after each token; held back while its last character is incomplete."""
    seen: list[int] = []
    told = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen, skip_special_tokens=True)
        if not text.endswith(_INCOMPLETE) and len(text) > len(told):
            yield text[len(told) :]
            told = text
    rest = tokenizer.decode(seen, skip_special_tokens=True)[len(told) :] if seen else ""
    if rest:
        yield rest
