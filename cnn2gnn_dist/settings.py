"""From a file or preset with overrides to a checked config, and back to readable text."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cnn2gnn_dist import field_names, path_fields, presets, typed_text
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError


def load(
    source: str | None = None,
    overrides: Sequence[str] = (),
    note: Callable[[str], None] | None = None,
) -> Config:
    """Read a config from a preset's name or a YAML file, then apply ``a.b=value`` overrides.

    The text of a value is parsed by the type of its field (see :mod:`.typed_text`); if a field
    is overridden twice, the last one wins. In paths ``$NAME`` and ``${NAME}`` stand for environment
    variables, ``$$`` for a dollar sign, and a leading ``~`` for the home folder.

    ``run.dir`` and the paths of data and weights are returned absolute (relative ones
    are resolved against the working directory), so that ranks in other working directories agree.

    Args:
        source: the preset or file; None: the defaults.
        overrides: of fields and sections.
        note: called with a line about fields given by their former names, if there are any.

    Raises:
        UserError: a missing file, an unknown key or a wrong type, with the field's path;
            an environment variable that is not set; a field given by both of its names; a password in a URL.
    """
    old: dict[str, None] = {}
    tree = _read(source, old) if source else {}
    for override in overrides:
        _apply(tree, override, old)
    _refuse_brace_expansion(overrides)
    if old and note:
        note(field_names.renamed_note(list(old)))
    return path_fields.without_passwords(_checked(tree, path_fields.expanded))


def check(tree: Mapping[str, Any]) -> Config:
    """Validate a plain tree as returned by :func:`as_tree`, fill in defaults, make paths absolute."""
    tree = field_names.with_current_names(tree, "", {})
    return _checked(tree, lambda path, where: path)


def of_run(folder: Path) -> Config:
    """Load the config stored in a run's folder; ``run.dir`` is that folder, even if it was moved.

    Raises:
        UserError: as :func:`load`.
    """
    tree = _read(str(folder / "config.yaml"), {})
    tree["run"] = {**tree.get("run", {}), "dir": str(folder).replace("$", "$$")}
    return _checked(tree, path_fields.expanded)


def as_tree(config: Config) -> dict[str, Any]:
    """Return the config as plain dicts, lists and scalars."""
    return json.loads(config.model_dump_json())


def as_flat(config: Config) -> dict[str, Any]:
    """Return the plain value of every field by its dotted name, with sections flattened."""
    tree, found = as_tree(config), dict[str, Any]()
    for path in field_names.fields(type(config)):
        value: Any = tree
        for name in path.split("."):
            value = value[name]
        found[path] = value
    return found


def as_yaml(config: Config) -> str:
    """Return the resolved config as YAML; :func:`load` reads it back as the same config."""
    tree = as_tree(path_fields.changed(config, lambda path, where: path.replace("$", "$$")))
    return yaml.dump(tree, Dumper=typed_text.Dumper, sort_keys=False, allow_unicode=True)


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


def misplaced(arguments: Sequence[str]) -> UserError | None:
    """Error for options that no command has, if they look like fields of the config."""
    known = list(field_names.paths())
    for text in arguments:
        name = text.lstrip("-").partition("=")[0].replace("-", "_")
        meant = [path for path in known if name in (path, path.rpartition(".")[2])]
        if "." in name and not meant:
            meant = [field_names.nearest(name.split(".")) or name]
        if text.startswith("-") and meant:
            value = text.partition("=")[2] or "VALUE"
            return UserError(
                "fields of the config are written without dashes, with their section",
                where=text,
                remedy=" or ".join(f"{path}={value}" for path in meant),
            )
        if text.startswith("-") and name in ("set", "override", "o", "opts", "cfg_options"):
            return UserError(
                "overrides need no option before them", where=text, remedy="student.epochs=20 alone"
            )
    return None


def describe() -> str:
    """Describe every field with its type, default and meaning: what ``cnn2gnn config`` prints."""
    lines: list[str] = []
    _describe(Config, "", lines)
    return "\n".join(lines)


def _describe(model: type[BaseModel], prefix: str, lines: list[str]) -> None:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and field_names.is_section(kind):
            lines.append(f"\n{prefix}{name}: {(kind.__doc__ or '').strip()}")
            _describe(kind, f"{prefix}{name}.", lines)
        else:
            default = json.dumps(field.get_default(call_default_factory=True))
            lines.append(f"  {prefix}{name} = {default}\n      {field.description}")


def _read(source: str, old: dict[str, None]) -> dict[str, Any]:
    path = presets.FOLDER / f"{source}.yaml" if source in presets.names() else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(source, presets.names(), 1)
        hint = f"did you mean the preset {near[0]!r}? " if near else ""
        if (path / "config.yaml").is_file():
            hint = f"did you mean {path / 'config.yaml'}? "
        raise UserError(
            f"no config file or preset of this name: {source}",
            where=source,
            remedy=f"{hint}presets: {', '.join(presets.names())}",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not readable as UTF-8 text: {error.reason} at byte {error.start}",
            where=str(path),
            remedy="save it as plain UTF-8 text",
        ) from None
    except OSError as error:
        raise UserError(
            f"the config can't be read: {error.strerror}",
            where=str(path),
            remedy="check its permissions",
        ) from None
    tree = typed_text.from_file(Config, text, str(path))
    return field_names.with_current_names(tree, str(path), old)


def _apply(tree: dict[str, Any], override: str, old: dict[str, None]) -> None:
    path, sign, text = override.partition("=")
    path = path.strip()
    if not sign and (path in presets.names() or path.endswith((".yaml", ".yml", ".json"))):
        raise UserError(
            "a config is given by --config", where=override, remedy=f"--config {override}"
        )
    if not sign or not path:
        raise UserError(
            f"an override has the form section.field=value, without spaces around =, not {override!r}",
            where=override,
            remedy=f"{path if path in field_names.paths() else 'student.epochs'}=20, for example",
        )
    if path in field_names.moved():
        old[path] = None
    path = field_names.current_name(path)
    kind, names = field_names.kind_of(path)
    value = typed_text.from_text(kind, text, path)
    node = tree
    for section in names[:-1]:
        if not isinstance(node.get(section), dict):
            node[section] = {}
        node = node[section]
    if field_names.is_section(kind) and isinstance(value, dict):
        value = _merged(kind, node.get(names[-1]), _with_moved_fields(names, value, old))
    node[names[-1]] = value


def _with_moved_fields(
    names: list[str], value: dict[str, Any], old: dict[str, None]
) -> dict[str, Any]:
    """The fields of a section, with moved ones in their new places."""
    whole = functools.reduce(lambda inner, name: {name: inner}, reversed(names), value)
    whole = field_names.with_current_names(whole, "", old)
    return functools.reduce(lambda node, name: node[name], names, whole)


def _merged(section: Any, before: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A section's fields updated with the given ones; the others stay, also in nested sections."""
    found = dict(before) if isinstance(before, dict) else {}
    for name, value in given.items():
        field = section.model_fields.get(name)
        inner = field_names.is_section(field.annotation) if field else False
        nested = inner and isinstance(value, dict)
        found[name] = _merged(field.annotation, found.get(name), value) if nested else value
    return found


