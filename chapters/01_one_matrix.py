# %% [markdown]
# # 01 · One matrix
#
# **The question.** Here are four pictures and four captions, shuffled. Which caption belongs to which
# picture?
#
# You solved it by comparing. For every picture you looked at every caption and asked how well the two fit:
# sixteen comparisons, an array of four rows and four columns. Most objectives of this course look at such an
# array, boil it down to one number, and send one array of the same size back. InfoNCE, the sigmoid loss,
# attention, optimal transport and masked words do. Matching (chapter 07) and boxes (chapter 19) have smaller
# arrays.
#
# You need: Python, NumPy arrays, and the chain rule. Plan for two hours with the three exercises.

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

from minivlp import chamfer, infonce, sigmoid
from minivlp.data import CPU_NOUNS, Scenes, load_emojivl
from tests import check

np.set_printoptions(precision=3, suppress=True)

# %%
emojivl = load_emojivl()
scenes = Scenes(emojivl, emojivl.nouns(CPU_NOUNS), canvas=48, seed=4)
items = [scenes[i] for i in range(4)]
shuffled = [2, 0, 3, 1]

fig, axes = plt.subplots(1, 4, figsize=(8, 2.3), constrained_layout=True)
for i, (ax, item) in enumerate(zip(axes, items, strict=True)):
    ax.imshow(item.image)
    ax.set(title=f"picture {i}", xticks=[], yticks=[])
plt.show()
for j, i in enumerate(shuffled):
    print(f"caption {j}: {items[i].caption}")

# %% [markdown]
# ## Comparing is a product
#
# A machine compares by turning both sides into vectors. Let $B$ be the number of pairs in a batch and $D$ the
# length of the vectors. Row $i$ of $X$ ($B \times D$) describes picture $i$, row $j$ of $Y$ ($B \times D$)
# caption $j$, and their **score** is a dot product, stretched by a number $s$, the *scale*, and shifted by a
# number $b$, the *bias*:
#
# $$S_{ij} = s \sum_{d} X_{id}\, Y_{jd} + b, \qquad\text{or}\qquad S = s\, X Y^\top + b.$$
#
# Where the vectors come from is the business of chapters 02 to 05. Here we cheat: $D$ is the number of nouns,
# $X$ marks the things that are in the picture, because whoever composed the scene wrote them down, and $Y$
# marks the nouns that occur in the caption. Then $XY^\top$ counts what the two have in common.

# %%
nouns = [c.noun for c in emojivl.nouns(CPU_NOUNS)]


def marks(text):
    """1 for every noun that occurs in the text."""
    words = f" {text} "
    return np.array([float(f" {noun} " in words or f" {noun}s " in words) for noun in nouns])


X = np.stack([marks(item.caption) for item in items])  # (4, D): what the composer wrote down
Y = np.stack([marks(items[i].caption) for i in shuffled])  # (4, D)
S = X @ Y.T
fig, ax = plt.subplots(figsize=(3.4, 2.8), constrained_layout=True)
image = ax.imshow(S, cmap="viridis")
ax.set(xlabel="caption j", ylabel="picture i", xticks=range(4), yticks=range(4), title="score S[i, j]")
fig.colorbar(image, ax=ax, label="nouns in common")
plt.show()
print("for each picture the caption with the largest score:", S.argmax(1), " truth:", np.argsort(shuffled))
assert (S.max(1, keepdims=True) == S).sum() == 4 == (S.max(0) == S).sum()  # one best in each row and column
assert (S.argmax(1) == np.argsort(shuffled)).all()

# %% [markdown]
# What to see: one bright cell in each row and each column. The largest score of each row answers the
# question. Training with such a matrix means changing $X$ and $Y$ until the right cells are the bright ones.
#
# ## Three by three, with numbers
#
# From here on pair $i$ stands at place $(i, i)$: row $i$ of $X$ and row $i$ of $Y$ belong together, so the
# right answers are the **diagonal**. Take $D = 2$, so that the vectors can be drawn, and $s = 2$, $b = 0$.

