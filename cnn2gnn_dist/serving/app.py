"""The HTTP app: endpoints, and errors as JSON with their remedy."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from cnn2gnn_dist import __version__
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.serving import wire
from cnn2gnn_dist.serving.guard import UNTIL, Guard, error_response
from cnn2gnn_dist.serving.limits import Refused, check_token
from cnn2gnn_dist.serving.service import Service

_log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
MOST = 1000
"""Most classes, or neighbors, in an answer."""

_NAMED = 5
"""Most parameters named in a refusal."""

Top = Annotated[int, Query(ge=1, le=MOST, description="classes in an answer")]
Neighbours = Annotated[int, Query(ge=0, le=MOST, description="neighbors in an answer")]
Name = Annotated[str, Query(description="of the image, where it is the body")]

_IMAGES = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "images": {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                    "required": ["images"],
                }
            },
            "application/json": {"schema": wire.ImagesIn.model_json_schema(ref_template="{model}")},
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_KEYS = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": wire.KeysIn.model_json_schema()}},
    }
}


def create_app(service: Service, *, hosts: frozenset[str] | None = None) -> FastAPI:
    """Return the app of a served model.

    Args:
        service: what it serves.
        hosts: accepted names in the ``Host`` header; None: any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="cnn2gnn-dist",
        version=__version__,
        description="Classify images, see what the answers are based on, and edit the memory.",
        lifespan=lifespan,
        dependencies=[Depends(_check_parameters)],
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
    )
    _add_answers(app, service)
    _add_memory(app, service)
    _add_edits(app, service)
    _add_page(app)
    _add_errors(app)
    app.state.service = service
    app.add_middleware(Guard, limits=service.limits, metrics=service.metrics, hosts=hosts)
    return app


async def _check_parameters(request: Request) -> None:
    """Refuse a query with parameters that its endpoint doesn't have: they would be ignored without a word.

    GET requests of endpoints without any, the page and those of probes, may have what they like.

    Raises:
        Refused: unknown parameters.
    """
    known = [one.alias for one in request.scope["route"].dependant.query_params]
    unknown = sorted(set(request.query_params) - set(known))
    if unknown and (known or request.method != "GET"):
        names = ", ".join(wire.plain_text(name) for name in unknown[:_NAMED])
        raise Refused(
            422,
            f"unknown query parameters: {names}",
            f"use {', '.join(known)}" if known else "this endpoint has none: see /openapi.json",
        )


