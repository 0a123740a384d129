import numpy as np
import pytest
import torch

from bitmill.calibration.statistics import Stream
from bitmill.models.streamed import StreamedModel
from bitmill.quant.grid import clip_search, nearest_codes, values
from bitmill.quant.rotation import packed_rewrites
from bitmill.sensitivity import sba
from bitmill.sensitivity.fisher import PROFILE_CLIP
from bitmill.sensitivity.sba import SbaInput, SbaSearch, group_ranking, profile_block_sba
from bitmill.solvers.factor import activation_order
from bitmill.solvers.trellis import encode_siblings
from streaming import streamed
from tiny import tiny_opt


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that the inputs of these tests are several chunks."""
    monkeypatch.setattr(sba, "CHUNK_TOKENS", 64)


def layer(K=700, N=24, T=160, seed=0):
    generator = torch.Generator().manual_seed(seed)
    energy = torch.exp(1.5 * torch.randn(K, generator=generator))
    x = torch.randn(T, K, generator=generator) * energy
    W = 0.05 * torch.randn(N, K, generator=generator)
    return W, x, x.T @ x / T, torch.randn(N, generator=generator)


def slow_kl(W, x, H, bias, base, ranking, p, order=None):
    """KL of one p, from scratch in fp64: every group quantized again, one output, one softmax."""
    if order is not None:
        W, x, H = W[:, order], x[:, order], H[order][:, order]
    widths = {g: base for g in range(-(-W.shape[1] // 128))}
    for step in range(p):
        widths[ranking[step]] = base - 1
        widths[ranking[len(ranking) - 1 - step]] = base + 1
    quantized = []
    for group, width in widths.items():
        part = slice(128 * group, min(128 * group + 128, W.shape[1]))
        w = W[:, part].contiguous()
        grid = clip_search(w, width, H.diagonal()[part], settings=PROFILE_CLIP[width])
        quantized.append(values(nearest_codes(w, grid, width), grid))
    source = torch.softmax(x.double() @ W.double().T + bias.double(), 1)
    changed = x.double() @ torch.cat(quantized, 1).double().T + bias.double()
    log_changed = torch.log_softmax(changed, 1)
    return float((source * (source.log() - log_changed)).sum(1).mean())


@pytest.mark.parametrize("ordered", [False, True])
def test_all_incremental_divergences_equal_the_direct_ones(ordered):
    W, x, H, bias = layer()
    order = activation_order(H.diagonal()) if ordered else None
    search = SbaSearch(W, SbaInput.prepare(H, order), 3, bias=bias)
    for part in x.split(50):
        search.add(part)
    record = search.record()
    assert len(record.kl) == 3
    ranking = record.salience.tolist()
    for p, found in enumerate(record.kl):
        direct = slow_kl(W, x, H, bias, 3, ranking, p, order)
        assert found == pytest.approx(direct, rel=1e-4, abs=1e-5)
    assert len(set(record.kl)) == 3


def test_the_bias_stands_on_both_sides():
    W, x, H, bias = layer(K=256)
    kl = []
    for shift in (0.0, 5.0):
        search = SbaSearch(W, SbaInput.prepare(H), 4, bias=bias + shift)
        search.add(x)
        kl.append(search.record().kl)
    assert np.allclose(kl[0], kl[1], rtol=1e-3)
    search = SbaSearch(W, SbaInput.prepare(H), 4, bias=10 * bias)
    search.add(x)
    assert not np.allclose(search.record().kl, kl[0], rtol=1e-2)


@pytest.mark.parametrize(
    ("K", "pairs"), [(64, 0), (128, 0), (200, 0), (256, 1), (384, 1), (576, 2)]
)
def test_few_groups_work_and_the_tail_is_never_swapped(K, pairs):
    W, x, H, _ = layer(K=K)
    search = SbaSearch(W, SbaInput.prepare(H), 3)
    search.add(x)
    record = search.record()
    assert len(record.kl) == pairs + 1
    assert sorted(record.salience.tolist()) == list(range(K // 128))
    assert np.isfinite(record.kl).all()


@pytest.mark.parametrize(("base", "ordered"), [(2, True), (3, False), (4, True)])
def test_of_trellis_codes_every_candidate_is_as_far_off_as_its_encoding(base, ordered):
    generator = torch.Generator().manual_seed(base)
    x = torch.randn(600, 520, generator=generator)
    x *= torch.exp(0.7 * torch.randn(520, generator=generator))
    W, H = 0.02 * torch.randn(64, 520, generator=generator), x.T @ x / len(x)
    order = activation_order(H.diagonal()) if ordered else None
    rewrites = packed_rewrites("trellis", order)
    rotated, inputs = rewrites.weights(W), rewrites.inputs(x)
    shared = SbaInput.prepare(rewrites.hessian(H))
    search = SbaSearch(rotated, shared, base, code="trellis")
    search.add(inputs)
    record = search.record()
    ranking, source = record.salience.tolist(), torch.softmax(x.double() @ W.double().T, 1)
    encoded = []
    for p in range(len(record.kl)):
        rates = [base] * 5
        for step in range(p):
            rates[ranking[step]], rates[ranking[-1 - step]] = base - 1, base + 1
        (codes,) = encode_siblings([rotated], None, [tuple(rates)])
        changed = inputs.double() @ codes.packed_values().double().T
        kl = source * (source.log() - torch.log_softmax(changed, 1))
        encoded.append(float(kl.sum(1).mean()))
    np.testing.assert_allclose(record.kl, encoded, rtol=0.08)
    assert record.kl.argmin() == np.argmin(encoded)


def test_salience_has_its_closed_form_where_inputs_do_not_correlate():
    """H diagonal: U_jj^2 = 1 / (H_jj + damping), so S_g = sum w^2 (H_jj + damping)."""
    generator = torch.Generator().manual_seed(4)
    W = torch.randn(6, 512, generator=generator)
    diagonal = torch.rand(512, generator=generator) + 0.1
    diagonal[128:256] *= 10
    diagonal[384:] *= 0.1
    damped = diagonal + 0.01 * diagonal.mean()
    S = (W.square().sum(0) * damped).view(4, 128).sum(1)
    H = torch.diag(diagonal)
    assert group_ranking(W, SbaInput.prepare(H).pivots) == torch.argsort(S).tolist()
    assert torch.equal(H, torch.diag(diagonal))


def test_equal_saliences_are_ranked_in_column_order():
    assert group_ranking(torch.ones(3, 400), torch.ones(400)) == [0, 1, 2]


def test_one_strong_and_one_weak_group_are_worth_swapping():
    generator = torch.Generator().manual_seed(1)
    W = 0.05 * torch.randn(32, 256, generator=generator)
    x = torch.randn(200, 256, generator=generator)
    x[:, :128] *= 30
    search = SbaSearch(W, SbaInput.prepare(x.T @ x / 200), 3)
    search.add(x)
    record = search.record()
    assert record.salience.tolist() == [1, 0]
    assert record.kl[1] < 0.6 * record.kl[0]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    return streamed(tiny_opt(tmp_path_factory.mktemp("opt")))


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_block_is_profiled_on_its_own_inputs(opt, order):
    tokens = torch.randint(2, 258, (3, 48), generator=torch.Generator().manual_seed(0))
    hidden, block = opt.embed(tokens), opt.load_block(0)
    stream = Stream(hidden.clone())
    records, orders = profile_block_sba(opt, 0, block, stream, 3, order=order, batch=2)
    linears = opt.linears(block, 0)
    assert set(records) == set(linears)
    assert set(orders) == (set(linears) if order == "activation" else set())
    name = "model.decoder.layers.0.fc2"
    seen = []
    handle = linears[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = opt.run_block(0, block, hidden)
    handle.remove()
    assert torch.allclose(stream.hidden, output, atol=1e-6)
    x = seen[0].reshape(-1, seen[0].shape[-1]).detach()
    module = linears[name]
    search = SbaSearch(
        module.weight.detach(),
        SbaInput.prepare(x.T @ x / len(x), orders.get(name)),
        3,
        bias=module.bias.detach(),
    )
    search.add(x)
    assert records[name].salience.tolist() == search.record().salience.tolist()
    assert np.allclose(records[name].kl, search.record().kl, rtol=1e-3)


def test_of_trellis_codes_a_block_is_profiled_behind_the_rotation(opt):
    tokens = torch.randint(2, 258, (3, 48), generator=torch.Generator().manual_seed(0))
    hidden, block = opt.embed(tokens), opt.load_block(0)
    linears, name = opt.linears(block, 0), "model.decoder.layers.0.fc2"
    records, orders = profile_block_sba(
        opt, 0, block, Stream(hidden.clone()), 3, order="activation", batch=2, code="trellis"
    )
    plain, same = profile_block_sba(
        opt, 0, block, Stream(hidden.clone()), 3, order="activation", batch=2
    )
    assert all(torch.equal(orders[key], same[key]) for key in linears)
    seen = []
    handle = linears[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    opt.run_block(0, block, hidden)
    handle.remove()
    x = seen[0].reshape(-1, seen[0].shape[-1]).detach()
    rewrites = packed_rewrites("trellis", orders[name])
    search = SbaSearch(
        rewrites.weights(linears[name].weight.detach()),
        SbaInput.prepare(rewrites.hessian(x.T @ x / len(x))),
        3,
        bias=linears[name].bias.detach(),
        code="trellis",
    )
    search.add(rewrites.inputs(x))
    assert records[name].salience.tolist() == search.record().salience.tolist()
    assert np.allclose(records[name].kl, search.record().kl, rtol=1e-3)
    assert not np.allclose(records[name].kl, plain[name].kl, rtol=1e-2)


def test_candidates_are_judged_on_the_first_windows_up_to_a_limit(opt, monkeypatch):
    tokens = torch.randint(2, 258, (5, 48), generator=torch.Generator().manual_seed(1))
    hidden, block = opt.embed(tokens), opt.load_block(0)
    every, _ = profile_block_sba(opt, 0, block, Stream(hidden.clone()), 3, batch=2)
    monkeypatch.setattr(sba, "EVALUATED_TOKENS", 2 * 48 + 47)
    some, _ = profile_block_sba(opt, 0, block, Stream(hidden.clone()), 3, batch=2)
    for name, record in some.items():
        assert record.salience.tolist() == every[name].salience.tolist()
        assert record.kl.tolist() != every[name].kl.tolist()
        assert abs(record.kl - every[name].kl).max() < 0.5 * every[name].kl.max()
