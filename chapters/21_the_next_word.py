# %% [markdown]
# # 21 · The next word
#
# **The question.** CLIP cannot tell “a dog left of a guitar” from “a guitar left of a dog” (chapter 12). ViLT
# learned it from matching by a curriculum of four stages, and without one once it wrote captions first
# (chapter 08). A model that only writes learns it in minutes. Why is it so easy to write what is so hard to
# match?
#
# The model of this chapter is CoCa (Yu et al. 2022). It does both at once: it compares pictures with
# captions, and it writes captions word by word. So the two can be asked the same question on the same
# weights.
#
# You need: chapters 05, 06, 12 and 20. Plan for three hours with the eight exercises.

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
from dataclasses import replace
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp.data import RELATIONS, Scenes
from minivlp.data.probes import swapped, true_captions
from minivlp.data.scenes import with_article
from minivlp.evaluation.captions import FLOOR, blind_nats
from minivlp.masks import influence, visible
from minivlp.models.coca import WORDS_THEN_CLS, Coca, small_init
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.recipes.coca import CocaWriter
from minivlp.targets import next_words
from minivlp.training.loop import optimizers, rate

torch.set_num_threads(1)
trained = load_trained(None, "coca")  # shipped: python -m minivlp train --model coca
recipe, model, tokenizer = recipe_of(trained), trained.model, trained.tokenizer
writer = CocaWriter(recipe, model)
source = Scenes(recipe.emojivl, recipe.nouns, recipe.emojivl.unseen_artists, 48, pairs="held_out", seed=3)
scenes = [source[i] for i in range(150)]  # an artist and pairs of nouns that training never showed

# %%
fig, axes = plt.subplots(2, 4, figsize=(8, 4.6), constrained_layout=True)
for ax, scene, text in zip(axes.flat, scenes, writer.write(scenes[:8]), strict=False):
    ax.imshow(scene.image)
    ax.set(xticks=[], yticks=[])
    ax.set_title(text, fontsize=7.5, color="#009E73" if text in true_captions(scene) else "#D55E00")
plt.show()

# %% [markdown]
# What to see: above each picture stands the sentence that the shipped model writes, green where it is true.
# The artist of these drawings and these pairs of nouns are new to it. Either order of naming counts as true:
# “a dog left of a guitar” and “a guitar right of a dog” say the same.
#
# ## The next word
#
# A caption is a row of words $w_1, \dots, w_L$ with an end mark behind it. Any probability of a row can be
# written as a product, the **chain rule**:
#
# $$ p(w_1 \dots w_L \mid x) = \prod_{i} p(w_{i} \mid w_1 \dots w_{i-1}, x). $$
#
# Each factor is a softmax over the vocabulary, read at position $i - 1$. The labels are the caption itself,
# moved by one place (chapter 20), and the loss is `mlm_loss` of chapter 06 once more. Nothing else is new: a
# captioner is a masked-word model whose every word is hidden from the words before it.

# %%
scene = scenes[0]
ids, _, mask = tokenizer.batch([scene.caption])
print("reads   ", [tokenizer.tokens[i] for i in ids[0]])
print("predicts", [tokenizer.tokens[i] if i >= 0 else "–" for i in next_words(ids, mask)[0]])
with torch.no_grad():
    _, tokens = model.encode_image(recipe.pixels([scene]))
words = writer.words(scene.caption, tokens)
for word, log_p in words:
    print(f"  log p = {log_p:7.3f}   {word}")
whole = writer.log_p([scene.caption], [scene])[0]
print(f"sum {sum(log_p for _, log_p in words):.4f}, the caption's own score {whole:.4f}")
assert math.isclose(sum(log_p for _, log_p in words), whole, abs_tol=1e-3)

# %% [markdown]
# A model of this kind gives every sentence a probability, and all sentences together have one. Here the
# grammar is known, so its sentences can be counted: two different nouns of 32 and one of four relations are
# 3,968 captions. How much of its probability does the model give to them?

