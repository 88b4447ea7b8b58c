# %% [markdown]
# # 06 · Masking words
#
# **The question.** In each line below, one word of a caption is hidden. Which of the blanks can be filled
# without looking at the picture?
#
# Hiding a word and asking for it back is the cheapest question to put to a model: the answer stands in the
# data already. But a blank that its neighbours fill teaches nothing about pictures. This chapter is about
# what to hide, how the answer is scored, and what the scoring costs. The loss is one more reduction of the
# matrix of chapter 01: rows are the hidden places, columns all words of the vocabulary.
#
# You need: chapter 01 (softmax, $G$), 03 (word pieces), and of 04 and 05 only that a transformer gives every
# token a state. Plan for three hours with the three exercises.

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

from collections import Counter
from itertools import permutations

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

from minivlp.data import RELATIONS, Scenes, held_out, load_emojivl
from minivlp.data.probes import hide_relation, hide_slots
from minivlp.evaluation.reading import encoded
from minivlp.mlm import IGNORE, mask_tokens, mlm_loss, mlm_loss_fused, mlm_loss_np
from minivlp.recipes.base import WEIGHTS, load_trained
from minivlp.text import WordPiece
from tests import check
from tests.bugs.mlm import any_piece_chooses, choose, hide
from tests.laws import central_differences

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)

# %%
emojivl = load_emojivl()
trained = load_trained(WEIGHTS / "vilt_tiny.safetensors")  # the small ViLT that comes with the course
nouns = trained.nouns(emojivl)  # the nouns that it was trained on
source = Scenes(emojivl, nouns, canvas=trained.canvas, seed=5)
scenes = [source[i] for i in range(256)]

first = next(scene for scene in scenes if scene.relation == "left of")
words = first.caption.split()
fig, (ax, beside) = plt.subplots(1, 2, figsize=(6, 1.9), width_ratios=(1, 2.2), constrained_layout=True)
ax.imshow(first.image)
ax.set(xticks=[], yticks=[], title="the picture", aspect="equal")
beside.axis("off")
for line, place in enumerate((1, 2, 3, 0)):
    blank = [*words[:place], "[MASK]", *words[place + 1 :]]
    beside.text(0, 0.85 - 0.25 * line, f"{line + 1}.   {' '.join(blank)}", fontsize=11)
plt.show()

# %% [markdown]
# What to see: blank 4 is an article and blank 3 is *of*, with or without a picture. Blank 2 is *left* or
# *right*: the *of* behind it excludes *above* and *below*. Only blank 1 is open.
#
# ## What the text alone gives away
#
# This can be measured. Let $w$ be a hidden word and $c$ the rest of the caption. Someone who knows how often
# every caption occurs, but sees no picture, answers with the probabilities $p(w \mid c)$ and pays $-\log p(w
# \mid c)$ for the true word. With the natural logarithm this price is counted in **nats**: a guess among $n$
# equally likely words costs $\log n$ nats. The mean over all captions is the **conditional entropy** $H(w
# \mid c)$, and nobody who reads text alone pays less on average, whatever the network.
#
# In our scenes every ordered pair of nouns that may meet in training is equally likely, with each of four
# relations. So the probabilities are found by counting. The first vocabulary here is small on purpose, so
# that nouns fall into pieces, as rare words do in any vocabulary; the second holds all our words whole.

# %%
pairs = [(a, b) for a, b in permutations(nouns, 2) if not held_out(a.id, b.id)]
captions = [f"a {a.noun} {relation} a {b.noun}" for a, b in pairs for relation in RELATIONS]
small, tokenizer = WordPiece.train(captions, vocab_size=150), trained.tokenizer
for word in ("saxophone", *RELATIONS):
    print(f"{word:<10}", [small.tokens[i] for i in small.encode(word)])
kinds = {"a": "a", "of": "of"} | dict.fromkeys(("left", "right", "above", "below"), "left right above below")


def text_alone(tokenizer, whole):
    """Mean nats a token that is hidden alone, or with its whole word, for each kind of word."""
    asked = []  # (kind of word, what stays visible and where the gap is, the true token)
    for caption in captions:
        ids, places = tokenizer.encode(caption), tokenizer.word_ids(caption)
        group = places if whole else range(len(ids))  # what is hidden together
        for i, place in enumerate(places):
            context = tuple(-1 if g == group[i] else token for g, token in zip(group, ids, strict=True))
            asked.append((kinds.get(caption.split()[place], "noun"), (context, i), ids[i]))
    contexts, answers = Counter(c for _, c, _ in asked), Counter((c, token) for _, c, token in asked)
    # p(token | context) is the share of captions with this context that have this token: −log of it is paid.
    nats = np.log([contexts[context] / answers[context, token] for _, context, token in asked])
    names = np.array([kind for kind, _, _ in asked])
    return {kind: nats[names == kind].mean() for kind in dict.fromkeys(names)}


