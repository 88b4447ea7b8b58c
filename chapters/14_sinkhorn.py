# %% [markdown]
# # 14 · Sinkhorn
#
# **The question.** Here are two pictures of the same two things, each cut into 36 patches. The ladybug and
# the pear have changed places. Which patch of the left picture belongs to which patch of the right one, when
# every patch must be used and none may be used twice?
#
# Chapters 12 and 13 compared whole pictures with whole captions. Here the matrix lies *inside* one pair: its
# rows are the parts of one thing, its columns the parts of another, and nobody says which cells are right.
# The answer is a **transport plan**. Chapter 15 puts words in place of the left patches and trains with it.
#
# You need: chapter 01 with its logsumexp and its gradient through unit rows. Plan for three to four hours
# with the five exercises.

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

from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp import sinkhorn
from minivlp.data import CPU_NOUNS, Scenes, load_emojivl
from minivlp.evaluation.point import patches_inside
from minivlp.patch import from_patches, to_patches
from tests import check
from tests.bugs import sinkhorn as mistakes

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %% [markdown]
# No model is needed yet. Each patch is described by four numbers: its mean colour minus the median colour of
# its picture, and a constant, so that a patch of plain background has a direction too. The **cost** of
# sending patch $i$ to patch $j$ is $C_{ij} = 1 - \cos(x_i, y_j)$: 0 for the same direction, 2 for the
# opposite one. The simplest answer sends every patch where its cost is least. Below, each patch of the right
# picture is painted with what was sent to it.

# %%
emojivl = load_emojivl()
two = [next(c for c in emojivl.nouns(CPU_NOUNS) if c.noun == noun) for noun in ("ladybug", "pear")]
scenes = Scenes(emojivl, two, ["noto"], canvas=48, pairs="all", seed=0)
left, right = scenes[0], scenes[3]


def pixels(scene):
    return to_patches(scene.image.transpose(2, 0, 1)[None] / 255, 8)[0]  # (36, 192)


def describe(scene):
    colour = pixels(scene).reshape(36, 3, 64).mean(2)  # (36, 3)
    return np.hstack([colour - np.median(colour, 0), np.full((36, 1), 0.08)])  # (36, 4)


def repaint(plan):
    """The patches of the left picture, mixed in the shares in which they arrive; black where none does."""
    mixed = plan.T @ pixels(left) / np.maximum(plan.sum(0)[:, None], 1e-12)  # (36, 192)
    return from_patches(mixed[None], 8, 48, 48)[0].transpose(1, 2, 0).clip(0, 1)


costs = 1 - sinkhorn.unit_np(describe(left))[0] @ sinkhorn.unit_np(describe(right))[0].T  # (36, 36)
nearest = np.zeros((36, 36))
nearest[np.arange(36), costs.argmin(1)] = 1 / 36

fig, axes = plt.subplots(1, 3, figsize=(7, 2.75), constrained_layout=True)
titles = "left", "right", "each to its cheapest"
for ax, image, title in zip(axes, (left.image, right.image, repaint(nearest)), titles, strict=True):
    ax.imshow(image)
    ax.set(title=title, xticks=[], yticks=[])
plt.show()
print(f"patches of the right picture that received anything: {(nearest.sum(0) > 0).sum()} of 36")
assert (nearest.sum(0) > 0).sum() < 30

# %% [markdown]
# What to see: black holes. Some patches are chosen many times and others never, because the rule asks the
# rows only. It is the softmax of one direction again, at temperature zero.
#
# ## Plans
#
# Let there be $M$ rows, row $i$ having a **weight** $a_i \ge 0$ to give, and $N$ columns, column $j$ having a
# weight $b_j \ge 0$ to receive, with $\sum_i a_i = \sum_j b_j = 1$. A **plan** $T$ ($M \times N$) says how
# much goes from $i$ to $j$. Its sums are its **marginals**, and they must be kept:
#
# $$T_{ij} \ge 0, \qquad \sum_j T_{ij} = a_i, \qquad \sum_i T_{ij} = b_j, \qquad
#   \text{price } \langle T, C\rangle = \sum_{ij} T_{ij} C_{ij}.$$
#
# Unless something is known, the weights are equal, $a_i = 1/M$ and $b_j = 1/N$. A price and its constraints
# are all linear in $T$. The search for the cheapest plan is therefore a **linear programme**, whose minimum
# is found at a corner of the set of plans. For equal weights and $M = N$ the corners are the $N!$
# permutations, divided by $N$. Three by three, they can all be tried.

