"""A column order folded into the rows before gives the model that gathers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitmill import load
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import Budget, parse_config
from bitmill.errors import VerificationError
from bitmill.formats.accounting import checkpoint_tensors, measure
from bitmill.formats.format import order_owners
from bitmill.formats.packed.checkpoint import PackedCheckpoint, write_checkpoint
from bitmill.formats.packed.layout import stored_tensors
from bitmill.formats.writing import tensor_bytes
from bitmill.pipeline.verify import verify_folder
from bitmill.plan.model_plan import Plan, make_plan
from bitmill.quant.tensors import Quantized, Stored
from bitmill.refinement.model import RefinedModel
from bitmill.refinement.store import save_block
from bitmill.transforms.column_order import FoldedOrders
from tiny import VOCABULARY, tiny_llama
from weights import rounded_weight

SPEC = {"budget": {"code_bits": 3}}
GATE, UP, DOWN = (f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down"))


@dataclass(frozen=True)
class Case:
    """A refined model, and two packed folders made of it."""

    plan: Plan
    refined: RefinedModel
    folded: Path
    gathered: Path


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("folding")
    source = tiny_llama(root / "source")
    plan = make_plan(source, parse_config(SPEC | {"allocation": {"kept_dtype": "source"}}))
    stored = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    owners = {n: g[0] for b in range(plan.block_count) for g in plan.siblings(b) for n in g}
    orders = {
        owner: torch.randperm(plan.by_name[owner].columns, generator=generator).int()
        for owner in dict.fromkeys(owners.values())
    }
    (root / "refined").mkdir()
    widths: dict[str, tuple[int, ...]] = {}
    for i in range(plan.block_count):
        block: dict[str, Quantized] = {}
        for linear in plan.block_linears(i):
            widths[linear.name] = (3, 4, 2)[: linear.shape.groups]
            matrix = stored[linear.source.tensor]
            order = orders[owners[linear.name]].clone()
            block[linear.name] = rounded_weight(matrix, widths[linear.name], order)
        save_block(root / "refined", i, block, [], None)
    refined = RefinedModel(root / "refined", plan)
    bit_widths = BitWidthMap(order="activation", linears=widths)
    names = {name: f"{owner}.order" for name, owner in owners.items()}
    folded = {name: f"{owner}.order" for name, owner in order_owners(plan, "activation").items()}
    kept = [tensor.spec for tensor in plan.tensors]
    for folder, linear, tensors, named in (
        ("gathered", refined.packed, stored_tensors(kept, plan.shapes, widths, names), names),
        (
            "folded",
            FoldedOrders(refined, plan).packed,
            checkpoint_tensors(plan, widths, "activation"),
            folded,
        ),
    ):
        (root / folder).mkdir()
        write_checkpoint(
            root / folder,
            source=source,
            tensors=tensors,
            bit_widths=bit_widths,
            linear=linear,
            other=stored.__getitem__,
            orders=named,
        )
    return Case(plan, refined, root / "folded", root / "gathered")


def logits(folder: Path, *, plain: bool = False) -> torch.Tensor:
    model = load(folder)
    if plain:
        model = model.dequantize()
    tokens = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def test_packed_models_give_the_same_logits_bit_for_bit(case: Case) -> None:
    folded, gathered = logits(case.folded), logits(case.gathered)
    assert gathered.abs().max() > 0.1
    assert torch.equal(folded, gathered)


def test_dequantized_models_give_the_same_logits(case: Case) -> None:
    folded, gathered = logits(case.folded, plain=True), logits(case.gathered, plain=True)
    assert (folded - gathered).abs().max() < 1e-5 * gathered.abs().max()


def test_only_the_folded_order_is_gone(case: Case) -> None:
    folded, gathered = (
        PackedCheckpoint.open(f).config.orders for f in (case.folded, case.gathered)
    )
    assert gathered[DOWN] == f"{DOWN}.order"
    assert folded[DOWN] is None
    readers = case.plan.feeders.keys()
    assert folded == {name: None if name in readers else o for name, o in gathered.items()}
    headers = [PackedCheckpoint.open(f).headers for f in (case.folded, case.gathered)]
    assert headers[1].keys() - headers[0].keys() == {f"{name}.order" for name in readers}


def test_rows_follow_the_columns_they_feed(case: Case) -> None:
    order = case.refined.rewrites(DOWN).order
    assert order is not None
    weights = FoldedOrders(case.refined, case.plan)
    for name in (GATE, UP):
        expected = case.refined.linear(name).dequantize()[order.long()]
        assert torch.equal(weights.packed(name).unpack().dequantize(), expected)
    expected = case.refined.linear(DOWN).dequantize()[:, order.long()]
    assert torch.equal(weights.packed(DOWN).unpack().dequantize(), expected)


def test_verification_needs_to_know_which_rows_moved(case: Case) -> None:
    hashes = case.refined.code_hashes()
    tensors = {
        name: hashlib.sha256(tensor_bytes(tensor)).hexdigest()
        for name, tensor in load_file(case.folded / "model.safetensors").items()
    }

    def verify(solved: Callable[[str, Stored], Stored]) -> None:
        verify_folder(
            case.folded, hashes, Budget(bits=16), case.plan, tensor_hashes=tensors, solved=solved
        )

    verify(FoldedOrders(case.refined, case.plan).solved)
    with pytest.raises(VerificationError, match="gate_proj has other codes on disk"):
        verify(lambda _, packed: packed)


def test_a_folded_order_takes_no_bytes(case: Case) -> None:
    widths = {shape.name: (3,) * shape.groups for shape in case.plan.shapes}
    taken = [measure(case.plan, widths, order, "bits") for order in ("natural", "activation")]
    inputs = [160, 160, 160]  # q/k/v, o, gate/up; down has 256 columns
    assert taken[1] - taken[0] == 2 * 4 * sum(inputs)


def test_a_kept_neighbour_leaves_the_order_stored(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    spec = parse_config(SPEC | {"allocation": {"keep": ["model.layers.1.mlp.up_proj"]}})
    plan = make_plan(folder, spec)
    assert set(plan.feeders) == {"model.layers.0.mlp.down_proj"}
    assert order_owners(plan, "activation")[DOWN] == DOWN