columns = text_alone(small, False), text_alone(small, True), text_alone(tokenizer, True)
print(f"\n{'nats a token':<24}{'one piece':>12}{'whole word':>12}{'whole word, one token':>24}")
for kind, piece in columns[0].items():
    print(f"{kind:<24}{piece:>12.2f}{columns[1][kind]:>12.2f}{columns[2][kind]:>24.2f}")
relation = kinds["left"]
assert all(column[kind] < 1e-9 for column in columns for kind in ("a", "of"))
assert columns[1]["noun"] > 4 * columns[0]["noun"]
assert columns[1][relation] < 1e-9 and abs(columns[2][relation] - np.log(2)) < 1e-9

# %% [markdown]
# What to see: *a* and *of* cost nothing. A noun that loses one piece costs little, because the pieces around
# the gap spell the answer. Hidden whole, a token of it costs more than four times as much, and the picture is
# needed. This is **whole-word masking**. ViLT's example is *giraffe*, cut into `gi ##raf ##fe`: with `gi` and
# `##fe` in sight nobody looks at the picture for the middle.
#
# The relations show two more leaks. In the middle column they cost nothing, though they are hidden whole. A
# reader can count the masks, and can see whether *of* follows them. Both together tell the four words apart:
# *left* and *above* have three pieces each, but only *left* is followed by *of*. As single tokens the
# relations cost $\log 2$, not $\log 4$, because of the *of*. So the course's own training hides the phrase
# under one [MASK] (`hide_relation`), and only then all four are open.
#
# ![Above, one of the two pieces of a word is hidden, and its other piece gives it away. Below, both are
# hidden.](pictures/whole_word.svg)
#
# *What to see: black may not be seen. Above, the vocabulary alone knows which piece follows "lady".*
#
# ## Which tokens to hide
#
# `mask_tokens` works on a batch of captions. Each word is chosen with probability $p = 0.15$, and all its
# pieces are chosen with it. Then each chosen token is drawn for by itself, so that the pieces of one word may
# differ: with 80 % it becomes [MASK], with 10 % a random ordinary token, and with 10 % it stays as it is. In
# all three cases its label is the true id. All other tokens have the label $-100$: no question. Special
# tokens are neither chosen nor drawn.

# %%
rng = np.random.default_rng(3)
ids, word_ids, _ = small.batch([captions[i] for i in rng.choice(len(captions), 3, replace=False)])
settings = {"vocab_size": len(small), "mask_id": small.mask_id, "special_ids": small.special_ids}
colours = plt.matplotlib.colors.ListedColormap(["#eeeeee", "#ff9f80", "#9fc5ff", "#b7e1a1"])
fig, axes = plt.subplots(2, 1, figsize=(8, 3.4), constrained_layout=True)
for ax, name in zip(axes, ("whole words", "pieces"), strict=True):
    inputs, labels = mask_tokens(ids, word_ids, rng, **settings, p=0.4, whole_word=name == "whole words")
    fate = np.where(inputs == small.mask_id, 1, np.where(inputs != ids, 2, 3)) * (labels != IGNORE)
    ax.imshow(fate, cmap=colours, vmin=0, vmax=3, aspect="auto")
    for (b, i), token in np.ndenumerate(inputs):
        ax.text(i, b, small.tokens[token].replace("[PAD]", ""), ha="center", va="center", fontsize=7)
    ax.set(title=f"{name}, p = 0.4", xlabel="token", ylabel="caption", yticks=range(3))
plt.show()

# %% [markdown]
# What to see: red is [MASK], blue a random piece, green a piece that stays and is asked for. Above, words are
# coloured from the first piece to the last; below, single pieces are.
#
# Why not [MASK] everything that is chosen? BERT's authors give two reasons. *Fine-tuning*, the later training
# of the model on a task of one's own, has no [MASK], and a model that worked only where it sees one would be
# lost. And a model that cannot know where it will be asked has to keep a good state for *every* token. The
# proportions matter too. Suppose a token is asked for and a word is visible there: how often is it the true
# one? And what if not words but pieces have coins, and a word is hidden as soon as one of its pieces was
# drawn? On every single caption that looks right.