# %%
X = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
Y = np.array([[0.8, 0.6], [-0.6, 0.8], [1.0, 0.0]])
scale, bias = 2.0, 0.0
S = scale * X @ Y.T + bias
print("X Yᵀ =\n", X @ Y.T, "\n\nS =\n", S)
assert (S.argmax(1) != range(3)).all()  # no picture prefers its own caption

# %% [markdown]
# Row 0 says: picture 0 scores 1.6 with its own caption but 2.0 with caption 2. Picture 2 scores nothing at
# all with its own caption and prefers caption 1. A loss should complain about both, and it should say what to
# move.
#
# Take the simplest complaint as an example, the mean of the three row-wise cross-entropies. Each row is
# turned into probabilities by a **softmax**, and we pay for what the diagonal is missing:
#
# $$P_{ij} = \frac{e^{S_{ij}}}{\sum_k e^{S_{ik}}}, \qquad
#   L = \frac1B \sum_i \Big[\log\sum_k e^{S_{ik}} - S_{ii}\Big] = -\frac1B\sum_i \log P_{ii}.$$

# %%
P = np.exp(S) / np.exp(S).sum(1, keepdims=True)
loss = -np.log(P.diagonal()).mean()
print("P =\n", P, f"\n\nL = {loss:.4f}; guessing among three would cost log 3 = {np.log(3):.4f}")
assert loss > np.log(3)

# %% [markdown]
# ## What comes back: one matrix G
#
# Let $G_{ij} = \partial L / \partial S_{ij}$: by how much the loss rises when this one score rises a little.
# For the loss above, the derivative of $\log\sum_k e^{S_{ik}}$ in $S_{ij}$ is $e^{S_{ij}} / \sum_k e^{S_{ik}}
# = P_{ij}$, and $-S_{ii}$ adds $-1$ on the diagonal. The mean divides by $B$. With $I$ the identity matrix,
#
# $$G = \frac{P - I}{B}.$$
#
# Read it as a message: negative on the diagonal, "raise this score", positive elsewhere, "lower this one",
# and the most where the loss hurts the most. Each row sums to zero, because adding a constant to a row of $S$
# does not change its softmax.

# %%
G = (P - np.eye(3)) / 3
print("G =\n", G, "\n\nrow sums:", G.sum(1).round(9) + 0)
assert (G.diagonal() < 0).all() and (G[~np.eye(3, dtype=bool)] > 0).all() and np.abs(G.sum(1)).max() < 1e-12

# %% [markdown]
# $S$ was made from $X$, $Y$, $s$ and $b$, so the message has to travel on to them. This step is the same for
# every loss, and we do it once and for all. Ask how $L$ changes when the single number $X_{id}$ changes. It
# occurs in the scores of row $i$ only, in $S_{ij}$ with the factor $s\,Y_{jd}$:
#
# $$\frac{\partial L}{\partial X_{id}} = \sum_j \frac{\partial L}{\partial S_{ij}}
#   \frac{\partial S_{ij}}{\partial X_{id}} = \sum_j G_{ij}\; s\, Y_{jd}
#   \qquad\Longrightarrow\qquad dX = s\, G\, Y.$$
#
# In the same way $Y_{jd}$ occurs in column $j$ only, $s$ occurs in every score with the factor
# $(XY^\top)_{ij}$, and $b$ in every score with the factor 1:
#
# $$dY = s\, G^\top X, \qquad ds = \sum_{ij} G_{ij} (XY^\top)_{ij}, \qquad db = \sum_{ij} G_{ij}.$$
#
# A good way to remember it: *the gradient of a factor is $G$ times the other factors, summed over the indices
# that the factor does not have.*

# %%
dX, dY = scale * G @ Y, scale * G.T @ X
dscale, dbias = (G * (X @ Y.T)).sum(), G.sum()
print("dX =\n", dX, "\n\ndY =\n", dY, f"\n\ndscale = {dscale:.4f}, dbias = {dbias:.4f}")

