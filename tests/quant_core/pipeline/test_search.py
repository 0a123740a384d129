"""Targets of loss: the smallest map whose measured loss is within them."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bitmill.config.quantization import Budget, parse_config
from bitmill.errors import BudgetError, Cancelled, SpecError
from bitmill.pipeline import estimate
from bitmill.pipeline.admission import admit
from bitmill.pipeline.estimate import SEARCH_STEPS
from bitmill.pipeline.job import run_job
from bitmill.pipeline.stages import search
from bitmill.pipeline.stages.search import Point, next_aim
from tiny import tinier_llama, tiny_llama

TEXT = {"source": "file", "path": str(Path(__file__).parents[1] / "calibration.txt")}


def asked(loss, **changes):
    base = {
        "budget": {"max_loss_increase": loss},
        "allocation": {"order": "natural"},
        "refinement": {"asymmetric": False, "compensated_grid": False},
        "calibration": {"text": TEXT, "sequences": 4, "length": 64, "held_out": 4},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 2, "length": 64},
        "threads": 1,
    }
    return parse_config(base | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tinier_llama(tmp_path_factory.mktemp("search") / "m", initializer_range=0.2)


def steps(folder):
    """The upper end of every measured KL's interval."""
    found = [
        json.loads(path.read_text()) for path in sorted(folder.glob("work/allocate/measured-*/*"))
    ]
    return [kl + 1.96 * kl_se for kl, kl_se in found]


@pytest.mark.e2e
def test_what_is_published_was_measured_within_the_target(source, tmp_path):
    sizes = {}
    for loss in (0.3, 0.03):
        folder = tmp_path / str(loss)
        made = run_job(asked(loss), source, folder / "work", folder / "out")
        measured = steps(folder)
        assert 1 <= len(measured) <= SEARCH_STEPS
        row = made.quality.row("knapsack gptq")
        (note,) = [text for text in made.quality.warnings if "max_loss_increase" in text]
        upper = float(note.split("at most ")[1].split()[0])
        assert upper <= loss
        assert upper == pytest.approx(
            min((u for u in measured if u <= loss), key=lambda u: abs(u - upper)), rel=1e-3
        )
        assert f"{row.size:,} bytes" in note
        sizes[loss] = row.size
    assert sizes[0.3] < sizes[0.03]


@pytest.mark.e2e
def test_a_killed_search_takes_what_was_measured(source, tmp_path):
    config = asked(0.05)

    def record():
        return next(tmp_path.glob("work/*allocate/measured-0/loss.json"), None)

    with pytest.raises(Cancelled):
        run_job(
            config,
            source,
            tmp_path / "work",
            tmp_path / "out",
            should_stop=lambda: record() is not None,
        )
    before = record().stat().st_mtime_ns
    made = run_job(config, source, tmp_path / "work", tmp_path / "out")
    assert record().stat().st_mtime_ns == before
    again = run_job(config, source, tmp_path / "again", tmp_path / "out2")
    assert made.quality.row("knapsack gptq") == again.quality.row("knapsack gptq")


@pytest.mark.e2e
def test_the_blocks_of_the_best_map_are_not_refined_again(source, tmp_path):
    work, said = tmp_path / "work", []

    def blocks():
        folder = work / "refine"
        return {path.name: path.read_bytes() for path in folder.glob("block-*")}

    def run(out):
        said.clear()
        run_job(asked(0.1), source, work, tmp_path / out, on_progress=said.append)
        return [one.done for one in said if one.stage == "refine" and one.kind == "progress"]

    assert run("out") == [2]
    assert sorted(path.name for path in work.iterdir() if not path.name.startswith(".")) == sorted(
        one.stage for one in said if one.kind == "stage" and one.state == "finished"
    )
    taken = blocks()
    shutil.rmtree(work / "refine")
    assert run("again") == [1, 2]
    assert blocks() == taken