# %%
ids, word_ids, _ = small.batch(np.resize(captions, 20000))
# `choose` draws the words. `hide` then draws a number in [0, 1) for each token of them: below 0.8 the token
# is masked, from 0.8 to `keep` it stays, and from there on it becomes a random token.
recipes = {"80 / 10 / 10": 0.9, "80 / 20 /  0": 0.8, "80 /  0 / 20": 1.0}  # [MASK] / random / stays
found = {}
print("[MASK] / random / stays     asked and visible: it is the true word")
for name, keep in recipes.items():
    chosen = choose(ids, word_ids, rng, small.special_ids, 0.15, whole_word=True)
    inputs, labels = hide(ids, chosen, rng, len(small), small.mask_id, small.special_ids, keep=keep)
    visible = (labels != IGNORE) & (inputs != small.mask_id)
    found[name] = (inputs == labels)[visible].mean()
    print(f"{name:>23}{(inputs == labels)[visible].mean():>30.2f}")
for name, function in (("mask_tokens", mask_tokens), ("a coin for each piece", any_piece_chooses)):
    labels = function(ids, word_ids, rng, **settings, p=0.15)[1]
    found[name] = (labels != IGNORE)[word_ids >= 0].mean()
    print(f"{name:<22} share of tokens that are chosen: {found[name]:.2f}")
assert found["80 / 20 /  0"] < 0.05 and found["80 /  0 / 20"] == 1 and abs(found["80 / 10 / 10"] - 0.5) < 0.05
assert found["a coin for each piece"] > 2 * found["mask_tokens"]

# %% [markdown]
# What to see: the share of visible tokens that are the right answer where something is asked. If no chosen
# token stays as it is, a visible token is nearly always a wrong answer, and a model learns to answer any
# other word. If no token is random, a visible token is always the right answer, and copying it is best. At 10
# and 10 it is right half of the time, so the model must weigh what it reads against context and picture. With
# a coin for each piece more than twice as much is hidden, because a word of $n$ pieces stays visible only if
# none of $n$ coins chooses it. The law that counts rates (`the_rates_are_p_and_80_10_10`) finds this, and the
# recipe in which nothing stays.
#
# **Exercise 1** · `mask_tokens` · difficulty 3 of 3 · 45 minutes. Open `chapters/exercises/mlm.py`, replace
# `raise Todo`, and run the next cell.

# %%
check("mask_tokens")

# %% [markdown]
# ## The loss, three by three
#
# Let $M$ be the number of tokens of a batch, $h_m$ (row $m$ of $H$, $M \times D$) the state that the
# transformer gives to token $m$, $V$ the size of the vocabulary, $E$ ($V \times D$) a matrix with a vector
# for each word, $b$ a vector of $V$ biases, $t_m$ the true id of token $m$, and $\mathcal M$ the set of the
# tokens that are asked for, $K$ of them. The scores are the matrix of chapter 01 with one bias a column, and
# the loss is the cross-entropy of its rows, of those in $\mathcal M$ only:
#
# $$S = H E^\top + \mathbf 1 b^\top, \qquad
#   L = \frac1K \sum_{m \in \mathcal M} \Big[\log\sum_v e^{S_{mv}} - S_{m t_m}\Big].$$
#
# Three tokens, a vocabulary of three words, $D = 2$. Tokens 0 and 2 are asked for, token 1 is not.

# %%
H = np.array([[1.0, 0.0], [0.5, 0.5], [-1.0, 1.0]])  # (M, D)
E = np.array([[2.0, 0.0], [0.0, 1.0], [-1.0, 1.0]])  # (V, D)
b = np.array([0.0, 0.5, 0.0])  # (V,)
targets = np.array([0, IGNORE, 1])  # (M,)
S = H @ E.T + b  # (M, V)
asked = targets != IGNORE
K, rows = asked.sum(), np.flatnonzero(asked)
P = np.exp(S) / np.exp(S).sum(1, keepdims=True)
loss = -np.log(P[rows, targets[rows]]).mean()
print("S =\n", S, "\n\nP =\n", P, f"\n\nL = {loss:.4f}; guessing would cost log 3 = {np.log(3):.4f}")
assert P[0].argmax() == targets[0] and P[2].argmax() == 2 != targets[2]

