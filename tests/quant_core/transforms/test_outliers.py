"""Outlier columns: exact beside any codes, and the best that can stand there."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import GPTQ, RTN
from bitmill.errors import FormatError
from bitmill.formats.packed.config import PackedLinear
from bitmill.formats.packed.share import Share
from bitmill.inference.linear import QuantizedLinear, join_siblings
from bitmill.quant.outliers import Fitted, Outliers
from bitmill.quant.rewrites import ColumnOrder, Rewrites
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.runtime.ranks import SINGLE, Ranks
from bitmill.transforms.outliers import OutlierColumns, chosen_columns
from learning import tiny
from weights import random_weight

N, K, COUNT = 24, 200, 3
HEAVY = (7, 150, 191)


def weights() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0))


def hessian() -> Tensor:
    """Mean x x^T of inputs of which three columns are heavy, and half of the others follow one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2000, K, generator=generator) @ torch.randn(K, K, generator=generator)
    x[:, HEAVY] *= 20
    x[:, 8:100] += 0.1 * x[:, HEAVY[:1]]
    return x.T @ x / len(x)


def fitted() -> Fitted:
    found = OutlierColumns({"a": COUNT}).fit({"a": weights()}, hessian(), SINGLE)["a"]
    assert isinstance(found, Fitted)
    return found


def some_codes(W: Tensor) -> Tensor:
    """What a solver may give for W."""
    return (W * 2).round() / 2 + 0.1


def error(R: Tensor, H: Tensor) -> float:
    return float(((R.double() @ H.double()) * R.double()).sum())


def test_columns_of_heavy_inputs_and_large_errors_are_chosen() -> None:
    W, H = weights(), hessian()
    assert set(chosen_columns({"a": W}, H, COUNT)[0].tolist()) == set(HEAVY)
    W[:, HEAVY[0]] = 0  # nothing to lose there
    assert HEAVY[0] not in chosen_columns({"a": W}, H, COUNT)[0]


@dataclass(frozen=True)
class InTurn(Ranks):
    """Ranks that are called one after the other: each gets the sum of what came so far."""

    brought: list[Tensor] = field(default_factory=list)

    def all_reduce(self, *sums: Tensor) -> None:
        self.brought.append(sums[0].clone())
        sums[0].copy_(sum(self.brought))

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        self.brought.append(rows)
        return torch.cat(self.brought)


