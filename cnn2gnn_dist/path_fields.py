"""The paths and URLs of a config: variables, home folders, absolute paths; and what can't be meant by one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote

from pydantic import BaseModel

from cnn2gnn_dist import typed_text
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError

DATA = "../shared/data"
"""Where presets look for public data sets unless $CNN2GNN_DATA is set."""
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")
_Section = TypeVar("_Section", bound=BaseModel)
Change = Callable[[str, str], str]
"""Maps a path and the field that holds it to the intended path."""


def absolute(config: Config, expand: Change) -> Config:
    """The config with all paths expanded and absolute; those below a node's own home folder as they are.

    Raises:
        UserError: an empty path, a URL where only a path can be, or a home folder of nobody.
    """
    return changed(config, lambda path, where: _absolute(expand(path, where), where))


def changed(section: _Section, change: Change, prefix: str = "") -> _Section:
    """The config, or a section of it, with every path in it changed."""
    updated: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, where = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            updated[name] = changed(value, change, f"{where}.")
        elif typed_text.is_path(field):
            updated[name] = _in_place(value, where, change)
    return section.model_copy(update=updated)


def _in_place(value: str | list[str] | None, where: str, change: Change) -> str | list[str] | None:
    if value is None:
        return None
    return change(value, where) if isinstance(value, str) else [change(one, where) for one in value]


def expanded(path: str, where: str) -> str:
    """A path with its environment variables expanded.

    Raises:
        UserError: one is empty or not set.
    """

    def one(found: re.Match[str]) -> str:
        if found[1]:
            return "$"
        name = found[2] or found[3]
        value = os.environ.get(name) or (DATA if name == "CNN2GNN_DATA" else None)
        if value is None:
            raise UserError(
                f"the environment variable {name} is {'empty' if name in os.environ else 'not set'}",
                where=f"{where}={path}",
                remedy=f"export {name}=…, or write the path out ($$ stands for a dollar sign in a name)",
            )
        return value

    return _VARIABLE.sub(one, path)


def _refuse_url(url: str, where: str) -> None:
    """Only images are read from URLs; of another, a local folder "s3:" would be made."""
    if where in ("data.train", "data.test"):
        return
    stored = "run.dir=null, and this URL as run.storage, which keeps what is made in the folder"
    raise UserError(
        "this is a path on disk, not a URL",
        where=f"{where}={url}",
        remedy=stored if where == "run.dir" else f"download it: {where}=PATH",
    )


def without_passwords(config: Config) -> Config:
    """The config, whose URLs the run's config, its manifests and errors show as they are.

    Raises:
        UserError: a URL has a password in it.
    """
    named = {"data.train": config.data.train, "data.test": config.data.test}
    for where, value in {**named, "run.storage": config.run.storage}.items():
        for url in [value] if isinstance(value, str) else value or []:
            user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
            if at and ":" in user:
                raise UserError(
                    "a password in a URL would be written to the run's config, manifests and logs",
                    where=f"{where}={url.replace(user, '…')}",
                    remedy="leave it out: ~/.netrc, the cloud's own settings (AWS_*, ~/.aws) or fsspec's "
                    "configuration",
                )
    return config


def _absolute(path: str, where: str) -> str:
    if not path.strip():  # it would become the working directory, which nobody named
        raise UserError("an empty path", where=where, remedy=f"{where}=PATH")
    if path.lower().startswith("file://"):
        local = unquote(path[len("file://") :]).removeprefix("localhost")
        if not local.startswith("/"):
            raise UserError(
                "a file:// URL that names another machine or has no third slash",
                where=f"{where}={path}",
                remedy=f"{where}=/PATH",
            )
        path = local
    elif "://" in path:
        _refuse_url(path, where)
        return path
    if where == "stream.cache_dir" and path.startswith("~"):
        return path  # each node has its own home
    known = os.path.expanduser(path)
    if known.startswith("~"):
        user = known.partition("/")[0]
        raise UserError(
            f"there is no user {user[1:]!r}, so {user} is not a home folder",
            where=f"{where}={path}",
            remedy=f"{where}=./{path} if the name starts with a tilde",
        )
    return os.path.abspath(known)
