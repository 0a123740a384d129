"""Commands that need torch: `python -m bitmill quantize|evaluate|generate|bench|verify`.

The `bitmill` script runs these in a process of their own, so that the service stays torch-free.
Exit codes: 0 done, 2 refused input, 3 failed, 4 cancelled.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitmill.config.quantization import Budget, QuantizationConfig, parse_config
from bitmill.errors import (
    BitmillError,
    Cancelled,
    InputError,
    ModelError,
    as_bitmill_error,
)
from bitmill.io.atomic import read_json
from bitmill.pipeline.progress import Progress
from bitmill.reporting.learning import learning_summary
from bitmill.results import QualityReport
from bitmill.runtime.child import as_child
from bitmill.runtime.launch import as_rank, check_devices, is_rank, run_ranks


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m bitmill", description=__doc__.split("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)
    _quantize_parser(commands.add_parser("quantize", help="quantize a local model folder"))
    evaluate = commands.add_parser("evaluate", help="perplexity and KL of a packed folder")
    evaluate.add_argument("folder", type=Path)
    evaluate.add_argument("--source", type=Path, required=True, help="folder of the source model")
    evaluate.add_argument("--file", help="GGUF file in the source folder")
    evaluate.add_argument("--texts", nargs="+", default=["wiki_evaluation", "handbook_evaluation"])
    evaluate.add_argument("--sequences", type=int)
    evaluate.add_argument("--length", type=int, default=2048)
    _task_options(evaluate)
    generate = commands.add_parser("generate", help="continue a prompt with a packed model")
    generate.add_argument("folder", type=Path)
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=64)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--chat", action="store_true")
    bench = commands.add_parser("bench", help="speed and memory of a packed folder")
    bench.add_argument("folder", type=Path)
    bench.add_argument("--dtype", default="auto")
    bench.add_argument("--prompt-tokens", type=int, default=512)
    bench.add_argument("--new-tokens", type=int, default=32)
    verify = commands.add_parser("verify", help="check a packed folder (stage of a job)")
    verify.add_argument("order", type=Path)
    for command in (evaluate, generate, bench):
        command.add_argument("--device", default="cpu")
        command.add_argument("--json", action="store_true")
    return top


def _quantize_parser(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, nargs="?", help="folder of the source model")
    command.add_argument("--file", help="GGUF file in the folder")
    command.add_argument("--spec", type=Path, help="a job specification (JSON) to start from")
    command.add_argument("--out", type=Path, required=True, help="folder to make")
    command.add_argument("--work", type=Path, help="folder of finished stages, kept for resuming")
    command.add_argument("--profiles", type=Path, help="folder of sensitivity profiles to reuse")
    command.add_argument("--map", type=Path, help="bit-width map for --method map")
    command.add_argument("--code-bits", type=float)
    command.add_argument("--bits", type=float)
    command.add_argument("--size", type=int, help="bytes of all safetensors files")
    command.add_argument("--method", choices=["uniform", "sba", "knapsack", "map"])
    command.add_argument("--widths", type=int, nargs="+")
    command.add_argument("--order", choices=["natural", "activation"])
    command.add_argument("--fuse-siblings", action="store_true", default=None)
    command.add_argument("--embeddings", choices=["keep", "quantize"])
    command.add_argument("--refine", choices=["rtn", "gptq", "omniquant"])
    command.add_argument(
        "--resume-parameters",
        type=Path,
        metavar="DIR",
        help="a folder that a job with the same settings made: take what it learned, train nothing",
    )
    command.add_argument("--calibration-text", type=Path)
    command.add_argument("--calibration-sequences", type=int)
    command.add_argument("--calibration-length", type=int)
    command.add_argument("--held-out", type=int)
    command.add_argument("--profile-sequences", type=int)
    command.add_argument("--evaluation-sequences", type=int)
    command.add_argument("--evaluation-length", type=int)
    command.add_argument("--baseline", action="store_true", help="also measure uniform GPTQ")
    command.add_argument(
        "--baseline-widths",
        type=int,
        nargs="+",
        choices=[2, 3, 4],
        default=[],
        help="also measure uniform GPTQ at these widths",
    )
    _task_options(command)
    command.add_argument("--seed", type=int)
    command.add_argument("--threads", type=int)
    command.add_argument("--device", default="cpu")
    command.add_argument("--devices", type=int, help="accelerators to work on together")
    command.add_argument("--json", action="store_true")


def _task_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tasks", nargs="+", help="lm-evaluation-harness tasks to measure")
    command.add_argument(
        "--task-folder", type=Path, help="folder of task files of one's own; they may run code"
    )


def build_config(arguments: argparse.Namespace) -> tuple[Path, str | None, QuantizationConfig]:
    """Model folder, GGUF file in it and configuration of a `quantize` call.

    Options take the place of the file's values.
    """
    spec = read_json(arguments.spec) if arguments.spec else {}
    if not isinstance(spec, dict):
        raise InputError(f"{arguments.spec} holds no JSON object", param="--spec")
    folder, file = _take_model(spec, arguments)
    _take_references(spec)
    budget = {key: getattr(arguments, key) for key in Budget.model_fields}
    if any(value is not None for value in budget.values()):
        spec["budget"] = {key: value for key, value in budget.items() if value is not None}
    _put(spec, "allocation", arguments, method="method", widths="widths", order="order")
    _put(spec, "allocation", arguments, fuse_siblings="fuse_siblings", embeddings="embeddings")
    _put(spec, "refinement", arguments, method="refine")
    if arguments.resume_parameters is not None:
        refinement = spec.get("refinement", {})
        given = str(arguments.resume_parameters)
        omniquant = refinement.get("omniquant", {}) | {"resume_parameters": given}
        spec["refinement"] = refinement | {"omniquant": omniquant}
    _put(
        spec,
        "calibration",
        arguments,
        sequences="calibration_sequences",
        length="calibration_length",
        held_out="held_out",
        profile_sequences="profile_sequences",
    )
    if arguments.calibration_text:
        spec["calibration"] = spec.get("calibration", {}) | {
            "text": {"source": "file", "path": str(arguments.calibration_text)}
        }
    _put(
        spec,
        "evaluation",
        arguments,
        sequences="evaluation_sequences",
        length="evaluation_length",
        tasks="tasks",
    )
    baselines = ["uniform"] * arguments.baseline
    baselines += [f"uniform-{width}" for width in arguments.baseline_widths]
    if baselines:
        spec["evaluation"] = spec.get("evaluation", {}) | {"baselines": baselines}
    if arguments.map is not None:
        spec["allocation"] = spec.get("allocation", {}) | {"map": read_json(arguments.map)}
    for key in ("seed", "threads", "devices"):
        if getattr(arguments, key) is not None:
            spec[key] = getattr(arguments, key)
    return folder, file, parse_config(spec)


def _take_model(spec: dict[str, Any], arguments: argparse.Namespace) -> tuple[Path, str | None]:
    """Take the model, and what else the library has no use for, out of a job specification."""
    model = spec.pop("model", {})
    for key in ("schema_version", "label", "deadline_s"):
        spec.pop(key, None)
    if arguments.model is not None:
        return arguments.model, arguments.file
    if not isinstance(model, dict) or model.get("source") != "path":
        raise InputError("quantize reads local folders; submit a job for other models")
    return Path(model["path"]), model.get("file")


def _take_references(spec: dict[str, Any]) -> None:
    """Replace what a job specification refers to by what lies in it or at a local path."""
    allocation, omniquant = spec.get("allocation", {}), spec.get("refinement", {}).get("omniquant")
    for part, key, source, value in (
        (allocation, "map", "inline", "map"),
        (omniquant or {}, "resume_parameters", "path", "path"),
    ):
        given = part.get(key)
        if not isinstance(given, dict):
            continue
        if given.get("source") != source:
            raise InputError(f"{key} of a job needs a service; give a local one")
        part[key] = given.get(value)


def _put(spec: dict[str, Any], part: str, arguments: argparse.Namespace, **options: str) -> None:
    given = {key: getattr(arguments, option) for key, option in options.items()}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        spec[part] = spec.get(part, {}) | given


def show_progress(event: Progress) -> None:
    """One plain line per event, on standard error."""
    text = f"{event.stage}: {event.state or event.message or ''}".rstrip(": ")
    if event.kind == "progress":
        text = f"{event.stage}: {event.unit} {event.done}/{event.total} {event.message or ''}"
    if event.kind == "warning":
        text = f"{event.stage}: warning: {event.message}"
    print(text.rstrip(), file=sys.stderr, flush=True)


def _quantize(arguments: argparse.Namespace) -> dict[str, Any]:
    model, file, config = build_config(arguments)
    if not model.is_dir():
        raise ModelError(f"there is no folder {model}", code="model_not_found", param="model")
    if is_rank():
        _run_job(arguments, config, model, file, arguments.work)
        return {}
    with tempfile.TemporaryDirectory(dir=_parent(arguments.out)) as scratch:
        work = arguments.work or Path(scratch, "work")
        if config.devices > 1:
            again = ["-P", "-m", "bitmill", *arguments.line, "--work", str(work)]
            check_devices(config.devices, arguments.device)
            run_ranks(config.devices, again)
        else:
            _run_job(arguments, config, model, file, work)
    quality = QualityReport.load(arguments.out / "quality.json")
    return {
        "folder": str(arguments.out),
        "rows": [row.model_dump(mode="json") for row in quality.rows],
        "learning": learning_summary(quality.blocks, quality.tuning, resumed=quality.resumed),
        "warnings": [f"warning: {warning}" for warning in quality.warnings],
    }


def _run_job(
    arguments: argparse.Namespace,
    config: QuantizationConfig,
    model: Path,
    file: str | None,
    work: Path,
) -> None:
    with as_rank(arguments.device) as (group, device):
        from bitmill.pipeline.job import run_job

        run_job(
            config,
            model,
            work,
            arguments.out,
            gguf=file,
            profile_folder=arguments.profiles,
            task_folder=arguments.task_folder,
            device=device,
            group=group,
            on_progress=show_progress,
        )


def _parent(out: Path) -> Path:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return out.absolute().parent


def _evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    from bitmill.evaluation.compare import evaluate_folder

    rows = evaluate_folder(
        arguments.folder,
        arguments.source,
        gguf=arguments.file,
        texts=tuple(arguments.texts),
        sequences=arguments.sequences,
        length=arguments.length,
        device=arguments.device,
        tasks=tuple(arguments.tasks or ()),
        task_folder=arguments.task_folder,
    )
    return {"rows": [row.model_dump(mode="json") for row in rows]}


def _generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from bitmill.inference.generate import stream

    pieces = []
    for piece in stream(
        arguments.folder,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        chat=arguments.chat,
        device=arguments.device,
    ):
        pieces.append(piece)
        if not arguments.json:
            print(piece, end="", flush=True)
    if not arguments.json:
        print()
    return {"prompt": arguments.prompt, "text": "".join(pieces)}


def _bench(arguments: argparse.Namespace) -> dict[str, Any]:
    from bitmill.inference.bench import bench

    result = bench(
        arguments.folder,
        device=arguments.device,
        dtype=arguments.dtype,
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
    )
    if not arguments.json:
        for name in ("packed", "dense"):
            speed = result[name]
            print(
                f"{name:7} prefill {speed['prefill_tokens_per_second']:9.1f} tokens/s, decode "
                f"{speed['decode_tokens_per_second']:7.1f} tokens/s, "
                f"peak {speed['peak_bytes'] / 1e9:.2f} GB"
            )
    return result


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    with as_child():
        from bitmill.pipeline.job import verify_order

        verify_order(read_json(arguments.order))
    return {}


def show_rows(rows: list[dict[str, Any]]) -> None:
    """The table of a quality report, as plain text."""
    print(f"{'method':28} {'code bits':>9} {'bits':>6} {'bytes':>12}  text: perplexity, KL")
    for row in rows:
        figures = [
            f"{text}: {q['perplexity']:.3f} ± {q['perplexity_se']:.3f}, {q['kl']:.4f}"
            for text, q in row["texts"].items()
        ]
        code_bits = "" if row["code_bits"] is None else f"{row['code_bits']:.3f}"
        bits = "" if row["bits"] is None else f"{row['bits']:.3f}"
        size = "" if row["size"] is None else str(row["size"])
        print(f"{row['method']:28} {code_bits:>9} {bits:>6} {size:>12}  {'; '.join(figures)}")
        for task, found in row["tasks"].items():
            print(f"  {task}: {', '.join(map(_metric, found['metrics'].items()))}")


def _metric(named: tuple[str, dict[str, float | None]]) -> str:
    name, found = named
    error = "" if found["se"] is None else f" ± {found['se']:.4f}"
    return f"{name} {found['value']:.4f}{error}"


def _print_error(error: BitmillError, *, as_json: bool) -> None:
    """One message on standard error, in the form that `bitmill` itself uses."""
    text = f"error: {error.message}"
    if error.hint is not None:
        text += f"\n  {error.hint}"
    print(json.dumps({"error": error.to_dict()}) if as_json else text, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = parser().parse_args(argv)
    arguments.line = sys.argv[1:] if argv is None else list(argv)
    run = {
        "quantize": _quantize,
        "evaluate": _evaluate,
        "generate": _generate,
        "bench": _bench,
        "verify": _verify,
    }[arguments.command]
    try:
        result = run(arguments)
    except Cancelled:
        return 4
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        known = as_bitmill_error(error)
        if known.code == "internal":
            raise
        _print_error(known, as_json=getattr(arguments, "json", False))
        return 2 if isinstance(known, InputError) else 3
    if getattr(arguments, "json", False):
        print(json.dumps(result))
    elif "rows" in result:
        show_rows(result["rows"])
        for line in (*result.get("learning", ()), *result.get("warnings", ())):
            print(line)
    return 0