# %%
names = [with_article(c) for c in recipe.nouns]
captions = [f"{a} {r} {b}" for a, b in permutations(names, 2) for r in RELATIONS]
log_p = np.concatenate([writer.log_p(part, [scene] * len(part)) for part in np.array_split(captions, 8)])
total, best = np.exp(log_p).sum(), np.argsort(-log_p)[:4]
print(f"{len(captions):,} captions have {total:.4f} of the probability; the likeliest:")
for i in best:
    print(f"  {np.exp(log_p[i]):.4f}  {captions[i]}")
assert 0.9 < total <= 1 + 1e-4

# %% [markdown]
# **Exercise 1** · explain · 10 minutes. Two of the four sentences above may say the same thing. Why can no
# model give the caption that was written for this picture more than one half on average?
#
# <details><summary>Answer</summary>
#
# Either noun may be named first, and training drew one of the two orders by a coin that the picture does not
# show. The best that is possible is one half for each of the two true sentences, which costs $\ln 2 = 0.69$
# nats a caption. It is the floor of every captioner here.
# </details>
#
# ## Nats a caption
#
# How much does the picture tell? One who knows the grammar and no picture pays the entropy of captions, which
# is known exactly: $\ln$ of the number of pairs, two orders and four relations. One who sees the picture
# perfectly pays $\ln 2$. A captioner lies in between, and its distance from the ceiling is what it has read
# in the picture.

# %%
own = -writer.log_p([s.caption for s in scenes], scenes)
ceiling = blind_nats(source)
print(f"floor {FLOOR:.2f}, this model {own.mean():.2f}, ceiling {ceiling:.2f} nats a caption")
assert FLOOR < own.mean() < ceiling and np.median(own) < 2 and (own > ceiling).any()
fig, ax = plt.subplots(figsize=(6, 1.6), constrained_layout=True)
ax.hist(own, bins=40, color="#0072B2")
for x, text in ((FLOOR, "picture known"), (ceiling, "grammar known")):
    ax.axvline(x, color="#D55E00")
    ax.text(x + 0.1, ax.get_ylim()[1] * 0.8, text, fontsize=8)
ax.set(xlabel="nats of a caption, for one picture each", ylabel="pictures")
plt.show()

# %% [markdown]
# What to see: half of the captions cost less than two nats. Some cost more than the ceiling: a model that is
# sure of a wrong noun pays for it.
#
# ## One pass, two halves
#
# CoCa reads the text twice. The **first half** is causal and sees no picture; behind the words stands a token
# [CLS], which has seen all of them and is compared with the picture. The **second half** takes the states of
# the words on, still causal, and in each layer the words also look across at the tokens of the picture. The
# output predicts the next word. Two losses, one pass:
#
# $$ L = \text{InfoNCE}(x, y) + 2 \cdot \text{cross-entropy of the next word}. $$
#
# Everything hangs on who sees whom. If the first half saw the picture, $y$ would carry $x$ and the contrast
# would be won by copying. If a word saw a later one, it would be copied.

# %%
table = visible((4, 1), WORDS_THEN_CLS, causal=(0,))
print("first half, four words and [CLS]; rows look at columns:")
print("\n".join("".join(".#"[int(m)] for m in row) for row in table))
assert (influence(table, 3) == table).all()  # no depth adds a path
ids_, mask_ = (torch.from_numpy(a) for a in (ids, mask))
with torch.no_grad():
    y, states = model.encode_text(ids_, mask_)
    (x_a, tokens_a), (x_b, tokens_b) = (model.encode_image(recipe.pixels([s])) for s in scenes[:2])
    moved = (model.next_logits(states, tokens_a) - model.next_logits(states, tokens_b)).abs().amax(-1)[0]
print("another picture moves the next word's scores at every position:", moved.numpy().round(1))
assert bool((moved > 0.1).all()) and y.shape == x_a.shape

# %% [markdown]
# **Exercise 2** · predict before you run · 10 minutes. Train with captions alone (`--without contrast`).
# Which parameters get no gradient at all? Name three. `tests/test_coca.py` has the answer in
# `test_cls_learns_nothing_from_captions`.
#
# **Exercise 3** · break and repair · 20 minutes. In `WORDS_THEN_CLS` let the words look at [CLS]. Which
# entries of `influence` over two layers change, and what can a word then copy? Print both tables.
#
# <details><summary>Answer</summary>
#
# [CLS] sees every word, so after two layers every word has seen every other: the whole table is full, and
# position $i$ reaches word $i + 1$ through [CLS]. One layer shows nothing but the look at [CLS] itself.
# </details>
#
# ## Writing
#
# A sentence is written one word at a time: the words so far go in, the next one comes out. Three ways to
# choose it: the likeliest (**greedy**), a draw from the probabilities, or **beams**, which keep the best few
# beginnings. Keys and values of the words before do not change when a word is added, because no word sees a
# later one. So they are kept, and a new word costs one row in place of all. That cache changes nothing:

