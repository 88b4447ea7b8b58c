# %% [markdown]
# # 04 · Attention
#
# **The question.** A word of the caption has been hidden: "a [MASK] above a bear". The row that [MASK]
# looks up in the word table is the same in every caption (chapter 03). What was hidden can be seen, but in
# other rows of the sequence: in a few patches of the picture (chapter 02). How does one row learn what stands
# in another, when in the next picture the answer stands somewhere else?
#
# You need: chapters 01 to 03. Plan for four hours with the four exercises.

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

import inspect

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp.attention import attention, attention_fused, attention_np
from minivlp.build_vilt import multi_head_np
from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import hide_slots, swapped
from minivlp.evaluation.point import patches_inside
from minivlp.recipes.base import WEIGHTS, load_trained
from tests import check
from tests.laws import central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
trained = load_trained(WEIGHTS / "vilt_tiny.safetensors")  # the course's small ViLT, of chapter 08
model, tokenizer, patch = trained.model.requires_grad_(False), trained.tokenizer, trained.model.config.patch
emojivl = load_emojivl()
scenes = Scenes(emojivl, trained.nouns(emojivl), canvas=trained.canvas, pairs="held_out", seed=3)
items = [scenes[i] for i in range(100)]  # pairs of things that its training never showed together
scene = items[1]
text, _ = hide_slots(scene, [0], tokenizer)


def gridded(ax, title, size=9):
    """The picture with the edges of its patches."""
    ax.imshow(scene.image)
    edges = np.arange(patch, trained.canvas, patch) - 0.5
    ax.set(xticks=edges, xticklabels=[], yticks=edges, yticklabels=[])
    ax.tick_params(length=0)
    ax.grid(color="white", linewidth=0.6)
    ax.set_title(title, fontsize=size)


fig, ax = plt.subplots(figsize=(2.5, 2.7), constrained_layout=True)
gridded(ax, text)
plt.show()
tokens = [tokenizer.tokens[i] for i in tokenizer.batch([text])[0][0]]
print(f"tokens of the text: {tokens}\nand then the {(trained.canvas // patch) ** 2} patches, row by row")

# %% [markdown]
# What to see: two things, and only the words "above a bear" tell which of them was hidden. The number of a
# patch does not help to find it, since the hidden thing may lie anywhere. Its content does. So a token must
# compare itself with every other token, and take from those that fit: a matrix of scores again.
#
# ## A mean whose weights are computed
#
# Every token plays three parts, with three vectors. Its **query** says what it looks for, its **key** what it
# can be found by, its **value** what it hands over. Let $L_q$ be the number of tokens that ask, $L_k$ the
# number that answer, and $d$ the length of the vectors. The queries are the rows of $Q$ ($L_q \times d$), the
# keys those of $K$ ($L_k \times d$), the values those of $V$ ($L_k \times d$). Then
#
# $$S = s\, Q K^\top, \qquad P_{ij} = \frac{e^{S_{ij}}}{\sum_k e^{S_{ik}}}, \qquad O = P V,
#   \qquad s = \frac{1}{\sqrt d}.$$
#
# ![Q times K transposed gives S, a row softmax gives P, and P times V gives O. A forbidden key is minus
# infinity in S and zero in P.](pictures/qkv.svg)
#
# *What to see: the shapes. S and P have a row for each query and a column for each key; O has a row for each
# query again.*
#
# $S$ is the matrix of chapter 01 with $X = Q$, $Y = K$ and bias 0, and $P$ is its row softmax. New is the
# last step: the probabilities are not compared with a right answer, they are the weights of a mean. Row $i$
# of $O$ ($L_q \times d$) is what query $i$ receives. Three tokens, $d = 2$:

# %%
Q = np.array([[3.0, 0.0], [0.0, 3.0], [-1.0, 1.0]])  # (Lq, d)
K = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (Lk, d)
V = np.array([[1.0, 1.0], [5.0, 1.0], [3.0, 4.0]])  # (Lk, d)
scale = 1 / np.sqrt(2)


def softmax(S):
    P = np.exp(S - S.max(-1, keepdims=True))  # the largest exponent is 0: chapter 01
    return P / P.sum(-1, keepdims=True)


S = scale * Q @ K.T  # (Lq, Lk)
P = softmax(S)
O = P @ V  # (Lq, d)
print("S =\n", S, "\n\nP =\n", P, "\n\nO =\n", O)
assert np.allclose(P.sum(1), 1) and np.abs(O[0] - (V[0] + V[2]) / 2).max() < 0.2

