# %% [markdown]
# # 23 · Pictures as words
#
# **The question.** The captioner of chapter 21 sees a picture and writes words. It cannot draw: a picture
# goes in, and only words come out. Can one vocabulary hold words and pictures, so that one model with one
# loss writes either?
#
# CM3Leon (Yu et al. 2023) and Chameleon (2024) do that. A picture is cut into patches, each patch becomes
# the number of its nearest **code**, and the numbers stand in the vocabulary behind the words. From there on
# a picture is a sentence, and the model is a language model.
#
# You need: chapters 02, 05, 20 and 21; chapter 17 helps with one exercise. Plan for six hours with the
# eighteen exercises.

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
import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from minivlp import stream
from minivlp.data import Scenes, scene_pixels
from minivlp.data.probes import swapped, true_captions
from minivlp.decoder import restrict, rms_norm_np, rotary
from minivlp.evaluation.chameleon import draw, nats, psnr, write
from minivlp.masks import visible
from minivlp.models.chameleon import IMAGE_FIRST, TEXT_FIRST
from minivlp.patch import from_patches, to_patches
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.targets import spans_back, spans_to_end
from minivlp.vq import (
    kmeans,
    nearest,
    nearest_fused,
    nearest_np,
    nearest_tile,
    perplexity,
    restart_dead,
    vq,
    vq_fused,
    vq_np,
)
from tests import check

torch.set_num_threads(1)
BLUE, RED, GREEN, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#999999"
trained = load_trained(None, "chameleon")  # shipped: python -m minivlp train --model chameleon
recipe, model, tokenizer = recipe_of(trained), trained.model, trained.tokenizer
config = model.config
train = Scenes(recipe.emojivl, recipe.nouns, canvas=48, seed=0)
held = Scenes(recipe.emojivl, recipe.nouns, canvas=48, pairs="held_out", seed=1)
scenes = [held[i] for i in range(100)]  # pairs of nouns that training never showed
pixels = scene_pixels(scenes)  # (100, 3, 48, 48) in [−1, 1]


def show(ax, picture, title="", colour="black"):
    """One picture (3, H, W) in [−1, 1], drawn."""
    ax.imshow(picture.detach().clamp(-1, 1).add(1).div(2).permute(1, 2, 0), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=7, color=colour)


# %%
fig, axes = plt.subplots(2, 5, figsize=(8.5, 3.9), constrained_layout=True)
for line, scene in zip(axes, (scenes[0], scenes[5]), strict=True):
    drawn = draw(model, tokenizer, scene.caption, 5, np.random.default_rng(3))
    for ax, picture, text in zip(line, drawn, write(model, tokenizer, drawn), strict=True):
        show(ax, picture, text, GREEN if text in true_captions(scene) else RED)
    line[0].set_ylabel("\n".join(textwrap.wrap(scene.caption, 18)), fontsize=8)
plt.show()

# %% [markdown]
# What to see: on the left stands a caption of two nouns that the shipped model never saw together. It has
# drawn five pictures for it, and then it has read each of its own drawings: the sentence above a drawing is
# the caption that the same model writes for it, green where it says the same. The first caption is drawn
# well. The second asks for two white things, and the drawings are read as other white things. One model of
# four layers does both, with one softmax. The drawings are coarse, because 36 codes are all that it may use.
#
# ## The nearest code
#
# A **codebook** is a list of $K$ vectors $c_1, \dots, c_K$, the codes. A vector $z$ becomes the number of the
# code that is nearest to it. Written out,
#
# $$ \lVert z_i - c_k \rVert^2 = \lVert z_i \rVert^2 - S_{ik}, \qquad
#    S_{ik} = 2\, z_i \cdot c_k - \lVert c_k \rVert^2, $$
#
# and $\lVert z_i \rVert^2$ is the same for all codes. So the nearest code is the place of the largest entry
# in row $i$ of **one matrix**, $a_i = \arg\max_k S_{ik}$, the first one on ties. It is the matrix of chapter
# 01, with scale 2 and a bias $-\lVert c_k \rVert^2$ for each column. A small example with two numbers a
# vector:

# %%
corners = np.array([[1.0, 1.0], [4.0, 3.0], [-2.0, 1.0], [1.0, -1.0]])  # four codes
points = np.array([[2.0, 1.5], [-1.5, 1.0], [3.5, 2.0], [1.0, 0.0]])
S = 2 * points @ corners.T - (corners**2).sum(1)
print("S =", *S.tolist(), sep="\n    ")
print("nearest", nearest_np(points, corners), "   largest dot product", (points @ corners.T).argmax(1))
assert (S.argmax(1) == nearest_np(points, corners)).all() and S[3, 0] == S[3, 3]
assert 0 not in (points @ corners.T).argmax(1)
assert (((points[:, None] - corners) ** 2).sum(-1).argmin(1) == nearest_np(points, corners)).all()

grid = np.stack(np.meshgrid(np.linspace(-4, 6, 200), np.linspace(-3, 5, 160)), -1)
fig, axes = plt.subplots(1, 2, figsize=(7.5, 2.8), constrained_layout=True, sharey=True)
rules = {"nearest code": nearest_np, "largest dot product": lambda z, c: (z @ c.T).argmax(1)}
for ax, (name, rule) in zip(axes, rules.items(), strict=True):
    areas = rule(grid.reshape(-1, 2), corners).reshape(160, 200)
    ax.contourf(
        grid[..., 0],
        grid[..., 1],
        areas,
        levels=np.arange(-0.5, 4),
        colors=["#CFE3F2", "#F7D9C4", "#CDEBDD", "#EEEEEE"],
    )
    for point, k in zip(points, rule(points, corners), strict=True):
        ax.plot(*zip(point, corners[k], strict=True), color="black", linewidth=1)
    ax.plot(*points.T, "o", color=BLUE, label="vectors")
    ax.plot(*corners.T, "s", color=RED, label="codes")
    ax.set_title(name, fontsize=9)
