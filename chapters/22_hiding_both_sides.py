# %% [markdown]
# # 22 · Hiding both sides
#
# **The question.** Chapter 06 hid words and asked the picture for them. Now patches are hidden, and the
# caption is asked. How much of a picture must be hidden before its caption is worth reading?
#
# You need: chapters 06, 07, 12 and 20; plan for two hours and a half with the six exercises.

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
import textwrap
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp.data import Scenes, held_out, scene_pixels
from minivlp.evaluation.hidden import SHARES, costs, evaluate_hidden, hide_rows
from minivlp.infonce import infonce
from minivlp.mlm import mlm_loss
from minivlp.models.flava import contrast_of_true
from minivlp.patch import from_patches, to_patches
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.targets import hide_patches, hide_side
from minivlp.vq import kmeans, nearest
from tests import check

torch.set_num_threads(1)
torch.set_grad_enabled(False)
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
flava = load_trained(None, "flava")
recipe, model, tokenizer = recipe_of(flava), flava.model, flava.tokenizer
SIDE = recipe.settings.canvas // recipe.settings.patch


def show(ax, patches, title=""):
    """Patches (N, 3pp) of one picture, drawn."""
    whole = from_patches(patches[None], 8, 48, 48)[0].clamp(-1, 1).add(1).div(2)
    ax.imshow(whole.permute(1, 2, 0), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=8)


def read(texts):
    """Texts → ids and their mask, both (B, L)."""
    ids, _, mask = tokenizer.batch(texts)
    return torch.from_numpy(ids), torch.from_numpy(mask)


# %%
source = Scenes(recipe.emojivl, recipe.nouns, canvas=48, pairs="held_out", seed=4)
scene = source[5]
patches = to_patches(scene_pixels([scene]), 8)[0]  # (36, 192)
fig, axes = plt.subplots(1, 5, figsize=(8, 1.9), constrained_layout=True)
show(axes[-1], patches, "nothing hidden")
for ax, share in zip(axes, SHARES[::-1], strict=False):
    hidden = torch.from_numpy(hide_patches((SIDE, SIDE), share, np.random.default_rng(2)))
    show(ax, patches.masked_fill(hidden[:, None], 0.0), f"{share:.0%} hidden")
fig.suptitle(f"“{scene.caption}”", fontsize=10)
plt.show()

# %% [markdown]
# What to see: read the pictures from the right. With a third of the patches hidden, a neighbour says what is
# missing, and the caption adds nothing. With all of them hidden, the caption is the only thing that is known.
#
# ## A patch becomes a word
#
# A hidden word is one of $V$. A hidden patch has $3 p^2$ colours, here 192 numbers. FLAVA (Singh et al. 2022)
# predicts in their place the patch's **code**: the number of the nearest of $K$ fixed patches, the
# **codebook**. FLAVA has a trained one, ours is made by k-means from the patches of training pictures:
#
# $$ a_n = \arg\min_k \lVert u_n - c_k \rVert^2, \qquad u_n \text{ a patch}, \; c_k \text{ a code}. $$

# %%
some = to_patches(scene_pixels([source[i] for i in range(100)]), 8)
fig, axes = plt.subplots(1, 5, figsize=(8, 1.9), constrained_layout=True)
show(axes[0], patches, "the picture")
errors = []
for ax, K in zip(axes[1:], (4, 16, 64, 256), strict=True):
    codes = model.codebook if K == 256 else kmeans(some.flatten(0, 1), K, np.random.default_rng(0), 8)
    show(ax, codes[nearest(patches, codes)], f"K = {K}")
    errors.append(float((some.flatten(0, 1) - codes[nearest(some.flatten(0, 1), codes)]).square().mean()))
plt.show()
print("mean squared error of 100 pictures:", ", ".join(f"{e:.3f}" for e in errors))
assert errors == sorted(errors, reverse=True)

