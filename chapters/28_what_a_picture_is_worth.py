# %% [markdown]
# # 28 · What a picture is worth
#
# **The question.** CLIP finds a caption among others, CoCa writes it, MaskVLM fills its holes, and Chameleon
# draws its picture. Their losses are of four kinds. Yet all of them learn what a picture tells of its
# caption, and that has a unit. How many nats does a picture tell?
#
# In most data nobody knows. Here the captions are made by a grammar, so the answer is a number with as many
# digits as one likes. It is the ruler on which all families of this course are put side by side at the end.
#
# You need: chapters 12, 14, 21 and 22; 23 helps. Plan for three hours and a half with the twelve exercises.

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
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp.bayes import pmi
from minivlp.data import Scenes, scene_pixels
from minivlp.data.scenes import SCENE_SIZES
from minivlp.evaluation.chameleon import nats
from minivlp.evaluation.hidden import costs, mean_of
from minivlp.evaluation.match import Matcher, similarities
from minivlp.evaluation.nats import caption_nats, contrasted, drawn, masked_words, meanings, revealed
from minivlp.evaluation.reading import equal_lengths
from minivlp.information import entropies, infonce_bound, rate_distortion_np
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.recipes.coca import CocaWriter
from minivlp.sinkhorn import sinkhorn_np
from tests import check

torch.set_num_threads(1)
torch.set_grad_enabled(False)
BLUE, RED, GREEN, GREY, YELLOW = "#0072B2", "#D55E00", "#009E73", "#999999", "#E69F00"
coca = load_trained(None, "coca")  # shipped, as are the others below
recipe, tokenizer = recipe_of(coca), coca.tokenizer
sources = {
    name: Scenes(recipe.emojivl, recipe.nouns, canvas=48, pairs=pairs, seed=11)
    for name, pairs in (("training pairs", "train"), ("held-out pairs", "held_out"))
}


def entropy(keys):
    """The entropy in nats of what is drawn when all keys of a list are equally likely."""
    p = np.array(list(Counter(keys).values())) / len(keys)
    return float(-(p * np.log(p)).sum())


# %%
captions = list(meanings(sources["training pairs"]))  # every sentence of the grammar, all equally likely
parts = []
for caption in captions:
    words = caption.split()
    relation = " ".join(words[2:-2])
    parts.append((words[1], relation, words[-1]))
grown = [entropy([p[:k] for p in parts]) for k in (1, 2, 3)]
steps = np.diff([0.0, *grown])
fig, (picture, ax) = plt.subplots(1, 2, figsize=(9, 2), constrained_layout=True, width_ratios=(1, 3.4))
scene = sources["training pairs"][6]
picture.imshow(scene.image)
picture.set(xticks=[], yticks=[])
picture.set_title(scene.caption, fontsize=8)
left = 0.0
names = ("first noun", "relation", "second noun")
for step, text, colour in zip(steps, names, (BLUE, GREEN, YELLOW), strict=True):
    ax.barh([1], [step], left=left, color=colour)
    ax.text(left + step / 2, 1, f"{text}\n{step:.3f}", ha="center", va="center", fontsize=8, color="white")
    left += step
ax.barh([0], [math.log(2)], color=GREY)
ax.text(math.log(2) + 0.1, 0, "which noun is named first: 0.693", va="center", fontsize=8)
ax.set(yticks=[1, 0], yticklabels=["caption", "caption,\npicture known"], xlabel="nats")
plt.show()
print(f"{len(captions):,} captions; {grown[-1]:.3f} nats; an example: {captions[0]}")
assert math.isclose(grown[-1], math.log(len(captions)))

# %% [markdown]
# What to see: the nats of a caption, word by word. Without the picture all three parts are open. With it
# everything is known but which of the two nouns is named first: “a dog left of a guitar” and “a guitar right
# of a dog” are true of the same pictures.
#
# ## Entropy, and what another thing takes off it
#
# Let $p(x)$ be the probability of a symbol. One who knows $p$ pays $-\log p(x)$ for $x$, and on average the
# **entropy** $H(X) = -\sum_x p(x) \log p(x)$. With the natural logarithm the unit is the **nat**. A bit is
# $\ln 2 = 0.693$ nats. Of a table $p(x, y)$ there are five entropies to be had:
#
# * $H(X)$, $H(Y)$ and $H(X, Y)$, each of the table's rows, of its columns and of its cells;
# * the **conditional entropy** $H(Y \mid X) = H(X, Y) - H(X)$, what is still open of $Y$ when $X$ is known.
#
# The last line, read from right to left, is the **chain rule** of chapter 21. What knowing $X$ takes off $Y$
# is the **mutual information**
#
# $$ I(X; Y) = H(Y) - H(Y \mid X) = H(X) + H(Y) - H(X, Y), $$
#
# and the last form shows that $Y$ takes as much off $X$.

# %%
weather = np.array([[0.4, 0.1], [0.1, 0.2], [0.0, 0.2]])  # sun, cloud, rain × no coat, coat
of = entropies(weather)
print("  ".join(f"{name} {value:.3f}" for name, value in of.items()))
assert math.isclose(of["joint"], of["x"] + of["y_given_x"])
assert math.isclose(of["mutual"], of["y"] - of["y_given_x"])
assert math.isclose(of["mutual"], entropies(weather.T.copy())["mutual"])
forgets = np.array([[0.9, 0.1], [0.3, 0.7]])  # what is remembered of the coat, p(z | y)
later = entropies(weather @ forgets)["mutual"]
print(f"the coat tells {of['mutual']:.3f} nats of the weather, the memory of it {later:.3f}")
assert later < of["mutual"]

