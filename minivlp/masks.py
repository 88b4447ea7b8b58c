"""Who sees whom: one small table says what kind of model a transformer is.

A sequence is cut into S segments of n₁ … n_S tokens: the words, the patches, some queries. A table A says
which segment may look at which, a set C which segments are causal inside. With s(i) the segment of token i,
token i may look at token j where

    M[i, j] = A[s(i), s(j)]  and not  (s(i) = s(j) ∈ C and j > i).

Rows look at columns. BERT, ViLT, GPT, two towers, a captioner and BLIP-2's Q-Former are one network with
other tables, and what such a table allows can be read off before anything is trained:

    influence    A residual block passes token j to token i where M[i, j] or i = j. So output i of k layers
                 depends on input j exactly where the Boolean power (M or 1)ᵏ is True: where a path of at most
                 k looks leads from i to j.
    leak         Position i, whose output predicts token t, reaches input t. A path of two looks is enough, so
                 a mask without a leak can be the mask of a network that leaks.
    cache        Tokens that look only at one another can be computed once and kept, whatever is appended.
    padding      Nobody looks at padding; padding looks at itself, because a softmax needs a key.

Attention under such a mask has Σ A[s, t] · n_s · n_t scores that count, of L² in all. Gradient: that of
`attention`, where a forbidden key has weight 0.

Rungs (attention_blocks):
    attention_blocks_np      attention_np under M; gradients by hand
    attention_blocks         attention under M, (L, L) bool
    attention_blocks_fused   a walk over the blocks of the table that count: no M, no work on the others

Sources: Dong et al. 2019 (UniLM), figure 1: one network, three masks; Li et al. 2023 (BLIP-2), figure 2.
Left out: tables for one head or one layer alone, which no model here has. Attention across, to tokens that
are not in the sequence, has no table: all of them may be seen.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from minivlp import stream
from minivlp.attention import attend_back_tile, attend_tile, attention, attention_np
from minivlp.core import require
from minivlp.core.precision import without_autocast, working

Table = Sequence[Sequence[int]]

# Tables that several models share; a model's own stands beside the model.
FULL: Table = ((1, 1), (1, 1))  # one encoder over both: ViLT, FLAVA's fusion, the Q-Former that matches
TOWERS: Table = ((1, 0), (0, 1))  # neither sees the other: CLIP, the Q-Former that compares
PREFIX: Table = ((1, 0), (1, 1))  # the second also sees the first: captioners, with the second causal


def _table(lengths: Sequence[int], sees: Table, causal: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """Refuse bad tables; return the lengths (S,) and the table (S, S), bool."""
    n = np.asarray(lengths)
    if n.ndim != 1 or n.dtype.kind not in "iu" or not n.size or n.min() < 0:
        require.fail("lengths", "must be a sequence of whole numbers ≥ 0", lengths)
    rows, S = [list(row) for row in sees], len(n)
    if [len(row) for row in rows] != [S] * S:
        require.fail("sees", f"must be {S} × {S}, as there are {S} lengths", f"rows of {[*map(len, rows)]}")
    for entry in (entry for row in rows for entry in row):
        if entry not in (0, 1):
            require.fail("sees", "must hold 0 and 1 only", entry)
    if not isinstance(causal, Iterable) or not all(s in range(S) for s in causal):
        require.fail("causal", f"must be a sequence of segments, 0 to {S - 1}", causal)
    return n, np.array(rows, dtype=bool)


def visible(lengths: Sequence[int], sees: Table, causal: Sequence[int] = ()) -> np.ndarray:
    """Who sees whom, token by token: (L, L) bool, True where the row may look at the column.

    lengths: the numbers of tokens of S segments, in the order of the sequence; sees: S × S of 0 and 1,
    sees[s][t] = may segment s look at segment t; causal: the segments in which no token looks at a later one.
    The answer is a NumPy array: a model makes it a tensor once, `torch.from_numpy(visible(…))`. A row may be
    all False. Raises ValueError for lengths below 0, for a table of another size or with other entries, and
    for causal segments that are not there.
    """
    n, A = _table(lengths, sees, causal)
    segment = np.repeat(np.arange(len(n)), n)  # (L,)
    own = segment[:, None] == segment
    later = ~np.tri(len(segment), dtype=bool)  # column > row
    return A[segment[:, None], segment] & ~(own & later & np.isin(segment, list(causal)))


def influence(mask: np.ndarray, layers: int) -> np.ndarray:
    """Which outputs of a stack depend on which inputs: the Boolean power (mask or 1)^layers, (L, L) bool.

    mask (L, L) bool, True where the row may look at the column, as `visible` gives it; the 1 is the residual
    stream, so that 0 layers give the identity. Raises ValueError for a mask that is not square or not bool,
    and for layers below 0.
    """
    require.shapes(np.ndarray, mask=(mask, "L L"))
    require.mask("mask", mask)
    if not isinstance(layers, int | np.integer) or layers < 0:
        require.fail("layers", "must be a whole number ≥ 0", layers)
    reach = np.eye(len(mask), dtype=bool)
    one_layer = mask | reach
    for _ in range(layers):
        reach = one_layer @ reach  # of bool: i reaches j when any token that i sees reaches j
    return reach


def leaks(mask: np.ndarray, layers: int, reads: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The predictions that can be copied: of the pairs (i, t) in `reads` those whose i reaches t.

    mask (L, L) bool and layers as in `influence`. A pair (i, t) says that the output of position i is read to
    predict the token at position t; for next words t = i + 1. A token that is hidden in the input can be
    reached without harm: leave its pairs out. The answer keeps their order; no leak is an empty list. Raises
    ValueError as `influence` does, and for positions outside the sequence.
    """
    reach, found = influence(mask, layers), []
    for i, t in reads:
        if i not in range(len(mask)) or t not in range(len(mask)):
            require.fail("reads", f"must hold pairs of positions from 0 to {len(mask) - 1}", (i, t))
        if reach[i, t]:
            found.append((int(i), int(t)))
    return found


