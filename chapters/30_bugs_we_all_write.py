# %% [markdown]
# # 30 · Appendix: bugs we all write
#
# **The question.** Below stand five short functions. All of them run, return the right shape and survive a
# first look. Each has one mistake. Where is it, and what would have found it without reading a line?
#
# The mistakes are real. All five stood in one reading note on ViLT, of the kind that many learners start
# from; they were found by running its code. The functions here were written anew around them.
#
# You need: chapters 06, 07, 14, 15 and 16. Plan for two hours. There are no exercises to hand in: the
# functions stand in cells, so mend them in place and ask their laws again.

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

from itertools import accumulate

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

from minivlp.chamfer import chamfer, mean_max
from minivlp.data import Scenes, load_emojivl
from minivlp.data.probes import hide_slots
from minivlp.ipot import ipot
from minivlp.itm import derangement
from minivlp.mlm import IGNORE, mask_tokens, mlm_loss
from minivlp.patch import from_patches, to_patches
from minivlp.recipes.base import WEIGHTS, load_trained
from minivlp.sinkhorn import cosine, sinkhorn, unit, unit_np
from tests.bugs.ipot import share
from tests.notebook import hold

np.set_printoptions(precision=3, suppress=True)
torch.manual_seed(0)
torch.set_num_threads(1)

# %%
emojivl, trained = load_emojivl(), load_trained(WEIGHTS / "vilt_tiny.safetensors")
source = Scenes(emojivl, trained.nouns(emojivl), canvas=trained.canvas, seed=5)
scenes = [source[i] for i in range(64)]
texts = [hide_slots(scene, [0], trained.tokenizer)[0] for scene in scenes[:4]]  # a noun of each is hidden


def new_axes(rows, columns, width, height):
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained")[1]


def draw(pictures, titles, rows=1):
    for ax, scene, title in zip(new_axes(rows, 4, 8, 2.2 * rows).flat, pictures, titles, strict=True):
        ax.imshow(scene.image)
        ax.set(xticks=[], yticks=[])
        ax.set_title(title, fontsize=7)
    plt.show()


draw(scenes[:4], texts)

# %% [markdown]
# What to see: four pictures and their captions, a noun hidden in each. The functions are steps of a training
# on such batches. A and B send words to patches, C finds each caption a wrong picture, D asks for the hidden
# words, E compares words with patches.
#
# ## Five functions
#
# Read each until you would sign it or can name the line. The last lines of a cell are a first look at what it
# does. All five pass it.
#
# **A** makes a transport plan by proximal steps, in logarithms (chapter 15). `share` gives equal weights to
# all tokens that are no padding. The costs are those of chapters 14 and 15.


# %%
def plan_a(cost, beta=0.5, iters=50, row_mask=None, col_mask=None):
    weights = share(cost, row_mask, col_mask)  # (…, M, 1), (…, 1, N)
    log_mu, log_nu = (w.clamp_min(1e-300).log() for w in weights)
    log_T = torch.zeros_like(cost)
    for _ in range(iters):
        log_Q, log_a = log_T - cost / beta, log_mu
        log_b = log_nu - (log_Q + log_a).logsumexp(-2, keepdim=True)
        log_a = log_mu - (log_Q + log_b).logsumexp(-1, keepdim=True)
        log_T = log_Q + log_a + log_b
    return log_T.exp()


C = torch.tensor([[0.1, 0.4, 0.9], [0.2, 0.8, 0.9], [0.6, 0.5, 0.3]], dtype=torch.float64)
for n in (1, 3, 10, 50):
    T = plan_a(C, iters=n)
    print(f"{n:>2} steps: row sums {T.sum(1).numpy()}, price {(T * C).sum():.3f}")
assert (T * C).sum() < 0.3 and np.allclose(T.sum(1), 1 / 3)

# %% [markdown]
# **B** makes an entropic plan by Sinkhorn's sweeps, in logarithms (chapter 14).


