"""`bitmill sweep`: a grid of jobs, here or on a service; `bitmill sweeps`: those of a service.

A sweep here has a folder: `cell-NN` with the result of each cell, `sweep.json` with what came of
it, the table in three formats, the plot, and `stages` until all cells have ended. Run again, it
goes on where it was. The folder of a service's sweep has its `sweep.json` too, which names it, the
table and the plot.
"""

from __future__ import annotations

import json as jsonlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitmill.config.quantization import parse_part
from bitmill.errors import STOPS, BitmillError, InputError, ModelError, SpecError, reason
from bitmill.io.atomic import read_json, sha256_json, write_bytes, write_json
from bitmill.io.targets import check_file, check_kept
from bitmill.pipeline.admission import admit
from bitmill.pipeline.requests import QuantizeRequest, Request
from bitmill.pipeline.work_folder import is_of_shared_stages, work_folder
from bitmill.reporting.sweep_table import SweepRow, SweepTable
from bitmill.results import QUALITY_NAME, QualityReport
from bitmill.runtime.warm import warm_library
from bitmill_service.cli.cells import CellsWatch, ended
from bitmill_service.cli.local import DeviceOption, run_library
from bitmill_service.cli.output import (
    JsonFlag,
    UrlOption,
    format_time,
    goes_on,
    open_client,
    print_json,
    print_more,
    print_table,
)
from bitmill_service.cli.progress import JobWatch
from bitmill_service.client.client import Client
from bitmill_service.schemas import SweepView
from bitmill_workers.sweep_spec import Cell, SweepSpec, in_turn, parse_sweep, value_text

sweeps = typer.Typer(help="See, follow and cancel sweeps of a service.", rich_markup_mode=None)

SweepArgument = Annotated[str, typer.Argument(metavar="SWEEP", help="Sweep id.")]
TableOption = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="DIR", help="Folder to write the table and the plot to."),
]
_RECORD, _STAGES, _TABLE = "sweep.json", "stages", "table"
_FAILED = 3


def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="YAML or JSON: `job` (a specification), `grid` (path: values)."
        ),
    ],
    *,
    api: Annotated[
        bool, typer.Option("--api", help="Have a service run it; Ctrl-C leaves it running.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder for table, plot and, here, all results."
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="With --api: submit, and do not wait.")
    ] = False,
    key: Annotated[
        str | None, typer.Option(help="With --api: idempotency key, to repeat the call.")
    ] = None,
    profiles: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Sensitivity profiles to reuse and keep.")
    ] = None,
    device: DeviceOption = "cpu",
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Run a job for every cell of a grid; equal stages run once, and a failed cell stops nothing.

    Exit code 3 where a cell failed. A finished part of a sweep is not run again. Example: bitmill
    sweep study.yaml --out study
    """
    spec = read_sweep(file)
    parse_part(Request, {"device": device})
    if api:
        _check_folder(out, here=False)
        with open_client(url) as client:
            submitted = client.submit_sweep(spec, idempotency_key=key)
            if not json:
                typer.echo(f"sweep {submitted.id}: {len(submitted.cells or ())} cells")
            if no_wait:
                if json:
                    print_json(submitted.model_dump(mode="json"))
                return
            _follow(client, submitted.id, out, url, as_json=json)
        return
    if out is None:
        raise InputError("give --out DIR for the results, or --api", param="--out")
    rows = _run_here(spec, out, profiles, device)
    _end(SweepTable(rows), as_json=json)


@sweeps.command("list")
def list_sweeps(
    *,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Sweeps on a page.")] = 50,
    after: Annotated[
        str | None, typer.Option(help="Cursor that the page before ended with.")
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """List sweeps, newest first.

    Example: bitmill sweeps list
    """
    with open_client(url) as client:
        page = client.sweeps(limit=limit, after=after)
    if json:
        print_json(page.model_dump(mode="json"))
        return
    rows = [
        (one.id, one.label or "-", _counted(one), ", ".join(one.axes), format_time(one.created_at))
        for one in page.sweeps
    ]
    print_table(("sweep", "label", "cells", "axes", "created"), rows)
    print_more("sweeps", "list", after=page.next, limit=limit, url=url)


@sweeps.command("show")
def show_sweep(
    sweep: SweepArgument, *, out: TableOption = None, url: UrlOption = None, json: JsonFlag = False
) -> None:
    """Show what the cells of a sweep have found so far; with --out write table and plot too.

    Example: bitmill sweeps show SWEEP --out study
    """
    with open_client(url) as client:
        _check_folder(out, here=False)
        view = client.sweep(sweep)
        table = view.table
        if out is not None:
            _claim(out, sweep)
            _write(table, out)
    if json:
        print_json(view.model_dump(mode="json"))
    else:
        _print(table)


@sweeps.command("wait")
def wait_sweep(
    sweep: SweepArgument, *, out: TableOption = None, url: UrlOption = None, json: JsonFlag = False
) -> None:
    """Follow the cells of a sweep until every one has ended; exit code 3 where one failed.

    On a terminal one table shows what each cell does. Example: bitmill sweeps wait SWEEP
    """
    _check_folder(out, here=False)
    with open_client(url) as client:
        _follow(client, sweep, out, url, as_json=json)


@sweeps.command("cancel")
def cancel_sweep(sweep: SweepArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Ask all unfinished jobs of a sweep to stop.

    Example: bitmill sweeps cancel SWEEP
    """
    with open_client(url) as client:
        view = client.cancel_sweep(sweep)
    if json:
        print_json(view.model_dump(mode="json"))
    else:
        typer.echo(f"sweep {view.id}: {_counted(view)}")


