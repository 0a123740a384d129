"""Which files of a model folder travel with its weights. Torch-free.

One list for fetching a repository and for copying into a packed folder: what transformers saves
beside weights (tokenizers, chat templates, generation and processor settings), and licences and
notices under the names that publishers use, in upper and lower case alike. It is a list of what is
allowed, so that a file which can run code never travels, whatever it is called.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

_NAMES = frozenset(
    {
        "added_tokens.json",
        "audio_tokenizer_config.json",
        "bpe.codes",
        "byte_maps.json",
        "chat_template.jinja",
        "chat_template.json",
        "dict.txt",
        "emoji.json",
        "entity_vocab.json",
        "generation_config.json",
        "merges.txt",
        "normalizer.json",
        "preprocessor_config.json",
        "processor_config.json",
        "prophetnet.tokenizer",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "source.spm",
        "special_tokens_map.json",
        "spiece.model",
        "spm.model",
        "spm_char.model",
        "target.spm",
        "target_vocab.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab-src.json",
        "vocab-tgt.json",
        "vocab.json",
        "vocab.txt",
        "word_pronunciation.json",
        "word_shape.json",
    }
)
"""Names that transformers' tokenizers, processors and generation settings are saved under."""

_VERSIONED = re.compile(r"tokenizer\.model\.v\d{1,2}[a-z]?|[\w-]{1,64}\.tiktoken")
"""Tokenizers whose file name says a version or the model's name (Mistral, Qwen)."""

_TEMPLATE_FOLDER = "additional_chat_templates"
_LICENCE_FOLDERS = frozenset({"licenses", "licences"})
_LICENCE = re.compile(
    r"(un)?licen[cs]es?|copying|copyright|notices?|use[_-]policy|acceptable[_-]use([_-]policy)?"
    r"|third[_-]?party[_-]?(notices?|licen[cs]es?)"
)
_SENDABLE = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}", re.ASCII)
_SENT = frozenset({".safetensors", ".gguf", ".json", ".jinja", ".txt"})
_TEXT = frozenset({"", ".txt", ".md", ".rst", ".pdf"})


def is_companion(path: str) -> bool:
    """Whether a file travels; path: relative to the model folder, parts joined by "/"."""
    parts = PurePosixPath(path).parts
    if len(parts) == 1:
        return path in _NAMES or _VERSIONED.fullmatch(path) is not None or is_licence(path)
    if len(parts) != 2:
        return False
    folder, name = parts
    if folder == _TEMPLATE_FOLDER:
        return PurePosixPath(name).suffix == ".jinja"
    return folder.lower() in _LICENCE_FOLDERS and _is_text(name.lower())


def may_be_sent(path: str) -> bool:
    """Whether a file of a model, or of learned parameters, may be uploaded to a service.

    Weights, JSON and text that belong to one; never what runs code when it is opened.
    """
    name = PurePosixPath(path)
    plain = _SENDABLE.fullmatch(path) is not None and name.suffix in _SENT
    return plain or path == "SHA256SUMS" or (is_companion(path) and ".." not in name.parts)


def is_licence(name: str) -> bool:
    """Whether a file name is that of a licence, a notice or a use policy."""
    lower = name.lower()
    stem = _LICENCE.match(lower)
    if stem is None:
        return False
    rest = lower[stem.end() :]
    return not rest or (rest[0] in "._- " and _is_text(lower))


def companions(folder: Path) -> list[str]:
    """Paths of the companions in a folder, relative to it, sorted; links count as their files."""
    places = [*folder.iterdir(), *folder.glob("*/*")]
    found = [place.relative_to(folder).as_posix() for place in places if place.is_file()]
    return sorted(path for path in found if is_companion(path))


def _is_text(name: str) -> bool:
    """Whether the ending says text; the number in LICENSE-2.0 is no ending."""
    suffix = PurePosixPath(name).suffix
    return suffix in _TEXT or suffix[1:].isdecimal()