@pytest.mark.e2e
@pytest.mark.parametrize("gone", ["block-00000.*", "block-00000.safetensors"])
def test_kept_blocks_of_which_some_are_gone_are_refined_again(source, tmp_path, gone):
    """As after a kill while they were moved into a folder that another job emptied then."""
    work, kept = tmp_path / "work", tmp_path / "work" / "refined-blocks"
    with pytest.raises(Cancelled):
        run_job(
            asked(0.1),
            source,
            work,
            tmp_path / "out",
            should_stop=(work / "allocate").is_dir,
        )
    wanted = {path.name: path.read_bytes() for path in kept.glob("block-*")}
    for path in kept.glob(gone):
        path.unlink()
    run_job(asked(0.1), source, work, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (work / "refine").glob("block-*")} == wanted


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Twelve blocks, of which a search looks at the first four."""
    folder = tmp_path_factory.mktemp("search") / "deep"
    return tinier_llama(folder, initializer_range=0.2, num_hidden_layers=12)


def parts_of_search(loss, source, folder):
    """Blocks told while maps were searched for, and the first map where it was given up."""
    said = []
    run_job(asked(loss), source, folder / "work", folder / "out", on_progress=said.append)
    told = [
        one.done
        for one in said
        if one.stage == "allocate" and one.kind == "progress" and one.unit == "block"
    ]
    (record,) = folder.glob("work/allocate/first-look.json")
    return told, json.loads(record.read_text())


@pytest.mark.e2e
def test_a_first_map_that_is_far_off_ends_behind_a_third_of_its_blocks(deep, tmp_path, monkeypatch):
    told, given_up = parts_of_search(0.3, deep, tmp_path / "whole")
    assert not given_up
    assert told[:5] == [1, 2, 3, 4, 1]  # the finished ones are told again
    assert told[4:16] == list(range(1, 13))
    known = []

    def watched(points, target):
        known.append([(point.predicted, point.upper) for point in points])
        return next_aim(points, target)

    monkeypatch.setattr(search, "next_aim", watched)
    monkeypatch.setattr(search, "HOPELESS", 1e-3)
    monkeypatch.setattr(search, "CLOSE_ENOUGH", 1.0)
    told, (point,) = parts_of_search(0.3, deep, tmp_path / "less")
    assert point[0] <= 0.95 * 0.3
    assert told[4:16] == list(range(1, 13))
    assert known[0] == [tuple(point)]
    assert all(points[0] == tuple(point) for points in known)
    assert known[1][1][0] == pytest.approx(next_aim([Point(*point)], 0.3), rel=0.01)
    assert known[1][1][0] <= next_aim([Point(*point)], 0.3)


@pytest.mark.e2e
def test_blocks_that_were_looked_at_are_those_of_the_whole_map(deep, tmp_path, monkeypatch):
    """The same map, with a look at its first blocks and without."""
    run_job(asked(0.3), deep, tmp_path / "work", tmp_path / "out")
    monkeypatch.setattr(estimate, "FEWEST_BLOCKS", 99)
    run_job(asked(0.3), deep, tmp_path / "other", tmp_path / "out2")
    found = [
        {path.name: path.read_bytes() for path in folder.glob("block-*.safetensors")}
        for folder in (tmp_path / "work" / "refine", tmp_path / "other" / "refine")
    ]
    assert len(found[0]) == 12
    assert found[0] == found[1]


@pytest.mark.e2e
def test_first_blocks_that_lose_nothing_are_not_looked_at(tmp_path):
    deep = tinier_llama(tmp_path / "m", num_hidden_layers=12)
    file = deep / "model.safetensors"
    zeros = {k: v * ("_proj" not in k) for k, v in load_file(file).items()}
    save_file(zeros, file, metadata={"format": "pt"})
    config = asked(0.3, refinement={"method": "rtn"})
    made = run_job(config, deep, tmp_path / "work", tmp_path / "out")
    assert made.quality.row("knapsack rtn").texts["wiki_evaluation"].kl == 0
    assert not list(tmp_path.glob("work/allocate/first-look.json"))


@pytest.mark.e2e
def test_what_no_width_reaches_is_refused_with_the_nearest(source, tmp_path):
    config = asked(1e-7, allocation={"order": "natural", "widths": [2, 3]})
    with pytest.raises(BudgetError, match="nearest of") as error:
        run_job(config, source, tmp_path / "work", tmp_path / "out")
    assert error.value.code == "impossible_budget"
    assert error.value.param == "budget.max_loss_increase"
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_a_smallest_map_that_loses_more_than_predicted_is_not_the_last(tmp_path):
    """It alone is predicted far within the target, and measured beyond it."""
    model = tiny_llama(tmp_path / "m")
    smallest = run_job(asked(9.0), model, tmp_path / "any" / "work", tmp_path / "any" / "out")
    (upper,) = steps(tmp_path / "any")
    target = 0.95 * upper
    made = run_job(asked(target), model, tmp_path / "work", tmp_path / "out")
    first, *others = steps(tmp_path)
    assert first == upper
    assert min(others) <= target
    one, other = (job.quality.row("knapsack gptq").size for job in (smallest, made))
    assert one < other


@pytest.mark.parametrize("power", [0.7, 1.0, 1.6])
def test_the_aim_finds_the_target_of_a_power_law(power):
    tried = [Point(0.1, 3 * 0.1**power)]
    for _ in range(3):
        aim = next_aim(tried, 0.02)
        tried.append(Point(aim, 3 * aim**power))
    assert tried[-1].upper == pytest.approx(0.95 * 0.02, rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": {"method": "uniform"}},
        {"allocation": {"method": "sba"}},
        {"calibration": {"text": TEXT, "held_out": 0}},
        {"calibration": {"text": TEXT, "held_out": 1}},
        {"budget": {"max_loss_increase": 0}},
        {"budget": {"max_loss_increase": -1}},
        {"budget": {"max_loss_increase": 0.1, "bits": 3}},
        {"refinement": {"method": "omniquant", "omniquant": {"resume_parameters": "folder"}}},
    ],
)
def test_targets_that_cannot_be_searched_for_are_refused(changes):
    with pytest.raises(SpecError):
        asked(0.1, **changes)


def test_a_plan_counts_the_steps(source):
    one, all_steps = (
        admit(source, asked(0.1, budget=budget)).needs().seconds
        for budget in ({"bits": 4}, {"max_loss_increase": 0.1})
    )
    assert one < all_steps < (1 + SEARCH_STEPS) * one


def test_a_target_of_loss_limits_no_bytes():
    budget = Budget(max_loss_increase=0.1)
    assert (budget.kind, budget.value, budget.in_bytes) == ("max_loss_increase", 0.1, False)
    assert Budget.model_validate_json(budget.model_dump_json()) == budget