def real_keys(mask: Tensor, real: Tensor) -> Tensor:
    """The mask of a padded batch: mask (L, L) and real (B, L), both bool → (B, 1, L, L), as blocks take it.

    Nobody looks at padding but padding at itself, so that every row has a key; its output means nothing.
    """
    itself = torch.eye(len(mask), dtype=torch.bool, device=mask.device)
    return (mask & real[:, None, None]) | itself


@torch.compiler.disable  # tables are Python's and NumPy's: there is nothing to compile
def _check(library, q, k, v, lengths, sees, causal) -> None:
    """Refuse bad arrays, and tables that do not fit or leave a token nothing to see."""
    full = require.shapes(library, q=(q, "B H L d"), k=(k, "B H L d"), v=(v, "B H L d"))
    require.floats(q=q, k=k, v=v)
    if not full["L"] or not full["d"]:
        require.fail("k", "must hold at least one key of width ≥ 1", tuple(k.shape))
    n, A = _table(lengths, sees, causal)
    if n.sum() != full["L"]:
        require.fail("lengths", f"must add up to L={full['L']}", n.tolist())
    blind = (n > 0) & ~A[:, n > 0].any(1)
    if blind.any():
        require.fail("sees", "must let every token see one", f"segment {blind.argmax()}, which sees none")


@torch.compiler.disable
def _mask(lengths, sees, causal, like: Tensor) -> Tensor:
    """`visible` as a tensor beside another."""
    return torch.from_numpy(visible(lengths, sees, causal)).to(like.device)


@torch.compiler.disable
def _blocks(lengths, sees, causal) -> list[tuple[slice, slice, bool]]:
    """The blocks that count: rows, columns, and whether only columns up to the row do."""
    n, A = _table(lengths, sees, causal)
    segments = [slice(int(end - m), int(end)) for m, end in zip(n, n.cumsum(), strict=True)]
    return [(segments[s], segments[t], s == t and s in causal) for s, t in np.argwhere(A).tolist()]