fig, axes = plt.subplots(1, 2, figsize=(7, 3), sharex=True, sharey=True, constrained_layout=True)
for ax, rows, slope, name in ((axes[0], X, dX, "pictures"), (axes[1], Y, dY, "captions")):
    for i, (row, down) in enumerate(zip(rows, -slope, strict=True)):
        ax.annotate("", row, (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{i}"})
        ax.annotate(
            "", row + down / 2, row, arrowprops={"arrowstyle": "->", "color": f"C{i}", "linestyle": ":"}
        )
        ax.plot([], [], color=f"C{i}", label=f"{name[:-1]} {i}")
    ax.set(title=name, xlabel="first coordinate", xlim=(-0.9, 1.4), ylim=(-0.4, 1.25), aspect="equal")
    ax.legend(fontsize=7, loc="lower left")
axes[0].set_ylabel("second coordinate")
plt.show()

# %% [markdown]
# What to see: arrows from the origin are the vectors, and a dotted arrow is half of the step downhill,
# $-dX/2$ or $-dY/2$. Pair $i$ has one colour in both panels.
#
# Never believe a gradient that was not compared with something. Two comparisons, which the course makes
# everywhere: the **slope** itself, $(L(X_{id} + h) - L(X_{id} - h)) / 2h$ for a small $h$, and PyTorch's
# autograd, which has never seen our derivation.


# %%
def row_cross_entropy(X):
    S = scale * X @ Y.T + bias
    return (np.log(np.exp(S).sum(1)) - S.diagonal()).mean()


h, slopes = 1e-5, np.zeros_like(X)
for index in np.ndindex(X.shape):
    step = np.zeros_like(X)
    step[index] = h
    slopes[index] = (row_cross_entropy(X + step) - row_cross_entropy(X - step)) / (2 * h)

x, y = torch.tensor(X, requires_grad=True), torch.tensor(Y)
torch.nn.functional.cross_entropy(scale * x @ y.T, torch.arange(3)).backward()
print(f"dX is within 1e-8 of the slopes:   {np.abs(dX - slopes).max() < 1e-8}")
print(f"dX is within 1e-12 of autograd:    {np.abs(dX - x.grad.numpy()).max() < 1e-12}")
assert np.abs(dX - slopes).max() < 1e-8 and np.abs(dX - x.grad.numpy()).max() < 1e-12

# %% [markdown]
# Drawn as a graph, the whole chapter so far is one picture. It will serve every loss of the course:
#
# ![X, Y, the scale and the bias make the matrix S, which makes the loss. Backwards the loss gives G to S, and
# S gives G times the other factor to each of its four parents.](pictures/backward.svg)
#
# *What to see: grey arrows compute the loss, dashed red arrows bring the gradient back. A loss has to give G
# alone, and the four gradients on the left follow.*
#
# ## One matrix, many objectives
#
# Nothing above depended on the row-wise cross-entropy except the line $G = (P - I)/B$. Other objectives
# replace that line and keep the rest. Three of them on the same nine scores; you will derive each in its own
# chapter, so look only at the pictures for now:
#
# * **InfoNCE** (chapter 12) asks rows *and* columns: pictures choose captions and captions choose pictures.
# * **The sigmoid loss** (chapter 13) asks nine separate questions, "is this a pair?", each with yes or no.
# * **Chamfer alignment** (chapter 16) looks only at the largest score of each row and each column. It is a
#   similarity, to be raised, so we draw the gradient of its negative. There, rows are tokens of *one* pair.

# %%
T = torch.tensor(S, requires_grad=True)
B, eye = 3, torch.eye(3, dtype=torch.float64)
objectives = {
    "InfoNCE": (T.logsumexp(1) + T.logsumexp(0) - 2 * T.diagonal()).mean() / 2,
    "sigmoid loss": -torch.nn.functional.logsigmoid((2 * eye - 1) * T).sum() / B,
    "−Chamfer": -(T.max(1).values.mean() + T.max(0).values.mean()) / 2,
}
fig, axes = plt.subplots(1, 4, figsize=(9, 2.5), constrained_layout=True)
axes[0].imshow(S, cmap="viridis")
axes[0].set(title="S", xlabel="caption j", ylabel="picture i", xticks=range(3), yticks=range(3))
received = {}
for ax, (name, value) in zip(axes[1:], objectives.items(), strict=True):
    (g,) = torch.autograd.grad(value, T, retain_graph=True)
    received[name] = g
    image = ax.imshow(g, cmap="coolwarm", vmin=-0.35, vmax=0.35)
    ax.set(title=f"G of {name}", xlabel="caption j", xticks=range(3), yticks=[])
    print(f"{name:<13} L = {value.item():+.4f}   sum of G = {g.sum().item():+.4f}")
fig.colorbar(image, ax=axes, label="dL/dS: blue = raise, red = lower", shrink=0.9)
plt.show()
assert all((received[name].diagonal() < 0).all() for name in ("InfoNCE", "sigmoid loss"))
assert received["InfoNCE"].sum().abs() < 1e-12 < 0.1 < received["sigmoid loss"].sum()
assert (received["−Chamfer"] <= 0).all() and (received["−Chamfer"] < 0).sum() == 3

# %% [markdown]
# What to see: the first two raise the diagonal. InfoNCE spreads its red over a row and a column in proportion
# to the softmaxes, and its entries sum to zero. The sigmoid loss has a red of its own for every wrong pair,
# and its sum is not zero: the bias feels it. Chamfer knows no diagonal and has no red: it asks for more of
# what is already the best of its row or of its column, here three cells that are both.
#
# The library's functions take $X$ and $Y$, not $S$, and must give the same numbers (`chamfer_np` divides rows
# by their length, which is one here, and has no scale of its own):

# %%
theirs = infonce.infonce_np(X, Y, scale)[0], sigmoid.sigmoid_loss_np(X, Y, scale, bias)[0]
theirs = np.array([*theirs, -scale * chamfer.chamfer_np(X, Y)[0]])
assert np.allclose(theirs, [value.item() for value in objectives.values()])
print(f"infonce       {infonce.infonce_np(X, Y, scale)[0]:.4f}")
print(f"sigmoid_loss  {sigmoid.sigmoid_loss_np(X, Y, scale, bias)[0]:.4f}")
print(f"chamfer       {scale * chamfer.chamfer_np(X, Y)[0]:.4f}, times the scale")

# %% [markdown]
# ## A trap: exp overflows
#
# $\log\sum_k e^{S_k}$ is everywhere in this course. Written as it stands it fails: $e^{710}$ is more than the
# largest number of 64 bits, $e^{89}$ more than the largest of the 32 bits of training, and CLIP's scale,
# which may grow to 100, goes there even with vectors of length one. For every number $t$, pulling $e^t$ out
# of the sum changes nothing:
#
# $$\log\sum_k e^{S_k} = t + \log\sum_k e^{S_k - t}.$$
#
# With $t = \max_k S_k$ the largest exponent is 0. No term overflows, one of them is exactly 1, and what
# underflows to 0 was too small to matter.

# %%
for scores in (np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]) * 300):
    with np.errstate(over="ignore"):
        naive = np.log(np.exp(scores).sum())
    shifted = scores.max() + np.log(np.exp(scores - scores.max()).sum())
    print(f"{scores}: naive {naive:.4f}, shifted {shifted:.4f}")
