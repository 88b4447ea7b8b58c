# %% [markdown]
# # 07 · Matching pairs
#
# **The question.** Below stands a picture with two captions of the same words. One is true. What must a model
# be able to do to tell which?
#
# Matching is the second half of ViLT's pretraining: a picture and a caption go in together, one answer comes
# out, *pair* or *no pair*. The loss is the smallest of the course, two numbers wide. The art is in the wrong
# pairs: where they come from, how hard they are, and that they are really wrong.
#
# You need: chapters 01 and 06; of the transformer, that words and patches attend to one another. Plan for
# three and a half hours with the six exercises.

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
from torch.nn import functional as F

from minivlp.data import Scenes, load_emojivl
from minivlp.data.probes import false_captions, swapped
from minivlp.evaluation.rank import match_scores
from minivlp.evaluation.reading import encoded
from minivlp.hinge import hinge, hinge_np
from minivlp.infonce import infonce
from minivlp.itm import derangement, hard_negatives, itm_loss, itm_loss_np
from minivlp.recipes.base import WEIGHTS, load_trained
from tests import check
from tests.bugs.itm import in_place, masked_after_the_softmax, one_cycle, permutation, shift, two_sigmoids
from tests.laws import central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
emojivl = load_emojivl()
trained = load_trained(WEIGHTS / "vilt_tiny.safetensors")  # the small ViLT that comes with the course
nouns = [concept.noun for concept in trained.nouns(emojivl)]
source = Scenes(emojivl, trained.nouns(emojivl), canvas=trained.canvas, pairs="held_out", seed=6)
scenes = [source[i] for i in range(200)]  # of pairs of nouns that training never showed together
fig, ax = plt.subplots(figsize=(2, 2), constrained_layout=True)
ax.imshow(scenes[0].image)
ax.set(xticks=[], yticks=[], title="the picture")
plt.show()
print(f"A: {swapped(scenes[0])}\nB: {scenes[0].caption}")
assert sorted(swapped(scenes[0]).split()) == sorted(scenes[0].caption.split())

# %% [markdown]
# What to see: counting words does not help; A and B have the same. One has to find both objects, compare
# their places, and know which noun came first. The answer comes when the loss and its wrong pairs are there.
#
# ## Two logits
#
# For each of $B$ pairs the model gives two numbers, $z_{b0}$ for *no pair* and $z_{b1}$ for *pair*; the label
# $y_b$ is 1 for a true pair and 0 for a wrong one. The loss is the cross-entropy of two classes:
#
# $$L = \frac1B \sum_b \Big[\log\big(e^{z_{b0}} + e^{z_{b1}}\big) - z_{b y_b}\Big].$$
#
# Subtracting $z_{b y_b}$ inside the logarithm leaves only the difference $d_b = z_{b1} - z_{b0}$: a true pair
# costs $\log(1 + e^{-d_b})$, a wrong one $\log(1 + e^{d_b})$. This $d_b$ is the **log odds** of a match, and
# $\sigma(d) = 1/(1 + e^{-d})$ its probability. Three pairs:

# %%
z = np.array([[0.5, 2.0], [1.0, 0.0], [-1.0, 1.0]])  # (B, 2)
y = np.array([1, 0, 0])
d = z[:, 1] - z[:, 0]
cost = np.log1p(np.exp(np.where(y == 1, -d, d)))
print("log odds", d, "  probability of a match", 1 / (1 + np.exp(-d)), "\ncost    ", cost)
print(f"L = {cost.mean():.4f}; even odds for every pair would cost log 2 = {np.log(2):.4f}")
assert cost.argmax() == 2

