# %% [markdown]
# # 13 · The sigmoid loss
#
# **The question.** Four pictures, four captions, sixteen combinations. Chapter 12 asked each picture *which*
# caption is its own. Ask something simpler, of each combination by itself: *is this a pair?* Four times the
# answer is yes, twelve times no. What is gained by sixteen small questions in place of eight choices, and
# what has to be repaired because so many answers are no?
#
# This is the loss of SigLIP. No score occurs in the gradient of another, so a batch can be cut into blocks
# that machines work on alone. What has to be repaired is the start.
#
# You need: chapters 01, 10 and 12. Plan for two and a half hours with the two exercises.

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

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import normalize

from minivlp import infonce, sigmoid
from minivlp.data import CPU_NOUNS, TRAINING_ARTISTS, load_emojivl
from minivlp.data.drawings import Portraits
from tests import check
from tests.bugs import sigmoid as bugs

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
emojivl = load_emojivl()
things = emojivl.nouns(CPU_NOUNS[2:6])
fig, axes = plt.subplot_mosaic(
    [[str(i), "z"] for i in range(4)], figsize=(4.6, 2.8), width_ratios=(1, 4), constrained_layout=True
)
axes["z"].imshow(np.eye(4), cmap="Greens", vmax=3, aspect="auto")
for i, thing in enumerate(things):
    axes[str(i)].imshow(emojivl.sheets["noto"][thing.id])
    axes[str(i)].set(xticks=[], yticks=[])
    for j in range(4):
        axes["z"].text(j, i, "yes" if i == j else "no", ha="center", va="center")
axes["z"].set(yticks=[], xlabel="caption")
axes["z"].set_xticks(range(4), [f"{thing.article} {thing.noun}" for thing in things], fontsize=8)
plt.show()

# %% [markdown]
# ## B² questions
#
# The scores are those of chapter 01, with a bias $b$ this time: $S = s\,XY^\top + b$. Let $z_{ij} = +1$ if $i
# = j$, and $-1$ if not. A score is taken for the log-odds of *yes*, so that with $\sigma(t) = 1/(1 + e^{-t})$
# the right answer has the probability $\sigma(z_{ij} S_{ij})$. As in chapter 10 it costs $-\log\sigma(t) =
# \operatorname{softplus}(-t) = \log(1 + e^{-t})$, and the **sigmoid loss** adds up all costs and divides by
# $B$:
#
# $$L = \frac1B \sum_{ij} \operatorname{softplus}(-z_{ij} S_{ij}).$$
#
# The three pairs of chapter 01, with $b = -1$:

# %%
X = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
Y = np.array([[0.8, 0.6], [-0.6, 0.8], [1.0, 0.0]])
s, b = 2.0, -1.0
S = s * X @ Y.T + b
z = 2 * np.eye(3) - 1
costs = np.log1p(np.exp(-z * S))
print("S =\n", S, "\n\nP(yes) =\n", 1 / (1 + np.exp(-S)), "\n\ncosts =\n", costs)
print(f"\nL = {costs.sum() / 3:.4f}; sigmoid_loss_np says {sigmoid.sigmoid_loss_np(X, Y, s, b)[0]:.4f}")
assert np.isclose(costs.sum() / 3, sigmoid.sigmoid_loss_np(X, Y, s, b)[0])

# %% [markdown]
# ## The gradient by hand
#
# The derivative of softplus is $\sigma$, and the factor $-z$ comes from inside:
#
# $$G_{ij} = \frac{\partial L}{\partial S_{ij}} = -\frac{z_{ij}\,\sigma(-z_{ij} S_{ij})}{B}.$$
#
# On the diagonal that is $-(1 - P)/B$ and elsewhere $P/B$, with $P = \sigma(S)$ the probability of *yes*:
# belief minus truth again. From here on it is chapter 01,
#
# $$dX = s\,G\,Y, \qquad dY = s\,G^\top X, \qquad ds = \sum_{ij} G_{ij} (XY^\top)_{ij}, \qquad
#   db = \sum_{ij} G_{ij}.$$
#
# For InfoNCE $db$ would be zero: a constant added to all scores changes no softmax. Here it is the surplus of
# belief over truth. At $db = 0$ the expected number of yeses, per picture and on average, is right: one.

