# %% [markdown]
# # 16 · Chamfer and deep alignment
#
# **The question.** A caption is a handful of words, a picture a grid of patches, and nobody says which word
# belongs to which patch. How well do the two sets of tokens match?
#
# Chapters 14 and 15 answered with a transport plan, in which every token has to find room. Here is a cheaper
# answer: every token chooses its best partner. It gives FILIP its loss, and VILA's authors looked into the
# layers of a model with it. It is easily misread, which is half of this chapter.
#
# You need: chapters 01, 12, 14 and 15, and 08 for the model. Plan for five hours with the six exercises.

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

from minivlp import chamfer, filip, infonce, sinkhorn
from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import swapped
from minivlp.ipot import alignment_masks
from minivlp.models.vilt import Vilt
from minivlp.recipes.base import WEIGHTS, load_trained
from tests import check
from tests.laws import central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %% [markdown]
# A small ViLT, trained in chapter 08's way, ships with the course. We ask it for the states of all tokens,
# layer by layer, and compare every word of a caption with each of the 6 × 6 patches by the cosine.

# %%
emojivl, trained = load_emojivl(), load_trained(WEIGHTS / "vilt_tiny.safetensors")
scenes = Scenes(emojivl, trained.nouns(emojivl), canvas=trained.canvas, pairs="held_out", seed=5)
items = [scenes[i] for i in range(240)]
pixels = scene_pixels(items)


def tokens_of(captions):
    ids, _, mask = map(torch.from_numpy, trained.tokenizer.batch(captions))
    return ids, mask, alignment_masks(mask)  # (B, L) each; words are not [CLS], [SEP] or padding


@torch.inference_mode()
def layers(model, ids, mask, pixels):
    """The states of words (B, L, D) and patches (B, N, D): embeddings, after each block, after the norm."""
    found, encoder = [], model.encoder
    hooks = [encoder.blocks[0].register_forward_pre_hook(lambda module, given: found.append(given[0]))]
    for part in (*encoder.blocks, encoder.norm):
        hooks.append(part.register_forward_hook(lambda module, given, made: found.append(made)))
    model.encode(ids, mask, pixels)
    for hook in hooks:
        hook.remove()
    L = ids.shape[1]
    return [(z[:, :L], z[:, L + 1 :]) for z in found]  # between them stands the picture's own [CLS]


ids, mask, words = tokens_of([item.caption for item in items])
own = layers(trained.model, ids, mask, pixels)
S = sinkhorn.cosine(own[3][0][2, words[2]], own[3][1][2]).numpy()  # after block 3: (words, patches)
names = [trained.tokenizer.tokens[i] for i in ids[2, words[2]]]
assert np.bincount(S.argmax(1)).max() == 1

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.4), constrained_layout=True, width_ratios=[1, 3.4])
left.imshow(items[2].image)
left.set_title(items[2].caption, fontsize=8)
left.set(xticks=range(0, 49, 8), yticks=range(0, 49, 8), xticklabels=[], yticklabels=[])
left.grid(linewidth=0.4)
image = right.imshow(S, aspect="auto", cmap="viridis")
right.plot(S.argmax(1), range(len(S)), "o", mfc="none", mec="red", label="best of its row")
right.plot(range(S.shape[1]), S.argmax(0), "w.", markersize=4, label="best of its column")
right.set(xlabel="patch, row by row from the upper left", yticks=range(len(S)), yticklabels=names)
right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncol=2, fontsize=7, facecolor="lightgrey")
fig.colorbar(image, ax=right, label="cosine")
plt.show()