# %% [markdown]
# What to see: the error falls with every larger codebook. With 256 codes one sees where something lies and in
# which colours, but no drawing: a code is a mean of many patches.
#
# ## One loss for words, codes and partners
#
# Labels say what is asked: the true id where something is predicted and −100 where nothing is (chapter 20).
# With them `mlm_loss` is the loss of hidden words. With the codebook for a vocabulary it is that of hidden
# patches. FLAVA has six terms, and the contrast is one more case: take the texts of the batch as the
# vocabulary and let the label of picture $i$ be $i$. The cross-entropy of rows and that of columns, halved,
# are InfoNCE. A pair that is known to be wrong has the label −100: it asks nothing, but its text stays in the
# vocabulary.

# %%
rng = np.random.default_rng(0)
x, y = (torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(6, 8))), dim=-1) for _ in range(2))
scale, none, labels = torch.tensor(7.0), torch.zeros(6).double(), torch.arange(6)
by_labels = (mlm_loss(scale * x, y, none, labels) + mlm_loss(scale * y, x, none, labels)) / 2
print(f"by labels {by_labels:.6f}, InfoNCE {infonce(x, y, scale):.6f}")
assert torch.allclose(by_labels, infonce(x, y, scale))
true = labels != 2
moved = y.clone()
moved[2] = -moved[2]
before, after = (contrast_of_true(x, other, scale, true) for other in (y, moved))
print(f"pair 2 is wrong: {before:.4f}, and with another text in it {after:.4f}")
assert abs(before - after) > 1e-3

# %% [markdown]
# **Exercise 1** · predict before you run · 10 minutes. In the masked terms of FLAVA a wrong pair takes no
# part at all. Does another *picture* in a wrong pair change (a) the term of hidden words, (b) that of hidden
# patches, (c) the contrast, (d) the matching? Write four answers down.
#
# <details><summary>Answer</summary>
#
# (a) and (b) no: both ask true pairs only, and no pair looks at another. (c) Yes: the wrong picture is one of
# the answers among which every true text chooses, as the last cell shows for a text. (d) Yes: matching asks
# about wrong pairs too. `tests/test_flava.py` holds all but the last of these.
# </details>
#
# ## What fills the holes
#
# The shipped FLAVA was trained for five minutes with `python -m minivlp train --model flava`. Two encoders of
# two layers each read the picture and the text; a third, of one layer, reads both. Its guesses for the hidden
# patches of four new pictures, without a caption and with it:

# %%
scenes = [source[i] for i in (5, 12, 20, 33)]
pixels, texts = scene_pixels(scenes), [scene.caption for scene in scenes]
hidden = hide_rows([0.85] * 4, SIDE, np.random.default_rng(3))
shown = to_patches(pixels, 8)
rows = {"the picture": shown, "85 % hidden": shown.masked_fill(hidden[..., None], 0.0)}
guesses = {}
for name, words in (("no caption", [""] * 4), ("its caption", texts), ("another's", texts[::-1])):
    guesses[name] = model.filled(pixels, hidden, *read(words)).argmax(-1)  # (B, N)
    rows[name] = torch.where(hidden[..., None], model.codebook[guesses[name]], shown)
fig, axes = plt.subplots(4, 5, figsize=(8, 6.6), constrained_layout=True)
for line, text, i in zip(axes, texts, range(4), strict=True):
    for ax, (name, cut) in zip(line, rows.items(), strict=True):
        show(ax, cut[i], "" if i else name)
    line[0].set_ylabel("\n".join(textwrap.wrap(text, 16)), fontsize=7)
plt.show()
changed = (guesses["no caption"] != guesses["its caption"])[hidden].float().mean()
print(f"share of the best guesses that the caption changes: {changed:.2f}")
assert 0 < changed < 0.5

# %% [markdown]
# What to see: these are single best guesses, one a patch, each made without knowing the others, so no drawing
# comes out whole. The caption changes fewer than half of them, mostly near an object that is seen in part.
# What it does to the probabilities is more than a best guess can show.
#
# ## The gain in nats
#
# The cost of a code is $-\log p$. The **gain** of a caption is the cost of the hidden patches without it less
# their cost with it, summed over a picture. Pictures are new, and their pairs of nouns were never trained.

