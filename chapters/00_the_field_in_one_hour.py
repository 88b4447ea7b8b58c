# %% [markdown]
# # 00 · The field in one hour
#
# **The question.** A child who knows what "cat" means can point at one, pick the right photograph for "a cat
# asleep on a keyboard", say what a picture shows, and draw one. Nobody gave it a list of labels. What would a
# machine have to learn so that pictures and words mean the same to it, and from what could it learn that?
#
# This chapter shows what the field does, what its models are, and how one measures them. Nothing is derived
# yet. All models below are the small ones that ship with this course. Each was trained within minutes, on
# drawings.
#
# You need: nothing but Python to run the cells. Plan for one hour. There are questions, and no code to write.

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

from minivlp.data import Scenes, load_emojivl, scene_pixels
from minivlp.data.probes import article_and_noun, hide_slots, text_rows
from minivlp.evaluation.chameleon import draw
from minivlp.evaluation.point import plan
from minivlp.pictures.search import DrawingIndex
from minivlp.recipes.base import WEIGHTS, load_trained, recipe_of
from minivlp.recipes.coca import CocaWriter

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)
emojivl = load_emojivl()


def shipped(name):
    return load_trained(WEIGHTS / f"{name}_tiny.safetensors")


# %% [markdown]
# ## Search: which picture fits these words?
#
# The first model turns pictures into vectors, and sentences too, so that a sentence and the pictures that fit
# it come to lie in nearly one direction. Then a search is one product. Its drawings are by an artist whom
# training never showed, and nobody wrote the words of these queries beside them.

# %%
index = DrawingIndex(shipped("clip"), emojivl)
queries = ("a tree", "fruit", "a musical instrument")
fig, axes = plt.subplots(3, 6, figsize=(8, 4.6), constrained_layout=True)
for row, query in zip(axes, queries, strict=True):
    _, best = index.sheet(query, shown=6)
    for ax, (image, name, new) in zip(row, best, strict=True):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.set_title(name + " *" * new, fontsize=7)
    row[0].set_ylabel(query.removeprefix("a "), fontsize=7)
plt.show()
print(f"{len(index.concepts)} drawings by {index.artist}; a star marks concepts that training never named")
found = {query: [name for _, name, _ in index.sheet(query, shown=6)[1]] for query in queries}
print(found)
assert sum("tree" in name for name in found["a tree"]) >= 4 and "red apple" in found["fruit"]

# %% [markdown]
# What to see: each row has the six drawings whose vectors point most nearly where the query's does. Four of
# six for "a tree" are trees. For "fruit" four are fruits, behind a potato and a piece of cheese. For "a
# musical instrument", words that stood beside few drawings, the first is right and the rooster is not. A
# model of some thousand drawings is no search engine, but it finds drawings for words by what they show. This
# is **CLIP** (Radford et al. 2021), a **dual encoder**: one network for pictures and one for words, which
# meet in a dot product alone. Chapter 12 builds it.
#
# ## Fill in: which word is hidden here?
#
# The second model reads a picture and a sentence together. It was asked, again and again, which word is
# hidden, and whether the sentence is true. Nobody told it where anything is. Still one can ask where each
# word points: the last panels show which patches of the picture a word is matched with.

# %%
vilt = shipped("vilt")
scenes = Scenes(emojivl, vilt.nouns(emojivl), emojivl.unseen_artists, vilt.canvas, pairs="held_out", seed=21)
scene = scenes[0]
text, answer = hide_slots(scene, [0], vilt.tokenizer)
ids, mask, labels = text_rows(vilt.tokenizer, [text], [answer])
with torch.inference_mode():
    states = vilt.model.encode(ids, mask, scene_pixels([scene]))["text"]
    share, best = vilt.model.mlm_logits(states[labels >= 0][:1])[0].softmax(-1).topk(4)
said, heat = plan(vilt.model, vilt.tokenizer, scene, iters=1000)
fig, axes = plt.subplots(1, 4, figsize=(8, 2.4), constrained_layout=True)
axes[0].imshow(scene.image)
axes[0].set_title(text, fontsize=8)
axes[1].barh(range(4), share, color="#7FB8D8")
axes[1].set(xlim=(0, 1), ylim=(3.6, -0.6), yticks=[], xlabel="probability")
for y, k in enumerate(best):
    axes[1].text(0.03, y, vilt.tokenizer.tokens[k], va="center", fontsize=9)