# %% [markdown]
# Query 0 matches keys 0 and 2 equally well and key 1 badly: it receives about the mean of values 0 and 2.
# Weights are positive and sum to one, so each output lies inside the triangle that the three values span.
# Attention can only mix what is there, which is why chapter 05 puts an MLP behind it.
#
# ## Why the root of d
#
# If the entries of a query and a key are independent, with mean 0 and variance 1, their dot product is a sum
# of $d$ products with mean 0 and variance 1. So its variance is $d$, and the scores grow like $\sqrt d$. Here
# are a thousand queries with ten keys each. The last column is the mean of $p(1-p)$ over the largest weights
# $p$, which is the slope of that weight in its own score, as the gradient below will show.

# %%
rng = np.random.default_rng(0)
print("   d  divided by  std of a score  largest weight  its slope")
seen = {}
for d in (4, 64, 1024):
    raw = np.einsum("nd,nkd->nk", rng.standard_normal((1000, d)), rng.standard_normal((1000, 10, d)))
    for name, divisor in (("1", 1), ("√d", np.sqrt(d)), ("d", d)):
        p = softmax(raw / divisor).max(-1)
        std, slope = (raw / divisor).std(), (p * (1 - p)).mean()
        seen[d, name] = std, p.mean(), slope
        print(f"{d:>4}{name:>12}{std:>16.2f}{p.mean():>16.2f}{slope:>11.2f}")
assert seen[1024, "1"][1] > 0.9 and seen[1024, "1"][2] < 0.05  # one key takes all, and no slope is left
assert seen[1024, "d"][1] < 0.12  # ten keys, nearly alike
assert abs(seen[64, "√d"][1] - seen[1024, "√d"][1]) < 0.02

# %% [markdown]
# What to see: undivided, wide vectors give all weight to one key, with almost no slope left by which training
# could change that. Divided by $d$, all keys get the same. With the root, the width hardly matters.
#
# ## Masks
#
# The captions of a batch differ in length, and the short ones are filled up with [PAD] (chapter 03), which
# nobody may read. A forbidden score becomes $-\infty$ *before* the softmax, so that its weight is exactly 0
# and the others sum to one. (The course's masks are bool, True = may look.) A tempting mistake applies the
# mask after it: forbidden weights are 0, but the others were divided by a sum in which padding took part.

# %%
real = np.array([True, True, False])  # the third token is padding
before = softmax(np.where(real, S, -np.inf))
after = softmax(S) * real
alone = softmax(scale * Q @ K[:2].T) @ V[:2]  # the same sequence, never padded
for name, weights in (("before", before), ("after", after)):
    error = np.abs(weights @ V - alone).max()
    print(f"mask {name}: weights sum to {weights.sum(-1)}, farthest from the unpadded answer {error:.3f}")
    assert np.allclose(weights.sum(-1), 1) == (error < 1e-12) == (weights is before)

fig, ax = plt.subplots(figsize=(4.6, 3.1), constrained_layout=True)
ax.fill(*V.T, color="0.93")
for j, (x, y) in enumerate(V):
    ax.text(x + 0.1, y + 0.15, f"value {j}", fontsize=8)
ax.plot(*V.T, "k^", markersize=4)
ax.plot(*O.T, "o", color="0.6", label="outputs, all keys")
ax.plot(*(before @ V).T, "o", color="tab:blue", label="mask before softmax")
ax.plot(*(after @ V).T, "x", color="tab:red", label="mask after softmax")
ax.set(xlabel="first coordinate", ylabel="second coordinate", xlim=(-0.3, 6), ylim=(-0.3, 5))
ax.legend(fontsize=7, loc="upper left")
plt.show()

