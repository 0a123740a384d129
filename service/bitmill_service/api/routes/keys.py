"""API keys: make, list, revoke. Needs the scope admin."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response, status

from bitmill_service.api.context import ID_PATTERN, ContextDep, PrincipalDep
from bitmill_service.api.views import key_view
from bitmill_service.http.openapi import CHANGES, JSON_BODY, refusals
from bitmill_service.schemas import KeyList, KeyRequest, NewKeyView

router = APIRouter(prefix="/v1/keys", tags=["keys"])

KeyId = Annotated[str, Path(pattern=ID_PATTERN, description="The 8 characters that name a key.")]


@router.post(
    "",
    status_code=status.HTTP_201_CREATED,
    response_model=NewKeyView,
    responses=refusals(*JSON_BODY),
)
def create_key(
    request: KeyRequest, context: ContextDep, caller: PrincipalDep, response: Response
) -> NewKeyView:
    """Make a key. The answer is the only place that ever shows it."""
    key, record = context.keys.store.create(
        request.name,
        scopes=request.scopes,
        tenant=request.tenant,
        expires_in=request.expires_in_s,
        limits=request.limits,
        created_by=caller.key_id,
    )
    context.keys.forget()
    response.headers["Cache-Control"] = "no-store"
    return NewKeyView(key=key, **dict(key_view(record)))


@router.get("", response_model=KeyList)
def list_keys(context: ContextDep) -> KeyList:
    """All keys without their secrets, oldest first, revoked ones too."""
    return KeyList(keys=[key_view(record) for record in context.keys.store.list()])


@router.delete(
    "/{key_id}",
    status_code=status.HTTP_204_NO_CONTENT,
    responses=refusals(*CHANGES, "key_not_found"),
)
def revoke_key(key_id: KeyId, context: ContextDep) -> None:
    """End a key, within seconds on every replica; repeating it is fine."""
    context.keys.store.revoke(key_id)
    context.keys.forget()