# %%
with torch.no_grad():
    cache, rows = None, []
    for word in ids_.unbind(1):
        scores, cache = model.follow(word, tokens, cache)
        rows.append(scores)
    difference = (torch.stack(rows, 1) - model.next_logits(states, tokens)).abs().max().item()
print(f"one word at a time against all at once: largest difference {difference:.1e}")
assert difference < 1e-3
((greedy, p_greedy),) = writer.sentences(tokens)
((beam, p_beam),) = writer.sentences(tokens, beams=8)
print(f"greedy   {p_greedy:7.3f}  {greedy}\nbeams    {p_beam:7.3f}  {beam}")
for seed in range(3):
    ((text, p),) = writer.sentences(tokens, rng=np.random.default_rng(seed))
    print(f"drawn    {p:7.3f}  {text}")
assert p_beam >= p_greedy - 1e-3

# %% [markdown]
# **Exercise 4** · explain · 10 minutes. Beams never find a less probable sentence than greedy here. Is that
# so in general?
#
# <details><summary>Answer</summary>
#
# No. The greedy beginning may be thrown out of the beams by others that are better at first and end worse.
# With as many beams as there are beginnings the best sentence is found for certain.
# </details>
#
# ## Order: the caption knows, the contrast does not
#
# Now the question of this chapter. For each picture take its caption and the same words with the nouns
# exchanged. The second is false. Ask the same model twice: is the true caption more probable, and is its
# vector $y$ more like the picture's $x$?

# %%
true = [s.caption for s in scenes]
false = [swapped(s) for s in scenes]
by_caption = writer.log_p(true, scenes) > writer.log_p(false, scenes)
by_contrast = writer.contrast(true, scenes).diagonal() > writer.contrast(false, scenes).diagonal()
print(f"by the caption's probability {by_caption.mean():.3f}, by the contrast {by_contrast.mean():.3f}")
assert by_caption.mean() > 0.95 and 0.35 < by_contrast.mean() < 0.65

with torch.no_grad():
    vectors = []
    for texts in (true, false, true[1:] + true[:1]):
        some, _, real = tokenizer.batch(texts)
        vectors.append(model.encode_text(torch.from_numpy(some), torch.from_numpy(real))[0])
own, exchanged, other = vectors
near, far = ((own * v).sum(1) for v in (exchanged, other))
fig, ax = plt.subplots(figsize=(6, 2), constrained_layout=True)
for values, text, colour in ((near, "nouns exchanged", "#D55E00"), (far, "another caption", "#0072B2")):
    ax.hist(values.numpy(), bins=40, range=(-1, 1), alpha=0.7, label=text, color=colour)
ax.set(xlabel="cosine of two captions' vectors", ylabel="captions")
ax.legend(fontsize=8)
plt.show()
print(f"cosine with its nouns exchanged {near.mean():.3f}, with another caption {far.mean():.3f}")
assert near.mean() > far.mean() + 0.3

# %% [markdown]
# What to see: for the contrast the two captions are nearly one. Among the other captions of a batch there is
# hardly ever one with the same two nouns, so the contrast is won by knowing *which* nouns are there. The
# caption loss asks at the relation word, after one noun has been named: is the other one left or right of it?
# That question comes up in every row.
#
# **Exercise 5** · explain · 10 minutes. Could a contrast learn the order from other batches? Which captions
# would have to be in the batch? (Chapter 08 has them.)
#
# ## Do the pictures' tokens know the order?
#
# Perhaps the towers never learned where things are, because the contrast does not ask. Test it: keep both
# encoders as they are, throw the second half away, and train a new one on captions alone, for some ten
# seconds. Frozen parts get no gradient and no optimiser (the third dial of chapter 20). Here is the whole
# loop.