def attention_blocks_np(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths, sees, causal=(), grad: np.ndarray | None = None
):
    """Attention under the table and its gradients by hand.

    q, k and v (B, H, L, d); lengths, sees and causal as in `visible`, the lengths adding up to L; grad
    (B, H, L, d) the upstream gradient (None = ones). Returns `(out (B, H, L, d), (dq, dk, dv))`. Raises
    ValueError on what `visible` and `attention_np` refuse, on lengths with another sum, and when a token may
    see nothing.
    """
    _check(np.ndarray, q, k, v, lengths, sees, causal)
    return attention_np(q, k, v, visible(lengths, sees, causal), grad=grad)


def attention_blocks(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sees: Table, causal: Sequence[int] = ()
) -> Tensor:
    """Attention under the table: q, k and v (B, H, L, d) → (B, H, L, d); arguments and errors as above."""
    _check(Tensor, q, k, v, lengths, sees, causal)
    return attention(q, k, v, _mask(lengths, sees, causal, q))


def attention_blocks_fused(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], sees: Table, causal: Sequence[int] = ()
) -> Tensor:
    """`attention_blocks` block by block; arguments and errors as there, differentiable once.

    A query's running softmax goes on from one block of keys to the next, so the blocks that its segment may
    see are walked in place, with no mask and no copy of their keys, and the others are not touched.
    """
    _check(Tensor, q, k, v, lengths, sees, causal)
    out = stream.differentiable(_Fused, q, k, v, _blocks(lengths, sees, causal))
    require.held(out, "result", "q", q.dtype)
    return out


class _Fused(torch.autograd.Function):
    """blocks: (rows, columns, whether only columns up to the row count)."""

    @staticmethod
    def forward(ctx, q, k, v, blocks):
        x, y, z = (t.flatten(0, 1) for t in working(q, k, v))  # (B·H, L, d)
        top, total, out = x.new_full(x.shape[:2], -math.inf), x.new_zeros(x.shape[:2]), torch.zeros_like(x)
        ctx.scale, ctx.blocks = 1 / math.sqrt(q.shape[-1]), blocks
        for rows, columns, causal in blocks:
            state = (t[:, rows] for t in (top, total, out))
            queries, keys, values = x[:, rows], y[:, columns], z[:, columns]
            stream.fold(attend_tile, queries, keys, values, None, causal, *state, scale=ctx.scale)
        out = out.div_(total[..., None]).view(q.shape).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, top.add_(total.log_()))
        return out

    @staticmethod
    def backward(ctx, upstream):
        stream.refuse_create_graph()
        *arrays, out, lse = ctx.saved_tensors
        x, y, z, O, G = (t.flatten(0, 1) for t in working(*arrays, out, upstream))
        inner, grads = (G * O).sum(-1), [torch.zeros_like(t) for t in (x, y, z)]
        dq, dk, dv = grads
        with without_autocast(x):
            for rows, columns, causal in ctx.blocks:
                state = (lse[:, rows], G[:, rows], inner[:, rows], dv[:, columns])
                queries, keys, values = x[:, rows], y[:, columns], z[:, columns]
                found = stream.accumulate(
                    attend_back_tile, queries, keys, values, None, causal, *state,
                    scale=ctx.scale, wanted=(True, True, False),
                )  # fmt: skip
                dq[:, rows] += found[0]
                dk[:, columns] += found[1]
        found = (g.view(a.shape).to(a.dtype) for g, a in zip(grads, arrays, strict=True))
        return *(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)), None


RUNGS = {
    "visible": {"plain": visible},
    "influence": {"plain": influence},
    "leaks": {"plain": leaks},
    "attention_blocks": {
        "np": attention_blocks_np,
        "torch": attention_blocks,
        "fused": attention_blocks_fused,
    },
}