# %%
C = np.array([[0.1, 0.4, 0.9], [0.2, 0.8, 0.9], [0.6, 0.5, 0.3]])
for order in permutations(range(3)):
    print(f"rows 0, 1, 2 to columns {order}: price {C[range(3), order].mean():.4f}")
exact = min(C[range(3), order].mean() for order in permutations(range(3)))
print(f"exact {exact:.4f}; every row to its favourite {C.min(1).mean():.4f}, but column 1 gets nothing")
assert np.isclose(exact, C[range(3), (1, 0, 2)].mean()) and exact > C.min(1).mean()
assert C.argmin(1).tolist() == [0, 0, 2]

# %% [markdown]
# Rows 0 and 1 both want column 0. Row 0 would get it cheaper, yet the best plan gives it to row 1, which
# would lose more by going elsewhere. A plan decides for all rows together.
#
# ## A little entropy
#
# Trying permutations ends at about ten, and solvers of linear programmes are slow when every pair of a batch
# needs one in every step. A corner has a second drawback: it does not move at all when costs change a little,
# and then it jumps. Both go away when plans are rewarded for being spread out. With a **temperature**
# $\varepsilon > 0$, in units of cost, and the **entropy** $H(T) = -\sum_{ij} T_{ij}\log T_{ij}$:
#
# $$F(C) = \min_T \; \langle T, C\rangle - \varepsilon H(T) \quad\text{over all plans } T.$$
#
# Each term $\varepsilon\, T_{ij} \log T_{ij}$ is strictly convex and the set of plans is convex, so there is
# exactly one minimum. To find it, give each row constraint a multiplier $f_i$ and each column constraint a
# multiplier $g_j$, and set the derivative in $T_{ij}$ to zero:
#
# $$C_{ij} + \varepsilon(\log T_{ij} + 1) - f_i - g_j = 0
#   \quad\Longrightarrow\quad T_{ij} = e^{\,u_i - C_{ij}/\varepsilon + v_j},
#   \qquad u_i = f_i/\varepsilon - 1, \quad v_j = g_j/\varepsilon.$$
#
# So the unknown is not a matrix but two vectors, the **potentials** $u$ and $v$: the plan is $K =
# e^{-C/\varepsilon}$ with its rows and its columns rescaled. Which scalings give the right sums? Solve for
# one marginal at a time. Scaling the columns spoils the rows, and scaling the rows spoils the columns again,
# but less each time. That is Sinkhorn's algorithm. That the error shrinks at least by a fixed factor a sweep,
# when all costs are finite, is a theorem that we quote and do not prove (Franklin and Lorenz 1989; Peyré and
# Cuturi 2019, section 4.2).

# %%
T = np.exp(-C / 0.3)  # (3, 3), the kernel K at ε = 0.3
for sweep in range(1, 5):
    T *= (1 / 3) / T.sum(0)  # columns
    T *= (1 / 3) / T.sum(1, keepdims=True)  # rows
    print(f"sweep {sweep}: column sums {T.sum(0)}, row sums {T.sum(1)}")
print("T =\n", T, "\n\nsinkhorn_np =\n", sinkhorn.sinkhorn_np(C, eps=0.3, iters=4))

fig, ax = plt.subplots(figsize=(5, 2.5), constrained_layout=True)
sweeps = np.arange(1, 81)
shares = {}
for eps in (0.3, 0.1, 0.03):
    wrong = [abs(sinkhorn.sinkhorn_np(C, eps=eps, iters=n).sum(0) - 1 / 3).max() for n in sweeps]
    ax.semilogy(sweeps, np.maximum(wrong, 1e-16), label=f"ε = {eps}")
    shares[eps] = 1 - wrong[9] / wrong[8], 1 - wrong[11] / wrong[10]  # what sweeps 10 and 12 take off
