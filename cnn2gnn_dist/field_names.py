"""Dotted names of the config's fields: all of them, those that have moved, and the one probably meant."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from pydantic import BaseModel

from cnn2gnn_dist.config import Config, Section
from cnn2gnn_dist.errors import UserError


def paths(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Names of all sections and fields."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if is_section(field.annotation):
            yield from paths(field.annotation, f"{prefix}{name}.")  # type: ignore[arg-type]


def fields(model: type[BaseModel] = Config) -> list[str]:
    """Names of all fields, without those of sections."""
    found = list(paths(model))
    sections = {path.rpartition(".")[0] for path in found}
    return [path for path in found if path not in sections]


def is_section(kind: Any) -> bool:
    """Whether the type of a field is that of a section."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def kind_of(path: str) -> tuple[Any, list[str]]:
    """Type of the field at a path, and the names on the way; ``Any`` inside a mapping.

    Raises:
        UserError: there is no such field.
    """
    names = path.split(".")
    kind: Any = Config
    for depth, name in enumerate(names):
        if not is_section(kind):
            before = ".".join(names[:depth])
            if get_origin(kind) is dict and all(names):
                return Any, names
            raise UserError(
                f"{before} is a field, not a section", where=path, remedy=f"{before}=VALUE"
            )
        if name not in kind.model_fields:
            error = unknown(names[: depth + 1])
            raise error
        kind = kind.model_fields[name].annotation
    return kind, names


# --- fields that have moved -----------------------------------------------------------------------


@functools.cache
def moved() -> dict[str, str]:
    """Fields that have moved (``Section.moved``): original name → current name."""
    found: dict[str, str] = {}
    for path in ("", *paths()):
        section = kind_of(path)[0] if path else Config
        if is_section(section) and issubclass(section, Section):
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{old}": f"{prefix}{now}" for old, now in section.moved.items()}
    return found


def current_name(path: str) -> str:
    """The current name of a field that may be given by its original one."""
    return moved().get(path, path)


def original_name(path: str) -> str:
    """The original name of a field, which the keys of stages use."""
    return next((old for old, now in moved().items() if now == path), path)


def with_current_names(tree: Mapping[str, Any], where: str, old: dict[str, None]) -> dict[str, Any]:
    """A tree of fields in which those that have moved are in their places.

    Args:
        tree: as a file holds it.
        where: the file, for errors.
        old: collects the old names that are found.

    Raises:
        UserError: a field is given by both of its names.
    """
    found = _copy(tree)
    for before, now in moved().items():
        *sections, name = before.split(".")
        source = _section_of(found, sections, make=False)
        target = _section_of(found, now.split(".")[:-1], make=source is not None and name in source)
        if source is None or name not in source or target is None:
            continue
        last = now.rpartition(".")[2]
        if last in target:
            raise UserError(
                f"this field is given twice: {before} is its old name",
                where=f"{where}: {now}" if where else now,
                remedy=f"leave out {before}",
            )
        target[last] = source.pop(name)
        old[before] = None
    return found


def renamed_note(old: list[str]) -> str:
    """A line about fields that were given by their old names."""
    shown = ", ".join(f"{one} is now {current_name(one)}" for one in old[:3])
    more = f", and {len(old) - 3} more have moved (`cnn2gnn config`)" if len(old) > 3 else ""
    return f"{shown}{more}; the old names are still accepted"


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _section_of(tree: dict[str, Any], sections: list[str], make: bool) -> dict[str, Any] | None:
    """A section of a tree, created if ``make``; None if it is absent or is not a mapping."""
    node: Any = tree
    for section in sections:
        if make and node.get(section) is None:
            node[section] = {}
        node = node.get(section)
        if not isinstance(node, dict):
            return None
    return node


# --- unknown names --------------------------------------------------------------------------------


def unknown(loc: list[str]) -> UserError:
    """The error for a name that no field has."""
    if len(loc) == 1 and loc[0] in paths():
        *sections, field = loc[0].split(".")
        shown = f"{{{field}: …}}"
        for section in reversed(sections[1:]):
            shown = f"{{{section}: {shown}}}"
        remedy = f"in a file, fields go into their section: {sections[0]}: {shown}"
    else:
        near = nearest(loc)
        remedy = f"did you mean {near}?" if near else "`cnn2gnn config` lists the fields"
    return UserError("the config has no field with this name", where=".".join(loc), remedy=remedy)


def nearest(loc: list[str]) -> str | None:
    """The known field closest to an unknown one: in its own section first, then anywhere."""
    same = [p for p in paths() if p.rpartition(".")[2] == loc[-1]]
    around = [p for p in same if p.startswith(f"{loc[0]}.")]
    if around:  # in another section within the same
        return around[0]
    known, parent = list(paths()), ".".join(loc[:-1])
    # Sections within its own count as its own: `graph.fanout` is looked for in `graph.sampling`.
    own = [p for p in known if (p.startswith(f"{parent}.") if parent else "." not in p)]
    siblings = {p.rpartition(".")[2]: p for p in own}
    near = difflib.get_close_matches(loc[-1], siblings, 1, 0.5)
    if near:
        return siblings[near[0]]
    close = same or difflib.get_close_matches(".".join(loc), known, 1, 0.5)
    return close[0] if close else None
