# %% [markdown]
# # 17 · One tile loop
#
# **The question.** CLIP trained with 32,768 pairs at a time. The matrix $S$ of their scores has 4 GB in
# 32-bit numbers, and plain code holds several arrays like it at once. How can the loss and its gradients be
# computed exactly without ever holding $S$?
#
# By walking over it in tiles that are made, used and forgotten. Only a running state per row and per column
# is kept from one tile to the next. Chapter 01 promised that one such walk serves all objectives of this
# course; here it is built from nothing, measured, and handed to five of them. The same walk, in another
# language, is the library's GPU code.
#
# You need: chapters 01, 04, 06, 10, 12, 13 and 16. Plan for seven hours with the five exercises.

# %%
import os
import sys
from pathlib import Path

here = Path(globals().get("__file__", "chapter")).resolve()  # a script knows its file, a notebook its folder
places = (*here.parents, *here.parent.glob("*/"))
root = next((p for p in places if os.path.isfile(p / "minivlp/ipot.py")), None)  # in a closed folder is none
if root is None:
    raise RuntimeError("minivlp is not here: clone it beside this notebook (Colab) or start in a clone")
sys.path.insert(0, str(root))

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from minivlp import attention, chamfer, infonce, mlm, sigmoid, stream
from minivlp.data import CPU_NOUNS, Scenes, load_emojivl
from minivlp.kernels import traffic
from tests import check
from tests.bugs.attention import softmax_by_tile, values_not_rescaled
from tests.laws import central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %% [markdown]
# Twenty-four scenes. Rows of $X$ mark the objects that a picture shows, rows of $Y$ the nouns that a caption
# says, and $S = s\,XY^\top$ with $s = 2$, as in chapter 01. On the right is what this chapter is about: $\log
# \sum_j e^{S_{ij}}$ of some rows, when only the tiles so far were seen.

# %%
emojivl = load_emojivl()
nouns = [c.id for c in emojivl.nouns(CPU_NOUNS)]
kinds = {"pair": 1, "pick": 2, "between": 1}
scenes = Scenes(emojivl, emojivl.nouns(CPU_NOUNS), kinds=kinds, sizes=(0.3, 0.45), seed=1)
shown = [scenes[i].objects for i in range(24)]
said = [shown[i][: len(scenes[i].slots)] for i in range(24)]  # a pick says nothing of its last object
X, Y = (np.array([[n in one for n in nouns] for one in side], float) for side in (shown, said))  # (24, D)
scale = 2.0
S = scale * X @ Y.T

fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3), constrained_layout=True)
image = left.imshow(S, cmap="viridis")
for k in (6, 12, 18):
    left.axvline(k - 0.5, color="white", linewidth=1)
    left.axhline(k - 0.5, color="white", linewidth=1)
left.set(xlabel="caption j", ylabel="picture i", title="S in tiles of 6 × 6")
fig.colorbar(image, ax=left, label="score")
seen = np.stack([np.logaddexp.reduce(S[:, : 6 * t], axis=1) for t in range(1, 5)])  # (4, 24)
assert (np.diff(seen, axis=0) >= 0).all() and np.allclose(seen[-1], np.logaddexp.reduce(S, axis=1))
for i in (1, 9, 16, 22):
    right.plot(range(1, 5), seen[:, i], ".-", label=f"row {i}")
right.set(xlabel="tiles seen", ylabel="log Σ exp of what was seen", xticks=range(1, 5))
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: each line only rises, and the last point is the normaliser of the whole row. To go on, nothing
# of the earlier tiles is needed but the height of the line.
#
# ## The running sum, three numbers at a time
#
# A row $S_{i1}, S_{i2}, \dots$ arrives in pieces. Keep its largest score so far, $m$, and $l = \sum e^{S_{ij}
# - m}$ over what was seen, so that no exponential overflows (chapter 01). A tile $t$ brings new scores:
#
# $$m' = \max(m, \max_j t_j), \qquad l' = l\, e^{m - m'} + \sum_j e^{t_j - m'}.$$
#
# The factor $e^{m - m'}$ is the essential part. The sum so far was measured from $m$. When the top rises to
# $m'$, it must shrink, because $e^{S - m} e^{m - m'} = e^{S - m'}$. So after every tile $l =
# \sum_{\text{seen}} e^{S - m}$ with the present $m$, and at the end $\log\sum_j e^{S_{ij}} = m + \log l$ up
# to rounding, in any order of tiles.