axes[0].legend(fontsize=7)
plt.show()

# %% [markdown]
# What to see: on the left each vector goes to the code of its own area. The last one lies halfway between
# two codes, $S$ has the same number twice, and the first is taken. On the right the norm is forgotten: the
# long code $(4, 3)$ wins vectors that lie next to another one, and the code $(1, 1)$ wins nothing.
#
# The matrix has a number for each patch and each code, and one number a row is wanted. So it need not be
# held. The tile loop of chapter 17 walks over it, and the step remembers each row's best score so far and its
# place. That is the whole step:

# %%
patches = to_patches(pixels, config.patch).flatten(0, 1)  # (3600, 192)
print(inspect.getsource(nearest_tile))
tiles = []


def counted(S, scratch, rows, columns, best, ids):
    tiles.append(S.numel())
    nearest_tile(S, scratch, rows, columns, best, ids)


best = patches.new_full((len(patches),), -torch.inf)
ids = torch.zeros(len(patches), dtype=torch.int64)
bias = -model.codebook.square().sum(1)
stream.fold(counted, patches, model.codebook, best, ids, scale=2.0, bias=bias)
print(f"{len(tiles)} tiles of at most {max(tiles):,} numbers in place of {best.numel() * len(bias):,}")
assert torch.equal(ids, nearest(patches, model.codebook)) and sum(tiles) == best.numel() * len(bias)
assert len(tiles) > 1 and torch.equal(ids, nearest_fused(patches, model.codebook))

# %% [markdown]
# **Exercise 1** · `nearest_np` · difficulty 1 of 3 · 10 minutes. **Exercise 2** · `nearest_fused` ·
# difficulty 2 of 3 · 30 minutes, after chapter 17. Open `chapters/exercises/vq.py`.

# %%
check("nearest_np", "nearest_fused")

# %% [markdown]
# ## Codes without a network: k-means
#
# Which codes are good? Those that make the mean squared distance small,
#
# $$ D(a, C) = \frac{1}{M} \sum_i \lVert z_i - c_{a_i} \rVert^2. $$
#
# For fixed codes the best numbers $a$ are the nearest codes. For fixed numbers the best codes follow from
# the derivative, $\sum_{a_i = k} 2 (c_k - z_i) = 0$: each code is the mean of its vectors. **K-means** does
# the two in turn. Each half step makes $D$ smaller or leaves it, so $D$ never rises (Lloyd 1982). A code
# that no vector chose has no mean; it is moved to a vector drawn at random, which cannot make $D$ larger
# either, since nobody was using it.
#
# Here are codes of the 8-pixel patches of 300 training pictures, live. The quality of a picture made of codes
# is told as **PSNR**, $10 \log_{10}(4 / \text{mean squared error})$ decibels, since pixels here reach from
# $-1$ to $1$.

# %%
pictures = scene_pixels([train[i] for i in range(500)])
cut = to_patches(pictures[:300], config.patch).flatten(0, 1)  # (10800, 192)
curve = {}
for K in (16, 64, 256):
    for steps in (0, 1, 2, 4, 8):
        codes = kmeans(cut, K, np.random.default_rng(0), steps)
        curve[K, steps] = float((cut - codes[nearest(cut, codes)]).square().mean())
error = (patches - codes[nearest(patches, codes)]).square().mean().item()
by_kmeans, used = 10 * math.log10(4 / error), perplexity(nearest(patches, codes), 256)
print(f"256 codes after 8 steps: PSNR {by_kmeans:.1f} dB on held-out pictures, perplexity {used:.0f}")
assert by_kmeans > 21 and used > 120
fig, ax = plt.subplots(figsize=(5, 2.2), constrained_layout=True)
for K, colour in ((16, GREY), (64, YELLOW), (256, BLUE)):
    values = [curve[K, steps] for steps in (0, 1, 2, 4, 8)]
    assert values == sorted(values, reverse=True)
    ax.plot((0, 1, 2, 4, 8), values, ".-", color=colour, label=f"K = {K}")
ax.set(xlabel="steps of k-means", ylabel="mean squared error", ylim=(0, None))
ax.legend(fontsize=8)
plt.show()

