"""Wire formats: images from requests, answers as JSON."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from cnn2gnn_dist.data.images.decode import NO_IMAGE
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.inputs import Input
from cnn2gnn_dist.serving.limits import Limits, Refused

M = TypeVar("M", bound=BaseModel)

LONGEST_NAME = 120
LONGEST_ERROR = 300
ACCEPTED = (
    "send images as multipart/form-data (field `images`), as JSON "
    '{"images": [{"name": "a.jpg", "data": "BASE64"}]}, or one image as the body, '
    "with its Content-Type (image/jpeg, …)"
)

READABLE = "send a JPEG, PNG, WebP, GIF, BMP or TIFF file; answers[].error says what is wrong"


class ImageIn(BaseModel):
    """An image in JSON."""

    model_config = ConfigDict(extra="forbid")

    name: str = ""
    data: str


class ImagesIn(BaseModel):
    """Images in JSON; ``class`` when they are added to the memory."""

    model_config = ConfigDict(extra="forbid")

    images: list[ImageIn | str]
    class_name: str | None = Field(default=None, alias="class")


class KeysIn(BaseModel):
    """Keys of images to remove; ``forget``: also delete everything stored about them."""

    model_config = ConfigDict(extra="forbid")

    keys: list[str] = Field(min_length=1, max_length=100_000)
    forget: bool = False


@dataclass(frozen=True)
class Upload:
    """Images of a request, encoded as they were sent, and the form's class name, if any."""

    images: list[Input]
    class_name: str | None = None


async def read_upload(request: Request, limits: Limits, name: str = "image") -> Upload:
    """Read the images of a request: multipart, JSON, or one image, called ``name``, as the body.

    Raises:
        Refused: unsupported content type, malformed, no images or too many.
    """  # noqa: DOC501
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        upload = await _of_form(request, limits)
    elif kind == "application/json":
        upload = _of_json(await request.body(), limits)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        upload = Upload([Input(plain_text(name), await request.body())])
    else:
        raise Refused(415, f"images can't be sent as {plain_text(kind) or 'nothing'}", ACCEPTED)
    if not upload.images:
        raise Refused(400, "this request contains no image", ACCEPTED)
    if len(upload.images) > limits.images:
        raise too_many(len(upload.images), limits)
    return upload


async def _of_form(request: Request, limits: Limits) -> Upload:
    images: list[Input] = []
    class_name = None
    try:
        async with request.form(max_files=limits.images, max_fields=16) as form:
            for field, value in form.multi_items():
                if isinstance(value, UploadFile):
                    name = plain_text(value.filename or "") or f"image {len(images)}"
                    images.append(Input(name, await value.read()))
                elif field == "class":
                    class_name = value
    except HTTPException as error:
        if str(error.detail).startswith("Too many files"):
            raise too_many(None, limits) from None
        raise
    return Upload(images, class_name)


def _of_json(body: bytes, limits: Limits) -> Upload:
    # An image has no comma but those of its name, between its two fields and after it. Without this check a body of
    # millions of empty ones would be parsed, for seconds, while nobody else is answered.
    if body.count(b",") > (limits.images + 1) * (LONGEST_NAME + 2):
        raise too_many(None, limits)
    given = parsed(ImagesIn, body)
    if len(given.images) > limits.images:
        raise too_many(len(given.images), limits)
    images = []
    for place, one in enumerate(given.images):
        one = ImageIn(data=one) if isinstance(one, str) else one
        name = plain_text(one.name) or f"image {place}"
        try:
            images.append(Input(name, base64.b64decode(one.data, validate=True)))
        except (binascii.Error, ValueError) as error:
            raise Refused(400, f"{name} is not base64: {error}", ACCEPTED) from None
    return Upload(images, given.class_name)


def parsed(model: type[M], body: bytes) -> M:
    """Parse JSON.

    Raises:
        Refused: malformed, or fields other than the model's.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(
            400,
            plain_text(f"{where}: {first['msg']}" if where else first["msg"], LONGEST_ERROR),
            "see /openapi.json for the fields of this request",
        ) from None


def too_many(count: int | None, limits: Limits) -> Refused:
    """Return the refusal of a request with too many images; ``count``: None if they were not counted."""
    most = f"more than {limits.images}"
    what = (
        f"{most} images in one request"
        if count is None
        else f"{count} images in one request, {most}"
    )
    return Refused(413, what, "send them in several")


def plain_text(text: str, longest: int = LONGEST_NAME) -> str:
    """Text that every encoder and terminal accepts: no control characters, no lone surrogates, not too long."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    clean = "".join(letter if letter.isprintable() else "?" for letter in clean).strip()
    return clean if len(clean) <= longest else clean[: longest - 1] + "…"


def class_name_of(given: str | None) -> str:
    """Return the name of a class as a client gave it.

    Raises:
        Refused: none, too long, or with characters that can't be printed.
    """
    name = (given or "").strip()
    if not name:
        raise Refused(400, "the class has no name", "send a field `class`")
    if plain_text(name) != name:
        raise Refused(
            400,
            "this class name is too long or has characters that can't be printed",
            f"use at most {LONGEST_NAME} printable characters",
        )
    return name


def keyed(images: Iterable[Input], class_name: str) -> list[Input]:
    """Name images as the memory will store them: class/file-content.

    The memory's key is the last part. Phones and browsers give photographs the same names, so a
    file name alone can't be a key.
    """
    found = []
    for one in images:
        name = PurePosixPath(one.name.replace("\\", "/")).name or "image"
        digest = hashlib.sha256(one.value).hexdigest()[:8]
        stem, dot, suffix = name.rpartition(".")
        name = f"{stem}-{digest}.{suffix}" if dot and stem else f"{name}-{digest}"
        found.append(Input(f"{class_name.replace('/', '_')}/{name}", one.value))
    return found


def as_json(answer: Answer) -> dict[str, Any]:
    """An answer as plain data: ``Answer.as_dict`` with the rows of the neighbors."""
    made = answer.as_dict()
    if answer.error is not None:
        why = plain_text(answer.error.removesuffix(NO_IMAGE), LONGEST_ERROR)
        return made | {"error": f"not readable as an image: {why}"}
    for shown, neighbour in zip(made.get("neighbours", ()), answer.neighbours, strict=False):
        shown["row"] = neighbour.row
    return made


def json_bytes(content: dict[str, Any]) -> bytes:
    """UTF-8 JSON, with null for numbers that it can't represent."""
    try:
        text = _dumped(content)
    except ValueError:
        text = _dumped(finite(content))
    return text.encode()


def _dumped(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def finite(value: Any) -> Any:
    """The same data with None for numbers that JSON can't represent."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