# %% [markdown]
# Token 0 is nearly sure of its word 0. Token 2 prefers word 2 to its true word 1. As in chapter 01,
# $\partial \log\sum_v e^{S_{mv}} / \partial S_{mv} = P_{mv}$ and $-S_{m t_m}$ takes 1 off at the target. Rows
# that are not asked for do not occur in $L$ at all:
#
# $$G_{mv} = \frac{\partial L}{\partial S_{mv}} =
#   \frac{P_{mv} - [v = t_m]}{K}\ \text{ for } m \in \mathcal M, \qquad 0 \text{ otherwise},$$
#
# where $[v = t]$ is 1 if the two are equal and 0 if not. From $S_{mv} = \sum_d H_{md} E_{vd} + b_v$: the
# number $H_{md}$ occurs in row $m$ with the factor $E_{vd}$, the number $E_{vd}$ in column $v$ with the
# factor $H_{md}$, and $b_v$ in column $v$ with the factor 1. So
#
# $$dH = G E, \qquad dE = G^\top H, \qquad db_v = \sum_m G_{mv}.$$

# %%
G = P - np.eye(3)[np.where(asked, targets, 0)]
G = np.where(asked[:, None], G / K, 0)
dH, dE, db = G @ E, G.T @ H, G.sum(0)
print("G =\n", G, "\n\ndH =\n", dH, "\n\ndE =\n", dE, "\n\ndb =", db, f"  sum {abs(db.sum()):.1f}")
assert (np.abs(dE).max(1) > 0).all() and abs(db.sum()) < 1e-12

# %% [markdown]
# Read $dE$: *every* word of the vocabulary moves at every question, the true one towards the state, the
# others away from it. The look-up of input words touches only those that occur. Where one matrix serves both
# ends (BERT ties them, ViLT's decoder has its own), the two gradients are added. And $db$ sums to zero: one
# constant for all words changes no probability. Compare with the slopes (of the library's loss, by the
# routine of the tests) and with autograd (through PyTorch's own cross-entropy).

# %%
h, e, bias = (torch.tensor(a, requires_grad=True) for a in (H, E, b))
F.cross_entropy(h @ e.T + bias, torch.tensor(targets), ignore_index=IGNORE).backward()
for which, (name, mine, other) in enumerate((("dH", dH, h), ("dE", dE, e), ("db", db, bias))):
    slopes = central_differences(lambda *a: mlm_loss_np(*a, targets)[0], (H, E, b), which)
    apart = np.abs(mine - slopes).max(), np.abs(mine - other.grad.numpy()).max()
    print(f"{name}: slopes to 1e-8: {apart[0] < 1e-8}, autograd to 1e-12: {apart[1] < 1e-12}")
    assert apart[0] < 1e-8 and apart[1] < 1e-12

# %% [markdown]
# ## A trap: nothing is hidden
#
# A caption of $n$ words keeps all of them with probability $(1-p)^n$. Then $K = 0$ and the mean is $0/0$.

# %%
for n in (6, 12, 40):
    print(f"{n:>2} words, all shown: {0.85**n:.3f} of captions, {0.85 ** (4 * n):.5f} of batches of 4")


def weighted_mean(h, e, bias, targets):
    weight = (targets != IGNORE).double()  # (M,) of zeros and ones
    return (F.cross_entropy(h @ e.T + bias, targets.clamp(0), reduction="none") * weight).sum() / weight.sum()


def torch_mean(h, e, bias, targets):
    return F.cross_entropy(h @ e.T + bias, targets, ignore_index=IGNORE)


print(f"\n{'nothing hidden':<16}{'loss':>6}{'largest gradient of E':>24}")
for answer in (weighted_mean, torch_mean, mlm_loss):
    value = answer(h, e, bias, torch.full((3,), IGNORE))
    (gradient,) = torch.autograd.grad(value, e)
    print(f"{answer.__name__:<16}{value.item():>6.1f}{gradient.abs().max().item():>24.1f}")
    assert value.isnan() == (answer is not mlm_loss) and gradient.isnan().any() == (answer is weighted_mean)

# %% [markdown]
# What to see: the weighted mean sends NaN into every weight; one such batch ends a training. PyTorch's own
# mean returns NaN and gradients of zero: the weights survive, but the NaN goes into the sum of the losses and
# its running mean. The library divides the *sum* by $\max(K, 1)$: 0, with zero gradients, and part of the
# graph. (A constant 0 would not do: `backward` raises on it.) UNITER hides at least one token of each caption
# instead, which changes the rate.
#
# **Exercise 2** · `mlm_loss_np` · difficulty 2 of 3 · 35 minutes. **Exercise 3** · `mlm_loss` · difficulty 1
# of 3 · 10 minutes. Open `chapters/exercises/mlm.py`. Mind $K = 0$ and large logits (chapter 01).