# %%
numbers = model.tokenise(pixels) - config.begin - 1  # (100, 36)
order = torch.bincount(numbers.flatten(), minlength=256).argsort(descending=True)
sheet = from_patches(model.codebook[order][None], config.patch, 128, 128)[0]
fig, axes = plt.subplots(1, 4, figsize=(9, 2.5), constrained_layout=True)
show(axes[0], sheet, "the shipped codebook, by use")
show(axes[1], pixels[0], "a picture")
axes[2].imshow(np.ones((6, 6, 3)))
for place, number in enumerate(numbers[0].tolist()):
    axes[2].text(place % 6, place // 6, number, ha="center", va="center", fontsize=7)
axes[2].set(xticks=[], yticks=[])
axes[2].set_title("as 36 words", fontsize=7)
show(axes[3], model.paint(model.tokenise(pixels[:1]))[0], "painted from them")
plt.show()
words = 36 * math.log2(config.codes)
print(f"{words:.0f} bits in place of {48 * 48 * 24:,}; PSNR {psnr(model, pixels):.1f} dB")
painted = model.paint(model.tokenise(pixels))
assert torch.equal(model.tokenise(painted), model.tokenise(pixels)) and psnr(model, pixels) >= 21.5

# %% [markdown]
# What to see: the error falls with each step and with more codes. The **perplexity** is the exponential of
# the entropy of the numbers: how many codes are in use, if all were used alike. The codebook shows
# backgrounds first and pieces of objects later. A picture is now a sentence of 36 words, a hundredth of its
# bits, and the round trip through pixels gives the same sentence again, as the assertion says.
#
# **Exercise 3** · predict before you run · 5 minutes. With $K = 1$, what does a painted picture look like,
# and what is its mean squared error? Compute it with `kmeans(cut, 1, …, 1)`.
#
# <details><summary>Answer</summary>
#
# The only code is the mean of all patches, so every picture is the same grey tile 36 times. Its error is the
# variance of patches round their mean: `(cut - cut.mean(0)).square().mean()`.
# </details>
#
# **Exercise 4** · `kmeans` · difficulty 2 of 3 · 25 minutes. Open `chapters/exercises/vq.py`.

# %%
check("kmeans")

# %% [markdown]
# ## Codes that learn
#
# K-means compares pixels. Larger models learn the vectors as well: an **encoder** makes $z$ from the picture,
# a **decoder** paints from the chosen codes, and both are trained for small error. That is the VQ-VAE (van
# den Oord et al. 2017). Two things stand in the way of a gradient.
#
# *The argmax.* The number $a_i$ does not move when $z_i$ moves a little, so its derivative is zero, and the
# encoder would learn nothing. The **straight-through** rule pretends that $q_i = c_{a_i}$ were $z_i$: the
# gradient $G_i$ that arrives at $q_i$ is handed to $z_i$ as it is. In code, $q = c + (z - z)$, where $c$ and
# the second $z$ are held fixed: the value is the code, the derivative by $z$ is one.
#
# *The codes.* With that rule no gradient reaches them. So there is a loss of their own. With $\text{sg}$, the
# **stop gradient**, which has the value of its argument and derivative zero,
#
# $$ L = \frac{1}{MD} \sum_i \Bigl[ \lVert \text{sg}\, z_i - c_{a_i} \rVert^2
#    + \beta\, \lVert z_i - \text{sg}\, c_{a_i} \rVert^2 \Bigr]. $$
#
# The first term moves the codes to their vectors, as k-means does. The second ties the encoder to its codes.
# With $d_i = z_i - c_{a_i}$ and $g$ the gradient that arrives at $L$, the derivatives are
#
# $$ \frac{\partial}{\partial z_i} = \frac{2 \beta g}{MD}\, d_i + G_i, \qquad
#    \frac{\partial}{\partial c_k} = -\frac{2 g}{MD} \sum_{a_i = k} d_i . $$
#
# A code that nobody chose has gradient zero. Remember that sentence.

# %%
rng = np.random.default_rng(0)
z, codes, G = rng.normal(size=(6, 3)), rng.normal(size=(4, 3)), rng.normal(size=(6, 3))
(quantised, loss), (dz, dcodes) = vq_np(z, codes, 0.25, (G, 1.0))
leaves = [torch.from_numpy(a).requires_grad_() for a in (z, codes)]
(q, told) = vq(*leaves, beta=0.25)
((q * torch.from_numpy(G)).sum() + told).backward()
for by_hand, leaf in zip((dz, dcodes), leaves, strict=True):
    assert np.allclose(by_hand, leaf.grad)
far = vq_np(z, np.vstack([codes, 100 + codes]), 0.25, (0 * G, 1.0))[1][1]
print("gradients of four codes, then of four that lie far away:", np.abs(far).sum(1).round(3))
assert not far[4:].any() and far[:4].any()

# %% [markdown]
# ## The most copied mistake
#
# In much public code $\beta$ stands on the first term: taming-transformers had it so (issues 46 and 57; its
# quantiser still has `legacy=True` for weights that were trained with it), deep-vector-quantization (issue
# 2), 1d-tokenizer (pull request 120), and the quantiser of Chameleon in transformers, which
# `tests/test_vq.py` compares with ours. Why did nobody see it?

# %%


def beta_on_codebook(z, codes, beta=0.25):
    c = codes[nearest(z, codes)]
    loss = (z - c.detach()).square().mean() + beta * (z.detach() - c).square().mean()
    return c.detach() + (z - z.detach()), loss


found = {}
for name, function, beta in (
    ("ours", vq, 0.25),
    ("mistake", beta_on_codebook, 0.25),
    ("ours, β = 4", vq, 4.0),
):
    leaves = [torch.from_numpy(a).requires_grad_() for a in (z, codes)]
    loss = function(*leaves, beta)[1]
    loss.backward()
    found[name] = loss.item(), *(leaf.grad for leaf in leaves)
    pulls = "   ".join(
        f"{what} {g.norm():.3f}" for what, g in zip(("on z", "on codes"), found[name][1:], strict=True)
    )
    print(f"{name:<12} loss {loss:.4f}   pull {pulls}")
assert math.isclose(found["ours"][0], found["mistake"][0])
assert torch.allclose(found["mistake"][1], 4 * found["ours"][1])
quarter = [pull / 4 for pull in found["ours, β = 4"][1:]]
assert all(torch.allclose(a, b) for a, b in zip(found["mistake"][1:], quarter, strict=True))

# %% [markdown]
# What to see: both losses are the same number, $(1 + \beta)$ times the mean of $d^2$. No curve of the loss
# shows the mistake; a law about gradients does, here `each_term_moves_one_side`. The pull on the encoder is
# four times too strong, and that on the codes is a quarter of what it should be.
#
# **Exercise 5** · derive · 10 minutes. Show that the mistake with $\beta$ is our loss with $1/\beta$, times
# $\beta$. So which $\beta$ did the models use whose papers say 0.25?
#
# <details><summary>Answer</summary>
#
# $\beta \lVert \text{sg} z - c \rVert^2 + \lVert z - \text{sg} c \rVert^2 = \beta \bigl( \lVert \text{sg} z -
# c \rVert^2 + \frac{1}{\beta} \lVert z - \text{sg} c \rVert^2 \bigr)$: they used 4, and a loss a quarter as
# heavy beside the error of the picture. They worked nevertheless: van den Oord et al. report that results
# did not vary for $\beta$ between 0.1 and 2, and deep-vector-quantization converged "to about the same
# result" after the repair. Exercise 8 measures it here.
# </details>
#
# **Exercise 6** · `vq_np` · difficulty 2 of 3 · 25 minutes. **Exercise 7** · `vq` · difficulty 2 of 3 · 15
# minutes. Open `chapters/exercises/vq.py`.

# %%
check("vq_np", "vq")

# %% [markdown]
# ## Collapse
#
# Now a small VQ-VAE with 256 codes, live: two convolutions, the nearest code, two convolutions back. It is
# trained four times, with two seeds, each without and with **restarts**: after each step, codes that no
# vector chose are put on vectors of the batch (Łańcucki et al. 2020).

# %%
WIDTH, K = 32, 256


def trained_vqvae(restart, seed, steps=150):
    """Perplexity at each step, which code won the first step, and the parts."""
    torch.manual_seed(seed)
    some = np.random.default_rng(seed)
    encoder = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 2, 2))
    decoder = nn.Sequential(
        nn.ConvTranspose2d(WIDTH, WIDTH, 2, 2), nn.ReLU(), nn.ConvTranspose2d(WIDTH, 3, 4, 4)
    )
    codes = nn.Parameter(torch.randn(K, WIDTH))
    lengths = codes.detach().norm(dim=1)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), codes], lr=3e-3)
    curve, first = [], None
    for _ in range(steps):
        x = pictures[torch.from_numpy(some.integers(len(pictures), size=16))]
        z = encoder(x).permute(0, 2, 3, 1).flatten(0, 2)  # (16 · 36, WIDTH)
        quantised, loss = vq_fused(z, codes)
        y = decoder(quantised.unflatten(0, (len(x), 6, 6)).permute(0, 3, 1, 2))
        adam.zero_grad()
        (loss + (y - x).square().mean()).backward()
        adam.step()
        ids = nearest_fused(z, codes)
        curve.append(perplexity(ids, K))
        if first is None:
            first = int((lengths < lengths[ids.mode().values]).sum()), z.detach().norm(dim=1).mean().item()
        if restart:
            codes.data.copy_(restart_dead(codes, ids, z, some))
    with torch.no_grad():
        z = encoder(pixels).permute(0, 2, 3, 1).flatten(0, 2)
        ids = nearest(z, codes)
        y = decoder(codes[ids].unflatten(0, (len(pixels), 6, 6)).permute(0, 3, 1, 2))
    error = (y - pixels).square().mean().item()
    return curve, perplexity(ids, K), 10 * math.log10(4 / error), y[0], first, float(lengths.mean())


