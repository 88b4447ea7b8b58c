# %% [markdown]
# # 05 · The transformer block
#
# **The question.** Attention lets each token fetch a mean of the others (chapter 04). Stack attention alone,
# even with maps of its own in every layer, and the rows of a sequence become alike: their difference shrinks
# with the number of layers faster than exponentially (*rank collapse*, Dong, Cordonnier and Loukas 2021).
# What has to stand around it, so that four blocks, or twelve, turn the row of [MASK] step by step into a row
# that says "panda", and so that a gradient from the top still reaches the bottom?
#
# You need: chapters 01 to 04. Plan for three and a half hours with the four exercises.

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
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from minivlp.attention import attention
from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import hide_slots
from minivlp.recipes.base import WEIGHTS, load_trained
from minivlp.transformer import Block, Encoder, layer_norm, layer_norm_np
from tests import check
from tests.laws import central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
trained = load_trained(WEIGHTS / "vilt_tiny.safetensors")  # the course's small ViLT, of chapter 08
model, tokenizer = trained.model.requires_grad_(False), trained.tokenizer
emojivl = load_emojivl()
scenes = Scenes(emojivl, trained.nouns(emojivl), canvas=trained.canvas, pairs="held_out", seed=3)
hidden = [hide_slots(scenes[i], [0], tokenizer) for i in range(120)]
short = [i for i, (_, answer) in enumerate(hidden) if len(answer) == 1][:100]  # hidden nouns of one piece
items, texts = [scenes[i] for i in short], [hidden[i][0] for i in short]
answers = torch.tensor([hidden[i][1][0] for i in short])  # (100,)

ids, _, real = (torch.from_numpy(a) for a in tokenizer.batch(texts))  # (B, L)
stream = []  # what each block is given, and last what the final norm is given: (B, L + 1 + N, D) each
stages = [*model.encoder.blocks, model.encoder.norm]
hooks = [stage.register_forward_pre_hook(lambda _, given: stream.append(given[0])) for stage in stages]
states = model.encode(ids, real, scene_pixels(items))
for hook in hooks:
    hook.remove()
rows = [z[:, : ids.shape[1]][ids == tokenizer.mask_id] for z in stream]  # (100, D), the [MASK] of each text
spoken = [model.mlm_logits(model.encoder.norm(row)).softmax(-1) for row in rows]  # (100, V)

fig, axes = plt.subplots(1, 2, figsize=(7, 2.5), width_ratios=(1, 2), constrained_layout=True)
axes[0].imshow(items[1].image)
axes[0].set_title(texts[1], fontsize=10)
axes[0].set(xticks=[], yticks=[])
right = torch.stack([p[range(100), answers] for p in spoken])  # (blocks + 1, 100)
axes[1].plot(right[:, 1], "o:", color="tab:orange", label="this picture")
axes[1].plot(right.mean(1), "o-", color="black", label="mean of 100 pictures")
axes[1].set(xlabel="blocks passed", ylabel="probability", xticks=range(len(right)), ylim=(0, 1))
axes[1].set_title("What the head gives the hidden word", fontsize=10)
axes[1].legend()
plt.show()
print("likeliest in this picture after 0, 1, … blocks:", [tokenizer.tokens[p[1].argmax()] for p in spoken])
print("mean probability of the hidden word after 0, 1, … blocks:", right.mean(1).numpy())
assert (right.mean(1)[:3] < 0.1).all() and right.mean(1)[3] > 0.4 and right.mean(1)[4] > 0.7

# %% [markdown]
# What to see: the row of [MASK] was read after every block, with the head that was trained for the last one.
# This way of reading is known as the *logit lens* (nostalgebraist 2020). The answer is not in the row after
# two blocks. After the third it is there in most pictures, and the fourth makes it surer. The rows in between
# can be read because of the design of this chapter: a **stream** of rows runs from the bottom to the top,
# every block *adds* something to it, and no block starts anew. This chapter builds the block: what it reads
# from the stream, what it adds, and why it is built so.
#
# ## One sequence of words and patches
#
# First, what flows. ViLT puts words and patches in one sequence, the **single stream**, so that one attention
# mixes both. Let $t_i$ be the row of word $i$ with its position, after a norm of its own, and $v_j$ that of
# patch $j$ with its position; $t_0$ and $v_0$ are the [CLS] rows of text and picture. Let $\tau_0$ and
# $\tau_1$ be two learned vectors, the **types** of words and patches. Then
#
# $$z^0 = [\,t_0 + \tau_0, \dots, t_{L-1} + \tau_0,\; v_0 + \tau_1, \dots, v_N + \tau_1\,].$$
#
# A type tells a query which kind of token it meets. With one picture it could be left out: a vector that
# is added to all words could as well be part of the bias of their norm, and one for all patches part of the
# bias of their projection. Types earn their place with a second picture (NLVR2), which has its own type.