# %%
check("mlm_loss_np", "mlm_loss")

# %% [markdown]
# ## What only the picture tells
#
# Now the trained model reads one caption with a hidden noun beside two pictures.


# %%
@torch.inference_mode()
def log_probabilities(texts, pictures):
    """Text i, with one [MASK], beside picture i → (n, V)."""
    out = torch.zeros(len(texts), len(tokenizer))
    for some, ids, states in encoded(trained.model, tokenizer, texts, pictures, lambda passes: None):
        out[some] = trained.model.mlm_logits(states["text"][ids == tokenizer.mask_id]).log_softmax(-1)
    return out


text, _ = hide_slots(first, [0], tokenizer)
pictures = {"its own picture": first, "another picture": scenes[3]}
fig, axes = plt.subplots(2, 2, figsize=(5, 3.3), height_ratios=(1.1, 1), constrained_layout=True)
found = log_probabilities([text] * 2, list(pictures.values())).exp()
for (above, below), (name, scene), p in zip(axes.T, pictures.items(), found, strict=True):
    above.imshow(scene.image)
    above.set(title=name, xticks=[], yticks=[])
    best = p.topk(3)
    assert tokenizer.tokens[best.indices[0]] in scene.caption.split()  # one of the two things in the picture
    below.barh([tokenizer.tokens[i] for i in best.indices], best.values, color="tab:blue")
    below.set(xlim=(0, 1), xlabel="probability")
    below.invert_yaxis()
fig.suptitle(text, fontsize=11)
plt.show()

# %% [markdown]
# What to see: the same text has two answers, and the model names what it sees. One caption is an anecdote, so
# here are 256 new pictures, of pairs that training showed. (Chapter 08 tests pairs that it never showed.) The
# floor is the entropy from above, each noun and the relation phrase under one [MASK].

# %%
texts = {
    "noun": [hide_slots(scene, [0], tokenizer) for scene in scenes],  # (text, [id under the mask])
    "relation": [(text, tokenizer.encode(word)) for text, word in map(hide_relation, scenes)],
}
print(f"{'nats':<10}{'text alone, at best':>20}{'own picture':>14}{'next picture':>14}")
for (kind, asked), floor in zip(texts.items(), (columns[2]["noun"], np.log(4)), strict=True):
    blanks, truth = [text for text, _ in asked], torch.tensor([token for _, (token,) in asked])
    own, other = (log_probabilities(blanks, s) for s in (scenes, scenes[1:] + scenes[:1]))
    print(f"{kind:<10}{floor:>20.2f}{F.nll_loss(own, truth):>14.2f}{F.nll_loss(other, truth):>14.2f}")
    assert F.nll_loss(own, truth) < floor / 2 and F.nll_loss(other, truth) > 2 * floor

# %% [markdown]
# What to see: with its picture the model pays far less than any reader of text alone could. The difference,
# in nats a word, is what it has learned to see. Up to the chance of the 256 draws it is a lower bound on what
# the picture tells about the word. With the wrong picture the model pays far more than the floor, because it
# believes the picture. So what counts is the distance from the floor and not the loss itself. A model whose
# loss stays at the floor uses the text and not the picture.
#
# ## The price of the vocabulary
#
# ViLT's pretraining met 4,096 captions of at most 40 tokens at once, with a vocabulary of 30,522 words and
# $D = 768$. The three products, for $S$, $dH$ and $dE$, take $2 M V D$ operations each, as long as all $M$
# rows are kept. But only the rows that are asked for have a gradient:

# %%
M, V, D, panel = 4096 * 40, 30522, 768, 256
print(f"{'rows of S':<24}{'operations, 10¹²':>18}{'one such array, MB':>20}")
for name, n in (("all tokens", M), ("hidden, about 15 %", round(0.15 * M)), ("one panel of 256", panel)):
    print(f"{name:<24}{6 * n * V * D / 1e12:>18.2f}{n * V * 4 / 2**20:>20,.0f}")