# %% [markdown]
# What to see: the grey outputs lie in the triangle, the blue ones on its lower edge, between the two values
# that may be read. The red ones have left the triangle towards zero: their weights do not sum to one. The law
# `equals_the_slow_loop` catches the mistake.
#
# Padded *queries* receive something too, which nobody reads. A query that may see no key has no mean (0/0),
# and the library refuses it. With `causal=True` query $i$ sees keys $0 … i$ only, for models that write a
# text from left to right; here words see later words too.
#
# ## The gradient by hand
#
# Let $\mathcal L$ be the loss, since $L$ counts tokens here, and $dO = \partial\mathcal L/\partial O$
# ($L_q \times d$) what the layers above send back. (The library calls it `grad`, the hints $G$. Chapter 01's
# $G$ is $dS$ here.) Walk back through the three steps.
#
# **The mean.** $O_{ic} = \sum_j P_{ij} V_{jc}$ for each coordinate $c$. Each factor receives $dO$ times the
# other, summed over the index that it does not have:
#
# $$dV_{jc} = \sum_i P_{ij}\, dO_{ic}, \qquad dP_{ij} = \sum_c dO_{ic}\, V_{jc}
#   \qquad\Longrightarrow\qquad dV = P^\top dO, \qquad dP = dO\, V^\top.$$
#
# **The softmax.** From $\log P_{ij} = S_{ij} - \log\sum_k e^{S_{ik}}$ follows
# $\partial \log P_{ij} / \partial S_{il} = \delta_{jl} - P_{il}$, where $\delta_{jl}$ is 1 for $j = l$ and 0
# otherwise. Times $P_{ij}$, this is the derivative of $P_{ij}$ itself. A score moves all weights of its row:
#
# $$dS_{il} = \sum_j dP_{ij}\, P_{ij}\,(\delta_{jl} - P_{il})
#   = P_{il}\Big(dP_{il} - \sum_j P_{ij}\, dP_{ij}\Big).$$
#
# The sum in the bracket needs no row of $dP$: it is
# $\sum_j P_{ij} \sum_c dO_{ic} V_{jc} = \sum_c dO_{ic}\, O_{ic}$, one product of two short rows. So
#
# $$dS = P \circ \big(dO\, V^\top - \operatorname{rowsum}(dO \circ O)\big),$$
#
# where $\circ$ multiplies entry by entry, and $\operatorname{rowsum}$ of a matrix is the column of its row
# sums, $L_q \times 1$, which is taken from every column of $dO\,V^\top$. $dS_{ij}$ is positive where the
# value of key $j$ points along $dO_i$ more than $O_i$ does, the mean of the values. Going downhill lowers
# such a score. Nothing flows at a forbidden key, where $P$ is 0. Rows of $dS$ sum to 0.
#
# **The scores** are chapter 01's: $dQ = s\, dS\, K$ and $dK = s\, dS^\top Q$.

# %%
dO = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])  # any upstream gradient will do
dV, dP = P.T @ dO, dO @ V.T
dS = P * (dP - (dO * O).sum(-1, keepdims=True))
dQ, dK = scale * dS @ K, scale * dS.T @ Q
assert np.abs(dS.sum(-1)).max() < 1e-12
print("dP =\n", dP, "\n\ndS =\n", dS, "\n\nrow sums of dS:", dS.sum(-1).round(9) + 0.0)
print("\ndQ =\n", dQ, "\n\ndK =\n", dK, "\n\ndV =\n", dV)

# %% [markdown]
# Never believe a gradient. Here are the slopes of $\sum_{ic} dO_{ic} O_{ic}$ (chapter 01 wrote them out; now
# the tests' `central_differences` takes them) and autograd through the PyTorch rung. Beside ours stands an
# easy mistake: softmax differentiated as if a score moved its own weight only, $dS = P \circ dP$.

# %%
q, k, v = (torch.tensor(z)[None, None].requires_grad_() for z in (Q, K, V))  # (1, 1, L, d)
attention(q, k, v).backward(torch.tensor(dO)[None, None])
slopes = central_differences(lambda Q: softmax(scale * Q @ K.T) @ V, (Q,), 0, grad=dO)
wrong = scale * (P * dP) @ K
print("dQ, first row:  ours", dQ[0], "  slopes", slopes[0], "  P ∘ dP", wrong[0])
pairs = ((dQ, q), (dK, k), (dV, v))
print("equal to autograd's:", [np.allclose(ours, one.grad[0, 0].numpy(), rtol=1e-9) for ours, one in pairs])
print("row sums of P ∘ dP, which should be zero:", (P * dP).sum(-1))
assert np.allclose(dQ, slopes, atol=1e-7) and dQ[0, 0] < 0 < wrong[0, 0] and np.abs(wrong - dQ).max() > 0.5

# %% [markdown]
# What to see: the wrong gradient has another size and even another sign, and rows of $dS$ that do not sum to
# zero. Outputs and $dV$ are right, so it is hard to notice. The law `gradients_are_the_slopes` finds it.
#
# **Exercise 1** · `attention_np` · difficulty 3 of 3 · 45 minutes. Open `chapters/exercises/attention.py`,
# replace `raise Todo`, and run the next cell. Arrays have two more axes there, (B, H, L, d), H for the heads
# below: `@` works on the last two, `swapaxes(-1, -2)` exchanges them. (`attention_fused` is chapter 17's.)

# %%
check("attention_np")