# %%
def plan_b(cost, a=None, b=None, eps=0.05, iters=100, row_mask=None, col_mask=None):
    mu, nu = share(cost, row_mask, col_mask)  # (…, M, 1), (…, 1, N)
    mu, nu = mu if a is None else a[..., None], nu if b is None else b[..., None, :]
    K, u = -cost / eps, torch.where(mu > 0, 0.0, -torch.inf)  # −∞: padding gives nothing
    for _ in range(iters):
        v = eps * (nu.log() - (K + u).logsumexp(-2, keepdim=True))
        u = eps * (mu.log() - (K + v).logsumexp(-1, keepdim=True))
    return (K + u + v).exp()


T = plan_b(C, eps=1.0)
print(f"row sums {T.sum(1).numpy()}, column sums {T.sum(0).numpy()}, price {(T * C).sum():.3f}")

# %% [markdown]
# **C** gives every caption the picture of another one, for the question "pair or no pair?" (chapter 07). The
# numbers 0 to 5 stand for six pictures, so that one can see who got what.


# %%
def pictures_c(pictures, rng):
    n = len(pictures)
    for i in range(n):
        j = (i + rng.integers(1, n)) % n  # never i itself
        pictures[i] = pictures[j]
    return pictures


print("captions", np.arange(6), "get the pictures", pictures_c(np.arange(6), np.random.default_rng(362)))

# %% [markdown]
# **D** asks for the hidden words (chapter 06), given a state (row of `hidden`) for every token, vectors and
# biases of all words, and for each token its true id, or $-100$ where nothing is asked.


# %%
def loss_d(hidden, embedding, bias, targets):
    return F.cross_entropy(hidden @ embedding.T + bias, targets, ignore_index=IGNORE)


inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (5, 2), (5,))]
right = torch.autograd.gradcheck(lambda *inputs: loss_d(*inputs, torch.tensor([4, IGNORE, 1])), inputs)
print("gradients equal slopes:", right)

# %% [markdown]
# **E** is the Chamfer distance of two sets of tokens by cosines: each token to its best partner, both ways
# (chapter 16). In training it is to be made small. Here two sets of five directions follow its gradient.


# %%
def distance_e(x, y, x_mask=None, y_mask=None):
    S = cosine(x, y)  # (…, M, N)
    return 0.5 * (mean_max(S, x_mask, y_mask) + mean_max(S.mT, y_mask, x_mask))


def descend(loss):
    """The losses of 80 steps, and the directions of both sets before and after."""
    seed, log = torch.Generator().manual_seed(1), []
    sets = [torch.randn(5, 2, generator=seed, dtype=torch.float64).requires_grad_() for _ in range(2)]
    before = [unit(z).detach() for z in sets]
    for _ in range(80):
        value = loss(*sets)
        slopes = torch.autograd.grad(value, sets)
        sets = [(z - 0.5 * dz).detach().requires_grad_() for z, dz in zip(sets, slopes, strict=True)]
        log.append(value.item())
    return log, before, [unit(z).detach() for z in sets]


print("the loss falls:", *(f"{value:.2f}" for value in descend(distance_e)[0][:30:6]))

# %% [markdown]
# ## What the laws say
#
# A law is a statement about *all* inputs, which a program tries to refute with small random ones. `hold` asks
# the library's own laws, prints which are obeyed, and for the first that is broken the smallest
# counterexample it found and a hint. Call the function at the counterexample, in a cell of your own, and find
# the number after *got*. It is the answer, one of its entries, or a sum of entries. All but A's 200 steps can
# be worked by hand. Then mend the function in its cell, run that, and ask again. Mended, all five obey all
# their laws.
#
# C's law is about who gets whose picture, so C is handed numbers again. For E the library has a similarity
# $s$, which counts $\cos$ where a distance by cosines counts $1 - \cos$. The distance must be $1 - s$, and so
# one minus E is held to the laws of $s$.

# %%
suspects = {
    "A": (plan_a, "ipot"),
    "B": (plan_b, "sinkhorn"),
    "C": (lambda n, rng: pictures_c(np.arange(n), rng), "derangement"),
    "D": (loss_d, "mlm_loss"),
    "E": (lambda x, y, **masks: 1 - distance_e(x, y, **masks), "chamfer"),
}
for letter, (function, laws) in suspects.items():
    print(f"{letter}, by the laws of {laws}")
    hold(function, laws)
    print()
