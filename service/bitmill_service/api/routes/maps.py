"""Bit-width maps that users bring: this project's JSON, or a file published with SliM-LLM."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, status
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from bitmill.config.bit_width_map import BitWidthMap
from bitmill.config.made_for import MadeFor
from bitmill.config.slim_llm import read_slim_map
from bitmill.errors import FormatError, InputError, first_problem
from bitmill.io import bounded_json
from bitmill_service.api.context import ContextDep, HashCursor, PrincipalDep
from bitmill_service.api.views import map_view
from bitmill_service.http.openapi import CHANGES, refusals
from bitmill_service.http.problems import ProblemError
from bitmill_service.schemas import MapPage, MapView

router = APIRouter(prefix="/v1/bit-width-maps", tags=["bit-width maps"])

_Hash = Annotated[str | None, Query(pattern=r"^[0-9a-f]{64}$")]
_ANY_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/BitWidthMap"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=MapView,
    responses=refusals(*CHANGES, "payload_too_large"),
    openapi_extra=_ANY_BODY,
)
async def upload_map(
    request: Request,
    context: ContextDep,
    caller: PrincipalDep,
    name: Annotated[str | None, Query(max_length=200)] = None,
    prefix: Annotated[
        str,
        Query(
            max_length=200,
            description="For SliM-LLM files: what stands before a linear's name, {i} the layer.",
        ),
    ] = "model.layers.{i}.",
    shape: _Hash = None,
    weights: _Hash = None,
) -> MapView:
    """Store a map under the hash of its content; the same content of the same model gives the same
    id.

    A SliM-LLM file (`torch.save` of a dict) is read without executing anything in it. shape and
    weights are the fingerprint of the model that it is of, by default what `made_for` of the map
    says.
    """
    body = await request.body()
    found = await run_in_threadpool(parse_map, body, prefix)
    if not found.linears:
        raise FormatError("the body has no linear with widths", param="linears")
    content = found.of(None).model_dump(mode="json")
    if weights is not None and shape is None:
        raise InputError("weights without shape: give both, or shape alone", param="shape")
    model = found.made_for
    if shape is not None and (model is None or (model.shape, model.weights) != (shape, weights)):
        model = MadeFor(shape=shape, weights=weights)
    if name is None and model is not None and model.model:
        name = model.model[:200]
    record = await run_in_threadpool(
        context.catalog.add_map, content, name=name, tenant=caller.tenant, model=model
    )
    return map_view(record)


@router.get("", response_model=MapPage)
def list_maps(
    context: ContextDep,
    caller: PrincipalDep,
    model: _Hash = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[HashCursor | None, Query()] = None,
) -> MapPage:
    """Stored maps by id; `model` is the shape or the weights of a model's fingerprint."""
    found = context.catalog.maps(tenant=caller.sees, model=model, limit=limit, after=after)
    return MapPage(
        maps=[map_view(record) for record in found],
        next=found[-1].id if len(found) == limit else None,
    )


@router.get("/{map_id}", response_model=BitWidthMap, responses=refusals("map_not_found"))
def get_map(map_id: str, context: ContextDep, caller: PrincipalDep) -> BitWidthMap:
    """One stored map."""
    record = context.catalog.map(map_id, tenant=caller.sees)
    if record is None:
        raise ProblemError("map_not_found", f"there is no map {map_id!r}", param="map_id")
    return record.parsed()


@router.delete(
    "/{map_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "map_not_found", "map_in_use"),
)
def delete_map(map_id: str, context: ContextDep, caller: PrincipalDep) -> None:
    """Remove a map that no unfinished job needs; others who stored the same keep theirs."""
    get_map(map_id, context, caller)
    context.catalog.drop("map", map_id, tenant=caller.sees)


def parse_map(body: bytes, prefix: str) -> BitWidthMap:
    """The map that an uploaded body holds; raises `FormatError`."""
    if body.lstrip()[:1] == b"{":
        try:
            return BitWidthMap.model_validate_json(body)
        except ValidationError as error:
            where, problem = first_problem(error)
            where = where or "body"
            raise FormatError(
                f"the body is not a bit-width map: {where}: {problem}", param=where
            ) from error
    if not body:
        raise FormatError("the body is empty: send a bit-width map", param="body")
    with suppress(ValueError):
        bounded_json.loads(body)
        raise FormatError("the body is JSON, but no object, as a bit-width map is", param="body")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "body")  # errors name it
        file.write_bytes(body)
        return read_slim_map(file, prefix=prefix)
