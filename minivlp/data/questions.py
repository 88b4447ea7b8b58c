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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minivlp.core.require import fail
from minivlp.data.emojivl import Concept, EmojiVL
from minivlp.data.probes import article_and_noun, meaning, takes
from minivlp.data.scenes import OPPOSITE, Scene, Scenes

COUNTS = ("one", "two", "three", "four")
NOTHING = "nothing"
ONE, SAME = "{} in one picture only", "{} in both pictures or in none"
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


def questions(emojivl: EmojiVL, nouns: Sequence[Concept], canvas: int, n: int, **more: Any) -> list[Question]:
    """n questions, a multiple of 16: half about counts of a noun, half about pairs; `more` is for `Scenes`.

    The two questions about a picture follow each other. Training takes another seed: counts have no pairs
    that could be held out. Raises ValueError as `Scenes` does and for another n.
    """
    _check_size(n)
    found, room = [], Counter({k: n // 16 for k in range(1, 5)})
    counts = Scenes(emojivl, nouns, canvas=canvas, kinds={"count": 1}, **more)
    for scene in takes(counts, 10 * n, "count"):
        if room[k := len(scene.objects)]:
            concept = emojivl.concepts[scene.objects[0]]
            found.append(Question(scene, f"how many {concept.plural}", COUNTS[k - 1], "how many"))
            found.append(Question(scene, "what is shown", concept.noun, "what is shown"))
            room[k] -= 1
        if not room.total():
            break
    scenes = Scenes(emojivl, nouns, canvas=canvas, **more)
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
    emojivl: EmojiVL, nouns: Sequence[Concept], canvas: int, n: int, **more: Any
) -> list[Statement]:
    """n statements, a multiple of 16, in blocks of eight of alternating kind; `more` is for `Scenes`.

    Facts are drawn at random until two that came twice make a block, so `nouns` should be some dozens: of
    hundreds, hardly a fact comes twice. Raises ValueError as `Scenes` does, for another n, and when blocks
    stay away.
    """
    _check_size(n)
    scenes = Scenes(emojivl, nouns, canvas=canvas, **more)
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