# %% [markdown]
# What to see: a red ring in every row, the word's best patch, and a white dot in every column, the patch's
# best word. The answer is the mean cosine at both. Several words may choose one and the same patch; here each
# has its own.
#
# ## Three by three, with numbers
#
# Let $x_1, \dots, x_M$ be the tokens of one side and $y_1, \dots, y_N$ those of the other, with $D$ numbers
# each, and $S_{ij} = \langle \hat x_i, \hat y_j\rangle$ their cosines, $\hat x = x / \lVert x\rVert$. The
# **Chamfer similarity** is
#
# $$s = \tfrac12\Big( \underbrace{\tfrac1M \sum_i \max_j S_{ij}}_{\text{each } x \text{ chooses a } y}
#   + \underbrace{\tfrac1N \sum_j \max_i S_{ij}}_{\text{each } y \text{ chooses an } x} \Big).$$
#
# Three words and three patches in the plane, given by their angles in degrees:

# %%
word, patch = (np.deg2rad(angles) for angles in ([0, 50, 90], [10, 60, 170]))
X, Y = (np.stack([np.cos(a), np.sin(a)], 1) for a in (word, patch))  # (3, 2), unit rows
S = X @ Y.T
forward, backward = S.max(1).mean(), S.max(0).mean()
s = (forward + backward) / 2
print(S, f"\nbest of rows {S.max(1)}, mean {forward:.3f}; best of columns {S.max(0)}, mean {backward:.3f}")
print(f"s = {s:.4f}; chamfer_np says {chamfer.chamfer_np(X, Y)[0]:.4f}")
square = ((X[:, None] - Y[None]) ** 2).sum(-1)  # (3, 3)
print(f"distance {square.min(1).mean() + square.min(0).mean():.4f} = 4 (1 − s) = {4 * (1 - s):.4f}")
cost = (sinkhorn.sinkhorn_np(1 - S, eps=0.01, iters=2000) * (1 - S)).sum()
print(f"1 − S: words choose {1 - forward:.3f}, patches choose {1 - backward:.3f}, transport {cost:.3f}")
assert 1 - forward < cost - 0.1 and abs(1 - backward - cost) < 1e-3
assert np.isclose(square.min(1).mean() + square.min(0).mean(), 4 * (1 - s))

# %% [markdown]
# Every word has a good patch. The patch at 170° has no good word, and only the columns notice: with one
# direction alone, a side could leave most of itself unexplained at no cost.
#
# **A similarity, whatever it is called.** Larger is better, and $s = 1$ when each token has an exact partner.
# The name comes from the Chamfer *distance* of point clouds: smallest squared distances, averaged (by Fan et
# al. 2017 summed) on each side, then added. On unit rows $\lVert \hat x - \hat y\rVert^2 = 2 - 2 S$, so it is
# $4 (1 - s)$. Whoever *minimises* $s$ as a distance pushes pairs apart.
#
# **Half of a transport.** The last line links this chapter to chapter 14. A plan must use up both sides. Rows
# that choose freely are a plan which keeps only the row sums, and a minimum under fewer constraints is
# smaller or equal. So one minus each half is at most the cost of transport. Here the patches choose three
# different words, which makes a plan, and their half equals the cost. Two words choose the same patch, and
# their half is smaller.
#
# ## The gradient goes to the winner
#
# Let $j^*(i)$ be the column of the largest entry of row $i$. Move $S_{ij}$ a little: the maximum moves along
# when $j = j^*(i)$ and not at all otherwise. With $i^*(j)$ for the columns, and $[\cdot]$ 1 if true, else 0,
#
# $$G_{ij} = \frac{\partial s}{\partial S_{ij}} =
#   \tfrac12\Big(\frac{[\,j = j^*(i)\,]}{M} + \frac{[\,i = i^*(j)\,]}{N}\Big).$$
#
# At most $M + N$ entries are not zero: a token hears from its partner and from those who chose it. The rest
# is chapter 01: $d\hat X = G \hat Y$, $d\hat Y = G^\top \hat X$, then each row through its own normalisation,
# $dx = (d\hat x - \hat x \langle \hat x, d\hat x\rangle) / \lVert x\rVert$.