ax.set(xlabel="sweeps", ylabel="error of a column sum", ylim=(1e-13, 1))
ax.legend()
plt.show()
assert shares[0.3][0] > shares[0.1][0] > shares[0.03][0] and shares[0.03][0] < 0.1
assert all(abs(one - two) < 0.1 for one, two in shares.values())  # the share is fixed
assert np.abs(T.sum(1) - 1 / 3).max() < 1e-12

# %% [markdown]
# What to see: after the first sweeps the lines are straight on a logarithmic axis, so each sweep takes off a
# fixed share of the error. The lower the temperature, the smaller the share; at $\varepsilon = 0.03$ the line
# falls very slowly. The rows are solved last: their sums are exact after any number of sweeps.
#
# ## Temperature
#
# As $\varepsilon \to \infty$ only the entropy counts and $T \to a\,b^\top$: everyone sends to everyone. As
# $\varepsilon \to 0$ only the price counts and the plan becomes the cheapest corner, where there is one.

# %%
temperatures = (1.0, 0.1, 0.01)
for eps in temperatures:
    T = sinkhorn.sinkhorn_np(C, eps=eps, iters=2000)
    print(f"ε = {eps:<5} price {(T * C).sum():.4f}  entropy {-(T * np.log(T)).sum():.3f}")
print(f"the linear programme: {exact:.4f}; log 9 = {np.log(9):.3f}, log 3 = {np.log(3):.3f}")
assert abs((T * C).sum() - exact) < 1e-3 and abs(-(T * np.log(T)).sum() - np.log(3)) < 0.01

# %% [markdown]
# The price falls to the exact one, and the entropy from that of nine equal entries to that of three. On the
# pictures the temperature is something that can be seen.


# %%
def parts(scene):
    boxes = patches_inside(scene, 8)  # (2, 36): patches with their centre in the ladybug's box, the pear's
    return np.vstack([boxes, ~boxes.any(0)]).astype(float)  # the third row is the background


fig, axes = plt.subplots(2, 3, figsize=(6.2, 4.2), constrained_layout=True)
for (top, below), eps in zip(axes.T, temperatures, strict=True):
    T = sinkhorn.sinkhorn_np(costs, eps=eps, iters=500)
    top.imshow(repaint(T))
    top.set(title=f"ε = {eps}", xticks=[], yticks=[])
    heat = 36 * (parts(left)[0] @ T).reshape(6, 6)  # the share of each patch that came from the ladybug
    drawn = below.imshow(heat, cmap="viridis", vmin=0, vmax=1)
    below.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("right, repainted")
axes[1, 0].set_ylabel("from the ladybug")
fig.colorbar(drawn, ax=axes[1], label="share of the patch")
plt.show()
print("patches sent at ε = 0.01; rows: from ladybug, pear, background; columns: to the same")
sent = 36 * parts(left) @ T @ parts(right).T
print(sent)
assert sent[0, 1] + sent[1, 0] < 0.01 < 1 < sent[2, 0]

# %% [markdown]
# What to see: at $\varepsilon = 1$ every patch is nearly the average of all. At 0.01 each arrives almost
# whole, there are no holes, and the ladybug is where the ladybug is. The table agrees: nothing goes from the
# ladybug to the pear or back. Its first column shows what exact marginals cost. The right ladybug's box
# covers more patches than the left one has to send, so the rest must be filled with background.
#
# ## A trap: the kernel vanishes
#
# Written with $K$ itself, the algorithm fails at small temperatures, where all entries of $K$ underflow to 0.
# The remedy is the one of chapter 01. Taking logarithms of "column $j$ must sum to $b_j$", $\sum_i e^{u_i -
# C_{ij}/\varepsilon + v_j} = b_j$, gives
#
# $$v_j = \log b_j - \log\sum_i e^{u_i - C_{ij}/\varepsilon}, \qquad
#   u_i = \log a_i - \log\sum_j e^{v_j - C_{ij}/\varepsilon},$$
#
# and every logsumexp can be shifted by its maximum. Start from $u = 0$; a sweep is $v$, then $u$.

