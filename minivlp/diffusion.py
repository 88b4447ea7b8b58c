"""Diffusion: a picture drowns in noise step by step, and a network learns which noise it was.

At level t ∈ [0, 1] there is as much picture left as signal(t) = cos(πt/2) says, and as much noise as
deviation(t) = sin(πt/2), so that unit variance stays unit variance:

    x_t = signal(t) · x + deviation(t) · ε,        ε ~ N(0, 1)        (noisy)
    loss = mean |ε̂(x_t, t, c) − ε|²

The best ε̂ is −deviation(t) times the score of the noisy data: denoising is score matching at all levels at
once, each weighted by its variance. Two uses:

    errors    e(x, c) = mean over t of |ε̂(x_t, t, c) − ε|²: the smallest error is the likeliest class's.
              All classes get the same noises. The error of one noise differs from that of another by far more
              than those of two classes do, so with noises of their own the classes draw lots.
    back      one step towards the picture: the noisy picture at a lower level, given what ε̂ says

Sources: Ho, Jain and Abbeel 2020 (DDPM), eq. 4, 7 and 14; Nichol and Dhariwal 2021 for the cosine; Li et al.
2023 (Diffusion Classifier), eq. 7 and section 4.2 for shared noises.
Left out: the weights of the evidence bound (all levels count alike, as in the sources); guidance, which is
decoder.py's; fewer levels for classes that are out of the race.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import working, working_np

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t (n, …), level (n,), class (n,) → ε̂ (n, …)


def signal(level: Tensor) -> Tensor:
    """How much of the picture is left at these levels: 1 at level 0, 0 at level 1."""
    return torch.cos(level * (math.pi / 2))


def deviation(level: Tensor) -> Tensor:
    """The deviation of the noise at these levels: 0 at level 0, 1 at level 1."""
    return torch.sin(level * (math.pi / 2))


def noisy_np(x: np.ndarray, noise: np.ndarray, level: np.ndarray, grad: np.ndarray | None = None):
    """A picture under noise, and its gradients by hand.

    x (B, …), noise (B, …) of unit variance, level (B,) in [0, 1], grad (B, …) the upstream gradient (None =
    ones). Returns `(x_t (B, …), (dx, dnoise, dlevel))`. Raises ValueError on bad shapes, mixed dtypes, NaN,
    infinities and levels outside [0, 1].
    """
    _check(np.ndarray, x, noise, level)
    x, noise, level = working_np(x, noise, level)
    angle = level.reshape(-1, *[1] * (x.ndim - 1)) * (math.pi / 2)
    G = np.ones_like(x) if grad is None else grad
    # d cos = −sin and d sin = cos, times π/2 for the angle of a level.
    dlevel = G * (np.cos(angle) * noise - np.sin(angle) * x) * (math.pi / 2)
    out = np.cos(angle) * x + np.sin(angle) * noise
    return out, (G * np.cos(angle), G * np.sin(angle), dlevel.sum(axis=tuple(range(1, x.ndim))))


def noisy(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """x (B, …) under noise (B, …) of unit variance at levels (B,) in [0, 1] → (B, …); errors as above."""
    _check(Tensor, x, noise, level)
    picture, n, t = working(x, noise, level)
    t = t.view(-1, *[1] * (x.ndim - 1))
    return (signal(t) * picture + deviation(t) * n).to(x.dtype)


def _check(library, x, noise, level) -> None:
    require.shapes(library, level=(level, "B"))
    for name, array in (("x", x), ("noise", noise)):
        require.of_library(library, name, array)
    if not x.ndim or len(x) != len(level):
        require.fail("x", f"must have one picture a level, B={len(level)}", tuple(x.shape))
    if x.shape != noise.shape:
        require.fail("noise", f"must have the shape of x, {tuple(x.shape)}", tuple(noise.shape))
    require.floats(x=x, noise=noise, level=level)
    low, high = (end.item() for end in (level.min(), level.max())) if len(level) else (0.0, 0.0)
    if not 0 <= low <= high <= 1:
        require.fail("level", "must lie in [0, 1]", f"{low} to {high}")


def even_levels(T: int) -> Tensor:
    """T levels, evenly spaced inside (0, 1): the middles of T equal parts, (T,)."""
    if T < 1:
        require.fail("T", "must be at least 1", T)
    return (torch.arange(T) + 0.5) / T


def errors(model: Denoiser, x: Tensor, c: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """How well each class explains each picture: x (B, …), classes c (C,), levels (T,) → errors (B, C).

    noise (T, B, …): for every level and picture one, which all classes share. An error is the squared
    distance of ε̂ and ε, summed over the numbers of the picture and averaged over the levels; −error / 2 is
    log p(x | c) up to a weight and a constant. One forward pass a level. Raises ValueError on bad shapes, no
    level, and levels outside [0, 1].
    """
    sizes = require.shapes(Tensor, c=(c, "C"), levels=(levels, "T"))
    B, C, T = len(x), sizes["C"], sizes["T"]
    if tuple(noise.shape) != (T, *x.shape):
        require.fail("noise", f"must have shape (T, B, …) = {(T, *x.shape)}", tuple(noise.shape))
    if not T:
        require.fail("levels", "must hold at least one", "none")
    total, numbers = x.new_zeros(B, C), math.prod(x.shape[1:])
    for level, n in zip(levels, noise, strict=True):
        x_t = noisy(x, n, level.expand(B).to(x.dtype))
        rows = x_t.repeat_interleave(C, 0)  # (B · C, …): the classes of a picture side by side
        found = model(rows, level.expand(B * C).to(x.dtype), c.repeat(B)).view(B, C, numbers)
        total += (found - n.reshape(B, 1, numbers)).square().sum(-1)
    return total / T


def back(x_t: Tensor, predicted: Tensor, level: Tensor, lower: Tensor, noise: Tensor) -> Tensor:
    """A picture at a lower level, drawn from q(x_s | x_t, x̂) with x̂ the picture that ε̂ implies.

    x_t, predicted (ε̂) and noise (B, …); level and lower (B,) with 0 ≤ lower < level < 1. Where ε̂ is the true
    noise the result has exactly the law of `noisy` at the lower level. Raises ValueError on other levels.
    """
    if not bool(((lower >= 0) & (lower < level) & (level < 1)).all()):
        got = f"{lower.tolist()} below {level.tolist()}"
        require.fail("lower", "must lie in [0, level), and level below 1", got)
    t, s = (v.view(-1, *[1] * (x_t.ndim - 1)) for v in (level, lower))
    x = (x_t - deviation(t) * predicted) / signal(t)
    kept = signal(t) / signal(s)
    fresh = deviation(t) ** 2 - kept**2 * deviation(s) ** 2  # the variance added from s to t
    mean = (kept * deviation(s) ** 2 * x_t + signal(s) * fresh * x) / deviation(t) ** 2
    return mean + (fresh.sqrt() * deviation(s) / deviation(t)) * noise


RUNGS = {
    "noisy": {"np": noisy_np, "torch": noisy},
    "errors": {"plain": errors}, "back": {"plain": back},
}  # fmt: skip
