"""`load`: a packed folder as a transformers model, or an error; never a half-loaded model.

`check_loads` is how a folder is proved to load: names and shapes first, with stand-ins that hold
one value each, then the values, in as few loads as memory allows; one is what a user does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from bitmill.errors import FormatError, ModelError
from bitmill.formats.codec import Checkpoint, open_checkpoint
from bitmill.formats.headers import kind_of
from bitmill.formats.writing import DTYPES
from bitmill.inference.hf_quantizer import BitmillQuantizer, quantized_linears
from bitmill.io.atomic import read_json
from bitmill.io.safetensors import TensorInfo
from bitmill.models.dtypes import as_dtype
from bitmill.quant.outliers import Outliers
from bitmill.quant.rewrites import ColumnOrder

_REPOSITORY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,95}")
_FETCHED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICEN?E*", "NOTICE*"]
"""Nothing that runs code."""
_COLUMNS = frozenset({ColumnOrder.stored[0], Outliers.stored[0]})
"""What names of tensors of columns end with."""


def load(
    folder: str | Path,
    *,
    revision: str = "main",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a packed causal language model, ready to run.

    folder: or a repository of the Hub, `ORG/NAME`, whose `revision` is fetched into the Hub's
    cache. dtype: compute dtype of everything that is not packed, also by name; "auto" is the source
    model's own.
    device_map: as in `from_pretrained`, in place of `device`; it needs the package accelerate.
    Packed linears lay themselves out on their input's device at their first use.

    Raises InputError for an unknown dtype, and FormatError naming the tensor or key at fault: where
    the folder is not a packed model of a known format version, where a tensor is missing,
    superfluous or of the wrong shape or dtype, and where stored values are illegal. ModelError
    (model_not_found) for a name that is neither.
    """
    folder = _local(folder, revision)
    if dtype != "auto":
        dtype = as_dtype(dtype)
    refuse_unreadable(folder, open_checkpoint(folder).format.name)
    model = _complete(
        AutoModelForCausalLM,
        folder,
        dtype=dtype,
        device_map=device_map,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    for name, module in quantized_linears(model).items():
        module.stored(name)
    if device_map is None:
        model.to(device)
    return model


def load_plain(
    folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """Load a folder that is not quantized by Bitmill, ready to run: a source, or an export.

    dtype: as in `load`. Tensors that the architecture has no place for are ignored, as transformers
    does. Raises FormatError naming the first one that is missing or misshapen.
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=as_dtype(dtype) if dtype != "auto" else dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # reported in `info`, where they are refused by name
        output_loading_info=True,
    )
    refuse_incomplete(info | {"unexpected_keys": ()})
    return cast(PreTrainedModel, model.to(device))


def _local(folder: str | Path, revision: str) -> Path:
    """The folder itself, or a repository of this name with what a packed folder may hold."""
    place = Path(folder)
    if isinstance(folder, Path) or place.exists() or not _REPOSITORY.fullmatch(folder):
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(folder, revision=revision, allow_patterns=_FETCHED))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{folder} is neither a folder here nor to be had from the Hub "
            f"({type(error).__name__}): name another, or log in with `hf auth login`",
            code="model_not_found",
        ) from error


def _complete(kind: Any, *source: Path | None, **options: Any) -> PreTrainedModel:
    """What `kind.from_pretrained` gives, with every tensor in its place."""
    model, info = kind.from_pretrained(
        *source,
        ignore_mismatched_sizes=True,  # reported in `info`, where they are refused by name
        output_loading_info=True,
        **options,
    )
    refuse_incomplete(info)
    return cast(PreTrainedModel, model)


def _of_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """The model of a folder's config.json with these tensors for those in its files."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return _complete(kind, None, config=config, dtype="auto", state_dict=dict(tensors))


def check_loads(folder: Path, modules: Mapping[str, str], *, room: int) -> int:
    """Load a packed folder as a user does, and compare what the model holds with the files.

    modules: names in the model of tensors that are stored under other ones
    room: bytes of tensors that may be held at once; a single one may be larger

    Returns how often values were loaded. Raises FormatError naming the tensor that is missing,
    superfluous, misshapen or holds something else in the model. Folders of other formats are their
    own loaders' matter: 0.
    """
    if AUTO_QUANTIZER_MAPPING.get(quant_method(folder)) is not BitmillQuantizer:
        return 0
    checkpoint = open_checkpoint(folder)
    stand_ins = {name: stand_in(info) for name, info in checkpoint.headers.items()}
    _of_tensors(folder, stand_ins)
    portions = list(_portions(checkpoint, room))
    for portion in portions:
        if len(portions) == 1:
            model = load(folder)
        else:
            values = {name: checkpoint.tensor(name) for name in portion}
            model = _of_tensors(folder, stand_ins | values)
        _check_values(model, checkpoint, {name: modules.get(name, name) for name in portion})
        del model
    return len(portions)


def stand_in(info: TensorInfo) -> Tensor:
    """A tensor of this dtype and shape that takes the memory of one value, but for columns, each
    of which a linear has once: GPT-2 asks for its weights while it is loaded."""
    if info.name.rpartition(".")[2] in _COLUMNS:
        return torch.arange(*info.shape, dtype=DTYPES[info.dtype])
    return torch.zeros((), dtype=DTYPES[info.dtype]).expand(info.shape)


def _portions(checkpoint: Checkpoint, room: int) -> Iterator[list[str]]:
    """Names of all stored tensors in the order of the files, in lists of at most `room` bytes."""
    held, names = 0, list[str]()
    for name, info in checkpoint.headers.items():
        if names and held + info.nbytes > room:
            yield names
            held, names = 0, []
        names.append(name)
        held += info.nbytes
    yield names


def _check_values(model: PreTrainedModel, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
    """names: in the model by the stored one. transformers stacks experts that are not packed: those
    have no name of their own in the model, and that all of them were used was checked before.
    """
    held = model.state_dict()
    for stored, name in names.items():
        value = held.get(name)
        if value is None and ".experts." not in name:
            raise FormatError(f"tensor {stored} is not in the loaded model", param=stored)
        if value is not None and not _same(value, checkpoint.tensor(stored)):
            raise FormatError(
                f"tensor {stored} holds other values in the loaded model than in the files",
                param=stored,
            )


def _same(value: Tensor, stored: Tensor) -> bool:
    """Whether a loaded tensor is the stored one, in the dtype that the model computes in."""
    stored = stored.to(value.dtype)
    return value.shape == stored.shape and torch.equal(
        value.contiguous().view(-1).view(torch.uint8),
        stored.contiguous().view(-1).view(torch.uint8),
    )


def quant_method(folder: Path) -> str | None:
    """Which of transformers' quantizers loads the folder."""
    settings = read_json(folder / "config.json").get("quantization_config") or {}
    method: str | None = settings.get("quant_method")
    return method


def is_packed(folder: Path) -> bool:
    """Whether the folder is in a format that keeps codes, which `load` takes."""
    settings = read_json(folder / "config.json")
    return isinstance(settings, dict) and kind_of(settings).recognizes(settings)


def refuse_unreadable(folder: Path, name: str) -> None:
    """Raise FormatError where transformers has no quantizer for the folder's format.

    It would warn, and fill every quantized linear with random numbers.
    """
    if quant_method(folder) not in AUTO_QUANTIZER_MAPPING:
        raise FormatError(
            f"{folder.name} is in format {name!r}, which transformers has no quantizer for: import "
            "the package that brings one, or read weights by bitmill.formats.codec",
            code="no_loader",
            param="quantization_config",
        )


def refuse_incomplete(info: dict[str, Any]) -> None:
    """Raise FormatError if transformers' loading report has any key that did not find its place."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        keys = sorted(map(str, info.get(problem) or ()))
        if keys:
            raise FormatError(
                f"the checkpoint does not fit its model: {len(keys)} "
                f"{problem.replace('_', ' ')}, first {keys[0]}",
                code="incomplete_checkpoint",
                param=keys[0],
            )
