"""Which stored tensor is which parameter of the architecture, decided from names and shapes alone.

A stored name is a parameter's as it is, behind the base model's prefix that bare checkpoints lack,
or behind the names of wrappers that a model was saved in (compiled, data-parallel, adapter, the
text part of a multimodal model), which are stripped. Every parameter must be found once, as floats
of its shape. What is left over has no place: it is left out with a note where the language model
computes the same without it, else refused by its name. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from bitmill.errors import ModelError
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import Architecture
from bitmill.plan.parameters import Parameters, Shape

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_module",
        "_forward_module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)
"""Parts of names that compiling, parallel and checkpointing wrappers put in, anywhere."""

_PREFIXES = (
    ("base_model.model.", ""),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.model.", "model."),
    ("language_model.", ""),
    ("model.text_model.", "model."),
    ("text_model.", ""),
)
"""Beginnings of names in adapter and multimodal models, and what stands there in a plain one."""

_SEVERAL_TOKENS = "heads that predict several tokens"

_LEFT_OUT = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (
            r"(.*\.)?((\w+_)?inv_freq|(cos|sin)_cache\w*|freqs(_cis)?|position_ids|causal_mask"
            r"|masked_bias|attn_mask)|(.*\.)?rotary\w*\.\w+",
            "buffers that the model computes itself",
        ),
        (r".*\.(attn|attention)\.bias", "buffers that the model computes itself"),
        (r"(.*\.)?decoder\.version", "buffers that the model computes itself"),
        (
            r".*\.((q|k|v|kv|key|value|prob)(_cache)?_(scale|scaling_factor|zero_point)s?"
            r"|[qkv]_proj\.output_scale)",
            "scales of a quantized key-value cache",
        ),
        (
            r"(\w+\.)?(mtp|nextn|next_n|eagle|medusa|draft|multi_token)\w*\..*",
            _SEVERAL_TOKENS,
        ),
        (
            r"(\w+\.)?(v_head|value_?head|critic\w*|reward\w*|regression\w*|rank\w*_head"
            r"|score|classifier|classification_head|cls|qa_outputs|pooler|multiple_choice_head"
            r"|token_classifier|prediction_head|summary)(\..*)?",
            "heads of other tasks",
        ),
        (
            r"(\w+\.)?(vision|visual|vit|image|audio|speech|video|multi_modal|multimodal|mm"
            r"|modality|connector|resampler|perceiver)(_?\w*)\..*",
            "parts for images, sound or video",
        ),
    )
)
"""Whole names of tensors that a language model's logits do not depend on, and what they are."""

_REFUSED = tuple(
    (re.compile(pattern), code, reason)
    for pattern, code, reason in (
        (
            r"(.*\.)?(lora_\w+|ia3_\w+|vera_\w+|oft_\w+|boft_\w+|hada_\w+|lokr_\w+|base_layer"
            r"|adapter\w*|prompt_embeddings|prefix_encoder|modules_to_save|original_module"
            r"|trainable_tokens\w*)(\..*)?",
            "unmerged_adapter",
            "belongs to an adapter that was not merged: merge it into the model first",
        ),
        (
            r".*\.(qweight|qzeros|g_idx|weight_packed|weight_scale\w*|weight_zero_point"
            r"|weight_shape|input_scale|absmax|quant_map|quant_state\..*|scales|zeros|SCB)",
            "already_quantized",
            "says that the model is quantized already: give the full-precision model",
        ),
    )
)
"""Names of tensors that change what the model computes, and what to do about them."""

_PREDICTING = re.compile(r"(eh_proj|enorm|hnorm|shared_head)\.")
"""Modules by which a block past the last one shows that it predicts further tokens."""


@dataclass(frozen=True)
class Placed:
    """A parameter and where it lies.

    name: in a packed checkpoint; module: in transformers' module tree; shape: as transformers has
    it. index: the expert's place in a stack [E, rows, K]; rows: [begin, end) of its rows there.
    """

    name: str
    module: str
    shape: Shape
    stored: TensorInfo
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class SourceTensors:
    """placed: by name in transformers' module tree; left_out: tensors and what they are."""

    placed: Mapping[str, Placed]
    left_out: tuple[tuple[TensorInfo, str], ...]


def place_tensors(
    tensors: Iterable[TensorInfo], found: Architecture, parameters: Parameters
) -> SourceTensors:
    """Give every stored tensor its place; raises `ModelError` naming the first that has none.

    Codes: missing_tensor, missing_blocks, bad_shape, unsupported_dtype, duplicate_tensor,
    unexpected_tensor, unmerged_adapter, already_quantized.
    """
    placed: dict[str, Placed] = {}
    strays = []
    for stored in tensors:
        places = list(_places(stored, found, parameters))
        if not places:
            strays.append(stored)
        for place in places:
            other = placed.setdefault(place.module, place)
            if other is not place:
                raise ModelError(
                    f"{other.stored.name} and {stored.name} mean the same parameter, "
                    f"{place.module}: keep one of them in the files",
                    code="duplicate_tensor",
                    param=stored.name,
                )
    for stored in strays:
        _refuse_known(stored)
    _check_complete(placed, strays, found, parameters)
    left_out = tuple(zip(strays, _reasons(strays, found, parameters), strict=True))
    for module, place in placed.items():
        _check(place, found, parameters.shapes[module])
    return SourceTensors(placed, left_out)


def _spellings(stored: str) -> Iterator[str]:
    """A stored name as it is, then with less and less of what wrappers put before it."""
    yield stored
    name = ".".join(part for part in stored.split(".") if part not in WRAPPERS)
    yield name
    for prefix, instead in _PREFIXES:
        if name.startswith(prefix):
            name = instead + name.removeprefix(prefix)
            yield name
    yield name.removeprefix("model.")