pictures = np.arange(4)
pictures_c(pictures, np.random.default_rng(11))
print("C was given the pictures [0 1 2 3]; afterwards they are", pictures)
assert pictures.tolist() != [0, 1, 2, 3]

# %% [markdown]
# (Of a function of your own, `hold(…, diagnose=True)` also names a known mistake that gives the same answers,
# if there is one.) Go on when you have five answers in mind.
#
# ## Answer A: the scaling forgets
#
# The end of the first line in the loop: every step starts from equal row scalings, `log_a = log_mu`, where
# IPOT goes on with those of the step before. The fix: set `log_a` once, before the loop. Rows are scaled last
# and come out exact, so a look at the rows shows nothing. The columns are wrong, and chapter 15 tells why
# they stay so. The price could have told: it fell below 0.3, the price of the best plan there is, which
# chapter 14 found by trying all. *A minimum over all plans cannot be beaten by a plan.*
#
# The picture is that of chapter 14: 36 patches of one picture are sent to 36 of another, which are painted
# with what arrives. Here it is not divided by how much arrived: who got too little stays dark.

# %%
from tests.bugs.ipot import reset_scaling
from tests.bugs.itm import in_place
from tests.bugs.mlm import mean_over_nothing
from tests.bugs.sinkhorn import unscaled_potentials

two = [next(c for c in trained.nouns(emojivl) if c.noun == noun) for noun in ("ladybug", "pear")]
pair = Scenes(emojivl, two, ["noto"], canvas=48, pairs="all", seed=0)
sides = [to_patches(pair[i].image.transpose(2, 0, 1)[None] / 255, 8)[0] for i in (0, 3)]  # (36, 192) each
colours = [z.reshape(36, 3, 64).mean(2) for z in sides]
p, q = (unit_np(np.hstack([z - np.median(z, 0), np.full((36, 1), 0.08)]))[0] for z in colours)
costs = torch.from_numpy(1 - p @ q.T)  # (36, 36)


def paint(ax, plan, title):
    arrived = 36 * plan.numpy().T @ sides[0]  # (36, 192)
    ax.imshow(from_patches(arrived[None], 8, 48, 48)[0].transpose(1, 2, 0).clip(0, 1))
    ax.set(title=title, xticks=[], yticks=[])


axes, prices = new_axes(1, 3, 7, 2.7), []
for ax, name, solve in zip(axes, ("ipot", "A"), (ipot, reset_scaling), strict=False):
    T = solve(costs, iters=300)  # (36, 36)
    paint(ax, T, f"{name}: price {(T * costs).sum():.4f}")
    prices.append((T * costs).sum())
heat = axes[2].imshow(36 * T.sum(0).reshape(6, 6), cmap="coolwarm", vmin=0.6, vmax=1.4)
axes[2].set(title="A: what arrives", xlabel="column of patches", ylabel="row of patches")
plt.colorbar(heat, ax=axes[2], label="of its share")
plt.show()
assert prices[1] < prices[0] and (36 * T.sum(0)).min() < 0.9 and (36 * T.sum(0)).max() > 1.1

# %% [markdown]
# What to see: the second picture differs little from the first, and the third shows what is wrong with it.
# Red patches received more than their share and blue ones less, and the price is lower because of it.
#
# ## Answer B: two units
#
# The exponent $u_i - C_{ij}/\varepsilon + v_j$ has no unit, so $u$ and $v$ have none. B multiplies them by
# $\varepsilon$ as if they were costs and adds them undivided. The fix: no `eps *`, in both lines. How wrong
# is the plan? Let $\ell_i = \mathrm{logsumexp}_j(v_j - C_{ij}/\varepsilon)$ and $\mu_i$ be the share of row
# $i$. The last line of the loop says $u_i = \varepsilon(\log\mu_i - \ell_i)$, so row $i$ sums to
#
# $$\sum_j T_{ij} = e^{u_i}\,e^{\ell_i} = e^{u_i}\,\mu_i\,e^{-u_i/\varepsilon}
#   = \mu_i\; e^{\,u_i\,(1 - 1/\varepsilon)}.$$
#
# It is right where $u_i = 0$, and everywhere if $\varepsilon = 1$: the value of the first look.

