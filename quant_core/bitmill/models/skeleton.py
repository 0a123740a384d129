"""transformers' model of a config.json without weights: all of it on the meta device.

What a plan takes from `plan/parameters.py` is held against it before a job computes anything:
whether transformers accepts the configuration at all, and whether the model has exactly the
parameters that the plan found. Run as a program it does so for another process that loads no torch:

    python -m bitmill.models.skeleton < config.json

prints {"code", "message", "param"} and ends with 2 where the configuration is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from bitmill.errors import InputError, ModelError, raise_resource_error
from bitmill.models.experts import unfuse_experts
from bitmill.plan.architectures import architecture
from bitmill.plan.parameters import Parameters

GENERATION_FILE = "generation_config.json"


def build_skeleton(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model of a sanitized config, all on the meta device.

    Raises `ModelError` (bad_config) with the reason that transformers gives.
    """
    try:
        config = transformers.AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise_resource_error(error)
        raise ModelError(
            f"transformers cannot build a {settings['model_type']} model from config.json: "
            f"{' '.join(str(error).split())[:500]}",
            code="bad_config",
            param="config.json",
        ) from error
    return model.eval().requires_grad_(False)


def skeleton_parameters(model: Any) -> Parameters:
    """The parameters of a skeleton, whose stacked experts are replaced by lists."""
    unfuse_experts(model)
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    embedding = model.get_input_embeddings().weight
    name = next(n for n, value in model.named_parameters() if value is embedding)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Parameters(shapes, name, bool(ties))


def check_skeleton(settings: dict[str, Any]) -> None:
    """Raise `ModelError` unless transformers builds the model that a plan assumes.

    settings: a sanitized config.json of a supported architecture.
    """
    expected = architecture(settings["model_type"]).parameters(settings)
    found = skeleton_parameters(build_skeleton(settings, torch.float32))
    for name in sorted(expected.shapes.keys() | found.shapes.keys()):
        if expected.shapes.get(name) != found.shapes.get(name):
            raise ModelError(
                f"transformers {transformers.__version__} builds {name} with the shape "
                f"{found.shapes.get(name)}, expected was {expected.shapes.get(name)}: config.json "
                "has settings that Bitmill does not know",
                code="bad_config",
                param="config.json",
            )
    if (expected.embedding, expected.tied) != (found.embedding, found.tied):
        raise ModelError(
            f"transformers {transformers.__version__} ties head and embedding otherwise than "
            "expected: config.json has settings that Bitmill does not know",
            code="bad_config",
            param="tie_word_embeddings",
        )


def check_generation(folder: Path) -> None:
    """Raise `ModelError` where transformers refuses a model's generation_config.json.

    It travels to the packed folder, where `from_pretrained` reads it. One that is absent or no JSON
    is passed over there.
    """
    if not (folder / GENERATION_FILE).is_file():
        return
    try:
        transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        return
    except Exception as error:
        raise_resource_error(error)
        raise ModelError(
            f"transformers refuses {GENERATION_FILE}: {' '.join(str(error).split())[:500]}",
            code="bad_config",
            param=GENERATION_FILE,
        ) from error


def main() -> int:
    """Check the config on standard input."""
    transformers.utils.logging.set_verbosity_error()
    try:
        check_skeleton(json.load(sys.stdin))
    except InputError as error:
        answer = {"code": error.code, "message": error.message, "param": error.param}
        sys.stdout.write(json.dumps(answer))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