def _places(stored: TensorInfo, found: Architecture, parameters: Parameters) -> Iterator[Placed]:
    """Where a stored tensor belongs: one parameter, those of all experts of a stack, or none."""
    for name in _spellings(stored.name):
        for prefix in ("", f"{found.base}."):
            module = prefix + found.renamed(name)
            if module in parameters.shapes:
                yield Placed(prefix + name, module, stored.shape, stored)
                return
            experts = list(_experts(module, stored))
            if experts and experts[0].module in parameters.shapes:
                yield from experts
                return


def _experts(module: str, stored: TensorInfo) -> Iterator[Placed]:
    """The linears of a stack of experts: [E, 2I, D] holds gate above up, [E, D, I] down."""
    parent, _, leaf = module.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf)
    if parts is None or not parent.endswith(".experts") or len(stored.shape) != 3:
        return
    count, rows, columns = stored.shape
    step = rows // len(parts)
    for expert in range(count):
        for place, part in enumerate(parts):
            name = f"{parent}.{expert}.{part}.weight"
            window = (place * step, (place + 1) * step)
            yield Placed(name, name, (step, columns), stored, expert, window)


def _refuse_known(stored: TensorInfo) -> None:
    for pattern, code, reason in _REFUSED:
        if pattern.fullmatch(stored.name):
            raise ModelError(f"{stored.name} {reason}", code=code, param=stored.name)


def _check_complete(
    placed: Mapping[str, Placed],
    strays: list[TensorInfo],
    found: Architecture,
    parameters: Parameters,
) -> None:
    """Refuse a checkpoint that lacks a parameter, saying what its names look like instead."""
    missing = parameters.missing(placed)
    if not missing:
        return
    name, kind = missing[0], found.model_type
    prefix = _prefix_of(name, strays, found)
    if prefix is not None:
        raise ModelError(
            f"tensor names begin with {prefix!r} where a {kind} model has {name}: save the model "
            "itself, not what it is wrapped in",
            code="missing_tensor",
            param=prefix + name,
        )
    have, expected = _blocks(placed, found), _blocks(parameters.shapes, found)
    if have < expected:
        raise ModelError(
            f"config.json promises {len(expected)} decoder blocks; the checkpoint has "
            f"{found.blocks} ({len(have)}). Fetch the model again",
            code="missing_blocks",
        )
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    raise ModelError(
        f"the checkpoint has no {name}{more}, which a {kind} model of this config.json needs: "
        "fetch the model again",
        code="missing_tensor",
        param=name,
    )


def _prefix_of(name: str, strays: Iterable[TensorInfo], found: Architecture) -> str | None:
    """What stands before a missing parameter's name in the source, if anything does."""
    for stored in strays:
        renamed = found.renamed(stored.name)
        for ending in (name, name.removeprefix(f"{found.base}.")):
            if renamed.endswith("." + ending):
                return renamed.removesuffix(ending)
    return None


def _block_of(module: str, found: Architecture) -> int | None:
    """Number of the decoder block that a name lies in."""
    index = module.removeprefix(f"{found.blocks}.").partition(".")[0]
    return int(index) if module.startswith(f"{found.blocks}.") and index.isdecimal() else None


def _blocks(modules: Iterable[str], found: Architecture) -> set[int]:
    return {block for name in modules if (block := _block_of(name, found)) is not None}


def _reasons(
    strays: list[TensorInfo], found: Architecture, parameters: Parameters
) -> Iterator[str]:
    """Why tensors without a place may be left out; raises `ModelError` for one that may not."""
    names = [found.renamed(list(_spellings(stored.name))[-1]) for stored in strays]
    full = [n if n.startswith(f"{found.base}.") else f"{found.base}.{n}" for n in names]
    count = len(_blocks(parameters.shapes, found))
    predicting = {_block_of(name, found) for name in full if _PREDICTING.search(name)}
    for stored, name, module in zip(strays, names, full, strict=True):
        block = _block_of(module, found)
        reason = next((why for pattern, why in _LEFT_OUT if pattern.fullmatch(name)), None)
        if reason is None and block is not None and block >= count:
            if block not in predicting:
                raise ModelError(
                    f"config.json says {count} decoder blocks, the source stores {stored.name} "
                    "too: correct num_hidden_layers, or take further blocks out of the files",
                    code="unexpected_tensor",
                    param=stored.name,
                )
            reason = _SEVERAL_TOKENS
        if reason is None:
            _refuse(stored, {name, module}, found, parameters)
        yield reason


def _refuse(
    stored: TensorInfo, spellings: set[str], found: Architecture, parameters: Parameters
) -> NoReturn:
    what = f"a {found.model_type} model of this config.json has no place for it"
    for name in spellings:
        path, _, leaf = name.rpartition(".")
        if f"{path}.weight" in parameters.shapes:
            what = f"by config.json, {path} has no {leaf}"
    raise ModelError(
        f"the source stores {stored.name}; {what}, and without it the model would compute "
        "something else: correct config.json, or take the tensor out of the files",
        code="unexpected_tensor",
        param=stored.name,
    )


def _check(place: Placed, found: Architecture, shape: Shape) -> None:
    if place.shape != shape:
        raise ModelError(
            f"{place.module} has the shape {place.shape}, the config asks for {shape}",
            code="bad_shape",
            param=place.stored.name,
        )
    if place.stored.dtype not in FLOATS:
        raise ModelError(
            f"{place.stored.name} is stored as {place.stored.dtype}; a {found.model_type} model "
            f"needs one of {', '.join(sorted(FLOATS))}",
            code="unsupported_dtype",
            param=place.stored.name,
        )