# %%
row = np.array([1.0, 2.0, 0.5, 5.0, 4.0, 3.0, 1.0, 2.0, 2.5])
m, l, forgetful = -np.inf, 0.0, 0.0
for tile in row.reshape(3, 3):
    top = max(m, tile.max())
    l = l * np.exp(m - top) + np.exp(tile - top).sum()
    forgetful = forgetful + np.exp(tile - top).sum()  # the shrinking left out
    m = top
    print(f"tile {tile}: m = {m:.0f}, l = {l:.4f}, m + log l = {m + np.log(l):.4f}")
print(f"whole row {np.log(np.exp(row).sum()):.4f}; without shrinking {m + np.log(forgetful):.4f}")
assert np.isclose(m + np.log(l), np.log(np.exp(row).sum())) and m + np.log(forgetful) > m + np.log(l) + 0.5

# %% [markdown]
# On a logarithmic scale the two numbers are one, $r = m + \log l$, and taking in a tile is $r' = \log(e^r +
# e^{\text{lse}(t)})$, in PyTorch `torch.logaddexp`. That operation is associative: halves of a row may be
# summed by different programs or machines and joined afterwards.
#
# ## Back again: tiles of G from two vectors
#
# InfoNCE (chapter 12) has the value and gradient
#
# $$L = \frac1{2B}\sum_i (r_i + c_i - 2 S_{ii}), \qquad
#   G_{ij} = \frac{e^{S_{ij} - r_i} + e^{S_{ij} - c_j} - 2\,[i = j]}{2B},$$
#
# with $r_i$ and $c_j$ the logsumexp of row $i$ and of column $j$. Autograd keeps $S$ or its softmaxes for the
# way back. But $G_{ij}$ needs one score and two numbers, $r_i$ and $c_j$. So keep these $2B$ numbers, *make
# the tile of $S$ again*, turn it into a tile of $G$, and add up
#
# $$dX_{\text{rows}} \mathrel{+}= s\, G_{\text{tile}} Y_{\text{columns}}, \qquad
#   dY_{\text{columns}} \mathrel{+}= s\, G_{\text{tile}}^\top X_{\text{rows}}.$$
#
# The scale needs no sum of its own, since $\sum_{ij} G_{ij} \langle x_i, y_j\rangle = \sum_i \langle x_i,
# \sum_j G_{ij} y_j\rangle = \langle X, dX\rangle / s$.

# %%
B, tiles = len(X), [slice(k, k + 6) for k in range(0, 24, 6)]
r, c, own = np.full(B, -np.inf), np.full(B, -np.inf), np.zeros(B)
for rows in tiles:  # the first walk: normalisers
    for columns in tiles:
        t = scale * X[rows] @ Y[columns].T  # (6, 6): all of S that exists now
        r[rows] = np.logaddexp(r[rows], np.logaddexp.reduce(t, axis=1))
        c[columns] = np.logaddexp(c[columns], np.logaddexp.reduce(t, axis=0))
        if rows == columns:
            own[rows] = t.diagonal()
dX, dY = np.zeros_like(X), np.zeros_like(Y)
for rows in tiles:  # the second walk: the same tiles again, now for the gradients
    for columns in tiles:
        t = scale * X[rows] @ Y[columns].T
        g = np.exp(t - r[rows, None]) + np.exp(t - c[columns]) - 2 * np.eye(6) * (rows == columns)
        dX[rows] += scale * g / (2 * B) @ Y[columns]
        dY[columns] += scale * g.T / (2 * B) @ X[rows]
dscale = (X * dX).sum() / scale
print(f"L = {(r + c - 2 * own).mean() / 2:.6f}, infonce_np {infonce.infonce_np(X, Y, scale)[0]:.6f}")
slopes = central_differences(lambda *z: infonce.infonce_np(*z)[0], (X, Y, scale), 0)
x, y, s = (torch.tensor(z, requires_grad=True) for z in (X, Y, scale))
infonce.infonce(x, y, s).backward()
assert np.abs(dX - slopes).max() < 1e-8 and np.allclose(dX, x.grad) and np.allclose(dY, y.grad)
print(f"dX differs from the slopes by {np.abs(dX - slopes).max():.0e}; equal to autograd:", end=" ")
print([np.allclose(a, b.grad, atol=1e-12) for a, b in ((dX, x), (dY, y), (dscale, s))])

