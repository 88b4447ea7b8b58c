"""Shared hypothesis strategies: small arrays of awkward shapes, some of them views with permuted strides."""

import numpy as np
from hypothesis import strategies as st

WHOLE, NUMBERS = 50, (1.0, -1.0, 2.0, -2.0, 3.0, -3.0)  # of which no two are equal, and none is 0


def sizes(largest: int = 5, smallest: int = 1) -> st.SearchStrategy[int]:
    return st.integers(smallest, largest)


def widths(largest: int = 5) -> st.SearchStrategy[int]:
    """1 … largest, of which a counterexample has 2 rather than 1: a row of one number is a special case."""
    order = [*range(2, largest + 1), 1]
    return st.integers(0, largest - 1).map(order.__getitem__)


@st.composite
def arrays(draw: st.DrawFn, *shape: int, scale: float = 1.0, gap: float = 0.0) -> np.ndarray:
    """Float64 array; half of the draws are views with permuted strides.

    With `gap` > 0 all entries differ by at least that much, so that ties do not decide a gradient. The first
    WHOLE seeds, to which counterexamples shrink, give few numbers as small whole ones, times the scale.
    """
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * scale
    if seed < WHOLE and x.size <= len(NUMBERS) and not gap:
        x = rng.permutation(NUMBERS)[: x.size].reshape(shape) * scale
    if gap:
        order = np.argsort(np.argsort(x, axis=None)).reshape(shape)
        x = (order - x.size / 2) * max(gap, scale / max(x.size, 1)) + rng.uniform(0, gap / 4, shape)
    if draw(st.booleans()):
        x = np.ascontiguousarray(x.T).T
    return x


@st.composite
def pairs(draw: st.DrawFn, *lengths: float) -> tuple[np.ndarray, np.ndarray]:
    """x (B, D), y (B, D), entries about as large as one of `lengths`; some pairs doubled, some rows zero."""
    B, D, length = draw(sizes()), draw(widths()), draw(st.sampled_from(lengths or (1.0,)))
    x, y = draw(arrays(B, D, scale=length)), draw(arrays(B, D, scale=length))
    special = draw(st.sampled_from(["none", "doubled", "zero"]))
    if special == "doubled":
        x[-1], y[-1] = x[0], y[0]
    if special == "zero":
        x[0] = 0
    return x, y