# %%
moved = deepcopy(model)
words, patches = moved.modality.weight.clone()
moved.text_norm.bias += words
moved.patch.bias += patches
moved.cls += patches
moved.modality.weight.zero_()
pooled = moved.encode(ids, real, scene_pixels(items))["pooled"]
print(
    f"sequence: {ids.shape[1]} tokens of text, {stream[0].shape[1] - ids.shape[1]} of the picture", end=", "
)
print(f"rows of {stream[0].shape[2]} numbers")
print("types moved into biases, same output:", torch.allclose(pooled, states["pooled"], atol=1e-4))
assert torch.allclose(pooled, states["pooled"], atol=1e-4)

# %% [markdown]
# ## The block
#
# For tokens $z$ ($L \times D$, words and patches together), a block computes
#
# $$z \leftarrow z + A(\mathrm{LN}_1(z)), \qquad z \leftarrow z + M(\mathrm{LN}_2(z)),$$
#
# where $A$ is attention with its four maps and $M$ an **MLP**, two maps with a bend between them, each token
# by itself. LN is a normalisation, derived below. Attention carries between tokens, the MLP computes inside
# them. A sum of the input and what a part makes of it is called a **residual connection** (He et al. 2016).
# Why add? Let $J$ be the Jacobian of what is added, $A(\mathrm{LN}_1(z))$ or $M(\mathrm{LN}_2(z))$, and $I$
# the identity. Backwards, the gradient is multiplied by $I + J^\top$, and over many parts by a product
#
# $$(I + J_1^\top)(I + J_2^\top)\cdots = I + J_1^\top + J_2^\top + J_1^\top J_2^\top + \cdots$$
#
# that begins with $I$: one copy of the gradient goes straight down, whatever the parts do. Without the
# addition only the product of all, $J_1^\top J_2^\top \cdots$, is left.
#
# ![A stream runs straight from the bottom to the top. Two branches leave it, pass a norm and then attention
# or the MLP, and are added to the stream.](pictures/block.svg)
#
# *What to see: nothing stands on the straight line but two sums. What a branch makes is added, and the
# gradient comes down the line undamped.*
#
# ## LayerNorm, three by three
#
# A sum of many parts grows, and parts that read it want numbers of a known size. **LayerNorm** gives each
# token, by itself, mean 0 and variance 1 over its $D$ numbers, then a learned scale $w$ and shift $b$ (both
# of $D$ numbers, the same for all tokens). For one row $x$, with a small $\varepsilon$ against division by 0,
#
# $$c = x - \operatorname{mean}(x), \qquad r = \frac{1}{\sqrt{\operatorname{mean}(c \circ c) + \varepsilon}},
#   \qquad \hat x = r\, c, \qquad y = w \circ \hat x + b.$$
#
# Compare chapter 01: apart from $\varepsilon$, $\hat x$ is the unit vector of the centred row, times
# $\sqrt D$. Three tokens, $D = 3$:

# %%
x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [5.0, -1.0, 5.0]])  # (L, D)
w, b, eps = np.array([1.0, 2.0, 0.5]), np.array([0.0, 0.0, 1.0]), 1e-6
c = x - x.mean(-1, keepdims=True)
r = 1 / np.sqrt((c**2).mean(-1, keepdims=True) + eps)  # (L, 1)
x_hat = r * c
y = w * x_hat + b
print("x̂ =\n", x_hat, "\n\ny =\n", y)
assert np.allclose(x_hat[0], x_hat[1], atol=1e-4)