runs = {(restart, seed): trained_vqvae(restart, seed) for restart in (False, True) for seed in (0, 1)}
for (restart, seed), (_, used, quality, _, _, _) in runs.items():
    print(f"restarts {restart!s:<5} seed {seed}: perplexity {used:6.1f}, PSNR {quality:.1f} dB, held-out")
dead, alive = ([runs[restart, seed] for seed in (0, 1)] for restart in (False, True))
assert max(run[1] for run in dead) <= 4 and np.mean([run[1] for run in alive]) >= 150
assert min(run[2] for run in alive) > max(run[2] for run in dead) + 2
assert by_kmeans > max(run[2] for run in alive)
for shorter, length in (run[4] for run in dead):
    print(f"at the first step: vectors of length {length:.2f}, codes of {dead[0][5]:.2f};", end=" ")
    print(f"{shorter} codes of {K} are shorter than the winner")
    assert length < dead[0][5] / 2 and shorter < 10

# %%
fig, axes = plt.subplots(1, 4, figsize=(9, 2.3), constrained_layout=True, width_ratios=[1.6, 1, 1, 1])
for (restart, seed), run in runs.items():
    name = ("restarts" if restart else "none") if seed == 0 else None
    axes[0].plot(run[0], color=GREEN if restart else RED, label=name, linewidth=1)
axes[0].set(xlabel="step", ylabel="perplexity", yscale="log")
axes[0].legend(fontsize=7)
show(axes[1], pixels[0], "a held-out picture")
show(axes[2], dead[0][3], "one code for all", RED)
show(axes[3], alive[0][3], "with restarts", GREEN)
plt.show()

# %% [markdown]
# What to see: without restarts one or two codes of 256 win all vectors, and all patches look the same. The
# encoder's vectors begin near zero, and codes drawn from a normal distribution of 32 numbers are about
# $\sqrt{32}$ long. In $S_{ik} = 2 z_i \cdot c_k - \lVert c_k \rVert^2$ the second term decides, so nearly the
# shortest code wins everything. Only a chosen code has a gradient: the winner moves to the vectors, and the
# others stay where they are for ever. Compare the qualities: the k-means of pixels paints held-out pictures
# better than this small VQ-VAE, and it trains no network. So the shipped Chameleon has k-means codes.
#
# **Exercise 8** · ablate · 20 minutes. Change one thing at a time in `trained_vqvae`, without restarts: (a)
# codes that start on 256 vectors of the first batch; (b) codes of a tenth of the length; (c) $\beta$ on the
# wrong term, with restarts. Predict perplexity and PSNR first.
#
# <details><summary>Answer</summary>
#
# (a) Every code begins where vectors are, so many are chosen at the first step, and many of those stay alive:
# fewer than with restarts, and far more than with random codes. (b) Short codes lie among the vectors, so
# more of them win something: it is better than nothing and worse than (a). (c) As many codes are in use as
# with ours, and the PSNR is somewhat lower after so few steps, since the codes follow their vectors at a
# quarter of the pace.
# </details>
#
# ## One vocabulary
#
# The rest is a language model. The ids of the codes stand behind those of the words, with one more id,
# [BOI], for the beginning of an image. A pair of caption and picture is one row of ids:

# %%
text_ids, _, text_mask = (torch.from_numpy(a) for a in tokenizer.batch([scenes[0].caption]))
image_ids = model.tokenise(pixels[:1])
row = torch.cat([text_ids, model.with_begin(image_ids)], 1)[0].tolist()
names = [*tokenizer.tokens, "[BOI]", *(f"code {k}" for k in range(config.codes))]
print(" ".join(names[i] for i in row[:14]), "…", f"{len(row)} tokens")
print(f"ids 0 to {config.begin - 1} are words, {config.begin} is [BOI], then {config.codes} codes")
assert len(names) == config.vocab_size and row[len(text_ids[0])] == config.begin

lengths = (4, 5)  # four words; [BOI] and four codes
text_first, image_first = (visible(lengths, table, (0, 1)) for table in (TEXT_FIRST, IMAGE_FIRST))
turned = [*range(4, 9), *range(4)]
panels = {"text first": text_first, "image first": image_first}
panels["image first, rows in its order"] = image_first[np.ix_(turned, turned)]
fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.5), constrained_layout=True)
for ax, (name, mask), edge in zip(axes, panels.items(), (4, 4, 5), strict=True):
    ax.imshow(np.where(mask, 0.35, 0.0), cmap="Blues", vmin=0, vmax=0.5)
    ax.axhline(edge - 0.5, color="black", linewidth=0.8)
    ax.axvline(edge - 0.5, color="black", linewidth=0.8)
    ticks = ["w1", "w2", "w3", "w4", "BOI", "c1", "c2", "c3", "c4"]
    ticks = ticks if edge == 4 else [ticks[i] for i in turned]
    ax.set_xticks(range(9), ticks, fontsize=6, rotation=90)
    ax.set_yticks(range(9), ticks, fontsize=6)
    ax.set_title(name, fontsize=9)
plt.show()
assert (text_first == np.tri(9, dtype=bool)).all()
assert (image_first[np.ix_(turned, turned)] == np.tri(9, dtype=bool)).all()

# %% [markdown]
# What to see: the two orders are two tables over one layout (chapter 20). With the text first the codes see
# the words, and the model *draws*. With the image first the words see the codes, and the model *captions*.
# The third panel shows the second one with its rows in the order of writing: a plain triangle. Training uses
# both tables in every batch. The loss is
#
# $$ \tfrac12 \cdot \text{next words} + \text{next codes} + 10^{-5} (\log Z)^2, $$
#
# each the mean over its own tokens, for a picture has 36 codes and a caption about seven words. The last
# term is explained below. One pass in each order gives four numbers, by the chain rule of chapter 21:

# %%
captions = [scene.caption for scene in scenes]
drawing, captioning = (nats(model, tokenizer, captions, pixels, first) for first in (False, True))
table = {
    "caption": drawing[:, 0],
    "picture given caption": drawing[:, 1],
    "picture": captioning[:, 1],
    "caption given picture": captioning[:, 0],
}
for name, values in table.items():
    print(f"−log p({name:<21}) {values.mean():6.2f} nats")
one, two = drawing.sum(1).mean(), captioning.sum(1).mean()
print(f"caption, then picture {one:.2f}; picture, then caption {two:.2f}")
told = [
    table[a].mean() - table[b].mean()
    for a, b in (("caption", "caption given picture"), ("picture", "picture given caption"))
]
print(f"the picture tells {told[0]:.2f} nats of its caption, the caption {told[1]:.2f} of its picture")
assert table["caption given picture"].mean() < 5 and min(told) > 3 and abs(one - two) < 0.05 * one

# %% [markdown]
# **Exercise 9** · explain · 10 minutes. Both orders are factorisations of one probability of a pair, so the
# two sums should be equal, and so should the two numbers of the last line. Why are they not quite?
#
# <details><summary>Answer</summary>
#
# They would be for the true distribution, and the two differences would be the information between caption
# and picture (chapter 22). The model has learned two approximations with the same weights, each with an
# excess of its own, and nothing in the loss asks them to agree. The difference of the sums is the difference
# of the two excesses.
# </details>
#
# ## The block of a decoder
#
# The block is the one of chapter 05 with four parts exchanged.
#
# **RMSNorm.** LayerNorm subtracts the mean and divides by the deviation. RMSNorm divides only:
#
# $$ y = w \circ \hat x, \qquad \hat x = r x, \qquad
#    r = \bigl( \tfrac1D \lVert x \rVert^2 + \varepsilon \bigr)^{-1/2}. $$
#
# For the gradient, $\partial r / \partial x = -r^3 x / D$. With $g = w \circ G$ the product rule gives
#
# $$ dx = r g - \frac{r^3}{D} (g \cdot x)\, x = r \bigl( g - \hat x\, \text{mean}(g \circ \hat x) \bigr). $$
#
# For small $\varepsilon$ the length of $x$ does not count, so $dx$ must be perpendicular to $x$. The next
# cell says so.

# %%
x, weight, G = rng.normal(size=(4, 8)), rng.normal(size=8), rng.normal(size=(4, 8))
_, (dx, _) = rms_norm_np(x, weight, 1e-12, G)
same = rms_norm_np(1000 * x, weight, 1e-12)[0] - rms_norm_np(x, weight, 1e-12)[0]
print(f"x · dx is at most {abs((x * dx).sum(1)).max():.1e},", end=" ")
print(f"rms_norm(1000 x) − rms_norm(x) at most {abs(same).max():.1e}")
assert abs((x * dx).sum(1)).max() < 1e-9 and abs(same).max() < 1e-9

# %% [markdown]
# **Rotary positions.** A position has to enter the score of a query at $m$ and a key at $n$. Take two entries
# of each as a complex number and turn it by an angle in proportion to its position: $q e^{i m \omega}$, $k
# e^{i n \omega}$. Their product in the plane is
#
# $$ \text{Re} \bigl( q e^{i m \omega} \, \overline{k e^{i n \omega}} \bigr)
#    = \text{Re} \bigl( q \bar k\, e^{i (m - n) \omega} \bigr), $$
#
# which depends on $m - n$ alone, and turning changes no length. There are $d/2$ such planes, with $\omega_i =
# \theta^{-2i/d}$: the first turns by one radian a token, the last hardly at all.

