# %% [markdown]
# # 02 · Patches
#
# **The question.** A transformer reads a sequence of vectors and compares each with each. A picture is a grid
# of pixels, thousands of them even when it is as small as a stamp. How does a grid become a short sequence?
#
# The plainest answer: cut it into squares and send every square through the same linear layer. What this
# costs, what it saves, and how the model knows where a square was, is this chapter.
#
# You need: chapter 01; plan for two and a half hours with the four exercises.

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

from minivlp.data import Scenes, load_emojivl
from minivlp.models.vilt import resize_positions, vilt_pixels
from minivlp.patch import from_patches, patch_embed, patch_embed_fused, patch_embed_np, to_patches
from minivlp.recipes.base import load_trained
from tests import check
from tests.bugs.patch import cut_by_reshape, cut_column_by_column, cut_with_channels_last
from tests.laws import Subject, central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
p = 8
scene = Scenes(load_emojivl(), canvas=48, seed=4)[0]
images = (scene.image / 255.0).transpose(2, 0, 1)[None]  # (1, 3, 48, 48): pictures, channels, rows, columns
patches = to_patches(images, p)  # (1, 36, 192)

fig = plt.figure(figsize=(7, 3.3), constrained_layout=True)
left, right = fig.subfigures(1, 2)
ax = left.subplots()
ax.imshow(scene.image, extent=(0, 48, 48, 0))
ax.set(title="a picture", xticks=range(0, 49, p), yticks=range(0, 49, p), xlabel="pixels", ylabel="pixels")
ax.grid(color="white", linewidth=0.5)
for n, ax in enumerate(right.subplots(6, 6).flat):
    ax.imshow(patches[0, n].reshape(3, p, p).transpose(1, 2, 0))
    ax.set(xticks=[], yticks=[])
    ax.set_title(n, fontsize=7, pad=1)
right.suptitle("the same as patches n = 0 … 35", fontsize=12)
plt.show()
print(f"{scene.caption}: {images[0].size} numbers = {patches.shape[1]} patches of {patches.shape[2]} numbers")

# %% [markdown]
# What to see: patches are numbered as one reads. Objects are cut wherever the grid falls, and many patches
# hold nothing but background.
#
# ## The cut
#
# ![A picture of three by three patches is cut row by row. Each patch becomes a row of numbers, and one weight
# turns each of them into a row of width D.](pictures/patches.svg)
#
# *What to see: first the order, then the map. The numbers 0 to 8 keep their order, and all patches share W.*
#
#
# Let a picture have $C$ channels and a height and width that are multiples of the **patch size** $p$. With
# $h$ rows and $w$ columns of patches there are $N = hw$ patches. Patch $n$ lies in row $r$ and column $c$ of
# that grid, $n = rw + c$, and it holds $K = Cp^2$ numbers, which we write into a vector $u_n$: first all of
# channel 0, row by row, then channel 1, and so on. This is "$(C, p, p)$ order". A picture of 4 × 6 pixels
# with one channel, whose pixels are simply numbered, and $p = 2$:

# %%
tiny = np.arange(24.0).reshape(1, 1, 4, 6)
print(tiny[0, 0], "\n\npatches, one a row:\n", to_patches(tiny, 2)[0])

# %% [markdown]
# In NumPy the cut is three steps. Give the grid and the inside of a patch axes of their own, $(C, h, p, w,
# p)$; bring the axes of the grid to the front, $(h, w, C, p, p)$; flatten. The step in between is easily
# forgotten or done wrong. Here are three plausible mistakes on the picture from above. Each vector is drawn
# at the place of its patch, in $(C, p, p)$ order, so the true cut gives the picture back.

# %%
fig, axes = plt.subplots(1, 4, figsize=(8, 2.3), constrained_layout=True)
cuts = to_patches, cut_by_reshape, cut_column_by_column, cut_with_channels_last
for ax, cut in zip(axes, cuts, strict=True):
    out = cut(images, p)
    ax.imshow(from_patches(out, p, 48, 48)[0].transpose(1, 2, 0))
    ax.set(title=cut.__name__.removeprefix("cut_").replace("_", " "), xticks=[], yticks=[])
    same = np.array_equal(np.sort(out, axis=None), np.sort(images, axis=None))
    assert same and out.shape == patches.shape and (cut is to_patches) == np.array_equal(out, patches)
    print(f"{cut.__name__:<23} shape {out.shape}, all numbers there: {same},", end=" ")
    print(f"{(out != patches).any(-1).sum()} patches are wrong")