# %% [markdown]
# Row 1 is ten times row 0, and both have the same $\hat x$: size and common shift of a row are gone.
#
# ## The gradient by hand
#
# Let $dy = \partial\mathcal L/\partial y$ be what comes back (the hints call it $G$). $w$ and $b$ are shared
# by all rows: $dw = \sum dy \circ \hat x$ and $db = \sum dy$, summed over the rows. Into the row itself goes
# $g = w \circ dy$, the gradient in $\hat x$. Two things happened to $x$, and we undo them in turn.
#
# **The scale.** $\hat x_k = r\, c_k$, and $r$ depends on every $c_k$:
# $\partial r/\partial c_k = -\tfrac12 r^3 \cdot \tfrac{2}{D} c_k = -\tfrac1D r^3 c_k$. So
#
# $$dc_k = r\, g_k - \tfrac1D r^3 c_k \sum_i g_i c_i
#   = r\,\big(g_k - \hat x_k \operatorname{mean}(g \circ \hat x)\big).$$
#
# **The centring.** Moving one $x_k$ moves the mean, and with it all entries of $c$ by $-\tfrac1D$:
# $dx = dc - \operatorname{mean}(dc)$. Since $\hat x$ has mean 0,
# $\operatorname{mean}(dc) = r \operatorname{mean}(g)$, and
#
# $$dx = r\,\big(g - \operatorname{mean}(g) - \hat x \operatorname{mean}(g \circ \hat x)\big).$$
#
# Two directions are lost: the one that shifts the row and the one that stretches it, for LayerNorm does not
# see either (the second apart from $\varepsilon$). With $D = 3$ only one direction is left. The usual mistake
# is to take mean and variance for constants, $dx = r\, g$:

# %%
dy = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, -2.0]])
g = w * dy
dw, db = (dy * x_hat).sum(0), dy.sum(0)
dx = r * (g - g.mean(-1, keepdims=True) - x_hat * (g * x_hat).mean(-1, keepdims=True))
slopes = central_differences(lambda x: layer_norm_np(x, w, b, eps)[0], (x,), 0, grad=dy)
theirs = torch.tensor(x, requires_grad=True)
layer_norm(theirs, torch.tensor(w), torch.tensor(b), eps).backward(torch.tensor(dy))
print("dx =\n", dx, "\n\ndw =", dw, "  db =", db, "\n")
for name, one in (("ours", dx), ("slopes", slopes), ("autograd", theirs.grad.numpy()), ("r g", r * g)):
    shift, stretch = one.sum(-1).round(4) + 0.0, (one * x_hat).sum(-1).round(4) + 0.0
    print(f"{name:<9} along the shift {shift}, along the stretch {stretch}")
    assert (np.abs([shift, stretch]) < 1e-3).all() == (name != "r g")

# %% [markdown]
# What to see: ours, the slopes and autograd have nothing along either lost direction, and $r\,g$ has. The law
# `gradients_are_the_slopes` catches it. Row 1, ten times as long as row 0, has a tenth of its gradient: a
# long row turns slowly, as in chapter 01.
#
# A second mistake stays hidden as long as means are small. The variance is also
# $\operatorname{mean}(x^2) - \operatorname{mean}(x)^2$, which needs one pass instead of two.
# But it subtracts two large numbers, and in 32 bits a stream that has drifted away from zero loses all its
# digits (the law is `ignores_a_common_shift`):

# %%
row = np.array([-1.0, 0.0, 4.0], dtype=np.float32)
for shift in (0, 100, 10_000):
    moved_row = row + np.float32(shift)
    one_pass = (moved_row**2).mean() - moved_row.mean() ** 2
    print(f"shift {shift:>6}: centred first {moved_row.var():.4f}, in one pass {one_pass:.4f}")
    assert abs(moved_row.var() - row.var()) < 1e-3
assert abs(one_pass - row.var()) > 1  # at the last shift no digit is right

# %% [markdown]
# **Exercise 1** · `layer_norm_np` · difficulty 3 of 3 · 40 minutes. **Exercise 2** · `layer_norm` ·
# difficulty 1 of 3 · 10 minutes. Open `chapters/exercises/transformer.py`, replace `raise Todo`, and run the
# next cell.

# %%
check("layer_norm_np", "layer_norm")

# %% [markdown]
# ## The MLP and its bend
#
# $M(x) = W_2\, \mathrm{gelu}(W_1 x + b_1) + b_2$ works on each token by itself, with $W_1$ ($h \times D$) and
# $W_2$ ($D \times h$), in most models $h = 4D$. Without the bend the two maps would be one map. The bend is
# $\mathrm{gelu}(x) = x\, \Phi(x)$, where $\Phi$ is the distribution function of the normal distribution:
# large $x$ pass, very negative ones do not, and between them the gate opens smoothly. With the normal density
# $\varphi = \Phi'$, the product rule gives $\mathrm{gelu}'(x) = \Phi(x) + x\, \varphi(x)$.

