"""Questions about one picture (VQA) and statements about two (NLVR2), balanced so that no half is enough.

Questions. A picture comes with two questions of different answers, so the picture alone reaches 1/2 at most:

    three dogs               how many dogs → three              what is shown → dog
    a dog left of a guitar   what is left of the guitar → dog   what is right of the guitar → nothing

The four counts are equally frequent; half of the questions about places have the answer "nothing", so knowing
which objects there are, but not where, reaches 1/2 on them, and so does the text alone.

Statements. Let F be a fact ("a dog left of a guitar") and G another, each drawn twice: F₁ F₂ G₁ G₂. A block
crosses two left pictures with two right ones and two statements, eight items:

                                              (F₁, F₂)   (F₁, G₂)   (G₁, F₂)   (G₁, G₂)
    F in one picture only                      false      true       true       false
    F in both pictures or in none              true       false      false      true

Every statement, every pair of pictures, and every statement with one of its pictures is true exactly as
often as false: text alone, pictures alone, and text with one picture stay at exactly 1/2. In every other
block G has the objects of F in another relation, so knowing the objects of both pictures is not enough
either. The caption comes first, where pretraining put it.

Sources: Goyal et al. 2017 (VQA v2: pictures in balanced pairs); Suhr et al. 2019 (NLVR2); Kim, Son and Kim
2021 (ViLT), section 4.3 for the heads.
Left out: VQA's soft scores from ten annotators: every answer here is certain.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.data import Concept, EmojiVL, Scene, Scenes, scene_pixels
from minivlp.data.probes import article_and_noun, meaning, takes
from minivlp.evaluation.interval import measured
from minivlp.evaluation.reading import equal_lengths, fitting_rows
from minivlp.models.vilt import Vilt
from minivlp.text import WordPiece

COUNTS = ("one", "two", "three", "four")
NOTHING = "nothing"
ONE, SAME = "{} in one picture only", "{} in both pictures or in none"
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
# What the tokenizer must have read besides captions, for these words not to fall to pieces.
WORDS = ("how many", "what is shown", "what is the", NOTHING, ONE.format(""), SAME.format(""))


@dataclass(frozen=True, eq=False)
class Question:
    """About one picture; kind is "how many", "what is shown" or "where"."""

    scene: Scene
    text: str
    answer: str
    kind: str


@dataclass(frozen=True, eq=False)
class Statement:
    """About two pictures; kind is "other objects" or "same objects", whether G has those of F (`pair`).

    shown tells of each picture whether it shows F.
    """

    scenes: tuple[Scene, Scene]
    text: str
    truth: bool
    kind: str
    pair: tuple[int, int]
    shown: tuple[bool, bool]


def answers(nouns: Sequence[Concept]) -> tuple[str, ...]:
    """All answers to questions about these nouns, in the order of the logits."""
    return (*COUNTS, NOTHING, *(concept.noun for concept in nouns))


def questions(
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    n: int = 2000,
    artists: Sequence[str] | None = None,
    pairs: str = "held_out",
    seed: int = 1,
) -> list[Question]:
    """n questions, a multiple of 16: half about counts of a noun, half about pairs; the rest as in `Scenes`.

    The two questions about a picture follow each other. Training takes another seed: counts have no pairs
    that could be held out. Raises ValueError as `Scenes` does and for another n.
    """
    _check_size(n)
    found, room = [], Counter({k: n // 16 for k in range(1, 5)})
    for scene in takes(
        Scenes(emojivl, nouns, artists, canvas, {"count": 1}, pairs, seed=seed), 10 * n, "count"
    ):
        if room[k := len(scene.objects)]:
            concept = emojivl.concepts[scene.objects[0]]
            found.append(Question(scene, f"how many {concept.plural}", COUNTS[k - 1], "how many"))
            found.append(Question(scene, "what is shown", concept.noun, "what is shown"))
            room[k] -= 1
        if not room.total():
            break
    scenes = Scenes(emojivl, nouns, artists, canvas, {"pair": 1}, pairs, seed=seed)
    for i in range(n // 4):
        scene = scenes[i]
        first, second = (article_and_noun(slot)[1] for slot in scene.slots)
        there, back = scene.relation, OPPOSITE[scene.relation]
        if i % 2:  # ask about the other of the two nouns
            first, second, there, back = second, first, back, there
        found.append(Question(scene, f"what is {there} the {second}", first, "where"))
        found.append(Question(scene, f"what is {back} the {second}", NOTHING, "where"))
    return found


def statements(
    emojivl: EmojiVL,
    nouns: Sequence[Concept],
    canvas: int,
    n: int = 2000,
    artists: Sequence[str] | None = None,
    pairs: str = "held_out",
    seed: int = 1,
    sizes: tuple[float, float] = (0.32, 0.48),
) -> list[Statement]:
    """n statements, a multiple of 16, in blocks of eight of alternating kind; the rest as in `Scenes`.

    Facts are drawn at random until two that came twice make a block, so `nouns` should be some dozens: of
    hundreds, hardly a fact comes twice. Raises ValueError as `Scenes` does, for another n, and when blocks
    stay away.
    """
    _check_size(n)
    scenes = Scenes(emojivl, nouns, artists, canvas, {"pair": 1}, pairs, sizes, seed)
    once: dict[tuple, Scene] = {}
    twice: list[tuple[Scene, Scene]] = []
    found: list[Statement] = []
    for scene in takes(scenes, 10 * n + 1000, "repeat facts about the same and about other objects"):
        if (fact := meaning(scene)) not in once:
            once[fact] = scene
            continue
        F, same = (once.pop(fact), scene), len(found) % 16 == 8
        for G in twice:
            other = meaning(G[0])
            if other != fact and (other[:2] == fact[:2]) == same:
                twice.remove(G)
                found += _block(F, G, "same objects" if same else "other objects")
                break
        else:
            twice.append(F)
        if len(found) == n:
            return found


def _block(F: tuple[Scene, Scene], G: tuple[Scene, Scene], kind: str) -> Iterator[Statement]:
    caption, pair = F[0].caption, meaning(F[0])[:2]
    for left in (F[0], G[0]):
        for right in (F[1], G[1]):
            shown = left is F[0], right is F[1]
            one = shown[0] != shown[1]
            yield Statement((left, right), ONE.format(caption), one, kind, pair, shown)
            yield Statement((left, right), SAME.format(caption), not one, kind, pair, shown)


def _check_size(n: int) -> None:
    if n < 16 or n % 16:
        fail("n", "must be a positive multiple of 16, for the balance", n)


# Batches. `blind` leaves out one half of the input: "image" gives mid-grey pictures, "text" empty texts.


def vqa_batch(
    items: Sequence[Question],
    tokenizer: WordPiece,
    answers: Sequence[str],
    blind: str | None = None,
    longest: int = 40,
) -> tuple[dict[str, Tensor], Tensor]:
    """`(inputs of model.encode, targets (B, answers) of 0 and 1)`, for a binary cross-entropy per answer.

    Raises ValueError for a question longer than `longest` tokens or whose answer is not among `answers`.
    """
    number = {answer: k for k, answer in enumerate(answers)}
    targets = torch.zeros(len(items), len(answers))
    for row, item in zip(targets, items, strict=True):
        if item.answer not in number:
            fail("answers", "must hold the answer of every question", repr(item.answer))
        row[number[item.answer]] = 1
    return _inputs([q.text for q in items], [q.scene for q in items], tokenizer, blind, longest), targets


def nlvr2_batch(
    items: Sequence[Statement], tokenizer: WordPiece, blind: str | None = None, longest: int = 40
) -> tuple[tuple[dict, dict], Tensor]:
    """`((inputs of the first, of the second model.encode), targets (B,) int64)`, 1 = true.

    Raises ValueError for a statement longer than `longest` tokens.
    """
    texts = [item.text for item in items]
    first, second = (_inputs(texts, [s.scenes[k] for s in items], tokenizer, blind, longest) for k in (0, 1))
    return (first, second | {"image_type": 2}), torch.tensor([int(item.truth) for item in items])


def _inputs(texts, scenes, tokenizer, blind, longest) -> dict[str, Tensor]:
    if blind not in (None, "image", "text"):
        fail("blind", 'must be None, "image" or "text"', repr(blind))
    ids, mask = fitting_rows(tokenizer, [""] * len(texts) if blind == "text" else texts, longest)
    pixels = scene_pixels(scenes)
    if blind == "image":
        pixels = torch.zeros_like(pixels)
    return {"ids": torch.from_numpy(ids), "text_mask": torch.from_numpy(mask), "pixels": pixels}


def vqa_logits(model: Vilt, inputs: dict[str, Tensor]) -> Tensor:
    """A batch of questions → (B, answers), on the device of the model."""
    return model.vqa_logits(model.encode(**_moved(inputs, model))["pooled"])


def nlvr2_pooled(model: Vilt, inputs: tuple[dict, dict]) -> tuple[Tensor, Tensor]:
    """A batch of statements, read with the first and with the second picture → (B, D) each."""
    first, second = (model.encode(**_moved(one, model))["pooled"] for one in inputs)
    return first, second


def nlvr2_logits(model: Vilt, inputs: tuple[dict, dict]) -> Tensor:
    """A batch of statements → (B, 2), column 1 = true, on the device of the model."""
    return model.nlvr2_logits(*nlvr2_pooled(model, inputs))


def _moved(inputs: dict, model: Vilt) -> dict:
    device = next(model.parameters()).device
    return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in inputs.items()}


@torch.inference_mode()
def vqa_accuracy(
    model: Vilt,
    tokenizer: WordPiece,
    items: Sequence[Question],
    answers: Sequence[str],
    blind: str | None = None,
) -> dict[str, dict]:
    """{"all", "how many", "what is shown", "where": {"value", "low", "high", "chance", "objects", …}}.

    chance: for "all", 1/2, what the picture alone can reach by construction (the text alone reaches less);
    for one kind, what the text alone can reach. objects: the ceiling for one who knows which objects a
    picture shows and how many, but not where.
    """

    def best(rows: np.ndarray) -> np.ndarray:
        inputs, targets = vqa_batch([items[i] for i in rows], tokenizer, answers, blind, longest)
        return (vqa_logits(model, inputs).argmax(-1).cpu() == targets.argmax(-1)).numpy()

    longest, nouns = model.config.max_text_len, len(answers) - len(COUNTS) - 1
    hits = _hits(tokenizer, [item.text for item in items], longest, best)
    chances = {"all": 1 / 2, "how many": 1 / 4, "what is shown": 1 / nouns, "where": 1 / 2}
    ceilings = {"all": 3 / 4, "how many": 1, "what is shown": 1, "where": 1 / 2}
    clusters = [tuple(sorted(set(item.scene.objects))) for item in items]
    return _by_kind(hits, clusters, [item.kind for item in items], chances, ceilings)


@torch.inference_mode()
def nlvr2_accuracy(
    model: Vilt, tokenizer: WordPiece, items: Sequence[Statement], blind: str | None = None
) -> dict[str, dict]:
    """{"all", "other objects", "same objects": {"value", "low", "high", "chance", "objects", …}}."""

    def best(rows: np.ndarray) -> np.ndarray:
        inputs, targets = nlvr2_batch([items[i] for i in rows], tokenizer, blind, model.config.max_text_len)
        return (nlvr2_logits(model, inputs).argmax(-1).cpu() == targets).numpy()

    hits = _hits(tokenizer, [item.text for item in items], model.config.max_text_len, best)
    chances = dict.fromkeys(("all", "other objects", "same objects"), 1 / 2)
    ceilings = {"all": 3 / 4, "other objects": 1, "same objects": 1 / 2}
    return _by_kind(hits, [item.pair for item in items], [item.kind for item in items], chances, ceilings)


def _hits(tokenizer, texts: Sequence[str], longest: int, best: Callable) -> np.ndarray:
    hits = np.zeros(len(texts))
    for rows, _ in equal_lengths(tokenizer, texts, longest):
        hits[rows] = best(rows)
    return hits


def _by_kind(hits, clusters: list, kinds: list[str], chances: dict, ceilings: dict) -> dict[str, dict]:
    found = {}
    for kind in chances:
        which = [i for i, one in enumerate(kinds) if kind in ("all", one)]
        chosen = [clusters[i] for i in which]
        found[kind] = measured(hits[which], chosen, chance=chances[kind], objects=ceilings[kind])
    return found