assert np.isinf(naive) and shifted == 900

# %% [markdown]
# **Exercise 1** · `logsumexp_np` · difficulty 1 of 3 · 10 minutes. Open `chapters/exercises/sinkhorn.py`,
# replace `raise Todo`, save, and run the next cell.
#
# The cell holds your function to its **laws**: properties that every right answer has, tried on random
# inputs. Of a law that is broken it prints the smallest such input that it finds, what your function
# answered, a hint, and, if your answers are those of a mistake that is known, its name. In a terminal, in the
# folder of the project, `pytest tests/test_sinkhorn.py -k logsumexp_np-attempt` does the same and keeps the
# result for `python -m chapters list`. When you are stuck: `python -m chapters hint logsumexp_np`.

# %%
check("logsumexp_np")

# %% [markdown]
# The shifted form also shows what becomes of a softmax when the scale grows. $\frac1s\log\sum_k e^{s\,c_k}$
# lies between the maximum of the $c_k$ and the maximum plus $\frac1s\log n$, where $n$ is the number of
# terms. So Chamfer's maximum is the limit of InfoNCE's logsumexp at infinite scale, or, as one says, at
# temperature $1/s = 0$.

# %%
cosines = np.array([0.1, 0.5, 0.7])
s = np.geomspace(1, 1000, 40)
soft = [np.log(np.exp(a * (cosines - 0.7)).sum()) / a + 0.7 for a in s]
fig, ax = plt.subplots(figsize=(5, 2.6), constrained_layout=True)
ax.semilogx(s, soft, label="(1/s) log Σ exp(s c)")
ax.semilogx(s, 0.7 + np.log(3) / s, ":", label="max + (log n)/s")
ax.axhline(0.7, color="black", linewidth=0.8, label="max")
ax.set(xlabel="scale s (logarithmic)", ylabel="soft maximum", ylim=(0.6, 1.9))
ax.legend()
plt.show()
assert (np.diff(soft) <= 1e-12).all() and (soft <= 0.7 + np.log(3) / s).all() and soft[-1] < 0.701

