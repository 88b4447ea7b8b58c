# %% [markdown]
# # 15 · IPOT and word-patch alignment
#
# **The question.** A model has read a caption and seen a picture. Nobody ever told it where anything is.
# Where on the picture does each word point?
#
# You need: chapter 14, and chapter 08 for the model. Plan for four to five hours with the six exercises.

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

import json
from functools import partial
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp import ipot, sinkhorn
from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import swapped
from minivlp.evaluation import point as pointing
from minivlp.recipes.base import WEIGHTS, load_trained
from tests import check
from tests.bugs import ipot as mistakes

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
emojivl, trained = load_emojivl(), load_trained(WEIGHTS / "vilt_tiny.safetensors")
model, tokenizer = trained.model, trained.tokenizer
# Pairs of nouns and an artist that training never showed; the first scenes of a fixed seed.
nouns, unseen = trained.nouns(emojivl), emojivl.unseen_artists
scenes = Scenes(emojivl, nouns, unseen, trained.canvas, pairs="held_out", seed=7)


def draw_plans(some, iters):
    fig = plt.figure(figsize=(7.5, 1.5 * len(some)), layout="constrained")
    axes = fig.subplots(len(some), 1 + max(len(s.caption.split()) for s in some), squeeze=False)
    for row, scene in zip(axes, some, strict=True):
        words, heat = pointing.plan(model, tokenizer, scene, iters=iters)  # heat (words, rows, columns)
        edge = trained.canvas - 0.5
        row[0].imshow(scene.image)
        for ax, word, h in zip(row[1:], words, heat, strict=False):
            z = np.clip((h - h.mean()) / h.std(), 1, 3)  # as in ViLT: standard deviations above the mean
            ax.imshow(scene.image.mean(2), cmap="gray", vmin=-255, vmax=255)
            ax.imshow(z, cmap="autumn_r", alpha=(z - 1) / 2, extent=(-0.5, edge, edge, -0.5))
            ax.set_title(word, fontsize=9)
        for ax in row:
            ax.set_axis_off()
    plt.show()


draw_plans([scenes[0]], iters=50)

# %% [markdown]
# What to see: each small picture is one row of a transport plan between the words and the patches. The
# stronger the colour, the more the word sends there. Each token must send the same, so "a" and "below" point
# somewhere too. This chapter makes that plan, trains with it, and asks how often it is right.
#
# ## A chain of easy problems
#
# Chapter 14 left a choice between two evils. At a high temperature a plan is found in a few sweeps and is
# blurred. At a low one it is sharp and takes thousands. The **proximal point method** goes in steps. It does
# not ask for the cheapest plan at once, only for a cheaper one near the last. With $\mathrm{KL}(T \,\|\, R) =
# \sum_{ij} T_{ij}\log(T_{ij}/R_{ij})$ as the distance and a weight $\beta > 0$, in units of cost,
#
# $$T_t = \arg\min_T \; \langle T, C\rangle + \beta\, \mathrm{KL}(T \,\|\, T_{t-1})
#   \quad\text{over plans, } t = 1, 2, \dots, \text{ all entries of } T_0 \text{ equal.}$$
#
# Setting the derivative to zero as in chapter 14, with multipliers $f_i$, $g_j$ for the marginals,
#
# $$C_{ij} + \beta\,(\log T_{ij} - \log [T_{t-1}]_{ij} + 1) = f_i + g_j
#   \quad\Longrightarrow\quad
#   T_t = \mathrm{diag}(\cdot)\; \underbrace{T_{t-1} \odot e^{-C/\beta}}_{Q}\; \mathrm{diag}(\cdot),$$
#
# where $\odot$ multiplies entry by entry and $\mathrm{diag}(\cdot)$ rescales rows or columns: a Sinkhorn
# problem whose kernel is $Q$ instead of $e^{-C/\beta}$. Two things follow. First, $T_{t-1}$ itself was
# allowed, so $\langle T_t, C\rangle + \beta\,\mathrm{KL} \le \langle T_{t-1}, C\rangle$: the price never
# rises, and where the chain comes to rest the penalty is zero and blurs nothing. Second, unrolling $Q$ gives
# $T_t = \mathrm{diag}(\cdot)\, e^{-tC/\beta}\, \mathrm{diag}(\cdot)$. A plan of this form is the Sinkhorn
# plan at $\varepsilon = \beta/t$, because that minimum is unique (chapter 14). The temperature falls by
# itself, and each step starts from the plan of the last.
#
# ## One sweep a step
#
# Solving each problem to the end would be wasteful. **IPOT** makes one sweep a step and carries the row
# scaling $a$ to the next. The letters $a$ and $b$, chapter 14's weights, are scalings from here on, as in the
# paper, and the weights are $\mu$ and $\nu$. With $\mu_i = 1/M$, $\nu_j = 1/N$ and $T_0 = 1$, $a_0 = 1$ (at
# padding, $\mu_i$, $\nu_j$ and $a_0$ are 0):
#
# $$Q = T_{t-1} \odot e^{-C/\beta}, \qquad b = \nu / (Q^\top a_{t-1}), \qquad a_t = \mu / (Q\,b), \qquad
#   T_t = \mathrm{diag}(a_t)\, Q\, \mathrm{diag}(b).$$
#
# ViLT takes $\beta = 0.5$ and 50 steps. On the nine costs of chapter 14, whose exact price is 0.3:

