"""Yours to write: multi_head_np, multi_head, block, encoder, embed_words, embed_patches, encode, mlm_hidden,
itm_logits, pretraining_loss, rate, adamw, muon, train.

`pytest tests/test_build_vilt.py` holds what you write here to the laws of minivlp/build_vilt.py, which has the
answers. The laws ask with good input only: leave out the refusals that the docstrings speak of. Everything
else in the library may be imported.
"""

from collections.abc import Callable, Mapping
from typing import Any
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from minivlp.attention import attention, attention_np
from minivlp.build_vilt import under
from minivlp.itm import itm_loss
from minivlp.mlm import mlm_loss
from minivlp.patch import patch_embed
from minivlp.transformer import join_heads, layer_norm, split_heads
from tests import Todo


def multi_head_np(
    z: np.ndarray, w_qkv: np.ndarray, b_qkv: np.ndarray, w_out: np.ndarray, b_out: np.ndarray,
    heads: int = 1, mask: np.ndarray | None = None, grad: np.ndarray | None = None,
):  # fmt: skip
    """Multi-head attention of tokens among themselves, with its four maps, and the gradients by hand.

    z (B, L, D), w_qkv (3 D, D) with the rows of queries, keys and values in this order, b_qkv (3 D,), w_out
    (D, D), b_out (D,); heads divides D; mask bool (True = may look) broadcasts to (B, heads, L, L); grad
    (B, L, D) the upstream gradient (None = ones). Returns `(out (B, L, D), (dz, dw_qkv, db_qkv, dw_out,
    db_out))`. Raises ValueError on bad shapes, mixed dtypes, NaN, infinities, sums that overflow, and when a
    query may see no key.
    """
    raise Todo