# %%
G = np.zeros((3, 3))
G[range(3), S.argmax(1)] += 0.5 / 3
G[S.argmax(0), range(3)] += 0.5 / 3
print("G =\n", G)
dX, dY = sinkhorn.unit_grad_np(X, np.ones((3, 1)), G @ Y), sinkhorn.unit_grad_np(Y, np.ones((3, 1)), G.T @ X)
slopes = central_differences(lambda *z: chamfer.chamfer_np(*z)[0], (X, Y), 0)
x, y = (torch.tensor(z, requires_grad=True) for z in (X, Y))
chamfer.chamfer(x, y).backward()
assert np.abs(dX - slopes).max() < 1e-8 and np.allclose(dX, x.grad) and np.allclose(dY, y.grad)
print(f"largest difference from the slopes {np.abs(dX - slopes).max():.0e}; equal to autograd:", end=" ")
print(np.allclose(dX, x.grad, atol=1e-12), np.allclose(dY, y.grad, atol=1e-12))

# %% [markdown]
# **Ties.** Where two columns share the maximum there is no derivative, and any mixture of the winners is a
# subgradient. The library gives all to the *first* winner, in every rung, so that rungs can be compared.
# `S.max(-1).values` does that, `S.amax(-1)` splits; the law `the_first_of_equal_partners_wins` tells.
#
# **Masks.** A padded token must neither choose nor be chosen: it leaves the means, and before a maximum its
# cosines become $-\infty$. Setting them, or its vector, to 0 is a plausible mistake, which shows only where
# all real cosines are negative. The law `padding_never_counts` goes there.

# %%
for name, best in (("max ", lambda S: S.max(-1).values), ("amax", lambda S: S.amax(-1))):
    row = torch.tensor([0.2, 0.9, 0.9], requires_grad=True)
    best(row).backward()
    print(f"gradient of {name} over [0.2, 0.9, 0.9]: {row.grad.tolist()}")
word, real = torch.tensor([[1.0, 0.0]]), torch.tensor([True, False])
pair = torch.tensor([[-0.6, 0.8], [0.0, 0.0]])
S = sinkhorn.cosine(word, pair)  # the second token is padding: a vector of zeros
wrong = (S.max(1).values.mean() + S[:, :1].max(0).values.mean()) / 2
print(f"padding at −∞: s = {chamfer.chamfer(word, pair, None, real):.2f}; padding at 0: s = {wrong:.2f}")
assert wrong > chamfer.chamfer(word, pair, None, real) + 0.2

# %% [markdown]
# **Exercise 1** · `chamfer_np` · difficulty 2 of 3 · 35 minutes. Open `chapters/exercises/chamfer.py`.
# **Exercise 2** · `chamfer` · difficulty 1 of 3 · 15 minutes. The same in PyTorch, in the same file.

# %%
check("chamfer_np", "chamfer")

# %% [markdown]
# ## How high is high?
#
# Unrelated sets do not score 0: whoever may choose among many finds something. Between random directions in
# $D$ dimensions a cosine has mean 0 and variance $1/D$, and the mean of the largest of $n$ of them is at most
# $\sqrt{2 \ln n / D}$.

# %%
rng, sizes = np.random.default_rng(0), [1, 2, 4, 8, 16, 32, 64, 128, 256]
fig, ax = plt.subplots(figsize=(5, 2.7), constrained_layout=True)
for D, colour in ((16, "tab:blue"), (96, "tab:orange")):
    x, y = (torch.from_numpy(rng.standard_normal((32, 256, D))) for _ in range(2))
    s = [chamfer.chamfer(x[:, :n], y[:, :n]).mean().item() for n in sizes]
    assert (np.diff(s) > 0).all() and (np.array(s[1:]) < np.sqrt(2 * np.log(sizes[1:]) / D)).all()
    ax.semilogx(sizes, s, ".-", color=colour, label=f"unrelated sets, D = {D}")
    ax.semilogx(sizes, np.sqrt(2 * np.log(sizes) / D), ":", color=colour, label=f"√(2 ln n / {D})")