# %% [markdown]
# The price: $S$ is made twice, 4 products of $2B^2D$ operations in place of 3. The gain: in place of $B^2$
# numbers a tile and $3B$.
#
# ## The loop has a name
#
# `minivlp/stream.py` holds the walk. `stream.fold(step, x, y, *state, scale=…)` makes tile after tile and
# calls `step(S, scratch, rows, columns, *state)`: the first walk. `stream.accumulate` does the same, and
# expects that the step turns `S` *in place* into $G$; it adds up and returns `dx, dy, dscale`: the second
# walk. `scratch` is a second tile to write to. `rows` and `columns` are tuples of one slice, which index
# states and tokens as above; in a batch, (B, M, D) and (B, N, D), a slice of pairs comes first. Both walks
# also take a `bias`, one for all or one a column, and a largest `tile`. Without it that is 512 × 1024: two of
# these fit the caches, and smaller ones would slow the products down.
#
# A step is all that an objective adds. Here is one that the library has not: push apart what points the same
# way, $L = \frac12 \sum_{ij} \max(S_{ij}, 0)^2$, with $G = \max(S, 0)$. `GradientsFromForward` (chapter 10)
# makes a loss of it: `forward` saves the gradients in the order of its inputs, `backward` hands them out.


# %%
def push_apart(S, scratch, rows, columns, losses):
    S.clamp_(min=0)  # now it is G
    losses[rows] += torch.mul(S, S, out=scratch).sum(1) / 2


class PushApart(stream.GradientsFromForward):
    @staticmethod
    def forward(ctx, x, y, scale):
        losses = x.new_zeros(len(x))
        grads = stream.accumulate(push_apart, x, y, losses, scale=float(scale), tile=(256, 128))
        ctx.save_for_backward(*grads)  # dx, dy, dscale
        return losses.sum()


