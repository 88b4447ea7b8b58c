"""Yours to write: noisy_np, errors.

`pytest tests/test_diffusion.py` holds what you write here to the laws of minivlp/diffusion.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

import math

import numpy as np
from torch import Tensor

from minivlp.diffusion import Denoiser, noisy
from tests import Todo


def noisy_np(x: np.ndarray, noise: np.ndarray, level: np.ndarray, grad: np.ndarray | None = None):
    """A picture under noise, and its gradients by hand.

    x (B, …), noise (B, …) of unit variance, level (B,) in [0, 1], grad (B, …) the upstream gradient (None =
    ones). Returns `(x_t (B, …), (dx, dnoise, dlevel))`. Raises ValueError on bad shapes, mixed dtypes, NaN,
    infinities and levels outside [0, 1].
    """
    raise Todo


def errors(model: Denoiser, x: Tensor, c: Tensor, levels: Tensor, noise: Tensor) -> Tensor:
    """How well each class explains each picture: x (B, …), classes c (C,), levels (T,) → errors (B, C).

    noise (T, B, …): for every level and picture one, which all classes share. An error is the squared
    distance of ε̂ and ε, summed over the numbers of the picture and averaged over the levels; −error / 2 is
    log p(x | c) up to a weight and a constant. One forward pass a level. Raises ValueError on bad shapes, no
    level, and levels outside [0, 1].
    """
    raise Todo