# %%
C = np.array([[0.1, 0.4, 0.9], [0.2, 0.8, 0.9], [0.6, 0.5, 0.3]])
T, a = np.ones((3, 3)), np.ones(3)
for t in range(1, 51):
    Q = T * np.exp(-C / 0.5)
    b = (1 / 3) / (Q.T @ a)  # columns, from the row scaling of the step before
    a = (1 / 3) / (Q @ b)  # rows last: their sums are exact
    T = a[:, None] * Q * b
    if t in (1, 2, 5, 10, 50):
        print(f"t = {t:<2} price {(T * C).sum():.4f}  column sums {T.sum(0)}  a = {a}")
print("T =\n", T, "\n\nipot_np =\n", ipot.ipot_np(C))
assert (
    np.allclose(T, ipot.ipot_np(C))
    and abs((T * C).sum() - 0.3) < 1e-4
    and np.abs(T.sum(0) - 1 / 3).max() < 1e-3
)

# %% [markdown]
# Now a case with structure: four words, eight patches that are noisy copies of them, and the exact price from
# all $8!$ ways to fill four words with two patches each. One step of IPOT costs what one sweep of Sinkhorn
# costs, so they share an axis.

# %%
rng = np.random.default_rng(0)
words = rng.standard_normal((4, 8))
patches = words[[0, 0, 0, 0, 1, 1, 2, 3]] + 0.6 * rng.standard_normal((8, 8))
C = 1 - sinkhorn.unit_np(words)[0] @ sinkhorn.unit_np(patches)[0].T  # (4, 8)
orders = np.array(list(permutations(range(8))))
exact = np.repeat(C, 2, 0)[np.arange(8), orders].mean(1).min()

steps = np.unique(np.geomspace(1, 300, 25).astype(int))
solvers = {f"Sinkhorn, ε = {e}": partial(sinkhorn.sinkhorn_np, C, eps=e) for e in (0.5, 0.05, 0.01)}
solvers["IPOT, β = 0.5"] = partial(ipot.ipot_np, C)
reset = solvers["IPOT, a reset"] = partial(mistakes.reset_scaling, torch.tensor(C))

fig, axes = plt.subplots(1, 2, figsize=(7.8, 2.9), constrained_layout=True)
prices = {}
for name, solve in solvers.items():
    prices[name] = [(np.asarray(solve(iters=n)) * C).sum() - exact for n in (50, 300)]
    plans = [np.asarray(solve(iters=int(n))) for n in steps]
    axes[0].loglog(steps, [max(abs((T * C).sum() - exact), 1e-16) for T in plans], label=name)
    axes[1].loglog(steps, [max(abs(8 * T.sum(0) - 1).max(), 1e-16) for T in plans])
    print(f"{name:<18} after 50: price {(np.asarray(solve(iters=50)) * C).sum():.4f}, exact {exact:.4f}")