# %%
t = torch.linspace(-4, 4, 161, dtype=torch.float64).requires_grad_()
nn.functional.gelu(t).sum().backward()
z = t.detach()
Phi, phi = (1 + torch.erf(z / 2**0.5)) / 2, torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
print("Φ + x φ equals autograd's slope:", torch.allclose(Phi + z * phi, t.grad))
assert torch.allclose(Phi + z * phi, t.grad) and t.grad.min() < -0.1 and t.grad.max() > 1.1
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2), constrained_layout=True)
for ax, bent, cut, name in (
    (axes[0], z * Phi, z.relu(), "value"),
    (axes[1], Phi + z * phi, (z > 0).double(), "slope"),
):
    ax.plot(z, bent, label="gelu")
    ax.plot(z, cut, "--", color="0.5", label="max(x, 0)")
    ax.set(xlabel="x", ylabel=name)
    ax.legend()
plt.show()

# %% [markdown]
# What to see: a smooth form of $\max(x, 0)$, with a slope that dips a little below 0 and rises a little above
# 1, and no corner.
#
# ## The whole block, by hand
#
# All parts are there. Here are the blocks of the trained model written out, each with what it was given in
# the first picture's cell, its entry in `stream`. On the way we look at $P$: how much do words read from the
# picture, and patches from words? The numbers need a baseline. A token that weighs all tokens evenly gives
# the picture as large a share as it has tokens, and the words theirs.