# %%
cost = torch.tensor(C)
for eps in (0.1, 1e-4):
    naive = mistakes.plain_kernel(cost, eps=eps, iters=100)
    print(f"ε = {eps}: largest entry of K {np.exp(-C / eps).max():.0e}, sum of the plan: ", end="")
    print(f"from K {naive.sum():.4f}, from logarithms {sinkhorn.sinkhorn(cost, eps=eps).sum():.4f}")
    assert abs(sinkhorn.sinkhorn(cost, eps=eps).sum() - 1) < 1e-9
assert naive.sum().isnan()

# %% [markdown]
# ## A trap: potentials in two units
#
# Two conventions are in use. Ours are dimensionless, $u$ and $v$; others keep $\varepsilon u$ and
# $\varepsilon v$, in units of cost. Both are right, and mixing them is an easy mistake: update
# $v \leftarrow \varepsilon\,(\log b - \mathrm{logsumexp}(u - C/\varepsilon))$ and add it undivided inside the
# next logsumexp. At $\varepsilon = 1$ nothing is wrong, and 1 is a natural number to test with.

# %%
print("potentials in units of cost, added undivided:")
for eps in (1.0, 0.5, 0.1, 0.05):
    T = mistakes.unscaled_potentials(cost, eps=eps)
    print(f"ε = {eps:<4} mass {T.sum():.4f}  row sums {T.sum(1).numpy()}  price {(T * cost).sum():.4f}")
    assert (abs(T.sum() - 1) < 1e-6) == (eps == 1)
assert (T * cost).sum() < exact

# %% [markdown]
# What to see: at every other temperature the result is no plan. Mass appears or disappears, and a price below
# the exact one is possible only because mass is missing. For this reason the law `row_sums_are_exact` asks at
# several temperatures. If you keep one check from this chapter, keep that one.
#
# ## Padding
#
# Captions and pictures of a batch differ in size and are padded. A padded token has weight 0. The library
# writes its $\log 0$ as $-10^{30}$, which is finite, because $-\infty - (-\infty)$ is not a number; for a
# padded row $u$ starts there too. To make a plan of everything and to erase the padding afterwards is not the
# same: what the padding took is gone.

# %%
keep = torch.tensor([True, True, False])
for f in (sinkhorn.sinkhorn, mistakes.masked_afterwards):
    T = f(cost, eps=0.3, col_mask=keep)
    print(f"{f.__name__}: column sums {T.sum(0).numpy()}, row sums {T.sum(1).numpy()}")
    assert (abs(T.sum() - 1) < 1e-6) == (f is sinkhorn.sinkhorn)

# %% [markdown]
# **Exercise 1** · `sinkhorn_np` · difficulty 2 of 3 · 35 minutes. Open `chapters/exercises/sinkhorn.py`,
# replace `raise Todo`, and run the next cell. **Exercise 2** · `sinkhorn` · difficulty 1 · 15 minutes: the
# same in PyTorch.

# %%
check("sinkhorn_np", "sinkhorn")

# %% [markdown]
# ## The gradient: hold the plan
#
# The plan depends on $C$ through every sweep. What is the gradient of its cost? Let $T$ be the minimiser, and
# let the costs change by $dC$ and the plan with them by $dT$. Then
#
# $$dF = \sum_{ij} T_{ij}\, dC_{ij} + \sum_{ij} \big[C_{ij} + \varepsilon(\log T_{ij} + 1)\big]\, dT_{ij}.$$
#
# At the minimum the bracket is $f_i + g_j$, as derived above. Rows and columns of $T$ keep their sums, so
# those of $dT$ are zero, and the second term is $\sum_i f_i \sum_j dT_{ij} + \sum_j g_j \sum_i dT_{ij} = 0$:
#
# $$dF = \sum_{ij} T_{ij}\, dC_{ij}, \qquad \frac{\partial F}{\partial C} = T.$$
#
# This is the **envelope theorem**: at a minimum a small move of the minimiser changes nothing, so it may be
# held fixed, and no sweep needs to be remembered. The price alone, $V = \langle T, C\rangle = F + \varepsilon
# H(T)$, is another matter: the same computation leaves $dV = \sum T\,dC + \varepsilon\,dH$. To differentiate
# $V$ through all sweeps ("unrolled") adds the gradient of the entropy. Watch what that does when the cost of
# one cell of the best plan, $C_{01}$, goes up.