axes[0].set(xlabel="sweeps or steps", ylabel="|⟨T, C⟩ − exact|", ylim=(1e-9, 1))
axes[1].set(xlabel="sweeps or steps", ylabel="relative error of a column sum", ylim=(1e-9, 2))
axes[0].legend(fontsize=8, loc="lower left")
plt.show()
assert abs(np.subtract(*prices["Sinkhorn, ε = 0.5"])) < 1e-6 < 0.1 < prices["Sinkhorn, ε = 0.5"][1]
assert prices["Sinkhorn, ε = 0.01"][0] < -0.01 and abs(prices["IPOT, β = 0.5"][1]) < 1e-6
assert abs(prices["IPOT, β = 0.5"][0]) < 0.1 * min(abs(p[0]) for n, p in prices.items() if n[0] == "S")
assert prices["IPOT, a reset"][1] < -0.05

# %% [markdown]
# What to see: at the highest temperature Sinkhorn has a plan soon, and its price stays above the exact one by
# what the blur costs. At the lowest it is no plan yet after 50 sweeps: its price is *below* the exact one,
# because not all patches receive their share. IPOT comes nearer to the exact price than each of them, because
# its temperature falls. The violet line is the next section's.
#
# ## A trap: the reset scaling
#
# Let $a$ start from 1 in every step: "a new problem, a fresh start". Nothing crashes, and the rows are exact.
# But look at what a step promises to the columns. Let it start from $a_{\text{start}}$. Then $b$ makes the
# columns of $\mathrm{diag}(a_{\text{start}})\,Q\,\mathrm{diag}(b)$ exact, and $T_t =
# \mathrm{diag}(a_t)\,Q\,\mathrm{diag}(b)$, so
#
# $$\sum_i \frac{a_{\text{start},i}}{a_{t,i}}\, [T_t]_{ij} = \nu_j .$$
#
# With $a_{\text{start}} = a_{t-1}$ the columns become exact if $a$ settles, so that the ratio goes to 1. It
# did in the printout above. That it must we do not prove; Xie et al. 2020 prove that the chain converges.
# With $a_{\text{start}} = 1$ the columns of $\mathrm{diag}(1/a_t)\,T_t$ are exact and not those of $T_t$:
# what a word sends counts $1/a_{t,i}$ times.
#
# There is another way to see what carrying does. Collect the scalings, $A_t = \prod a$ and $B_t = \prod b$,
# so that $T_t = \mathrm{diag}(A_t)\, e^{-tC/\beta}\, \mathrm{diag}(B_t)$. A step starts from rows scaled by
# $A_{t-1}\, a_{t-1}$ with $a_{t-1} = A_{t-1}/A_{t-2}$, that is, in logarithms, from
#
# $$\log A_{t-1} + (\log A_{t-1} - \log A_{t-2}) = 2\log A_{t-1} - \log A_{t-2}.$$
#
# So a step is one Sinkhorn sweep at $\varepsilon = \beta/t$ from potentials continued in a straight line. The
# right ones are about $t f_i/\beta$, a target that moves on at constant speed, and $\log a$ is the speed. The
# reset version starts where the target was. And vectors suffice to run IPOT, which the fused rung will use.

# %%
T = reset(iters=300).numpy()
Q = T * np.exp(-C / 0.5)
a = (1 / 4) / (Q @ ((1 / 8) / Q.sum(0)))  # one more step
print("a =", a)
print("8 · column sums of T     =", 8 * T.sum(0))
print("8 · column sums of T / a =", 8 * (T / a[:, None]).sum(0))
off = abs(ipot.ipot_potentials_np(C) - ipot.ipot_np(C)).max()
print(f"carried, from potentials continued in a straight line: the plan differs by {off:.9f}")
share = 8 * T.sum(0)
assert share.min() < 0.6 and share.max() > 1.8 and np.allclose(8 * (T / a[:, None]).sum(0), 1, atol=1e-6)
assert off < 1e-9