ax.set(xlabel="n tokens on each side (logarithmic)", ylabel="Chamfer similarity s", ylim=(-0.1, 1))
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: $s$ of unrelated sets grows with the number of tokens and stays below the dotted bound. A value
# alone says little; read it beside wrong pairs of the *same sizes*, which `chamfer.mismatched` computes.
#
# Another trap is on record. Asked for the formula, an author of VILA posted a few lines (see Sources) which
# divide by `torch.norm(x, 1)`. Its second argument is the order $p$, not an axis: that is the sum of all
# absolute values, for $y$ too taken from $x$. With these lines, equal sets do not give 1:

# %%
x, z = (torch.randn(32, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
for name, y in (("unrelated", z), ("equal", x)):
    p = x / torch.norm(x, 1, keepdim=True)
    S = p @ (y / torch.norm(p, 1, keepdim=True)).T
    posted = (S.amax(1).mean() + S.amax(0).mean()) / 2
    print(f"{name} sets: rows over their lengths {chamfer.chamfer(x, y):.4f}, as posted {posted:.4f}")
assert torch.isclose(chamfer.chamfer(x, x), torch.tensor(1.0)) and posted < 0.1

# %% [markdown]
# ## FILIP: a contrastive loss made of maxima
#
# CLIP has one vector a side. FILIP keeps all tokens, which meet late, when both towers have run. For picture
# $a$ with $M$ patches and text $b$ with $N$ words the two halves are kept separate,
#
# $$I_{ab} = \tfrac1M \sum_m \max_n \cos(x_{am}, y_{bn}), \qquad
#   T_{ab} = \tfrac1N \sum_n \max_m \cos(x_{am}, y_{bn}),$$
#
# because they differ. (As in the paper, $I$ is for images and $T$ for texts; neither is the identity or a
# plan here.) Take three scenes of two objects whose captions name one of them, let the tokens of a picture be
# its objects and those of a caption its nouns, one coordinate a noun:

# %%
picks = Scenes(emojivl, trained.nouns(emojivl), kinds={"pick": 1}, seed=3)
some, nouns = [picks[i] for i in (20, 4, 3)], {c.id: c.noun for c in picks.nouns}
onehot = torch.eye(len(nouns))
objects = [[list(nouns).index(c) for c in item.objects] for item in some]  # the one that is named first
x, y = (torch.stack([onehot[o[:n]] for o in objects]) for n in (2, 1))  # (3, 2, D), (3, 1, D)
I, T = filip.late_interaction(x, y), filip.late_interaction(y, x).T  # (3, 3) each
for item in some:
    print(f"{item.caption:<28} also there: {nouns[item.objects[1]]}")
print("I, pictures ask =\n", I.numpy(), "\n\nT, captions ask =\n", T.numpy())
assert (T.diagonal() == 1).all() and (I.diagonal() == 0.5).all()

# %% [markdown]
# $T_{aa} = 1$: all that was said is shown. $I_{aa} = \frac12$: not all that is shown was said. Elsewhere a
# picture holds the object of another caption. Pictures choose captions by $I$ and captions choose pictures by
# $T$, with a scale and InfoNCE's two sums. The scale is called $\sigma$ here, since $s$ is the similarity; it
# is no logistic function, and the paper's temperature is $1/\sigma$:
#
# $$L = \frac1{2B}\sum_i \Big[\log\sum_j e^{\sigma I_{ij}} - \sigma I_{ii}
#   + \log\sum_j e^{\sigma T_{ji}} - \sigma T_{ii}\Big].$$
#
# Its gradient is that of chapter 12: $dI = \sigma (P_{\text{row}} - 1)/2B$ and $dT = \sigma (P_{\text{col}} -
# 1)/2B$, with the softmaxes of $\sigma I$ along rows and of $\sigma T$ along columns, 1 the identity, and
# $d\sigma = (\langle dI, I\rangle + \langle dT, T\rangle) / \sigma$. Each entry passes to its winners:
#
# $$\frac{\partial L}{\partial \cos(x_{am}, y_{bn})} = \frac{dI_{ab}}{M}\,[\,n \text{ wins for } m\,]
#   + \frac{dT_{ab}}{N}\,[\,m \text{ wins for } n\,].$$

# %%
rng, scale = np.random.default_rng(1), 5.0
x, y = rng.standard_normal((3, 4, 6)), rng.standard_normal((3, 2, 6))  # B = 3, M = 4, N = 2, D = 6
(p, p_length), (q, _) = sinkhorn.unit_np(x), sinkhorn.unit_np(y)
C = np.einsum("amd,bnd->abmn", p, q)  # (B, B, M, N)
I, I_wins = chamfer.mean_max_np(C, None, None)  # (B, B), and 1/M at the winners (B, B, M, N)
T, T_wins = chamfer.mean_max_np(C.swapaxes(2, 3), None, None)
P_row = np.exp(scale * I) / np.exp(scale * I).sum(1, keepdims=True)
P_col = np.exp(scale * T) / np.exp(scale * T).sum(0)
loss = -(np.log(P_row.diagonal()) + np.log(P_col.diagonal())).mean() / 2
dI, dT = scale * (P_row - np.eye(3)) / 6, scale * (P_col - np.eye(3)) / 6
G = dI[..., None, None] * I_wins + (dT[..., None, None] * T_wins).swapaxes(2, 3)
dX = sinkhorn.unit_grad_np(p, p_length, np.einsum("abmn,bnd->amd", G, q))
value, (dx, _, dscale) = filip.filip_np(x, y, scale)
tensors = [torch.tensor(t, requires_grad=True) for t in (x, y, scale)]
filip.filip(*tensors).backward()
print(f"L = {loss:.6f}, filip_np {value:.6f}; {(G != 0).mean():.0%} of the cosines have a gradient")
print("dx equal to filip_np and autograd:", np.allclose(dX, dx), np.allclose(dX, tensors[0].grad), end="; ")
print("dσ:", [np.allclose(((dI * I).sum() + (dT * T).sum()) / scale, d) for d in (dscale, tensors[2].grad)])

# %% [markdown]
# **Exercise 3** · `late_interaction_np` · difficulty 3 of 3 · 40 minutes. Open `chapters/exercises/filip.py`.
# **Exercise 4** · `late_interaction` · difficulty 2 of 3 · 20 minutes. **Exercise 5** · `filip_np` ·
# difficulty 3 of 3 · 30 minutes. **Exercise 6** · `filip` · difficulty 1 of 3 · 15 minutes. All in that file.

# %%
check("late_interaction_np", "late_interaction", "filip_np", "filip")

# %% [markdown]
# **What it costs.** Late interaction makes $B^2 M N$ cosines where CLIP has $B^2$ scores. For Chamfer, NumPy
# makes $S$ and $G$; PyTorch makes $S$, keeps the places of the maxima and makes a $G$ that is nearly all
# zeros; the fused rung keeps $M + N$ places and gathers (chapter 17). Forward and backward, best of five:

# %% tags=["measured"]
from timeit import repeat

x, y, z, w = (torch.randn(n, 64, requires_grad=True) for n in (64 * 36, 64 * 8, 2048, 2048))
calls = {
    "InfoNCE, 64 pairs": lambda: infonce.infonce(x[:64], y[:64], 10.0),
    "filip, the same with 36 × 8 tokens": lambda: filip.filip(x.view(64, 36, 64), y.view(64, 8, 64), 10.0),
    "chamfer, 2048 × 2048 tokens": lambda: chamfer.chamfer(z, w),
    "chamfer_fused, the same": lambda: chamfer.chamfer_fused(z, w),
}
for name, call in calls.items():
    times = repeat(lambda call=call: call().backward(), number=1, repeat=5)
    print(f"{name:<35} {1000 * min(times):>7.1f} ms")

# %% [markdown]
# ## VILA's question: are deep layers aligned?
#
# VILA's authors taught a language model to see, with its weights frozen or trained along. What learned best
# from examples in the prompt had a larger $s$ in deep layers: *deep embedding alignment*. What does the curve
# of our ViLT show? Words and patches share one sequence: **the words have seen the patches**. So "a wrong
# pair" can mean several things, which answer different questions:
#
# | curve | one pass of the model sees | what its gap to *true* asks |
# |---|---|---|
# | true | picture $i$ with its caption | |
# | other | picture $i$ with another's caption | does the *truth* of a caption raise $s$? |
# | swapped | picture $i$ with its own two nouns exchanged | the same, with the words kept |
# | crossed | as *true*; then words of pass $j$ with patches of pass $i$ | do tokens fit *their own* pass? |
#
# In *true*, *other* and *swapped* words and patches have passed the blocks together, so a gap between these
# is due to the truth of the caption. *Crossed* takes finished states of two true pairs that never met. Its
# gap has two causes: the tokens speak of different things, and tokens that pass the blocks together become
# alike whatever they speak of. An untrained ViLT shows how large the second cause is by itself. The other
# caption has equally many tokens and no object of the picture. No pair of nouns here occurred in training.
#
# Bars are 95 % intervals of a mean. Scenes with the same pair of nouns resemble each other, so they form a
# *cluster* that counts as one draw (Liang and Zeger 1986; `minivlp/evaluation/interval.py`). Let $d_i$ be the
# difference of scene $i$, $\bar d$ the mean of $n$ scenes, and let there be $K$ clusters $c$. The standard
# error of the mean is
#
# $$\frac1n \sqrt{\frac{K}{K - 1} \sum_c \Big(\sum_{i \in c} (d_i - \bar d)\Big)^2}.$$

# %%
objects, length, partner = [set(item.objects) for item in items], mask.sum(1).tolist(), []
for i in range(len(items)):
    later = [(i + k) % len(items) for k in range(1, len(items))]
    partner.append(next(j for j in later if length[j] == length[i] and not objects[j] & objects[i]))
cluster = np.unique([str(sorted(item.objects)) for item in items], return_inverse=True)[1]


def mean_and_reach(d):
    sums, K = np.bincount(cluster, d - d.mean()), cluster.max() + 1
    return d.mean(), 1.96 * np.sqrt(K / (K - 1) * (sums**2).sum()) / len(d)


def alignments(model):
    new, new_mask, new_words = tokens_of([swapped(item) for item in items])
    own, s = layers(model, ids, mask, pixels), {}
    for kind, states, real in (
        ("true", own, words),
        ("crossed", [(text[partner], patches) for text, patches in own], words[partner]),
        ("other", layers(model, ids[partner], mask[partner], pixels), words[partner]),
        ("swapped", layers(model, new, new_mask, pixels), new_words),
    ):
        s[kind] = np.stack([chamfer.chamfer(text, patches, real).numpy() for text, patches in states])
    return s  # of every scene at every depth: (depth, B)


torch.manual_seed(0)
found, untrained = alignments(trained.model), alignments(Vilt(trained.model.config).eval())
depths = ["embeddings", "block 1", "block 2", "block 3", "block 4", "norm"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2), constrained_layout=True)
lines = [(axes[0], kind, k, s) for k, (kind, s) in enumerate(found.items())]
for k, kind in enumerate(("crossed", "other"), 1):
    lines.append((axes[1], f"true − {kind}", k, untrained["true"] - untrained[kind]))
for ax, label, k, s in lines:
    mean, reach = np.transpose([mean_and_reach(row) for row in s])
    ax.errorbar(np.arange(6) + 0.05 * k, mean, reach, fmt=f"C{k}.-", capsize=2, label=label)
axes[0].set(xlabel="depth", ylabel="Chamfer similarity s", title="trained ViLT: the level", ylim=(-0.1, 1))
axes[1].set(xlabel="depth", ylabel="difference of s", title="untrained ViLT: the gaps")
for ax in axes:
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(6), depths, rotation=30)
    ax.legend(fontsize=8)