plt.show()

# %% [markdown]
# What to see: four answers of the same shape, with the same numbers in them, and one is right. The plain
# reshape reads neighbours in memory, strips of a few pixel rows in one channel. Nothing crashes, so a model
# can be trained on each of the mistakes. With channels last it will even learn as well as it should, since a
# linear layer does not mind the order of its inputs, until somebody loads weights that were trained with the
# right one. So the law of this exercise, *cuts_squares_row_by_row*, compares each patch with the square that
# it should be, on pictures that are not square.
#
# **Exercise 1** · `to_patches` · difficulty 1 of 3 · 15 minutes. Open `chapters/exercises/patch.py`, replace
# `raise Todo`, and run the next cell. It must take NumPy arrays and tensors.

# %%
check("to_patches")

# %% [markdown]
# ## One linear map for all patches
#
# Let $D$ be the width of the model. A weight $W$ ($D \times K$) and a bias $b$ ($D$ numbers) turn patch $n$
# of picture $i$ into a vector of the model:
#
# $$z_{ind} = \sum_k W_{dk}\, u_{ink} + b_d, \qquad\text{or}\qquad z_{in} = W u_{in} + b.$$
#
# This is chapter 01 again: $z_{ind}$ is the score of a patch with row $d$ of $W$, a little picture of $p
# \times p$ pixels that is called a **filter**. Take two for the numbered picture: the mean of a patch, and
# its right column minus its left. Pixels rise by 1 from left to right, so the second filter will see 2
# everywhere, plus its bias of 10.

# %%
mean, edge = np.full((2, 2), 0.25), np.array([[-1.0, 1.0], [-1.0, 1.0]])
weight, bias = np.stack([mean, edge])[:, None], np.array([0.0, 10.0])  # (D, C, p, p) and (D,)
z, _ = patch_embed_np(tiny, weight, bias)  # (1, N, D)
print("z =\n", z[0])
assert (z[0, :, 1] == 12).all()

# %% [markdown]
# ## The same map is a convolution
#
# A **convolution** slides a $p \times p$ window over the picture in steps of a **stride**, here $s$, and
# takes, at each place, the product with the filter. Let $I_{iayx}$ be the pixel of channel $a$, row $y$,
# column $x$ of picture $i$, and count the numbers of a filter by $(a, y, x)$ too. The value in row $r$ and
# column $c$ is
#
# $$\sum_{a,y,x} W_{d,(a,y,x)}\; I_{i,\,a,\,rs+y,\,cs+x} + b_d.$$
#
# For $s = p$ the pixels of this sum are the square of patch $(r, c)$, every pixel is in one window, and the
# formula is that of $z_{ind}$; for $s < p$ windows overlap. So one layer has two names: papers project
# flattened patches (ViT, equation 1), published code convolves.

# %%
square = torch.from_numpy(tiny), torch.from_numpy(weight), torch.from_numpy(bias)
slid = torch.nn.functional.conv2d(*square, stride=2)  # (1, D, h, w)
print("largest difference from z:", np.abs(slid.flatten(2).mT.numpy() - z).max())
assert np.allclose(slid.flatten(2).mT.numpy(), z)

# %% [markdown]
# ## The gradient by hand
#
# Let $L$ be the loss and $G_{ind} = \partial L / \partial z_{ind}$ what comes back from the model, an array
# like $z$. $W_{dk}$ occurs in $z_{ind}$ for every picture and every patch, with the factor $u_{ink}$; $b_d$
# in the same places with the factor 1; $u_{ink}$ in all $d$ of its own patch, with the factor $W_{dk}$. The
# rule of chapter 01 holds, $G$ times the other factor, summed over the indices that the factor does not have:
#
# $$dW_{dk} = \sum_{i,n} G_{ind}\, u_{ink}, \qquad db_d = \sum_{i,n} G_{ind}, \qquad
#   du_{ink} = \sum_d G_{ind}\, W_{dk}.$$
#
# One step is left, from $du$ to the pixels. The cut puts every pixel at one place of one patch: it is a
# permutation. The gradient of a pixel *is* the gradient of that one number, and the way back is the inverse
# of the cut, `from_patches`. For an example that can be read off, let only two numbers of $z$ matter to the
# loss: the mean of patch 0, with the slope 1, and the edge of patch 5, with the slope 2.

