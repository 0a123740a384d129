"""Which models are understood, and how their linears are found from tensor names alone.

`ARCHITECTURES` says what each consists of; `plan/parameters.py` computes names and shapes. A linear
is a block's matrix called `<module>.weight`, except routers. Linears that play the same part
(`STEPS`) under the same parent module read the same input; steps are listed in the order in which
a block executes them. A leaf name that no step knows still works, as a group of its own after the
others. Torch-free.

Fused experts (one tensor [E, 2I, D] or [E, D, I] for all experts of a block) are listed expert by
expert under `...experts.{e}.{gate_proj,up_proj,down_proj}`, gate rows before up rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bitmill.errors import ModelError
from bitmill.plan import parameters
from bitmill.plan.parameters import Parameters, Settings, Shapes, bounded

STEPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "attn.c_attn"),
    ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense"),
    ("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "mlp.c_fc"),
    ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj"),
)
"""Endings of module paths, in execution order; a step's members under one parent are siblings."""

ELEMENTWISE = {3: 2}
"""Step -> the step under the same parent whose outputs, by activation functions and products of
single elements alone, are its inputs; so in every architecture below."""

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Leaf names of matrices that choose experts; they are never quantized."""

HEAD = "lm_head"
"""Module of the output head [V, D]; a tied one need not be stored."""

_MIXTRAL = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)
_MIXTRAL_STORED = (
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
)


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of config.json.

    shapes: names and shapes of its parameters, from the values of a config.json.
    blocks: path of the list of decoder blocks; embedding: the input embedding's parameter.
    tied: whether head and embedding are one matrix unless the config says.
    renames: (pattern, replacement) from stored tensor names to the names of transformers' modules.
    transposed: linears are stored [K, N] (transformers' Conv1D).
    """

    model_type: str
    shapes: Callable[[Settings], Shapes]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    tied: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    transposed: bool = False

    @property
    def base(self) -> str:
        """Module of the bare model inside the causal-LM class; its own checkpoints lack it."""
        return self.blocks.partition(".")[0]

    def renamed(self, stored: str) -> str:
        """The name in transformers' module tree of a stored tensor's name."""
        for pattern, replacement in self.renames:
            stored = re.sub(pattern, replacement, stored)
        return stored

    def stored(self, name: str) -> str:
        """The name in published checkpoints of a parameter of transformers' module tree."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def parameters(self, config: Mapping[str, Any]) -> Parameters:
        """What transformers' model of this config.json consists of."""
        settings = Settings(config)
        return Parameters(
            shapes=bounded(self.shapes(settings)),
            embedding=self.embedding,
            tied=settings.flag("tie_word_embeddings", default=self.tied),
        )


ARCHITECTURES: Mapping[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture("llama", parameters.llama),
        Architecture("mistral", parameters.mistral),
        Architecture("mixtral", parameters.mixtral, renames=_MIXTRAL, spellings=_MIXTRAL_STORED),
        Architecture("qwen2", parameters.qwen2),
        Architecture("qwen3", parameters.qwen3),
        Architecture("qwen3_moe", parameters.qwen3_moe),
        Architecture("gemma2", parameters.gemma2, tied=True),
        Architecture("gemma3_text", parameters.gemma3_text, tied=True),
        Architecture("phi3", parameters.phi3),
        Architecture("stablelm", parameters.stablelm),
        Architecture("starcoder2", parameters.starcoder2, tied=True),
        Architecture(
            "opt",
            parameters.opt,
            blocks="model.decoder.layers",
            embedding="model.decoder.embed_tokens.weight",
            tied=True,
        ),
        Architecture(
            "falcon",
            parameters.falcon,
            blocks="transformer.h",
            embedding="transformer.word_embeddings.weight",
            tied=True,
        ),
        Architecture(
            "bloom",
            parameters.bloom,
            blocks="transformer.h",
            embedding="transformer.word_embeddings.weight",
            tied=True,
        ),
        Architecture(
            "gpt_neox",
            parameters.gpt_neox,
            blocks="gpt_neox.layers",
            embedding="gpt_neox.embed_in.weight",
            renames=((r"^embed_out\.", "lm_head."),),
            spellings=((r"^lm_head\.", "embed_out."),),
        ),
        Architecture(
            "gpt2",
            parameters.gpt2,
            blocks="transformer.h",
            embedding="transformer.wte.weight",
            tied=True,
            transposed=True,
        ),
    )
}


def architecture(model_type: str) -> Architecture:
    """The declaration of a `model_type`; raises `ModelError` listing the known ones."""
    found = ARCHITECTURES.get(model_type)
    if found is None:
        text = f"{model_type}_text"
        alone = f" (its text model alone is, as {text!r})" if text in ARCHITECTURES else ""
        raise ModelError(
            f"model_type {model_type!r} is not supported{alone}; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}. A new one is one line in "
            "bitmill/plan/architectures.py, if transformers itself implements it",
            code="unsupported_architecture",
            param="model_type",
        )
    return found


def step_of(path: str) -> tuple[int, int]:
    """(step, place within it) of a module path; unknown names come after all steps."""
    for step, endings in enumerate(STEPS):
        for place, ending in enumerate(endings):
            if path.endswith("." + ending):
                return step, place
    return len(STEPS), 0


def sibling_key(path: str) -> tuple[int, str]:
    """Linears with the same key read the same input: (step, parent module), or itself alone."""
    step, _ = step_of(path)
    return step, path.rpartition(".")[0] if step < len(STEPS) else path
