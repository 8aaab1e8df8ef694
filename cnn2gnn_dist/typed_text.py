"""Convert text to the value of a config field, guided by the field's type.

YAML by itself guesses: ``no`` is false, ``0012`` ten, ``2024-05-01`` a date, ``1e-3`` a string. Here
a text field takes the text as typed, and a number field takes a number.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cnn2gnn_dist.errors import UserError

NULLS = ("null", "Null", "NULL", "none", "None")
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_DEEP = 20  # levels of nesting; more is an alias that contains itself
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map")}
_GUESSES = yaml.resolver.Resolver()


def from_text(kind: Any, text: str, where: str) -> Any:
    """Convert an override's text to the value of a field of a type.

    Strings are taken verbatim, except that quotes around all of the text are removed.
    ``null`` and ``none`` mean no value where the field allows that; other text fields refuse ``null``
    without quotes. Lists and mappings are written as in YAML or JSON.

    Args:
        kind: the annotation of the field.
        text: what follows the equals sign.
        where: the field's path, for errors.

    Raises:
        UserError: the text is empty or can't be such a value.
    """
    text = text.strip()
    if not text:
        raise UserError(
            "an override without a value",
            where=where,
            remedy=f"{where}=VALUE; was an unset shell variable meant?"
            + (f" {where}=null means none" if _may_be_none(kind) else ""),
        )
    holds_text = _accepts(kind, str)
    if _may_be_none(kind) and (text in NULLS or (text == "~" and not holds_text)):
        return None
    if _accepts(kind, list):
        items = _items(text)
        if items == []:
            raise UserError("an empty list", where=where, remedy=f"{where}='[A, B]'")
        if items is not None:
            return [_unquoted(item) for item in items]
        _refuse_multiple_paths(text, where)
    if holds_text and str in _options(kind) and text in NULLS[:3]:
        raise UserError(
            "this field always has a value",
            where=where,
            remedy=f"leave {where} out for its default, or quote the text: {where}='\"{text}\"'",
        )
    if holds_text:
        return _unquoted(text)
    if kind is Any or _accepts(kind, dict) or _is_section(kind):
        return _Reader("", where).value(kind, _compose(text, "", where), where)
    if _accepts(kind, tuple):
        items = _items(text) if text[0] in "[(" else [part.strip() for part in text.split(",")]
        inner = get_args(_option_of(kind, tuple))[0]
        return [from_text(inner, item, where) for item in (items if items is not None else [text])]
    return _scalar(kind, _unquoted(text))


def from_file(model: type[BaseModel], text: str, file: str) -> dict[str, Any]:
    """Return the tree of fields in a YAML (or JSON) file.

    Raises:
        UserError: not YAML, not a mapping, a duplicate key; with the line.
    """
    node = _compose(text, file, file)
    if node is None:
        raise UserError(
            "the config file is empty",
            where=file,
            remedy="`cnn2gnn config --config demo` prints one to start from",
        )
    if not isinstance(node, yaml.MappingNode):
        raise UserError(
            "a config file is a mapping of sections, such as `student: {epochs: 20}`",
            where=file,
            remedy="`cnn2gnn config --config demo` prints one to start from",
        )
    return _Reader(file, file).value(model, node, "")


def field_of(section: type[BaseModel], name: str) -> FieldInfo | None:
    """Return a section's field of this current or former name; None if there is none."""
    field = section.model_fields.get(name)
    moved = getattr(section, "moved", {})
    if field is None and name in moved:
        first, _, rest = moved[name].partition(".")
        return field_of(section.model_fields[first].annotation, rest)  # type: ignore[arg-type]
    return field


def is_path(field: FieldInfo) -> bool:
    """Whether a field of the config holds one or more paths."""
    return isinstance(field.json_schema_extra, dict) and "path" in field.json_schema_extra


class Dumper(yaml.SafeDumper):
    """Writes YAML that this module and other YAML readers parse to the same values."""


Dumper.add_implicit_resolver(  # such strings are quoted
    "tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})$"), list("-+.0123456789")
)
Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:none|None)$"), ["n", "N"])


