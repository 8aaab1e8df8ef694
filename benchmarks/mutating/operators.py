"""Mutants of a module: each is the module's source with one small fault.

Text (messages, docstrings, printed strings), annotations, decorators, defaults and constants at the top of a
module are excluded: tests should not pin those.
"""

from __future__ import annotations

import ast
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CONTEXT = 32
"""Characters shown on each side of a change."""

Path = tuple[tuple[str, int | None], ...]
"""Path from the module's node down: (field, index in it if it is a list)."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
ATTRIBUTES = NAMES | {
    "argmin": "argmax",
    "argmax": "argmin",
    "minimum": "maximum",
    "maximum": "minimum",
    "floor": "ceil",
    "ceil": "floor",
    "zeros": "ones",
    "ones": "zeros",
    "union1d": "intersect1d",
}
SPOKEN = {"print", "say", "UserError", "PeerLost", "ValueError", "IndexError", "KeyError",
          "warning", "debug", "info", "tqdm", "RuntimeError", "AssertionError"}  # fmt: skip
"""Calls whose arguments are text for people."""


@dataclass(frozen=True)
class Mutant:
    """One fault: its location, the statement before and after it, and the complete new source."""

    line: int
    function: str
    before: str
    after: str
    source: str

    @property
    def name(self) -> str:
        """Identifier that does not depend on the lines before it."""
        return f"{self.function}: {self.before}  →  {self.after}"


def mutants(source: str) -> Iterator[Mutant]:
    """All mutants of a module, in line order; equal names are numbered."""
    tree = ast.parse(source)
    seen: dict[str, int] = {}
    for path, function, change in _sites(tree, (), ""):
        whole = copy.deepcopy(tree)
        parent, (field, place) = _reach(whole, path[:-1]), path[-1]
        node = _get(parent, field, place)
        line = getattr(node, "lineno", getattr(parent, "lineno", 0))
        _set(parent, field, place, change(node))
        ast.fix_missing_locations(whole)
        statement = _statement(path, tree)
        before, after = _where_they_differ(
            _first_line(_reach(tree, statement)), _first_line(_reach(whole, statement))
        )
        if before == after:
            continue
        name = f"{function}: {before} → {after}"
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            after += f"  ({seen[name]})"
        yield Mutant(line, function, before, after, ast.unparse(whole))


Change = Callable[[ast.AST], ast.AST]
Site = tuple[Path, str, Change]


def _sites(node: ast.AST, path: Path, function: str) -> Iterator[Site]:
    for field, value in ast.iter_fields(node):
        if _left_alone(node, field):
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for place, child in children:
            if not isinstance(child, ast.AST):
                continue
            here = (*path, (field, place))
            inside = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{function}.{child.name}".lstrip(".")
            if _is_docstring(child) or (not function and isinstance(child, ast.Assign)):
                continue
            for change in _changes(child):
                yield here, inside, change
            yield from _sites(child, here, inside)


def _left_alone(node: ast.AST, field: str) -> bool:
    if field in ("annotation", "returns", "decorator_list", "defaults", "kw_defaults", "bases"):
        return True
    if isinstance(node, ast.JoinedStr | ast.FormattedValue):
        return True
    if isinstance(node, ast.AnnAssign) and field == "value":  # a dataclass's default, mostly
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.Call) and field in ("args", "keywords") and _called(node) in SPOKEN


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _changes(node: ast.AST) -> Iterator[Change]:
    """The possible changes to one node."""
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            yield _set_operator(number, COMPARISONS[type(operator)]())
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield _with(op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield lambda n: n.operand  # type: ignore[attr-defined]
    elif isinstance(node, ast.BoolOp):
        yield _with(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.If | ast.While):
        yield lambda n: _with(test=ast.UnaryOp(ast.Not(), n.test))(n)  # type: ignore[attr-defined]
    elif isinstance(node, ast.IfExp):
        yield lambda n: _with(body=n.orelse, orelse=n.body)(n)  # type: ignore[attr-defined]
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield _with(ifs=[])
    elif isinstance(node, ast.Slice):
        for part in ("lower", "upper", "step"):
            if getattr(node, part) is not None:
                yield _with(**{part: None})
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield _with(id=NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
        yield _with(attr=ATTRIBUTES[node.attr])
    if _is_removable(node):
        yield lambda n: ast.Pass()


def _constants(value: object) -> Iterator[Change]:
    if isinstance(value, bool):
        yield _with(value=not value)
    elif isinstance(value, int):
        yield _with(value=value + 1)
    elif isinstance(value, float):
        yield _with(value=value * 2 if value else 1.0)


def _is_removable(node: ast.AST) -> bool:
    """Whether a statement can be removed so that the module still compiles."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and _called(node.value) not in SPOKEN
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name | ast.Tuple)
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue)


def _with(**fields: object) -> Change:
    def change(node: ast.AST) -> ast.AST:
        for name, value in fields.items():
            setattr(node, name, value)
        return node

    return change


def _set_operator(number: int, operator: ast.cmpop) -> Change:
    def change(node: ast.AST) -> ast.AST:
        node.ops[number] = operator  # type: ignore[attr-defined]
        return node

    return change


def _statement(path: Path, tree: ast.AST) -> Path:
    """The innermost statement on the path to a node."""
    found, node = path, tree
    for depth, (field, place) in enumerate(path, 1):
        node = _get(node, field, place)
        if isinstance(node, ast.stmt):
            found = path[:depth]
    return found


def _first_line(node: ast.AST) -> str:
    text = ast.unparse(node)
    # A compound statement is identified by its first line, a simple one by its whole text.
    return text.splitlines()[0] if hasattr(node, "body") else " ".join(text.split())


def _where_they_differ(before: str, after: str) -> tuple[str, str]:
    """Both texts around the place where they differ."""
    start = len(os.path.commonprefix([before, after]))  # noqa: RUF071 — texts
    tail = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))  # noqa: RUF071
    first = max(0, start - CONTEXT)
    return tuple(  # type: ignore[return-value]
        ("…" if first else "")
        + text[first : min(len(text), len(text) - tail + CONTEXT)]
        + ("…" if tail > CONTEXT else "")
        for text in (before, after)
    )


def _reach(tree: ast.AST, path: Path) -> ast.AST:
    node = tree
    for field, place in path:
        node = _get(node, field, place)
    return node


def _get(node: ast.AST, field: str, place: int | None) -> ast.AST:
    value = getattr(node, field)
    return value if place is None else value[place]


def _set(node: ast.AST, field: str, place: int | None, value: ast.AST) -> None:
    if place is None:
        setattr(node, field, value)
    else:
        getattr(node, field)[place] = value
