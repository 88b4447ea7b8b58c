"""Small wrong changes to the library's own functions: what a tired hand might type.

    sign        a + b → a − b and back, −a → a
    axis        sum(…, 0) ↔ sum(…, 1), −1 ↔ −2
    factor      a · b → a or b, a / b → a
    transpose   a.T, a.mT, a.swapaxes(−1, −2) → a
    off by one  an index, a bound or a count n → n + 1; < ↔ ≤, > ↔ ≥

A mutant of an exercise changes one place of the function, or of a private helper that it uses. Refusals are
left alone, since laws ask with good input only.
"""

import ast
import copy
import hashlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.course import Exercise, exercises
from tests.stubs import library_source

SMALL = {"BLOCK": 4, "GROUP": 3, "PANEL": 2}  # in place of the library's, so that small arrays have several
EACH = 10  # mutants an exercise, chosen by a hash of what they change
AXES = {0: 1, 1: 0, -1: -2, -2: -1}
FLIPPED = {ast.Add: ast.Sub, ast.Sub: ast.Add}
COMPARED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ALONG = {
    "sum",
    "mean",
    "max",
    "min",
    "amax",
    "argmax",
    "softmax",
    "logsumexp",
    "logsumexp_np",
    "_logsumexp",
    "cumsum",
    "prod",
    "flip",
}


@dataclass(frozen=True)
class Mutant:
    """`change` says what was done where; `function` is the exercise's function with it."""

    one: Exercise
    change: str
    function: Callable


def mutants(one: Exercise) -> list[Mutant]:
    """At most EACH mutants of one exercise, the same in every run."""
    module = ast.parse(library_source(one.concept))
    places = reached(module, one)
    changes, number = [], 0
    while True:
        changed = _changed(module, places, number)
        if changed is None:
            break
        changes.append(changed)
        number += 1
    seen: dict[str, int] = {}
    named = []
    for change, tree in changes:
        seen[change] = seen.get(change, 0) + 1
        named.append((change if seen[change] == 1 else f"{change} (place {seen[change]})", tree))
    named.sort(key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return [Mutant(one, change, _compiled(tree, one)) for change, tree in named[:EACH]]


def reached(module: ast.Module, one: Exercise) -> list[str]:
    """The function and the helpers of its file that it uses, exercises of their own and refusals left out."""
    others = {other.name for other in exercises(one.concept)} - {one.name}
    top = {n.name: n for n in module.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    found, queue = [], [one.name]
    while queue:
        name = queue.pop(0)
        if name in top and name not in found and name not in others and "check" not in name:
            found.append(name)
            nodes = list(ast.walk(top[name]))
            local = {n.arg for n in nodes if isinstance(n, ast.arg)}
            queue += [n.id for n in nodes if isinstance(n, ast.Name) and n.id not in local]
    return found


def _changed(module: ast.Module, places: list[str], number: int) -> tuple[str, ast.Module] | None:
    """The module with change `number` made, or None when there are fewer."""
    tree = copy.deepcopy(module)
    change = _Change(number)
    for node in tree.body:
        if getattr(node, "name", None) in places:
            change.owner = node.name
            change.visit(node)
    return (change.made, ast.fix_missing_locations(tree)) if change.made else None


def _compiled(tree: ast.Module, one: Exercise) -> Callable:
    module = types.ModuleType(f"mutant_of_{one.concept}")
    exec(compile(tree, f"<mutant of {one.name}>", "exec"), module.__dict__)
    module.__dict__.update({name: small for name, small in SMALL.items() if name in module.__dict__})
    return getattr(module, one.name)


class _Change(ast.NodeTransformer):
    """Makes change `number` of those that it meets, in the order of the file."""

    def __init__(self, number: int):
        self.left, self.made, self.owner = number, "", ""

    def _offer(self, node: ast.expr, others: Iterator[ast.expr] | list[ast.expr]) -> ast.expr:
        for other in others:
            if self.left == 0 and not self.made:
                self.made = f"{self.owner}: {ast.unparse(node)} → {ast.unparse(other)}"
                return other
            self.left -= 1
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        has_text = ast.get_docstring(node) is not None
        node.body[has_text:] = [self.visit(statement) for statement in node.body[has_text:]]
        return node

    def visit_stmt(self, node: ast.stmt) -> ast.stmt:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if isinstance(node, ast.Raise | ast.Assert) or any("require" in n or "check" in n for n in names):
            return node
        return self.generic_visit(node)

    visit_Expr = visit_Assign = visit_AugAssign = visit_Return = visit_If = visit_stmt
    visit_Raise = visit_Assert = visit_stmt

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        kind = type(node.op)
        if kind in FLIPPED:
            return self._offer(node, [ast.BinOp(node.left, FLIPPED[kind](), node.right)])
        return self._offer(node, {ast.Mult: [node.left, node.right], ast.Div: [node.left]}.get(kind, []))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.generic_visit(node)
            return self._offer(node, [node.operand])
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        self.generic_visit(node)
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARED:
            other = COMPARED[type(node.ops[0])]()
            return self._offer(node, [ast.Compare(node.left, [other], node.comparators)])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        return self._offer(node, [node.value] if node.attr in ("T", "mT") else [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("swapaxes", "transpose") and isinstance(node.func, ast.Attribute) and len(node.args) == 2:
            node.func.value = self.visit(node.func.value)
            return self._offer(node, [node.func.value])
        node.func = self.visit(node.func)
        node.args = [self._argument(a, name) for a in node.args]
        for keyword in node.keywords:
            axis = keyword.arg in ("axis", "dim")
            keyword.value = self._axis(keyword.value) if axis else self.visit(keyword.value)
        return node

    def _argument(self, node: ast.expr, name: str) -> ast.expr:
        if name in ALONG and _number(node) in AXES:
            return self._axis(node)
        return self._more(node) if name == "range" and _number(node) is not None else self.visit(node)

    def _axis(self, node: ast.expr) -> ast.expr:
        number = _number(node)
        return self._offer(node, [ast.parse(str(AXES[number]), mode="eval").body] if number in AXES else [])

    def _more(self, node: ast.expr) -> ast.expr:
        return self._offer(node, [ast.Constant(_number(node) + 1)])

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        node.value = self.visit(node.value)
        parts = [node.slice.lower, node.slice.upper] if isinstance(node.slice, ast.Slice) else [node.slice]
        if isinstance(node.slice, ast.Slice):
            low, high = (p and (self._more(p) if _number(p) is not None else self.visit(p)) for p in parts)
            node.slice = ast.Slice(low, high, node.slice.step)
        elif _number(node.slice) is not None:
            node.slice = self._more(node.slice)
        return node


def _number(node: ast.expr | None) -> int | None:
    """The whole number that an expression writes, with its sign."""
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return value if type(value) is int else None
