import gc
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from bitmill.calibration.hooks import observe, run_windows
from bitmill.calibration.statistics import BlockState, Stream, collect
from bitmill.errors import CalibrationError, NumericalError
from bitmill.models.streamed import StreamedModel, weight_of
from bitmill.quant.grid import ClipSettings
from bitmill.refinement.block import RefineSettings, refine_block
from bitmill.solvers.factor import activation_order
from bitmill.solvers.gptq import solve as gptq
from bitmill.solvers.gptq.settings import GptqSettings
from bitmill.solvers.gptq.solve import GptqSolver
from bitmill.solvers.polish import polish_codes
from bitmill.solvers.rtn import RtnSolver
from bitmill.solvers.solver import Linear
from bitmill.transforms.column_order import ColumnOrders
from solving import quantize_gptq
from streaming import streamed, token_windows
from tiny import tiny_llama, tiny_opt

QUICK_GPTQ = GptqSettings(
    clip=ClipSettings(zero_offsets=(), least_squares=0), compensated=None, rounds=0
)
QUICK = GptqSolver(QUICK_GPTQ)
SHIFT = frozenset({"hessian", "shift"})
PREFIX = "model.layers.0."
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BEFORE = {
    "self_attn.o_proj": ATTENTION,
    "mlp.up_proj": (*ATTENTION, "self_attn.o_proj"),
    "mlp.down_proj": (*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_opt(tmp_path_factory.mktemp("opt")))


def widths_of(model, index, width):
    return {
        linear.name: (width,) * (-(-linear.columns // 128))
        for linear in model.plan.block_linears(index)
    }


def refine(model, index, stream, width=3, **options):
    block = model.load_block(index)
    settings = options.pop("settings", RefineSettings(QUICK, batch=4))
    weights, results = refine_block(
        model, index, block, stream, widths_of(model, index, width), settings, **options
    )
    return block, weights, results


def test_the_block_computes_with_the_stored_weights(llama):
    stream = Stream(llama.embed(token_windows(6)))
    block, weights, results = refine(llama, 0, stream)
    linears = llama.linears(block, 0)
    assert set(weights) == set(linears)
    assert [result.name for result in results] == list(linears)
    for name, module in linears.items():
        assert torch.equal(weight_of(module), weights[name].dequantize())
        assert weights[name].widths == widths_of(llama, 0, 3)[name]


@pytest.mark.parametrize("name", BEFORE)
def test_later_stages_see_the_quantized_ones_before_them(llama, name):
    """Independent: the block rebuilt by hand with everything before the linear quantized."""
    stream = Stream(llama.embed(token_windows(6)))
    _, weights, _ = refine(llama, 0, stream, width=2)
    by_hand = llama.load_block(0)
    with torch.no_grad():
        for earlier in BEFORE[name]:
            by_hand.get_submodule(earlier).weight.copy_(weights[PREFIX + earlier].dequantize())
    module = by_hand.get_submodule(name)
    x = observe(llama, 0, by_hand, {name: module}, stream.hidden)[name].x
    H = x.T @ x / len(x)
    expected, _ = quantize_gptq(
        module.weight.detach(), H, weights[PREFIX + name].widths, settings=QUICK_GPTQ
    )
    same = expected.codes == weights[PREFIX + name].codes
    assert same.float().mean() > 0.99
    float_block = llama.load_block(0)
    x = observe(llama, 0, float_block, {name: float_block.get_submodule(name)}, stream.hidden)[
        name
    ].x
    other, _ = quantize_gptq(
        module.weight.detach(), x.T @ x / len(x), weights[PREFIX + name].widths, settings=QUICK_GPTQ
    )
    assert (other.codes != weights[PREFIX + name].codes).float().mean() > 0.01


@pytest.mark.parametrize("width", [2, 4])
def test_gptq_keeps_the_block_closer_than_rounding(llama, width):
    hidden = llama.embed(token_windows(24))
    fresh = llama.embed(token_windows(8, seed=9))
    exact = run_windows(llama, 0, llama.load_block(0), fresh, batch=4)
    errors = []
    for settings in (
        RefineSettings(RtnSolver(ClipSettings.min_max())),
        RefineSettings(QUICK),
    ):
        block, _, _ = refine(llama, 0, Stream(hidden), width, settings=settings)
        errors.append(float((run_windows(llama, 0, block, fresh, batch=4) - exact).norm()))
    assert errors[1] < errors[0]


def test_same_input_same_bytes_whatever_the_batch(llama):
    stream = Stream(llama.embed(token_windows(6)))
    one, two = (
        refine(llama, 0, stream, settings=RefineSettings(QUICK, batch=batch))[1] for batch in (6, 6)
    )
    assert all(one[name].codes_sha256() == two[name].codes_sha256() for name in one)
    split = refine(llama, 0, stream, settings=RefineSettings(QUICK, batch=2))[1]
    first = [PREFIX + part for part in ATTENTION]
    assert all((one[n].codes == split[n].codes).float().mean() > 0.99 for n in first)


def test_linears_without_widths_keep_the_source_precision(llama):
    stream = Stream(llama.embed(token_windows(4)))
    block = llama.load_block(0)
    before = block.mlp.down_proj.weight.clone()
    widths = widths_of(llama, 0, 3)
    del widths[PREFIX + "mlp.down_proj"], widths[PREFIX + "self_attn.q_proj"]
    weights, _ = refine_block(llama, 0, block, stream, widths, RefineSettings(QUICK))
    assert set(weights) == set(widths)
    assert torch.equal(block.mlp.down_proj.weight, before)


def test_a_block_without_widths_stays_and_its_weights_are_checked_before_it_runs(llama):
    stream = Stream(llama.embed(token_windows(2)))
    block = llama.load_block(0)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert refine_block(llama, 0, block, stream, {}, RefineSettings(QUICK)) == ({}, [])
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    with torch.no_grad():
        block.mlp.up_proj.weight[3, 7] = float("nan")
    with pytest.raises(NumericalError, match=r"0\.mlp\.up_proj has 1 weights.*row 3, column 7"):
        refine_block(llama, 0, block, stream, widths_of(llama, 0, 3), RefineSettings(QUICK))


def test_column_orders_are_stored_and_undone(llama):
    stream = Stream(llama.embed(token_windows(4)))
    block = llama.load_block(0)
    state = BlockState(llama, 0, block, None, llama.linears(block, 0))
    seen = collect(state, llama.plan.siblings(0), stream, batch=2)
    orders = {name: activation_order(statistics.H.diagonal()) for name, statistics in seen.items()}
    assert torch.equal(orders[PREFIX + "self_attn.q_proj"], orders[PREFIX + "self_attn.v_proj"])
    settings = RefineSettings(QUICK, transforms=(ColumnOrders(orders),), batch=4)
    refined, weights, results = refine(llama, 0, stream, width=4, settings=settings)
    for name, weight in weights.items():
        assert torch.equal(weight.order.long(), orders[name])
    assert max(result.relative_error for result in results) < 0.02
    source = llama.load_block(0).mlp.up_proj.weight
    close = refined.mlp.up_proj.weight - source
    assert close.norm() < 0.15 * source.norm()


def test_the_correction_works_against_what_the_prefix_has_lost(opt):
    """On held-out windows behind a quantized block, against the source model's own outputs."""
    calibration, unseen = opt.embed(token_windows(24)), opt.embed(token_windows(6, seed=5))
    first, _, _ = refine(opt, 0, Stream(calibration), width=2)
    exact = opt.load_block(0)
    streams = [
        Stream(run_windows(opt, 0, first, x, batch=6), run_windows(opt, 0, exact, x, batch=6))
        for x in (calibration, unseen)
    ]
    target = run_windows(opt, 1, opt.load_block(1), streams[1].source, batch=6)
    errors = []
    for asymmetric in (False, True):
        needs = SHIFT if asymmetric else frozenset({"hessian"})
        settings = RefineSettings(QUICK, needs, batch=6)
        block, _, results = refine(opt, 1, streams[0], 3, settings=settings, held_out=streams[1])
        assert any(result.asymmetric for result in results) == asymmetric
        output = run_windows(opt, 1, block, streams[1].hidden, batch=6)
        errors.append(float((output - target).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_asymmetric_without_its_streams_is_refused(llama):
    settings = RefineSettings(QUICK, SHIFT)
    with pytest.raises(ValueError, match="source model's block inputs"):
        refine(llama, 0, Stream(llama.embed(token_windows(2))), settings=settings)


def test_the_source_moves_on_while_its_block_is_refined(opt):
    hidden, unseen = opt.embed(token_windows(5)), opt.embed(token_windows(3, seed=1))
    streams = [Stream(x + 0.01, x.clone()) for x in (hidden, unseen)]
    settings = RefineSettings(QUICK, SHIFT, batch=2, advance_source=True)
    block, _, _ = refine(opt, 0, streams[0], held_out=streams[1], settings=settings)
    source = opt.load_block(0)
    for x, stream in zip((hidden, unseen), streams, strict=True):
        assert torch.equal(stream.hidden, x + 0.01)
        expected = [opt.run_block(0, source, part) for part in x.split(2)]
        assert torch.equal(stream.source, torch.cat(expected))
        assert not torch.allclose(opt.run_block(0, block, x), stream.source, atol=1e-4)


def test_a_non_finite_calibration_token_is_named(llama):
    hidden = llama.embed(token_windows(3))
    hidden[1, 5] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj: tokens \[53"):
        refine(llama, 0, Stream(hidden), settings=RefineSettings(QUICK, batch=1))


def test_second_moments_are_dropped_before_polishing(llama, monkeypatch):
    """Of the inputs of down_proj [K, K] only H and its factor are left, each 3 GiB in a 70B."""
    columns = llama.plan.by_name[PREFIX + "mlp.down_proj"].columns
    left = {}

    def counted(targets, sources, codes, H, *, sweeps):
        squares = {
            value.data_ptr()
            for value in gc.get_objects()
            if type(value) is torch.Tensor and value.shape == (len(H), len(H))
        }
        left[len(H)] = len(squares)
        return polish_codes(targets, sources, codes, H, sweeps=sweeps)

    monkeypatch.setattr(gptq, "polish_codes", counted)
    hidden, source = llama.embed(token_windows(6)), llama.embed(token_windows(6, seed=3))
    order = torch.arange(columns).flip(0)
    refine(
        llama,
        0,
        Stream(hidden[:4], source[:4]),
        settings=RefineSettings(
            QUICK, SHIFT, (ColumnOrders({PREFIX + "mlp.down_proj": order}),), batch=2
        ),
        held_out=Stream(hidden[4:], source[4:]),
    )
    assert left[columns] == 2


@dataclass
class Watching:
    """A solver that keeps what it is given."""

    seen: dict[str, tuple[Linear, Tensor | None]] = field(default_factory=dict)

    def solve(self, linears, H, ranks):
        for linear in linears:  # their weights are written over when they are solved
            self.seen[linear.name] = replace(linear, W=linear.W.clone()), H
        return RtnSolver().solve(linears, H, ranks)


def watched(model, needs, orders):
    hidden, unseen = model.embed(token_windows(6)), model.embed(token_windows(3, seed=2))
    streams = [Stream(x, x + 0.1 * x.roll(1, 1)) for x in (hidden, unseen)]
    solver = Watching()
    settings = RefineSettings(solver, needs, (ColumnOrders(orders),), batch=3)
    weights = refine(model, 0, streams[0], held_out=streams[1], settings=settings)[1]
    return solver.seen, weights


def test_a_solver_sees_the_same_problem_in_the_columns_that_rewrites_lead_to(llama):
    name = PREFIX + "self_attn.q_proj"
    order = torch.randperm(160, generator=torch.Generator().manual_seed(4))
    plain, _ = watched(llama, SHIFT, {})
    moved, weights = watched(llama, SHIFT, {PREFIX + part: order for part in ATTENTION})
    (linear, H), (other, ordered_H) = plain[name], moved[name]
    assert torch.equal(other.W, linear.W[:, order])
    assert torch.equal(ordered_H, H[order][:, order])
    assert torch.equal(other.correction.shift, linear.correction.shift[:, order])
    sample = linear.correction.sample
    assert torch.equal(other.correction.sample, sample)
    change = torch.randn(len(sample), 160, generator=torch.Generator().manual_seed(5))
    errors = [float(linear.correction.judge(linear.W[sample] + change))]
    errors.append(float(other.correction.judge(other.W[sample] + change[:, order])))
    assert errors[0] > 0
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)
    assert weights[name].rewrites.order.tolist() == order.tolist()


def test_nothing_is_collected_for_a_solver_that_needs_nothing(llama):
    poisoned = Stream(torch.full((2, 8, 160), torch.nan))
    solver = Watching()
    _, weights, results = refine(llama, 0, poisoned, settings=RefineSettings(solver, frozenset()))
    assert weights.keys() == solver.seen.keys()
    assert all(H is None and linear.correction is None for linear, H in solver.seen.values())
    assert {result.tokens for result in results} == {0}