for ax, slot in zip(axes[2:], scene.slots, strict=True):
    noun = article_and_noun(slot)[1]
    ax.imshow(scene.image, alpha=0.35)
    z = heat[said.index(noun)]
    ax.imshow(
        (z - z.mean()) / z.std(), cmap="OrRd", vmin=0, alpha=0.7, extent=(0, vilt.canvas, vilt.canvas, 0)
    )
    ax.set_title(f"where “{noun}” points", fontsize=8)
for ax in axes[[0, 2, 3]]:
    ax.set(xticks=[], yticks=[])
plt.show()
print(f"hidden was {vilt.tokenizer.decode(answer)}; the model says {vilt.tokenizer.tokens[best[0]]}")
assert int(best[0]) == answer[0]

# %% [markdown]
# What to see: the model finds the hidden word by looking, because the sentence alone does not tell it. Dark
# is where a word finds its patches. This is **ViLT** (Kim, Son and Kim 2021), a **single stream**: words and
# patches in one sequence. Part I of the course builds it, and in chapter 08 you train your own.
#
# ## Write and draw
#
# The third model writes a sentence about a picture, word after word. The fourth has one vocabulary for words
# and for pieces of pictures, so it can also go the other way and draw a sentence.

# %%
coca = shipped("coca")
recipe = recipe_of(coca)
writer = CocaWriter(recipe, coca.model.eval())
some = Scenes(emojivl, coca.nouns(emojivl), canvas=coca.canvas, pairs="held_out", seed=4)
shown = [some[i] for i in range(3)]
written = writer.write(shown)

chameleon = shipped("chameleon")
request = "a dog above a guitar"
with torch.inference_mode():
    drawn = draw(chameleon.model.eval(), chameleon.tokenizer, request, 3, np.random.default_rng(1))
fig, axes = plt.subplots(2, 3, figsize=(6.4, 4.6), constrained_layout=True)
for ax, item, sentence in zip(axes[0], shown, written, strict=True):
    ax.imshow(item.image)
    ax.set_title(f"it writes: {sentence}", fontsize=7)
for ax, pixels in zip(axes[1], drawn, strict=True):
    ax.imshow(pixels.permute(1, 2, 0).add(1).div(2).clamp(0, 1))
    ax.set_title(f"asked to draw: {request}", fontsize=7)
plt.setp(axes, xticks=[], yticks=[])
plt.show()
print("true captions:", [item.caption for item in shown])
two, last = written[:2], "a panda left of a wrench"
assert (
    two == [item.caption for item in shown[:2]] and written[2] == last
)  # "a wrench right of a panda", turned

# %% [markdown]
# What to see: above, three pictures of pairs that training never showed together, and what the model wrote.
# All three sentences are true; the third says in the other order what the caption says. Below, three drawings
# for one sentence. They are coarse, for the model puts 36 pieces of a picture beside one another, and no two
# are alike. The writer is **CoCa** (Yu et al. 2022, chapter 21), the draughtsman **Chameleon** (2024, chapter
# 23).
#
# ## What it is for
#
# | task | what goes in, what comes out | how it is measured | usual data |
# |---|---|---|---|
# | retrieval | a sentence → its picture, or back | R@K: how often it is among the first K | Flickr30k, COCO |
# | naming | a picture, a list of names → one name | accuracy | ImageNet and others |
# | question answering | picture, question → an answer | accuracy, weighted by people's answers | VQAv2, GQA |
# | reasoning | two pictures, a statement → true or false | accuracy | NLVR2 |
# | grounding | a phrase → a box | share of boxes with IoU ≥ 0.5 | RefCOCO |
# | captioning | a picture → a sentence | CIDEr: rare words shared with people's | COCO, nocaps |
# | binding | a true sentence, one with words exchanged | accuracy | Winoground, ARO |
# | generation | a sentence → a picture | FID, people's judgements | COCO |
#
# **Pretraining** means: one model first learns from many pictures with texts, with objectives that need no
# labels, and only then is it adapted to such tasks (**fine-tuning**). What it learns from are pairs. COCO has
# 123,000 photographs with five sentences each that people were paid to write. ViLT learnt from four such
# collections with 4 million pictures in all. CLIP learnt from 400 million pictures with the text that stood
# beside them on the web. The pictures of this course are drawings by several artists, with sentences composed
# from their names (`data_tiny/README.md`). In these one knows exactly what is true of a picture, so one can
# measure what a model has understood.
#
# Two of the measures, on five made-up scores. Rows are sentences, columns pictures, the own picture of
# sentence $i$ is picture $i$:

# %%
S = np.array([[9, 4, 1, 0, 2], [3, 5, 6, 1, 0], [2, 2, 8, 3, 1], [7, 1, 0, 6, 8], [0, 2, 1, 3, 4]])
rank = (S.diagonal()[:, None] < S).sum(1)  # how many pictures beat the own one
for K in (1, 2, 3):
    print(f"R@{K} = {(rank < K).mean():.1f}")


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    area = [(z[2] - z[0]) * (z[3] - z[1]) for z in (a, b)]
    return shared / (sum(area) - shared)


print(f"IoU of two boxes that overlap by half: {iou((0, 0, 2, 2), (1, 0, 3, 2)):.2f}")
assert (rank < 1).mean() == 0.6 and abs(iou((0, 0, 2, 2), (1, 0, 3, 2)) - 1 / 3) < 1e-9

# %% [markdown]
# What to see: R@1 is 0.6, since sentences 1 and 3 have a picture that scores higher. Two boxes that share
# half of their area have an IoU of a third only: the threshold of 0.5 is stricter than it sounds.
#
# ## One map of the families
#
# ![Six small diagrams: two towers that are compared; one sequence; towers and then blocks over both; a
# captioner; one vocabulary for words and codes; a bridge to a frozen reader.](pictures/families.svg)
#
# *What to see: all six have pictures and words below and a prediction above. They differ in where the two
# first meet: in a dot product, in the first block, in the middle, or at the door of a language model.*
#
# In all diagrams of this course a colour and a shape have one meaning:
#
# ![A blue square is a picture, a round orange box a word, a grey box a state, a slanted violet box a weight,
# a green pill a loss, black a mask.](pictures/legend.svg)
#
# *What to see: blue and round orange are given, violet is learned, green is what is asked. Red dashes go
# back.*
#
# Every family is an answer to **three questions**. Who sees whom? What is predicted, and from where? What
# learns, and what is frozen?
#
# | family | who sees whom | what is predicted | what learns | chapter |
# |---|---|---|---|---|
# | ViLT | all see all | hidden words, match, transport | all | 08 |
# | CLIP, SigLIP | two towers | the partner in the batch | all | 12, 13 |
# | X-VLM | towers, then words look at a region | partner, match, words, box | all | 19 |
# | FLAVA | towers, then all see all | hidden words and codes, match, partner | all | 22 |
# | MaskVLM | towers, then each looks at the other | hidden words, hidden pixels | all | 22 |
# | CoCa | words see earlier words, then the picture | partner, next word | all | 21 |
# | CM3Leon, Chameleon | tokens see earlier ones | next token of either kind | all, codes first | 23 |
# | LLaVA, MiniGPT-4 | the picture stands before the words | next word | a map, in stages | 25 |
# | BLIP-2 | queries look at a frozen picture | partner, match, next word | the queries | 26 |
#
# The second table has the **objectives**. Nearly all are one matrix, $S = s\, X Y^\top + b$, reduced to a
# number in different ways. Rows of $X$ and $Y$ may be pictures and captions, or patches and words:
#
# | objective | rows of X and Y | how S becomes a number | chapter |
# |---|---|---|---|
# | attention | queries and keys | a row softmax, then a mean of values | 04 |
# | masked words | states and the vocabulary | the row softmax at the right word | 06 |
# | NCE | samples, one score each | data or noise, yes or no | 10 |
# | InfoNCE | pictures and captions | row and column softmax at the diagonal | 12 |
# | sigmoid loss | pictures and captions | every cell by itself, yes or no | 13 |
# | Sinkhorn, IPOT | patches and words | a plan with given row and column sums | 14, 15 |
# | Chamfer, late interaction | patches and words | the maximum of each row and column | 16 |
# | nearest code | patches and a codebook | the maximum of each row | 23 |
#
# ## How words and pictures become rows
#
# A transformer reads rows of numbers. A picture is cut into **patches**, and each patch is one row (chapter
# 02). A sentence is cut into **pieces** of a vocabulary, which is learned by merging letters, and each piece
# is one row (chapter 03).
#
# ![The nine letters of clipboard stand below. They are merged pair by pair into the pieces clip and
# board.](pictures/merges.svg)
#
# *What to see: frequent neighbours are merged first. A word that was never seen falls into pieces that were.*
#
# ## A photograph through published ViLT
#
# The small models are built as the published ones are, so published weights load into the same classes. With
# the files of `vilt-b32-mlm` and a photograph beside this notebook, the next cell runs ViLT-B/32, a model of
# 111 million numbers. Without them it only says so. (Nothing is downloaded.)