def test_ranks_of_some_rows_choose_and_gather_those_of_all() -> None:
    W, H, half = weights(), hessian(), slice(N // 2, None)
    W[half, HEAVY[0]] = 0
    ranks = InTurn()
    chosen_columns({"a": W[: N // 2]}, H, COUNT, ranks)
    found = chosen_columns({"a": W[half]}, H, COUNT, ranks)
    for one, whole in zip(found, chosen_columns({"a": W}, H, COUNT), strict=True):
        assert torch.equal(one, whole)
    outliers, ranks = fitted().settled(some_codes(W)), InTurn()
    for rows in torch.arange(N).chunk(2):
        gathered = outliers.with_rows(rows).gathered(ranks, N)
    assert torch.equal(gathered.values, outliers.values)


def test_inputs_that_are_one_and_inputs_that_are_none_have_shares() -> None:
    H = hessian()
    H[HEAVY[1]] = H[HEAVY[0]]
    H[:, HEAVY[1]] = H[:, HEAVY[0]]
    for moments in (H, torch.zeros(K, K)):
        columns, shares, inverse = chosen_columns({"a": weights()}, moments, COUNT)
        assert len(set(columns.tolist())) == COUNT
        assert (shares.abs() <= 20).all()
        assert inverse.isfinite().all()


def test_what_is_kept_makes_up_for_any_codes_as_well_as_a_matrix_can() -> None:
    W, H, rewrite = weights(), hessian(), fitted()
    Q = some_codes(rewrite.weights(W))
    settled = rewrite.settled(Q)
    left = W - settled.undo(Q)
    columns = rewrite.columns
    best = torch.linalg.solve(
        H[columns][:, columns].double(), (H[columns] @ (W - Q).T).double()
    ).T  # the normal equations of S
    least = (W - Q).double().index_add(1, columns, best, alpha=-1)
    assert error(left, H) == pytest.approx(error(least, H), rel=1e-3)
    assert error(left, H) < 0.9 * error((W - Q).index_fill(1, columns, 0.0), H)


def test_what_the_prefix_has_lost_is_made_up_for_too() -> None:
    W, H, order = weights(), hessian(), ColumnOrder(torch.arange(K).flip(0).int())
    shift = torch.randn(N, K, generator=torch.Generator().manual_seed(2)) @ H / 30
    kept = OutlierColumns({"a": COUNT})
    fitted = kept.fit({"a": order.weights(W)}, order.hessian(H), SINGLE)["a"]
    assert isinstance(fitted, Fitted)
    rewrites = Rewrites([order, fitted]).shifted(shift)
    Q = some_codes(rewrites.weights(W))
    left = W - rewrites.settled(lambda: Q).undo(Q)

    def lost(R: Tensor) -> float:
        """Of |R x + d|^2, what depends on R: C = d x^T."""
        return error(R, H) + 2 * float((R.double() * shift.double()).sum())

    columns = order.order.long()[fitted.columns]
    R = W - order.undo(Q)
    best = torch.linalg.solve(
        H[columns][:, columns].double(), (H[columns] @ R.T + shift[:, columns].T).double()
    ).T
    least = lost(R.double().index_add(1, columns, best, alpha=-1))
    assert lost(left) == pytest.approx(least, rel=1e-3)
    assert lost(left) < lost(W - Rewrites([order, fitted]).settled(lambda: Q).undo(Q)) - 1
    sample = torch.tensor([3, 20])
    few = rewrites.with_rows(sample).settled(lambda: Q[sample])
    torch.testing.assert_close(W[sample] - few.undo(Q[sample]), left[sample])


def test_a_solver_sees_the_error_that_will_be_left() -> None:
    W, H, rewrite = weights(), hessian(), fitted()
    Q = some_codes(rewrite.weights(W))
    left = rewrite.hessian(H)
    seen = error(rewrite.weights(W) - Q, left)
    assert seen == pytest.approx(error(W - rewrite.settled(Q).undo(Q), H), rel=1e-2)
    assert not left[rewrite.columns].any()
    assert not left[:, rewrite.columns].any()


def test_they_are_settled_wherever_they_stand_among_rewrites() -> None:
    W, rewrite, order = weights(), fitted(), ColumnOrder(torch.arange(K).flip(0).int())
    Q = some_codes(rewrite.weights(W))
    settled, _ = Rewrites([rewrite, order]).settled(lambda: order.weights(Q))
    assert isinstance(settled, Outliers)
    assert torch.equal(settled.values, rewrite.settled(Q).values)


def test_a_rewrite_is_exact_and_a_sample_of_rows_is_that_of_all() -> None:
    W, rewrite = weights(), fitted()
    torch.testing.assert_close(rewrite.undo(rewrite.weights(W)), W, atol=2e-3, rtol=2e-3)
    Q, rows = some_codes(rewrite.weights(W)), torch.tensor([5, 2])
    settled = rewrite.settled(Q)
    for one in (rewrite, settled):
        assert torch.equal(one.with_rows(rows).undo(Q[rows]), one.undo(Q)[rows])
    torch.testing.assert_close(settled.undo(settled.weights(W)), W)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(2))
    found = Rewrites([settled]).forward(x, lambda inner: inner @ Q.T)
    torch.testing.assert_close(found, x @ settled.undo(Q).T, atol=1e-3, rtol=1e-4)


def kept(weight, columns: list[int], seed: int = 0):
    """The quantized weight with outliers in these packed columns."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.N, len(columns), generator=generator).half()
    outliers = Outliers(torch.tensor(columns, dtype=torch.int32), values)
    return weight.rewritten(Rewrites([*weight.rewrites, outliers]))


@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
def test_a_packed_module_adds_them_to_its_product(ordered: bool) -> None:
    weight = kept(random_weight(N, 300, (3, 0, 5), ordered=ordered), [299, 4, 130])
    packed = weight.pack()
    module = QuantizedLinear.from_packed(packed, bias=torch.ones(N))
    assert torch.equal(module.dequantize(), weight.dequantize())
    assert module.state_dict().keys() >= {"outliers", "outlier_columns"}
    join_siblings([("model.layers.0.mlp.up_proj", module)])
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = module(x)
    expected = x.detach().double() @ weight.dequantize().double().T + 1
    assert float((y.detach() - expected).norm() / expected.norm()) < 1e-5
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(2, -1))
    again = QuantizedLinear.from_packed(packed.with_rows(torch.arange(N).flip(0)))
    torch.testing.assert_close(again(x), y.flip(1) - 1)


def test_what_was_built_for_them_is_neither_copied_nor_kept_for_others() -> None:
    plain, x = random_weight(N, K, (3, 4)), torch.ones(1, K)
    module = QuantizedLinear.from_packed(kept(plain, [5, 9]).pack())
    fresh = len(pickle.dumps(module))
    module(x)
    assert len(pickle.dumps(module)) == fresh
    other = kept(plain, [2, 60], seed=1)
    packed = other.pack()
    module.fill(packed.tensors("") | packed.rewrites.tensors(""))
    torch.testing.assert_close(module(x), x @ other.dequantize().T, atol=1e-4, rtol=1e-4)


def test_each_linear_keeps_as_many_as_its_map_says(tmp_path: Path) -> None:
    """Linears that read one input may differ; those that do not keep the same columns."""
    model, tokens = tiny().model, CalibrationSet(tiny().tokens[:2], tiny().held_out[:0], "", "none")
    counts = {
        f"model.layers.0.{name}_proj": count
        for name, count in {"self_attn.q": 2, "self_attn.k": 1, "self_attn.v": 2}.items()
    }
    bit_widths = BitWidthMap(
        linears=BitWidthMap.uniform(model.plan.shapes, 3).linears, outliers=counts
    )
    inputs = RefineInputs(tokens, bit_widths, {})
    refine_model(model, inputs, RTN(), tmp_path, seed=0, on_unit=lambda *_: None)
    found = {
        one.name: RefinedModel(tmp_path, model.plan).rewrites(one.name).tensors("")
        for one in model.plan.linears
    }
    columns = {name: each[".outlier_columns"] for name, each in found.items() if each}
    assert {name: len(each) for name, each in columns.items()} == counts
    q, _, v = columns.values()
    assert torch.equal(q, v)


def test_their_inputs_tell_nothing_of_what_an_output_lacks_behind_a_quantized_prefix(
    tmp_path: Path,
) -> None:
    """The normal equations of S, on calibration tokens: the mean of (W x' - w x) x_O^T is 0."""
    model, name = tiny().model, "model.layers.1.mlp.up_proj"
    bit_widths = BitWidthMap(
        linears=BitWidthMap.uniform(model.plan.shapes, 2).linears, outliers={name: 2}
    )
    tokens = CalibrationSet(tiny().tokens, tiny().held_out, "", "none")
    inputs = RefineInputs(tokens, bit_widths, {})
    refine_model(model, inputs, GPTQ(), tmp_path, seed=0, on_unit=lambda *_: None)
    found = RefinedModel(tmp_path, model.plan)

    def inputs_of(quantized: bool) -> Tensor:
        whole = AutoModelForCausalLM.from_pretrained(model.source.folder)
        seen: list[Tensor] = []
        watched = whole.get_submodule(name)
        watched.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
        with torch.no_grad():
            for linear in model.plan.linears if quantized else ():
                weight = whole.get_submodule(linear.name).weight
                weight.copy_(found.linear(linear.name).dequantize())
            whole(tokens.tokens)
        return seen[0]

    source, x = inputs_of(False), inputs_of(True)
    W = AutoModelForCausalLM.from_pretrained(model.source.folder).get_submodule(name).weight
    lacking = source @ W.detach().T - x @ found.linear(name).dequantize().T
    told = x[:, found.rewrites(name).tensors("")[".outlier_columns"].long()]
    scale = lacking.norm(dim=0)[:, None] * told.norm(dim=0)
    assert ((lacking.T @ told) / scale).abs().max() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": torch.tensor([1, 1], dtype=torch.int32)}, "names a column twice"),
        ({"columns": torch.tensor([1, K], dtype=torch.int32)}, f"not of 0 to {K - 1}"),
        ({"columns": torch.tensor([1, 2])}, "int64"),
        ({"values": torch.zeros(N - 1, 2).half()}, "expected torch.float16 of shape"),
        ({"values": torch.full((N, 2), torch.inf).half()}, "not finite"),
    ],
)
def test_damaged_ones_are_refused_by_name(change: dict[str, Tensor], message: str) -> None:
    good = Outliers(torch.tensor([1, 0], dtype=torch.int32), torch.zeros(N, 2).half())
    good.check("a", N, K)
    with pytest.raises(FormatError, match=message) as refused:
        replace(good, **change).check("a", N, K)
    assert refused.value.param in ("a.outliers", "a.outlier_columns")


def test_engines_refuse_them_by_name() -> None:
    with pytest.raises(FormatError, match=r"m\.up.* 2 outlier columns.*allocation\.outliers"):
        Share(PackedLinear("m.up", (3, 3), outliers=2), N, 256)