# %%
G = -z / (1 + np.exp(z * S)) / 3
dX, dY, ds, db = s * G @ Y, s * G.T @ X, (G * (X @ Y.T)).sum(), G.sum()
print("G =\n", G, "\n\ndX =\n", dX, "\n\ndY =\n", dY, f"\n\nds = {ds:.4f}, db = {db:.4f}")

h = 1e-5
for name, hand, up, down in (("ds", ds, (s + h, b), (s - h, b)), ("db", db, (s, b + h), (s, b - h))):
    slope = (sigmoid.sigmoid_loss_np(X, Y, *up)[0] - sigmoid.sigmoid_loss_np(X, Y, *down)[0]) / (2 * h)
    print(f"{name}: by hand {hand:.6f}, slope {slope:.6f}")
    assert abs(hand - slope) < 1e-8
x, y, scale, bias = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (X, Y, s, b))
cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits
cross_entropy(scale * x @ y.T + bias, torch.eye(3, dtype=torch.float64), reduction="sum").div(3).backward()
pairs = zip((dX, dY, ds, db), (x, y, scale, bias), strict=True)
worst = max(np.abs(g - t.grad.numpy()).max() for g, t in pairs)
print(f"all four within 1e-12 of autograd's: {worst < 1e-12}")
assert worst < 1e-12

# %% [markdown]
# **Exercise 1** · `sigmoid_loss_np` · difficulty 2 of 3 · 30 minutes. **Exercise 2** · `sigmoid_loss` ·
# difficulty 1 · 10 minutes. Open `chapters/exercises/sigmoid.py`, replace `raise Todo`, and run the next
# cell. `np.logaddexp(0, t)` is a softplus that does not overflow. (The file's third function waits for
# chapter 17.)

# %%
check("sigmoid_loss_np", "sigmoid_loss")

# %% [markdown]
# ## No score knows another
#
# Raise the single score $S_{01}$ by one and see which entries of $G$ notice:

# %%
before = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
bump = torch.zeros_like(before)
bump[0, 1] = 1
before.requires_grad_()
eye = torch.eye(6, dtype=torch.float64)  # x @ eye.T = x: any matrix of scores can be had
losses = {
    "InfoNCE": lambda scores: infonce.infonce(scores, eye, 1.0),
    "sigmoid loss": lambda scores: sigmoid.sigmoid_loss(scores, eye, 1.0, 0.0),
}
fig, axes = plt.subplots(1, 2, figsize=(5.6, 2.5), constrained_layout=True)
for ax, (name, loss) in zip(axes, losses.items(), strict=True):
    one, two = (torch.autograd.grad(loss(scores), scores)[0] for scores in (before, before + bump))
    image = ax.imshow(two - one, cmap="coolwarm", vmin=-0.02, vmax=0.02)
    assert ((two - one).abs() > 1e-12).sum() == (1 if name == "sigmoid loss" else 11)  # of 6 + 6 − 1
    ax.set(title=name, xlabel="caption j", ylabel="picture i", xticks=range(6), yticks=range(6))
fig.colorbar(image, ax=axes, label="change of G", extend="max")
plt.show()

# %% [markdown]
# What to see: InfoNCE shares out a row and a column anew, so entries of both change; the raised one goes
# beyond the colours. The sigmoid loss changes in one place. Two things follow, one bad and one good: the
# numbers of yeses and noes, which the softmax kept in balance by itself, now need attention; and the sum may
# be taken in any pieces.
#
# ## Many noes: the bias
#
# Before training the vectors are random. Suppose for a moment that all cosines are 0, so that every score is
# the bias. Then a picture's share of the loss is one yes and $B - 1$ noes,
#
# $$L(b) = \operatorname{softplus}(-b) + (B - 1)\operatorname{softplus}(b), \qquad
#   \frac{\text{push of the noes}}{\text{pull of the yes}} = \frac{(B - 1)\,\sigma(b)}{\sigma(-b)} =
#   (B - 1)\, e^{b}.$$
#
# With $b = 0$ the first steps of training are $B - 1$ parts "push everything apart" and one part "pull pairs
# together". The two balance at $b = -\log(B - 1)$, which is also the minimum of $L(b)$. You have met this
# number: it is the $-\log K$ of chapter 10. The sigmoid loss asks NCE's question, with the captions of the $K
# = B - 1$ other pictures as noise. SigLIP starts at $b = -10$, $s = 10$: a single no begins near zero cost,
# so that many of them do not drown the one yes (Zhai et al. 2023, section 3.2).