# %%
folder, photograph = Path("vilt-b32-mlm"), Path("cats.jpg")
if folder.is_dir() and photograph.is_file():
    from PIL import Image

    from minivlp.models.vilt import load_vilt, vilt_pixels
    from minivlp.text import WordPiece

    model, words = load_vilt(folder).eval(), WordPiece.from_vocab(folder / "vocab.txt")
    ids, _, mask = map(torch.from_numpy, words.batch(["a bunch of [MASK] laying on a [MASK]."]))
    states = model.encode(ids, mask, *vilt_pixels([Image.open(photograph)]))
    print(words.decode(model.mlm_logits(states["text"])[ids == words.mask_id].argmax(-1)))
else:
    print("vilt-b32-mlm and cats.jpg are not here, so nothing was run")

# %% [markdown]
# ## The way through part I
#
# ![Chapter 00 leads to 01 one matrix, 02 patches and 03 words; these to 04 attention and 05 the block; these
# to 06 masking words and 07 matching pairs; and these to 08, ViLT, built and trained by
# you.](pictures/course.svg)
#
# *What to see: three roots, two machines, two questions, one model. You can begin with 01, 02 or 03.*
#
# ## Questions
#
# <details><summary>1. <i>Explain.</i> A shop has ten million pictures and wants answers within a tenth of a
# second. Dual encoder or single stream?</summary>Dual encoder. The vectors of the pictures are computed once,
# and a query costs one product. A single stream has to read the query together with every picture. In
# practice a dual encoder finds a hundred candidates and a single stream orders them.</details>
#
# <details><summary>2. <i>Explain.</i> Why can a dual encoder hardly tell "a dog left of a cat" from "a cat
# left of a dog"?</summary>Picture and sentence meet in one dot product. Nothing in its training needs the
# order, because in a batch of random pairs the objects alone find the partner. Chapter 07 measures
# it.</details>
#
# <details><summary>3. <i>Explain.</i> A model reads R@1 = 0.30. Is that good?</summary>One cannot say before
# one knows among how many pictures. Among 64, guessing gives 0.016; among 5, guessing gives 0.2. A number
# without its chance level says nothing.</details>
#
# <details><summary>4. <i>Predict.</i> A model that never sees the picture is asked for a hidden noun among
# 32. How often is it right?</summary>About 1 time in 32 if all nouns are equally frequent and the rest of the
# sentence does not help. Chapter 08 trains such a blind model, and calls what it reaches the price of
# guessing.</details>
#
# ## What we left out
#
# * Sound, video and actions: chapter 27 has video, the rest is beyond this course.
# * Models of this year. New names come every month; the three questions tell where they belong.
# * Whose pictures and sentences these are: licences, privacy, and what a web-sized collection contains.
#
# ## Sources
#
# Radford et al. 2021 (CLIP). Kim, Son and Kim 2021 (ViLT), section 3 for the families. Yu et al. 2022 (CoCa).
# Chameleon team 2024. Lin et al. 2014 and Chen et al. 2015 (COCO and its captions). Young et al. 2014
# (Flickr30k). Goyal et al. 2017 (VQAv2). Suhr et al. 2019 (NLVR2). Kazemzadeh et al. 2014 (RefCOCO). Vedantam
# et al. 2015 (CIDEr). Heusel et al. 2017 (FID). Thrush et al. 2022 (Winoground), Yuksekgonul et al. 2023
# (ARO).
