"""`bitmill map`: look at bit-width maps, compare them, make them from a stored profile."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.quantization import parse_part
from bitmill.config.references import read_map
from bitmill.io.atomic import write_bytes
from bitmill.io.targets import check_file
from bitmill.reporting.picture import map_svg
from bitmill_service.cli.options import ALLOCATION, BUDGET, GroupedCommand, takes
from bitmill_service.cli.output import (
    JsonFlag,
    UrlOption,
    format_size,
    open_client,
    print_json,
    print_table,
)
from bitmill_service.cli.spec import Given, put
from bitmill_service.schemas import AllocationRequest

app = typer.Typer(
    help="Look at bit-width maps, compare them, make them from a stored profile.",
    rich_markup_mode=None,
)

_MAP_HELP = "A map (JSON), a packed folder, a published SliM-LLM file (.pt), or a job."
MapArgument = Annotated[str, typer.Argument(metavar="MAP", help=_MAP_HELP)]


def is_map(found: bytes) -> bool:
    """Whether a file holds a bit-width map."""
    try:
        return bool(BitWidthMap.model_validate_json(found).linears)
    except ValueError:
        return False


def load_map(target: str, url: str | None) -> BitWidthMap:
    """The map that a command-line argument means."""
    path = Path(target)
    if path.exists() or path.suffix in (".json", ".pt"):
        return read_map(path)
    with open_client(url) as client:
        return client.bit_width_map(target)


@app.command()
def show(target: MapArgument, *, url: UrlOption = None, json: JsonFlag = False) -> None:
    """Show the widths of every linear's groups.

    Example: bitmill map show packed
    """
    found = load_map(target, url)
    if json:
        print_json(found.model_dump(mode="json"))
        return
    rows = [
        (name, str(len(widths)), f"{sum(widths) / len(widths):.3f}", "".join(map(str, widths)))
        for name, widths in found.linears.items()
    ]
    print_table(("linear", "groups", "mean", "widths"), rows)
    counts = Counter(width for widths in found.linears.values() for width in widths)
    spread = ", ".join(f"{counts[width]} of {width} bits" for width in sorted(counts))
    typer.echo(f"{sum(counts.values())} groups in {len(rows)} linears: {spread}")


@app.command()
def picture(
    target: MapArgument,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="SVG file to write.")],
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Draw a map: blocks by modules, a band of colour for every group.

    Example: bitmill map picture packed --out map.svg
    """
    drawing = map_svg(load_map(target, url)).encode()
    check_file(out, lambda data: data.lstrip().startswith(b"<svg "), param="out")
    write_bytes(out, drawing)
    if json:
        print_json({"file": str(out)})
    else:
        typer.echo(f"wrote {out}")


@app.command()
def diff(
    first: MapArgument, second: MapArgument, *, url: UrlOption = None, json: JsonFlag = False
) -> None:
    """Show the linears in which two maps differ; exit code 0 also when they do.

    Example: bitmill map diff first.json second.json
    """
    a, b = load_map(first, url).linears, load_map(second, url).linears
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if json:
        print_json({name: [_digits(a.get(name)), _digits(b.get(name))] for name in names})
        return
    print_table(
        ("linear", "first", "second"), [(n, _digits(a.get(n)), _digits(b.get(n))) for n in names]
    )
    typer.echo(f"{len(names)} of {len({**a, **b})} linears differ")


@app.command(cls=GroupedCommand)
@takes(BUDGET, ALLOCATION)
def allocate(
    profile: Annotated[str, typer.Argument(metavar="PROFILE", help="Id of a stored profile.")],
    *,
    given: Given,
    curve: Annotated[
        list[float] | None,
        typer.Option(help="Budgets of the same kind for the curve, repeatable; default all."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write the map here, over a map alone."),
    ] = None,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Spend a budget on a stored sensitivity profile, without an accelerator.

    What is not given is as in the profile.

    Example: bitmill map allocate PROFILE --bits 2.5 --out map.json
    """
    asked = put({"budget": {}}, given) | ({"curve": curve} if curve else {})
    request = parse_part(AllocationRequest, asked)
    if out is not None:
        check_file(out, is_map, param="out")
    with open_client(url) as client:
        found = client.allocate(profile, request)
    if out is not None:
        write_bytes(out, found.map.to_json().encode())
    if json:
        print_json(found.model_dump(mode="json"))
        return
    loss = "-" if found.predicted_loss is None else f"{found.predicted_loss:.5f} nats per token"
    typer.echo(
        f"code bits {found.code_bits:.4f}, bits {found.bits:.4f}, {format_size(found.size)}, "
        f"predicted loss {loss}"
    )
    for point in found.curve:
        what = point.error or f"{format_size(point.size or 0)}, loss {point.predicted_loss}"
        typer.echo(f"  {point.budget:g}: {what}")


def _digits(widths: tuple[int, ...] | None) -> str:
    return "" if widths is None else "".join(map(str, widths))
