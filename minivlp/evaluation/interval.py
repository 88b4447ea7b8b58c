"""A share of hits with its 95 % interval, when the items of a cluster (a pair of objects) hang together.

For n hits h_i with mean p, in G clusters, the variance of p is estimated by the sandwich

    V = G/(G−1) Σ_g (Σ_{i∈g} (h_i − p))² / n²,

which needs no assumption on how the items of a cluster depend on each other. These n items tell as much as
n_eff = p (1 − p) / V independent ones, and the interval is Wilson's for n_eff: unlike p ± 1.96 √V it stays
inside [0, 1] and has a width when every item is a hit.

Sources: Wilson 1927; Liang and Zeger 1986 (the sandwich); Korn and Graubard 1998 (an interval from n_eff).
Left out: items that share a picture across clusters.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from minivlp.core.require import fail


def interval(hits: Sequence, clusters: Sequence[Hashable]) -> tuple[float, float]:
    """(low, high) in [0, 1] for hits (n,) of 0 and 1 and the cluster of each.

    n_eff is at most n. When all hits are equal nothing shows how they depend on each other, and it is n; with
    one cluster it is 1. The normal quantile z is widened towards Student's with G − 1 degrees of freedom by
    the first term of its expansion, (z³ + z) / 4 (G − 1). Raises ValueError for no hits or unequal lengths.
    """
    hits = np.asarray(hits, dtype=float)
    if not len(hits) or len(hits) != len(clusters):
        fail("hits", f"must hold at least one hit, and one a cluster ({len(clusters)})", len(hits))
    number = {cluster: g for g, cluster in enumerate(dict.fromkeys(clusters))}
    n, G, p, z = len(hits), len(number), hits.mean(), 1.96
    if G == 1:
        n_eff = 1.0
    else:
        sums = np.bincount([number[cluster] for cluster in clusters], hits - p)  # (G,)
        V = G / (G - 1) * (sums**2).sum() / n**2
        n_eff = min(n, p * (1 - p) / V) if V > 1e-15 else n  # V = 0 too when all clusters have the mean p
        z += (z**3 + z) / (4 * (G - 1))
    centre = (p + z**2 / (2 * n_eff)) / (1 + z**2 / n_eff)
    reach = z / (1 + z**2 / n_eff) * np.sqrt(p * (1 - p) / n_eff + z**2 / (4 * n_eff**2))
    # Rounding may put the bound of p = 0 or 1 a hair inside it.
    return float(max(0, min(p, centre - reach))), float(min(1, max(p, centre + reach)))


def measured(hits: Sequence, clusters: Sequence[Hashable], **beside: float | str) -> dict:
    """{"value", "low", "high", "items", "clusters"} and what else stands beside the number, for JSON."""
    low, high = interval(hits, clusters)
    plain = {key: x if isinstance(x, str) else float(x) for key, x in beside.items()}
    sizes = {"items": len(hits), "clusters": len(set(clusters))}
    return {"value": float(np.mean(hits)), "low": low, "high": high} | sizes | plain