def multi_head(
    z: Tensor, w_qkv: Tensor, b_qkv: Tensor, w_out: Tensor, b_out: Tensor,
    heads: int = 1, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Multi-head attention of tokens among themselves, with its four maps: z (B, L, D) → (B, L, D).

    w_qkv (3 D, D) has the rows of queries, keys and values in this order, b_qkv (3 D,), w_out (D, D), b_out
    (D,); heads divides D; mask bool (True = may look) broadcasts to (B, heads, L, L). Errors as in
    `multi_head_np`.
    """
    raise Todo


def block(
    z: Tensor, w: Mapping[str, Tensor], heads: int, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """One pre-norm block: z ← z + MSA(LN(z)), then z ← z + MLP(LN(z)), with the exact GELU.

    z (B, L, D); w: norm1, qkv, proj, norm2, fc1 and fc2, each with `.weight` and `.bias`, qkv with the rows
    of queries, keys and values; mask bool (True = may look) broadcasts to (B, heads, L, L). → (B, L, D).
    """
    raise Todo


def encoder(
    z: Tensor, w: Mapping[str, Tensor], layers: int, heads: int, mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """`layers` blocks in turn, then one LayerNorm: z (B, L, D) → (B, L, D).

    w: the weights of block n as `blocks.n.norm1.weight` and so on, those of the last norm as `norm.weight`
    and `norm.bias`. `under(w, "blocks.0.")` has the weights of block 0 by the names that `block` knows.
    """
    raise Todo


def embed_words(ids: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Rows of words: LN(word + position + segment) + type 0.

    ids (B, L) integers; w: `word.weight` (V, D), `text_position.weight` (≥ L, D), `segment.weight` and
    `modality.weight` of which row 0 is taken, `text_norm.weight` and `.bias`, with ε = 1e-12. → (B, L, D).
    """
    raise Todo


def embed_patches(pixels: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Rows of a picture: its [CLS] first, then projected patches; positions and type 1 are added to all.

    pixels (B, 3, H, W); w: `patch.weight` (D, 3, p, p), `patch.bias`, `cls` (D,), `position` (1 + N, D) with
    the row of [CLS] first, `modality.weight` of which row 1 is taken. → (B, 1 + N, D), row-major patches.
    """
    raise Todo


def encode(
    ids: Tensor, text_mask: Tensor, pixels: Tensor, w: Mapping[str, Tensor], layers: int, heads: int,
    writing: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Words and picture in one sequence through the encoder: states of words and of the picture.

    ids (B, L), text_mask (B, L) bool (True = a word), pixels (B, 3, H, W); w: the whole model, its blocks as
    `encoder.blocks.0.norm1.weight` and so on. Nobody looks at padding. When `writing`, no word sees a later
    one and no row of the picture sees a word. → (B, L, D) and (B, 1 + N, D).
    """
    raise Todo


def mlm_hidden(states: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """The head of hidden words before its decoder: a linear map, GELU, LayerNorm with ε = 1e-12.

    states (…, D); w: `mlm.dense.weight`, `mlm.dense.bias`, `mlm.norm.weight`, `mlm.norm.bias`. → (…, D).
    """
    raise Todo


def itm_logits(cls: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """Does the text match the picture? The pooler, tanh of a linear map, then the two logits.

    cls (B, D), the states of the text's first token; w: `pooler` and `itm`, each with `.weight` and `.bias`.
    → (B, 2), column 1 = match.
    """
    raise Todo


def pretraining_loss(
    batch: Any, w: Mapping[str, Tensor], layers: int, heads: int, wpa_weight: float = 0.1
) -> dict[str, Tensor]:
    """The weighted terms of a batch's loss: "mlm" ("next" in a batch that is written), "itm" and "wpa".

    batch has `ids` and `labels` (B, L), −100 where nothing is predicted, `text_mask` (B, L) bool, `pixels`
    (B, 3, H, W), `match` (B,): 1, 0, or −1 for an example that does not serve matching, `align` (B,): +1
    pulls words and patches of an example together, −1 pushes them apart, 0 does neither, and `written`, bool.
    Means are over predicted words, for "itm" and "wpa" over the examples that serve matching. "itm" and "wpa"
    are missing where no example serves them.
    """
    raise Todo


def rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """The share of the peak rate at a step, in (0, 1]: linear warm-up, flat, linear towards zero.

    Step 0 has 1 / warmup, step warmup − 1 and later ones have 1. The last round(cooldown · steps) steps have
    the steps that are left, this one among them, divided by that number.
    """
    raise Todo


def adamw(
    weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, count: int, lr: float, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW, with β = (0.9, 0.98) and ε = 1e-8: the new weight, mean and square.

    mean and square: running means of the gradient and of its square, zeros before the first step; count: 1 at
    the first step. Both are divided by 1 − βᵏ at step k, since they began at zero. The weight decays by
    lr · decay of itself, beside the step: weight ← (1 − lr · decay) weight − lr mean / (√square + ε).
    """
    raise Todo


def muon(weight: Tensor, grad: Tensor, mean: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """One step of Muon: momentum whose singular values are brought near 1. The new weight and mean.

    weight (A, B). mean ← 0.95 mean + 0.05 grad, and M = 0.95 mean + 0.05 grad (Nesterov). M, divided by its
    Frobenius norm (at least 1e-7), goes five times through X ← 3.4445 X − 4.7750 X Xᵀ X + 2.0315 (X Xᵀ)² X,
    and the weight moves by −lr √max(1, A / B) X.
    """
    raise Todo


def train(
    w: Mapping[str, Tensor], loss: Callable[[dict[str, Tensor], int], dict[str, Tensor]], matrices: set[str],
    steps: int, lr: float = 2e-3, matrix_lr: float = 0.01, decay: float = 0.01, warmup: int = 30,
    cooldown: float = 0.4, look: Callable[[int, dict, dict], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The loop: a loss, its gradients, one update of every weight; returns the trained weights.

    loss(w, step) gives the terms of a step, whose sum is differentiated. The weights that `matrices` names
    are updated by `muon` with matrix_lr, all others by `adamw` with lr; only those with two axes or more
    decay. Both rates are multiplied by `rate(step, …)`. The gradients of all weights with two axes or more
    that are not in `matrices` are scaled together, so that their common norm is at most 1. A weight that no
    term reads in a step is left as it is. After every update `look(steps done, w, terms)` is called. The
    tensors given are not changed.
    """
    raise Todo