# %% [markdown]
# ## Four maps
#
# Where do queries, keys and values come from? All three are made from the same tokens. Let the rows of $Z$
# ($L \times D$) be the tokens of one sequence, words and patches together, and let $W_Q$, $W_K$, $W_V$ and
# $W_O$ be four learned matrices, $D \times D$ each, with biases $b_Q$, $b_K$, $b_V$ and $b_O$. A bias is
# added to every row. Then
#
# $$Q = Z W_Q^\top + b_Q, \qquad K = Z W_K^\top + b_K, \qquad V = Z W_V^\top + b_V, \qquad
#   \mathrm{out} = O\, W_O^\top + b_O,$$
#
# where $O$ is what attention makes of $Q$, $K$ and $V$. The first three maps say what a token looks for, what
# it can be found by and what it hands over. The fourth map says how what it received is written back into the
# $D$ numbers of a token. In code $W_Q$, $W_K$ and $W_V$ stand below one another in one matrix of $3D$ rows,
# so that one product makes all three.
#
# ## Heads
#
# One softmax gives one mean, and the mean of two patches does not say which of them was left of the other. So
# a token asks several questions at once. The $D$ columns of $Q$, $K$ and $V$ are cut into $H$ **heads** of
# $d = D/H$ columns each. Head $h$ attends by itself, with its own scores and its own softmax, and gives $O_h$
# ($L \times d$). The heads are put side by side again before the fourth map:
#
# $$S_h = \tfrac{1}{\sqrt d}\, Q_h K_h^\top, \qquad O_h = \mathrm{softmax}(S_h)\, V_h, \qquad
#   O = [\,O_1 \;\cdots\; O_H\,], \qquad \mathrm{MSA}(Z) = O\, W_O^\top + b_O .$$
#
# ![Z becomes Q, K and V by three maps; each head takes its columns, makes S, P and O of them; the heads are
# joined and pass the fourth map.](pictures/heads.svg)
#
# *What to see: the shapes. A head is a group of columns of Q, K and V. Only S and P are L × L, and there is
# one of each for every head.*
#
# Note the divisor: each head divides by the root of *its* width $d$, not of $D$. Here are three tokens of
# width $D = 4$, and two heads of width $d = 2$. The maps hold small whole numbers, so that every entry can be
# checked on paper.