# %%
q, k = (torch.from_numpy(rng.normal(size=(1, 1, 1, 16))) for _ in range(2))
turned = rotary(q.expand(1, 1, 8, 16), torch.arange(8))[0, 0]  # (8, 16)
fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 2.5), constrained_layout=True, width_ratios=[1, 2])
for i, colour in ((0, BLUE), (2, RED)):
    left.plot(turned[:, i], turned[:, i + 8], "o-", color=colour, markersize=4, label=f"plane {i}")
left.set_aspect("equal")
left.legend(fontsize=6, loc="center")
gaps, curves = torch.arange(-30, 31), []
for m, style in ((0, "-"), (100, "--"), (5000, ":")):
    here = rotary(q, torch.tensor([m]))
    scores = (here * rotary(k.expand(1, 1, 61, 16), m - gaps)).sum(-1)[0, 0]
    curves.append(scores)
    right.plot(gaps, scores, style, label=f"m = {m}", linewidth=3 - len(curves) / 2)
right.set(xlabel="m − n", ylabel="score of q at m, k at n")
right.legend(fontsize=7)
plt.show()
assert all(torch.allclose(scores, curves[0], atol=1e-9) for scores in curves)
assert torch.allclose(turned.norm(dim=1), q.norm())

# %% [markdown]
# What to see: on the left one query at eight places, in a plane that turns fast and one that turns slowly. On
# the right the three curves lie on one another: the score is a function of $m - n$.
#
# **Exercise 10** · `rms_norm_np` · difficulty 2 of 3 · 25 minutes. **Exercise 11** · `rotary_np` · difficulty
# 2 of 3 · 25 minutes. Open `chapters/exercises/decoder.py`.

# %%
check("rms_norm_np", "rotary_np")

# %% [markdown]
# **The gated MLP** is $W_{\text{down}} \bigl( \text{silu}(W_{\text{gate}} x) \circ W_{\text{up}} x \bigr)$
# with $\text{silu}(u) = u / (1 + e^{-u})$: one product decides how much of the other passes (Shazeer 2020).
#
# **QK-norm.** With two kinds of tokens in one softmax the Chameleon team saw norms grow until training
# broke down: a kind that wants to be heard raises its scores, and the other answers. QK-norm puts a
# LayerNorm on each head's queries and keys, before they are turned. A normed vector of $d$ numbers has
# length $\sqrt d$, so by Cauchy and Schwarz no score $q \cdot k / \sqrt d$ is above $\sqrt d$ (times the
# learned scales), however large the weights grow. Multiply $W_q$ of the shipped model's first block and
# look at its scores:

# %%
block = model.blocks[0]


def largest_score(factor, normed):
    """The largest |q · k| / √d of the first block, with W_q multiplied by a factor."""
    with torch.no_grad():
        states = block.norm1(model.word(torch.tensor([row])))
        q, k, _ = block.qkv(states).chunk(3, -1)
        heads = [t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in (factor * q, k)]
        if normed:
            heads = [norm(t) for norm, t in zip((block.q_norm, block.k_norm), heads, strict=True)]
        return (heads[0] @ heads[1].mT).abs().max().item() / math.sqrt(heads[0].shape[-1])


print("W_q times   without the norm   with it")
for factor in (1, 10, 100):
    print(f"{factor:>9} {largest_score(factor, False):>18.1f} {largest_score(factor, True):>9.2f}")
assert math.isclose(largest_score(100, False), 100 * largest_score(1, False), rel_tol=1e-4)
assert math.isclose(largest_score(100, True), largest_score(1, True), rel_tol=0.02)

# %% [markdown]
# **The z-loss.** QK-norm bounds the scores inside. The last softmax, over words and codes, has a looser end:
# adding one number to all scores changes no probability, so the loss is flat in that direction and nothing
# keeps the scores from drifting away. That is harmless for real numbers and not for bfloat16, which has
# eight bits of precision. The term $10^{-5} (\log Z)^2$, with $Z$ the sum of exponentials, pulls $\log Z$
# towards zero. Its slope by score $v$ is $2 \cdot 10^{-5} \log Z \cdot p_v$, and it costs hardly anything.

# %%
scores = torch.tensor([0.0, 0.9])
for drift in (0.0, 300.0):
    low = (scores + drift).to(torch.bfloat16)
    print(f"scores {low.float().tolist()}, probabilities {low.float().softmax(0).numpy().round(3)}")
assert (scores + 300).to(torch.bfloat16)[0] == (scores + 300).to(torch.bfloat16)[1]
with torch.no_grad():
    text_leads = torch.zeros(1, dtype=torch.bool)
    log_z = model.scores(model.encode(text_ids, text_mask, image_ids, text_leads)).logsumexp(-1)[0]
print(f"log Z of the shipped model lies between {log_z.min():.1f} and {log_z.max():.1f}")
assert log_z.abs().max() < 50

# %% [markdown]
# **Exercise 12** · derive · 10 minutes. LayerNorm without scale and shift makes $\lVert q \rVert = \sqrt d$.
# Where is the largest score reached, and what is the largest ratio of two attention weights of one row for
# $d = 32$? Is a sharp look still possible?
#
# <details><summary>Answer</summary>
#
# At $k = q$, with $d / \sqrt d = \sqrt d$. The smallest is $-\sqrt d$, so two weights differ by at most
# $e^{2 \sqrt{32}}$, more than eighty thousand. A sharp look is possible, an infinitely sharp one is not; the
# learned scales can widen the range, at a price that a weight decay sees.
# </details>
#
# ## Only what is allowed
#
# One softmax over all means that a code may come where a word should stand. How much probability is lost to
# the other kind? And how is it taken away?

# %%
with torch.no_grad():
    states = model.encode(text_ids, text_mask, image_ids, ~text_leads)
    at_words = model.scores(states[0, : len(text_ids[0]) - 1])  # of the next word