plt.show()
print(f"{'trained, gap':<14}", *(f"{depth:>14}" for depth in depths))
for kind in ("crossed", "other", "swapped"):
    gaps = [mean_and_reach(s) for s in found["true"] - found[kind]]
    print(f"true − {kind:<7}", *(f"{mean:>6.3f} ± {reach:.3f}" for mean, reach in gaps))
print("embeddings, other equals crossed:", np.array_equal(found["other"][0], found["crossed"][0]))
assert np.allclose(found["other"][0], found["crossed"][0])
level = {kind: s.mean(1) for kind, s in found.items()}  # (depth,) each
for kind in ("true", "other", "swapped"):
    assert level[kind][1] > level[kind][0] + 0.1  # risen steeply after block 1
for kind in ("other", "swapped"):
    gaps = [mean_and_reach(s) for s in found["true"] - found[kind]]
    assert all(reach < mean < 0.2 for mean, reach in gaps[2:])  # lower, and by little
assert all(level["crossed"][2:] < level["other"][2:] - 0.03)
gaps = {
    kind: [mean_and_reach(s) for s in untrained["true"] - untrained[kind]] for kind in ("crossed", "other")
}
assert (
    all(abs(mean) < 0.01 for mean, _ in gaps["other"]) and gaps["crossed"][4][0] > gaps["crossed"][4][1] > 0
)
assert gaps["crossed"][4][0] > gaps["crossed"][1][0]