# %% [markdown]
# Selecting the rows *before* the product is the large gain, and it is one line: `hidden[masked]`. The rungs:
#
# * `mlm_loss_np` selects, multiplies, and keeps a few arrays of $K \times V$.
# * `mlm_loss`: autograd keeps the log-softmax until the backward pass; with the scores and their gradient
#   three arrays of $K \times V$ live at the peak.
# * `mlm_loss_fused` walks over panels of 256 rows. A panel holds whole rows, so its softmax, loss and $G$ are
#   known at once, and it leaves only its share of $dH$, $dE$ and $db$ behind. The products are the same
#   three: it saves memory, not arithmetic, and with $K \le 256$ nothing. You write it in chapter 17.
#
# On one thread, forward and backward, beside the loss that multiplies all rows. *Kept* counts what waits
# between the two passes; the fused rung keeps finished gradients.

# %% tags=["measured"]
from timeit import repeat

M, V, D = 4096, 4096, 64
generator = torch.Generator().manual_seed(0)
hidden, embedding = (torch.randn(n, D, generator=generator) / 8 for n in (M, V))
truth = torch.randint(V, (M,), generator=generator)
truth[torch.rand(M, generator=generator) > 0.15] = IGNORE
kept = {}
hooks = (lambda t: kept.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t)


def once(function):
    inputs = [t.clone().requires_grad_() for t in (hidden, embedding, torch.zeros(V))]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        value = function(*inputs, truth)
    value.backward()


print(f"M = {M}, V = {V}, D = {D}, hidden: {(truth != IGNORE).sum()}")
held = []
for name, function in (("all rows", torch_mean), ("mlm_loss", mlm_loss), ("mlm_loss_fused", mlm_loss_fused)):
    seconds = min(repeat(lambda function=function: once(function), number=1, repeat=3))
    held.append((seconds, sum(kept.values())))
    print(f"{name:<15} {1000 * seconds:4.0f} ms, best of three   kept {sum(kept.values()) / 2**20:5.1f} MB")
assert held[0][0] > 2 * held[1][0] and held[0][1] > 4 * held[1][1] > 8 * held[2][1]

# %% [markdown]
# What to see: the large step is from the first line to the second, and the third keeps least. At ViLT's size
# a panel has 30 MB where all hidden rows have 2,861 MB, as the table above shows.
#
# ## Questions and small tasks
#
# Answers are folded. Think first, with pencil and paper where it says *derive*.
#
# <details><summary>1. <i>Explain.</i> Why is the loss taken at hidden places alone?</summary>A visible word
# is its own answer: copying it teaches nothing, and the easy terms would drown the hard ones.</details>
#
# <details><summary>2. <i>Derive.</i> Label smoothing gives the right word 1 − a and spreads a over all V
# words. What is G?</summary>G = (P − T) / K with T = (1 − a) one-hot + a / V: the target changes, the formula
# does not.</details>
#
# <details><summary>3. <i>Derive.</i> The decoder is tied: logits = h Eᵀ, and E is also the word table that
# made the inputs, x_n = E[id_n]. What is dE?</summary>Two uses, two terms: Gᵀ h from the decoder, and for
# each place its input's gradient added to the row of its word.</details>
#
# <details><summary>4. <i>Derive.</i> The rows of a batch are looked up, x = E[ids]. Why is dE[ids] += dx
# wrong in NumPy, and what is right?</summary>If a word comes twice, the buffered sum keeps one of its
# gradients. np.add.at(dE, ids, dx) adds all of them.</details>
#
# <details><summary>5. <i>Predict, then run.</i> With p = 1, every word hidden, what is the best loss of a
# model that sees no picture? Compare it with the entropy of one word in the table above.</summary>The mean
# entropy of the words at each place, without any context: more than with p = 0.15, because nothing is left to
# read.</details>
#
# <details><summary>6. <i>Ablate.</i> Hide only nouns. Which words does such a model never learn to answer,
# and which does it still have to read?</summary>It never answers articles and relations. It still reads them,
# since they say which noun is asked for.</details>
#
# ## What we left out
#
# * At least one question in every caption (UNITER); hidden spans of several words (X-VLM, chapter 19).
# * Hiding patches and asking for their colours: ViLT tried it, and it did not help. The picture stays whole.
# * The head between state and score (a layer, GELU, LayerNorm): chapter 08. The panel walk: chapter 17.
#
# ## Sources
#
# Masked words, 80/10/10 and the reasons: Devlin et al. 2019 (BERT), section 3.1 and appendix A.1. Whole
# words, the giraffe, $p = 0.15$: Kim, Son and Kim 2021 (ViLT), sections 3.2 and 3.3; hidden patches, section
# 4.5. That no reader of the text alone goes below the conditional entropy is Gibbs' inequality.
