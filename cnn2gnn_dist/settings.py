"""From a file or preset and overrides to a checked config; and back to text people read."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError

PRESETS = Path(__file__).parent / "presets"
DATA = "../shared/data"
"""Where presets look for public data sets unless $CNN2GNN_DATA says otherwise."""


def presets() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(source: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a config from a preset's name or a YAML file, then apply ``a.b=value`` overrides.

    ``run.dir`` and the paths of data and weights come back absolute (relative ones
    count from the working directory), so that ranks on other working directories agree.

    Raises:
        UserError: no such file, an unknown key or a wrong type, with the field's path.
    """
    tree = _read(source) if source else {}
    for override in overrides:
        _apply(tree, override)
    return check(tree)


def check(tree: Mapping[str, Any]) -> Config:
    """Validate a plain tree, fill the defaults, make paths absolute."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None
    return _absolute(config)


def as_tree(config: Config) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return json.loads(config.model_dump_json())


def as_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(as_tree(config), sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines ``path: old -> new`` for every field in which two config trees differ."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return lines


def describe() -> str:
    """Every field with its type, default and meaning: what ``cnn2gnn config`` prints."""
    lines: list[str] = []
    _describe(Config, "", lines)
    return "\n".join(lines)


def _describe(model: type[BaseModel], prefix: str, lines: list[str]) -> None:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines.append(f"\n{prefix}{name}: {(kind.__doc__ or '').strip()}")
            _describe(kind, f"{prefix}{name}.", lines)
        else:
            default = json.dumps(field.get_default(call_default_factory=True))
            lines.append(f"  {prefix}{name} = {default}\n      {field.description}")


def _read(source: str) -> dict[str, Any]:
    path = PRESETS / f"{source}.yaml" if source in presets() else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(source, presets(), 1)
        hint = f"did you mean the preset {near[0]!r}? " if near else ""
        raise UserError(
            f"no config file and no preset of this name: {source}",
            where=source,
            remedy=f"{hint}presets: {', '.join(presets())}",
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"not readable as YAML: {error}", where=str(path), remedy="mend the file"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(
            "a config is a mapping of fields", where=str(path), remedy="see `cnn2gnn config`"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise UserError(
            f"an override reads section.field=value, not {override!r}",
            where=override,
            remedy="for example student.epochs=20",
        )
    *sections, name = path.strip().split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UserError(
                f"{section} is a field, not a section", where=path, remedy="see `cnn2gnn config`"
            )
        node = child
    try:
        node[name] = _scalar(text)
    except yaml.YAMLError as error:
        raise UserError(f"value not readable: {error}", where=path, remedy="quote it") from None


def _scalar(text: str) -> Any:
    """YAML reads 1e-3 as a string (it wants 1.0e-3); people write 1e-3."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(error: ValidationError) -> UserError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = _nearest([str(part) for part in first["loc"]])
        remedy = f"did you mean {near}?" if near else "`cnn2gnn config` lists the fields"
        return UserError("the config has no field of this name", where=where, remedy=remedy)
    message = first["msg"].removeprefix("Value error, ")
    return UserError(
        f"{message} (got {first['input']!r})" if "input" in first and where else message,
        where=where or "config",
        remedy=f"`cnn2gnn config` explains {where or 'the fields'}",
    )


def _nearest(loc: list[str]) -> str | None:
    """The known field closest to an unknown one: in its own section first, then anywhere."""
    known: list[str] = []
    _paths(Config, "", known)
    parent = ".".join(loc[:-1])
    siblings = {p.rpartition(".")[2]: p for p in known if p.rpartition(".")[0] == parent}
    near = difflib.get_close_matches(loc[-1], siblings, 1, 0.5)
    if near:
        return siblings[near[0]]
    same = [p for p in known if p.rpartition(".")[2] == loc[-1]]
    close = same or difflib.get_close_matches(".".join(loc), known, 1, 0.5)
    return close[0] if close else None


def _paths(model: type[BaseModel], prefix: str, found: list[str]) -> None:
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _paths(field.annotation, f"{prefix}{name}.", found)


def _absolute(config: Config) -> Config:
    def one(path: str) -> str:
        if "://" in path:  # remote data
            return path
        path = path.replace("$CNN2GNN_DATA", os.environ.get("CNN2GNN_DATA", DATA))
        return os.path.abspath(os.path.expanduser(path))

    def many(paths: str | list[str] | None) -> str | list[str] | None:
        if paths is None:
            return None
        return one(paths) if isinstance(paths, str) else [one(path) for path in paths]

    def maybe(path: str | None) -> str | None:
        return None if path is None else one(path)

    data = config.data.model_copy(
        update={"train": many(config.data.train), "test": many(config.data.test)}
    )
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={"dir": one(config.run.dir or f"runs/{config.name}")}
            ),
            "data": data,
            "teacher": config.teacher.model_copy(
                update={
                    "weights": maybe(config.teacher.weights),
                    "ds_config": maybe(config.teacher.ds_config),
                }
            ),
            "student": config.student.model_copy(
                update={"ds_config": maybe(config.student.ds_config)}
            ),
        }
    )