# %% [markdown]
# What to see, and what it shows. At the embeddings no word has met a patch: *other* equals *crossed*.
#
# * **The level is not alignment.** After block 1 the curve of true pairs has risen steeply, and those of
#   wrong captions with it. Whoever plots true pairs alone could take that rise for deep alignment.
# * **Truth shows, and little.** From block 2 on *other* and *swapped* are clearly lower than *true*, by about
#   a tenth. In this model true captions do end with more aligned states than false ones.
# * **But it was told to.** Its training loss contained chapter 15's alignment term, which pulls words and
#   patches of true pairs together and pushes those of random pairs apart, at the states after the norm. A
#   gap there shows that this term was learned. It is no discovery.
# * **Having met counts more than being true.** Both halves of *crossed* come from true pairs, and from block
#   2 on it is lower than *other*, whose captions are false. So the height depends less on the truth of
#   the caption than on whether words and patches have passed the blocks together. This too was trained: with
#   words and patches apart, a noun had to find its picture by its states after block 2 (chapter 08), and
#   hence to carry what tells its picture from others.
# * **Mixing alone makes a gap.** The untrained model has no clear gap to *other*, but a small one to
#   *crossed* that grows with depth. So for a model that reads words and patches in one sequence, a wrong pair
#   should be passed through the model as a wrong pair, as *other* is, and not put together from finished
#   states.
#
# One model, one seed, icons on plain backgrounds. In VILA a language model reads the picture's tokens before
# the text: its words have seen the picture too, and the same questions can be asked of its curve.
#
# ## What we left out
#
# * Which word found which patch: chapter 15 asks whether a word's best patch, by the plan, lies in its box.
# * ColBERT's sum over tokens, by which long texts win; FILIP's choice of the tokens that machines exchange.
# * Subtracting the mean state of each side first. Try it: which of the statements above survive?
#
# ## Sources
#
# Fan, Su and Guibas 2017 (Chamfer distance). Yao et al. 2022 (FILIP), section 3.1. Khattab and Zaharia 2020
# (ColBERT). Lin et al. 2024 (VILA), section 3.1 and figure 3; the posted lines: issue 37 of NVlabs/VILA on
# GitHub. Kim, Son and Kim 2021 (ViLT), section 3.2. Liang and Zeger 1986 (variance under clusters).