# %%
axes = new_axes(1, 4, 8, 2.3)
for ax, eps in zip(axes, (1.0, 0.95, 0.9), strict=False):
    paint(ax, unscaled_potentials(costs, eps=eps), f"B at ε = {eps}")
temperatures = np.geomspace(0.02, 1, 40)
for name, solve in {"sinkhorn": sinkhorn, "B": unscaled_potentials}.items():
    axes[3].loglog(temperatures, [solve(C, eps=eps).sum() for eps in temperatures], label=name)
axes[3].set(xlabel="ε", ylabel="mass, nine costs")
mass = np.array([unscaled_potentials(C, eps=eps).sum().item() for eps in temperatures])
assert mass.max() > 1.1 and mass.min() < 0.5 and abs(mass[-1] - 1) < 1e-6  # the last is ε = 1
axes[3].legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: at 1 all is right. A little below, the pictures are too bright, because more arrives than was
# sent. On the nine costs mass is made at some temperatures and lost at others. The sum of the plan at two
# values of $\varepsilon$ finds the mistake.
#
# ## Answer C: a batch that changes under the loop
#
# `pictures[j]` may have been overwritten before. So some pictures are used twice and some never; picture 0
# always goes. And the own picture may come back by a detour, now with the label "no pair". How often? At step
# $t$, let $c_t$ be the expected number of places *other than* $i$ that hold picture $i$. As long as $t < i$,
# place $t$ gets it if its source, one of $n - 1$, is place $i$ or one of those:
#
# $$c_{t+1} = c_t + \frac{1 + c_t}{n - 1}, \quad c_0 = 0
#   \quad\Longrightarrow\quad 1 + c_t = q^{\,t}, \qquad q = \frac{n}{n-1}.$$
#
# At its own turn, $t = i$, caption $i$ draws one of those places with probability $c_i/(n-1)$. Adding up the
# geometric series over all $i$, a batch has on average
#
# $$\sum_{i=0}^{n-1} \frac{q^{\,i} - 1}{n - 1} = q^{\,n} - 1 - \frac{n}{n-1} \;\to\; e - 2 \approx 0.72$$
#
# true pairs labelled as wrong, however large it is. (The note also let $j$ be $i$, which adds to them.) And
# the caller's batch is overwritten: whoever asks for the hidden words afterwards shows the wrong pictures.

# %%
rng = np.random.default_rng(0)
for n in (4, 16, 64):
    own = [sum((f(n, rng) == np.arange(n)).sum() for _ in range(1000)) for f in (in_place, derangement)]
    derived = (n / (n - 1)) ** n - 1 - n / (n - 1)
    print(f"own pictures of {n:>2}: C {own[0] / 1000:.2f}, derived {derived:.2f}; derangement {own[1]}")
    assert abs(own[0] / 1000 - derived) < 0.15 and own[1] == 0
index = in_place(4, np.random.default_rng(11))
after = [f"caption {i} after C: picture {j}" + ", its own" * int(i == j) for i, j in enumerate(index)]
draw(scenes[:4] + [scenes[j] for j in index], texts + after, rows=2)

# %% [markdown]
# What to see: below, one caption keeps its own picture under "no pair". The words hidden in the upper row are
# asked for afterwards in front of the lower one, where most of them cannot be seen. The fix is an index and a
# fresh gather, `wrong = pictures[derangement(n, rng)]`.
#
# ## Answer D: a mean over nothing
#
# If no token of a batch is asked for, the mean is $0/0$. With many long captions that hardly ever happens.
# Here are four short ones a batch, and the smallest of models: it learns how often a word is the answer.


# %%
def train(loss):
    rng, tokenizer, log = np.random.default_rng(13), trained.tokenizer, []
    bias = torch.zeros(len(tokenizer), requires_grad=True)
    for _ in range(150):
        ids, words, _ = tokenizer.batch([scenes[i].caption for i in rng.integers(0, 64, 4)])
        settings = len(tokenizer), tokenizer.mask_id, tokenizer.special_ids
        targets = torch.from_numpy(mask_tokens(ids, words, rng, *settings)[1]).flatten()
        value = loss(torch.zeros(len(targets), 1), torch.zeros(len(bias), 1), bias, targets)
        bias = (bias - 5 * torch.autograd.grad(value, bias)[0]).detach().requires_grad_()
        log.append(value.item())
    return log


