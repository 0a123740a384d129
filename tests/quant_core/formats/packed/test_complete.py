"""A folder with a tensor too few, too many or misshapen is refused by the tensor's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitmill.errors import FormatError
from bitmill.formats.packed.complete import check_complete
from tiny import tiny_llama, tiny_opt
from trellis_models import pack_trellis
from weights import pack_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("complete")
    source = tiny_llama(folder / "source")
    return pack_model(source, folder / "packed", order="activation", embeddings="quantize").folder


def test_whole_folders_pass(packed: Path, tmp_path: Path) -> None:
    check_complete(packed)
    check_complete(pack_trellis(tiny_llama(tmp_path / "llama"), tmp_path / "coded", "quantize"))
    check_complete(pack_model(tiny_opt(tmp_path / "opt"), tmp_path / "packed").folder)


Change = Callable[[dict[str, Tensor]], object]
CHANGES: dict[str, Change] = {
    "model.norm.weight": lambda t: t.pop("model.norm.weight"),
    "model.layers.0.self_attn.k_proj.scales": lambda t: t.pop(
        "model.layers.0.self_attn.k_proj.scales"
    ),
    "model.layers.1.self_attn.o_proj.bias": lambda t: t.update(
        {"model.layers.1.self_attn.o_proj.bias": torch.zeros(160)}
    ),
    "model.layers.1.self_attn.q_proj.codes_b1_p1": lambda t: t.update(
        {"model.layers.1.self_attn.q_proj.codes_b1_p1": torch.zeros(1, dtype=torch.uint8)}
    ),
    "score.weight": lambda t: t.update({"score.weight": torch.zeros(2, 160)}),
    "model.layers.0.input_layernorm.weight": lambda t: t.update(
        {"model.layers.0.input_layernorm.weight": torch.ones(159)}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_folder_is_refused(packed: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(packed / "model.safetensors")
    CHANGES[name](tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((packed / "config.json").read_bytes())
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        check_complete(tmp_path)
