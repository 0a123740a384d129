"""The SGLang plug-in on layers that stand for SGLang's, against the dequantized weights."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitmill.errors import FormatError
from bitmill.formats.codec import open_checkpoint
from bitmill.plan.model_plan import plan_for_map
from sglang_layers import (
    Group,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    install,
    load_weights,
)
from tiny import tiny_llama
from trellis_models import pack_trellis
from weights import pack_model

HERE = Path(__file__).parents[2] / "integrations" / "sglang"
HEAD, HEADS, HIDDEN, INNER, ROWS = 64, (8, 2), 160, 448, 258
LAYER = "model.layers.0"
NAMES = {
    "qkv": f"{LAYER}.self_attn.qkv_proj",
    "o": f"{LAYER}.self_attn.o_proj",
    "gate_up": f"{LAYER}.mlp.gate_up_proj",
    "down": f"{LAYER}.mlp.down_proj",
}
MODELS: dict[str, dict[str, Any]] = {
    "own widths, natural order": {},
    "tied packed embedding, orders": {"order": "activation", "embeddings": "quantize"},
    "packed embedding and head": {"embeddings": "quantize", "tied": False},
    "one width": {"order": "activation", "cycle": (4,)},
    "trellis codes": {"code": "trellis"},
    "trellis codes, tied packed embedding": {"code": "trellis", "embeddings": "quantize"},
    "trellis codes, packed embedding and head": {
        "code": "trellis",
        "embeddings": "quantize",
        "tied": False,
    },
}


@pytest.fixture(params=[False, True], ids=["dictionary", "lazy mapping"])
def sglang(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """SGLang's table of methods, in which the plug-in has registered through its entry point."""
    found = install(monkeypatch, lazy=request.param)
    monkeypatch.syspath_prepend(str(HERE))
    points = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = points["sglang.srt.plugins"]["bitmill"].partition(":")
    for _ in range(2):  # once more does nothing
        getattr(importlib.import_module(module), function)()
    yield found
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitmill_sglang"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture(scope="module", params=MODELS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("packed"), **MODELS[request.param])


def made(folder: Path, *, tied: bool = True, code: str = "affine", **options: Any) -> Path:
    """Two blocks whose linears have tails."""
    source = tiny_llama(
        folder / "source",
        head_dim=HEAD,
        num_attention_heads=HEADS[0],
        num_key_value_heads=HEADS[1],
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        tie_word_embeddings=tied,
    )
    if code == "trellis":
        return pack_trellis(source, folder / "packed", **options)
    return pack_model(source, folder / "packed", **options).folder


@dataclass(frozen=True)
class Rank:
    group: Group | None
    layers: nn.ModuleDict


class Served:
    """One block, the embedding and the head of a packed folder on every rank, loaded."""

    def __init__(self, sglang: Any, folder: Path, ranks: int = 1, **changes: Tensor | None) -> None:
        config = json.loads((folder / "config.json").read_text())
        given = config["quantization_config"] | {
            "packed_modules_mapping": {},
            "hf_config": SimpleNamespace(_name_or_path=str(folder)),
        }
        self.checkpoint = open_checkpoint(folder)
        weights: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        weights = {k: v for k, v in (weights | changes).items() if v is not None}
        names = dict(NAMES)
        self.whole = {"embed": "model.embed_tokens", "head": "lm_head"}
        self.whole = {
            k: v for k, v in self.whole.items() if v in self.checkpoint.bit_widths.linears
        }
        names |= self.whole
        kind = sglang.QUANTIZATION_METHODS["bitmill"]
        assert kind is sglang.CPU_QUANTIZATION_METHODS["bitmill"]
        self.ranks = []
        for rank in range(ranks):
            group = Group(rank, ranks) if ranks > 1 else None
            asked = kind.from_config(dict(given))
            layers: dict[str, Any] = {
                "qkv": QKVParallelLinear(HIDDEN, HEAD, HEADS, asked, NAMES["qkv"], group),
                "o": RowParallelLinear(HEADS[0] * HEAD, HIDDEN, asked, NAMES["o"], group),
                "gate_up": MergedColumnParallelLinear(
                    HIDDEN, [INNER, INNER], asked, NAMES["gate_up"], group
                ),
                "down": RowParallelLinear(INNER, HIDDEN, asked, NAMES["down"], group),
            } | {
                place: VocabParallelEmbedding(ROWS, HIDDEN, asked, name, group)
                for place, name in self.whole.items()
            }
            held = nn.ModuleDict(layers)
            load_weights(held, names, weights)
            for layer in layers.values():
                layer.quant_method.process_weights_after_loading(layer)
            self.ranks.append(Rank(group, held))

    def weight(self, *names: str) -> Tensor:
        """Dequantized weights f64 [N, K], one below the other."""
        shapes = {s.name: s for s in self._shapes()}
        return torch.cat([self.checkpoint.weight(shapes[name]) for name in names]).double()

    def _shapes(self) -> Any:
        _, plan = plan_for_map(self.checkpoint.folder.parent / "source", self.checkpoint.bit_widths)
        return plan.shapes