# %%


def start_loss(B, b):
    """L(b), with all cosines 0."""
    return np.logaddexp(0, -b) + (B - 1) * np.logaddexp(0, b)


biases = np.linspace(-14, 2, 200)
fig, ax = plt.subplots(figsize=(5, 2.8), constrained_layout=True)
for B, colour in ((32, "C0"), (1024, "C1"), (32768, "C2")):
    ax.semilogy(biases, start_loss(B, biases), color=colour, label=f"B = {B}")
    ax.plot(-math.log(B - 1), start_loss(B, -math.log(B - 1)), "o", color=colour)
    assert abs(biases[start_loss(B, biases).argmin()] + math.log(B - 1)) < 0.1
    ratios = [f"b = {v:>3}: {(B - 1) * math.exp(v):.3g}" for v in (0, -10)]
    print(f"B = {B:>5}, push over pull at   {'   '.join(ratios)}")
ax.axvline(-10, color="black", linewidth=0.8)
ax.set(xlabel="bias b (line: −10)", ylabel="loss when all cosines are 0", ylim=(1, 1e5))
ax.legend()
plt.show()

# %% [markdown]
# What to see: each curve is lowest at $-\log(B - 1)$ (dots). Left of it the loss rises gently with the yeses,
# right of it steeply with the noes. For the largest of these batches, a size of the paper, $-10$ is near the
# dot. For a small one it is a cautious choice: learning begins with the yeses.
#
# ## Random cosines are not zero
#
# Does the balance hold for real random vectors? The cosine of two random directions in $D$ dimensions has
# mean 0 and variance $1/D$ (chapter 16 uses the same), so a score is $S = b + \xi$ with a scatter $\xi$ of
# standard deviation $s/\sqrt D$. The push of a no is $\sigma(S)$, which is about $e^S$ where $S$ is very
# negative, and an exponential does not average out: large scores gain more than small ones lose. For a normal
# $\xi$
#
# $$E\big[e^{b + \xi}\big] = e^{\,b + s^2/2D}.$$
#
# So the noes push by the factor $e^{s^2/2D}$ more than at cosines of zero, and **predict**: the balance lies
# at
#
# $$b = -\log(B - 1) - \frac{s^2}{2D}.$$
#
# At $s = 10$ and the width $D = 768$ of SigLIP's smaller models the new term is 0.07, and one need not know
# it. At $D = 32$ it is 1.56, a factor of 4.8. The prediction assumes that no score comes near 0, where
# $\sigma(S) < e^S$. Now **measure**: random unit vectors, the ratio at the old balance, and the bias at which
# the ratio is 1, found by halving an interval.

# %%


def push_over_pull(cosines, b, s=10.0):
    """Of scores s · cosines + b (batches, B, B), pairs on the diagonal."""
    G, no = torch.sigmoid(s * cosines + b), 1 - torch.eye(cosines.shape[1], dtype=torch.float64)
    return ((G * no).sum() / (1 - G.diagonal(dim1=1, dim2=2)).sum()).item()


def balance(cosines):
    low, high = -20.0, 5.0
    for _ in range(25):
        middle = (low + high) / 2
        low, high = (low, middle) if push_over_pull(cosines, middle) > 1 else (middle, high)
    return middle