# %%
t, eps = np.linspace(0, 1.4, 29), 0.1
C_t = np.repeat(C[None], len(t), 0)  # (29, 3, 3)
C_t[:, 0, 1] = t
variable = torch.tensor(C_t, requires_grad=True)
T_t = sinkhorn.sinkhorn(variable, eps=eps, iters=300)
V = (T_t * variable).sum((1, 2))
F = V + eps * (T_t * T_t.log()).sum((1, 2))  # ⟨T, C⟩ − ε H
(of_V,) = torch.autograd.grad(V.sum(), variable, retain_graph=True)
(of_F,) = torch.autograd.grad(F.sum(), variable)
lp = [min(c[range(3), order].mean() for order in permutations(range(3))) for c in C_t]

fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.8), constrained_layout=True)
axes[0].plot(t, V.detach(), label="V = ⟨T, C⟩")
axes[0].plot(t, F.detach() + eps * np.log(9), label="F, shifted by ε log 9")
axes[0].plot(t, lp, "k:", label="linear programme")
axes[1].plot(t, of_V[:, 0, 1], label="of V, unrolled")
axes[1].plot(t, of_F[:, 0, 1], label="of F, unrolled")
axes[1].plot(t, T_t.detach()[:, 0, 1], "k:", label="the entry of the plan")
axes[1].axhline(0, color="grey", linewidth=0.8)
for ax, name in zip(axes, (f"price at ε = {eps}", "derivative in that cost"), strict=True):
    ax.set(xlabel="cost of the cell (0, 1)", ylabel=name)
    ax.legend(fontsize=8)
plt.show()
print(f"F: unrolled gradient and plan differ by at most {(of_F - T_t).abs().max().item():.9f}")
print(f"V: the derivative in the cost of a cell falls to {of_V[:, 0, 1].min().item():.4f}")
assert (of_F - T_t).abs().max() < 1e-6 and of_V[0, 0, 1] > T_t[0, 0, 1] and of_V[:, 0, 1].min() < -0.01

# %% [markdown]
# What to see: on the right, the unrolled derivative of $F$ lies on the entry of the plan, as derived. That of
# $V$ starts above it and dips below zero. There, a higher cost of a bad cell lowers the price, because less
# is sent through a cell that costs more, and the blur that it caused gets less. A model that minimises $V$ is
# therefore also rewarded for costs that make the plan sharp, and not only for tokens that are close. So the
# library reports the price and sends back the plan. As $\varepsilon \to 0$ the two agree, wherever the linear
# programme has a slope at all.
#
# From costs to tokens the way is known. With $p_i$ and $q_j$ the unit rows of $x_i$ and $y_j$, $C_{ij} = 1 -
# p_i \cdot q_j$. In the language of chapter 01, $S = p\,q^\top$ and $G = \partial L/\partial S = -T$, so
#
# $$dp = -T\,q, \qquad dq = -T^\top p,$$
#
# and each row then passes through its length. A token is pulled towards the mean of those that it sends to.

# %%
rng = np.random.default_rng(0)
X, Y = rng.standard_normal((3, 4)), rng.standard_normal((5, 4))
(p, p_length), (q, q_length) = sinkhorn.unit_np(X), sinkhorn.unit_np(Y)
T = sinkhorn.sinkhorn_np(1 - p @ q.T, eps=0.1)
dX, dY = sinkhorn.unit_grad_np(p, p_length, -T @ q), sinkhorn.unit_grad_np(q, q_length, -T.T @ p)


way, h = rng.standard_normal(X.shape), 1e-5  # a slope in a random direction, the plan held
plus, minus = ((T * (1 - sinkhorn.unit_np(X + z * way)[0] @ q.T)).sum() for z in (h, -h))
detached, unrolled = ([torch.tensor(z, requires_grad=True) for z in (X, Y)] for _ in range(2))
sinkhorn.sinkhorn_cost(*detached, eps=0.1).backward()
mistakes.unrolled(*unrolled, eps=0.1).backward()
print(f"difference from the slope: {abs((dX * way).sum() - (plus - minus) / 2 / h):.9f}")
assert abs((dX * way).sum() - (plus - minus) / 2 / h) < 1e-7
for name, tokens in (("detached", detached), ("unrolled", unrolled)):
    off = max(abs(d - z.grad.numpy()).max() for d, z in zip((dX, dY), tokens, strict=True))
    print(f"largest difference from autograd, {name}: {off:.9f}")
    assert (off < 1e-9) == (name == "detached")