# %% [markdown]
# The last line is an example of the **data processing inequality**. If $Z$ is made from $Y$ alone, then $I(X;
# Z) \le I(X; Y)$: no processing adds information about $X$. Features of a picture tell at most what the
# picture tells, whatever network makes them. The proof is the chain rule used twice: $I(X; Y, Z)$ is $I(X; Y)
# + I(X; Z \mid Y)$, whose second part is 0, and it is also $I(X; Z) + I(X; Y \mid Z)$.
#
# **Exercise 1** · `entropies` · difficulty 1 of 3 · 15 minutes. Open `chapters/exercises/information.py`.

# %%
check("entropies")

# %% [markdown]
# ## The grammar is a table
#
# A caption of EmojiVL is one of $2 \cdot 4 \cdot n$, where $n$ pairs of nouns are possible. All are equally
# likely. Two captions each are true of the same pictures. That is a joint table of captions and of what
# pictures show, with one entry above 0 in each row and two in each column. `entropies` reads it.

# %%
exact = {}
for name, source in sources.items():
    exact[name] = e = caption_nats(source, tokenizer)
    n = source.pairs_of_nouns
    print(
        f"{name}: {n} pairs, H(caption) {e['caption']:.3f}, H(caption | picture) {e['given_picture']:.3f}, "
        f"I = {e['information']:.3f} nats = {e['information'] / math.log(2):.1f} bits"
    )
    assert math.isclose(e["caption"], math.log(8 * n)) and math.isclose(e["given_picture"], math.log(2))

# %% [markdown]
# These are the rulers: 7.475 nats where pairs of training are asked about, 5.394 where held-out pairs are.
# The second is smaller because there are fewer pairs to tell apart, not because they are harder. One
# assumption is in it: that each drawing can be recognised. Where one cannot, less is told, so both numbers
# are upper limits in any case.
#
# **Exercise 2** · predict before you run · 10 minutes. Change the grammar so that a caption always names the
# left or the upper object first. What are $H(\text{caption})$, $H(\text{caption} \mid \text{picture})$ and
# $I$ for the 441 pairs?
#
# <details><summary>Answer</summary>
#
# Two relations are left, “left of” and “above”, and the order of the nouns now matters: $441 \cdot 2 \cdot 2$
# captions, 7.475 nats. Nothing is open given the picture. So $I$ is 7.475 as before: a free choice of words
# adds to $H(\text{caption})$ and to $H(\text{caption} \mid \text{picture})$ alike.
# </details>
#
# ## A trap: counting
#
# The table was known. Take instead a sample of $N$ pairs, count, and put the shares into the formula. This is
# the **plug-in** estimate. Here it is for two dice that have nothing to do with each other.

# %%
rng = np.random.default_rng(0)
sizes_of_samples = [30, 100, 300, 1000, 3000, 10000]
plugged = []
for N in sizes_of_samples:
    found = []
    for _ in range(40):
        counts = np.zeros((6, 6))
        np.add.at(counts, (rng.integers(6, size=N), rng.integers(6, size=N)), 1)
        found.append(entropies(counts / N)["mutual"])
    plugged.append(np.mean(found))
print("N      plug-in I    (6 − 1)(6 − 1) / 2N")
for N, value in zip(sizes_of_samples, plugged, strict=True):
    print(f"{N:<6} {value:9.4f} {25 / (2 * N):14.4f}")
assert all(value > 0.6 * 25 / (2 * N) for N, value in zip(sizes_of_samples, plugged, strict=True))
assert math.isclose(plugged[-1], 25 / 20000, rel_tol=0.2)

# %% [markdown]
# What to see: the true answer is 0, and samples find more, the smaller the more. Counts are uneven by chance,
# and unevenness is taken for information. With $M$ rows and $K$ columns the excess is about $(M - 1)(K - 1) /
# 2N$. A table of 3,528 captions and 1,764 pictures would need tens of millions of pairs to be counted to a
# tenth of a nat. That is why models are used: they do not count, and on average their errors make them look
# worse, never better.
#
# **Exercise 3** · derive · 20 minutes. Show that the plug-in entropy of one variable is too small on average.
# Which inequality is it, and why is the plug-in $I$ then too *large* here?
#
# <details><summary>Answer</summary>
#
# $H$ is a concave function of $p$, and the shares are right on average, so by Jensen's inequality the mean of
# $H(\text{shares})$ is below $H(p)$. To second order the loss is $(\text{cells} - 1) / 2N$. $I$ is $H(X) +
# H(Y) - H(X, Y)$, and the joint table has the most cells: its entropy is too small by most. $(36 - 1) - 2 (6
# - 1) = 25$.
# </details>
#
# ## Comparing: never more than ln B
#
# InfoNCE (chapter 12) finds the partner of $x$ among $B$. Its loss $L$ bounds information from below,
#
# $$ I(X; Y) \ge \log B - \mathbb E[L], $$
#
# for every score. The best score is $\log p(x, y) / p(x) p(y)$ up to a constant a row (chapter 12). Since $L
# \ge 0$, the bound never exceeds $\log B$. On a table that is known, the best score is known too, and the
# bound can be watched as it rises.