@sweeps.command("delete")
def delete_sweep(sweep: SweepArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Remove a sweep whose jobs have finished, with these jobs and their files.

    Example: bitmill sweeps delete SWEEP
    """
    with open_client(url) as client:
        client.delete_sweep(sweep)
    if json:
        print_json({"deleted": sweep})
    else:
        typer.echo(f"sweep {sweep} deleted")


def read_sweep(file: Path) -> SweepSpec:
    """The specification of a YAML or JSON file; raises `SpecError`."""
    import yaml

    try:
        loaded = yaml.load(file.read_text(encoding="utf-8"), _loader())  # a SafeLoader
    except RecursionError as error:
        raise SpecError(f"{file} is nested too deeply", param="FILE") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        told = " ".join(reason(error).split())
        raise SpecError(f"{file} cannot be read as YAML: {told}", param="FILE") from error
    try:
        jsonlib.dumps(loaded)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{file} holds what JSON has no place for: {error}; put dates in quotes", param="FILE"
        ) from error
    return parse_sweep(loaded)


def _loader() -> type[Any]:
    """PyYAML's SafeLoader, which keeps the last of equal keys, refusing them."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            if twice:
                raise yaml.MarkedYAMLError(
                    problem=f"{twice[0]} stands twice", problem_mark=node.start_mark
                )
            return node

    return Loader


def _run_here(spec: SweepSpec, out: Path, profiles: Path | None, device: str) -> list[SweepRow]:
    """Run all cells that have not succeeded before; what came of each, in the grid's order."""
    cells = spec.cells()
    _check_folder(out, here=True)
    _check(cells)
    record = read_json(out / _RECORD) if (out / _RECORD).is_file() else {}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _RECORD, record)
    rows: dict[int, SweepRow] = {}
    with warm_library():
        for cell in in_turn(cells):
            rows[cell.number] = _cell_here(cell, out, record, profiles, device)
            write_json(out / _RECORD, record)
            _write(SweepTable([rows[number] for number in sorted(rows)]), out)
            typer.echo(ended(rows[cell.number], len(cells)), err=True)
    if all(row.state == "succeeded" for row in rows.values()):
        shutil.rmtree(out / _STAGES, ignore_errors=True)
    return [rows[number] for number in sorted(rows)]


def _cell_here(
    cell: Cell, out: Path, record: dict[str, Any], profiles: Path | None, device: str
) -> SweepRow:
    """Run one cell, or find that it has succeeded; `record` is changed."""
    name, asked = f"cell-{cell.number:02d}", sha256_json(cell.spec.model_dump(mode="json"))
    before, folder = record.get(name, {}), out / name
    if before.get("asked") != asked or not (folder / QUALITY_NAME).is_file():
        begin, error = time.monotonic(), None
        typer.echo(cell.name, err=True)
        try:
            _quantize(cell, folder, out / _STAGES, profiles, device)
        except STOPS:
            raise
        except BitmillError as raised:
            error = raised
        before = {
            "asked": "" if error else asked,
            "seconds": round(time.monotonic() - begin, 3),
            "error": error and error.to_dict(),
        }
        record[name] = before
    failed = before["error"]
    quality = None if failed else QualityReport.load(folder / QUALITY_NAME)
    return SweepRow(
        cell=cell.number,
        axes={path: value_text(value) for path, value in cell.values.items()},
        state="failed" if failed else "succeeded",
        job=name,
        quality=quality.rows[1] if quality else None,
        seconds=before["seconds"],
        alone_s=round(sum(quality.seconds.values()), 3) if quality else None,
        error=failed and failed["message"],
    )