g = torch.Generator().manual_seed(0)
x, y = (torch.randn(700, 16, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
losses = PushApart.apply(x, y, s), (s * x @ y.T).clamp(min=0).square().sum() / 2
both = [(loss, *torch.autograd.grad(loss, (x, y, s))) for loss in losses]
print("value, dx, dy and dscale equal:", [torch.allclose(a, b) for a, b in zip(*both, strict=True)])
assert all(torch.allclose(a, b) for a, b in zip(*both, strict=True))

# %% [markdown]
# ## Five losses
#
# They differ in what must be known before a tile of $G$ can be made. Products are those of the tile loop,
# forward and backward, and in brackets of the plain rung.
#
# | | state | walks | products |
# |---|---|---|---|
# | sigmoid loss | loss, $\sum G$ | one: no score needs another | 3 (3) |
# | masked words | loss; tiles are whole rows | one: a row's normaliser is known at once | 3 (3) |
# | InfoNCE | $r$, $c$, the diagonal | two: normalisers, then gradients | 4 (3) |
# | attention | $m$, $l$ and the output of each query | two | 7 (6) |
# | Chamfer | best cosine and its place, both ways | one: $G$ is gathered, not walked | 1 (3) |
#
# **Attention** carries a vector besides $m$ and $l$. Its output is $O_i = \sum_j e^{S_{ij}} v_j / \sum_j
# e^{S_{ij}}$, and the numerator shrinks with the denominator: $o' = o\, e^{m - m'} + \sum_j e^{t_j - m'}
# v_j$, at the end $O = o / l$. On the way back (chapter 04) $dS_{ij} = P_{ij} (dO_i \cdot v_j - \sum_k
# P_{ik}\, dO_i \cdot v_k)$ seems to need the whole row once more. But that sum is $dO_i \cdot \sum_k P_{ik}
# v_k = dO_i \cdot O_i$: one number a row, known before the second walk. Two plausible wrong answers from
# `tests/bugs/attention.py`, on 4 queries and 7 keys:

# %%
g = torch.Generator().manual_seed(4)
q, (k, v) = torch.randn(1, 1, 4, 5, generator=g), torch.randn(2, 1, 1, 7, 5, generator=g)
right = attention.attention(q, k, v)
print(f"{'the largest entry of the right answer':<50} {right.abs().max():.2f}")
for name, f in (
    ("attention_fused", attention.attention_fused),
    ("values not shrunk when the top rises", values_not_rescaled),
    ("a softmax of its own for each tile, then the mean", softmax_by_tile),
):
    off = (f(q, k, v) - right).abs().max()
    print(f"{name:<50} off by {off:.2f}")
    assert off < 1e-5 if f is attention.attention_fused else off > 0.2

# %% [markdown]
# Both wrong answers have the right shape and a plausible size. The law `equals_the_slow_loop` refuses them.
#
# **Exercise 1** · `attention_fused` · difficulty 3 of 3 · 90 minutes. Open `chapters/exercises/attention.py`.
# The output is no scalar: in place of `GradientsFromForward` write an `autograd.Function`, the first walk in
# `forward`, the second in `backward`, over a batch of B · H. No row of a mask is all False, but in a tile
# (checks use 2 × 3) it may be, and while $m$ is still $-\infty$ the shrinking $e^{m - m'}$ must not become
# NaN.

# %%
check("attention_fused")

# %% [markdown]
# **Masked words** (chapter 06). One side are $K$ hidden states, the other the $V$ words of the vocabulary. A
# tile of 256 rows and all $V$ columns holds whole rows: normaliser, loss and $G$ are known at once. **The
# sigmoid loss** (chapter 13) is easier still, and any tile will do: $G_{ij} = -z_{ij}\, \sigma(-z_{ij}
# S_{ij}) / B$ depends on one score. It and InfoNCE must find the diagonal. The library's tiles are not square
# as ours were, so `rows == columns` does not tell: the diagonal of the whole $S$ crosses a tile at the offset
# `rows[0].start - columns[0].start`, and `S.diagonal(offset)` is a view of it, often empty.
#
# **Chamfer** (chapter 16) folds a maximum and its place. Strictly larger replaces, so that the first of equal
# maxima stays, across tiles too. Its $G$ has at most $M + N$ entries that are not 0: $d\hat x_i$ is the
# partner's vector and those of the tokens that chose $i$, weighted and added up, without any product.
#
# **Exercise 2** · `mlm_loss_fused` · difficulty 3 of 3 · 60 minutes. Open `chapters/exercises/mlm.py`; a
# `GradientsFromForward` serves here and in the next two. **Exercise 3** · `infonce_fused` · difficulty 3 of 3
# · 60 minutes. Open `chapters/exercises/infonce.py`. **Exercise 4** · `sigmoid_loss_fused` · difficulty 3 of
# 3 · 45 minutes. Open `chapters/exercises/sigmoid.py`. **Exercise 5** · `chamfer_fused` · difficulty 3 of 3 ·
# 60 minutes. Open `chapters/exercises/chamfer.py`; it gathers in `backward`.

# %%
check("mlm_loss_fused", "infonce_fused", "sigmoid_loss_fused", "chamfer_fused")

# %% [markdown]
# All five at once against the plain rungs, in float64, with 600 rows. `stream.choose_backend` says which code
# a fused rung takes, and why: `dispatch` then uses the tiles or a kernel, and nothing changes silently.

# %%
g, E = torch.Generator().manual_seed(3), torch.nn.functional.normalize
rows = [torch.randn(600, 8, generator=g, dtype=torch.float64) for _ in range(3)]
heads, words = [z.view(2, 3, 100, 8) for z in rows], torch.randint(500, (600,), generator=g)
bias, unit = torch.randn(500, generator=g, dtype=torch.float64), [E(z) for z in rows[:2]]
five = {
    "attention": (lambda f, q, k, v: f(q, k, v).square().sum(), attention.RUNGS["attention"], heads),
    "masked words": (lambda f, h, e: f(h, e[:500], bias, words), mlm.RUNGS["mlm_loss"], rows[:2]),
    "InfoNCE": (lambda f, x, y: f(x, y, 10.0), infonce.RUNGS["infonce"], unit),
    "sigmoid loss": (lambda f, x, y: f(x, y, 10.0, -5.0), sigmoid.RUNGS["sigmoid_loss"], unit),
    "Chamfer": (lambda f, x, y: f(x, y), chamfer.RUNGS["chamfer"], rows[:2]),
}
for name, (ask, rungs, inputs) in five.items():
    answers, kept = [], []
    for rung in ("torch", "fused"):
        tensors, held = [t.clone().requires_grad_() for t in inputs], {}

        def keep(t, held=held):
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(keep, lambda t: t):
            value = ask(rungs[rung], *tensors)
        kept.append(sum(held.values()) / 2**20)
        answers.append([value.detach(), *torch.autograd.grad(value, tensors)])
    same = all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(*answers, strict=True))
    print(f"{name:<13} equal: {same}; kept for the way back: plain {kept[0]:.2f} MB, fused {kept[1]:.2f} MB")
    assert same and kept[1] < 0.6 * kept[0]
print("path and reason:", stream.choose_backend(rows[0]))

# %% [markdown]
# ## Memory, measured
#
# What autograd keeps is not all that a step holds at its worst moment. So: a fresh process for each rung, the
# largest resident set during forward and backward beyond what was there before, inputs excluded.

# %% tags=["measured"]
from minivlp.bench import fresh

sides = (1024, 2048)
task = {"do": "memory", "case": "infonce", "sizes": [{"B": B, "D": 64} for B in sides], "threads": 1}
grown = {}
for rung in ("torch", "fused"):
    answer = fresh(task | {"variants": [rung]})
    grown[rung] = answer["points"][1] / answer["points"][0]
    for B, held in zip(sides, answer["points"], strict=False):
        print(f"InfoNCE, {rung}, B = {B}: {held / 2**20:6.1f} MB at the peak; S alone {B * B / 2**18:.0f} MB")
assert grown["torch"] > 3 and grown["fused"] < 2.2

# %% [markdown]
# What to see: doubling $B$ multiplies the plain rung's memory by about four and the fused rung's by much
# less: its two tiles do not grow, `dx` and `dy` grow with $B$. The larger sizes are in [bench.md](bench.md).
#
# ## What bytes predict of time
#
# A chip multiplies at some rate and moves bytes at another, and plain rungs move many: each operation reads
# and writes an array like $S$. `traffic.passes` counts these passes by running the plain rung on a small
# input under a counter; the tile loop moves only rows of $y$ and $dy$, and tiles stay in the cache. Predict
# the time of each rung as products over rate plus bytes over bandwidth, as if one were done after the other
# and nothing else. The cell measures the speeds of this machine, works out the ratio that is predicted, and
# measures it:

# %% tags=["measured"]
from timeit import repeat


def best(call):
    return min(repeat(call, number=1, repeat=3))


B, D = 2048, 64
x, y = (E(torch.randn(B, D, generator=torch.Generator().manual_seed(i))) for i in (0, 1))
S, other = torch.zeros(2, B, B)
rate, band = 2 * B * B * D / best(lambda: torch.mm(x, y.T, out=S)), 8 * B * B / best(lambda: other.copy_(S))
pair = x.requires_grad_(), y.requires_grad_()
print(f"{rate / 1e9:.0f} GFLOP/s in products, {band / 1e9:.0f} GB/s in copies; B = {B}, D = {D}, one thread")
fused = {"InfoNCE": (4, 5 * D / 512), "sigmoid loss": (3, 4 * D / 512), "Chamfer": (1, D / 512)}
for case in traffic.CASES:
    if case.name in fused:
        ask, rungs, _ = five[case.name]
        counts = (case.products, traffic.passes(case)), fused[case.name]  # products and passes of each rung
        told = [2 * n * B * B * D / rate + 4 * p * B * B / band for n, p in counts]
        took = [best(lambda f=rungs[r], ask=ask: ask(f, *pair).backward()) for r in ("torch", "fused")]
        print(f"{case.name:<12} passes {counts[0][1]:.0f} and {counts[1][1]:.1f};", end=" ")
        print(f"plain over fused: predicted {told[0] / told[1]:.1f}, measured {took[0] / took[1]:.1f}")
assert told[0] > 2 * told[1] and took[0] > 1.2 * took[1]  # of Chamfer, the last

# %% [markdown]
# What to see: the prediction gives a direction and no figure. Each of the two times that it divides is a
# lower bound, since both leave out work, and a quotient of two lower bounds bounds nothing. The measured
# ratio can be above it or below. For Chamfer, where it is far above 1, the tile loop is clearly faster.
# Exponentials and maxima, which both rungs make, pull the measured ratio towards 1. Fresh pages of memory for
# arrays like $S$, which only the plain rung needs, push it up. Wider vectors add products and no passes.
#
# ## The same walk on a GPU
#
# `minivlp/kernels/walks.py` holds fold and accumulate once more, in Triton. A program owns a strip of 64 rows
# and walks along it. Tile and state stay in its registers. The strip of $dx$ does not: with hundreds of
# columns it is too wide for them, so `accumulate` reads it from memory, adds the share of the tile and writes
# it back, for every tile. No other program touches these rows, so this needs no atomic additions, and the
# strip stays in the chip's cache. For the columns the kernel is called with the sides exchanged. So every
# number has one writer and the same bits in every run, at the price of making $S$ once more a side. A step is
# compiled into the kernel. These two are all that is InfoNCE's own:

# %%
source = (root / "minivlp" / "kernels" / "walks.py").read_text(encoding="utf-8").split("@triton.jit\n")
for name in ("logsumexp", "infonce"):
    print(next(part for part in source if part.startswith(f"def {name}(")).strip() + "\n")
print("Predicted, not measured, 32-bit, for a laptop GPU:")
print("\n".join(line for line in traffic.table() if " 16 " not in line))
case = {case.name: case for case in traffic.CASES}
moved = {name: (traffic.plain_bytes(c, 4), traffic.kernel_bytes(c, 4)) for name, c in case.items()}
assert all(moved[name][0] > 20 * moved[name][1] for name in ("InfoNCE", "sigmoid loss", "Chamfer"))
assert moved["masked words"][0] > 5 * moved["masked words"][1]
assert moved["word-patch"][0] < 2 * moved["word-patch"][1]
assert case["masked words"].folds + 2 * case["masked words"].accumulates == 5 > case["masked words"].products

# %% [markdown]
# The steps are the formulas of this chapter. The table counts launch by launch. A launch reads its rows once.
# It reads its columns once if they fit the cache of 32 MB, and otherwise once for each round of programs: 24
# programs, one on each multiprocessor, start at column 0 together and share what they read as long as they
# keep step. For InfoNCE, the sigmoid loss and Chamfer bytes shrink by much and predicted times by less, since
# at widths of 512 and more the products count. In the last line, word-patch alignment (chapter 15), the
# arrays of the plain rung fit the cache, so by this count neither rung moves much through memory. What its
# kernel saves are passes over the cache and launches, which the model does not time.
#
# For masked words the vocabulary outgrows the cache, and still kernels would move a ninth of the bytes. But
# two walks make five products where the plain rung makes three, and by the prediction they are no faster. So
# `mlm_loss_fused` has none here. Kernels for this loss exist: Cut Cross-Entropy (Wijmans et al. 2024) makes
# $S$ again on the way back and leaves out tiles whose gradient is too small to count, and Liger's fused
# linear cross-entropy goes by chunks of rows, as our panels do.
#
# **No GPU time was measured here**: this project was made on processors without a GPU. What can be tested is
# the arithmetic. Triton's interpreter runs a kernel program by program in NumPy, slowly. The environment
# chooses it when Triton is imported, so it gets a process of its own. 20 pairs of width 24, in float32, tiles
# of 16 × 16 with ragged edges:

# %% tags=["measured"]
import importlib.util
import os
import subprocess

program = """
import numpy as np, torch
from minivlp import infonce, sigmoid, stream
from minivlp.kernels import losses
x, y = torch.nn.functional.normalize(torch.randn(2, 20, 24, generator=torch.manual_seed(0)), dim=-1)
print("path and reason:", stream.choose_backend(x))
for name, scalars in (("infonce", (10.0,)), ("sigmoid_loss", (10.0, -3.0))):
    loss, grads = getattr(losses, name)(x, y, *scalars)
    np_rung = {"infonce": infonce.infonce_np, "sigmoid_loss": sigmoid.sigmoid_loss_np}[name]
    wanted, by_hand = np_rung(x.double().numpy(), y.double().numpy(), *scalars)
    worst = max(np.abs(a.numpy() - b).max() for a, b in zip(grads, by_hand))
    print(f"{name}: kernel {loss:.6f}, float64 {wanted:.6f}; largest error of a gradient {worst:.0e}")
"""
if importlib.util.find_spec("triton") is None:
    print("Triton is not installed here, so the kernels were not run; all of the above works without it")
else:
    home = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=home, capture_output=True, text=True)
    print(done.stdout or done.stderr, end="")

# %% [markdown]
# ## What we left out
#
# * Transport (chapters 14 and 15) walks over one matrix dozens of times: there the fused form keeps it, on a
#   GPU a whole pair on the chip, instead of making tiles anew.
# * Gradients of gradients: a fused rung can be differentiated once; the plain rungs have more.
# * Several machines: `infonce_gathered` and `sigmoid_loss_ring` walk over shards (chapters 12 and 13).
# * Tensor cores, 16-bit accumulation and tuning of tile sizes, which need a GPU to be honest about.
#
# ## Sources
#
# Milakov and Gimelshein 2018, the running normaliser. Rabe and Staats 2021 and Dao et al. 2022
# (FlashAttention), appendix B.2 for $dO \cdot O$. Cheng et al. 2024 (Inf-CL), tiles for the contrastive loss.
# Tillet, Kung and Cox 2019 (Triton). Wijmans et al. 2024 (Cut Cross-Entropy). Hsu et al. 2024 (Liger Kernel).
# Radford et al. 2021 (CLIP), the batch of 32,768.
