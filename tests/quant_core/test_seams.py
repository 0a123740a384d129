"""The seams: what docs/extending.md adds from outside runs whole jobs, and no file names a thing
that plugs in but its own."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitmill
from bitmill.config.bit_width_map import LinearShape
from bitmill.config.methods import METHODS
from bitmill.config.quantization import DEFAULT_FORMAT, parse_config
from bitmill.config.rounded import ACTIVATION_RULES
from bitmill.config.transforms import TRANSFORMS
from bitmill.errors import FormatError, SpecError
from bitmill.formats.accounting import checkpoint_tensors, footprint
from bitmill.formats.codec import open_checkpoint
from bitmill.formats.format import FORMATS, Format
from bitmill.io.safetensors import read_headers
from bitmill.pipeline.admission import admit
from bitmill.pipeline.job import Result, run_job
from tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
TEXT = {"source": "file", "path": str(Path(__file__).parent / "calibration.txt")}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package of the page, installed for this process and for those that it starts."""
    folder = tmp_path_factory.mktemp("site")
    page = (ROOT / "docs" / "extending.md").read_text()
    for code in re.findall(r"```python\n# (.+?)\n(.*?)```", page, re.DOTALL):
        target = folder / code[0]
        target.parent.mkdir(exist_ok=True)
        target.write_text(code[1])
    entries = re.search(r"```toml\n.*?\n(\[project\.entry-points.*?)```", page, re.DOTALL)
    assert entries is not None
    installed = folder / "symmetric-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: symmetric\nVersion: 1.0\n")
    groups = re.sub(r'\[project\.entry-points\."(.+?)"\]', r"[\1]", entries[1]).replace('"', "")
    (installed / "entry_points.txt").write_text(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        above = [path for path in [os.environ.get("PYTHONPATH")] if path]
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *above]))
        yield folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with input channels of very different size."""
    folder = tiny_llama(tmp_path_factory.mktemp("source"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and ".layers." in name:
            tensor[:, ::7] *= 6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spec(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "budget": {"bits": 9},
        "allocation": {"method": "uniform", "order": "natural", "widths": [4, 6]},
        "refinement": {
            "method": "symmetric",
            "settings": {"slack": 0.0},
            "transforms": [{"name": "balance"}],
        },
        "calibration": {"text": TEXT, "sequences": 2, "length": 64, "held_out": 1},
        "evaluation": {"texts": ["wiki_evaluation"], "sequences": 1, "length": 64},
        "threads": 1,
        "format": "plain-bytes",
    }
    return base | changes


@dataclass(frozen=True)
class Job:
    result: Result
    source: Path
    work: Path


@pytest.fixture(scope="module")
def job(package: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A whole job with all three."""
    folder = tmp_path_factory.mktemp("job")
    result = run_job(parse_config(spec()), source, folder / "work", folder / "out")
    return Job(result, source, folder / "work")


@pytest.mark.e2e
def test_a_job_with_all_three_from_outside_ends_and_reads_back(job: Job) -> None:
    checkpoint = open_checkpoint(job.result.folder)
    assert checkpoint.format.name == "plain-bytes"
    assert checkpoint.rewrites == {"balance"}
    original = load_file(job.source / "model.safetensors")
    scales = set()
    for name, widths in checkpoint.bit_widths.linears.items():
        N, K = original[f"{name}.weight"].shape
        weight = checkpoint.linear(LinearShape(name, N, K)).unpack()
        assert weight.widths == widths
        assert weight.codes.dtype == torch.uint8
        scales |= set(weight.rewrites[0].tensors()["channel_scales"].unique().tolist())
        error = (weight.dequantize() - original[f"{name}.weight"]).norm()
        assert error < 0.1 * original[f"{name}.weight"].norm(), name
    assert len(scales) > 1
    row = job.result.quality.row("uniform symmetric")
    assert row.texts["wiki_evaluation"].kl < 0.05


@pytest.mark.e2e
def test_its_sizes_are_those_that_were_said_before(job: Job) -> None:
    plan = admit(job.source, parse_config(spec())).plan
    bit_widths = open_checkpoint(job.result.folder).bit_widths
    said = {t.name: t for t in checkpoint_tensors(plan, bit_widths.linears, "natural")}
    found = read_headers(job.result.folder)
    assert {n: (t.dtype, t.shape) for n, t in said.items()} == {
        n: (t.dtype, t.shape) for n, t in found.items()
    }
    spent = footprint(plan, bit_widths)
    assert spent.size == sum(f.stat().st_size for f in job.result.folder.glob("*.safetensors"))
    assert spent.size == job.result.quality.row("uniform symmetric").size
    stored = sum(
        said[f"{n}.{k}"].nbytes
        for n in bit_widths.linears
        for k in ("codes", "scales", "zeros", "channel_scales")
    )
    assert spent.bits == 8 * stored / plan.weights


