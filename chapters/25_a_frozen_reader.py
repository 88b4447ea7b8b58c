# %% [markdown]
# # 25 · A frozen reader
#
# **The question.** The models that people talk to today put a picture in front of a language model which was
# trained on text and never saw one. How can a picture be told to somebody who only reads, and what is lost
# when the reader is trained along?
#
# You need: chapters 20 and 21, and chapter 04 for the queries that look at patches. Plan for two hours and a
# half with the eight exercises.

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
from random import Random

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import normalize

from minivlp.data import CPU_NOUNS, Scenes, scene_pixels
from minivlp.data.lists import COLON, facts
from minivlp.data.probes import true_captions
from minivlp.evaluation.reading import fitting_rows
from minivlp.lora import Lora, freeze, lora_np
from minivlp.models.bridge import CONNECTORS, BridgeConfig
from minivlp.recipes.base import load_trained, recipe_of
from minivlp.recipes.bridge import BridgeRecipe, BridgeSettings
from minivlp.training import loop
from minivlp.training.run import ReadOnlyRun
from tests import check

np.set_printoptions(precision=3, suppress=True)
torch.set_num_threads(1)
BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"

bridge, taught = load_trained(None, "bridge"), load_trained(None, "listlm")
recipe, lists = recipe_of(bridge), recipe_of(taught)
model, reader, tokenizer = bridge.model, taught.model, taught.tokenizer
source = Scenes(recipe.emojivl, recipe.nouns, canvas=48, pairs="held_out", seed=4)
scenes = [source[i] for i in range(200)]

# %%
written = recipe.writer(model).write(scenes)
right = np.array([text in true_captions(scene) for text, scene in zip(written, scenes, strict=True)])
fig, axes = plt.subplots(1, 5, figsize=(9, 2.1), constrained_layout=True)
for ax, i in zip(axes, (0, 1, 2, 4, 5), strict=True):
    ax.imshow(scenes[i].image)
    ax.set(xticks=[], yticks=[])
    ax.set_title(written[i], fontsize=7, color=GREEN if right[i] else RED)
fig.suptitle("Written by a language model that has never been trained on a picture", fontsize=10)
plt.show()
print(f"true of {right.mean():.2f} of 200 pictures of pairs that no training showed together")
assert right.mean() > 0.5

# %% [markdown]
# What to see: sentences about pictures, green where they are true. The model that wrote them has weights that
# no picture ever changed. Between it and the pictures stands a **bridge** of 57,000 numbers.
#
# ## The reader
#
# The reader is a decoder of three blocks (chapter 23's), trained for one minute on text alone. Each text is a
# list of facts and a sentence that follows from it. A fact is a row, a column and a noun:

# %%
rng = Random(0)
for scene in scenes[:3]:
    print(f"{facts(scene, 48, rng)} {COLON} {scene.caption}")


def says(text):
    """What the reader says to a list, and the sentence's log probability."""
    rows = reader.word(torch.tensor([tokenizer.encode(text)]))
    return lists.writer(reader).sentences(rows)[0]


told = {}
for text in ("2 1 dog 3 6 guitar", "2 6 dog 3 1 guitar", "1 4 dog 6 4 guitar", "6 4 dog 1 4 guitar"):
    told[text], log_p = says(text)
    print(f"{text}  →  {told[text]}   (log probability {log_p:.2f})")
said = lists.writer(reader).write(scenes)
share = np.mean([text in true_captions(scene) for text, scene in zip(said, scenes, strict=True)])
print(f"of lists of held-out pairs {share:.3f} are said truly")
assert share > 0.9 and len(set(told.values())) == 4