word = torch.arange(config.vocab_size) < config.begin
astray = at_words.softmax(-1)[:, ~word].sum(1)
only = restrict(at_words, word)
print(f"probability of a code in place of a word: {astray.min():.1e} to {astray.max():.1e};", end=" ")
print("restricted:", only.exp()[:, ~word].sum().item())
assert (astray > 0).all() and not only.exp()[:, ~word].any()
assert torch.allclose(only.exp().sum(1), torch.ones(len(only)))

kept = at_words.masked_fill(~word, -torch.inf)
public = torch.where(kept != -torch.inf, kept, at_words)  # as a public processor ends
print("a public processor changes nothing at all:", torch.equal(public, at_words))
assert torch.equal(public, at_words)

# %% [markdown]
# What to see: `restrict` writes $-\infty$ over what is not allowed *before* the softmax, so the probability
# is exactly 0 and the others sum to one. Small is not enough: a code in a caption breaks whoever reads it,
# and a caption's nats would be charged for codes that nobody would write. The last lines do what
# `AllowOnlyTokensInBatchIndexRangeLogitsProcessor` of the released Chameleon does: it masks the scores, and
# a `where` then puts every masked score back. It is constrained decoding that constrains nothing, and it
# raises no error.
#
# The released model decodes by three rules: text until [BOI]; then exactly 1024 codes; then the end mark.
# Ours are the same with 36. Both are a table `allowed` with a row for each place, given to `decode`.
#
# **Exercise 13** · `restrict` · difficulty 1 of 3 · 10 minutes. Open `chapters/exercises/decoder.py`.
#
# **Exercise 14** · break and repair · 15 minutes. Subtract 10,000 from the other scores in place of writing
# $-\infty$, as much code does, and find scores for which a forbidden token is drawn. Which law tells?
#
# <details><summary>Answer</summary>
#
# Scores that lie more than 10,000 apart, `[0, 20000]` with the second one forbidden: it keeps 10,000 and
# wins. `outside_is_exactly_zero` asks with such scores, and it asks for $-\infty$, not for a large number.
# </details>

# %%
check("restrict")

# %% [markdown]
# ## Guidance
#
# A drawing can be made to follow its caption more closely than probability asks. Let $l$ be the scores of the
# next code after the caption and $l_0$ those without one; the model knows both. Classifier-free **guidance**
# (Ho and Salimans 2022) draws from
#
# $$ l_s = l_0 + s (l - l_0), \qquad p_s \propto p_0 \Bigl( \frac{p}{p_0} \Bigr)^{s}. $$
#
# $p / p_0$ says how much likelier the caption makes a code, and $s$ is the power to which this is raised.
# With $s = 1$ it is the model, with $s = 0$ the model that was told nothing.
#
# **Exercise 15** · predict before you run · 5 minutes. How often will the model read its own drawing as the
# caption for $s = 0$? For $s = 1$, 2 and 4? What is lost as $s$ grows?

# %%
asked, SCALES, EACH = [scenes[i] for i in (0, 1, 5, 9)], (0.0, 1.0, 2.0, 4.0), 12
fig, axes = plt.subplots(len(SCALES), 8, figsize=(8.5, 4.6), constrained_layout=True)
followed, spread = [], []
for line, scale in zip(axes, SCALES, strict=True):
    hits = []
    for scene in asked:
        drawn = draw(model, tokenizer, scene.caption, EACH, np.random.default_rng(0), scale)
        hits += [text in true_captions(scene) for text in write(model, tokenizer, drawn)]
        if scene is asked[0]:
            spread.append(perplexity(model.tokenise(drawn).flatten() - config.begin - 1, config.codes))
            for ax, picture in zip(line, drawn, strict=False):
                show(ax, picture)
            line[0].set_ylabel(f"s = {scale:g}", fontsize=8)
    followed.append(np.mean(hits))
plt.show()
print(f"the first row of pictures was drawn for “{asked[0].caption}”, like all others")
for scale, share, used in zip(SCALES, followed, spread, strict=True):
    print(f"s = {scale:g}: {share:.2f} of the drawings are read as their caption,", end=" ")
    print(f"perplexity of the codes {used:.0f}")
assert followed[0] < 0.05 < followed[1] < followed[2] and spread[-1] < spread[1]

# %% [markdown]
# <details><summary>Answer</summary>
#
# With $s = 0$ the caption is not read, a drawing shows any two things, and two of 3,968 captions would be
# right. With $s = 1$ some are, with $s = 2$ more. What is lost is variety: the end of each line says how many
# codes the drawings of the first caption use.
# </details>
#
# What to see: the rows are drawn with the same random numbers. Guidance makes the objects clearer and the
# pictures more alike. The judge here is the model itself, so these shares say that drawing and reading agree,
# not that the drawings are good; a model that reads wrongly in the same way as it draws would be content. The
# drawings may be judged by eye.
#
# ## The picture judges the caption
#
# A model that gives every picture a probability can be asked the question of chapter 21 the other way round:
# after which caption is this picture likelier, after its own, or after the same words with the nouns
# exchanged? Both sides have the same picture, so what is hard to draw in it costs the same
# under both captions.

# %%
false = [swapped(scene) for scene in scenes]
others = captions[1:] + captions[:1]
gap = nats(model, tokenizer, false, pixels, False)[:, 1] - drawing[:, 1]
stranger = nats(model, tokenizer, others, pixels, False)[:, 1] - drawing[:, 1]
back = nats(model, tokenizer, false, pixels, True)[:, 0] - captioning[:, 0]
print(f"nouns exchanged: {np.mean(gap > 0):.2f} right by log p(picture | caption),", end=" ")
print(f"{np.mean(back > 0):.2f} by log p(caption | picture)")
assert np.mean(gap > 0) >= 0.90 and np.mean(back > 0) >= 0.90
fig, ax = plt.subplots(figsize=(6.5, 2), constrained_layout=True)
for values, name, colour in ((gap, "nouns exchanged", RED), (stranger, "another caption", BLUE)):
    ax.hist(values, bins=30, range=(-10, 40), alpha=0.6, color=colour, label=name)