# %%
Z = np.array([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 0.0, 0.0]])  # (L, D)
WQ = np.array([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # (D, D)
WK = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
WV = np.array([[1.0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]])
WO = np.array([[1.0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, -1, 0, 1]])
bQ, bK, bV, bO = np.eye(4)[[0, 0, 0, 3]] * [[0], [0], [0], [1]]
L, D, H = 3, 4, 2
d = D // H

Q, K, V = Z @ WQ.T + bQ, Z @ WK.T + bK, Z @ WV.T + bV  # (L, D) each
P, O = np.zeros((H, L, L)), np.zeros((L, D))
for h in range(H):
    columns = slice(h * d, (h + 1) * d)
    P[h] = softmax(Q[:, columns] @ K[:, columns].T / np.sqrt(d))  # (L, L)
    O[:, columns] = P[h] @ V[:, columns]  # (L, d)
out = O @ WO.T + bO  # (L, D)
print(
    "Q =\n", Q, "\n\nK =\n", K, "\n\nP of head 0 =\n", P[0], "\n\nP of head 1 =\n", P[1], "\n\nout =\n", out
)
assert P[0, 0].argmax() == 0 and P[1, 0].argmax() == 1  # token 0 looks at itself, and at token 1

# %% [markdown]
# What to see: the two heads give token 0 two different answers. Head 0 compares the first two numbers of the
# tokens and finds token 0 itself (and token 2, which is as close). Head 1 has its keys exchanged by $W_K$, so
# token 0 finds token 1. One head would have had to choose.
#
# In code there is no loop over heads. The columns (…, D) are viewed as (…, H, d), and the axes of tokens and
# heads change places, so that the arrays become (B, H, L, d) and one `@` serves all heads. A mask over keys
# (B, L) becomes `mask[:, None, None]`. A trap: viewed as (B, H, L, d) at once, the same numbers mix tokens.

# %%
split = Q.reshape(L, H, d).swapaxes(0, 1)  # (L, D) → (L, H, d) → (H, L, d)
mixed = Q.reshape(H, L, d)
print("head 0 of Q, as it should be:\n", split[0], "\n\nviewed at once:\n", mixed[0])
assert np.array_equal(split[0], Q[:, :d]) and not np.array_equal(mixed[0], Q[:, :d])
assert np.array_equal(split.swapaxes(0, 1).reshape(L, D), Q)  # joining is splitting, backwards

# %% [markdown]
# ## The gradient by three paths
#
# Let $G$ ($L \times D$) be the gradient at the output of the fourth map. That map is one linear layer for all
# tokens, so by chapter 01's rule each factor receives $G$ times the other:
#
# $$dO = G\, W_O, \qquad dW_O = G^\top O, \qquad db_O = \textstyle\sum_i G_i .$$
#
# The columns of $dO$ are cut into heads as those of $O$ were joined, and each head gives back $dQ_h$, $dK_h$
# and $dV_h$ by the formulas above. Joined, they are $dQ$, $dK$, $dV$ ($L \times D$ each). Now $Z$ was used
# three times, and it collects from all three:
#
# $$dZ = dQ\, W_Q + dK\, W_K + dV\, W_V, \qquad dW_Q = dQ^\top Z, \qquad dW_K = dK^\top Z, \qquad
#   dW_V = dV^\top Z .$$
#
# ![The gradient runs from the output back through the fourth map, splits at the heads, comes back to Z
# through queries, keys and values, and is added up there.](pictures/three_paths.svg)
#
# *What to see: three arrows arrive at Z. Through the values comes what a token handed over, through keys and
# queries how it was found and what it looked for.*

# %%
G = np.array([[1.0, 0, 0, 0], [0, 1, 0, -1], [0, 0, 2, 0]])  # any upstream gradient will do
dO, dQ, dK, dV = G @ WO, np.zeros((L, D)), np.zeros((L, D)), np.zeros((L, D))
for h in range(H):
    columns = slice(h * d, (h + 1) * d)
    dP = dO[:, columns] @ V[:, columns].T
    dS = P[h] * (dP - (dO[:, columns] * O[:, columns]).sum(-1, keepdims=True))
    dQ[:, columns] = dS @ K[:, columns] / np.sqrt(d)
    dK[:, columns] = dS.T @ Q[:, columns] / np.sqrt(d)
    dV[:, columns] = P[h].T @ dO[:, columns]
paths = {"queries": dQ @ WQ, "keys": dK @ WK, "values": dV @ WV}
dZ = sum(paths.values())

W, b = np.concatenate([WQ, WK, WV]), np.concatenate([bQ, bK, bV])  # (3 D, D), (3 D,)
theirs = multi_head_np(Z[None], W, b, WO, np.array(bO), H, grad=G[None])
slopes = central_differences(
    lambda Z: multi_head_np(Z[None], W, b, WO, np.array(bO), H)[0][0], (Z,), 0, grad=G
)
for name, path in paths.items():
    print(f"through the {name:<8} row 0 of Z receives {path[0]}")
print("together                          ", dZ[0])
assert (
    np.allclose(theirs[0][0], out) and np.allclose(theirs[1][0][0], dZ) and np.allclose(dZ, slopes, atol=1e-7)
)
assert np.allclose(theirs[1][1], np.concatenate([dQ, dK, dV], 1).T @ Z)
assert np.abs(paths["values"] - dZ).max() > 0.1  # the known mistake `values_alone`

# %% [markdown]
# What to see: no path is zero, and the sum of the three is what the library and the slopes say. A model that
# lets only the values through still trains, and learns nothing about where to look. The law
# `gradients_are_the_slopes` catches it, and its known mistake is called `values_alone`. This is the NumPy
# rung of the library, `multi_head_np`, from the split on:

# %%
print(inspect.getsource(multi_head_np).split("B, L, D = z.shape\n")[1])

# %% [markdown]
# **Exercise 2** · `multi_head_np` · difficulty 3 of 3 · 45 minutes. **Exercise 3** · `multi_head` ·
# difficulty 2 of 3 · 20 minutes, the same in PyTorch. Open `chapters/exercises/build_vilt.py`. In this file
# you write a whole ViLT, piece by piece, up to chapter 08, which trains it. What you have not written yet is
# the library's when a later piece asks for it.

# %%
check("multi_head_np", "multi_head")

# %% [markdown]
# ## Attention knows no order
#
# Let $\Pi$ be a permutation matrix, so that $\Pi Z$ has the rows of $Z$ in another order. Shuffle queries,
# keys and values alike. The scores become $s\,\Pi Q K^\top \Pi^\top = \Pi S\, \Pi^\top$, the same numbers in
# other places, and a row softmax does not care about places. So $P$ becomes $\Pi P\, \Pi^\top$, and since
# $\Pi^\top \Pi$ is the identity, the output becomes $\Pi P\, \Pi^\top\, \Pi V = \Pi\, O$.
#
# The outputs are shuffled as the inputs were, and otherwise the same: **permutation equivariance**. The rest
# of the model works on each token by itself (chapter 05), so to all of it a sequence is a *set*, in which
# "a panda above a bear" is "a bear above a panda". What tells them apart must be inside the tokens: a learned
# vector for its place, the **position**, is added to every word and every patch before the first block.
#
# Try it on the trained model, whose matching head (chapter 07) gives the probability that a caption is true.
# It reads the true captions of a hundred pictures, and the same with the two nouns exchanged; then again with
# the positions of all words set to zero.


# %%
def read(texts, items):
    """ids (B, L), real keys (B, L + 1 + N), what the first block is given (B, L + 1 + N, D), last states."""
    ids, _, mask = (torch.from_numpy(a) for a in tokenizer.batch(texts))
    given = []
    hook = model.encoder.register_forward_pre_hook(lambda _, call: given.append(call[0]))
    states = model.encode(ids, mask, scene_pixels(items))
    hook.remove()
    return ids, torch.cat([mask, states["image_mask"]], 1), given[0], states


places = model.text_position.weight.data.clone()
for name, factor in (("as trained", 1), ("without positions", 0)):
    model.text_position.weight.data = factor * places
    texts = [[s.caption for s in items], [swapped(s) for s in items]]
    true, false = (model.itm_logits(read(t, items)[3]["pooled"]).softmax(-1)[:, 1] for t in texts)
    right, apart = int((true > 0.5).sum() + (false < 0.5).sum()), (true - false).abs().max().item()
    print(f"{name}: right {right} times of 200; a caption and its exchange differ by at most {apart:.3f}")
    assert (right == 100 and apart < 1e-4) if factor == 0 else right > 150
model.text_position.weight.data = places

# %% [markdown]
# What to see: without positions a caption and its exchange get the same probability, as the proof demands, so
# the model is right about one of the two and wrong about the other. No training could change that.
#
# ## Where the trained model looks
#
# Now the answer to the question. Each block makes its queries, keys and values with one linear map, `qkv`,
# from which we compute the weights once more: those of [MASK] over the patches, the mean of the heads.


# %%
def read_by_masks(texts, items):
    """Of all that the [MASK]s read from the patches, the share of each: (B, blocks, H, N)."""
    ids, keys, z, _ = read(texts, items)
    L, shares = ids.shape[1], []  # L words come first, then the image's own [CLS], then the patches
    for block in model.encoder.blocks:
        q, k, _ = block.qkv(block.norm1(z)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
        S = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~keys[:, None, None], -torch.inf)
        P = S.softmax(-1)[:, :, :L, L + 1 :]  # (B, H, L, N): words look at patches
        taken = (P * (ids == tokenizer.mask_id)[:, None, :, None]).sum(2)  # (B, H, N)
        shares.append(taken / taken.sum(-1, keepdim=True))
        z = block(z, keys[:, None, None])
    return torch.stack(shares, 1).numpy()


side = trained.canvas // patch  # patches in a row
fig, axes = plt.subplots(2, 1 + model.config.layers, figsize=(8, 3.2), constrained_layout=True)
for which, row in enumerate(axes):
    text, _ = hide_slots(scene, [which], tokenizer)
    gridded(row[0], text, 7)
    share = read_by_masks([text], [scene])[0].mean(1).reshape(-1, side, side)  # (blocks, …)
    x1, y1, x2, y2 = scene.boxes[which] / patch - 0.5
    in_box = share.reshape(len(share), -1) @ patches_inside(scene, patch)[which]  # (blocks,)
    assert in_box[3] > 0.5
    for number, (ax, heat) in enumerate(zip(row[1:], share, strict=True), 1):
        image = ax.imshow(heat, vmin=0, vmax=0.5, cmap="magma")
        ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color="white", linestyle=":"))
        ax.set(xticks=[], yticks=[])
        ax.set_title(f"block {number}", fontsize=9)