axes = new_axes(1, 2, 8, 2.5)
for name, loss, style in (("mlm_loss", mlm_loss, "-"), ("D", mean_over_nothing, "--")):
    log = train(loss)
    smooth = list(accumulate(log, lambda mean, value: 0.95 * mean + 0.05 * value))
    for ax, curve in zip(axes, (log, smooth), strict=True):
        ax.plot(curve, style, label=name)
    print(f"{name}: NaN in {np.isnan(log).sum()} losses and in {np.isnan(smooth).sum()} running means of 150")
    assert 0 < np.isnan(log).sum() < 20 < np.isnan(smooth).sum() if name == "D" else not np.isnan(log).any()
for ax, name in zip(axes, ("loss of the step, nats", "running mean"), strict=True):
    ax.set(xlabel="step", ylabel=name, xlim=(0, 150), ylim=(0, None))
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: on the left, the dashed curve has a few gaps, where the library's falls to 0. On the right, the
# running mean is NaN from the first gap to the end. PyTorch's gradients are zeros there, so this training
# itself goes on. But nothing that compares the mean works any more, neither early stopping nor "best so far",
# since every comparison with NaN is false. A mean by hand, over `weight.sum()`, does not even survive
# (chapter 06). The fix: the *sum* of the losses over $\max(K, 1)$, with $K$ the words asked for.
#
# ## Answer E: a name with the wrong sign
#
# Nothing in the body is wrong. It is the Chamfer *similarity* $s$, 1 for equal sets, under the name of a
# distance. Where distances are minimised, it pushes every token away from its best partner. The first look
# had a clue: the "distance" fell below 0.

# %%
axes = new_axes(1, 4, 8, 2.5)
for last, name, loss in ((2, "E", chamfer), (3, "1 − s", lambda x, y: 1 - chamfer(x, y))):
    log, before, after = descend(loss)
    axes[0].plot(log, label=f"{name}, to {log[-1]:.2f}")
    assert log[-1] < log[0] and (chamfer(*after) < -0.5 if name == "E" else chamfer(*after) > 0.95)
    for ax, sets, title in ((axes[1], before, "before"), (axes[last], after, f"{name}, after")):
        ax.plot(*sets[0].T, "C0o", *sets[1].T, "C3^")
        ax.set(title=title, xlabel="first coordinate", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
axes[0].set(xlabel="step", ylabel="loss")
axes[0].legend(fontsize=7)
axes[1].set(ylabel="second coordinate")
plt.show()

# %% [markdown]
# What to see: both losses fall. Under E the two sets, dots and triangles, gather on opposite sides; with
# $1 - s$ each token finds a partner. Write `1 - chamfer(x, y)`, or keep the similarity and call it one.
#
# ## Questions to ask any function
#
# Right shapes, right gradients and falling losses found none of the five. These questions did:
#
# | ask | and find |
# |---|---|
# | What must be kept? Add it up: rows *and* columns, mass, how often each picture is used. | A, B, C |
# | Where is the answer known? The exact optimum of a tiny case, equal sets. | A, E |
# | Does it hold at a setting other than 1, in other units, at odd sizes? | B |
# | What if there is nothing: no target, no word, a single pair? | D |
# | Are the inputs what they were before? | C |
# | Which way is better, up or down, and does the name say so? | E |
#
# ## What we left out
#
# * All other mistakes that we know: `tests/bugs` holds them by concept, each with its story and the law that
#   catches it; `pytest --bugs` proves that it does.
# * Mistakes that obey every law: too much memory, too many products (chapter 17), the wrong objective. A law
#   says what an answer must satisfy. Whether one asked for the right thing, a training has to show.
#
# ## Sources
#
# What the functions should have been: Xie, Wang, Wang and Zha 2020 (IPOT), algorithm 1; Cuturi 2013,
# algorithm 1, in logarithms as in Peyré and Cuturi 2019, section 4.4; Kim, Son and Kim 2021 (ViLT), section
# 3.2; Devlin et al. 2019 (BERT), section 3.1; Fan, Su and Guibas 2017 (the Chamfer distance) and Lin et al.
# 2024 (VILA), section 3.1.