# %%
L, D, H = ids.shape[1], stream[0].shape[2], model.config.heads
keys = torch.cat([real, states["image_mask"]], 1)[:, None, None]  # (B, 1, 1, L + 1 + N): no padding is read
parts = torch.stack([states["image_mask"].sum(1), real.sum(1)]) / keys.sum((1, 2, 3))  # (2, B)
even_picture, even_words = parts.mean(1).tolist()
shares = []
print("block  words' share of picture  patches' share of words  z is the library's")
print(f"{'even':>5}{even_picture:>25.0%}{even_words:>27.0%}")
for number, block in enumerate(model.encoder.blocks):
    z = stream[number]
    n = layer_norm(z, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, v = block.qkv(n).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)  # (B, H, L + 1 + N, d) each
    z = z + block.proj(attention(q, k, v, keys).transpose(1, 2).flatten(2))  # heads joined: (B, L + 1 + N, D)
    n = layer_norm(z, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    z = z + block.fc2(nn.functional.gelu(block.fc1(n)))
    P = (q @ k.mT / (D // H) ** 0.5).masked_fill(~keys, -torch.inf).softmax(-1)
    of_words, of_patches = P[:, :, :L][real[:, None].expand(-1, H, -1)], P[:, :, L + 1 :]
    asked, patches_asked = (p.sum(-1).mean().item() for p in (of_words[..., L:], of_patches[..., :L]))
    same = torch.allclose(z, stream[number + 1], atol=1e-3)
    shares.append((asked, patches_asked))
    assert same
    print(f"{number + 1:>5}{asked:>25.0%}{patches_asked:>27.0%}{same!s:>21}")
asked, patches_asked = np.transpose(shares)
assert (asked[[0, 1, 3]] < 0.9 * even_picture).all() and abs(asked[2] - even_picture) < 0.1
assert (patches_asked[:3] < even_words / 2).all() and patches_asked[3] > 2 * even_words

# %% [markdown]
# What to see: the six lines from `z = stream[number]` on are the whole block. The two columns count who reads
# whom. Words read less of the picture than even weights would give in blocks 1, 2 and 4, and about as much in
# block 3. Patches read next to nothing of the words in the first three blocks. In the last one they read half
# of theirs from words; but no head reads a patch after it, except the alignment of chapter 15. So what the
# heads of the words answer has gone one way, from the picture to the words.
#
# **Exercise 3** · `block` · difficulty 2 of 3 · 20 minutes. **Exercise 4** · `encoder` · difficulty 1 of 3 ·
# 10 minutes. Open `chapters/exercises/build_vilt.py` again. Your block calls your `multi_head` of chapter 04,
# or the library's as long as yours is not written.

# %%
check("block", "encoder")

# %% [markdown]
# ## Who decided that?
#
# One is tempted to say that training found this by itself, as nothing in the architecture says who reads whom
# and when. But the training of this model says something. In the first part of its run it wrote captions, and
# then no patch may see a word (chapter 08). Besides, it had a term which sends words and patches through the
# first half of the blocks *without seeing each other*, and lets a noun find its picture by what comes out
# (chapter 08; `minivlp/recipes/noun_contrast.py`). In a model of four blocks the first half ends after block
# 2, where the answer is not yet in the row, and block 3 is where it arrives. To know whether the term is the
# reason, one has to train without it. Here are four small models of four blocks, for some seconds each: six
# nouns, one object a picture, and two seeds, with the term and without it.

# %%
from minivlp.data import CPU_NOUNS
from minivlp.recipes.vilt import ViltRecipe, ViltSettings
from minivlp.recipes.vilt_batches import Part, SceneBatches, Stage
from minivlp.training import loop
from minivlp.training.run import ReadOnlyRun

SINGLE = Part("one", 1.0, canvas=24, sizes=(0.5, 0.77))  # one object a picture


class Small(ViltRecipe):
    """ViLT's losses on single objects; the nouns' term for a share `contrast` of the examples."""

    contrast = 0.0

    def batch(self, step):
        s, stages = self.settings, (Stage(1.0, (SINGLE,), self.contrast),)
        return SceneBatches(self.emojivl, self.nouns, self.tokenizer, stages, s.steps, s.batch, s.seed)(step)

    def check(self, model):
        return {}


class SmallApart(Small):
    contrast = 1.0


def arrival(kind, seed):
    """The mean probability of a hidden noun after 0, 1, … blocks of a small model, on 96 fresh pictures."""
    settings = ViltSettings(
        nouns=CPU_NOUNS[:6], canvas=24, dim=48, heads=2, hidden=96, steps=60, batch=16, warmup=10,
        matrix_lr=0.06, report_every=60, seed=seed,
    )  # fmt: skip
    recipe = kind(settings)
    model, tokenizer = recipe.model, recipe.tokenizer
    list(loop.steps(recipe, ReadOnlyRun("nowhere", {})))  # no file is written
    fresh = Scenes(emojivl, recipe.nouns, canvas=24, kinds={"one": 1}, sizes=SINGLE.sizes, seed=99)
    pictures = [fresh[i] for i in range(96)]
    words = torch.tensor([tokenizer.encode(picture.caption)[-1] for picture in pictures])
    ids, _, real = (torch.from_numpy(a) for a in tokenizer.batch(["a [MASK]"] * 96))
    passed, stages = [], [*model.encoder.blocks, model.encoder.norm]
    hooks = [stage.register_forward_pre_hook(lambda _, given: passed.append(given[0])) for stage in stages]
    with torch.inference_mode():
        model.eval().encode(ids, real, scene_pixels(pictures))
        for hook in hooks:
            hook.remove()
        logits = [model.mlm_logits(model.encoder.norm(z[:, 2])) for z in passed]  # place 2 is [MASK]
    return np.array([z.softmax(-1)[range(96), words].mean().item() for z in logits])


fig, ax = plt.subplots(figsize=(4.6, 2.6), constrained_layout=True)
early = {}
for name, kind, colour in (("without the term", Small, "tab:blue"), ("with the term", SmallApart, "tab:red")):
    curves = np.stack([arrival(kind, seed) for seed in (0, 1)])  # (seeds, blocks + 1)
    gained = (curves - curves[:, :1]) / (curves[:, -1:] - curves[:, :1])
    early[name] = gained[:, 2]
    ax.plot(gained.T, "o-", color=colour)
    ax.plot([], [], "o-", color=colour, label=name)
    print(f"{name:<17} of what four blocks gain, gained after two: {early[name]}")
ax.set(xlabel="blocks passed", ylabel="share of the gain", xticks=range(5))
ax.legend()
plt.show()
assert early["without the term"].mean() > early["with the term"].mean() + 0.2

# %% [markdown]
# What to see: without the term most of what the four blocks gain is there after two. With it most comes after
# them. In these small models, of two seeds each, the term decides where the answer arrives.
#
# Is that so in the large model? Its twin was trained by the same command with `--without contrast`, and ships
# too, in half precision. The next cell asks both what the first picture and the table of this chapter asked.


# %%
def by_block(model):
    """The hidden word's mean probability after 0, 1, … blocks; by block what words read of the picture."""
    passed, stages = [], [*model.encoder.blocks, model.encoder.norm]
    hooks = [stage.register_forward_pre_hook(lambda _, given: passed.append(given[0])) for stage in stages]
    model.encode(ids, real, scene_pixels(items))
    for hook in hooks:
        hook.remove()
    masked = [model.encoder.norm(z[:, :L][ids == tokenizer.mask_id]) for z in passed]  # (100, D) each
    told = [model.mlm_logits(row).softmax(-1)[range(100), answers].mean().item() for row in masked]
    read = []
    for block, z in zip(model.encoder.blocks, passed, strict=False):
        q, k, _ = block.qkv(block.norm1(z)).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4)
        P = (q @ k.mT / (D // H) ** 0.5).masked_fill(~keys, -torch.inf).softmax(-1)
        read.append(P[:, :, :L, L:].sum(-1).transpose(1, 2)[real].mean().item())
    return np.array(told), np.array(read)


large = {}
for name, file in (("with the term", "vilt_tiny"), ("without the term", "vilt_without_contrast")):
    twin = load_trained(WEIGHTS / f"{file}.safetensors")
    assert twin.tokenizer.tokens == tokenizer.tokens
    told, read = by_block(twin.model.requires_grad_(False))
    numbers = json.loads((WEIGHTS / f"{file}.json").read_text(encoding="utf-8"))["numbers"]["seen"]
    large[name] = told, read, numbers["pointing"]
    print(f"{name:<17} after 0, 1, … blocks {told}, pointing {numbers['pointing']:.3f}")
    print(f"{'':<17} words' share of the picture, by block {read}")
for told, _, _ in large.values():
    assert told[2] < 0.1 and told[3] > 0.3 and told[4] > told[3] + 0.2
assert large["without the term"][1][3] > 2 * large["with the term"][1][3]
assert large["with the term"][2] > large["without the term"][2] + 0.4

# %% [markdown]
# What to see: in the large model the answer is not there after two blocks in either twin, and comes in blocks
# 3 and 4 in both. So what held for the small models does not hold here, and the term is not the reason. Two
# things do differ. In the last block the words of the model without the term read twice as much of the
# picture. And it points worse by far: a word finds the box of its object less than half of the time (chapter
# 15 shows what pointing is). One run of each is no proof, but it is enough to take back a conclusion that
# small models had suggested.
#
# ## Before or after?
#
# Let $f$ be $A$ or $M$. The first transformer put the norm elsewhere: $z \leftarrow \mathrm{LN}(z + f(z))$,
# **post-norm**. Ours, $z \leftarrow z + f(\mathrm{LN}(z))$, is **pre-norm**, as in ViT and ViLT; Xiong et al.
# 2020 compare the two. What differs is the straight path. Under post-norm it runs through every norm, and
# each divides it by the size of a sum that has just grown. Measure it before training, in stacks of 24 blocks
# whose random weights have the variance 1 / (number of inputs): the gradient's norm at each depth and its
# cosine with the gradient at the top, which says how much of it came straight down.


# %%
def backwards(order, depth=24, D=64):
    """Gradients between the blocks, (depth + 1, L·D), and the factor of the straight path."""
    torch.manual_seed(0)
    z, target, straight = torch.randn(1, 32, D).requires_grad_(), torch.randn(1, 32, D), 1.0
    points = [z]
    for _ in range(depth):
        block, before = Block(D, 4, 4 * D), nn.LayerNorm(D)
        for part in (block.qkv, block.proj, block.fc1, block.fc2):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
        if order == "pre-norm":
            z = block(z)
        else:
            block.norm1 = block.norm2 = nn.Identity()  # attend(x) = x + A(x), transform(x) = x + M(x)
            for half in (block.attend, block.transform):
                total = half(z) if order == "post-norm" else half(z) - z
                straight /= total.std(-1).mean().item()
                z = before(total)
        points.append(z)
    out = nn.functional.layer_norm(z, (D,))
    return torch.stack([g.flatten() for g in torch.autograd.grad((out * target).sum(), points)]), straight


fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), constrained_layout=True)
kept = {}
for order in ("pre-norm", "post-norm", "no addition"):
    g, straight = backwards(order)
    kept[order] = torch.cosine_similarity(g, g[-1:], dim=1)  # (depth + 1,)
    axes[0].semilogy(g.norm(dim=1) / g[-1].norm(), label=order)
    axes[1].plot(torch.cosine_similarity(g, g[-1:], dim=1), label=order)
    if order == "post-norm":
        print(f"post-norm: the norms multiply the straight path by {straight:.0e}")
        assert straight < 1e-3
    if order == "pre-norm":
        assert g[0].norm() > 2 * g[-1].norm()
axes[0].set(xlabel="blocks below (24 = top)", ylabel="gradient norm, top = 1")
axes[1].set(xlabel="blocks below (24 = top)", ylabel="cosine with the top's")
axes[1].legend(fontsize=8, loc="upper left")
plt.show()
assert kept["no addition"][-2] < 0.2 and kept["post-norm"][-10] < 0.2 and kept["pre-norm"][0] > 0.1

# %% [markdown]
# What to see, from right (the top) to left (the bottom). Without addition the direction is lost in one block,
# under post-norm after some eight: two norms a block have shrunk the straight path. Under pre-norm a part of
# the gradient at the very bottom is still the one from the top. Its norm grows steadily on the way down,
# since the stream is small below and later norms divide by a larger one. Under post-norm the gradient
# does not vanish either, but what arrives has been through all the random maps. This is one stack with one
# seed, before any training; with smaller weights the parts add less and the two orders come closer.
#
# ## What a block costs
#
# Let $h$ be the MLP's hidden width. The maps hold $4D^2 + 4D$ and $2Dh + h + D$ numbers, the norms $4D$. With
# $h = 4D$ that is $12 D^2 + 13 D$. A map multiplies each token with each weight once; attention adds $2L^2 D$
# (chapter 04, $L$ being the whole sequence). So a block needs $L\,(4D^2 + 2Dh) + 2L^2D$ multiplications. Two
# numbers from elsewhere check these: PyTorch's own counter of operations, and the size that the paper gives
# for ViLT-B/32, 87.4 million numbers without the text embedding.

# %%
from torch.utils.flop_counter import FlopCounterMode

T, h, layers = stream[0].shape[1], model.config.hidden, model.config.layers
with FlopCounterMode(display=False) as counter:
    model.encoder(stream[0][:1])
ours = layers * (T * (4 * D * D + 2 * D * h) + 2 * T * T * D)
assert 2 * ours == counter.get_total_flops()
print(
    f"the small ViLT, {T} tokens: {ours:,} multiplications, PyTorch counts {counter.get_total_flops() // 2:,}"
)
D = 768
with torch.device("meta"):  # sizes without numbers
    size = sum(p.numel() for p in Encoder(D, 12, 4 * D, 12).blocks.parameters())
assert size == 12 * (12 * D * D + 13 * D)
patch = 3 * 32 * 32 * D + D
print(f"ViLT-B/32: blocks {size:,} + patches {patch:,} = {size + patch:,} numbers")
for T in (240, 2400):
    maps, square = 12 * T * 12 * D * D, 12 * 2 * T * T * D
    total, share = 2e-9 * (maps + square), square / (maps + square)
    print(f"{T} tokens: {total:.0f} billion operations in the blocks, of them {share:.0%} for S and O")

# %% [markdown]
# What to see: the counts agree. Two thirds of a block's numbers are the MLP's ($2Dh = 8D^2$ of $12D^2$), and
# at ViLT's length nearly all work is maps. The paper reports 55.9 billion operations for its 240 tokens.
# Counted as here, a multiplication and an addition being two, the blocks have 43 billion and the patches less
# than one more. We do not know how the paper counted, so this difference is unexplained.
#
# Now the times, of LayerNorm's rungs, forward and backward, and of the two halves of a block, forward. The
# fused rung is PyTorch's own: one kernel in place of our six, which keeps its input and two numbers a row for
# the way back, where autograd keeps the centred rows of ours too. The library's blocks use it.

# %% tags=["measured"]
from functools import partial
from timeit import repeat


def best(call):
    return 1000 * min(repeat(call, number=3, repeat=5)) / 3


x, one, zero = torch.randn(64 * 48, 96, requires_grad=True), torch.ones(96), torch.zeros(96)
arrays = [a.detach().numpy() for a in (x, one, zero)]
print(f"layer_norm_np {best(lambda: layer_norm_np(*arrays)):.1f} ms", end=", ")
print(f"layer_norm {best(lambda: layer_norm(x, one, zero).sum().backward()):.1f} ms", end=", ")
print(f"torch's {best(lambda: nn.functional.layer_norm(x, (96,), one, zero).sum().backward()):.1f} ms")
assert best(lambda: layer_norm(x, one, zero).sum().backward()) > best(
    lambda: nn.functional.layer_norm(x, (96,), one, zero).sum().backward()
)
block = Block(96, 3, 384)
for T in (48, 192, 768):
    z = torch.randn(1, T, 96)
    halves = best(partial(block.attend, z)), best(partial(block.transform, z))
    print("{:>4} tokens: attention's half {:.2f} ms, the MLP's {:.2f} ms".format(T, *halves))

# %% [markdown]
# What to see: PyTorch's norm is the fastest. A norm has little to compute and much to carry to and from
# memory, and ours carries more: one array for each of its steps. (Ours also looks for NaN.) The MLP's half
# grows like the number of tokens, attention's faster once its square is felt.
#
# ## Questions and small tasks
#
# Answers are folded. Think first, with pencil and paper where it says *derive*.
#
# <details><summary>1. <i>Explain.</i> Why does LayerNorm's gradient have nothing along the row itself, but
# for ε?</summary>Stretching a row does not change its normed form, so no loss behind the norm can depend on
# it.</details>
#
# <details><summary>2. <i>Derive.</i> RMSNorm divides by r = √(mean(x²) + ε) and does not subtract the mean: y
# = w ∘ x / r. What is dx?</summary>With x̂ = x / r and g = w ∘ dy: dx = (g − x̂ mean(g ∘ x̂)) / r. It is
# LayerNorm's gradient without the term of the mean. (`minivlp/decoder.py` has it.)</details>
#
# <details><summary>3. <i>Derive.</i> GELU's tanh form is ½x(1 + tanh u), u = √(2/π)(x + 0.044715 x³). What is
# its slope?</summary>½(1 + t) + ½x(1 − t²)√(2/π)(1 + 3 · 0.044715 x²), with t = tanh u.</details>
#
# <details><summary>4. <i>Derive.</i> A block is scaled: z ← z + α f(z) with one learned number α. What is dα,
# and what happens at α = 0?</summary>dα = ⟨dz, f(z)⟩. At α = 0 the block is the identity and f's weights get
# no gradient, but α does: it opens first.</details>
#
# <details><summary>5. <i>Predict, then run.</i> Multiply the stream by 10 before a pre-norm block. How much
# do its two branches change, and how much does the block's output direction? Try it with `block` of the
# trained model.</summary>The branches see a normed row, so they change next to nothing. The sum does: the
# stream is ten times as large, so what the block adds counts a tenth.</details>
#
# <details><summary>6. <i>Ablate.</i> Take away the second half of every block. What can such a model still
# compute, and what not?</summary>Means of rows that passed a norm and linear maps, with weights from
# softmaxes. A sequence of one token passes norms and linear maps alone: no GELU bends it.</details>
#
# ## What we left out
#
# * Dropout and stochastic depth: regularisers, of no use to a short pass over composed scenes.
# * The heads that read the last states: words (06), matching (07); and the training of all of it (08).
# * Two streams with attention between them, one of words and one of patches: chapter 19 has such blocks.
# * RMSNorm, which leaves out the mean; the law `equals_the_slow_loop` tells it from LayerNorm.
# * Warm-up of the learning rate, which the first, post-norm transformer was trained with.
#
# ## Sources
#
# Vaswani et al. 2017 (Attention is all you need), sections 3.1 (addition and norm, there post-norm), 3.3 (the
# MLP) and 5.3 (warm-up). He et al. 2016 (residual connections). Xiong et al. 2020 (pre-norm and post-norm).
# Dong, Cordonnier and Loukas 2021 (rank collapse). nostalgebraist 2020 (Interpreting GPT: the logit lens).
# Ba, Kiros and Hinton 2016 (LayerNorm), section 3. Hendrycks and Gimpel 2016 (GELU). Dosovitskiy et al. 2021
# (ViT), equations 2 to 4, pre-norm. Kim, Son and Kim 2021 (ViLT), equations 1 to 6 for types and the single
# stream, table 6 for sizes.