fig.colorbar(image, ax=axes, shrink=0.8, label="share of the patch")
plt.show()

# %% [markdown]
# What to see: only the caption has changed, and in block 4 the bright patches have moved into the box of the
# other thing (dotted). In the second row blocks 2 and 3 look beside it. Block 1 cannot tell the two: but for
# its position, [MASK] has the same row in every caption, and "above a bear" is written in other words, which
# it reads in the same moment. One scene proves little, so here is the mean over a hundred:

# %%
texts = [hide_slots(s, [0], tokenizer)[0] for s in items]
inside = np.stack([patches_inside(s, patch) for s in items])  # (B, 2, N)
own, others = np.einsum("bthn,bxn->xth", read_by_masks(texts, items), inside / len(items))  # (blocks, H) each
print("patches in the hidden thing's box and in the other's, of all:", inside.mean((0, 2)))
for number, shares in enumerate(zip(own, others, strict=True), 1):
    print(f"block {number}, by heads: hidden thing's box", shares[0], "the other's", shares[1])
even = inside.mean()  # what even weights would give a box
assert np.abs(own[0] - others[0]).max() < 0.05  # block 1 does not know which
assert own[1].mean() > 2 * others[1].mean() and (own[3] > 4 * even).all()
assert [(own[n] > 4 * even).sum() for n in (1, 2)] == [2, 2]  # heads of three