# %% [markdown]
# What to see: some patches receive about half of their share, one the double, and the price lies below the
# optimum, as only something that is no plan can. Rows alone do not show it, nor does a loss that goes down;
# the law `more_steps_reach_the_exact_optimum` does.
#
# One more trap, for 32 bits: how small do entries of $T_t$ become? About $e^{-t\,(C_{ij} - f_i -
# g_j)/\beta}$, with the potentials of the best plan, where the *reduced cost* $C_{ij} - f_i - g_j$ is 0 where
# the plan sends and positive elsewhere. It can be twice the range of the costs. Say row $i$ sends to column
# $k$ and column $j$ receives from row $l$, both at reduced cost 0. Then the reduced costs of $(i, j)$ and
# $(l, k)$ add up to $(C_{ij} - C_{ik}) + (C_{lk} - C_{lj})$, twice the range at most. For costs between 0 and
# 2 and 50 steps of $\beta = 0.5$ that is $e^{-400}$:

# %%
reduced = np.array([[0.0, 2.0, 0.0], [2.0, 0.0, 2.0], [2.0, 0.0, 2.0]])
smallest = np.log(ipot.ipot_np(reduced, beta=0.5, iters=50).min())
once, twice = (-50 * k * (reduced.max() - reduced.min()) / 0.5 for k in (1, 2))
print(f"log of the smallest entry {smallest:.0f}; once the range would be {once:.0f}, twice {twice:.0f}")
assert twice - 20 < smallest < twice + 20

# %% [markdown]
# Float32 ends near $e^{-103}$. So the plain rungs carry $\log T$.
#
# **Exercise 1** · `ipot_np` · difficulty 3 of 3 · 40 minutes. Open `chapters/exercises/ipot.py`, replace
# `raise Todo`, and run the next cell. **Exercise 2** · `ipot` · difficulty 2 · 20 minutes.

# %%
check("ipot_np", "ipot")

# %% [markdown]
# ## Words and patches
#
# In ViLT, $x_i$ are the final states of the words of a caption and $y_j$ those of the patches, out of one
# transformer that has seen both; $C_{ij} = 1 - \cos(x_i, y_j)$, and the distance of a pair is $\mathcal{D} =
# \langle T, C\rangle$ with IPOT's plan. Which tokens take part matters, since each must send its share.
# Padding must not. Nor should [CLS] and [SEP], which name nothing, nor the class token of the picture.

# %%
ids, _, real = (torch.from_numpy(z) for z in tokenizer.batch([scenes[0].caption, "a dog"], 24))
for row, mask in zip(ids.tolist(), ipot.alignment_masks(real).tolist(), strict=True):
    names = [tokenizer.tokens[i] for i in row]
    print("  ".join(name if takes else f"({name})" for name, takes in zip(names, mask, strict=True)))

# %% [markdown]
# In brackets: what stays out. In a short caption [SEP] is not in the last place.
#
# **Exercise 3** · `alignment_masks` · difficulty 1 · 10 minutes. In `chapters/exercises/ipot.py`.

# %%
check("alignment_masks")

# %% [markdown]
# ## The gradient
#
# As in chapter 14 the plan is held fixed, so $\partial\mathcal{D}/\partial C = T$. There this was the
# gradient of another quantity, the price minus an entropy. Here the chain ends at the linear programme, and
# where that has one best plan, small changes of $C$ do not move it: to hold it is exact. How far 50 steps are
# from that can be measured by solving again for every changed cost.