# %%
G = np.zeros((1, 6, 2))
G[0, 0, 0], G[0, 5, 1] = 1, 2
u, W = to_patches(tiny, 2), weight.reshape(2, 4)
dW, db = np.einsum("ind,ink->dk", G, u), G.sum((0, 1))  # (D, K), (D,)
dimage = from_patches(G @ W, 2, 4, 6)  # (1, 1, 4, 6)
print("dW =\n", dW, "\n\ndb =", db, "\n\ndimage =\n", dimage[0, 0])

# %% [markdown]
# Read it: the filters receive *patches* (row 0 is patch 0, row 1 twice patch 5), the picture receives
# *filters*, pasted where the patches were. With overlapping windows the pasted filters would add up.
#
# Compare with slopes, by the function that the laws use, and with autograd's way through the convolution:

# %%
leaves = [t.clone().requires_grad_() for t in square]
torch.nn.functional.conv2d(*leaves, stride=2).flatten(2).mT.backward(torch.from_numpy(G))
for which, ours in enumerate((dimage, dW.reshape(weight.shape), db)):
    slopes = central_differences(Subject(patch_embed_np, "np"), (tiny, weight, bias), which, grad=G)
    name, auto = ("image", "weight", "bias")[which], leaves[which].grad.numpy()
    near, same = np.allclose(ours, slopes, atol=1e-7), np.allclose(ours, auto, atol=1e-12)
    print(f"{name:<7} within 1e-7 of the slopes: {near}, within 1e-12 of autograd: {same}")
    assert near and same

# %% [markdown]
# **Exercise 2** · `patch_embed_np` · difficulty 2 of 3 · 25 minutes. Open `chapters/exercises/patch.py`. An
# answer that ignores `grad` is right for every loss that is a plain sum of $z$, and wrong for all others.

# %%
check("patch_embed_np")

# %% [markdown]
# ## Two rungs more
#
# In PyTorch autograd does the rest. `patch_embed` cuts and multiplies; `patch_embed_fused` convolves and
# never cuts. With $B$ pictures both need $2BNKD$ operations, a multiplication and an addition each, and the
# backward pass as many for $dW$. Since $NK$ is the number of values in a picture, this does not depend on
# $p$. They differ in memory. $dW$ needs the patches, and the first way keeps all $BNK$ numbers in their new
# order until backward.
#
# **Exercise 3** · `patch_embed` · difficulty 1 of 3 · 10 minutes. **Exercise 4** · `patch_embed_fused` ·
# difficulty 2 of 3 · 15 minutes. Open `chapters/exercises/patch.py`. Afterwards `python -m chapters train
# --use patch_embed` trains the real model with yours.

# %%
check("patch_embed", "patch_embed_fused")


# %%
def problem(p, B=4, side=192, D=128):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(D, 3, p, p, generator=random) / p
    return torch.randn(B, 3, side, side, generator=random), weight.requires_grad_(), torch.zeros(D)


def kept(function):
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        function(*problem(16))
    return shapes


print("patch_embed keeps", kept(patch_embed), "\npatch_embed_fused keeps", kept(patch_embed_fused))
assert (4 * 12 * 12, 3 * 16 * 16) in kept(patch_embed)  # the patches: (B N, K)
assert (4, 3, 192, 192) in kept(patch_embed_fused)  # the pictures, which exist anyway

# %% [markdown]
# The first way keeps the copy, the second the pictures and the weight, which exist anyway. Less memory is not
# less time. Processor time, forward and backward, one thread of the machine that made this page:

# %% tags=["measured"]
from statistics import median
from time import process_time