def close(y: Tensor, expected: Tensor) -> None:
    error = float((y.double() - expected).norm() / expected.norm())
    assert error < 1e-5


def rows_of(place: str, y: Tensor, rank: int, ranks: int) -> list[Tensor]:
    """A rank's outputs of a layer, linear by linear."""
    heads = HEADS[0] // ranks, max(1, HEADS[1] // ranks)
    sizes = [h * HEAD for h in (heads[0], heads[1], heads[1])]
    return list(y.split(sizes if place == "qkv" else [INNER // ranks] * 2, -1))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_layers_compute_what_the_dequantized_weights_do(
    sglang: Any, packed: Path, ranks: int
) -> None:
    served = Served(sglang, packed, ranks)
    generator = torch.Generator().manual_seed(0)
    attention, mlp = f"{LAYER}.self_attn", f"{LAYER}.mlp"
    parts = {
        "qkv": [f"{attention}.{n}_proj" for n in "qkv"],
        "gate_up": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
    }
    x = torch.randn(3, HIDDEN, generator=generator)
    for place, names in parts.items():
        found = [rows_of(place, r.layers[place](x), i, ranks) for i, r in enumerate(served.ranks)]
        for number, name in enumerate(names):
            copies = max(1, ranks // HEADS[1]) if place == "qkv" and number else 1
            y = torch.cat([one[number] for one in found[::copies]], -1)
            close(y, x.double() @ served.weight(name).T)
            for i, one in enumerate(found):
                assert torch.equal(one[number], found[i // copies * copies][number])
    for place, name, columns in (
        ("o", f"{attention}.o_proj", HEADS[0] * HEAD),
        ("down", f"{mlp}.down_proj", INNER),
    ):
        x = torch.randn(3, columns, generator=generator)
        total = torch.zeros(3, HIDDEN)
        for rank, part in zip(served.ranks, x.chunk(ranks, -1), strict=True):
            if rank.group is not None:
                rank.group.whole = x
            total += rank.layers[place](part)
        close(total, x.double() @ served.weight(name).T)


@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_embeddings_and_heads(sglang: Any, packed: Path, ranks: int) -> None:
    served = Served(sglang, packed, ranks)
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(0))
    for place, name in served.whole.items():
        weight = served.weight(name)
        found, logits = [], []
        for rank in served.ranks:
            layer: Any = rank.layers[place]
            held = layer.shard_indices
            count = held.org_vocab_end_index - held.org_vocab_start_index
            found.append(layer.quant_method.embedding(layer, torch.arange(count)))
            y = layer.quant_method.apply(layer, hidden)
            assert y.shape == (3, 320 // ranks)
            assert not y[:, count:].any()
            logits.append(y[:, :count])
        close(torch.cat(found), weight)
        close(torch.cat(logits, -1), hidden.double() @ weight.T)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("plain"))


NAME = f"{LAYER}.self_attn.k_proj.scales"


def test_tensors_that_are_missing_or_misshapen_are_refused_by_name(
    sglang: Any, plain: Path
) -> None:
    with pytest.raises(FormatError, match=f"lacks {NAME}"):
        Served(sglang, plain, **{NAME: None})
    with pytest.raises(FormatError, match=f"{NAME} is torch.float16 of shape"):
        Served(sglang, plain, **{NAME: torch.zeros(1, 1, dtype=torch.float16)})


def test_a_folder_with_a_tensor_too_many_is_refused_before_it_is_loaded(
    sglang: Any, plain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(plain, folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.extra": torch.zeros(2)}, file)
    with pytest.raises(FormatError, match=r"model\.extra"):
        Served(sglang, folder)


def test_a_layer_of_which_some_linears_are_kept_and_split_keys_are_refused(
    sglang: Any, plain: Path
) -> None:
    config = json.loads((plain / "config.json").read_text())["quantization_config"]
    kind = sglang.QUANTIZATION_METHODS["bitmill"]
    asked = kind.from_config(config)
    with pytest.raises(FormatError, match="other ranks than queries"):
        QKVParallelLinear(HIDDEN, HEAD, HEADS, asked, NAMES["qkv"], Group(0, 2), keys=Group(0, 1))
    del asked.linears[f"{LAYER}.self_attn.k_proj"]
    with pytest.raises(FormatError, match="k_proj are not packed"):
        QKVParallelLinear(HIDDEN, HEAD, HEADS, asked, NAMES["qkv"], None)
    kept = RowParallelLinear(HIDDEN, 8, asked, "model.other", None)
    assert kept.weight.shape == (8, HIDDEN)