# %% [markdown]
# What to see: the curve falls onto the maximum and stays below the dotted bound all the way.
#
# ## Directions, not lengths
#
# A dot product grows with the length of its vectors, so a model could raise every score by making vectors
# longer. Most objectives therefore compare **directions**: each row is divided by its length, $\hat u = u /
# \lVert u \rVert$, and the score is a cosine between $-1$ and $1$. The scale $s$ then carries what the length
# did. A row of zeros has no direction; the library divides by $\max(\lVert u \rVert, 10^{-5})$, so that it
# stays zero.
#
# The gradient must travel through this division too. Let $g = dL/d\hat u$ be what arrives at the unit row.
# Since $\lVert u\rVert = \sqrt{\sum_d u_d^2}$ has the derivative $u / \lVert u\rVert = \hat u$, the quotient
# rule gives
#
# $$\frac{\partial \hat u_c}{\partial u_d} = \frac{\delta_{cd} - \hat u_c \hat u_d}{\lVert u\rVert}
#   \qquad\Longrightarrow\qquad
#   dL/du = \frac{g - \hat u\, \langle \hat u, g\rangle}{\lVert u \rVert},$$
#
# where $\delta_{cd}$ is 1 for $c = d$ and 0 otherwise. In words: the part of $g$ that points along $\hat u$
# is lost, since moving $u$ outwards does not turn it, and a long vector turns slowly.

# %%
u, g = np.array([3.0, 4.0]), np.array([1.0, 0.0])
unit = u / np.sqrt(u @ u)
du = (g - unit * (unit @ g)) / np.sqrt(u @ u)
print("û =", unit, "  du =", du, f"  along û: {abs(du @ unit):.3f}")
assert abs(du @ unit) < 1e-12
fig, ax = plt.subplots(figsize=(3.6, 2.6), constrained_layout=True)
for vector, start, name, colour in (
    (unit, (0, 0), "û", "black"),
    (g, unit, "g, as it arrives", "tab:red"),
    (g - unit * (unit @ g), unit, "what is left of it", "tab:blue"),
):
    ax.annotate("", start + vector, start, arrowprops={"arrowstyle": "->", "color": colour})
    ax.plot([], [], color=colour, label=name)
ax.add_patch(plt.Circle((0, 0), 1, fill=False, linestyle=":"))
ax.set(
    xlim=(-0.2, 2.2), ylim=(-0.2, 1.4), xlabel="first coordinate", ylabel="second coordinate", aspect="equal"
)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: the blue arrow is tangent to the circle, because a unit vector can only turn.
#
# **Exercise 2** · `unit_np` · difficulty 1 · 5 minutes. **Exercise 3** · `unit_grad_np` · difficulty 2 · 20
# minutes. Both in `chapters/exercises/sinkhorn.py`. Mind the rows whose divisor is the constant $10^{-5}$: it
# does not change with $u$, so there the quotient rule has no second term.

# %%
check("unit_np", "unit_grad_np")

# %% [markdown]
# ## What one matrix costs
#
# $X$ and $Y$ hold $2BD$ numbers, $S$ holds $B^2$. CLIP trained with $B = 32{,}768$ pairs. In the 32-bit
# numbers of training:

# %%
D = 512
print(f"{'B':>7} {'X and Y':>10} {'S':>10}")
for B in (256, 4096, 32768):
    print(f"{B:>7} {2 * B * D * 4 / 2**20:>7.0f} MB {B * B * 4 / 2**20:>7.2f} MB")