@pytest.mark.e2e
def test_a_method_without_statistics_collects_none(
    package: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("statistics were collected")

    monkeypatch.setattr("bitmill.refinement.block.collect", refuse)
    asked = spec(format=DEFAULT_FORMAT, refinement={"method": "symmetric"})
    run_job(parse_config(asked), source, tmp_path / "work", tmp_path / "out")
    with pytest.raises(AssertionError, match="were collected"):
        run_job(parse_config(spec(refinement={})), source, tmp_path / "work", tmp_path / "other")


@pytest.mark.e2e
def test_a_folder_that_transformers_cannot_load_is_refused(job: Job) -> None:
    with pytest.raises(FormatError, match="'plain-bytes', which transformers has no quantizer for"):
        bitmill.load(job.result.folder)


PRODUCT = ("quant_core/bitmill", "workers/bitmill_workers", "service/bitmill_service")
OWN = {
    "config/methods.py",
    "config/codes.py",  # the format of each code
    "config/effort.py",  # what each word stands for
    "config/transforms.py",
    "config/quantization.py",  # the JSON of all methods' settings, and the defaults
    "bitmill_workers/job_spec.py",  # the same JSON
    "formats/format.py",
    "quant/tensors.py",
    "quant/rewrites.py",
    "transforms/",
    "refinement/omniquant/",
    "solvers/",
}
READERS = {"bitmill/hf.py", "inference/hf_quantizer.py", "inference/engine_layers.py"}
"""What registers the packed format with transformers, which finds it by that format's own name, and
what fills the layers of serving engines from it."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in PRODUCT:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())


def test_no_other_file_names_a_method_or_a_format() -> None:
    names = {*METHODS.names(), *FORMATS.names()} - {"gguf"}  # sources are such files too
    kinds = [registry[name] for registry in (METHODS, FORMATS) for name in registry.names()]
    classes = {kind.__name__ for kind in kinds}
    folders = {
        kind.__module__.rpartition(".")[0]
        for kind in kinds
        if issubclass(kind, Format) or kind.__module__.endswith(".settings")
    }
    own = OWN | {folder.replace(".", "/") + "/" for folder in folders}
    found = []
    for path, tree in sources():
        if any(part in path for part in own):
            continue
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and id(node) not in texts:
                named = node.value in names
            elif isinstance(node, ast.ImportFrom):
                packed = str(node.module).startswith("bitmill.formats.packed")
                named = bool(classes & {alias.name for alias in node.names})
                named |= packed and not any(reader in path for reader in READERS)
            else:
                continue
            if named:
                found.append(f"{path}:{node.lineno}")
    assert not found


def plugged_in() -> dict[str, Any]:
    """Methods and transforms that have a folder of their own, and published rules of activations,
    by name."""
    registries = (METHODS, TRANSFORMS, ACTIVATION_RULES)
    found = {name: registry[name] for registry in registries for name in registry.names()}
    return {
        name: kind
        for name, kind in found.items()
        if kind.__module__ == f"bitmill.{kind.__module__.split('.')[1]}.{name}.settings"
        or hasattr(kind, "title")
    }


@pytest.mark.parametrize("name", plugged_in())
def test_a_method_is_its_folder_its_test_a_registry_line_and_a_line_of_docs(name: str) -> None:
    kind = plugged_in()[name]
    own = kind.__module__.replace(".", "/").removesuffix("settings")
    names = re.compile(rf"\b({name}|{kind.__name__}|{kind.__module__})\b", re.IGNORECASE)
    elsewhere = [
        f"{path}: {line.strip()}"
        for folder in PRODUCT
        for path in sorted((ROOT / folder).rglob("*.py"))
        if own not in path.as_posix()
        for line in path.read_text().splitlines()
        if names.search(line)
    ]
    place = f'"{name}": "{kind.__module__}:{kind.__name__}",'
    assert [line.partition(": ")[2] for line in elsewhere] == [place]
    tests = list((ROOT / "tests").rglob(f"test_{name}.py"))
    assert len(tests) == 1
    documented = (ROOT / "docs" / "methods.md").read_text().splitlines()
    title = getattr(kind, "title", kind.__name__)
    lines = [line for line in documented if line.startswith(f"| {title} |")]
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"allocation": {"order": "activation"}}, "allocation.order: it has no place"),
        ({"format": DEFAULT_FORMAT}, "balance: it has no place for what the transform 'balance'"),
        ({"format": "nothing"}, "format 'nothing' is unknown"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused_before_a_job(
    package: Path, source: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(problem)):
        admit(source, parse_config(spec(**changes)))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "symmetric", "settings": {"slack": 2}}, "slack"),
        ({"method": "symmetric", "transforms": [{"name": "balance", "x": 1}]}, "transforms.0.x"),
        ({"method": "symmetric", "transforms": [{"name": "twist"}]}, "'twist' is unknown"),
        ({"method": "symmetric", "transforms": [{"name": "order"}]}, "allocation.order asks"),
        ({"method": "omniquant", "transforms": [{"name": "balance"}]}, "which takes none"),
    ],
)
def test_settings_from_outside_are_checked_where_they_enter(
    package: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError, match=re.escape(problem)):
        parse_config(spec(refinement=changes))