def _quantize(cell: Cell, folder: Path, stages: Path, profiles: Path | None, device: str) -> None:
    model = cell.spec.model
    with (
        work_folder(folder, None) as work,
        JobWatch(Console(stderr=True, highlight=False)) as watch,
    ):
        request = parse_part(
            QuantizeRequest,
            {
                "model": _model_of(cell),
                "file": model.file,
                "config": cell.spec.config(),
                "out": folder,
                "work": work,
                "stages": stages,
                "profiles": profiles,
                "device": device,
            },
        )
        run_library("quantize", request, lambda m: watch.show(m["progress"]["kind"], m["progress"]))


def _model_of(cell: Cell) -> Path:
    """The model's folder; raises `InputError` for a cell that cannot be run here."""
    spec = cell.spec
    if spec.model.source != "path":
        raise InputError(f"{cell.name}: a sweep here reads local folders; give --api for others")
    if spec.exports:
        raise InputError(f"{cell.name}: exports are jobs of a service; give --api", param="exports")
    folder = Path(spec.model.path)
    if not folder.is_dir():
        problem = f"{cell.name}: there is no folder {folder}"
        raise ModelError(problem, code="model_not_found", param="model")
    return folder


def _check(cells: Sequence[Cell]) -> None:
    """Raise what is wrong with the first cell that cannot be run, as far as headers tell."""
    for cell in cells:
        folder = _model_of(cell)
        try:
            admit(folder, cell.spec.config(), gguf=cell.spec.model.file)
        except InputError as error:
            error.add(f"asked for by {cell.name}")
            raise


def _check_folder(out: Path | None, *, here: bool) -> None:
    """Raise `InputError` unless the folder is absent, empty or an earlier sweep's of this kind.

    Another's table or `cell-01` has no such `sweep.json` beside it.
    """
    if out is None:
        return
    has_record = (out / _RECORD).exists()
    check_kept(
        out, lambda name: name == _RECORD or (has_record and _is_of_a_sweep(name)), param="--out"
    )
    if has_record:
        check_file(out / _RECORD, lambda data: _is_record(data, here=here), param="--out")
    check_kept(out / _STAGES, is_of_shared_stages, param="--out")


def _is_record(data: bytes, *, here: bool) -> bool:
    """Whether this is the `sweep.json` of a sweep that ran here, or of a service's."""
    try:
        record = jsonlib.loads(data)
    except ValueError:
        return False
    if not isinstance(record, dict):
        return False
    return all(map(_is_cell, record)) if here else [*record] == ["sweep"]


def _claim(out: Path, sweep_id: str) -> None:
    """Make the folder one of a service's sweep."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / _RECORD, {"sweep": sweep_id})


def _is_cell(name: str) -> bool:
    number = name.removeprefix("cell-")
    return number != name and number.isdecimal()


def _is_of_a_sweep(name: str) -> bool:
    files = (_RECORD, _STAGES, "plot.svg", *(f"{_TABLE}.{end}" for end in ("csv", "json", "md")))
    return name in files or _is_cell(name)


def _follow(
    client: Client, sweep_id: str, out: Path | None, url: str | None, *, as_json: bool
) -> None:
    """Show cells as they go on and end, then the table."""
    view = client.sweep(sweep_id)
    if out is not None:
        _claim(out, sweep_id)
    screen = Console(stderr=True, highlight=False, quiet=as_json)
    known = goes_on("sweep", sweep_id, url, follow="sweeps wait", cancel="sweeps cancel")
    with known, CellsWatch(view, screen) as watch:
        for event in client.sweep_events(sweep_id):
            if watch.on_event(event) and watch.renew(view := client.sweep(sweep_id)):
                _write_to(out, view)
        watch.renew(view := client.wait_sweep(sweep_id))
    _write_to(out, view)
    _end(view.table, as_json=as_json)


def _write_to(out: Path | None, view: SweepView) -> None:
    if out is not None:
        _write(view.table, out)


def _write(table: SweepTable, out: Path) -> None:
    written = {"json": table.to_json(), "csv": table.to_csv(), "md": table.to_markdown()}
    for end, text in written.items():
        write_bytes(out / f"{_TABLE}.{end}", text.encode())
    if (picture := table.to_svg()) is not None:
        write_bytes(out / "plot.svg", picture.encode())


def _print(table: SweepTable) -> None:
    left_out = {"job", "error", "alone_s"}
    kept = [i for i, name in enumerate(table.head) if name not in left_out]
    print_table([table.head[i] for i in kept], [[row[i] for i in kept] for row in table.body])


def _end(table: SweepTable, *, as_json: bool) -> None:
    """Print the table; exit code 3 where a cell failed."""
    if as_json:
        typer.echo(table.to_json(), nl=False)
    else:
        _print(table)
    if any(row.state == "failed" for row in table.rows):
        raise typer.Exit(_FAILED)


def _counted(view: SweepView) -> str:
    return ", ".join(f"{count} {state}" for state, count in view.counts.items())
