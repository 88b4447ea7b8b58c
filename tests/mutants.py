"""Small wrong changes to the library's own functions: what a tired hand might type.

    sign        a + b → a − b and back, −a → a
    axis        sum(…, 0) ↔ sum(…, 1), −1 ↔ −2
    factor      a · b → a or b, a / b → a
    transpose   a.T, a.mT, a.swapaxes(−1, −2) → a
    off by one  an index, a bound or a count n → n + 1; < ↔ ≤, > ↔ ≥

and finer ones, which leave most answers right:

    detach      one operand of a torch rung stands still in the backward pass
    floor       max(a, c), a.clamp_min(c) → a; eps and MIN_NORM → 0; rows divided by their bare lengths
    ties        argmax → the last of equal ones; max with an index → amax, which shares
    gradient    one gradient of a right value is doubled, negated, 0, rounded, cut off, 0 for rows of zeros …

A mutant of an exercise changes one place of the function, or of a private helper that it uses. Refusals are
left alone, since laws ask with good input only.
"""

import ast
import copy
import hashlib
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.attempts import solution
from tests.course import Exercise, exercises
from tests.held import is_float_array
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
    """At most EACH mutants of each sort of one exercise, the same in every run."""
    return [*_of_the_source(one, _Change), *_of_the_source(one, _Finer), *_of_the_gradients(one)]


def _of_the_source(one: Exercise, kind: type["_Change"]) -> list[Mutant]:
    module = ast.parse(library_source(one.concept))
    places = reached(module, one)
    changes, number = [], 0
    while True:
        changed = _changed(module, places, kind(number, one))
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


def _changed(module: ast.Module, places: list[str], change: "_Change") -> tuple[str, ast.Module] | None:
    """The module with one change made, or None when there are fewer."""
    tree = copy.deepcopy(module)
    for node in tree.body:
        if getattr(node, "name", None) in places:
            change.owner = node.name
            change.visit(node)
    return (change.made, ast.fix_missing_locations(tree)) if change.made else None


def _compiled(tree: ast.Module, one: Exercise) -> Callable:
    module = types.ModuleType(f"mutant_of_{one.concept}")
    exec(compile(tree, f"<mutant of {one.name}>", "exec"), module.__dict__)
    module.__dict__.update(IN_PLACE)
    module.__dict__.update({name: small for name, small in SMALL.items() if name in module.__dict__})
    return getattr(module, one.name)


class _Change(ast.NodeTransformer):
    """Makes change `number` of those that it meets, in the order of the file."""

    def __init__(self, number: int, one: Exercise):
        self.left, self.made, self.owner, self.one = number, "", "", one

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


class _Finer(_Change):
    """Detach, floor and ties, in place of the changes above."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.assigned = {
            n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        self.moving = _moving(node) if self.one.rung in ("torch", "fused") else set()
        return super().visit_FunctionDef(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        for side in ("left", "right"):
            operand = getattr(node, side)
            still = []
            if isinstance(operand, ast.Name) and operand.id in self.moving:
                still = [ast.Call(ast.Attribute(operand, "detach", ast.Load()), [], [])]
            if isinstance(operand, ast.Name) and operand.id == "eps" and isinstance(node.op, ast.Add):
                still = [ast.Constant(0.0)]
            setattr(node, side, self._offer(operand, still, node))
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if not isinstance(node.ctx, ast.Load) or node.id in self.assigned:
            return node
        others = {"MIN_NORM": ast.Constant(0.0)}
        if node.id in IN_PLACE_OF:
            others[node.id] = ast.Name(IN_PLACE_OF[node.id], ast.Load())
        return self._offer(node, [others[node.id]] if node.id in others else [])

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute):
            what, whose = node.func.attr, node.func.value
            if what == "clamp_min":
                return self._offer(node, [whose])
            if what == "argmax":
                return self._offer(
                    node, [ast.Call(ast.Name("last_argmax", ast.Load()), [whose, *node.args], [])]
                )
            if what == "maximum" and len(node.args) == 2:
                return self._offer(node, [node.args[0]])
        if isinstance(node.func, ast.Name) and node.func.id == "max" and len(node.args) == 2:
            return self._offer(node, [arg for arg in node.args if not isinstance(arg, ast.Constant)][:1])
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        self.generic_visit(node)
        inner = node.value
        if node.attr == "values" and isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
            shared = ast.Call(ast.Attribute(inner.func.value, "amax", ast.Load()), inner.args, inner.keywords)
            return self._offer(node, [shared])
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        return self.generic_visit(node)

    visit_Compare = visit_Subscript = visit_UnaryOp

    def _offer(self, node: ast.expr, others: list[ast.expr], told: ast.expr | None = None) -> ast.expr:
        for other in others:
            if self.left == 0 and not self.made:
                self.made = f"{self.owner}: {ast.unparse(node)} → {ast.unparse(other)}"
                self.made += f" in {ast.unparse(told)}" if told else ""
                return other
            self.left -= 1
        return node


def _moving(node: ast.FunctionDef) -> set[str]:
    """Names of the function that stand for tensors with a gradient: arguments, and what is made of them."""
    found = {
        a.arg
        for a in node.args.args
        if a.annotation is not None and ast.unparse(a.annotation).startswith(("Tensor", "float | Tensor"))
        if "mask" not in a.arg and a.arg not in ("a", "b", "targets", "labels")
    }
    for one in ast.walk(node):
        if isinstance(one, ast.Assign) and isinstance(one.value, ast.BinOp):
            used = {n.id for n in ast.walk(one.value) if isinstance(n, ast.Name)}
            if used & found:
                found |= {t.id for t in one.targets if isinstance(t, ast.Name)}
    return found


def last_argmax(x: Any, axis: int = -1) -> Any:
    """The last of equal maxima."""
    last = x.shape[axis] - 1
    return last - (
        x.flip(axis).argmax(axis) if isinstance(x, torch.Tensor) else np.flip(x, axis).argmax(axis)
    )


def bare_unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def bare_unit_np(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = np.sqrt((x * x).sum(-1, keepdims=True))
    return x / length, length


def bare_cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return bare_unit(x) @ bare_unit(y).mT


def bare_cosines(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    per_x, per_y = (1 / z.norm(dim=-1, keepdim=True) for z in (x, y))
    return (x @ y.mT).mul_(per_x).mul_(per_y.mT), per_x, per_y


def projecting(unit: np.ndarray, length: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Short rows are projected as if their divisor moved."""
    return (grad - unit * (unit * grad).sum(-1, keepdims=True)) / length