# %% [markdown]
# What to see: even weights would give each box what the first line says. A block that knows which thing is
# hidden gives its box more than that, and more than the other's. Block 1 gives both boxes the same. In blocks
# 2 and 3 two heads of three give the hidden thing's box most of what [MASK] takes from the picture, and the
# third does not. In block 4 every head does.
#
# The weights say what a block mixes, not what the model concludes: a weight may carry a value that nothing
# reads. A mask tells more, since it intervenes. Forbid [MASK] to look at some of the patches, in all blocks,
# and see whether it still finds the word. A patch is closed if its centre lies in the box, or if the box
# touches it at all. Last, the touched patches are closed for every word of the caption, not for [MASK] alone.

# %%
from minivlp.regions import patches_touched

ids, keys, z, _ = read(texts, items)
answers = torch.tensor([i for s in items for i in hide_slots(s, [0], tokenizer)[1]])  # one id a [MASK]
L, hidden = ids.shape[1], ids == tokenizer.mask_id  # (B, L)
touched = np.stack(
    [patches_touched(s.boxes, patch, trained.canvas, trained.canvas) for s in items]
)  # (B, 2, N)
print(f"patches of a box: {inside.sum(-1).mean():.1f} by their centres, {touched.sum(-1).mean():.1f} touched")


def found(closed, words, image=False):
    """How many hidden words are found when these words (B, L) may not look at these patches (B, N).

    With `image` the other patches and the picture's [CLS] may not look at them either.
    """
    shut = torch.from_numpy(closed)
    others = image & torch.cat([torch.ones(len(shut), 1, dtype=torch.bool), ~shut], 1)  # (B, 1 + N)
    rows = torch.cat([words, others], 1)  # (B, query)
    allowed = keys[:, None].repeat(1, z.shape[1], 1)  # (B, query, key)
    allowed[:, :, L + 1 :] &= ~(rows[:, :, None] & shut[:, None])
    best = model.mlm_logits(model.encoder(z, allowed[:, None])[:, :L][hidden]).argmax(-1)
    return int((best == answers).sum())


nothing = found(inside[:, 0] & False, hidden)
other = found(touched[:, 1] & ~touched[:, 0], hidden)
centres, rim = found(inside[:, 0], hidden), found(touched[:, 0], hidden)
by_all_words = found(touched[:, 0], keys[:, :L])
by_all = found(touched[:, 0], keys[:, :L], image=True)
for name, count in (
    ("nothing", nothing),
    ("other's box, all it touches", other),
    ("own box, by the centres", centres),
    ("own box, all it touches", rim),
    ("the same, for all words", by_all_words),
    ("the same, for all tokens", by_all),
):
    print(f"closed: {name:<28} {count} of {len(answers)} found")
assert nothing > 85 and abs(nothing - other) <= 5 and rim + 10 < centres < nothing - 20
assert 5 < rim < 25 and abs(by_all_words - rim) <= 5 and by_all < rim

# %% [markdown]
# What to see: closing the other's box costs nothing, and closing the hidden thing's own box costs most of the
# answers. How many are left depends on what counts as the box. Objects are cut by the grid, and a patch whose
# centre lies outside may hold the rim of the object. With the rim open, some twenty answers more are found.
# They look straight at the object, and a test that closes only the centres would take them for a detour.
# About a tenth of the answers is left even when [MASK] may read no patch of the object. These are detours or
# guesses, and the last two lines tell which. Closing the patches for all words changes next to nothing, so
# the answers do not come through other words. Closing them for all tokens leaves little more than a guess
# among 31 nouns would find. So most of the rest comes through the other patches and the picture's own [CLS],
# which read the object and are read by [MASK].
#
# ## What it costs
#
# The four maps are four products with a $D \times D$ matrix,
# $4 L D^2$ multiplications for $L$ tokens. $S$ and $O$ cost $L^2 D$ each, together more than the maps once
# $L > 2D$. And $S$ has $H L^2$ numbers for each pair of the batch:

# %%
D, H = 768, 12  # ViLT-B/32's width and heads
print("   L    maps   S and O   (millions of multiplications)   S in 32 bits")
assert D > 2 * 240 and 2 * D < 3840  # S and O are the small part, and the large one
for L in (60, 240, 960, 3840):
    print(f"{L:>4}{4e-6 * L * D * D:>8.0f}{2e-6 * L * L * D:>10.0f}{4 * H * L * L / 2**20:>44.1f} MB")

# %% [markdown]
# What to see: at ViLT's 240 tokens $S$ and $O$ are the small part, for long texts and fine patches the large
# one, and four times the tokens need sixteen times the memory for $S$. The NumPy rung holds $S$, $P$ and
# $dS$; the PyTorch rung keeps $P$ for its backward pass; the fused rung, chapter 17's, walks over tiles of
# $S$ and keeps one number a query instead. Forward and backward, three heads of width 32, on one thread:

# %% tags=["measured"]
from functools import partial
from timeit import repeat

rungs = {"np": lambda *arrays: attention_np(*(a.detach().numpy() for a in arrays))}
rungs["torch"] = lambda *arrays: attention(*arrays).sum().backward()
rungs["fused"] = lambda *arrays: attention_fused(*arrays).sum().backward()
print("   L   rung       ms")
took = {}
for L in (128, 256, 512, 1024):
    arrays = [torch.randn(1, 3, L, 32).requires_grad_() for _ in range(3)]
    for name, rung in rungs.items():
        best = 1000 * min(repeat(partial(rung, *arrays), number=1, repeat=4))
        print(f"{L:>4} {name:>6} {best:>8.1f}")
        took[name, L] = best
assert all(took[name, 1024] > 8 * took[name, 128] for name in ("np", "torch"))

# %% [markdown]
# What to see: each doubling of $L$ costs the plain rungs about four times as much in the long run, and more
# where $S$ leaves the cache. The fused rung does more arithmetic; what it saves for sure is memory.
#
# **Exercise 4** · `attention` · difficulty 2 of 3 · 20 minutes. Open `chapters/exercises/attention.py` again.
# With it you can train the real model: `python -m chapters train --use attention`.

# %%
check("attention")

# %% [markdown]
# ## What we left out
#
# * What stands around attention: the block of chapter 05.
# * The running softmax that makes tiles possible, and `attention_fused`: chapter 17.
# * Queries of one sequence and keys of another, **cross-attention**: the same function; chapter 19 uses it.
# * Dropout on the weights, biases added to the scores, heads that share keys: no model here has them.
#
# ## Questions
#
# <details><summary>1. <i>Explain.</i> Why is the softmax taken over the keys of one query, and not over the
# queries of one key?</summary>Each query is to receive a mean of values, and the weights of a mean add up to
# 1. With the softmax over queries a token that nobody matches well would still have to be given away
# entirely, and a query that matches nothing would receive next to nothing.</details>
#
# <details><summary>2. <i>Predict, then run.</i> What changes in the output if every key gets the same vector
# added to it? Set bK to any four numbers in the cell of the two heads.</summary> Nothing. Each score of query
# i grows by the same number, q_i · c / √d, and the softmax of a row does not see a common shift. So the bias
# of the keys has no effect, and its gradient is zero.</details>
#
# <details><summary>3. <i>Derive.</i> How many weights has multi-head attention of width D with H
# heads?</summary>4 D² + 4 D. The number of heads does not matter: heads cut the same maps into more
# pieces.</details>
#
# <details><summary>4. <i>Explain.</i> Which of the four maps could be merged with another without changing
# what the layer can compute?</summary>In one head only the product W_Qᵀ W_K enters the scores and only W_O
# W_V the output. They stay apart because d is smaller than D: the product of two thin matrices has rank d and
# fewer numbers.</details>
#
# ## Sources
#
# Vaswani et al. 2017 (Attention is all you need), equation 1 for attention and its $\sqrt d$, section 3.2.2
# for heads, 3.5 for positions. The row sum of $dO \circ O$ in place of $dP \circ P$: Dao et al. 2022
# (FlashAttention), appendix B.2. Words and patches together: Kim, Son and Kim 2021 (ViLT), section 3.1.
