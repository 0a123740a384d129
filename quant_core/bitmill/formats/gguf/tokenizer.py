"""The tokenizer of a GGUF header, from tokenizer.json. Torch-free.

Byte-level BPE ("gpt2" in llama.cpp's words) takes tokens and merges; BPE over characters with a
fallback to bytes ("llama", a SentencePiece model) takes tokens and scores, the highest of which is
merged first: minus the rank of the merge.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitmill.errors import FormatError
from bitmill.io.atomic import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PRETOKENIZERS = {"qwen2": "qwen2", "qwen3": "qwen2"}
_NEVER_MERGED = -1e9


def tokenizer_settings(
    folder: Path, config: dict[str, Any], pretokenizer: str | None
) -> dict[str, Any]:
    """Settings below `tokenizer.`, by name. Raises FormatError for a tokenizer of another kind."""
    path = folder / "tokenizer.json"
    found = read_json(path) if path.is_file() else {}
    model = found.get("model") or {}
    if model.get("type") != "BPE":
        raise FormatError(
            f"{folder.name} has no tokenizer.json of type BPE, which a GGUF file needs: "
            'export with {"tokenizer": false} for a file without tokenizer',
            code="no_tokenizer",
            param="tokenizer",
        )
    added = {token["id"]: token for token in found.get("added_tokens") or ()}
    tokens, types = _tokens(model, added, int(config["vocab_size"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or ()]
    settings: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    if model.get("byte_fallback"):
        settings |= {"ggml.model": "llama", "ggml.scores": _scores(tokens, merges)}
        settings["ggml.add_space_prefix"] = "Prepend" in str(found.get("normalizer")) or (
            "always" in str(found.get("pre_tokenizer"))
        )
    else:
        pre = pretokenizer or PRETOKENIZERS.get(str(config["model_type"]), "default")
        settings |= {"ggml.model": "gpt2", "ggml.pre": pre, "ggml.merges": merges}
    return settings | _special(folder, config)


def _tokens(
    model: dict[str, Any], added: dict[int, dict[str, Any]], count: int
) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids without a token are unused."""
    by_id = {place: text for text, place in model["vocab"].items()}
    by_id |= {place: token["content"] for place, token in added.items()}
    tokens, types = [], []
    for place in range(max(count, len(by_id))):
        text = by_id.get(place, f"[PAD{place}]")
        kind = NORMAL if place in by_id else UNUSED
        if place in added:
            kind = CONTROL if added[place].get("special") else USER_DEFINED
        elif text == model.get("unk_token"):
            kind = UNKNOWN
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            kind = BYTE
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        ranks.setdefault(left + right, rank)
    return [float(-ranks[text]) if text in ranks else _NEVER_MERGED for text in tokens]


def _special(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, key in (
        ("bos_token_id", "ggml.bos_token_id"),
        ("eos_token_id", "ggml.eos_token_id"),
        ("pad_token_id", "ggml.padding_token_id"),
    ):
        value = config.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            found[key] = value
    path = folder / "tokenizer_config.json"
    own = read_json(path) if path.is_file() else {}
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(own.get(name), bool):
            found[f"ggml.{name}"] = own[name]
    template = folder / "chat_template.jinja"
    text = template.read_text() if template.is_file() else own.get("chat_template")
    if isinstance(text, str):
        found["chat_template"] = text
    return found