fig, ax = plt.subplots(figsize=(5, 2.8), constrained_layout=True)
widths, measured_bias = (16, 32, 64, 128, 768), {}
for B, colour in ((8, "C0"), (32, "C1"), (128, "C2")):
    for D in widths:
        g = torch.Generator().manual_seed(D)
        x, y = normalize(torch.randn(2, 1024 // B, B, D, generator=g, dtype=torch.float64), dim=-1)
        cosines = x @ y.mT  # (batches, B, B)
        measured_bias[B, D] = balance(cosines)
        if D in (32, 768):
            old = push_over_pull(cosines, -math.log(B - 1))
            told = f"{-math.log(B - 1):.2f}, with the new term {-math.log(B - 1) - 50 / D:.2f}"
            print(f"B = {B:>3}, D = {D:>3}: push over pull at −log(B − 1) {old:.2f}, predicted", end=" ")
            print(f"{math.exp(50 / D):.2f}; balance {measured_bias[B, D]:.2f}, −log(B − 1) = {told}")
    ax.semilogx(widths, [measured_bias[B, D] for D in widths], "o", color=colour, label=f"B = {B}, measured")
    ax.semilogx(widths, [-math.log(B - 1) - 50 / D for D in widths], color=colour)
    ax.axhline(-math.log(B - 1), color=colour, linestyle=":", linewidth=0.8)
ax.set(xlabel="width D", ylabel="bias at balance", xticks=widths, xticklabels=widths)
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()
for (B, D), b in measured_bias.items():
    old, new = -math.log(B - 1), -math.log(B - 1) - 50 / D
    assert abs(b - new) < abs(b - old) and new - 0.1 < b < old
    assert b - new < 0.25 if D >= 128 or (B, D) in ((128, 64), (128, 32)) else b < old - 0.2

# %% [markdown]
# What to see: dotted lines are $-\log(B - 1)$, full lines the prediction, points the measurement. With 768
# numbers the two lines agree. In narrow models the balance lies well below $-\log(B - 1)$, and the new term
# explains most of it. The larger the batch, the better the prediction: there $b$ is far below 0, as the
# formula assumes. For $B = 8$ and $D \le 32$ scores come near 0, the logistic function bends, and the formula
# overshoots.
#
# As training goes on, the cosines of pairs and of others part, and the best score of a pair of a picture $x$
# and a caption $y$ is known. If the pairs of a batch are drawn independently, the noise is $p(y)$. The loss
# takes $S$ itself for the log-odds, so its best scores are $\log r - \log(B - 1)$, with the $r$ of chapter
# 12, and a learned bias can take care of the second term. The race below draws otherwise: each noun at most
# once a batch. Then the noise comes from the captions that are not one's own. With $n$ equally frequent
# captions the caption $y$ is the own one with probability $p(y \mid x)$, and a given wrong one with
# probability $(1 - p(y \mid x))(B - 1)/(n - 1)$. So the best score is
#
# $$\log\frac{p(y \mid x)}{1 - p(y \mid x)} + \log\frac{n - 1}{B - 1}.$$
#
# A caption that is certainly the right one should then have a score without limit, where $\log r$ ends at
# $\log n$. Both are counted here, in chapter 12's world: 16 things, and a writer who names the wrong one in a
# tenth of all cases.

# %%
n, B, draws, rng = 16, 8, 20_000, np.random.default_rng(0)
for name in ("drawn independently", "each at most once"):
    if name == "each at most once":
        captions = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)[:, :B]  # (draws, B)
    else:
        captions = rng.integers(0, n, (draws, B))
    named_wrong = rng.random((draws, B)) < 0.1
    pictures = np.where(named_wrong, (captions + rng.integers(1, n, (draws, B))) % n, captions)
    right = (pictures == captions).sum()  # yeses in which caption and picture show the same thing
    all_same = (pictures[:, :, None] == captions[:, None]).sum()  # and all questions in which they do
    counted, r = np.log(right / (all_same - right)), 0.9 * n
    free, once = np.log(r / (B - 1)), np.log(0.9 / 0.1 * (n - 1) / (B - 1))
    print(f"{name:<20} log-odds counted {counted:.2f}; formulas: independent {free:.2f}, once {once:.2f}")
    assert abs(counted - (once if name == "each at most once" else free)) < 0.1

# %% [markdown]
# ## Two traps at the start: the sign, and B²
#
# The equation displayed in section 3.2 of the paper *subtracts* the bias; its algorithm 1 adds it, as its
# code does. And who sees $B^2$ questions is tempted to take their mean. Neither mistake is visible in a
# gradient check; both are in the first number printed. With all cosines 0 the loss must be $L(b)$, the law
# `zero_cosines_leave_the_bias`:

# %%
zero = torch.zeros(64, 8)
print(f"the law, B = 64: {start_loss(64, -10):.3f}")
for name, loss in (
    ("sigmoid_loss", sigmoid.sigmoid_loss),
    ("bias subtracted", bugs.bias_subtracted),
    ("mean over B²", bugs.mean_over_pairs),
):
    sizes, start = [], loss(zero, zero, 10.0, -10.0).item()
    for B in (8, 64, 512):
        x = normalize(torch.randn(B, 32, generator=torch.Generator().manual_seed(0))).requires_grad_()
        y = normalize(torch.randn(B, 32, generator=torch.Generator().manual_seed(1)))
        loss(x, y, 10.0, -10.0).backward()
        sizes.append(B * x.grad.norm(dim=1).mean().item())
    print(f"{name:<16} {start:>8.3f}   B × length of a row of dX, B = 8, 64, 512:", np.array(sizes))
    assert abs(start - start_loss(64, -10)) < 1e-3 if loss is sigmoid.sigmoid_loss else abs(start - 10) > 5
    if loss is sigmoid.sigmoid_loss:
        assert max(sizes) < 1.01 * min(sizes)

# %% [markdown]
# The right-hand numbers say what a picture feels. Divided by $B$, it is of one size in every batch, as with
# any mean over examples: one yes, and noes that cost little. With the bias subtracted the noes drown the yes,
# the more of them the worse. Divided by $B^2$, the yes of each picture fades as the batch grows, and the
# learning rate would have to make up for it.
#
# ## In pieces, and around a ring
#
# As no score needs another, a piece of $S$ can be made, added up and thrown away. Only one thing must be
# remembered: where the diagonal is. In a loop over pieces the wrong ones are easily given positives too.

# %%
rng = np.random.default_rng(0)
B, R = 12, 4
x, y = (v / np.sqrt((v * v).sum(1, keepdims=True)) for v in rng.standard_normal((2, B, 5)))
places = np.arange(B).reshape(R, B // R)  # which pairs each of R processes holds
total = 0.0
for rank in range(R):
    for turn in range(R):
        rows, columns = places[rank], places[(rank - turn) % R]
        block = 10 * x[rows] @ y[columns].T - 10  # (B/R, B/R)
        labels = 2 * (rows[:, None] == columns) - 1  # a yes only where the block meets the diagonal
        total += np.logaddexp(0, -labels * block).sum()
print(f"block by block {total / B:.6f}, at once {sigmoid.sigmoid_loss_np(x, y, 10, -10)[0]:.6f}")
tensors = torch.from_numpy(x), torch.from_numpy(y)
print(f"positives in every block of two: {bugs.positives_in_every_chunk(*tensors, 10.0, -10.0):.6f}")
assert np.isclose(total / B, sigmoid.sigmoid_loss_np(x, y, 10, -10)[0])

fig, ax = plt.subplots(figsize=(3.2, 2.7), constrained_layout=True)
turns = (np.arange(R)[:, None] - np.arange(R)) % R
image = ax.imshow(turns, cmap=plt.get_cmap("viridis", R), vmin=-0.5, vmax=R - 0.5)
ax.set(xlabel="texts that began at process", ylabel="pictures of process", xticks=range(R), yticks=range(R))
fig.colorbar(image, label="turn", ticks=range(R))
plt.show()

# %% [markdown]
# What to see: each process keeps its pictures, a row of blocks. In turn 0 it scores them against its own
# texts: the blocks with the diagonal. Then every process hands its texts to the next and receives those of
# the one before. After $R$ turns every block of $S$ has been made once, no process ever held more than one,
# of $(B/R)^2$ entries, and the sum of what they found is the loss (Zhai et al. 2023, section 3.3). The
# gradient of a text travels with it, collects a share at every stop and arrives home complete. InfoNCE cannot
# be done in one round like this: the normaliser of a row needs all its blocks before the first gradient. The
# library's `sigmoid_loss_ring` is this loop with `torch.distributed`; the law `blocks_add_up` is its
# arithmetic.
#
# ## InfoNCE or sigmoid? A race
#
# The paper finds the sigmoid loss better at small batches, the two alike at large ones (section 4). How about
# here? To race at batches of 8, both must be given hundreds of steps in a second, so the dual encoder is as
# small as can be: a picture of 16 × 16 pixels times one matrix, a table with one vector a noun, unit rows. It
# learns from five artists and is asked for the drawings of a sixth. All runs see the same number of pairs, so
# a batch 16 times larger means 16 times fewer steps. There is one learning rate, there are two seeds, and for
# the sigmoid loss four starts of the bias. The vectors have $D = 32$ numbers and the scale starts at 10, so
# the balance lies $100/64 = 1.56$ below $-\log(B - 1)$.

# %%
concepts = [c for c in emojivl.nouns() if set(emojivl.sheets) <= set(c.artists) and not c.near]
portraits, N, PAIRS, D = Portraits(emojivl, 16), len(concepts), 5120, 32
drawn = {a: portraits.plain([c.id for c in concepts], [a] * N).flatten(1) for a in emojivl.sheets}
seen, unseen = torch.stack([drawn[a] for a in TRAINING_ARTISTS]), drawn["fluent"]  # (5, N, 768), (N, 768)


def train(B, start, seed):
    """Share of unseen drawings and nouns that find each other; `start` is the bias, None for InfoNCE."""
    g = torch.Generator().manual_seed(seed)
    W = (torch.randn(seen.shape[2], D, generator=g) / seen.shape[2] ** 0.5).requires_grad_()
    nouns = (torch.randn(N, D, generator=g) / D**0.5).requires_grad_()
    log_scale = torch.tensor(math.log(1 / 0.07 if start is None else 10), requires_grad=True)
    bias = torch.tensor(float(start or 0), requires_grad=True)
    adam = torch.optim.Adam([W, nouns, log_scale, bias], lr=0.02, betas=(0.9, 0.95), fused=True)
    for step in range(PAIRS // B):
        i = torch.randperm(N, generator=g)[:B]  # each noun at most once: no false negatives
        artist = torch.randint(len(seen), (B,), generator=g)
        x, y = normalize(seen[artist, i] @ W), normalize(nouns[i])
        if start is None:
            loss = infonce.infonce(x, y, log_scale.exp())
        else:
            loss = sigmoid.sigmoid_loss(x, y, log_scale.exp(), bias)
        adam.param_groups[0]["lr"] = 0.02 * (1 - step * B / PAIRS)
        adam.zero_grad()
        loss.backward()
        adam.step()
    cosines = (normalize(unseen @ W) @ normalize(nouns).T).detach()
    return np.mean([(cosines.argmax(axis) == torch.arange(N)).float().mean() for axis in (0, 1)])


sizes = (8, 32, 128)
starts = {
    "InfoNCE": lambda B: None,
    "sigmoid, b = −10": lambda B: -10,
    "sigmoid, b = −log(B − 1) − s²/2D": lambda B: -math.log(B - 1) - 100 / (2 * D),
    "sigmoid, b = −log(B − 1)": lambda B: -math.log(B - 1),
    "sigmoid, b = 0": lambda B: 0,
}
found = {
    name: [[train(B, start(B), seed) for seed in (0, 1)] for B in sizes] for name, start in starts.items()
}

# %%
fig, ax = plt.subplots(figsize=(5.5, 3), constrained_layout=True)
print(f"{N} nouns, {PAIRS} pairs seen; found first, mean of two seeds (chance {1 / N:.1%}) at B = {sizes}")
for (name, values), colour in zip(found.items(), ("black", "C0", "C2", "C1", "C3"), strict=True):
    ax.plot(sizes, np.mean(values, 1), color=colour, label=name)
    ax.plot(sizes, values, ".", color=colour)
    print(f"{name:<34}", "  ".join(f"{v:.0%}" for v in np.mean(values, 1)))
ax.set_xscale("log")
ax.set(xlabel="B, pairs a batch", ylabel="found first", xticks=sizes, xticklabels=sizes, ylim=(0, 0.55))
ax.minorticks_off()
ax.legend(fontsize=7)
plt.show()
end = {name: np.mean(values, 1)[-1] for name, values in found.items()}  # at B = 128
no_term, with_term = end["sigmoid, b = −log(B − 1)"], end["sigmoid, b = −log(B − 1) − s²/2D"]
assert end["sigmoid, b = 0"] < 0.1 < no_term < with_term - 0.05
assert with_term > max(end["InfoNCE"], end["sigmoid, b = −10"]) - 0.08

# %% [markdown]
# What to see: what decides is the start of the bias. At 0 the noes rule, as computed above, and with larger
# batches the loss does not recover in the few steps it has. A start at $-\log(B - 1)$ looks balanced if one
# forgets the scatter of the cosines, and falls behind as the batch grows: at $D = 32$ its noes push several
# times as hard as its yeses pull. The start that was predicted for random vectors does not fall behind. It is
# at least level with $-10$ and with InfoNCE. Between these three the distances are of the size of the
# distance between seeds (dots), so this race has no winner among them and shows no crossing that two seeds
# could vouch for. These are linear towers, one learning rate and some seconds. Large batches get few steps
# here, which may be why all curves are lower at the right end.
#
# ## The rungs, and what they cost
#
# | rung | products of $2B^2D$ | arrays of $B^2$ |
# |---|---|---|
# | `sigmoid_loss_np` | 3 | a few: cosines, $S$, $z$, $G$ |
# | `sigmoid_loss` | 3 | autograd keeps three |
# | `sigmoid_loss_fused` (chapter 17) | 3: every tile is finished at once | none, two tiles |
# | `sigmoid_loss_ring`, $R$ processes | 3, shared | one block of $(B/R)^2$ on each |
#
# InfoNCE's fused rung needs a fourth product, as its normalisers come first. Forward and backward on one
# thread, and what autograd keeps in between:

# %% tags=["measured"]
from time import perf_counter

B, D = 1024, 64
rows = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0))
best = {}
print(f"B = {B}, D = {D}")
for name, f in (("torch", sigmoid.sigmoid_loss), ("fused", sigmoid.sigmoid_loss_fused)):
    times = []
    for _ in range(5):
        x, y = normalize(rows, dim=-1).requires_grad_()
        start, kept = perf_counter(), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.update({t.untyped_storage().data_ptr(): t.numel()}), t)[1], lambda t: t
        ):
            value = f(x, y, 10.0, -10.0)
        value.backward()
        times.append(perf_counter() - start)
    best[name] = min(times)
    held = sum(kept.values()) / B**2
    print(f"{name}: loss {value.item():.5f}, {1000 * best[name]:.0f} ms, {held:.2f} B² numbers kept")
print(f"torch / fused: {best['torch'] / best['fused']:.1f}")

# %% [markdown]
# ## What we left out
#
# * SigLIP's towers (`minivlp/models/dual.py` has them) and its recipe. `python -m minivlp train --model
#   siglip` trains a small one.
# * Weights for the many noes, and hard negatives: chapter 07 chooses them for another loss.
# * Learning rates tuned for each loss and batch size, larger batches, and more seeds: without them the race
#   above is an illustration.
# * Rings that pass shards both ways at once, which halve the waiting and not the traffic.
# * How the fused rung walks over tiles: chapter 17.
#
# ## Sources
#
# The loss, the bias and its start, the division by $B$, the ring and the comparison with softmax: Zhai et al.
# 2023 (SigLIP), algorithm 1 and sections 3.2, 3.3 and 4. NCE with a known number of noise samples: Gutmann
# and Hyvärinen 2012.
