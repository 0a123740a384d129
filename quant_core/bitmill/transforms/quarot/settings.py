"""Settings of transform "quarot", and the models that it makes. Torch-free.

What is exact follows from where norms stand. A norm in front of linears commutes with a rotation of
the stream once its factors are in those linears. A norm behind them, or behind the embedding,
scales the stream itself channel by channel, and no weight comes after it to hold its factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from bitmill.config.bit_width_map import LinearShape
from bitmill.errors import ModelError
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.parameters import HEAD_WEIGHT
from bitmill.plan.source_model import SourceModel, SourceTransform
from bitmill.plan.source_tensors import Placed, place_tensors

Part = Literal["residual", "values"]

_MADE_WHILE_RUNNING = (
    "{!r} would have to be rotated while the model runs: {}. A runtime has no place for that; "
    "rotations inside groups, which a format says it has a place for, are transform 'rotation'"
)
_ONLINE = {
    "queries": "rotary positions stand between the weights and what is rotated",
    "keys": "rotary positions stand between the weights and what is rotated",
    "down": "an activation function stands between the weights and what is rotated",
}


@dataclass(frozen=True)
class Stream:
    """Where a model reads its residual stream and where it writes it.

    norms: names in a block, before attention and before the MLP; one where both read the first.
    last: before the head. embeddings: whatever the stream begins with.
    """

    norms: tuple[str, ...]
    last: str
    embeddings: tuple[str, ...]


_LLAMA = Stream(
    ("input_layernorm", "post_attention_layernorm"), "model.norm", ("model.embed_tokens.weight",)
)
_NEOX = replace(_LLAMA, last="gpt_neox.final_layer_norm", embeddings=("gpt_neox.embed_in.weight",))
_GPT2 = Stream(
    ("ln_1", "ln_2"), "transformer.ln_f", ("transformer.wte.weight", "transformer.wpe.weight")
)
_BEHIND = (
    "the norms behind attention and MLP scale what is added to the stream channel by channel, and "
    "no weight comes after them to hold that"
)
STREAMS: dict[str, Stream | str] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"), _LLAMA),
    **dict.fromkeys(("phi3", "stablelm", "starcoder2"), _LLAMA),
    "gpt_neox": _NEOX,
    "gpt2": _GPT2,
    "gemma2": _BEHIND,
    "gemma3_text": _BEHIND,
    "bloom": "the norm behind the embedding scales the stream channel by channel, and no weight "
    "comes after it to hold that",
    "opt": "its norms may stand behind the blocks, and its embedding behind a projection; that is "
    "not handled",
    "falcon": "its norms stand elsewhere from one size to the next; that is not handled",
}
"""model_type -> its stream, or why it is not rotated."""

VALUES: dict[str, str | None] = {
    **dict.fromkeys(STREAMS, None),
    **dict.fromkeys(
        ("gpt_neox", "bloom", "falcon"),
        "values lie between queries and keys in one projection, head by head; that is not handled",
    ),
}
"""model_type -> why heads of values are not rotated, None where they are."""


class QuaRot(SourceTransform):
    """Rotations of the residual stream and of each head of values, folded into the weights.

    parts: which of the two.
    """

    name: ClassVar[str] = "quarot"
    transform: ClassVar[str] = "bitmill.transforms.quarot.folding:Folding"

    parts: tuple[Part, ...] = Field(default=("residual", "values"), min_length=1)

    @field_validator("parts", mode="before")
    @classmethod
    def _of_weights_alone(cls, parts: Any) -> Any:
        for part in parts if isinstance(parts, list | tuple) else ():
            if isinstance(part, str) and part in _ONLINE:
                raise ValueError(_MADE_WHILE_RUNNING.format(part, _ONLINE[part]))
        return parts

    def stored(self, shape: LinearShape) -> tuple[TensorInfo, ...]:
        return ()

    def rewritten(self, source: SourceModel) -> SourceModel:
        """The same tensors under the names of published checkpoints. A tied head is untied where
        the stream is rotated: the factors of the last norm are in the head, not in the embedding.
        """
        self._refuse(source.architecture.model_type)
        placed, settings = places(source), source.settings
        tied = source.architecture.parameters(settings).tied
        if "residual" in self.parts and tied:
            settings = settings | {"tie_word_embeddings": False}
            embedding = source.architecture.embedding
            one = placed.get(embedding) or placed[HEAD_WEIGHT]
            for module in (embedding, HEAD_WEIGHT):
                name = source.architecture.stored(module)
                placed.setdefault(module, replace(one, name=name, module=module))
        stored = [
            TensorInfo(stored_name(source, one), one.stored.dtype, one.shape)
            for one in placed.values()
        ]
        return SourceModel(settings, source.architecture, tuple(stored))

    def _refuse(self, model_type: str) -> None:
        stream = STREAMS.get(model_type, "it is not known where its norms stand")
        reasons = {"residual": stream if isinstance(stream, str) else None}
        reasons["values"] = VALUES.get(model_type, "it is not known where its values lie")
        for part in self.parts:
            reason = reasons[part]
            if reason is None:
                continue
            others = [other for other, why in reasons.items() if why is None]
            instead = f"give parts {others}" if others else "leave this transform out"
            raise ModelError(
                f"transform {self.name!r} cannot rotate {part!r} of a {model_type} model: {reason}:"
                f" {instead}",
                code="transform_refuses",
                param="refinement.transforms",
            )


def places(source: SourceModel) -> dict[str, Placed]:
    """Where every parameter lies, by its name in the module tree."""
    parameters = source.architecture.parameters(source.settings)
    return dict(place_tensors(source.stored, source.architecture, parameters).placed)


def stored_name(source: SourceModel, place: Placed) -> str:
    """The name of a parameter in the model that is made: of its own, for an expert of a stack."""
    return place.name if place.index is None else source.architecture.stored(place.module)