# %%
def best_loss(joint, B, draws, rng):
    """The InfoNCE loss of the best score for pairs of a table, among B − 1 others drawn from it."""
    ratio = joint / joint.sum(1, keepdims=True) / joint.sum(0)  # e to the best score
    rivals = rng.multinomial(B - 1, joint.sum(0) / joint.sum(), draws)  # how often each y is drawn
    x, y = joint.nonzero()
    rest = (rivals @ ratio.T)[:, x]  # (draws, pairs)
    return (joint[x, y] * np.log1p(rest / ratio[x, y])).sum(1).mean()


noisy = np.full((6, 6), 0.3) + np.eye(6) * 2
noisy /= noisy.sum()
world = np.kron(np.eye(220), np.full((2, 1), 1 / 440))  # held-out pairs: 440 captions × 220 pictures
tables = {"a noisy table": noisy, "held-out captions": world}
batches = [2, 4, 8, 16, 32, 64, 128, 256, 512]
fig, axes = plt.subplots(1, 2, figsize=(8, 2.7), constrained_layout=True)
for ax, (name, joint) in zip(axes, tables.items(), strict=True):
    true = entropies(joint)["mutual"]
    bounds = [infonce_bound(best_loss(joint, B, 2000, rng), B) for B in batches]
    ax.plot(batches, bounds, "o-", color=BLUE, markersize=4, label="ln B − L, best score")
    ax.plot(batches, np.log(batches), color=GREY, linestyle=":", label="ln B")
    ax.axhline(true, color=RED, linewidth=1, label="I")
    ax.set(xscale="log", xlabel="B", ylabel="nats", title=name, ylim=(0, 1.3 * true))
    ax.legend(fontsize=7)
    print(f"{name}: I {true:.3f}; bounds " + ", ".join(f"{b:.3f}" for b in bounds))
    assert all(b <= min(true, math.log(B)) for b, B in zip(bounds, batches, strict=True))
    assert bounds == sorted(bounds) and bounds[-1] > 0.9 * true > bounds[0]
plt.show()

# %% [markdown]
# What to see: the bound is pressed between $\ln B$ and $I$. It reaches $I$ only when $B$ is far larger than
# $e^I$. For held-out captions $e^I = 220$. Where a caption is one of millions, no batch is. A loss of 0 then
# says that $I$ is at least $\ln B$, and it cannot say more.
#
# **Exercise 4** · `infonce_bound` · difficulty 1 of 3 · 5 minutes. Open `chapters/exercises/information.py`.
#
# **Exercise 5** · derive · 20 minutes. For held-out captions the best score is $\log 220$ where a caption is
# true of a picture, and $-\infty$ elsewhere. Show that the loss of a row is the logarithm of the number of
# pictures in the batch that its caption is true of, and that $\log B - \mathbb E[L] \le \log 220$.
#
# <details><summary>Answer</summary>
#
# All true pictures have equal scores and the others drop out, so the softmax is $1 / k$ with $k = 1 +
# \text{Binomial}(B - 1, 1/220)$. By Jensen $\mathbb E[\log(k / B)] \ge -\log \mathbb E[B / k]$, and $\mathbb
# E[B / k] = 220 \, (1 - (1 - 1/220)^B) \le 220$.
# </details>

# %%
check("infonce_bound")

# %% [markdown]
# ## Rate and distortion
#
# So far nothing was thrown away. A model that keeps a short vector $Z$ of a picture $X$ throws away nearly
# all. Let $d(x, z)$ say how bad it is to have $z$ in place of $x$. To stay within a mean distortion $D$ one
# has to keep
#
# $$ R(D) = \min_{p(z \mid x) \,:\, \mathbb E[d] \le D} I(X; Z) $$
#
# nats, the **rate**. With a price $\beta$ of distortion in nats, minimise $I(X; Z) + \beta \, \mathbb E[d]$.
# Blahut and Arimoto do it by turns. Given the marginal $q$ of $Z$, each row is a softmax; given the rows, $q$
# is their mean:
#
# $$ W_{ij} = \operatorname{softmax}_j(\log q_j - \beta d_{ij}), \qquad q = p W. $$
#
# Both steps lower the same objective, so it never rises. It is also a step of Sinkhorn (chapter 14). $T_{ij}
# = p_i W_{ij}$ is a transport plan with row sums $p$, costs $d$ and $\varepsilon = 1 / \beta$. The row step
# is Sinkhorn's. Where Sinkhorn would enforce column sums that are given, Blahut–Arimoto takes those that came
# out. It is a one-sided Sinkhorn that learns its other side.

# %%
p, beta = np.full(12, 1 / 12), 6.0
x = rng.random((12, 2))
d = ((x[:, None] - x[None]) ** 2).sum(-1) * 4
rate, distortion, q = rate_distortion_np(d, p, beta, 3000)
W = q * np.exp(-beta * d)
T = p[:, None] * W / W.sum(1, keepdims=True)
plan = sinkhorn_np(d, a=p, b=q, eps=1 / beta, iters=500)
print(f"Sinkhorn's plan with this q is that of Blahut and Arimoto: {np.allclose(T, plan, atol=1e-9)}")
assert np.allclose(T, plan, atol=1e-9) and math.isclose(float((T * d).sum()), distortion, rel_tol=1e-6)


