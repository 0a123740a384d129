import pytest
import torch

from bitmill.calibration.source_run import run_source_block
from bitmill.calibration.statistics import BlockState, Stream, collect
from streaming import streamed
from tiny import tiny_opt


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    return streamed(tiny_opt(tmp_path_factory.mktemp("opt")))


def test_one_run_gives_hessians_kept_inputs_and_outputs(opt):
    tokens = torch.randint(2, 258, (5, 48), generator=torch.Generator().manual_seed(0))
    hidden, block = opt.embed(tokens), opt.load_block(1)
    groups = opt.plan.input_groups(1)
    state = BlockState(opt, 1, block, None, opt.linears(block, 1))
    expected = collect(state, groups, Stream(hidden), batch=2)
    stream = Stream(hidden.clone())
    seen = run_source_block(opt, 1, block, stream, batch=2, keep=2)
    assert torch.allclose(stream.hidden, opt.run_block(1, block, hidden), atol=1e-5)
    assert set(seen.H) == set(seen.inputs) == {group[0] for group in groups}
    for lead, H in seen.H.items():
        assert torch.allclose(H, expected[lead].H, atol=1e-5)
        assert [len(x) for x in seen.inputs[lead]] == [96]
    whole = run_source_block(opt, 1, block, Stream(hidden.clone()), batch=2, keep=5)
    for lead, parts in whole.inputs.items():
        x = torch.cat(parts)
        assert torch.allclose(x.T @ x / len(x), whole.H[lead], atol=1e-4)
        assert torch.equal(x[:96], torch.cat(seen.inputs[lead]))