# %% [markdown]
# And a plain implementation keeps $S$, its two softmaxes and $G$ at the same time. But look again at what we
# needed: the loss is a sum over rows, $dX = s\,GY$ is a sum over columns, and each entry of $G$ can be made
# from a score and two numbers, the normalisers of its row and its column. Nobody ever needs *all* of $S$ at
# once. Chapter 17 walks over it in **tiles** and throws each away. So the losses of this course climb up to
# three rungs: NumPy with the gradient by hand, plain PyTorch, and, where $S$ is the cost, *fused*: the same
# value without $S$. Here are the last two of InfoNCE at scale 14.3, where CLIP starts (chapter 12). The time
# is that of the machine that made this page, forward and backward on one thread.

# %% tags=["measured"]
from time import perf_counter

torch.set_num_threads(1)
B, D = 2048, 64
x, y = (
    torch.nn.functional.normalize(torch.randn(B, D, generator=torch.Generator().manual_seed(i)))
    for i in (0, 1)
)
print(f"B = {B}, D = {D}")
for name, loss in (("torch", infonce.infonce), ("fused", infonce.infonce_fused)):
    times = []
    for _ in range(3):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        start = perf_counter()
        value = loss(a, b, 14.3)
        value.backward()
        times.append(perf_counter() - start)
    print(f"{name}: loss {value.item():.5f}, {1000 * min(times):.0f} ms, the best of three")

# %% [markdown]
# ## Questions and small tasks
#
# Answers are folded. Think first, with pencil and paper where it says *derive*.
#
# <details><summary>1. <i>Explain.</i> Why is G enough to know all four gradients?</summary>The loss depends
# on X, Y, the scale and the bias only through S. By the chain rule each receives G times how S depends on it,
# and S is a product: the other factor.</details>
#
# <details><summary>2. <i>Derive.</i> The loss is the mean of squared scores off the diagonal, L = Σ_{i≠j}
# S_ij² / B². What is G, and what is dbias?</summary>G_ij = 2 S_ij / B² off the diagonal and 0 on it; dbias =
# Σ G. Nothing else changes: dX = s G Y as always.</details>
#
# <details><summary>3. <i>Derive.</i> Scores pass a temperature per row: S_ij = s_i x_i · y_j. What is
# ds?</summary>Each s_i is used in its row alone: ds_i = Σ_j G_ij x_i · y_j, the row sums of G ∘ X
# Yᵀ.</details>
#
# <details><summary>4. <i>Predict, then run.</i> All captions of a batch are equal. What is the row-wise
# cross-entropy of B pairs, whatever the model? Set all rows of Y to one vector in the cell of 3 × 3 and
# look.</summary>log B. All scores of a row are equal, so the softmax gives 1/B everywhere.</details>
#
# <details><summary>5. <i>Repair.</i> Somebody writes G = P − I and forgets the division by B. Training with
# AdamW hardly notices. Why, and who notices?</summary>AdamW divides the step by the usual size of the
# gradient, so a constant factor cancels. Plain gradient descent, clipping, and a sum with a second loss all
# notice. So does the law that compares with slopes.</details>
#
# ## What we left out
#
# * Where $X$ and $Y$ come from: patches (02), words (03), attention (04) and blocks of it (05).
# * Scores that are no dot product: a model that looks at picture and caption *together* gives one number a
#   pair and needs $B^2$ passes for the whole matrix. Chapter 07 shows how it lives with a few of them.
# * More than one right answer in a row: two pictures of the same dog are wrong answers to each other here.
# * The scale and bias are learned. Why one learns $\log s$ and not $s$ is told in chapter 12.
#
# ## Sources
#
# The row-and-column loss: Radford et al. 2021 (CLIP), figure 3. The sigmoid loss: Zhai et al. 2023 (SigLIP).
# Maxima over tokens: Yao et al. 2022 (FILIP); Lin et al. 2024 (VILA). The shift inside logsumexp is folklore;
# its error is analysed by Blanchard, Higham and Higham 2021. The running normaliser that makes tiles
# possible: Milakov and Gimelshein 2018.