# %% [markdown]
# What to see: one number more or less, and the sentence turns round. A log probability near
# $-\ln 2 = -0.69$ is the best there is, for either noun may come first.
#
# Why lists, and not captions? A caption never says a thing twice, so its next word can be learned without
# ever looking back at what was told. In these lists the sentence follows from what stands before, and this
# is the skill that a bridge uses. (Real language models have it from ordinary text.) It did not come by
# itself here either: of the seeds 0, 1 and 2, seed 1 alone learned which numbers belong to which noun in 700
# steps, and it ships. The other two are in `chapters/bridges.json`.
#
# **Exercise 1** · predict before you run · 10 minutes. What does the reader say to "2 1 dog 2 1 guitar"? To
# "2 1 dog 3 6 dog"? And to a list that stands in the other order, "3 6 guitar 2 1 dog"? Write three answers
# down, then call `says`.
#
# <details><summary>Answer</summary>
#
# The third is the list of the first line, and its sentence says the same. The first two never occur in
# training, and what is said is whatever the maps of numbers make of them: ask several such lists, and the
# answers follow no rule. A model is defined where it was trained.
# </details>
#
# ## A prefix is rows
#
# The reader never sees words, only rows of numbers. A list becomes six rows, the embeddings of its six
# tokens, which stand behind [CLS] and before the colon. Whoever puts other rows there has told the reader
# something:
#
# $$ [\,E(\text{CLS}),\; \underbrace{p_1, \dots, p_P}_{\text{prefix}},\; E(\text{:}),\; E(w_1), \dots\,] . $$
#
# So a bridge has to make $P$ rows of a picture. It learns by the loss of the sentence, whose gradient comes
# back *through* the reader. The reader itself is frozen: its weights get no gradient, its rows do.

# %%
scene = scenes[0]
words = facts(scene, 48, Random(1))
whole = torch.tensor(
    [[tokenizer.cls_id, *tokenizer.encode(f"{words} {COLON} {scene.caption}"), tokenizer.sep_id]]
)
cut = torch.cat([whole[:, :1], whole[:, 7:]], 1)
rows = reader.word(whole[:, 1:7])  # (1, 6, D)
as_words = reader.encode(whole, torch.ones_like(whole, dtype=torch.bool))[:, 7:]
as_prefix = reader.encode(cut, torch.ones_like(cut, dtype=torch.bool), rows)[:, 1:]
print(
    "the list as words and as a prefix give the same states:", torch.allclose(as_words, as_prefix, atol=1e-5)
)
assert torch.allclose(as_words, as_prefix, atol=1e-5)

freeze(reader)
image = recipe.look(scene_pixels(scenes[:2]))  # (2, 36, 96) states of the frozen ViLT
prefix = model.prefix(image)
ids, mask = map(torch.from_numpy, fitting_rows(tokenizer, [f"{COLON} {s.caption}" for s in scenes[:2]], 24))
states = reader.encode(ids, mask, prefix)
(slope,) = torch.autograd.grad(reader.scores(states).logsumexp(-1).sum(), prefix)
print(f"gradient at the prefix {slope.abs().mean():.4f}; weights of the reader with a gradient:",
      sum(p.requires_grad for p in reader.parameters()))  # fmt: skip
assert slope.abs().mean() > 0 and not any(p.requires_grad for p in reader.parameters())

# %% [markdown]
# **Exercise 2** · explain · 10 minutes. A frozen network is often run under `torch.no_grad()` to save memory.
# What happens to the bridge if the reader is?
#
# <details><summary>Answer</summary>
#
# The bridge gets no gradient at all, for it stands *before* the reader. Frozen means no gradient *into* the
# weights. The picture encoder, which stands before the bridge and learns nothing, may run under `no_grad`;
# `BridgeRecipe.look` does.
# </details>
#
# ## Frozen is not a gradient of zero
#
# Some programs freeze part of a weight by setting its gradient to zero before every step (MiniGPT-5 does so
# with the old rows of its embedding). An optimiser with weight decay moves it all the same:

# %%
moved = {}
for name in ("gradient set to zero", "gradient set to zero, no decay", "requires_grad = False"):
    weight = torch.nn.Parameter(torch.ones(3), requires_grad=not name.startswith("requires"))
    free = torch.nn.Parameter(torch.ones(3))
    learning = [p for p in (weight, free) if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.01, weight_decay=0.0 if "no decay" in name else 0.01)
    for _ in range(100):
        for p in learning:
            p.grad = torch.zeros(3) if p is weight else torch.ones(3)
        optimizer.step()
    moved[name] = weight[0].item()
    print(f"{name:<31} after 100 steps {moved[name]:.4f}")
assert moved["gradient set to zero"] < 0.991 and moved["requires_grad = False"] == 1.0

# %% [markdown]
# **Exercise 3** · repair · 15 minutes. Below the first two rows of an embedding are to stay, the others are
# to learn, with weight decay. Mend the step without a second parameter, and show that the two rows are the
# same bytes after 100 steps.