print(f"{'p':>3} {'torch':>9} {'fused':>9} {'fused / torch':>14}")
for size in (8, 16, 32):
    inputs, times = problem(size), {patch_embed: [], patch_embed_fused: []}
    upstream = torch.ones(4, (192 // size) ** 2, 128)
    for _ in range(11):
        for function in times:  # in turn, so that both meet the same machine
            start = process_time()
            function(*inputs).backward(upstream)
            times[function].append(process_time() - start)
    plain, fused = (1000 * median(t) for t in times.values())
    print(f"{size:>3} {plain:>6.1f} ms {fused:>6.1f} ms {fused / plain:>14.2f}")

# %% [markdown]
# What to see: the ratio in the last column. On the machine of this page the convolution takes as long as the
# product at 8 pixels, a fifth less at 16, and a tenth more at 32, which is ViLT's patch. A copy is cheap
# beside a large matrix product, so there is little to save. The models of the library take the plain rung.
# `python -m minivlp bench --only patch` measures ViLT's width on your machine, where the order may differ.
#
# ## What a patch size costs
#
# The projection costs the same for every $p$. What follows does not: a transformer of $M$ layers and width
# $D$, reading $N$ tokens, multiplies per layer about $12 D^2 N$ pairs of numbers with its weights and $2 N^2
# D$ in attention (chapters 04 and 05). Halving $p$ makes the patches four times as many, the first term about
# four and the second sixteen times as large. ViLT's sizes, with 40 words and a picture of 384 × 384 pixels:

# %%
D, M, words, side = 768, 12, 40, 384
sizes = np.array([4, 8, 16, 32, 64, 128])
N = (side // sizes) ** 2
parts = {
    "projection": 2 * N * 3 * sizes**2 * D,
    "products with weights": 2 * M * 12 * D**2 * (N + words),
    "attention": 2 * M * 2 * (N + words) ** 2 * D,
}
shares = {name: part / sum(parts.values()) for name, part in parts.items()}
assert (N * 3 * sizes**2 == 3 * side**2).all() and len(set(parts["projection"])) == 1  # the same for every p
assert shares["attention"][0] > 0.5 and shares["attention"][3] < 0.1  # p = 4 and p = 32
for row in zip(sizes, N, 3 * sizes**2, sum(parts.values()) / 1e9, strict=True):
    print("p = {:>3}: {:>4} patches of {:>5} numbers, {:>6.0f} GFLOP".format(*row))
fig, ax = plt.subplots(figsize=(5, 2.7), constrained_layout=True)
for name, part in parts.items():
    ax.loglog(sizes, part / 1e9, "o-", label=name, markersize=4)
ax.set(xlabel="patch size p, pixels", ylabel="GFLOP a picture", xticks=sizes, xticklabels=sizes)
ax.minorticks_off()
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# What to see: the projection is a flat line. The model pays for the *number* of patches. At $p = 4$ attention
# is more than half of the work. At $p = 128$ each patch has to say more, and where $K$ is above $D$ the
# projection must drop something. ViLT took $p = 32$. The small models of this course cut 48-pixel pictures
# into 8-pixel patches; `chapters/main_job.md` tells how a run with 12 went.
#
# ## Where was it? Positions
#
# Nothing in $z_n$ tells where patch $n$ was, and attention does not know the order of its tokens. So a table
# of learned vectors, a **position** for each place of the grid, is added: $z_n + t_n$. It belongs to *one*
# grid. Other pictures have other shapes, and for these ViLT resizes the grid of positions as one resizes a
# picture, bilinearly, with the corners kept in place. In one dimension, from $g$ stored places to $m > 1$:
# place $r$ reads at $x_r = r\,(g-1)/(m-1)$ and mixes the two places beside it,
#
# $$t'_r = \sum_j A_{rj}\, t_j, \qquad A_{rj} = \max(0,\; 1 - |x_r - j|).$$
#
# In two dimensions a matrix works on the rows and another on the columns, $t' = A\, t\, A'^{\top}$ for each
# of the $D$ numbers: a linear map once more. With $G' = \partial L/\partial t'$, $dt = A^\top G' A'$.


# %%
def mixing(m, g):
    places = np.arange(m)[:, None] * (g - 1) / (m - 1)
    return np.maximum(0, 1 - np.abs(places - np.arange(g)))  # (m, g)


A, A2 = mixing(5, 3), mixing(4, 3)
grid = np.arange(9.0).reshape(3, 3)
print("A =\n", A, "\n\nfrom 3 × 3 to 5 × 4:\n", A @ grid @ A2.T)
leaf, G5 = torch.from_numpy(grid)[..., None].requires_grad_(), np.random.default_rng(0).random((5, 4))
resized = resize_positions(leaf, 5, 4)  # (5, 4, 1)
resized.backward(torch.from_numpy(G5)[..., None])
ours, dt = A @ grid @ A2.T, A.T @ G5 @ A2
print("\nas the library:", np.allclose(resized.detach()[..., 0], ours), end=", ")
print("as autograd:", np.allclose(leaf.grad[..., 0], dt))
assert np.allclose(resized.detach()[..., 0], ours) and np.allclose(leaf.grad[..., 0], dt)

# %% [markdown]
# Here are the positions of a trained model, the ViLT of chapter 08: cosines of one position with all others,
# on its own grid and on a wider one.

# %%
trained = load_trained(root / "chapters" / "weights" / "vilt_tiny.safetensors")
model = trained.model
stored = model.position[1:].detach().view(6, 6, -1)  # row 0 of the table belongs to a class token
fig, axes = plt.subplots(1, 2, figsize=(6.4, 2.5), constrained_layout=True, width_ratios=[6, 9])
for ax, (m, place) in zip(axes, ((6, (1, 4)), (9, (1, 6))), strict=True):
    unit = torch.nn.functional.normalize(resize_positions(stored, 6, m), dim=-1)
    image = ax.imshow(unit @ unit[place], cmap="viridis", vmin=0.2, vmax=1)
    ax.plot(place[1], place[0], "r+")
    ax.set(title=f"6 × {m}", xlabel="column", ylabel="row", xticks=range(m), yticks=range(6))
fig.colorbar(image, ax=axes, label="cosine with +")
plt.show()

unit = torch.nn.functional.normalize(stored.flatten(0, 1), dim=-1)  # (36, D)
place = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij"), -1).flatten(0, 1)
apart = torch.cdist(place, place)  # (36, 36) in patches
near, far = ((unit @ unit.T)[where].mean().item() for where in (apart == 1, apart >= 4))
print(f"mean cosine of neighbours {near:.2f}, of places four patches apart or more {far:.2f}")
assert near > far + 0.2

# %% [markdown]
# What to see: neighbours are more alike than places far apart. (The run began from sines and
# cosines; training left this much of them standing.) On the right the pattern is stretched with the grid.
#
# ## A batch of pictures of several sizes
#
# A batch is one array, so smaller pictures are padded at the right and the bottom, and a **pixel mask** tells
# what is real. Three things follow. A patch of padding must not be looked at (chapter 04). A picture's
# positions are resized to *its* grid, not to that of the batch. And the mask has to be told, not guessed: the
# original code takes a pixel for real when its normalised channels do not sum to 0. With 8-bit colours that
# works by luck, because three channels would have to add up to 382.5; pictures of floats have no such luck.

# %%
wide = Scenes(load_emojivl(), canvas=72, seed=0, kinds={"between": 1})[7].image[:48]  # (48, 72, 3)
pixels, mask = vilt_pixels([scene.image, wide], size=48, multiple=8)
fig, axes = plt.subplots(1, 3, figsize=(8, 2.6), constrained_layout=True)
for i, ax in enumerate(axes[:2]):
    ax.imshow((pixels[i].permute(1, 2, 0) + 1) / 2)
    ax.set(title=f"picture {i}", xticks=[], yticks=[])
axes[2].imshow(mask[0, ::8, ::8], cmap="gray", vmin=-0.5, vmax=1)
axes[2].set(title="real patches of 0", xlabel="column", ylabel="row", xticks=range(9), yticks=range(0, 6, 5))
plt.show()

ids, _, real = (torch.from_numpy(a) for a in trained.tokenizer.batch([scene.caption] * 2))
with torch.no_grad():
    alone = model.encode(ids[:1], real[:1], pixels[:1, :, :, :48])["pooled"]
    for name, told in (("with its mask", mask), ("without", None)):
        together = model.encode(ids, real, pixels, told)["pooled"][:1]
        same = torch.allclose(alone, together, atol=1e-4)
        print(f"picture 0 in the batch, {name}: the pooled vector is as alone: {same}")
        assert same == (told is not None)

# %% [markdown]
# What to see: with the mask a picture means the same in company as alone. Without it the grey padding is a
# part of the picture, and the grid is not its own. There is no error message, only a different answer.
#
# ## What ViLT saves, and what it pays
#
# Before ViLT most models described a picture by **regions**: a convolutional network, a detector on top, and
# a vector for each of some dozens of boxes. In experiments these were computed once and stored, so that their
# price did not show, but every new picture pays it. ViLT's figure 1 gives, on the authors' machine, about 75
# ms for the network, 810 ms for the detector and 15 ms for the transformer. Taking the network's grid without
# a detector (Pixel-BERT-R50) needs 45 + 15 ms, ViLT 0.4 + 15 ms. The scores are accuracies on VQAv2, a
# benchmark of questions about photographs. Times of its table 6 and scores of its table 2:

# %%
names = ["ViLBERT", "LXMERT", "UNITER-Base", "OSCAR-Base", "VinVL-Base", "Pixel-BERT-X152", "Pixel-BERT-R50"]
names += ["ViLT-B/32", "ViLT-B/32, longer, augmented"]
milliseconds = 900, 900, 900, 900, 650, 160, 60, 15, 15
accuracy = 70.55, 72.42, 72.70, 73.16, 75.95, 74.45, 71.35, 70.33, 71.26  # VQAv2, test-dev
fig, ax = plt.subplots(figsize=(5.4, 2.9), constrained_layout=True)
for name, ms, score in zip(names, milliseconds, accuracy, strict=True):
    ax.semilogx(ms, score, "o", color="tab:red" if name.startswith("ViLT") else "tab:blue")
    low = name in ("LXMERT", "ViLBERT", "Pixel-BERT-R50")
    place = (-35, 12) if "longer" in name else (6, -7 if low else 2)
    ax.annotate(name, (ms, score), place, textcoords="offset points", fontsize=8)
assert min(milliseconds) == 15 and max(accuracy[-2:]) < np.median(accuracy[:5])  # far left, not at the top
ax.set(xlabel="milliseconds a picture and its text", ylabel="VQAv2 test-dev", xlim=(5, 4000), ylim=(69.5, 77))
plt.show()

# %% [markdown]
# What to see: ViLT is far to the left, not at the top: about level with the first region models, below the
# later ones. What a linear layer cannot know about pictures, its transformer has to learn; ViLT's began with
# the weights of a ViT that classified pictures.
#
# ## Questions and small tasks
#
# Answers are folded. Think first, with pencil and paper where it says *derive*.
#
# <details><summary>1. <i>Explain.</i> Why does a patch embedding with stride p lose nothing although p²
# pixels become one row?</summary>The row has D numbers, and D may be as large as C p². Order inside a patch
# is kept by the weights.</details>
#
# <details><summary>2. <i>Derive.</i> Patches overlap: size p, stride p/2. How many rows has a picture of H ×
# W pixels, and what becomes of the gradient of a pixel?</summary>(2H/p − 1)(2W/p − 1) rows. An inner pixel
# lies in four patches, so its gradient is the sum of four; a corner pixel lies in one.</details>
#
# <details><summary>3. <i>Derive.</i> The rows are averaged into one vector m = (1/N) Σ_n z_n. What does each
# row receive?</summary>dz_n = dm / N: the same for all rows. A mean cannot say which patch was to
# blame.</details>
#
# <details><summary>4. <i>Predict, then run.</i> What does a model see of two pictures whose patches are the
# same in another order, if positions are left out? Shuffle the rows in the cell above and compare means of
# all rows.</summary>The same set of rows, so every mean of them is equal. Only positions tell the two
# apart.</details>
#
# <details><summary>5. <i>Break and repair.</i> Positions of an image trained at 48 pixels are used at 96
# pixels by repeating each of them four times. What goes wrong?</summary>Four neighbours get the same position
# and cannot be told apart by place. Resizing the grid with interpolation gives each its own.</details>
#
# ## What we left out
#
# * Overlapping patches and convolutional stems, other embedders with more work before the first token.
# * What attention does with the tokens (04), what the model learns to see (08).
# * Regions come back in chapter 19, as sets of patches that a box touches.
# * Reading a part of the patches: ViLT's pretraining draws at most 200 a picture.
# * Resizing pictures and normalising pixels: `minivlp/models/published/pixels.py`.
#
# ## Sources
#
# Dosovitskiy et al. 2021 (ViT), equation 1, for patches and their projection. Kim, Son and Kim 2021 (ViLT),
# sections 1 (stored regions), 3.1, 4.2 and 4.6, figure 1, tables 2 and 6; how positions are resized and
# padding is masked is in its code.
