"""Which models are understood, and how their blocks and linears are found from tensor names alone.

A decoder block is whatever shares the prefix `<path>.<index>.` where the indices run over the
config's number of layers; a linear is a block's float matrix called `<module>.weight`, except
routers. Linears that play the same part (`STAGES`) under the same parent module read the same
input; stages are listed in the order in which a block executes them. A new architecture is one
line in `ARCHITECTURES`, usually without an argument; a leaf name that no stage knows still works,
as a group of its own after the others. Torch-free.

Fused experts (one tensor [E, 2I, D] or [E, D, I] for all experts of a block) are listed expert by
expert under `...experts.{e}.{gate_proj,up_proj,down_proj}`, gate rows before up rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bitmill.errors import ModelError

STAGES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "attn.c_attn"),
    ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense"),
    ("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "mlp.c_fc"),
    ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj"),
)
"""Endings of module paths, in execution order; a stage's members under one parent are siblings."""

ELEMENTWISE = {3: 2}
"""Stage -> the stage under the same parent whose outputs, by activation functions and products of
single elements alone, are its inputs; so in every architecture below."""

ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Leaf names of matrices that choose experts; they are never quantized."""

EMBEDDINGS = frozenset({"embed_tokens", "word_embeddings", "embed_in", "wte"})
"""Leaf names of the input embedding [V, D]."""

HEAD = "lm_head"
"""Module of the output head [V, D]; a tied one is not stored."""

_MIXTRAL = (
    (r"\.block_sparse_moe\.", ".mlp."),
    (r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj."),
    (r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj."),
    (r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj."),
)


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of config.json.

    base: module of the bare model inside the causal-LM class; checkpoints of the bare model leave
          it out of their names, and it is put back.
    renames: (pattern, replacement) from stored tensor names to the names of transformers' modules.
    transposed: linears are stored [K, N] (transformers' Conv1D).
    """

    model_type: str
    base: str = "model"
    renames: tuple[tuple[str, str], ...] = ()
    transposed: bool = False

    def names(self, stored: str) -> tuple[str, str]:
        """(name in a packed checkpoint, name in transformers' module tree) of a stored tensor.

        The first is the stored name itself, with the base module's prefix put back if it lacks it.
        """
        module = stored
        for pattern, replacement in self.renames:
            module = re.sub(pattern, replacement, module)
        if module.startswith((self.base + ".", "lm_head.")):
            return stored, module
        return f"{self.base}.{stored}", f"{self.base}.{module}"


ARCHITECTURES: Mapping[str, Architecture] = {
    a.model_type: a
    for a in (
        Architecture("llama"),
        Architecture("mistral"),
        Architecture("mixtral", renames=_MIXTRAL),
        Architecture("qwen2"),
        Architecture("qwen3"),
        Architecture("qwen3_moe"),
        Architecture("gemma2"),
        Architecture("gemma3_text"),
        Architecture("phi3"),
        Architecture("opt"),
        Architecture("falcon", base="transformer"),
        Architecture("bloom", base="transformer"),
        Architecture("gpt_neox", base="gpt_neox", renames=((r"^embed_out\.", "lm_head."),)),
        Architecture("gpt2", base="transformer", transposed=True),
        Architecture("stablelm"),
        Architecture("starcoder2"),
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
            "bitmill/architectures.py, if transformers itself implements it",
            code="unsupported_architecture",
            param="model_type",
        )
    return found


_INDEXED = re.compile(r"(.+?)\.(\d+)\.")


def block_prefix(names: Iterable[str], block_count: int) -> str:
    """Path of the list of decoder blocks, e.g. "model.layers".

    names: module names of all tensors. Raises `ModelError` where no path has exactly the blocks
    0..block_count-1.
    """
    indices: dict[str, set[int]] = {}
    for name in names:
        if match := _INDEXED.match(name):
            indices.setdefault(match[1], set()).add(int(match[2]))
    expected = set(range(block_count))
    for prefix, found in indices.items():
        if found == expected:
            return prefix
    seen = ", ".join(f"{prefix} ({len(found)})" for prefix, found in sorted(indices.items()))
    raise ModelError(
        f"config.json promises {block_count} decoder blocks; the checkpoint has {seen or 'none'}. "
        "Fetch the model again",
        code="missing_blocks",
    )


def stage_of(path: str) -> tuple[int, int]:
    """(stage, place within it) of a module path; unknown names come after all stages."""
    for stage, endings in enumerate(STAGES):
        for place, ending in enumerate(endings):
            if path.endswith("." + ending):
                return stage, place
    return len(STAGES), 0


def sibling_key(path: str) -> tuple[int, str]:
    """Linears with the same key read the same input: (stage, parent module), or itself alone."""
    stage, _ = stage_of(path)
    return stage, path.rpartition(".")[0] if stage < len(STAGES) else path