# %% [markdown]
# The third pair is wrong and is taken for true: it costs the most. With $P$ the softmax of each row, chapter
# 01's two terms give, for $c \in \{0, 1\}$ and $[c = y]$ equal to 1 where the two agree and 0 elsewhere,
#
# $$\frac{\partial L}{\partial z_{bc}} = \frac{P_{bc} - [c = y_b]}{B}.$$
#
# The two entries of a row are opposite: what raises one logit lowers the other, and
# $\partial L / \partial d_b = (\sigma(d_b) - y_b)/B$. Compared with the slopes, with autograd, and with a
# wrong answer: a sigmoid for each of the two columns, which asks two questions where there is one.

# %%
P = np.exp(z) / np.exp(z).sum(1, keepdims=True)
dz = (P - np.eye(2)[y]) / 3
slopes = central_differences(lambda z: itm_loss_np(z, y)[0], (z,), 0)
t, label = torch.tensor(z, requires_grad=True), torch.tensor(y)
F.cross_entropy(t, label).backward()
apart = np.abs(dz - slopes).max(), np.abs(dz - t.grad.numpy()).max()
print("dz =\n", dz, f"\nslopes to 1e-8: {apart[0] < 1e-8}, autograd to 1e-12: {apart[1] < 1e-12}")
for name, loss in (("itm_loss", itm_loss), ("two sigmoids", two_sigmoids)):
    print(f"{name:<13}{loss(t, label):.4f}, with 5 more in both columns {loss(t + 5, label):.4f}")
    assert torch.isclose(loss(t, label), loss(t + 5, label)) == (loss is itm_loss)
assert apart[0] < 1e-8 and apart[1] < 1e-12 and np.allclose(dz.sum(1), 0)

# %% [markdown]
# What to see: adding 5 to both logits of a row changes no probability, and must not change the loss. The law
# of the slow loop (`equals_the_slow_loop`) finds two sigmoids.
#
# **Exercise 1** · `itm_loss_np` · difficulty 1 of 3 · 15 minutes. **Exercise 2** · `itm_loss` · difficulty 1
# of 3 · 5 minutes. Open `chapters/exercises/itm.py`, replace `raise Todo`, and run the next cell.

# %%
check("itm_loss_np", "itm_loss")

# %% [markdown]
# ## Wrong pairs: nobody keeps its own
#
# The cheapest wrong picture for a caption is that of another pair of the batch. If every caption gets another
# one's picture and every picture is used once, the assignment is a permutation without a fixed point, a
# **derangement**. A random permutation of $n$ leaves each place alone with probability $1/n$, so one place on
# average, whatever $n$: one true pair with the label *wrong* in every batch. Drawing again until nobody stays
# takes about $e$ draws, because the share of permutations without a fixed point is
#
# $$\sum_{k=0}^{n} \frac{(-1)^k}{k!} \;\to\; \frac1e \qquad (n \to \infty).$$
#
# The result is an index, and the pictures are gathered afresh: `wrong = images[index]`. A loop that
# overwrites them one after another, `images[i] = images[j]` with a random $j \ne i$, looks the same and is
# not: the source may have been overwritten before, and by a detour of two steps the own picture comes back.

