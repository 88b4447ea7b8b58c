"""From numbers to a verdict: a mean over seeds and test items, its interval, and on which side that lies.

Every seed trains its models anew and asks them the same test items. Let x_si be what seed s gets on item i
(for two models trained with the same seed: the difference of what they get), S seeds, n items in G clusters
(pairs of objects), which share objects and hang together. Another run would have other seeds, and another
test other items, so the mean m has two sources of error, which are taken to be independent:

    low, high = m ∓ √(a² + b²),      a = t_{S−1} · sd_s(mean_i x_si) / √S,      b = t_{G−1} · √V,
    V = G/(G−1) Σ_g (Σ_{i∈g} (mean_s x_si − m))² / n².

The rule, with a margin that the claim states before anything is measured:

    holds               low > margin           (for a claim that the number is above it)
    does not hold       high < margin
    cannot be told      otherwise

and the mirror image for a claim that it is below. With two seeds t is 12.7, so only large effects are told.

Sources: Student 1908; Liang and Zeger 1986 (V); errors of two crossed samples: Cornfield and Tukey 1956.
Left out: a correction for asking several questions; each verdict is at 95 % on its own.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from minivlp.core.require import fail

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "cannot be told at this size"
# Student's t at 97.5 %, by degrees of freedom; beyond the table two terms of its expansion.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Sample:
    """What one seed gets on each test item, and the cluster of each: (n,) both."""

    items: Sequence[float]
    clusters: Sequence[Hashable]


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def student(freedom: int) -> float:
    """Student's t at 97.5 % for whole degrees of freedom from 1 on."""
    if freedom < 1:
        fail("freedom", "must be at least 1", freedom)
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = 1.96
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(seeds: Sequence[Sample]) -> Interval:
    """The mean over seeds and items with its 95 % interval, as above.

    All seeds must have been asked the same items. When all items are one cluster their error cannot be seen,
    and counts as 0. Raises ValueError for fewer than two seeds, for no items, and for unequal items.
    """
    if len(seeds) < 2:
        fail("seeds", "must be at least two, for their spread to be seen", len(seeds))
    clusters = list(seeds[0].clusters)
    x = [np.asarray(s.items, dtype=float) for s in seeds]
    if not len(clusters) or any(len(row) != len(clusters) or list(s.clusters) != clusters
                                for row, s in zip(x, seeds, strict=True)):  # fmt: skip
        fail("seeds", "must hold the same test items, at least one", [len(row) for row in x])
    x = np.stack(x)  # (S, n)
    m, S, n = x.mean(), len(x), x.shape[1]
    a = student(S - 1) * x.mean(1).std(ddof=1) / math.sqrt(S)
    number = {cluster: g for g, cluster in enumerate(dict.fromkeys(clusters))}
    G, b = len(number), 0.0
    if G > 1:
        sums = np.bincount([number[cluster] for cluster in clusters], x.mean(0) - m)  # (G,)
        b = student(G - 1) * math.sqrt(G / (G - 1) * (sums**2).sum()) / n
    reach = math.hypot(a, b)
    return Interval(float(m), float(m - reach), float(m + reach))


def difference(first: Sequence[Sample], second: Sequence[Sample]) -> list[Sample]:
    """Seed by seed and item by item, the first minus the second. Raises ValueError when they do not pair."""
    if len(first) != len(second):
        fail("second", f"must hold the {len(first)} seeds of the first", len(second))
    pairs = []
    for a, b in zip(first, second, strict=True):
        if list(a.clusters) != list(b.clusters) or len(a.items) != len(b.items):
            fail("second", "must hold the same test items as the first", len(b.items))
        pairs.append(Sample((np.asarray(a.items, float) - np.asarray(b.items, float)).tolist(), a.clusters))
    return pairs


def verdict(found: Interval, margin: float = 0.0, above: bool = True) -> str:
    """HOLDS, FAILS or OPEN, of the claim that the number is above (or below) the margin."""
    if found.low > margin:
        return HOLDS if above else FAILS
    if found.high < margin:
        return FAILS if above else HOLDS
    return OPEN
