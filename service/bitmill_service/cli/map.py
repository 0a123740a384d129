"""`bitmill map`: look at bit-width maps, compare them, make them from a stored profile."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.made_for import MadeFor
from bitmill.config.quantization import Budget, QuantizationConfig, parse_part
from bitmill.config.references import read_map
from bitmill.errors import FormatError, InputError, ModelError
from bitmill.io.atomic import write_bytes
from bitmill.io.targets import check_file
from bitmill.plan.fingerprint import Fingerprint
from bitmill.plan.model_plan import Plan, plan_source
from bitmill.plan.source_model import read_source
from bitmill.plan.zoo import check_fits, find_maps, match_of
from bitmill.reporting.picture import is_map_svg, map_svg
from bitmill_service.cli.options import ALLOCATION, BUDGET, GroupedCommand, takes
from bitmill_service.cli.output import (
    JsonFlag,
    UrlOption,
    format_size,
    maybe_folder,
    open_client,
    print_json,
    print_table,
)
from bitmill_service.cli.spec import Given, local_folder, model_reference, put
from bitmill_service.client.client import Client
from bitmill_service.schemas import AllocationRequest
from bitmill_workers.job_spec import HubModel

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
    with maybe_folder(target), open_client(url) as client:
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
    if found.made_for:
        typer.echo(f"made for {found.made_for}")
    if found.outliers:
        kept = ", ".join(f"{count} of {name}" for name, count in found.outliers.items())
        typer.echo(f"{sum(found.outliers.values())} columns in 16 bits: {kept}")


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
    if out.suffix.lower() not in ("", ".svg"):
        raise InputError(
            f"{out} would hold SVG, whatever its name says: give a name that ends in .svg",
            param="out",
        )
    check_file(out, is_map_svg, param="out")
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
    a, b = (_described(load_map(target, url)) for target in (first, second))
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    if json:
        print_json({name: [a.get(name, ""), b.get(name, "")] for name in names})
        return
    print_table(("linear", "first", "second"), [(n, a.get(n, ""), b.get(n, "")) for n in names])
    typer.echo(f"{len(names)} of {len({**a, **b})} linears differ")


@app.command()
def find(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model's folder, or ORG/NAME on the Hub.")
    ],
    *,
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            metavar="DIR|ORG/NAME",
            help="A folder, or a Hub repository, of maps; repeatable. Else the service's.",
        ),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Read all weights, to know maps of the very same.")
    ] = False,
    url: UrlOption = None,
    json: JsonFlag = False,
) -> None:
    """Find bit-width maps that fit a model: of its weights, of its shape, or of its linears.

    Example: bitmill map find models/SmolLM2-135M --from maps
    """
    with model_folder(model) as folder:
        plan = _largest_plan(folder)
        fingerprint = Fingerprint.of_folder(folder, weights=weights and folder == Path(model))
    if source:
        found = [
            {"from": place} | asdict(one)
            for place in source
            for one in find_maps(zoo_folder(place), fingerprint, plan)
        ]
    else:
        with open_client(url) as client:
            found = _of_service(client, fingerprint, plan)
    if json:
        print_json({"model": fingerprint.model_dump(), "maps": found})
        return
    rows = [(one["match"], one["from"], one["file"], f"{one['bits']:.3f}") for one in found]
    print_table(("match", "from", "map", "mean bits"), rows)


def _of_service(client: Client, fingerprint: Fingerprint, plan: Plan) -> list[dict[str, Any]]:
    """Maps of the same weights or shape, which `--map upload:ID` names."""
    rows = []
    for one in client.maps(model=fingerprint.shape):
        try:
            check_fits(client.stored_map(one.id), plan)
        except FormatError:
            continue
        entry = MadeFor(shape=one.shape, weights=one.weights)
        total = sum(int(width) * count for width, count in one.histogram.items())
        rows.append(
            {
                "from": "service",
                "file": f"upload:{one.id}",
                "match": match_of(fingerprint, entry),
                "bits": total / one.groups,
                "model": one.name,
            }
        )
    return sorted(rows, key=lambda row: row["match"] != "weights")


def _largest_plan(folder: Path) -> Plan:
    """With embedding and head, which a map may have widths for, where the model stores them."""
    source, config = read_source(folder), QuantizationConfig(budget=Budget(bits=8))
    try:
        return plan_source(source, config.packs_embeddings)
    except ModelError:
        return plan_source(source, config)


@contextmanager
def model_folder(model: str) -> Iterator[Path]:
    """The folder of a model; of one on the Hub, config and headers alone."""
    here = _here(model)
    if here is not None:
        yield here
        return
    from bitmill_service.api.hub_headers import fetch_headers
    from bitmill_service.settings import ServiceSettings

    named = parse_part(HubModel, model_reference(model))
    with tempfile.TemporaryDirectory(prefix="bitmill-map-") as scratch:
        fetch_headers(named, ServiceSettings(), Path(scratch))
        yield Path(scratch)


def _here(place: str) -> Path | None:
    """The folder of this machine that is named, or None where a repository is.

    Raises `InputError` for a path that leads to no folder.
    """
    if Path(place).is_dir():
        return Path(place)
    if local_folder(place) is not None:
        raise InputError(f"there is no folder {place}", param=place)
    return None


def zoo_folder(place: str) -> Path:
    """A folder of maps; one on the Hub is fetched into the Hub's cache, maps alone.

    Raises `ModelError` for a repository that is not to be had.
    """
    here = _here(place)
    if here is not None:
        return here
    from huggingface_hub import snapshot_download

    from bitmill_service.settings import ServiceSettings
    from bitmill_workers.execution.fetch import hub_errors

    named, settings = parse_part(HubModel, model_reference(place)), ServiceSettings()
    with hub_errors(named):
        found = snapshot_download(
            named.repo_id,
            revision=named.revision,
            endpoint=settings.hub_endpoint,
            token=settings.hub_token.get_secret_value() if settings.hub_token else None,
            allow_patterns=["*.json", "*.pt"],
        )
    return Path(found)


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


def _described(found: BitWidthMap) -> dict[str, str]:
    """Linear -> digits of its widths, with the number of its outlier columns where it has some."""
    beside = {name: f" + {count} columns" for name, count in found.outliers.items()}
    return {
        name: "".join(map(str, widths)) + beside.get(name, "")
        for name, widths in found.linears.items()
    }
