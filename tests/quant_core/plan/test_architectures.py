"""Every declared architecture: linears found, and the streamed forward equals transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bitmill.calibration.windows import CalibrationSet
from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.methods import GPTQ
from bitmill.config.quantization import parse_config
from bitmill.errors import ModelError
from bitmill.evaluation.compare import with_weights
from bitmill.evaluation.logits import StreamedLogits, perplexity_and_kl
from bitmill.models.experts import is_expert_stack
from bitmill.models.streamed import StreamedModel, set_weight, weight_of
from bitmill.plan.architectures import ARCHITECTURES, architecture
from bitmill.plan.model_plan import make_plan
from bitmill.refinement.model import RefinedModel, RefineInputs, refine_model
from bitmill.sensitivity.fisher import SensitivitySettings, profile_knapsack
from tiny import VOCABULARY, save_tiny
from tiny_architectures import COVERED, tiny_config

SPEC = parse_config({"budget": {"code_bits": 3}})

QUICK = GPTQ(compensated_grid=False, scale_refit=False)

BIASED_OR_FUSED = {"phi3", "opt", "bloom", "gpt_neox", "gpt2", "starcoder2"}


@pytest.fixture(scope="module", params=sorted(COVERED))
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / request.param, tiny_config(request.param))


def test_every_declaration_is_covered() -> None:
    assert set(COVERED) == set(ARCHITECTURES)


def test_streamed_forward_equals_transformers(model_folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    plan = make_plan(model_folder, SPEC)
    model = StreamedModel(model_folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, VOCABULARY, (3, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(tokens).logits
        hidden = model.embed(tokens)
        for i in range(model.block_count):
            hidden = model.run_block(i, model.load_block(i), hidden)
        logits = model.logits(hidden)
    assert expected.abs().max() > 1
    assert (logits - expected).abs().max() < 1e-5


def test_all_linears_of_the_blocks_are_found(model_folder: Path) -> None:
    """Against transformers' own modules: every nn.Linear, Conv1D and expert matrix, no router."""
    plan = make_plan(model_folder, SPEC)
    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    expected: dict[str, tuple[int, ...]] = {}
    for name, module in reference.get_submodule(plan.block_prefix).named_modules():
        full = f"{plan.block_prefix}.{name}"
        if isinstance(module, torch.nn.Linear | Conv1D):
            expected[full] = tuple(weight_of(module).shape)
        elif is_expert_stack(module):
            count, double, hidden = module.gate_up_proj.shape
            for e in range(count):
                expected[f"{full}.{e}.gate_proj"] = (double // 2, hidden)
                expected[f"{full}.{e}.up_proj"] = (double // 2, hidden)
                expected[f"{full}.{e}.down_proj"] = (hidden, double // 2)
    assert {li.name: (li.rows, li.columns) for li in plan.linears} == expected
    per_block = COVERED[plan.model_type][1]
    assert [len(plan.block_linears(i)) for i in range(plan.block_count)] == (
        [per_block] * plan.block_count
    )


def test_plan_and_source_agree_on_every_weight(model_folder: Path) -> None:
    plan = make_plan(model_folder, SPEC)
    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    model = StreamedModel(model_folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    block = model.load_block(1)
    for name, module in model.linears(block, 1).items():
        from_source = model.source.weight(plan.by_name[name])
        assert torch.equal(weight_of(module), from_source)
        parent, _, leaf = name.rpartition(".")
        if ".experts." not in name:
            own = getattr(reference.get_submodule(parent), leaf)
            assert torch.equal(weight_of(own), from_source)


def test_hidden_units_may_change_places_where_the_plan_says_so(model_folder: Path) -> None:
    plan = make_plan(model_folder, SPEC)
    assert bool(plan.feeders) == (plan.model_type not in BIASED_OR_FUSED)
    model = StreamedModel(model_folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    block, moved = model.load_block(0), model.load_block(0)
    modules = model.linears(moved, 0)
    generator = torch.Generator().manual_seed(3)
    for reader in modules.keys() & plan.feeders.keys():
        weight = weight_of(modules[reader])
        order = torch.randperm(weight.shape[1], generator=generator)
        set_weight(modules[reader], weight[:, order].clone())
        for feeder in plan.feeders[reader]:
            set_weight(modules[feeder], weight_of(modules[feeder])[order].clone())
    hidden = model.embed(torch.randint(0, VOCABULARY, (3, 20), generator=generator))
    with torch.no_grad():
        expected, found = model.run_block(0, block, hidden), model.run_block(0, moved, hidden)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_siblings_read_the_same_input(model_folder: Path) -> None:
    """Groups come in execution order, and members of a group see the very same tensor."""
    plan = make_plan(model_folder, SPEC)
    model = StreamedModel(model_folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    block = model.load_block(0)
    modules = model.linears(block, 0)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    tokens = torch.randint(0, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.run_block(0, block, model.embed(tokens))
    groups = plan.siblings(0)
    assert sorted(name for group in groups for name in group) == sorted(modules)
    for group in groups:
        assert all(torch.equal(inputs[group[0]], inputs[name]) for name in group)
    first = list(inputs)[: len(groups[0])]
    assert set(first) == set(groups[0])


def test_every_block_is_profiled_and_refined(model_folder: Path, tmp_path: Path) -> None:
    plan = make_plan(model_folder, SPEC)
    model = StreamedModel(model_folder, plan, device=torch.device("cpu"), dtype=torch.float32)
    tokens = torch.randint(0, VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(3))
    profile = profile_knapsack(model, tokens, plan, SensitivitySettings(widths=(8,), rows=32))
    assert [linear.name for linear in profile.linears] == [linear.name for linear in plan.linears]
    orders = {li.name: torch.tensor(profile.orders[str(li.order)]).long() for li in profile.linears}
    widths = {shape.name: (8,) * shape.groups for shape in plan.shapes}
    calibration = CalibrationSet(tokens[:6], tokens[6:], "")
    inputs = RefineInputs(calibration, BitWidthMap(linears=widths), orders)
    refine_model(model, inputs, QUICK, tmp_path, seed=0, on_unit=lambda *_: None)
    refined = RefinedModel(tmp_path, plan)
    packed = with_weights(model, lambda name: refined.linear(name).dequantize())
    divergence = perplexity_and_kl(StreamedLogits(model), packed, tokens).kl.mean()
    assert 0 < divergence < 0.01


def test_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'mamba' is not supported.*llama.*opt") as caught:
        architecture("mamba")
    assert caught.value.code == "unsupported_architecture"
    with pytest.raises(ModelError, match=r"its text model alone is, as 'gemma3_text'"):
        architecture("gemma3")