# %%
items = 160
details = evaluate_hidden(
    recipe.cost(model), tokenizer, recipe.emojivl, recipe.nouns, 48, 8, items, 1, lambda *now: None
)["details"]
fig, axes = plt.subplots(1, 2, figsize=(8, 2.8), constrained_layout=True)
for split, colour in (("seen", BLUE), ("unseen", RED)):
    found = list(details[split].values())
    gains = np.array([[m["value"], m["value"] - m["low"]] for m in found]).T
    axes[0].errorbar(
        SHARES, gains[0], gains[1], color=colour, marker=".", capsize=3, label=f"{split} artists"
    )
axes[0].set(xlabel="share of patches hidden", ylabel="gain of the caption, nats", ylim=(-1, None))
axes[0].legend(fontsize=8)
KINDS = {"own": "its caption", "none": "no caption", "other": "another's"}
for name, colour in zip(KINDS, (GREEN, GREY, RED), strict=True):
    each = [m[name] / round(36 * share) for m, share in zip(details["seen"].values(), SHARES, strict=True)]
    axes[1].plot(
        SHARES, each, ".-", color=colour, label={"own": "its caption", "none": "none"}.get(name, "another's")
    )
axes[1].set(xlabel="share of patches hidden", ylabel="nats a hidden patch")
axes[1].legend(fontsize=8)
plt.show()
gain = {name: m["value"] for name, m in details["seen"].items()}
print("gain, seen artists:", ", ".join(f"{name[5:]} % {value:.2f}" for name, value in gain.items()))
assert gain["gain_30"] < gain["gain_60"] < gain["gain_85"] < gain["gain_100"]
assert gain["gain_85"] > 3 and gain["gain_30"] < 1.5
assert all(m["other"] > m["own"] for m in list(details["seen"].values())[1:])

# %% [markdown]
# What to see: at 30 % the caption is worth about one nat, at 85 % more than three, and most where nothing is
# seen. That is why masked models of pairs hide so much of the picture: what is hidden must not be known
# from next door. Another picture's caption costs more than none.
#
# ## Is that information?
#
# A caption of these scenes tells a known number of nats about its picture. There are $n$ held-out pairs of
# nouns; either noun may be named first, and there are four relations: $H(\text{caption}) = \ln 2n + \ln 4$.
# Given the picture, only the order of naming is open: $H(\text{caption} \mid \text{picture}) = \ln 2$. The
# difference is the information $I$.

# %%
n = sum(held_out(a.id, b.id) for a, b in combinations(recipe.nouns, 2))
information = math.log(2 * n) + math.log(4) - math.log(2)
print(f"{n} pairs: I = {information:.2f} nats; the gain with all hidden is {gain['gain_100']:.2f}")

joint = np.array([[0.5, 0.0], [0.0, 0.5]])  # of a bit and its copy


def told(table):
    """The information between rows and columns of a joint table, in nats."""
    product = table.sum(1, keepdims=True) * table.sum(0)
    seen = table > 0
    return float((table[seen] * np.log(table[seen] / product[seen])).sum())


both = np.zeros((2, 2, 2))  # caption, patch 1, patch 2: the caption is a bit that both patches show
both[0, 0, 0] = both[1, 1, 1] = 0.5
xor = np.zeros((2, 2, 2))  # the caption says whether the patches are alike
for a in (0, 1):
    for b in (0, 1):
        xor[a ^ b, a, b] = 0.25
for name, table in (("copies", both), ("exclusive or", xor)):
    single = [told(table.sum(2)), told(table.sum(1))]
    print(f"{name:<13} patch by patch {sum(single):.3f}, together {told(table.reshape(2, 4)):.3f}")
assert math.isclose(told(joint), math.log(2))
assert told(both.sum(2)) * 2 > told(both.reshape(2, 4)) and told(xor.sum(2)) * 2 < told(xor.reshape(2, 4))