ax.axvline(0, color="black", linewidth=0.8)
ax.set(xlabel="nats by which the true caption makes the picture likelier", ylabel="pictures")
ax.legend(fontsize=8)
plt.show()
print(f"median gain over the exchanged {np.median(gap):.1f} nats,", end=" ")
print(f"over another caption {np.median(stranger):.1f}")
assert np.median(stranger) > np.median(gap) > 0

# %% [markdown]
# What to see: nearly all pictures prefer their caption. The contrast of chapter 21 stood near one half. To
# draw a left object at all, the model must use who is left at the first code that shows it, in every
# picture. That is the same reason as for captions: the question comes up in every row. Chapter 24 turns
# such probabilities into a classifier.
#
# ## Filling a hole: CM3
#
# A model that writes from left to right cannot fill a hole in the middle: at the hole it has seen one side.
# CM3 (Aghajanyan et al. 2022) moves the hole. A span is cut out, a mark is left in its place, and the span is
# written at the end, behind the mark once more. There the causal model has read both sides. `spans_to_end` of
# chapter 20 does it, `spans_back` undoes it:

# %%
document, marks, end = np.array(row[:14]), [901, 902], 900  # ids that no token has
extra = {901: "⟨m0⟩", 902: "⟨m1⟩", 900: "⟨end⟩"}
for spans in ([(2, 3)], [(2, 3), (9, 12)], [(4, 4)]):
    moved = spans_to_end(document, spans, marks, end)
    print(spans, " ".join(extra.get(i) or names[i].replace("code ", "c") for i in moved.tolist()))
    assert np.array_equal(spans_back(moved, marks, end), document) and len(moved) == 14 + 3 * len(spans)

lost = document.tolist()
word_lost, lost[4] = lost[4], marks[0]  # an empty span that overwrites a word, as in the public code
print("an empty span that takes its place from a word loses:", names[word_lost])
assert word_lost not in lost and len(spans_to_end(document, [(4, 4)], marks, end)) == 17

# %% [markdown]
# What to see: in the second line a hole is in the words and another in the picture, and both are filled at
# the end. The third has an empty span: it has a mark, nothing behind it, and the document is whole. In the
# code that was published with CM3 such a span *replaces* a token by the mark, and what is appended is
# empty, so a word is lost (metaseq, `cm3_dataset.py`, where several spans are drawn). Cutting the result to
# a fixed length loses the last end mark besides, and the model never learns where a span ends there.
#
# **Exercise 16** · `spans_back` · difficulty 2 of 3 · 25 minutes. Open `chapters/exercises/targets.py`.
#
# **Exercise 17** · explain · 10 minutes. Show that the two orders of this chapter are CM3 with one span each.
# Which one?
#
# <details><summary>Answer</summary>
#
# Take the document [text; image]. With the whole picture as the span it is text, mark, mark, picture, end:
# text first. With the whole text as the span it is mark, picture, mark, text, end: image first. Drawing and
# captioning are holes as large as a side; chapter 22's `hide_side` is their masked sister.
# </details>
#
# **Exercise 18** · ablate · 15 minutes and the time of two runs. Train the model twice with `python -m
# minivlp train --model chameleon --steps 600`, once as it is and once with `image_first` at 0 in
# `minivlp/recipes/chameleon.py`, which never captions. Compare `axis_drawn` and `order_drawn` in their
# tables. Does learning to caption help drawing at equal steps? Predict it before you look.

# %%
check("spans_back")

# %% [markdown]
# ## The answer
#
# One vocabulary can hold both. One model with one softmax drew, captioned and judged, and what differs
# between the three is a table of who sees whom and a table of what is allowed. The price is the codebook:
# nothing finer than its codes can be drawn or read.
#
# ## Bugs of public code
#
# * $\beta$ on the codebook's term: taming-transformers, issues 46 and 57; deep-vector-quantization, issue 2;
#   1d-tokenizer, pull request 120; transformers' Chameleon quantiser. The cell that prints pulls finds it.
# * A processor that allows only some tokens and lets all pass: facebookresearch/chameleon,
#   `logits_processor.py`. The cell of probability 0 finds it.
# * An empty span that loses a word, and an end mark that is cut off: facebookresearch/metaseq,
#   `cm3_dataset.py`. The way back finds both.
# * Picture logits at −3.4e38 in every forward pass, in training too: transformers'
#   `ChameleonForConditionalGeneration`, which therefore cannot learn to draw. The four numbers of the table
#   would find it, since the nats of a picture would be enormous.
#
# ## What we left out
#
# * Real images: Chameleon has 1024 codes of 8192 by a convolutional VQ-VAE with an adversarial loss (Esser et
#   al. 2021), for 512 pixels, and 34 billion parameters. `load_chameleon` reads the transformer's published
#   weights.
# * Codes that follow a running mean, codes in several layers, and codes that are rounded numbers.
# * CM3Leon's retrieved documents in front of a pair, and its fine-tuning on instructions.
# * Top-p and repetition penalties; three-way guidance, which weighs a picture and a text apart.
#
# ## Sources
#
# Codes: Lloyd 1982; van den Oord, Vinyals and Kavukcuoglu 2017, equation 3 and section 3.2; Łańcucki et al.
# 2020 for restarts. Models: Aghajanyan et al. 2022 (CM3); Yu et al. 2023 (CM3Leon), section 2; Chameleon
# team 2024, sections 2.1 to 2.3. Parts: Zhang and Sennrich 2019 (RMSNorm); Su et al. 2021 (rotary
# positions), equation 34; Dehghani et al. 2023 (QK-norm); Chowdhery et al. 2022 (z-loss), section 5; Ho and
# Salimans 2022 (guidance). Issues, pull requests and files are those of the repositories named.