IN_PLACE = {
    f.__name__: f for f in (last_argmax, bare_unit, bare_unit_np, bare_cosine, bare_cosines, projecting)
}
IN_PLACE_OF = {
    "unit": "bare_unit",
    "unit_np": "bare_unit_np",
    "cosine": "bare_cosine",
    "cosines": "bare_cosines",
    "unit_grad_np": "projecting",
}


def _of_the_gradients(one: Exercise) -> list[Mutant]:
    """The library's function, its value untouched, with one of its gradients changed."""
    # They return a plan, or ids, and no gradient.
    solver = one.family in ("ipot", "nearest") or one.name == "sinkhorn_np"
    if one.rung == "plain" or solver:
        return []
    names = [n for n in inspect.signature(solution(one)).parameters if n not in SETTINGS]
    found = []
    for which, name in enumerate(names):
        for told, change in GRADIENTS.items():
            if told == ZEROS and name not in TOKENS:
                continue
            turned = _turned_np if one.rung == "np" else _turned
            found.append(Mutant(one, f"d{name} {told}", turned(one, which, change)))
    return sorted(found, key=lambda m: hashlib.sha256(m.change.encode()).digest())[:EACH]


SETTINGS = {"grad", "mask", "causal", "eps", "iters", "beta", "a", "b", "row_mask", "col_mask", "word_mask"}
SETTINGS |= {
    "patch_mask",
    "x_mask",
    "y_mask",
    "image_mask",
    "text_mask",
    "margin",
    "hardest",
    "targets",
    "labels",
    "heads",
    "lengths",
    "sees",
    "positions",
    "base",
}


ZEROS = "0 for rows of zeros"
TOKENS = {"images", "texts", "x", "y", "words", "patches", "hidden"}  # arrays whose rows may be zeros


def _rows_of_zeros(g: Any, x: Any) -> Any:
    still = (x == 0).all(-1)
    return g * ~still[..., None]


def _mean(g: Any, x: Any) -> Any:
    return g * 0 + g.mean() if g.ndim else 2 * g


GRADIENTS: dict[str, Callable] = {
    "twice": lambda g, x: 2 * g,
    "negated": lambda g, x: -g,
    "0": lambda g, x: 0 * g,
    "cut off at half its largest": lambda g, x: g.clip(-abs(g).max() / 2, abs(g).max() / 2),
    "turned to its mean": _mean,
    "without its last row": lambda g, x: g * _all_but_the_last(g) if g.ndim else 0 * g,
    "off by 1e-4 of itself": lambda g, x: g * (1 + 1e-4),
    ZEROS: _rows_of_zeros,
}


def _all_but_the_last(g: Any) -> Any:
    kept = np.ones(g.shape)
    kept[-1:] = 0
    return torch.from_numpy(kept).to(g.dtype) if isinstance(g, torch.Tensor) else kept


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.save_for_backward(x)
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return ctx.change(upstream, x), None


def _turned(one: Exercise, which: int, change: Callable) -> Callable:
    def function(*args: Any, **settings: Any) -> Any:
        args = [
            _Turn.apply(a, change) if i == which and isinstance(a, torch.Tensor) and a.requires_grad else a
            for i, a in enumerate(args)
        ]
        return solution(one)(*args, **settings)

    return function


def _turned_np(one: Exercise, which: int, change: Callable) -> Callable:
    def function(*args: Any, **settings: Any) -> Any:
        value, grads = solution(one)(*args, **settings)
        x = [np.asarray(a) for a in args if is_float_array(a)][which]
        changed = change(np.asarray(grads[which]), x)
        return value, tuple(changed if i == which else g for i, g in enumerate(grads))

    return function


def _number(node: ast.expr | None) -> int | None:
    """The whole number that an expression writes, with its sign."""
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None
    return value if type(value) is int else None