# %%
h, unit = 1e-5, np.eye(32).reshape(32, 4, 8)
for n in (1, 10, 50, 200):
    up, down = ((ipot.ipot_np(z, iters=n) * z).sum((1, 2)) for z in (C + h * unit, C - h * unit))
    T = ipot.ipot_np(C, iters=n)
    off = abs((up - down).reshape(4, 8) / (2 * h) - T).max() / T.max()
    assert off < {1: 1, 10: 0.4, 50: 0.05, 200: 1e-3}[n]
    print(f"{n:>3} steps: slopes of the re-solved price differ by {off:.4f} of the plan's largest entry")

# %% [markdown]
# From $C$ to the tokens the way is that of chapters 01 and 14. With $p_i$, $q_j$ the unit rows and $\gamma$
# the upstream gradient of the pair, and now $G = \partial L/\partial C = \gamma\,T$ (the hints' $G$; chapter
# 01's, the gradient in the cosines, is its negative),
#
# $$dp = -G\,q, \qquad dq = -G^\top p, \qquad
#   dx_i = \frac{dp_i - p_i \langle p_i, dp_i\rangle}{\lVert x_i\rVert}, \qquad
#   dy_j = \frac{dq_j - q_j \langle q_j, dq_j\rangle}{\lVert y_j\rVert}.$$

# %%
gamma, T = 0.7, ipot.ipot_np(C)
(p, p_length), (q, q_length) = sinkhorn.unit_np(words), sinkhorn.unit_np(patches)
dx = sinkhorn.unit_grad_np(p, p_length, -gamma * T @ q)
dy = sinkhorn.unit_grad_np(q, q_length, -gamma * T.T @ p)
x, y = (torch.tensor(z[None], requires_grad=True) for z in (words, patches))
(gamma * ipot.wpa(x, y)).sum().backward()
print("differences from autograd: ", end="")
print(f"{abs(dx - x.grad[0].numpy()).max():.9f} and {abs(dy - y.grad[0].numpy()).max():.9f}")
assert abs(dx - x.grad[0].numpy()).max() < 1e-9 and abs(dy - y.grad[0].numpy()).max() < 1e-9
way = rng.standard_normal(words.shape)
plus, minus = (gamma * (T * (1 - sinkhorn.unit_np(words + z * way)[0] @ q.T)).sum() for z in (h, -h))
print(f"difference from the slope in one direction: {abs((dx * way).sum() - (plus - minus) / 2 / h):.9f}")
assert abs((dx * way).sum() - (plus - minus) / 2 / h) < 1e-7

# %% [markdown]
# **Exercise 4** · `wpa_np` · difficulty 2 · 25 minutes. **Exercise 5** · `wpa` · difficulty 1 · 10 minutes.
# Both in `chapters/exercises/ipot.py`.

# %%
check("wpa_np", "wpa")

# %% [markdown]
# ## Pull and push
#
# Pulling alone has a cheap answer in a real network: give all tokens one direction, and every cost is 0. So
# ViLT's code pulls true pairs and pushes wrong ones, $L = 0.1\,(\sum_{\text{true}} \mathcal{D} -
# \sum_{\text{wrong}} \mathcal{D}) / B$, on the rows of the matching task of chapter 07. What does pushing ask
# for? A number added to a whole row or column of $C$ is taken up by the potentials: the plan depends only on
# what is left of the costs without row and column means. Call its standard deviation the **contrast**. Below,
# the tokens of four pairs are free vectors, trained with pulling alone and with both.


# %%
def contrast(cost):
    """The mean over pairs of the deviation of what a plan can see of its costs (…, L, N)."""
    rest = cost - cost.mean(-1, keepdim=True)
    return (rest - rest.mean(-2, keepdim=True)).std((-1, -2)).mean().item()


def free_tokens(push, pairs=4):
    seed, log = torch.Generator().manual_seed(0), []
    x, y = (torch.randn(pairs, n, 8, generator=seed).requires_grad_() for n in (3, 6))
    optimizer = torch.optim.Adam([x, y], lr=0.2)
    for _ in range(40):
        true, wrong = (ipot.wpa_fused(x, z, iters=20) for z in (y, y.roll(1, 0)))
        log.append((true.mean().item(), wrong.mean().item(), contrast(1 - sinkhorn.cosine(x, y).detach())))
        optimizer.zero_grad()
        ((true.sum() - push * wrong.sum()) / (2 * pairs)).backward()
        optimizer.step()
    return np.array(log).T