# %% [markdown]
# What to see: a sum of gains patch by patch is not information. Two patches that show the same dog are both
# told of it, and the dog is counted twice. It can also be too small, as the exclusive or shows. Only gains by
# the chain rule, each patch knowing those before it, add up to at most $I$; chapters 23 and 28 have such.
#
# **Exercise 2** · explain · 10 minutes. The gain is also a difference of two *models*. Can it be negative?
# Can it be above $I$ for a model that predicts one patch only?
#
# <details><summary>Answer</summary>
#
# It is negative where the model reads the caption wrongly. That is likeliest at small shares, where there is
# little to gain and every mistake counts. For one patch the two costs bound $H(u)$ and $H(u \mid c)$ from
# above, each by its own excess, so the gain may even exceed $I$: a model that is bad without captions makes
# captions look good. That is why some of the training pairs have an empty caption: the comparison is with a
# model that has learned to go without.
# </details>
#
# ## Nothing may leak
#
# A hidden patch must be hidden from all that predicts it. The gradient tells: with respect to the pixels
# under a hidden patch it is exactly zero, with respect to the words it is not.

# %%
with torch.enable_grad():
    watched = pixels.clone().requires_grad_()
    seen = []
    hook = model.word.register_forward_hook(lambda module, inputs, out: seen.append(out))
    scores = model.filled(watched, hidden, *read(texts))
    hook.remove()
    picture, text = torch.autograd.grad(scores[hidden].square().sum(), [watched, *seen])
at = to_patches(picture, 8).abs().sum(-1)  # (B, N)
print(f"hidden patches {at[hidden].max():.1e}, visible ones at least {at[~hidden].min():.1e}")
print(f"words: {text.abs().sum(-1)[read(texts)[1]].min():.1e} at least")
assert not at[hidden].any() and (at[~hidden] > 0).all()

# %% [markdown]
# **Exercise 3** · break and repair · 20 minutes. Write a subclass of `Flava` whose `image_states` hides the
# patches *after* the first block, by putting the mask token into the states. Its loss would fall faster. Run
# the cell above with it and say through which tokens the hidden pixels come back.
#
# <details><summary>Answer</summary>
#
# The first block lets every token look at every patch. Visible patches and [CLS] have then seen the hidden
# ones, and in the second block they tell: the gradient at hidden pixels is no longer zero. In chapter 20's
# words, the table is full, so a path of length two leads from any patch to any other.
# </details>
#
# ## One side at a time
#
# The last step is to hide a side whole. Then the other side is all there is, and a model has to connect them.
# A model for video does this to half of its pairs (Xu et al. 2021): `hide_side` says which tokens.

# %%
few = np.random.default_rng(0)
patch_rows, word_rows = hide_side(np.ones((6, 4), bool), np.ones((6, 3), bool), few)
for one, two in zip(patch_rows, word_rows, strict=True):
    print("patches", "".join(".x"[int(h)] for h in one), " words", "".join(".x"[int(h)] for h in two))
assert not (patch_rows.any(1) & word_rows.any(1)).any()

# %% [markdown]
# **Exercise 4** · `hide_side` · difficulty 1 of 3 · 15 minutes. Open `chapters/exercises/targets.py`.

# %%
check("hide_side")

# %% [markdown]
# In FLAVA's own masked term both sides have holes, and the word that a patch needs may be hidden as well.
# MaskVLM (Kwon et al. 2023) hides one side at a time: words are predicted with the whole picture, patches
# with the whole text. It predicts colours, and the cost is the mean absolute error. An absolute error is the
# negative log likelihood of a Laplace distribution, $|x - \hat x| / b + \ln 2b$, but 192 colours of a patch
# are far from independent, so nats of that kind would count one edge many times. Its gain is told in levels
# of 255.