# %%
torch.manual_seed(0)
embedding = torch.nn.Parameter(torch.randn(5, 4))
optimizer = torch.optim.AdamW([embedding], lr=0.01, weight_decay=0.01)
kept = embedding[:2].detach().clone()
for _ in range(3):
    embedding.grad = torch.ones(5, 4)
    embedding.grad[:2] = 0
    optimizer.step()
print("the first two rows stayed:", torch.equal(embedding[:2], kept))
assert not torch.equal(embedding[:2], kept)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Write the rows back after every step (`embedding.data[:2] = kept`), or keep them out of the optimiser as a
# buffer and join the two for the forward pass. A third way, no decay for the whole parameter, freezes the
# rows and takes the decay from the others too.
# </details>
#
# ## Six connectors
#
# What stands between the picture's 36 states and the reader's rows differs from system to system:

# %%
sizes = BridgeConfig(**{**vars(model.config), "reader": "frozen"})
print("connector   rows   numbers that learn")
shapes = {}
for name, make in CONNECTORS.items():
    torch.manual_seed(0)
    part = make(sizes)
    shapes[name] = part(image).shape[1], sum(p.numel() for p in part.parameters())
    print(f"{name:<11}{shapes[name][0]:>5}{shapes[name][1]:>16,}")
assert [n for n, _ in shapes.values()] == [9, 36, 36, 9, 9, 9]

# %% [markdown]
# `pooled` is Frozen's (Tsimpoukelli et al. 2021): one vector of the picture, mapped to a few rows. `linear`
# (LLaVA, MiniGPT-4) and `mlp` (LLaVA 1.5, VILA) make one row of every patch. `merge` (MiniGPT-v2) joins four
# neighbours of a line. `resampler` (Qwen-VL) has learned queries on a grid that look at the patches, with
# positions on queries and keys and none on values. In `qformer` (BLIP-2, chapter 26) the queries also look at
# one another.
#
# A bridge learns fast. Here one of them learns live, with eight nouns and 150 steps:


# %%
class Eight(BridgeRecipe):
    """Eight nouns, and no look at the model on the way."""

    def check(self, model):
        return {}


settings = BridgeSettings(nouns=CPU_NOUNS[:8], steps=150, batch=32, warmup=10, report_every=150)
eight = Eight(settings)
before = BridgeRecipe.check(eight, eight.model.eval())["true"]
list(loop.steps(eight, ReadOnlyRun("nowhere", {})))  # no file is written
after = BridgeRecipe.check(eight, eight.model.eval())["true"]
same = all(
    torch.equal(a, b) for a, b in zip(eight.model.reader.parameters(), reader.parameters(), strict=True)
)
print(f"true sentences on held-out pairs: {before:.2f} before, {after:.2f} after; same reader: {same}")
assert before < 0.1 and after > 0.5 and same

# %% [markdown]
# ## What each of them can tell
#
# The table has one run of each, with all 32 nouns, made by `python -m minivlp train --model bridge
# --connector NAME --reader HOW --threads 1 --items 1000`. The last column asks the reader for sentences
# about *lists*, as before its training.

# %%
runs = json.loads((root / "chapters" / "bridges.json").read_text(encoding="utf-8"))
print(f"{'':<22}{'true, held-out':>24}{'unseen artist':>15}{'objects':>9}{'lists':>7}{'seconds':>9}")
for name, run in runs.items():
    if run["model"] == "bridge":
        print(f"{name:<22}{run['true']:>8.3f} ({run['low']:.3f} to {run['high']:.3f}){run['unseen']:>11.3f}"
              f"{run['objects']:>9.3f}{run['lists']:>7.3f}{run['seconds']:>9.0f}")  # fmt: skip
true = {name: run["true"] for name, run in runs.items()}
assert max(true["reader, seed 0"], true["reader, seed 2"]) < 0.5 and true["reader, seed 1"] > 0.95
assert true["resampler"] > 0.5 and true["qformer"] > 0.5 and true["pooled"] < true["resampler"] / 2
assert true["without reading"] < 0.02 and true["without picture"] < 0.02
assert max(runs[f"resampler, {how}"]["lists"] for how in ("tuned", "lora")) < runs["resampler"]["lists"] - 0.1
assert (
    max(runs[f"resampler, {how}"]["order"] for how in ("tuned", "lora")) < 0.55 < runs["resampler"]["order"]
)
assert true["resampler, tuned"] < true["resampler, lora"] < true["resampler"] < true["mlp"] < true["qformer"]