print(f"price {sinkhorn.sinkhorn_cost_np(X, Y, eps=0.1)[0]:.4f}, largest entry of dX {abs(dX).max():.4f}")

# %% [markdown]
# **Exercise 3** · `sinkhorn_cost_np` · difficulty 2 · 25 minutes. **Exercise 4** · `sinkhorn_cost` ·
# difficulty 1 · 10 minutes. Both in `chapters/exercises/sinkhorn.py`. An unrolled gradient does not pass.

# %%
check("sinkhorn_cost_np", "sinkhorn_cost")

# %% [markdown]
# ## Three rungs
#
# The product $p\,q^\top$ costs $MND$ multiplications, and two more of the same size come back. Each sweep
# looks at all $MN$ costs twice. Unrolled, autograd keeps two arrays of that size a sweep for the way back.
# The detached rung keeps the plan and a few arrays the size of the tokens. The fused rung keeps $(M + N) D$
# numbers, the gradients themselves, which it makes in the forward pass. Its second saving is time. A
# logsumexp needs an exponential for each entry and several passes; as long as no entry of $K$ leaves the
# range of its dtype, $v = b / (K^\top u)$ and $u = a / (Kv)$ give the same plan by products with a vector,
# and $K$ is read once for both. `minivlp/core/transport.py` decides from the range of $C/\varepsilon$ alone.
# Up to 66 in float32 it multiplies, and beyond that it takes logarithms. Float32 ends at $e^{88}$, and of
# these 88 the library lets $K$ use three quarters. The rest is left for sums and scalings.

# %% tags=["measured"]
from time import perf_counter

rungs = dict(unrolled=mistakes.unrolled, torch=sinkhorn.sinkhorn_cost, fused=sinkhorn.sinkhorn_cost_fused)
x, y = (torch.randn(384, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
best, kept = {}, {}
hooks = torch.autograd.graph.saved_tensors_hooks(lambda z: kept.setdefault(z.data_ptr(), z), lambda z: z)
print("M = N = 384, D = 64, 50 sweeps, forward and backward, the best of three")
for name, loss in rungs.items():
    times = []
    for _ in range(3):
        kept.clear()
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        start = perf_counter()
        with hooks:
            price = loss(a, b, eps=0.1, iters=50)
        price.backward()
        times.append(perf_counter() - start)
    best[name], arrays = min(times), sum(z.numel() for z in kept.values()) / 384**2
    print(f"{name:<9} price {price.item():.4f}, {arrays:6.1f} arrays of M × N kept, ", end="")
    print(f"{1000 * best[name]:4.0f} ms, {best[name] / best['unrolled']:.2f} of unrolled")
assert best["fused"] < best["unrolled"]

# %% [markdown]
# What to see: not to differentiate the solver is the first saving, not to take logarithms the second.
#
# **Exercise 5** · `sinkhorn_cost_fused` · difficulty 3 · 60 minutes. In `chapters/exercises/sinkhorn.py`.
# `minivlp.core.transport` has the solver and the gradient; your part is to run them once and hand the result
# over.

# %%
check("sinkhorn_cost_fused")

# %% [markdown]
# ## What we left out
#
# * How to come to the corner. Small temperatures need very many sweeps; chapter 15 takes another road.
# * Marginals that may be broken at a price (unbalanced transport), which would send no background to the
#   ladybug, and the debiased divergence, which is zero for equal sets.
# * A stopping rule. A fixed number of sweeps is what two rungs can be compared at.
# * The maximum of each row and each column without any marginal: chapter 16.
#
# ## Sources
#
# Cuturi 2013, algorithm 1. Peyré and Cuturi 2019 (Computational Optimal Transport), section 2.3 on
# permutations as corners and section 4.4 on logarithms. Scalings taken up by the kernel: Schmitzer 2019,
# section 3. The plan held fixed, with chapter 15's solver: Chen et al. 2020 (UNITER), Kim, Son and Kim 2021
# (ViLT).
