"""Whether a packed folder holds every tensor of its model and no other, from headers alone.

For engines that do not count what they load. transformers' loader does (`inference/load.py`).
"""

from __future__ import annotations

from pathlib import Path

from bitmill.config.bit_width_map import LinearShape
from bitmill.errors import FormatError, ModelError
from bitmill.formats.packed.checkpoint import PackedCheckpoint
from bitmill.formats.writing import CONFIG_NAME
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import TensorInfo
from bitmill.plan.architectures import architecture
from bitmill.plan.config_json import sanitize
from bitmill.plan.parameters import HEAD_WEIGHT
from bitmill.plan.source_tensors import place_tensors


def check_complete(folder: Path) -> None:
    """Raise FormatError naming a tensor that is missing, superfluous, or of another dtype or shape.

    Headers are read, values are not. Raises ModelError for an unknown architecture.
    """
    checkpoint = PackedCheckpoint.open(folder)
    config = sanitize(read_json(folder / CONFIG_NAME))
    found = architecture(str(config.get("model_type")))
    parameters = found.parameters(config)
    linears, weights = [], []
    for name in checkpoint.config.linears:
        weight = f"{name}.weight"
        shape = parameters.shapes.get(weight)
        if shape is None:
            raise FormatError(f"linear {name} is not in the model", param=name)
        turned = found.transposed and weight not in (parameters.embedding, HEAD_WEIGHT)
        rows, columns = reversed(shape) if turned else shape
        linears.append(LinearShape(name, rows, columns))
        weights.append(TensorInfo(weight, "F16", shape))
    checkpoint.check_linears(linears)
    try:
        placed = place_tensors([*checkpoint.kept, *weights], found, parameters)
    except ModelError as error:
        raise FormatError(error.message, code=error.code, param=error.param) from error
    for tensor, _ in placed.left_out:
        raise FormatError(f"tensor {tensor.name} does not belong to the model", param=tensor.name)
