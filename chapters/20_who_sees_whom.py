# %% [markdown]
# # 20 · Who sees whom
#
# **The question.** BERT reads a whole sentence, GPT writes one word after another, CLIP keeps pictures and
# texts apart, a captioner lets words look at a picture. All four are the same stack of blocks. Where is the
# difference written?
#
# It is written in one small table of ones and zeros. This chapter makes the table, predicts from it which
# output of a network depends on which input, and checks the prediction against the derivatives of a real
# network. The same table shows a mistake that one layer hides and two layers reveal. Nothing is trained.
#
# You need: chapters 04 and 05. Plan for five hours with the eleven exercises and the three questions.

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
from torch import nn

from minivlp.masks import attention_blocks, attention_blocks_fused, influence, leaks, visible
from minivlp.pooling import attention_pool
from minivlp.targets import hide_patches, next_words, spans_back, spans_to_end
from minivlp.transformer import Block
from tests import check

torch.set_num_threads(1)
WHITE, BLUE, RED = "#F4F4F4", "#0072B2", "#D55E00"

# %% [markdown]
# ## The table
#
# A sequence is cut into **segments**: the patches of a picture, the words of a caption, some learned queries.
# Segment $s$ has $n_s$ tokens. Two things say who may look at whom:
#
# * a table $A$ of ones and zeros, where $A_{st} = 1$ lets the tokens of segment $s$ look at those of $t$;
# * a set $C$ of **causal** segments, in which no token looks at a later one.
#
# Rows look at columns. Token $i$ of segment $s(i)$ may look at token $j$ where
#
# $$M_{ij} = A_{s(i)\,s(j)} \;\text{ and not }\; \bigl(s(i) = s(j) \in C \text{ and } j > i\bigr).$$
#
# Here are seven systems with four patches and four words. Each is one row of the list below.

# %%
PATCHES, WORDS = 4, 4
SYSTEMS = {  # name: lengths, table, causal segments
    "BERT": ((WORDS,), ((1,),), ()),
    "GPT": ((WORDS,), ((1,),), (0,)),
    "ViLT": ((PATCHES, WORDS), ((1, 1), (1, 1)), ()),
    "CLIP": ((PATCHES, WORDS), ((1, 0), (0, 1)), (1,)),
    "captioner": ((PATCHES, WORDS), ((1, 0), (1, 1)), (1,)),
    "Chameleon": ((PATCHES, WORDS), ((1, 0), (1, 1)), (0, 1)),
    "CoCa's text": ((WORDS, 1), ((1, 0), (1, 1)), (0,)),
}


def draw(ax, matrix, lengths, title, colour=BLUE):
    """A bool matrix with lines between the segments."""
    picture = np.where(matrix[..., None], matplotlib_rgb(colour), matplotlib_rgb(WHITE))
    ax.imshow(picture, interpolation="nearest")
    for edge in np.cumsum(lengths)[:-1]:
        ax.axhline(edge - 0.5, color="black", linewidth=0.8)
        ax.axvline(edge - 0.5, color="black", linewidth=0.8)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def matplotlib_rgb(colour):
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


fig, axes = plt.subplots(1, 7, figsize=(10, 1.9), constrained_layout=True)
for ax, (name, (lengths, sees, causal)) in zip(axes, SYSTEMS.items(), strict=True):
    draw(ax, visible(lengths, sees, causal), lengths, name)
fig.supylabel("who looks", fontsize=8)
fig.supxlabel(
    "at whom (blue: may look). Patches first, then words; CoCa's text: words, then [CLS]", fontsize=8
)
plt.show()

# %% [markdown]
# What to see: CLIP is two blocks on the diagonal, so neither tower knows of the other. The captioner differs
# from it in one block: words look at patches. Chameleon differs from the captioner in that its patches are
# causal too, because it also has to draw them one by one. In CoCa's text the last token, [CLS], sees all
# words, and no word sees it.
#
# **Exercise 1** · `visible` · difficulty 1 of 3 · 20 minutes. Open `chapters/exercises/masks.py` and write
# the formula above.

# %%
check("visible")

# %% [markdown]
# ## What a table promises
#
# One look is not all. In a stack of blocks a token hands on what it has seen. A block adds to each token what
# it sees to what it has (chapter 05), so after one block output $i$ depends on input $j$ where $M_{ij}$ or $i
# = j$. After $k$ blocks it depends on $j$ where a path of at most $k$ looks leads from $i$ to $j$. For
# matrices of ones and zeros, with "or" for the sum and "and" for the product, that is a power:
#
# $$\text{output } i \text{ depends on input } j \iff \bigl[(M \text{ or } 1)^k\bigr]_{ij}.$$
#
# Call this the **influence** of the table over $k$ layers. It is a prediction about every network with these
# masks, whatever its weights. The check is the derivative: run a real stack of $k$ blocks and ask autograd
# which outputs move when an input moves.