names = "distance, true pairs", "distance, wrong pairs", "contrast, true pairs"
fig, axes = plt.subplots(1, 2, figsize=(7, 2.5), sharey=True, constrained_layout=True)
for ax, push, title in zip(axes, (0, 1), ("pull", "pull and push"), strict=True):
    true, wrong, seen = free_tokens(push)
    assert (wrong[-1] > 1.8 and seen[-1] < 0.1 < seen[0]) if push else seen[-1] > seen[0]
    for name, values in zip(names, (true, wrong, seen), strict=True):
        ax.plot(values, label=name)
    ax.set(xlabel="step", ylabel="cost", title=title)
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: with both, wrong pairs go to 2, the largest cost there is, and the contrast goes to 0: all
# words and all patches of a pair end in one direction. These tokens answer "is this a pair?" perfectly, and
# "which patch is this word?" not at all. With pulling alone, the contrast grows. This is one seed, and there
# is no network.
#
# ## Where do the words point?
#
# For pictures ViLT takes 1,000 steps instead of 50, and so do the pictures below. The numbers under them are
# for 50 steps, as in training. After 1,000 the plan is nearly a corner, whose rows have several equal
# entries, so that a largest one means little. These are the first three scenes, not chosen ones.

# %%
draw_plans([scenes[i] for i in range(3)], iters=1000)
about = json.loads((WEIGHTS / "vilt_tiny.json").read_text())["numbers"]["details"]
print("where the largest entry of a noun's row lies after 50 steps:")
for split in ("seen", "unseen"):
    own, either = (about[split][name] for name in ("pointing", "pointing_any"))
    low, high, some_box = own["low"], own["high"], either["value"]
    print(f"{split} artists: own box {own['value']:.3f} ({low:.3f} to {high:.3f}), ", end="")
    print(f"the other object's {some_box - own['value']:.3f}, neither {1 - some_box:.3f}")
    assert low > own["chance"] + 0.5 and some_box - own["value"] < 0.05
print(f"a random patch: own box {own['chance']:.3f}; {own['items']} nouns each, pairs never trained on")

# %% [markdown]
# What to see: the two nouns of each row have most of their colour on or beside their own thing. Three scenes
# prove little; the numbers count many. A noun's largest entry lies in its own box five times as often as a
# random patch does, and hardly ever in the other object's. So the plan finds *what* is there, and not only
# *that something* is. Where it misses, it points at the background. One reason is the marginals. "a" and
# "below" must send as much as the nouns, and every patch must be filled, so a noun cannot always have the
# patches that it likes best. The push of the loss may do more harm. Here are its distances on sixteen scenes,
# and the contrast of their costs.


# %%
@torch.inference_mode()
def measure(scene, caption):
    ids, _, real = (torch.from_numpy(z) for z in tokenizer.batch([caption], 24))
    states, mask = model.encode(ids, real, scene_pixels([scene])), ipot.alignment_masks(real)
    text, image = states["text"], states["image"][:, 1:]
    return ipot.wpa(text, image, mask).item(), contrast(1 - sinkhorn.cosine(text[mask], image[0]))


some = [scenes[i] for i in range(16)]
own, other = [s.caption for s in some], [s.caption for s in some[5:] + some[:5]]
kinds = {"its own caption": own, "another scene's": other, "nouns exchanged": [swapped(s) for s in some]}
measured = {}
for name, captions in kinds.items():
    far, seen = np.mean([measure(s, c) for s, c in zip(some, captions, strict=True)], 0)
    measured[name] = far, seen
    print(f"{name}: mean distance {far:.2f}, mean contrast {seen:.3f}")
gap = measured["another scene's"][0] - measured["its own caption"][0]
assert gap > measured["its own caption"][1] > 0.05