def _add_answers(app: FastAPI, service: Service) -> None:
    @app.post("/predict", openapi_extra=_IMAGES, summary="Classify images")
    async def predict(
        request: Request, top: Top = 5, neighbours: Neighbours = 5, name: Name = "image"
    ) -> Response:
        upload = await wire.read_upload(request, service.limits, name)
        made = await service.predict(
            upload.images, top=top, neighbours=neighbours, until=getattr(request.state, UNTIL)
        )
        answers = [wire.as_json(one) for one in made.answers]
        unreadable = all(one.error is not None for one in made.answers)
        content: dict[str, Any] = {"memory_version": made.version, "answers": answers}
        if unreadable:
            content |= {"error": "no image could be read", "remedy": wire.READABLE}
        return Response(
            wire.json_bytes(content), 422 if unreadable else 200, media_type="application/json"
        )

    @app.get("/healthz", summary="Whether the server answers")
    async def healthz() -> Response:
        alive = service.alive()
        return JSONResponse(
            {
                "status": "ok" if alive else "stopping",
                "version": __version__,
                "model": service.live.current.spec.source.get("name", ""),
                "memory_version": service.live.version,
            },
            200 if alive else 503,
        )

    @app.get("/metrics", summary="Metrics for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_memory(app: FastAPI, service: Service) -> None:
    @app.get(
        "/memory", summary="The version being served, its classes, and the limits of a request"
    )
    async def memory() -> dict[str, Any]:
        return service.memory() | {
            "editable": None not in (service.token, service.live.version)
            and not service.live.pinned,
            "limits": {"images": service.limits.images, "bytes": service.limits.body_bytes},
        }

    @app.get("/memory/keys", summary="Keys of the images of the memory, by row")
    def keys(  # in a thread: thousands of them take a while
        class_name: Annotated[str | None, Query(alias="class")] = None,
        after: Annotated[int, Query(ge=-1, description="rows above this one")] = -1,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    ) -> dict[str, Any]:
        current = service.live.current.memory
        if current is None:
            return {"version": None, "keys": []}
        rows = current.live_ids
        if class_name is not None:
            stored = current.class_named(class_name)
            if stored is None:
                raise Refused(404, "the memory has no such class", "GET /memory lists the classes")
            rows = rows[current.of_class(stored)[rows]]
        rows = rows[np.searchsorted(rows, min(after, current.rows), side="right") :][:limit]
        return {
            "version": current.version.number,
            "keys": [
                {"row": row, "key": key, "class": current.classes[current.labels[row]]}
                for row, key in zip(rows.tolist(), current.keys(rows), strict=True)
            ],
        }

    @app.get(
        "/memory/{row}/thumbnail", summary="The picture of a row", response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )  # fmt: skip
    async def thumbnail(row: int, version: int | None = None) -> Response:
        data = await service.thumbnail(row, version)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


def _add_edits(app: FastAPI, service: Service) -> None:
    def check(request: Request) -> None:
        check_token(request.headers.get("authorization"), service.token)

    @app.post(
        "/memory", openapi_extra=_IMAGES, status_code=201,
        summary="Add images to a class, which may be new",
    )  # fmt: skip
    async def add(
        request: Request,
        class_name: Annotated[str | None, Query(alias="class")] = None,
        old_loss: Annotated[
            float | None,
            Query(ge=0, lt=100, description="points that the trained classes may lose"),
        ] = None,
        dry_run: Annotated[bool, Query(description="predict the accuracies, add nothing")] = False,
        name: Name = "image",
    ) -> dict[str, Any]:
        check(request)
        upload = await wire.read_upload(request, service.limits, name)
        into = wire.class_name_of(class_name or upload.class_name)
        images = wire.keyed(upload.images, into)
        made = await service.edit(
            "add",
            lambda model: editing.add(
                model, service.within_limits(images), into, old_loss=old_loss, dry_run=dry_run
            ),
        )
        return {
            "class": made.class_name,
            "keys": made.keys,
            "errors": [
                {"image": image, "error": wire.plain_text(why, wire.LONGEST_ERROR)}
                for image, why in made.errors
            ],
            "new_class": made.new_class,
            "learned": made.learned,
            "old_before": made.old_before,
            "old_loss": made.old_loss,
            "trades": [asdict(trade) for trade in made.trades],
            "memory": service.memory(),
        }

    @app.delete("/memory", openapi_extra=_KEYS, summary="Remove images, or forget them permanently")
    async def remove(request: Request) -> dict[str, Any]:
        check(request)
        given = wire.parsed(wire.KeysIn, await request.body())
        if given.forget:
            await service.edit("forget", lambda model: editing.forget(model, given.keys))
        else:
            await service.edit("remove", lambda model: editing.remove(model, given.keys))
        return {"memory": service.memory()}

    @app.post("/memory/undo", summary="Answer from the version before the last edit")
    async def undo(request: Request) -> dict[str, Any]:
        check(request)
        await service.edit("undo", editing.undo)
        return {"memory": service.memory()}


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/static", StaticFiles(directory=STATIC))


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error_response(error.status, error.what, error.remedy, error.headers)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> Response:
        # Without ``where``: clients must not learn the server's paths.
        return error_response(409, wire.plain_text(error.what, 1000), error.remedy)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return error_response(
            422, wire.plain_text(f"{where}: {first['msg']}", 300), "see /openapi.json"
        )

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        remedies = {404: "see /openapi.json for the endpoints", 405: "see /openapi.json"}
        return error_response(
            error.status_code, wire.plain_text(str(error.detail), 300),
            remedies.get(error.status_code, wire.ACCEPTED), error.headers,
        )  # fmt: skip