# %%
second = load_trained(None, "maskvlm")
other = recipe_of(second)
items = 320
asked = [source[i] for i in range(items)]
captions = [scene.caption for scene in asked]
print("hidden   its caption    none   another's")
levels = {}
for share in SHARES:
    mask = hide_rows([share] * items, SIDE, np.random.default_rng(1))
    cost = other.cost(second.model)
    found = [
        costs(cost, second.tokenizer, asked, words, mask).mean()
        for words in (captions, [""] * items, captions[1:] + captions[:1])
    ]
    levels[share] = found
    print(f"{share:>5.0%} {found[0]:>13.2f} {found[1]:>7.2f} {found[2]:>11.2f}")
saved = {share: found[1] - found[0] for share, found in levels.items()}
assert 0 < saved[1.0] < 1 and max(saved[share] for share in SHARES[:-1]) < saved[1.0]
assert levels[1.0][0] < levels[1.0][2]


def odds(words):
    """How much likelier each picture matches the text than not, in nats."""
    ids, mask = read(words)
    image, text = second.model.image_states(scene_pixels(asked)), second.model.text_states(ids, mask)
    return (second.model.itm_logits(image, text, mask) @ torch.tensor([-1.0, 1.0])).numpy()


preferred = (odds(captions) > odds(captions[1:] + captions[:1])).mean()
print(f"its matching prefers a picture's own caption to another's: {preferred:.3f}")
assert preferred > 0.8

# %%
ids, mask = read(texts)
fill = other.fill(second.model)
fig, axes = plt.subplots(2, 4, figsize=(7, 3.6), constrained_layout=True)
everything = torch.ones_like(hidden)
for line, (name, words) in zip(axes, (("no caption", [""] * 4), ("its caption", texts)), strict=True):
    for ax, cut, text in zip(line, fill(pixels, everything, *read(words)), texts, strict=True):
        show(ax, cut, text if name == "its caption" else "")
    line[0].set_ylabel(name, fontsize=8)
plt.show()

# %% [markdown]
# What to see: without a caption the model paints one fixed picture, the median of every colour, and with one
# hardly another. Where a part is seen, the caption saves nothing; where nothing is, it saves less than one
# level. The model can read: its matching tells a picture's own caption from another's. But the absolute error
# asks for the **median**, and a median moves only where something becomes likelier than not. The caption says
# on which side the cloud is, not at which patch, so at each single patch the background stays the likelier
# guess. Codes have a probability each, and a cloud that becomes three times as likely and is still no
# favourite saves $\ln 3$ where it is. What a loss does not ask for, a gain in that loss cannot show.
#
# **Exercise 5** · predict before you run · 10 minutes. Without a caption and with everything hidden, a model
# can only paint one fixed picture. Which one has the smallest mean absolute error, and how large is it?
# Compute it from 100 training pictures and compare it with the last line of the table.
#
# <details><summary>Answer</summary>
#
# The median over the pictures, pixel by pixel and channel by channel, minimises the mean absolute error:
# `x = scene_pixels([...]); 127.5 * (x - x.median(0).values).abs().mean()`.
# </details>
#
# **Exercise 6** · ablate · 30 minutes and the time of two runs. `python -m minivlp train --model maskvlm
# --without turns` hides both sides at once, `--model flava --without unpaired` trains without pictures and
# texts that come alone. Compare their tables with those of the whole runs, on both kinds of artists.
#
# ## What we left out
#
# * FLAVA's own codebook, a discrete VAE with 8192 codes, and its sizes; `load_flava` reads the published
#   weights from Hugging Face's files.
# * Video, where whole frames or all words are hidden (Xu et al. 2021).
# * Filling patch after patch, each knowing the ones before: chapter 23 does that with codes.
# * MaskVLM's pretrained encoders, and its table of both sides against one, which needs longer runs than ours.
#
# ## Sources
#
# FLAVA: Singh et al. 2022, sections 3.1 to 3.3. MaskVLM: Kwon et al. 2023, section 3. Predicting codes of
# patches: Bao et al. 2022 (BEiT). Hiding most of a picture: He et al. 2022 (masked autoencoders).