# %%
rng = np.random.default_rng(3)
print(*(f"caption {i}: {scene.caption}" for i, scene in enumerate(scenes[:5])), sep="\n")
fig, axes = plt.subplots(2, 5, figsize=(6, 2.9), constrained_layout=True)
for line, function, name in zip(axes, (derangement, in_place), ("fresh gather", "in place"), strict=True):
    line[0].set_ylabel(name)
    for i, (ax, j) in enumerate(zip(line, function(5, np.random.default_rng(3)), strict=True)):
        ax.imshow(scenes[j].image)
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"caption {i}: {'its OWN' if i == j else f'picture {j}'}", fontsize=8)
plt.show()
print(f"{'own picture under label 0':<28}{'n = 4':>8}{'n = 8':>8}{'n = 64':>8}{'derangements of 4':>22}")
counts = {}
for function in (derangement, permutation, in_place, shift, one_cycle):
    own = [np.mean([(function(n, rng) == np.arange(n)).mean() for _ in range(8000 // n)]) for n in (4, 8, 64)]
    drawn = {tuple(function(4, rng)) for _ in range(500)}
    legal = sum(sorted(p) == [0, 1, 2, 3] and all(np.array(p) != np.arange(4)) for p in drawn)
    print(f"{function.__name__:<28}{own[0]:>8.3f}{own[1]:>8.3f}{own[2]:>8.3f}{f'{legal} of 9':>22}")
    counts[function.__name__] = np.array(own), legal
n = np.array([4, 8, 64])
assert all((counts[name][0] == 0).all() for name in ("derangement", "shift", "one_cycle"))
assert (np.abs(counts["permutation"][0] * n - 1) < 0.3).all()  # about one place on average
assert (np.abs(counts["in_place"][0] * n - 0.75) < 0.3).all()
assert [counts[name][1] for name in ("derangement", "shift", "one_cycle")] == [9, 3, 6]

# %% [markdown]
# What to see: in the lower row caption 4 was given back its own picture, which occurs three times there.
# Pictures 0 and 1 do not occur at all, and the first is always lost. The table counts. A permutation leaves
# one in $n$, the loop about three quarters of that. It has a third fault that no index shows: the hidden
# words of chapter 06 are asked for in front of the same array, and now see the wrong pictures. The last two
# lines draw no own picture, but few of the possible assignments: a shift knows three of nine, and a single
# cycle (Sattolo's shuffle) never exchanges two.
#
# **Exercise 3** · `derangement` · difficulty 1 of 3 · 10 minutes. Open `chapters/exercises/itm.py`.

# %%
check("derangement")

# %% [markdown]
# ![Four captions by four pictures. The right pairs lie on the diagonal, and in each row one wrong pair is
# marked as hard.](pictures/wrong_pairs.svg)
#
# *What to see: a derangement takes any cell beside the diagonal, one in each row and column. A hard negative
# is the cell of a row that the model likes best among the wrong ones.*
#
# ## Hard pairs
#
# A random picture is mostly refuted by a single object. To learn more, a model needs wrong pictures that are
# *nearly* right. If some cheap score $s_{ij}$ says how similar caption $i$ and picture $j$ are, draw with
#
# $$P(j \mid i) = \frac{e^{s_{ij}}}{\sum_{k \text{ legal}} e^{s_{ik}}}, \qquad
#   j \text{ legal: } j \ne i \text{ and another picture than that of } i.$$
#
# ALBEF and X-VLM take $s$ from the vectors of their contrastive half (chapters 12 and 19), scaled. The
# negative is drawn and not maximised, because the hardest of all is often a mislabelled pair, and would come
# back in every epoch. Here $s_{ij}$ is twice the number of nouns that caption $i$ and picture $j$ share.
# Captions 0 and 1 belong to one picture, so they carry one id.


# %%
def things(text):
    return {noun for noun in nouns if noun in text.split()}


some, ids = [scenes[i] for i in (0, 0, 9, 13, 1, 2)], np.array([0, 0, 2, 3, 4, 5])
for i, scene in enumerate(some):
    print(f"caption {i}: {scene.caption}")
S = np.array([[2.0 * len(things(a.caption) & things(b.caption)) for b in some] for a in some])  # (B, B)
P = np.exp(S) * (ids[:, None] != ids)
P /= P.sum(1, keepdims=True)
drawn = np.stack([hard_negatives(S, rng, ids) for _ in range(3000)])  # (draws, B)
share = np.stack([(drawn == j).mean(0) for j in range(6)], 1)
assert share.diagonal().max() == share[0, 1] == share[1, 0] == 0 and np.abs(share - P).max() < 0.05
fig, axes = plt.subplots(1, 3, figsize=(8, 2.5), constrained_layout=True)
for ax, (name, array) in zip(axes, {"S": S, "P(j | i)": P, "3000 draws": share}.items(), strict=True):
    image = ax.imshow(array, cmap="viridis", vmin=0)
    ax.set(title=name, xlabel="picture j", ylabel="caption i", xticks=range(6), yticks=range(6))
    fig.colorbar(image, ax=ax, shrink=0.8)
plt.show()

# %% [markdown]
# What to see: the diagonal of $S$ is bright, and it must not be drawn. Nor may captions 0 and 1 draw each
# other's column. The rest of a row is shared out by likeness, and the draws follow.
#
# The library draws without a softmax. Let $g_1, g_2, …$ be independent numbers with $P(g < x) = e^{-e^{-x}}$
# (Gumbel noise) and $Z = \sum_k e^{s_k}$. That $s_j + g_j$ lies at $x$ and all others below it has the
# density $e^{s_j - x} e^{-e^{s_j - x}} \prod_{k \ne j} e^{-e^{s_k - x}} = e^{s_j - x} e^{-Z e^{-x}}$, and
# over all $x$
#
# $$P\big(j = \arg\max_k (s_k + g_k)\big) = \int e^{s_j - x}\, e^{-Z e^{-x}}\, dx = \frac{e^{s_j}}{Z}.$$
#
# So: add noise, put $-\infty$ in the illegal columns, take the maximum. Nothing is exponentiated, so nothing
# underflows. Compare the order that many programs have: softmax first, a small constant against $0/0$, then
# the diagonal set to zero. At the scale of a trained model (here 100) all probabilities off the diagonal are
# far below the constant that was added, so the constant decides what is drawn.

# %%
cosines = np.array([[1.0, 0.6, 0.1, 0.0], [0.6, 1.0, 0.1, 0.0], [0.1, 0.0, 1.0, 0.6], [0.1, 0.0, 0.6, 1.0]])
for function in (hard_negatives, masked_after_the_softmax):
    first = np.array([function(100 * cosines, rng)[0] for _ in range(600)])
    print(
        f"{function.__name__:<26} shares of columns 0 to 3 in row 0:", np.bincount(first, minlength=4) / 600
    )
    column = np.bincount(first, minlength=4)[1] / 600
    assert column == 1 if function is hard_negatives else abs(column - 1 / 3) < 0.1

# %% [markdown]
# What to see: column 1 is ahead by $50$ in the exponent and should be drawn every time. With the constant all
# wrong columns are alike: hard negatives in name only. The law is `a_sharp_similarity_still_has_negatives`.
# One danger no law removes: ids know copies and not meanings. The nearer a wrong picture is, the more often
# the caption happens to be true of it as well.
#
# **Exercise 4** · `hard_negatives` · difficulty 2 of 3 · 25 minutes. Open `chapters/exercises/itm.py`.

# %%
check("hard_negatives")

# %% [markdown]
# ## Same words, other order
#
# Back to the question. Let a **bag of words** be any score that sees a caption only through a sum over its
# words, $s = f\big(\text{picture}, \sum_w e_w\big)$, whatever $f$ and the vectors $e_w$. A sum does not know
# the order of its terms, so A and B get the same score: no training changes that. Our bag is even told the
# names of what is in the picture, and accepts when both nouns are there. ViLT gets the pixels, and accepts at
# log odds above 0. Half of the captions are true. The false ones come from other pictures, or are the true
# ones with their nouns exchanged.


# %%
@torch.inference_mode()
def vilt(captions):
    """The log odds of caption i with picture i (B,)."""
    scores = np.zeros(len(captions))
    for some, _, states in encoded(trained.model, trained.tokenizer, captions, scenes, lambda passes: None):
        scores[some] = match_scores(trained.model, states)
    return scores


def bag(captions):
    """Above 0 when both nouns are in the picture (B,)."""
    pairs = zip(captions, scenes, strict=True)
    return np.array([len(things(caption) & things(scene.caption)) - 1.5 for caption, scene in pairs])


true = [scene.caption for scene in scenes]
false = {
    "from another picture": [scenes[j].caption for j in false_captions(scenes, np.random.default_rng(0))],
    "nouns exchanged": [swapped(scene) for scene in scenes],
}
print(f"{'false captions':<24}{'':<8}{'accuracy':>10}{'true one strictly ahead':>26}")
for name, captions in false.items():
    for score in (bag, vilt):
        good, bad = score(true), score(captions)
        accuracy = np.concatenate([good > 0, bad <= 0]).mean()
        print(f"{name:<24}{score.__name__:<8}{accuracy:>10.2f}{(good > bad).mean():>26.2f}")
        if name == "nouns exchanged":
            assert (accuracy, (good > bad).mean()) == (0.5, 0) if score is bag else accuracy > 0.85
        else:
            assert accuracy > 0.9
fig, ax = plt.subplots(figsize=(5.5, 2.5), constrained_layout=True)
ax.hist(good - bad, bins=30, label="ViLT")
ax.axvline(0, color="tab:red", label="bag of words, always")
ax.set(xlabel="score of the true caption − score of the exchanged one", ylabel="pictures", xlim=(-14, 14))
ax.legend(fontsize=7, loc="upper left")
plt.show()

# %% [markdown]
# What to see: on captions of other pictures the bag is hard to beat, so that measure says little about order.
# With the nouns exchanged the bag stands at exactly one half and never has the true caption strictly ahead.
# (A program that counts ties as hits would report a perfect score.) ViLT tells most of them, though it is
# small and these pairs of nouns are new to it. But exchanged captions were among its wrong pairs in training,
# and a difference that no wrong pair shows need not be learned. Models that compare one vector with one
# vector are not bags by construction, yet many behave much like them when they are tested so (ARO).
#
# ## What reading together costs
#
# The log odds are no product of two vectors. Every entry of the $B \times B$ matrix of chapter 01 takes a
# pass through the whole transformer, $B^2$ passes. A **dual encoder**, with one network for pictures and one
# for texts that each give a vector (chapter 12), has $2B$ passes and one product.

# %% tags=["measured"]
from timeit import repeat

x = torch.randn(1000, 96, generator=torch.Generator().manual_seed(0))
together = min(repeat(lambda: vilt(true), number=1, repeat=3)) / len(true)
apart = min(repeat(lambda: x @ x.T, number=1, repeat=3))
print(f"together: {1000 * together:.2f} ms a pair, {1e6 * together / 60:.0f} minutes for all of 1000 × 1000")
print(f"apart: one product of 1000 × 96 vectors, {1000 * apart:.1f} ms for as many scores")
assert 1e6 * together > 1000 * apart

# %% [markdown]
# What to see: minutes against milliseconds, and this is a small model. So matching gets few pairs: ViLT
# trains on one picture a caption, true or wrong; X-VLM on one true and two hard ones. For retrieval a cheap
# score chooses a shortlist and matching orders it. The loss costs nothing beside the pass: both rungs hold a
# few arrays of $B \times 2$, and there is no fused one.
#
# ## The hinge: hard negatives without drawing
#
# Where scores are a product, $S = X Y^\top$ with unit rows (pictures in $X$, captions in $Y$), all wrong
# pairs of the batch are there at no extra cost. A loss that uses them without a softmax is the **hinge**. A
# pair has to beat every wrong pair of its row and of its column by a **margin** $m > 0$, and pays for what is
# missing, with $(t)_+ = \max(0, t)$ and zeros on the diagonals:
#
# $$R_{ij} = (m + S_{ij} - S_{ii})_+, \qquad C_{ij} = (m + S_{ij} - S_{jj})_+ \qquad (i \ne j).$$
#
# Kiros et al. add up all of them. VSE++ keeps the largest of each row of $R$ and of each column of $C$:
#
# $$L_{\text{sum}} = \sum_{ij} R_{ij} + C_{ij}, \qquad
#   L_{\text{max}} = \sum_i \max_j R_{ij} + \sum_j \max_i C_{ij}.$$
#
# $(t)_+$ has the slope 1 for $t > 0$ and 0 for $t < 0$. So each cost that counts adds $+1$ to
# $G = \partial L/\partial S$ at its own place and $-1$ at the pair that it is compared with, $(i, i)$ for $R$
# and $(j, j)$ for $C$; then $dX = GY$ and $dY = G^\top X$ as in chapter 01, whose three pairs serve again.

# %%
X = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
Y = np.array([[0.8, 0.6], [-0.6, 0.8], [1.0, 0.0]])
S, margin, off = X @ Y.T, 0.2, 1 - np.eye(3)
R = np.maximum(margin + S - S.diagonal()[:, None], 0) * off
C = np.maximum(margin + S - S.diagonal(), 0) * off
G = np.zeros((3, 3))
for k in range(3):
    for i, j, cost in ((k, R[k].argmax(), R[k].max()), (C[:, k].argmax(), k, C[:, k].max())):
        if cost > 0:
            G[i, j] += 1
            G[k, k] -= 1
assert (S[0, 2] - S[0, 0]).round(9) == 0.2 and R[0, 2].round(9) == 0.4
print("S =\n", S, "\n\nR =\n", R, "\n\nC =\n", C, "\n\nG of the maxima =\n", G)
a, b = (torch.tensor(array, requires_grad=True) for array in (X, Y))
hinge(a, b, margin).backward()
for name, mine, grad, which in (("dX", G @ Y, a.grad, 0), ("dY", G.T @ X, b.grad, 1)):
    slopes = central_differences(lambda X, Y: hinge_np(X, Y, margin)[0], (X, Y), which)
    apart = np.abs(mine - slopes).max(), np.abs(mine - grad.numpy()).max()
    print(f"{name}: slopes to 1e-8: {apart[0] < 1e-8}, autograd to 1e-12: {apart[1] < 1e-12}")
print(f"L = {R.max(1).sum() + C.max(0).sum():.4f}, the library {hinge_np(X, Y, margin)[0]:.4f}")

# %% [markdown]
# Row 0: caption 2 beats the pair itself; the pair has to win 0.2 and the margin. A pair that leads by more
# than the margin everywhere would have only zeros. (At $t = 0$ and where two costs tie, the slope jumps.
# There the library takes 0, and the first.) Now eight pairs of random unit vectors, beside chapter 12's loss:

# %%
x, y = (F.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(k)), dim=1) for k in (0, 1))
S, eye = (x @ y.T).requires_grad_(), torch.eye(8)
losses = {
    "sum of hinges": hinge(S, eye, margin, hardest=False),  # S = S Iᵀ: scores given directly
    "hardest (VSE++)": hinge(S, eye, margin),
    "InfoNCE, scale 10": infonce(S, eye, 10.0),
}
fig, axes = plt.subplots(1, 3, figsize=(8, 2.6), constrained_layout=True)
for ax, (name, loss) in zip(axes, losses.items(), strict=True):
    (g,) = torch.autograd.grad(loss, S, retain_graph=True)
    pulled = g.diagonal() < 0
    assert pulled.all() if name.startswith("InfoNCE") else (~pulled).nonzero().flatten().tolist() == [3, 4]
    image = ax.imshow(g / g.abs().max(), cmap="coolwarm", vmin=-1, vmax=1)
    ax.set(title=name, xlabel="caption j", ylabel="picture i")
fig.colorbar(image, ax=axes, label="dL/dS, largest = 1")
plt.show()
for name, who in (("four pairs that fit", np.arange(4)), ("two of them the same", np.array([0, 1, 2, 2]))):
    print(f"{name:<22} cost {hinge_np(np.eye(4)[who], np.eye(4)[who])[0]:.1f}")
assert np.isclose(hinge_np(np.eye(4)[who], np.eye(4)[who])[0], 4 * 0.2)

# %% [markdown]
# What to see: blue lies on the diagonal in all three. The sum pushes every pair that violates the margin with
# the same force, so that many easy ones outweigh a hard one. The maximum pushes one a row and one a column.
# InfoNCE's force follows its softmaxes. Pairs 3 and 4 lead by the margin: the hinges no longer pull them, a
# softmax always does.
#
# The hardest negative is also the likeliest to be a mislabelled positive. If two pictures of a batch show the
# same, each costs the other the whole margin, however good the vectors are: the last line has four margins of
# 0.2. And with random weights the hardest of many negatives is hard by chance: training by maxima alone can
# collapse. The library's own run counts every hinge at first, and only then the hardest. Both rungs hold a
# few arrays like $S$, $B^2$ numbers each.
#
# **Exercise 5** · `hinge_np` · difficulty 2 of 3 · 35 minutes. **Exercise 6** · `hinge` · difficulty 1 of 3 ·
# 15 minutes. Open `chapters/exercises/hinge.py`. A pair is not its own negative: mind the diagonal.

# %%
check("hinge_np", "hinge")

# %% [markdown]
# ## Questions and small tasks
#
# Answers are folded. Think first, with pencil and paper where it says *derive*.
#
# <details><summary>1. <i>Explain.</i> Why must wrong pairs keep both pictures and captions of the
# batch?</summary>Otherwise a caption that is only ever in wrong pairs gives the answer away, and the picture
# need not be read.</details>
#
# <details><summary>2. <i>Derive.</i> Focal loss multiplies the cross-entropy of a pair by (1 − p)², with p
# the probability of the right answer. What is the slope in the logit difference d, for p = σ(d)?</summary>L =
# −(1 − p)² log p, dp/dd = p(1 − p), so dL/dd = 2p(1 − p)² log p − (1 − p)³. For p near 1 it vanishes faster
# than p − 1 does.</details>
#
# <details><summary>3. <i>Derive.</i> The two logits are replaced by one, with a sigmoid. What is G, and is it
# the same model?</summary>G = (σ(z) − y) / B. With z = z₁ − z₀ it is the same function; two logits have one
# number more than they need.</details>
#
# <details><summary>4. <i>Predict, then run.</i> Half of the batch is wrong pairs by `roll` of the captions by
# one. What may a model learn that it should not? Sort the batch by caption first and look at the
# pairs.</summary>If neighbours are alike, as in a sorted batch, the wrong pairs are hard in a way that
# depends on the order of the data. A derangement does not depend on it.</details>
#
# <details><summary>5. <i>Repair.</i> Training stops with NaN after hard negatives are switched on: a row's
# weights are all zero, because the other captions are all equal to its own. What is the
# repair?</summary>Leave the row out of matching, or refuse the batch with a sentence, as the library's
# `hard_negatives` does.</details>
#
# ## What we left out
#
# * The model around the two logits, its training, and pairs that it never saw, measured: chapter 08.
# * Where the cheap scores of hard negatives come from: chapters 12 and 13. Boxes and X-VLM: chapter 19.
# * Queues of past pictures: harder negatives, at the price of a slowly moving copy of the model (ALBEF).
#
# ## Sources
#
# Matching: Kim, Son and Kim 2021 (ViLT), section 3.2. Hard negatives: Li et al. 2021 (ALBEF), section 3.2;
# Zeng, Zhang and Li 2022 (X-VLM). The maximum that samples a softmax: Gumbel 1954. Exchanged words:
# Yuksekgonul et al. 2023 (ARO); Thrush et al. 2022 (Winoground). Hinges: Kiros, Salakhutdinov and Zemel 2014,
# eq. 8, for the sum; Faghri et al. 2018 (VSE++), eq. 6, for the maximum.
