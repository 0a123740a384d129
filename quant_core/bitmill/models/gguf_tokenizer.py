"""The tokenizer of a GGUF file, held against what the file's header says.

transformers builds it, and releases differ: some cut every word of a Gemma file into fragments, and
some leave out the token that a text begins with. A model measured or calibrated with such a
tokenizer is another model. So what was built must give the header's own words back, and begins and
ends texts as llama.cpp does (`llama_vocab::impl::load`: a flag that the header lacks has a default
for each kind of tokenizer).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from bitmill.errors import ModelError, raise_resource_error
from bitmill.formats.gguf.tokenizer import CONTROL, NORMAL, USER_DEFINED
from bitmill.io.gguf import GgufHeader, read_gguf_header
from bitmill.models.tokenizer import load_tokenizer

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_WORD = re.compile("([▁Ġ]?)([A-Za-z]{2,})")
"""A token of letters, which stand for themselves in SentencePiece and byte-level vocabularies;
the mark before them is a space."""

_SAMPLE = 2000
_MOST_WRONG = 0.05
"""Share of words that may come back as others: merges do not reach every token of some models."""

_BEGIN_WITH_BOS = (
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("jina-v5-nano", "tekken", "chameleon"),
)
"""Pre-tokenizers of byte-level files without the flag that llama.cpp adds a first token for."""

_DEFAULT_IDS: dict[Any, tuple[int | None, int | None]] = {
    "llama": (1, 2),
    "gpt2": (11, 11),
    "t5": (None, 1),
}
"""llama.cpp's first and last token where the header names none."""


@dataclass(frozen=True)
class _Told:
    """What a header says. tokens: texts by id; special: ids of "bos" and "eos"; begin, end: the
    tokens around every text."""

    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    begin: list[int]
    end: list[int]

    @classmethod
    def of(cls, header: GgufHeader) -> _Told:
        settings = header.settings
        tokens = settings.get(_TOKENS)
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise _refuse(header.path, f"its header has no list of texts as {_TOKENS}")
        types = settings.get(_TYPES)
        if not isinstance(types, list) or len(types) != len(tokens):
            types = [NORMAL] * len(tokens)
        kind = settings.get("tokenizer.ggml.model")
        begins = kind == "llama" or settings.get("tokenizer.ggml.pre") in _BEGIN_WITH_BOS
        ids = _DEFAULT_IDS.get(kind, (None, None))
        special, around = {}, []
        for name, default, place in (("bos", begins, ids[0]), ("eos", kind == "t5", ids[1])):
            key = f"tokenizer.ggml.{name}_token_id"
            found = settings.get(key, place)
            wanted = settings.get(f"tokenizer.ggml.add_{name}_token", default)
            if key in settings or (wanted and found is not None):
                if type(found) is not int or not 0 <= found < len(tokens):
                    raise _refuse(
                        header.path,
                        f"{key} is {str(found)[:60]}, but it has {len(tokens)} tokens",
                    )
                special[name] = found
            around.append([special[name]] if wanted and name in special else [])
        return cls(tokens, types, special, *around)


def save_gguf_tokenizer(path: Path, folder: Path) -> None:
    """Write the tokenizer of a GGUF file to the folder of its config.json.

    What comes out of the folder again is what was checked. Raises `ModelError`: code
    `gguf_tokenizer` where the installed transformers builds another tokenizer than the header's.
    """
    told = _Told.of(read_gguf_header(path, whole=(_TOKENS, _TYPES)))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        _put_right(tokenizer, told)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise_resource_error(error)
        raise _refuse(path, f"{' '.join(str(error).split())[:500]}") from error
    made = load_tokenizer(folder)
    try:
        _check(made, told, path)
    except ModelError:
        raise
    except Exception as error:
        raise_resource_error(error)
        raise _refuse_release(path, f"it fails: {' '.join(str(error).split())[:300]}") from error


def _put_right(tokenizer: Any, told: _Told) -> None:
    """Begin and end texts as the header says, and keep its special tokens whole."""
    backend = tokenizer.backend_tokenizer
    for place, (token, kind) in enumerate(zip(told.tokens, told.types, strict=True)):
        if kind not in (CONTROL, USER_DEFINED) or backend.token_to_id(token) != place:
            continue
        if _plain(tokenizer, token) != [place]:
            tokenizer.add_tokens([token], special_tokens=kind == CONTROL)
    for name, place in told.special.items():
        if getattr(tokenizer, f"{name}_token_id") != place:
            setattr(tokenizer, f"{name}_token", backend.id_to_token(place))
    if _around(tokenizer) != (told.begin, told.end):
        tokenizer.add_bos_token, tokenizer.add_eos_token = bool(told.begin), bool(told.end)


def _check(tokenizer: Any, told: _Told, path: Path) -> None:
    words = [
        (place, " " * bool(word[1]) + word[2])
        for place, (token, kind) in enumerate(zip(told.tokens, told.types, strict=True))
        if kind == NORMAL and (word := _WORD.fullmatch(token))
    ]
    words = words[:: -(-len(words) // _SAMPLE) or 1]
    # Behind the end of a line, where no tokenizer puts a space of its own.
    found = {place: _plain(tokenizer, f"\n{text}") for place, text in words}
    wrong = [place for place, _ in words if found[place][-1:] != [place]]
    if len(wrong) > _MOST_WRONG * len(words):
        pieces = tokenizer.convert_ids_to_tokens(found[wrong[0]])
        raise _refuse_release(
            path,
            f"{len(wrong)} of {len(words)} words of its vocabulary come back as others, such as "
            f"{told.tokens[wrong[0]]!r} as {pieces}",
        )
    if _around(tokenizer) != (told.begin, told.end):
        raise _refuse_release(
            path,
            f"texts begin and end with the tokens {_around(tokenizer)}, and should with "
            f"{(told.begin, told.end)}",
        )


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before and behind a text."""
    plain, whole = _plain(tokenizer, "a"), tokenizer("a")["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return whole[:begin], whole[begin + len(plain) :]
    return whole, []


def _refuse(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"{path.name} cannot be converted: {problem}", code="bad_gguf", param=path.name
    )


def _refuse_release(path: Path, problem: str) -> ModelError:
    return ModelError(
        f"transformers {transformers.__version__} builds another tokenizer than {path.name} "
        f"describes: {problem}",
        code="gguf_tokenizer",
        param=path.name,
        hint="Install transformers 5.18.0 or newer, the first to read Gemma's files rightly, or "
        "use the model's safetensors files.",
    )