def _quoted_if_special(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape text with control characters and unusual line ends: YAML would fold them."""
    special = re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if special else None)


Dumper.add_representer(str, _quoted_if_special)


class _Reader:
    """Reads the values of the nodes of one file (or of one override's text)."""

    def __init__(self, file: str, whole: str) -> None:
        self.file, self.whole = file, whole

    def value(self, kind: Any, node: yaml.Node, path: str, depth: int = 0) -> Any:
        """Return a node's value for a field of a type; ``Any`` where there is no type."""
        self._check(node, path, depth)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(kind, node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            if _accepts(kind, list) and not node.value:
                raise self._error("an empty list", node, path, "give at least one, or null")
            inner = Any
            for origin in (list, tuple):
                if _accepts(kind, origin):
                    inner = get_args(_option_of(kind, origin))[0]
            return [self.value(inner, each, path, depth + 1) for each in node.value]
        return self._text(kind, node, path)

    def _check(self, node: yaml.Node, path: str, depth: int) -> None:
        if depth > _DEEP:
            raise self._error("an alias that contains itself", node, path, "write the value out")
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self._error(f"the tag {tag} is not supported here", node, path, "leave it out")

    def _text(self, kind: Any, node: yaml.ScalarNode, path: str) -> Any:
        text = node.value
        if node.style is not None:  # quoted: text, whatever it contains
            return text
        if text in ("", "~", "null", "Null", "NULL") or (text in NULLS and _may_be_none(kind)):
            return {} if _is_section(kind) and not text else None
        if kind is Any:
            return self._guess(node, path)
        if _accepts(kind, list):
            _refuse_multiple_paths(text, self._location(node, path))
        return text if _accepts(kind, str) else _scalar(kind, text)

    def _mapping(self, kind: Any, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None:
                parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for part in reversed(parts):
                    if not isinstance(part, yaml.MappingNode):
                        raise self._error("<< accepts only mappings", key, path, "write it out")
                    merged |= self.value(kind, part, path, depth + 1)
                continue
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                raise self._error("a key must be a name", key, path, "put it in quotes")
            inner = f"{path}.{name}" if path else name
            line = key.start_mark.line + 1
            if name in lines:
                raise self._error(
                    f"{inner} appears twice: on line {lines[name]} and on line {line}",
                    key,
                    inner,
                    "keep one of them",
                )
            lines[name] = line
            field = field_of(kind, name) if _is_section(kind) else None
            found[name] = self.value(field.annotation if field else Any, value, inner, depth + 1)
            if field and is_path(field):
                self._refuse_empty(field, found[name], value, inner)
        return merged | found

    def _refuse_empty(self, field: FieldInfo, value: Any, node: yaml.Node, path: str) -> None:
        """An empty path would become the working directory."""
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not one.strip():
                none = ", or null for none" if _may_be_none(field.annotation) else ""
                raise self._error("an empty path", node, path, f"write a path{none}")

    def _guess(self, node: yaml.ScalarNode, path: str) -> Any:
        """Guess the value of a model argument, which has no declared type, by the rules of YAML 1.2 and JSON."""
        text = node.value
        if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return text.lower() == "true"
        if re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", text):
            return int(text)
        number = _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text)
        if number and abs(float(text)) < float("inf"):
            return float(text)
        old = _GUESSES.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
        if number or old in ("bool", "int", "float"):
            raise self._error(
                f"{text} is ambiguous",
                node,
                path,
                "write true or false, or a plain finite number; put text in quotes",
            )
        return text

    def _location(self, node: yaml.Node, path: str) -> str:
        if not self.file:
            return path or self.whole
        return f"{self.file}, line {node.start_mark.line + 1}" + (f": {path}" if path else "")

    def _error(self, what: str, node: yaml.Node, path: str, remedy: str) -> UserError:
        return UserError(what, where=self._location(node, path), remedy=remedy)


def _compose(text: str, file: str, where: str) -> yaml.Node:
    try:
        # Without resolvers, a plain scalar stays the text as typed.
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}" if file and mark is not None else where
        said = ", ".join(part for part in (error.context, error.problem) if part)
        tab = "\\t" in said or "'\t'" in said
        raise UserError(
            f"not readable as YAML: {said}",
            where=place,
            remedy="indent with spaces instead of tabs"
            if tab
            else "close all brackets and quotes; quote a value that starts with "
            "one of * & [ { @ % ! or contains ': '",
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"not readable as YAML: {' '.join(str(error).split())}",
            where=where,
            remedy="save it as plain UTF-8 text",
        ) from None


def _scalar(kind: Any, text: str) -> Any:
    """A number or boolean; otherwise the text itself, for the field's check to refuse."""
    reader: dict[Any, Callable[[str], Any]] = {bool: _bool, int: _int, float: _float}
    for option in _options(kind):
        if option in reader:
            value = reader[option](text)
            if value is not None:
                return value
    return text


def _bool(text: str) -> bool | None:
    word = text.lower()
    return True if word in YES else False if word in NO else None


def _int(text: str) -> int | None:
    """Parse 12, 0012 (twelve), 1e3, 20.0; not 0x10, 1.5 or 12:30."""
    if not _FLOAT.fullmatch(text):
        return None
    try:
        number = Decimal(text)
        whole = number == number.to_integral_value() and abs(number) < Decimal(2) ** 64
    except InvalidOperation:
        return None
    return int(number) if whole else None


def _float(text: str) -> float | None:
    if text.lower().lstrip("+-.") in ("inf", "infinity", "nan"):
        return float(text.lower().replace(".", ""))  # no field accepts it; its check reports that
    return float(text) if _FLOAT.fullmatch(text) else None


def _items(text: str) -> list[str] | None:
    """The items of ``[a, b]``, as text with their quotes; None if the text is not such a list.

    Commas in quotes, brackets and braces do not count, nor do brackets that close before the end:
    ``[0-9]*.tar`` and ``[0-9]/[a-z]`` are patterns.
    """
    if text[:1] + text[-1:] not in ("[]", "()"):
        return None
    parts, begin = [], 1
    for place, depth in _outside_quotes(text):
        if depth == 0 and place < len(text) - 1:
            return None  # the first bracket closes before the end
        if (depth == 1 and text[place] == ",") or place == len(text) - 1:
            parts.append(text[begin:place].strip())
            begin = place + 1
    if begin != len(text):
        return None
    if parts and not parts[-1]:  # an empty list, or a comma before the end
        parts.pop()
    return parts


def _outside_quotes(text: str) -> Iterator[tuple[int, int]]:
    """Positions of characters outside quotes, and how many brackets are open after each."""
    depth, quote = 0, ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
            continue
        if sign in "\"'" and (place == 0 or text[place - 1] in "[(, "):
            quote = sign
            continue
        depth += (sign in "[({") - (sign in "])}")
        yield place, depth


def _unquoted(text: str) -> str:
    """Remove quotes around all of the text, as YAML and JSON interpret them."""
    if len(text) < 2 or text[0] not in "\"'" or text[-1] != text[0]:
        return text
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text
    return node.value if isinstance(node, yaml.ScalarNode) else text


def _refuse_multiple_paths(text: str, where: str) -> None:
    """Refuse two paths in one text: a comma or a space before something that starts like a path."""
    begin = r"(?:/|~/|\./|\.\./|\$[A-Za-z_{]|[a-z0-9]+://)"
    if not re.match(begin, text):
        return
    outside = {place for place, depth in _outside_quotes(text) if depth == 0}  # of braces
    parts, start = [], 0
    for found in re.finditer(rf"\s*,\s*(?={begin})|\s+(?={begin})", text):
        if found.start() in outside:
            parts.append(text[start : found.start()])
            start = found.end()
    parts.append(text[start:])
    if len(parts) > 1:
        field = where.rpartition(": ")[2]
        raise UserError(
            "this looks like several paths in one",
            where=where,
            remedy=f"{field}='[{', '.join(parts)}]'"
            f" if so, {field}='[\"{text}\"]' if it is a single one",
        )


def _options(kind: Any) -> list[Any]:
    """The alternatives of an annotation, without None."""
    if get_origin(kind) in (Union, types.UnionType):
        return [option for option in get_args(kind) if option is not type(None)]
    return [kind]


def _may_be_none(kind: Any) -> bool:
    return type(None) in get_args(kind)


def _accepts(kind: Any, wanted: type) -> bool:
    return any(_has_kind(option, wanted) for option in _options(kind))


def _option_of(kind: Any, wanted: type) -> Any:
    return next(option for option in _options(kind) if _has_kind(option, wanted))


def _has_kind(option: Any, wanted: type) -> bool:
    if wanted is str and get_origin(option) is Literal:
        return True
    return option is wanted or get_origin(option) is wanted


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