# %%
torch.manual_seed(0)
fresh, new = small_init(Coca(model.config)), ("blocks", "across", "norm", "vocabulary")
for part in new:
    getattr(model, part).load_state_dict(getattr(fresh, part).state_dict())
model.requires_grad_(False)
for part in new:
    getattr(model, part).requires_grad_(True)
frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
recipe.settings = settings = replace(recipe.settings, steps=120, batch=32, warmup=10, contrast_weight=0.0)
tuned, curve = optimizers(model, recipe.matrices(model), settings), []
tested = scenes[:60]
for step in range(settings.steps):
    if step % 20 == 0:
        told = writer.log_p(true[:60], tested) > writer.log_p(false[:60], tested)
        curve.append((step, -writer.log_p(true[:60], tested).mean(), told.mean()))
    loss = sum(recipe.loss(model, recipe.batch(step)).values())
    for optimizer in tuned:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in tuned:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate(settings, step)
        optimizer.step()
told = writer.log_p(true[:60], tested) > writer.log_p(false[:60], tested)
curve.append((settings.steps, -writer.log_p(true[:60], tested).mean(), told.mean()))
for step, nats, order in curve:
    print(f"step {step:>3}: {nats:5.2f} nats a caption, order {order:.2f}")
assert curve[-1][2] > 0.85 and curve[0][2] < 0.7
assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

# %%
steps, nats, order = zip(*curve, strict=True)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.2), constrained_layout=True)
left.plot(steps, nats, ".-", color="#0072B2")
left.axhline(ceiling, color="#999999", linestyle=":")
left.set(xlabel="steps of the new second half", ylabel="nats a caption")
right.plot(steps, order, ".-", color="#D55E00")
right.axhline(0.5, color="#999999", linestyle=":")
right.set(xlabel="steps of the new second half", ylabel="true beats exchanged", ylim=(0.4, 1.02))
plt.show()

# %% [markdown]
# What to see: within a hundred steps of 32 pictures the new half tells the order, while not a bit of the
# encoders has changed. So their tokens knew where things are all along. The order is lost where everything is
# summed up in one vector and compared by a dot product.
#
# A caveat: these encoders were trained with captions too. What the contrast alone would have left in them is
# **Exercise 6** · ablate · 20 minutes and the time of a run: `python -m minivlp train --model coca --without
# captions`, then the last two cells on that model.
#
# **Exercise 7** · predict before you run · 15 minutes. The blind model of `runs/coca/blind` sees grey
# pictures. What are its nats on pairs of training, and on held-out pairs, which it never read?
#
# <details><summary>Answer</summary>
#
# On training pairs the entropy of their captions, $\ln(441 \cdot 2 \cdot 4) = 8.17$, and no less if nothing
# leaks. On held-out pairs more than that: it has learned that these pairs do not occur.
# </details>
#
# ## Bugs of public code
#
# Six mistakes that were made in published captioners, each of which trains without an error:
#
# * open_clip builds the [CLS] mask for a [CLS] in front (issue 549); the right one has to be asked for.
# * Its loss takes id 0 for padding, and in CLIP's vocabulary 0 is the word “!”: no caption learns it.
# * Before that, padding was not ignored at all: −100 was given where 0 was looked for (issue 316).
# * An older `generate` showed the prompt, not the text so far, to the rule of a minimum length, so the end
#   was forbidden for ever (commit 00160c52).
# * The decoder's own initial values were never set (issues 551 and 554).
# * 76 words or 77: somebody has to make room for [CLS] (issues 691 and 458).
#
# **Exercise 8** · explain · 10 minutes. Which of the six would this chapter's checks find? Name the cell.
#
# ## What we left out
#
# * The pooler of the published CoCa, whose queries sum the picture up before the words see it. At this size
#   it hides where things are: `chapters/main_job.md` has the numbers. `load_coca` reads published weights.
# * Metrics that compare words (BLEU, CIDEr); here it is known which sentences are true.
# * Captions from the web, of which many do not describe their picture.
#
# ## Sources
#
# CoCa: Yu et al. 2022, sections 3.2 and 4.1. Captioners and order: Tschannen et al. 2023; Lin et al. 2023
# (VisualGPTScore). The issues and the commit are those of open_clip's repository.