# %%


def stack(mask, layers, seed=0):
    """A function from tokens (L, D) to tokens (L, D): `layers` blocks with random weights under one mask."""
    torch.manual_seed(seed)
    blocks = nn.ModuleList(Block(8, 2, 16) for _ in range(layers)).double()
    for parameter in blocks.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.5
    allowed = torch.from_numpy(mask | np.eye(len(mask), dtype=bool))

    def run(x):
        z = x[None]
        for block in blocks:
            z = block(z, allowed)
        return z[0]

    return run


def jacobian_says(mask, layers):
    """Which outputs depend on which inputs, (L, L) bool, by the derivatives of a real stack."""
    x = torch.randn(len(mask), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slopes = torch.autograd.functional.jacobian(stack(mask, layers), x)  # (L, D, L, D)
    return (slopes.abs().amax((1, 3)) > 0).numpy()


chosen = ("GPT", "CLIP", "captioner", "CoCa's text")
fig, axes = plt.subplots(2, 4, figsize=(7, 3.8), constrained_layout=True)
for column, name in zip(axes.T, chosen, strict=True):
    lengths, sees, causal = SYSTEMS[name]
    mask = visible(lengths, sees, causal)
    draw(column[0], influence(mask, 2), lengths, f"{name}: predicted")
    draw(column[1], jacobian_says(mask, 2), lengths, "derivatives", RED)
plt.show()
for name, (lengths, sees, causal) in SYSTEMS.items():
    mask = visible(lengths, sees, causal)
    assert (influence(mask, 2) == influence(mask, 1)).all(), name
    for layers in (1, 2, 3):
        assert (jacobian_says(mask, layers) == influence(mask, layers)).all(), (name, layers)
print("seven tables, one to three layers: the derivatives are non-zero exactly where the power says so")

# %% [markdown]
# What to see: above is the prediction, below the measurement, and the assertion compares all seven tables
# with one, two and three layers. For these tables two layers reach no further than one, since whoever may be
# reached in two looks may also be looked at. Such a table is called **closed**. The next one is not.
#
# **Exercise 2** · `influence` · difficulty 1 of 3 · 15 minutes. Open `chapters/exercises/masks.py`.

# %%
check("influence")

# %% [markdown]
# ## Find the leak
#
# A captioner predicts word $i + 1$ at position $i$. If the network can reach word $i + 1$ from there, it
# copies the answer, its loss falls below anything that is possible, and at test time, when the next word is
# not there, it writes nonsense. Somebody writes this mask: the words are causal, and since patches and words
# belong together, the patches may look at the words as well.
#
# **Question 1** · predict before you run · 5 minutes. Does this mask leak (a) in a network of one layer, (b)
# in a network of two? Decide before you run the next cell.

# %%
lengths, causal = (PATCHES, WORDS), (1,)
friendly = visible(lengths, ((1, 1), (1, 1)), causal)  # patches look at words
reads = [(PATCHES + i, PATCHES + i + 1) for i in range(WORDS - 1)]  # (position, the word it predicts)
fig, axes = plt.subplots(1, 3, figsize=(6, 2.2), constrained_layout=True)
draw(axes[0], friendly, lengths, "the mask")
for ax, layers in zip(axes[1:], (1, 2), strict=True):
    power = influence(friendly, layers)
    draw(ax, power, lengths, f"influence, {layers} layer{'s' * (layers > 1)}", RED)
    for i, t in reads:
        ax.add_patch(plt.Rectangle((t - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
plt.show()
for layers in (1, 2):
    print(f"{layers} layer(s): leaks {leaks(friendly, layers, reads)}")
    assert (jacobian_says(friendly, layers) == influence(friendly, layers)).all()
assert leaks(friendly, 1, reads) == [] and leaks(friendly, 2, reads) == reads
safe = visible(lengths, ((1, 0), (1, 1)), causal)
assert leaks(safe, 12, reads) == []

# %% [markdown]
# <details><summary>Answer</summary>
#
# (a) No. (b) Yes, everywhere. The black squares are the words that must not be reached. After one layer they
# are empty. In the first layer a patch sees all words; in the second a word looks at that patch, and the
# future comes back through the picture. A test with one layer finds nothing. The table with a zero where
# patches look at words has no leak at any depth.
# </details>
#
# Two mistakes of public code are of this family. open_clip's CoCa appends [CLS] to the text and, by default
# (`correct_cls_mask=False`), builds the padding mask as if [CLS] stood in front: in a padded text [CLS] sees
# the first padding and not itself (issue 549 of its repository). And the one-pass training of a public
# Q-Former (torchmultimodal) puts queries and text under one triangle, so that the first query cannot see the
# last one, although alone it does.
#
# **Exercise 3** · `leaks` · difficulty 1 of 3 · 10 minutes. Open `chapters/exercises/masks.py`.
#
# **Question 2** · break and explain · 15 minutes. The cell below takes from [CLS] the look at itself, half of
# open_clip's mistake. Which entries of the influence over one layer change? Say it before you run the cell,
# and say which entry the other half, the look at padding, changes.

# %%
lengths, sees, causal = SYSTEMS["CoCa's text"]
mask = visible(lengths, sees, causal)
wrong = mask.copy()
wrong[-1, -1] = False  # [CLS] does not see itself
same = bool((influence(wrong, 1) == influence(mask, 1)).all())
print(f"the influence of the wrong mask is the same: {same}")
assert same
check("leaks")

# %% [markdown]
# <details><summary>Answer</summary>
#
# No entry changes: $(M \text{ or } 1)$ has the diagonal in any case, because a block adds what is seen to
# what is there. Influence says on what an output may depend, not how. In open_clip the same shift also opens
# the first padding to [CLS], and that is an entry that changes: the vector of a text then depends on a token
# that is no word.
# </details>
#
# ## What need not be computed
#
# Under a table only $\sum_{st} A_{st}\, n_s n_t$ scores count, of $L^2$. A mask computes all of them and
# throws the others away. `attention_blocks_fused` never makes the mask: for each segment it walks over the
# blocks that this segment may see, with the running softmax of chapter 17, and leaves the others alone.
# Values are equal, and the work is that of the ones in the table.

# %%
rng = np.random.default_rng(0)
q, k, v = (torch.from_numpy(rng.normal(size=(1, 2, 60, 8))) for _ in range(3))
for name, lengths, sees, causal in (
    ("ViLT", (36, 24), ((1, 1), (1, 1)), ()),
    ("captioner", (36, 24), ((1, 0), (1, 1)), (1,)),
    ("CLIP", (36, 24), ((1, 0), (0, 1)), (1,)),
):
    plain = attention_blocks(q, k, v, lengths, sees, causal)
    assert torch.allclose(plain, attention_blocks_fused(q, k, v, lengths, sees, causal))
    n = np.array(lengths)
    share = float(n @ np.array(sees) @ n) / n.sum() ** 2
    print(f"{name:<10} {share:4.0%} of all scores count in its blocks")

# %% [markdown]
# The times are in `python -m minivlp bench --only blocks`.
#
# A second saving is a **cache**. A set of tokens that look only at one another can be computed once, whatever
# is appended. That is why the captioner's picture is read once for a sentence of any length, and why words
# that are causal are kept while the sentence grows.

# %%
lengths, sees, causal = SYSTEMS["captioner"]
mask = visible(lengths, sees, causal)
run, x = stack(mask, 2), torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
for kept in range(PATCHES, PATCHES + WORDS + 1):  # the picture, then one word more at a time
    part = stack(mask[:kept, :kept], 2)(x[:kept])
    assert torch.allclose(part, run(x)[:kept], atol=1e-12)
print("the picture and any number of words: as if the later words were not there")

# %% [markdown]
# **Exercise 4** · `attention_blocks_np` · difficulty 1 of 3 · 10 minutes. **Exercise 5** · `attention_blocks`
# · difficulty 1 of 3 · 5 minutes. **Exercise 6** · `attention_blocks_fused` · difficulty 3 of 3 · 60 minutes,
# best after chapter 17. Open `chapters/exercises/masks.py`.
#
# **Question 3** · explain · 10 minutes. Two towers could also be run as two networks. What does the one
# network with the table of CLIP share that two networks do not, and what does it not save?
#
# <details><summary>Answer</summary>
#
# It shares its weights: one set of matrices reads pictures and words. That is how one Q-Former and one video
# model (chapters 26 and 27) serve as towers and as a reader of both, by a change of the table. It saves no
# scores over two networks; the blocks that count are the same.
# </details>

# %%
check("attention_blocks_np", "attention_blocks", "attention_blocks_fused")

# %% [markdown]
# ## The second dial: what is predicted
#
# A table says what may be known. What is asked is an array of labels, one for each position, with −100 where
# nothing is asked. One loss, `mlm_loss` of chapter 06, serves every array:
#
# | asked | labels |
# |---|---|
# | hidden words (chapter 06) | the true id under each [MASK] |
# | the next word (chapter 21) | at position $i$ the word of $i + 1$ |
# | hidden patches (chapter 22) | the code of each hidden patch |
# | a span that was cut out (chapter 23) | moved to the end, and written there |

# %%
ids = np.array([[2, 11, 12, 13, 3, 0], [2, 14, 15, 3, 0, 0]])  # [CLS] words [SEP] padding
mask = ids != 0
print("ids        ", *ids.tolist())
print("next words ", *next_words(ids, mask).tolist())
hidden = hide_patches((6, 6), 0.6, np.random.default_rng(0), block=2).reshape(6, 6)
print(
    f"{hidden.sum()} of 36 patches hidden in blocks:", *("".join(".#"[int(h)] for h in row) for row in hidden)
)
document, marks, end = np.arange(10, 20), [5, 6], 9
moved = spans_to_end(document, [(2, 4), (7, 8)], marks, end)
print("spans moved to the end:", np.asarray(moved).tolist())
assert np.array_equal(spans_back(moved, marks, end), document)
assert hidden.sum() == round(0.6 * 36)

# %% [markdown]
# What to see: no label is asked at the last word and at padding. The patches are hidden in blocks, of
# which the last is cut so that their number is exact; a coin for each patch would hide now more and now less.
# In the last line each span has left a mark behind and stands after it at the end, so a causal model that
# reads on knows both sides of the hole before it has to fill it (CM3, chapter 23).
#
# **Exercise 7** · `next_words` · difficulty 1 of 3 · 10 minutes. **Exercise 8** · `hide_patches` · difficulty
# 2 of 3 · 20 minutes. **Exercise 9** · `spans_to_end` · difficulty 2 of 3 · 20 minutes. Open
# `chapters/exercises/targets.py`.

# %%
check("next_words", "hide_patches", "spans_to_end")

# %% [markdown]
# ## A table with a rectangle: queries
#
# Some models put a fixed number of learned **queries** between a picture and whoever reads it. $Q$ queries
# look across at $N$ patches, and nobody looks back: a table with $Q$ rows and $N$ columns. The output has $Q$
# rows for any $N$, so a large picture costs the reader no more than a small one.

# %%
queries = torch.from_numpy(rng.normal(size=(3, 8)))
for N in (4, 36, 400):
    pooled = attention_pool(queries, torch.from_numpy(rng.normal(size=(2, N, 8))))
    print(f"{N:>3} patches → {tuple(pooled.shape)}")
    assert pooled.shape == (2, 3, 8)
patches = torch.from_numpy(rng.normal(size=(1, 36, 8)))
shuffled = patches[:, torch.from_numpy(rng.permutation(36))]
assert torch.allclose(attention_pool(queries, patches), attention_pool(queries, shuffled))
print("shuffled patches give the same: queries alone know no places")

# %% [markdown]
# The last line is the price. A pooled picture has no order unless positions are added to the keys. Qwen-VL
# adds them to queries and keys and leaves the values clean; so does `Resampler` in `minivlp/pooling.py`.
#
# **Exercise 10** · `attention_pool_np` · difficulty 2 of 3 · 25 minutes. **Exercise 11** · `attention_pool` ·
# difficulty 1 of 3 · 10 minutes. Open `chapters/exercises/pooling.py`.

# %%
check("attention_pool_np", "attention_pool")

# %% [markdown]
# ## The third dial
#
# The third question is what learns. A frozen part has no gradient and is left out of the optimiser, for
# weight decay also moves a weight whose gradient is zero. Chapter 25 turns that dial.
#
# ## What we left out
#
# * Tables that differ from head to head or from layer to layer; no model of this course has them.
# * Sliding windows and other sparse masks within a segment, which save work in long texts.
# * Relative positions: a table says who is seen, not how far away.
#
# ## Sources
#
# Masks in place of architectures: Dong et al. 2019 (UniLM), figure 1; Li et al. 2023 (BLIP-2), figure 2.
# [CLS] behind the text: Yu et al. 2022 (CoCa), section 3.2. Spans at the end: Aghajanyan et al. 2022 (CM3).
# Whole sides hidden: Xu et al. 2021 (VLM). Queries that look across: Lee et al. 2019 (Set Transformer),
# section 3.2; Bai et al. 2023 (Qwen-VL), section 2.1.