shown = [name for name, run in runs.items() if run["model"] == "bridge" and "seed" not in name]
fig, ax = plt.subplots(figsize=(7, 2.8), constrained_layout=True)
at = np.arange(len(shown))
ax.bar(at - 0.2, [true[name] for name in shown], 0.4, color=BLUE, label="sentences about pictures")
ax.bar(at + 0.2, [runs[name]["lists"] for name in shown], 0.4, color=GREY, label="sentences about lists")
ax.set_xticks(at, shown, rotation=25, ha="right", fontsize=8)
ax.set(ylabel="share that is true", ylim=(0, 1))
ax.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# What to see: blue bars are what a bridge can tell, grey ones what the reader still reads. Three things.
#
# **A frozen reader can be told of places, if the bridge keeps them.** The mean of all patches has lost most
# of them, and `pooled` tells less than half of what queries tell. Most is told by `qformer`, the largest.
#
# **A reader that never read is no use**, and neither is a bridge that sees no picture (*without reading*,
# *without picture*). Both controls are Frozen's. So what the bridge borrows is the skill of reading.
#
# **A tuned reader forgets its lists**, and one that is changed by LoRA does too, because training never
# shows them a list again. Frozen's authors measured that a tuned reader answers worse as well. So it is
# here: the sentences name the objects as before, but exchanged nouns are told apart no better than by a
# coin. The skill of comparing two places was lost before the bridge had learned to say places, and the
# sentences alone did not bring it back in 1,000 steps. A quarter of the rates did not help either (`lr`
# 0.001, `matrix_lr` 0.002, one run).
#
# **Exercise 4** · explain · 10 minutes. The blind bridge writes sentences too. Which, and what is the share
# of true ones that pure guessing would have?
#
# <details><summary>Answer</summary>
#
# It always writes the same sentence, the likeliest of all, which is true of some pictures. With 496 pairs of
# nouns and four relations, a sentence that is drawn evenly is true of one picture in 1,984.
# </details>
#
# ## What the bridge says
#
# Does the bridge write lists? Its rows need not be words. But each has a nearest word, by the cosine with the
# reader's embeddings:

# %%
with torch.inference_mode():
    rows = model.prefix(recipe.look(scene_pixels(scenes)))  # (200, 9, D)
    cosines = normalize(rows, dim=-1) @ normalize(reader.word.weight, dim=-1).T  # (200, 9, V)
nearest = cosines.argmax(-1)  # (200, 9)
for i in range(4):
    print(f"{scenes[i].caption:<32}", *dict.fromkeys(tokenizer.tokens[k] for k in nearest[i].tolist()))
nouns = [[tokenizer.encode(slot.split(" ", 1)[1])[0] for slot in scene.slots] for scene in scenes]
own = np.mean([[noun in nearest[i] for noun in pair] for i, pair in enumerate(nouns)])
other = np.mean([[noun in nearest[i - 1] for noun in pair] for i, pair in enumerate(nouns)])
numbers = tokenizer.encode("0 1 2 3 4 5 6 7")
digits = np.isin(nearest.numpy(), numbers).mean()
print(f"a row's nearest word: a noun of the picture for {own:.2f} of the nouns, of another {other:.2f}")
print(f"nearest words that are numbers: {digits:.2f}; the mean cosine {cosines.amax(-1).mean():.2f}")
assert own > 5 * other and cosines.amax(-1).mean() < 0.6