def _refuse_brace_expansion(overrides: Sequence[str]) -> None:
    """A shell expands ``data.train=/x/{0..3}.tar`` to four overrides, of which only the last would count."""
    given: dict[str, dict[str, None]] = {}
    for override in overrides:
        path, _, text = override.partition("=")
        given.setdefault(path.strip(), {})[text.strip()] = None
    for path in ("data.train", "data.test"):
        texts = list(given.get(path, ()))
        if len(texts) > 1:
            raise UserError(
                f"{len(texts)} values are given: {texts[0]} to {texts[-1]}; "
                "shells expand unquoted braces",
                where=path,
                remedy=f"{path}='{_unexpanded(texts)}', in quotes",
            )


def _unexpanded(texts: list[str]) -> str:
    """Undo a shell's brace expansion; a list where it was not a range."""
    prefix = _common(texts)
    end = _common([text[len(prefix) :][::-1] for text in texts])[::-1]
    inner = [text[len(prefix) : len(text) - len(end)] for text in texts]
    if all(text.isdecimal() for text in inner):
        first, last = int(inner[0]), int(inner[-1])
        if [int(text) for text in inner] == list(range(first, last + 1)):
            return f"{prefix}{{{inner[0]}..{inner[-1]}}}{end}"
    return f"[{', '.join(texts)}]"


def _common(texts: list[str]) -> str:
    """The longest common prefix."""
    low, high = min(texts), max(texts)
    return next((low[:i] for i, letter in enumerate(low) if high[i : i + 1] != letter), low)


def _explain(error: ValidationError) -> UserError:
    first = error.errors()[0]
    names = [part for part in first["loc"] if isinstance(part, str)]
    while len(names) > 1 and ".".join(names) not in field_names.paths():
        names.pop()  # the alternative of a type that was tried
    where = ".".join(names)
    if first["type"] == "extra_forbidden":
        return field_names.unknown([str(part) for part in first["loc"]])
    if first["type"] == "refused":  # across fields: config.py gives field and remedy
        return UserError(first["msg"], where=first["ctx"]["field"], remedy=first["ctx"]["remedy"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        message = "too few values"
    if first["type"] in ("model_type", "model_attributes_type"):
        message = f"{where} is a section: {where}.FIELD=VALUE sets one of its fields"
    if first["type"] == "string_pattern_mismatch":
        message = "a name consists of letters, digits, '.', '_' and '-', and starts with a letter, a digit or '_'"
    return UserError(
        f"{message} (got {first['input']!r})" if "input" in first and where else message,
        where=where or "config",
        remedy=f"`cnn2gnn config` explains {where or 'the fields'}",
    )


def _checked(tree: Mapping[str, Any], expand: path_fields.Change) -> Config:
    _refuse_non_utf8(tree, "")
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None
    if config.run.dir is None:
        config = config.model_copy(
            update={"run": config.run.model_copy(update={"dir": f"runs/{config.name}"})}
        )
    return path_fields.absolute(config, expand)


def _refuse_non_utf8(value: Any, where: str) -> None:
    """Refuse text that no file could contain: file names in an encoding other than UTF-8."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _refuse_non_utf8(inner, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_non_utf8(inner, where)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"this is not UTF-8 text: {value.encode(errors='surrogateescape')!r}",
                where=where,
                remedy="rename the file or folder, or link to it under a UTF-8 name",
            ) from None