# %% [markdown]
# What to see: compare the contrast with the gap, by which the distance of another scene's caption exceeds
# that of its own. The loss rewards the gap. (Exchanged nouns are neither pulled nor pushed.) The plan depends
# on the contrast alone. A model that knows whether a pair matches can widen the gap by moving all its tokens
# together, like the free tokens on the right. Where the contrast is small then, the words may point anywhere.
# Here the gap is the larger of the two, so the tokens do move together; but the contrast is far from small.
# After 50 steps the temperature $\beta/t$ is 0.01, costs closer than that are hardly told apart, and the
# contrast is more than ten times as large. The term of chapter 08 by which nouns look for their pictures may
# be the reason: there words and patches do not see each other, and a word that has not seen the picture
# cannot know whether it matches (`chapters/main_job.md` has runs with and without the term).
#
# ## The fused rung
#
# The plain rung carries $\log T$ and takes two logsumexps a step. By the identity above, vectors suffice: the
# fused rung multiplies a kernel by $e^{-C/\beta}$ and by vectors, takes the scalings up into it before
# float32 runs out of exponents, keeps $L + N$ numbers a pair for the way back, and makes $T$ again from them.
# Padding behind the longest caption of a group is skipped. An entry costs a few multiplications a step in
# place of two exponentials. The plain rung makes three products with the tokens, $LND$ multiplications each:
# the cosines and the two gradients. The fused rung makes four, because it does not keep the cosines and makes
# them again on the way back:

# %%
from torch.utils.flop_counter import FlopCounterMode

x, y = (torch.randn(2, n, 64, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (24, 144))
for rung, expected in ((ipot.wpa, 3), (ipot.wpa_fused, 4)):
    with FlopCounterMode(display=False) as counter:
        rung(x, y, iters=1).sum().backward()  # one step, so that only products with the tokens count
    products = counter.get_total_flops() / (2 * 2 * 24 * 144 * 64)
    print(f"{rung.__name__:<9} {products:.2f} products of L N D multiplications")
    assert abs(products - expected) < 0.1

# %% [markdown]
# Now the times:

# %% tags=["measured"]
from time import perf_counter

x, y = (torch.randn(16, n, 64, generator=torch.Generator().manual_seed(n)) for n in (24, 144))
print("16 pairs of 24 words and 144 patches, D = 64, 50 steps, forward and backward, the best of three")
best = []
for rung in (ipot.wpa, ipot.wpa_fused):
    times = []
    for _ in range(3):
        words, patches = x.clone().requires_grad_(), y.clone().requires_grad_()
        start = perf_counter()
        rung(words, patches).sum().backward()
        times.append(perf_counter() - start)
    best.append(min(times))
    print(f"{rung.__name__:<9} {1000 * best[-1]:4.0f} ms, {best[-1] / best[0]:.2f} of wpa")

# %% [markdown]
# **Exercise 6** · `wpa_fused` · difficulty 3 · 90 minutes. In `chapters/exercises/ipot.py`. Start without
# groups: one batch, forward keeps two vectors of potentials, backward makes the plan again. When your
# functions pass, `python -m chapters train --use alignment_masks,wpa_fused` trains the model with them.

# %%
check("wpa_fused")

# %% [markdown]
# ## What we left out
#
# * More than one sweep a step, and unequal weights, which would let "a" stay silent.
# * Marginals that may be broken, or none at all: every token takes its best partner in chapter 16.
# * Losses that are told where a thing is: boxes, chapter 19.
#
# ## Sources
#
# Xie, Wang, Wang and Zha 2020 (IPOT), algorithm 1. Word-patch alignment: Chen et al. 2020 (UNITER), section
# 3.2; Kim, Son and Kim 2021 (ViLT), section 3.2 with the weight 0.1, section 4.7 for pictures with 1,000
# steps, and its code for pushing wrong pairs, which the text does not mention. Scalings taken up by the
# kernel: Schmitzer 2019, section 3.