# %% [markdown]
# What to see: nobody asked for it, but some rows lean towards the noun of the object that they look at. Yet
# the cosines are far from 1: a row says several things at once, and where is not said in the reader's
# numbers. A bridge finds rows with the same *effect* as a list, and there are many.
#
# **Exercise 5** · predict before you run · 15 minutes. Take the shipped bridge and leave out one of its nine
# rows, each in turn (nine runs of `sentences` on `rows[:, others]`). Does the share of true sentences fall to
# zero, by a ninth, or not at all?
#
# <details><summary>Answer</summary>
#
# It stays between 0.53 and 0.65, with all nine rows it is 0.63. No row is the only one to say a thing:
# patches of an object are seen by several queries.
# </details>
#
# ## A change of low rank
#
# Between frozen and tuned lies LoRA (Hu et al. 2021): the weight stays, and beside it learns a product of two
# thin matrices,
#
# $$ y = W x + s\, B A x, \qquad A \in \mathbb{R}^{r \times D},\; B \in \mathbb{R}^{O \times r} . $$
#
# $B$ begins at zero, so that the first output is the frozen one's. With $h = A x$ and upstream gradient $G$,
# the gradient of $B$ collects $G$ with $h$, and that of $A$ has to come through $B$. At the start $B = 0$, so
# $A$ does not move in the first step, and $B$ does.

# %%
rng = np.random.default_rng(0)
x, weight, down, up = (
    rng.normal(size=(3, 4)),
    rng.normal(size=(5, 4)),
    rng.normal(size=(2, 4)),
    np.zeros((5, 2)),
)
value, (dx, dweight, ddown, dup, dscale) = lora_np(x, weight, down, up, 2.0)
print("first output is the frozen one's:", np.array_equal(value, x @ weight.T))
print(f"|dA| {np.abs(ddown).sum():.3f}, |dB| {np.abs(dup).sum():.3f}")
assert np.array_equal(value, x @ weight.T) and not ddown.any() and dup.any()
layer = Lora(torch.nn.Linear(96, 288, bias=False), 8, 16.0, np.random.default_rng(0))
trained, all_of_it = (
    sum(p.numel() for p in layer.parameters() if p.requires_grad or whole) for whole in (False, True)
)
print(f"of a map of 96 to 288 LoRA of rank 8 trains {trained:,} numbers beside {all_of_it - trained:,}")
merged = layer.merge()
z = torch.randn(7, 96)
assert torch.allclose(merged(z), layer(z), atol=1e-5)

# %% [markdown]
# **Exercise 6** · `lora_np` · difficulty 2 of 3 · 25 minutes. **Exercise 7** · `lora` · difficulty 1 of 3 ·
# 10 minutes. Open `chapters/exercises/lora.py`.

# %%
check("lora_np", "lora")

# %% [markdown]
# **Exercise 8** · ablate · 20 minutes and the time of two runs. Train `--reader lora` with rank 1 and rank 32
# (`BridgeSettings(rank=…)`). Which of the two measures moves, sentences about pictures or about lists?
#
# ## Bugs of public code
#
# * **A padding mask handed over as *the* mask** replaces the causal one; every word then sees the next, and
#   the loss falls *below* the reference, which is the sign of a leak (unsloth-zoo, issue 963; in
#   transformers, issue 30918, PaliGemma was trained with a mask of ones).
# * **Labels under the picture.** Where a picture is spliced into a text, the labels have to be spliced as
#   well; in transformers, issue 28333, they were not. Placeholder tokens left in the loss teach the model
#   to write "<image>" (Transformers-Tutorials, issue 511).
# * **Shifted twice**: by the model and by its caller. The model then learns the word after the next.
# * **Keys made of positions alone**: a resampler whose weights cannot depend on the picture (MQT-LLaVA, issue
#   4). The law is that a patch and its position move together, and a patch alone does not.
# * **Frozen, but in training mode**: dropout and running means go on. `freeze` keeps a module in evaluation
#   mode, whatever its parent does.
#
# ## What we left out
#
# * Stages. LLaVA trains the map first and then the reader; VILA mixes text into the pictures so that the
#   reader forgets less. Our tuned reader forgets because nothing reminds it.
# * Instructions, boxes as words (MiniGPT-v2), pictures out (MiniGPT-5), and several pictures in one prompt,
#   by which Frozen binds a new word to a new thing.
# * Size. A reader of half a million numbers and 32 nouns shows the mechanism, not the knowledge.
#
# ## Sources
#
# Frozen: Tsimpoukelli et al. 2021. LLaVA: Liu et al. 2023. MiniGPT-4: Zhu et al. 2023; MiniGPT-v2: Chen et
# al. 2023. Qwen-VL: Bai et al. 2023. BLIP-2: Li et al. 2023. VILA: Lin et al. 2024. LoRA: Hu et al. 2021.