def price(T):
    """Rate and β times distortion of a plan."""
    return entropies(T / T.sum())["mutual"] + beta * float((T * d).sum())


others = [
    price(sinkhorn_np(d, a=p, b=rng.dirichlet(np.full(12, 2.0)), eps=1 / beta, iters=500)) for _ in "1" * 50
]
print(f"its price {price(T):.4f}; with 50 other column sums at least {min(others):.4f}")
print(f"stand-ins that anybody takes: {(q > 1e-3).sum()} of 12")
assert price(T) < min(others) and (q > 1e-3).sum() < 12

# %% [markdown]
# What to see: at the learned column sums both algorithms give one plan, and with other column sums the price
# is higher. Some stand-ins are not taken at all. Nobody asked for few of them; the price of the rate did it.
#
# Two sources have a closed form. For a bit that is 1 with probability $p$, with $d = 1$ for a wrong bit, $R =
# h(p) - h(D)$, where $h$ is the entropy of a bit. For a Gaussian with $d = (x - z)^2$, $R = \tfrac12 \ln
# (\sigma^2 / D)$: half the distortion costs half of $\ln 2$, at any quality.


# %%
def h(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


fig, axes = plt.subplots(1, 3, figsize=(9, 2.7), constrained_layout=True)
for share, colour in ((0.5, BLUE), (0.3, GREEN)):
    points = [
        rate_distortion_np(1 - np.eye(2), np.array([share, 1 - share]), b, 3000)[:2]
        for b in (1, 1.5, 2, 3, 5)
    ]
    D = np.linspace(0.001, share, 80)
    axes[0].plot(D, [h(share) - h(v) for v in D], color=colour, linewidth=1, label=f"bit, p = {share}")
    axes[0].plot([v for _, v in points], [r for r, _ in points], "o", color=colour, markersize=4)
    assert all(math.isclose(r, max(h(share) - h(v), 0), abs_tol=1e-6) for r, v in points)
grid = np.linspace(-5, 5, 101)
bell = np.exp(-(grid**2) / 2)
points = [
    rate_distortion_np((grid[:, None] - grid) ** 2, bell / bell.sum(), b, 300)[:2] for b in (0.7, 1, 2, 4, 10)
]
D = np.geomspace(0.04, 1, 80)
axes[1].plot(D, -np.log(D) / 2, color=BLUE, linewidth=1, label="Gaussian, σ = 1")
axes[1].plot([v for _, v in points], [r for r, _ in points], "o", color=BLUE, markersize=4)
assert all(math.isclose(r, -math.log(v) / 2, abs_tol=0.01) for r, v in points)


def kept(signs, hidden):
    """I of a row of symbols and the same with `hidden` of them hidden at random: signs (states, n)."""
    n, seen = signs.shape[1], Counter()
    for which in range(2**n):
        cover = [(which >> k) & 1 for k in range(n)]
        if sum(cover) == hidden:
            for i, row in enumerate(signs):
                seen[i, tuple(-1 if c else int(s) for s, c in zip(row, cover, strict=True))] += 1
    columns = {z: j for j, z in enumerate(dict.fromkeys(z for _, z in seen))}
    joint = np.zeros((len(signs), len(columns)))
    for (i, z), count in seen.items():
        joint[i, columns[z]] = count
    return entropies(joint / joint.sum())["mutual"]


free = np.array([[(s >> k) & 1 for k in range(6)] for s in range(64)])  # six bits
copied = np.array([[(s >> (k // 3)) & 1 for k in range(6)] for s in range(4)])  # two bits, three copies each
for name, signs, colour in (("six bits", free, BLUE), ("two bits, three times", copied, RED)):
    rates = [kept(signs, hidden) / math.log(len(signs)) for hidden in range(7)]
    axes[2].plot(np.arange(7) / 6, rates, ".-", color=colour, label=name)
    if name == "six bits":
        assert np.allclose(rates, 1 - np.arange(7) / 6)
assert math.isclose(kept(copied, 3), 0.95 * math.log(4))
for ax, what in zip(axes, ("mean distortion D",) * 2 + ("share hidden",), strict=True):
    ax.set(xlabel=what, ylabel="rate, nats" if ax is not axes[2] else "rate, share of H")
    ax.legend(fontsize=7)
plt.show()

# %% [markdown]
# What to see: lines are the closed forms, dots are Blahut and Arimoto. On the right the other way to lower a
# rate: hide a part at random. This is a fixed $p(z \mid x)$, chosen by nobody, and its rate falls with what
# is hidden. Of six independent bits half a mask takes half the rate. Of two bits that are shown three times
# it takes a twentieth. So most of a redundant picture has to be hidden before anything has to be understood
# (chapter 22).
#
# Bordes et al. (2024) read the losses of this course so, after Federici et al. (2020) and Dubois et al.
# (2021). Masking fixes the rate and asks for a reconstruction, which is a distortion. A contrast asks for no
# reconstruction, and counts as distortion only what changes the partner.
#
# **Exercise 6** · `rate_distortion_np` · difficulty 2 of 3 · 25 minutes. Open
# `chapters/exercises/information.py`.
#
# **Exercise 7** · break and repair · 15 minutes. Write the row step without logarithms, as $q_j e^{-\beta
# d_{ij}}$ over its row sum, and run it at $\beta = 5000$ with all distances above 0.1. What comes out, and
# which one subtraction repairs it?
#
# <details><summary>Answer</summary>
#
# Every exponential is 0, every row is $0/0$. Subtract each row's largest exponent before the exponential, as
# `logsumexp` does (chapter 01); a constant a row leaves the softmax as it is. The known mistake
# `exp_underflows` of `tests/bugs/information.py` is this one.
# </details>

# %%
check("rate_distortion_np")

# %% [markdown]
# ## Sums of single gains are no information
#
# A masked model is asked for one word at a time. It is tempting to add up what the picture saves on each. The
# chain rule says what may be added: each word *given those already known*,
#
# $$ I(c; x) = \sum_k I(w_k; x \mid w_1 \dots w_{k-1}). $$
#
# Gains that know nothing of one another can be too small, as with the exclusive or: of two fair bits $a, b$
# and $c = a \oplus b$, neither alone tells anything of $c$, and both tell all. They can also be too large. In
# the grammar each word, asked with all others in view, is known from the picture, and unknown without it.

# %%
xor = np.zeros((2, 2, 2))
for a in (0, 1):
    for b in (0, 1):
        xor[a, b, a ^ b] = 1 / 4
alone = [entropies(xor.sum(axis))["mutual"] for axis in (1, 0)]
print(f"exclusive or: single gains {sum(alone):.3f}, together {entropies(xor.reshape(4, 2))['mutual']:.3f}")

other = meanings(sources["training pairs"])
shown = [min(c, other[c]) for c in captions]  # what the picture shows
single, chained = [], []
for k in range(3):
    rest, known = [p[:k] + p[k + 1 :] for p in parts], [p[:k] for p in parts]
    pictured = list(zip(rest, shown, strict=True)), list(zip(known, shown, strict=True))
    whole, seen = entropy(parts), entropy(list(zip(parts, shown, strict=True)))
    upto = (
        entropy([p[: k + 1] for p in parts]),
        entropy([(p[: k + 1], s) for p, s in zip(parts, shown, strict=True)]),
    )
    single.append((whole - entropy(rest)) - (seen - entropy(pictured[0])))
    chained.append((upto[0] - entropy(known)) - (upto[1] - entropy(pictured[1])))
for name, gains in (("with all others in view", single), ("one after the other", chained)):
    print(f"{name:<24} " + " + ".join(f"{g:.3f}" for g in gains) + f" = {sum(gains):.3f}")
I = exact["training pairs"]["information"]
assert sum(alone) < 1e-9 and math.isclose(sum(chained), I) and sum(single) > I + 0.5

# %% [markdown]
# What to see: with all others in view the three gains add up to more than the picture tells. Whoever sees the
# other words knows already which noun was named first, so the picture then tells each word whole, and the
# choice of the writer is counted as if it stood in the picture. One after the other the gains are exact.
#
# **Exercise 8** · predict before you run · 10 minutes. The chain may run in any order. Take the relation
# first, then the nouns. Which single terms change, and what is the sum? Change the cell.
#
# <details><summary>Answer</summary>
#
# The terms change: the relation's gain is now $\ln 4 - \ln 2$, as the picture leaves “left of” and “right of”
# open, and the first noun then gains all. The sum is $I$ in every order. That holds for the true
# probabilities; models see below.
# </details>
#
# ## All families on one axis
#
# Now the models. Each gives a number for every pair of caption and picture, whose *mean* is at most $I$:
#
# | family | per pair | at most |
# |---|---|---|
# | compares (CLIP, CoCa) | $\ln B$ less the loss of its row and its column, halved | $\min(I, \ln B)$ |
# | writes (CoCa, Chameleon) | $H(c) + \log q(c \mid x)$ | $I$ |
# | fills in (FLAVA, MaskVLM) | $H(c \mid L) + \sum_k \log q(w_k \mid \text{before it}, x)$ | $I - H(L)$ |
# | draws (Chameleon) | $\log q(x \mid c) - \log \sum_{c'} p(c') q(x \mid c')$ | $I$ |
#
# Why at most $I$? Three of the four are $H(c)$ less a **cross-entropy** $-\mathbb E[\log q(c \mid x)]$. For
# any $q$ that sums to one the cross-entropy is at least $H(c \mid x)$ (Barber and Agakov 2003). A model
# cannot cheat with it. For the one that draws, Bayes' rule makes the $q(c \mid x)$: the difference is $\log
# q(c \mid x) / p(c)$ of its posterior (chapter 24). It needs $q(x | c')$ for *every* caption of the grammar,
# which is `logmeanexp` over 440 of them for held-out pairs, and 3,528 passes a picture for training pairs,
# which we leave out.
#
# One subtlety for those that fill in. All words are hidden at first, but the number of masks is not. “Left
# of” is a word longer than “above”, so $L$ tells one of two, $H(L) = \ln 2$. What is left is $H(c \mid L)$.
#
# The captions are drawn by the grammar and the pictures are new ones by the training artists, for both kinds
# of pairs. The 95 % intervals are clustered by pair of nouns (chapter 16); those of the contrast leave out
# that the pairs of a batch share their rivals.

# %%
loaded = {name: load_trained(None, name) for name in ("clip", "flava", "maskvlm", "chameleon")}
writer, clip, draws = CocaWriter(recipe, coca.model), loaded["clip"], loaded["chameleon"]
matcher = Matcher(clip.model, clip.tokenizer)
B, items, few = 256, 192, 16
RELATION_FIRST = (2,)  # a dog [left] of a guitar: places are counted from 0


def as_clip_sees(source):
    """The same grammar in CLIP's small pictures."""
    pairs = "train" if source is sources["training pairs"] else "held_out"
    return Scenes(recipe.emojivl, recipe.nouns, canvas=28, pairs=pairs, sizes=SCENE_SIZES, seed=12)


bars, shared = {}, {}
for name, source in sources.items():
    H, I, length = (exact[name][key] for key in ("caption", "information", "length"))
    scenes = [source[i] for i in range(2 * B)]
    texts, some = [s.caption for s in scenes], scenes[:items]
    pixels = scene_pixels(some)
    small = as_clip_sees(source)
    tiny = [small[i] for i in range(2 * B)]
    found = matcher.pictures(scene_pixels(tiny)), matcher.texts([s.caption for s in tiny])
    scores = {
        "CLIP": float(clip.model.scale) * similarities(*found),
        "CoCa": float(coca.model.scale) * writer.contrast(texts, scenes),
    }
    told = {
        f"{who} compares, B = {B}": (contrasted(S, B), tiny if who == "CLIP" else scenes, min(I, math.log(B)))
        for who, S in scores.items()
    }
    told["CoCa writes"] = H + writer.log_p(texts[:items], some), some, I
    by_picture = nats(draws.model, draws.tokenizer, texts[:items], pixels, image_first=True)
    told["Chameleon writes"] = H - by_picture[:, 0], some, I
    shared[name] = scores, texts, scenes, pixels, by_picture[:, 1]
    for who in ("flava", "maskvlm"):
        words = masked_words(loaded[who].model)
        log_q = revealed(words, loaded[who].tokenizer, texts[:items], pixels, RELATION_FIRST)
        label = {"flava": "FLAVA fills in", "maskvlm": "MaskVLM fills in"}[who]
        told[label] = H - length + log_q, some, I - length
    if name == "held-out pairs":
        every = list(meanings(source))
        log_q = drawn(draws.model, draws.tokenizer, every, pixels[:few])
        own = [every.index(text) for text in texts[:few]]
        told["Chameleon draws"] = pmi(log_q)[np.arange(few), own], scenes[:few], I
    clusters = {who: [tuple(sorted(s.objects)) for s in of] for who, (_, of, _) in told.items()}
    bars[name] = {who: (mean_of(v, clusters[who]), most) for who, (v, _, most) in told.items()}
    print(f"{name}: I = {I:.3f}")
    for who, (m, most) in bars[name].items():
        print(
            f"  {who:<24}{m['value']:6.2f} ({m['low']:5.2f} to {m['high']:5.2f}), at most {most:.2f}; "
            f"{m['items']} pairs"
        )
        assert m["value"] <= most, who
train, new = ({who: m["value"] for who, (m, _) in rows.items()} for rows in bars.values())
I_train, I_new = (exact[name]["information"] for name in sources)
assert train["CoCa writes"] > 0.9 * I_train and 0.3 < I_new - new["CoCa writes"] < 0.7
assert math.log(B) - 0.5 < train[f"CoCa compares, B = {B}"] and new[f"CoCa compares, B = {B}"] < I_new - 1
assert train[f"CLIP compares, B = {B}"] < I_train / 3 and new[f"CLIP compares, B = {B}"] < I_new / 2
assert sorted(train, key=train.get)[-2:] == ["MaskVLM fills in", "CoCa writes"]
reached = (
    bars["held-out pairs"]["Chameleon draws"][0]["low"],
    bars["held-out pairs"]["Chameleon writes"][0]["high"],
)
assert reached[0] > reached[1]

# %% [markdown]
# No bar is above its bound. For comparison here are two sums that look like information and are none. The
# first is chapter 22's: FLAVA's patches, all hidden, each asked for by itself, with the caption and without.
# The second is the difference of Chameleon's own $\log q(x \mid c)$ and its own $\log q(x)$, which it gives
# when the picture comes first.

# %%
name = "held-out pairs"
_, texts, scenes, pixels, alone = shared[name]
some, flava = scenes[:items], loaded["flava"]
cost, everything = recipe_of(flava).cost(flava.model), torch.ones(items, flava.model.config.patches).bool()
without, with_it = (
    costs(cost, flava.tokenizer, some, read, everything) for read in ([""] * items, texts[:items])
)
after = nats(draws.model, draws.tokenizer, texts[:items], pixels, image_first=False)[:, 1]
pairs = [tuple(sorted(s.objects)) for s in some]
sums = {
    "FLAVA, patch by patch": mean_of(without - with_it, pairs),
    "Chameleon, its own p(x)": mean_of(alone - after, pairs),
}
for who, m in sums.items():
    print(f"{who:<24}{m['value']:6.2f} ({m['low']:.2f} to {m['high']:.2f})")
    assert m["low"] > exact[name]["information"]

# %%
fig, axes = plt.subplots(2, 1, figsize=(8, 5.4), constrained_layout=True, sharex=True, height_ratios=(6, 9))
COLOURS = {"compares": BLUE, "writes": GREEN, "fills": YELLOW, "draws": "#CC79A7"}
for ax, (name, rows) in zip(axes, bars.items(), strict=True):
    shown_bars = [(who, m, most, COLOURS[who.split()[1].strip(",")]) for who, (m, most) in rows.items()]
    if name == "held-out pairs":
        shown_bars += [(who, m, None, "#DDDDDD") for who, m in sums.items()]
    for y, (_, m, most, colour) in enumerate(reversed(shown_bars)):
        reach = m["high"] - m["value"]
        hatch = None if most else "///"
        ax.barh(y, m["value"], xerr=reach, color=colour, hatch=hatch, edgecolor="white", ecolor="#444444")
        if most:
            ax.plot([most] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2)
    ax.set_yticks(range(len(shown_bars)), [who for who, *_ in reversed(shown_bars)], fontsize=8)
    ax.axvline(exact[name]["information"], color=RED, linewidth=1)
    ax.axvline(exact[name]["caption"], color=GREY, linestyle=":")
    ax.set_title(f"{name}: I = {exact[name]['information']:.3f} nats (red), H(caption) dotted", fontsize=9)
axes[-1].set_xlabel(
    "nats that the picture tells of its caption; black: each bar's own bound; hatched: no bounds"
)
plt.show()

# %% [markdown]
# What to see: one axis, four losses. CoCa, which writes, gets nearly all there is on training pairs, and half
# a nat less than all on held-out ones. Its other half compares the same pictures. On training pairs it ends
# near $\ln 256$, which is the batch's limit, on held-out pairs more than a nat below its bound. CLIP learned
# the names of single drawings and saw few scenes: it tells less than a third of what there is to tell of
# training pairs. MaskVLM, which was never trained to write, comes second on training pairs, when its words
# are asked for one after the other. Chameleon draws better than it writes where pairs are new; its interval
# is wide, for every picture takes 440 passes. The two hatched bars pass the red line: they are no
# information.
#
# **Exercise 9** · explain · 15 minutes. Chameleon's own $q(x)$ sums to one over pictures, as it must. Why may
# $\log q(x \mid c) - \log q(x)$ be above $I$, and $\log q(x \mid c) - \log \sum_{c'} p(c') q(x \mid c')$ not?
#
# <details><summary>Answer</summary>
#
# $-\mathbb E[\log q(x)] = H(x) +$ its own excess, so a bad $q(x)$ makes captions look good. The network was
# trained on pictures of training pairs and pays more for others; and it has to guess code by code what the
# mixture knows from 440 captions. In the second form numerator and denominator are one model: what is bad in
# both cancels, and what is left is a posterior over captions, which sums to one.
# </details>
#
# **Exercise 10** · ablate · 20 minutes. Replace the 440 captions by the true one and 31 others, drawn by the
# grammar. What bounds the bar now? And what if the true caption is left out of the sum?
#
# <details><summary>Answer</summary>
#
# With the true one among 32 it is InfoNCE with $\log q(x \mid c)$ as its score: at most $\ln 32 = 3.47$. With
# the true one left out, the sum misses its largest term, and the bar can pass $I$: a mean of exponentials
# that is taken from a sample is too small where it counts. This is the plug-in trap again.
# </details>
#
# ## More rivals, another order
#
# Two more looks at the same numbers. The contrast depends on $B$, and the chain of a masked model on the
# order, although the chain rule says that the sum is the same in every order.

# %%
name = "training pairs"
scores, texts, scenes, pixels, alone = shared[name]
H, I, length = (exact[name][key] for key in ("caption", "information", "length"))
second = loaded["maskvlm"]
words = masked_words(second.model)
by_order = {"relation first": train["MaskVLM fills in"]}
for told, order in (("left to right", ()), ("nouns first", (1, -1))):
    log_q = revealed(words, second.tokenizer, texts[:items], pixels, order)
    by_order[told] = H - length + log_q.mean()
print(
    "MaskVLM: "
    + ", ".join(f"{told} {value:.2f}" for told, value in by_order.items())
    + f"; bound {I - length:.2f}"
)

costs_of_relation = {"with no other word in view": [], "with both nouns in view": []}
for rows, ids in equal_lengths(second.tokenizer, texts[:items], 24):
    true, mask_id = torch.from_numpy(ids), second.tokenizer.mask_id  # [CLS] a dog left of a guitar [SEP]
    for found, hide in zip(costs_of_relation.values(), (slice(1, -1), slice(3, 4)), strict=True):
        hidden = true.clone()
        hidden[:, hide] = mask_id
        log_q = words(hidden, pixels[torch.from_numpy(rows)])[:, 3].log_softmax(-1)
        found += (-log_q.gather(1, true[:, 3:4])[:, 0]).tolist()
relation = np.mean(costs_of_relation["with no other word in view"])
nouns = H - length - train["MaskVLM fills in"] - relation
print(f"both its nouns cost {nouns:.3f} nats when the relation is known")
assert nouns < math.log(2)
for seen, found in costs_of_relation.items():
    print(f"its relation costs {np.mean(found):.3f} nats {seen}; a guess of two {math.log(2):.3f}")
    assert np.mean(found) > 0.6

fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.7), constrained_layout=True)
sizes = [2**k for k in range(1, 10)]
left.plot(sizes, np.log(sizes), color=GREY, linestyle=":", label="ln B")
for who, colour in (("CoCa", GREEN), ("CLIP", BLUE)):
    means = [contrasted(scores[who], size).mean() for size in sizes]
    left.plot(sizes, means, ".-", color=colour, label=f"{who} compares")
    assert all(m <= math.log(size) for m, size in zip(means, sizes, strict=True))
    assert means[5] > math.log(64) - 0.2 if who == "CoCa" else means[-1] < means[5] + 0.3
left.axhline(I, color=RED, linewidth=1, label="I")
left.set(xscale="log", xlabel="B", ylabel="nats")
left.legend(fontsize=7)
right.barh(list(by_order), list(by_order.values()), color=YELLOW)
right.axvline(I - length, color="black")
right.set(xlabel="nats that MaskVLM proves; black: its bound")
plt.show()
assert max(by_order.values()) == by_order["relation first"] <= I - length
assert by_order["relation first"] - by_order["nouns first"] > 1.5

# %% [markdown]
# What to see: on the left CoCa keeps close to $\ln B$ up to 64, and CLIP hardly rises from there on. On the
# right the sums of one model differ by more than one and a half nats, so its answers do not come from one
# joint distribution. Asked for a noun when the relation is known, it looks where the relation says. Asked
# for the relation when both nouns are known, it guesses, as if it had not seen them. A causal model cannot
# contradict itself like that, because it is asked in one order only.
#
# **Exercise 11** · explain · 10 minutes. Which of the three sums is the information that MaskVLM has read?
#
# <details><summary>Answer</summary>
#
# Each is a lower bound of $I$, so the largest is the best that is proven. One may even choose the order on
# training pairs and measure on others. A mean of the three *probabilities* would be one more distribution
# over captions, and its bound lies at least at the mean of the three.
# </details>
#
# ## Traps of units
#
# * **Bits for nats.** $\log_2$ makes every number larger by 1.44. A bound of 10.8 beside a limit of 7.475 is
#   the same number in the other unit.
# * **Nats a token for nats a caption.** Losses are means over tokens. They must be summed over a caption
#   before they are compared with $H(c)$, and means over batches of different lengths do not even multiply
#   back.
# * **Which captions?** $H(c)$ has to be that of the pairs that are asked about. A model measured on held-out
#   pairs against the 8.168 nats of training pairs would be given two nats for nothing.
# * **Which picture?** Its own nats are many more. Most of what a picture holds is told by no caption.

# %%
codes, kinds = draws.model.config.grid**2, draws.model.config.codes
print(
    f"a picture is {codes} codes: {codes * math.log(kinds):.0f} nats at most, {alone.mean():.0f} by Chameleon"
)
print(f"of them the caption is told {exact[name]['information']:.1f}")
tokens = [len(tokenizer.encode(text)) + 1 for text in texts[:items]]
per_caption = -writer.log_p(texts[:items], scenes[:items])
print(f"CoCa: {per_caption.mean():.3f} nats a caption, {per_caption.sum() / sum(tokens):.3f} nats a token")
assert 0.08 < exact[name]["information"] / alone.mean() < 0.13
assert per_caption.sum() / sum(tokens) < exact[name]["given_picture"] < per_caption.mean()

# %% [markdown]
# What to see: a picture costs Chameleon ten times what it tells of its caption; the rest is who drew what
# where on which ground. And CoCa's nats a token lie below $\ln 2$, the floor of a *caption*. Nothing is wrong
# with the model; the units are.
#
# **Exercise 12** · break and repair · 15 minutes. Somebody reports that a captioner tells 8.0 nats of 7.475.
# Name three mistakes of this chapter that each would explain it, and the check for each.
#
# <details><summary>Answer</summary>
#
# Bits: divide by 1.44. A mean over tokens taken from $H(c)$: sum it first. A blind *model* in place of
# $H(c)$: compute the entropy, or say “gain” and not “information”. A leak (chapter 20) is a fourth: then the
# cross-entropy itself is below $H(c \mid x) = \ln 2$.
# </details>
#
# ## What we left out
#
# * Estimates of $I$ where no grammar is known. Lower bounds remain valid there only if $H(c)$ is, and every
#   bound from $N$ samples that is sure is at most about $\ln N$ (McAllester and Stratos 2020).
# * Upper bounds on what a representation keeps (the variational information bottleneck), which need noise in
#   it.
# * Mixtures of orders for masked models, and training them for it (permutation language models, XLNet).
# * Continuous pictures: $H(x)$ would be relative to a unit of colour; $I$ would stay what it is.
#
# ## Sources
#
# Entropy to rate and distortion: Cover and Thomas 2006, chapters 2 and 10; Blahut 1972; Arimoto 1972. The
# bound of a decoder: Barber and Agakov 2003. InfoNCE: van den Oord et al. 2018, eq. 5; Poole et al. 2019.
# Bias of counts: Miller 1955. Masked models as probabilities: Wang and Cho 2019; Salazar et al. 2020. Losses
# of vision and language as rate and distortion: Bordes et al. 2024, section 2.3.3; Federici et al. 2020;
# Dubois et al. 2021.
