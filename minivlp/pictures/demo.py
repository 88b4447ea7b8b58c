"""The demo: 64 pictures ranked for a caption that you type, and where its words point in the best one.

Half of the pictures show the objects that the caption names, in every relation, so that knowing the objects
is not enough; the caption is true of one picture at least. All are by artists that training never showed,
where the data has some.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minivlp.core.require import fail
from minivlp.data import RELATIONS, Concept, EmojiVL, Scene, Scenes, load_emojivl
from minivlp.data.probes import hide_nouns, meaning
from minivlp.data.questions import COUNTS
from minivlp.evaluation.rank import rank
from minivlp.pictures import figures
from minivlp.pictures.gallery import aligned
from minivlp.pictures.queries import check_words, named_in, shown_artists
from minivlp.text import split_words
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained

PICTURES, SHOWN, SEED = 64, 5, 11
TRIES = 1000  # scenes looked through for one that the caption is true of


def demo(caption: str, trained: Trained, out: Path, device: str, screen: Screen) -> None:
    """Rank, print, and write demo.png and demo_alignment.png into the folder `out`.

    Raises ValueError for a word that the model has never read and for a model of own captions.
    """
    emojivl = load_emojivl()
    if trained.settings.get("captions"):
        fail("--run", "must be a run on scenes, which the demo can draw", "one on own captions")
    nouns = trained.nouns(emojivl)
    words = split_words(caption)
    caption = " ".join(words)
    check_words(words, nouns)
    for name in ("demo.png", "demo_alignment.png"):
        need_writable(out / name, make_folder=True)
    scenes, right = candidates(emojivl, nouns, trained.canvas, caption)
    model = trained.model.to(device)
    hidden = hide_nouns(caption, nouns, trained.tokenizer)
    scores = rank(model, trained.tokenizer, caption, hidden, scenes)
    best = np.argsort(-scores, kind="stable")[:SHOWN].tolist()
    true = f"the caption is true of {len(right)} of them" if right else "none of them is exactly that"
    screen.say(f"{PICTURES} pictures by {', '.join(shown_artists(emojivl))}; {true}")
    screen.say("rank  log probability  the picture shows")
    for place, i in enumerate(best, start=1):
        screen.say(f"{place:4d}  {scores[i]:15.2f}  {scenes[i].caption}{'  (right)' if i in right else ''}")
    hits = [place for place, i in enumerate(best) if i in right]
    figures.retrieval_grid(out / "demo.png", [(caption, [scenes[i].image for i in best], hits)])
    figures.alignment(
        out / "demo_alignment.png", [aligned(model, trained.tokenizer, scenes[best[0]], caption)]
    )
    screen.say(f"wrote {out / 'demo.png'} and {out / 'demo_alignment.png'}")


def candidates(
    emojivl: EmojiVL, nouns: Sequence[Concept], canvas: int, caption: str
) -> tuple[list[Scene], set[int]]:
    """64 pictures for a caption, and the indices of those that it is true of.

    When the caption has the form of a scene's ("a dog left of a guitar"), there is at least one; of another
    form ("a dog left of a dog") no picture counts as right.
    """
    kind, named = _kind(caption), named_in(caption, nouns)
    others = [c for c in nouns if c not in named]
    few = named + others[: max(0, (3 if kind == "between" else 2) - len(named))]
    # One object is drawn on the whole canvas at the size it has elsewhere, so as a "place".
    drawn = {"one": "place"}.get(kind, kind)
    near, far = (
        Scenes(emojivl, concepts, shown_artists(emojivl), canvas, {drawn: 1}, "all", seed=SEED)
        for concepts in (few, nouns)
    )
    scenes = [near[i] for i in range(PICTURES // 2)] + [far[i] for i in range(PICTURES // 2)]
    example = next((s for s in map(near.__getitem__, range(TRIES)) if _caption(s, kind) == caption), None)
    if example is None:
        return scenes, set()
    right = {i for i, scene in enumerate(scenes) if _says(scene, kind) == _says(example, kind)}
    if not right:
        scenes[0] = example
    return scenes, right or {0}


def _kind(caption: str) -> str:
    """The kind of scene that a caption speaks of, by its words."""
    if "between" in caption:
        return "between"
    if "middle" in caption:
        return "place"
    if any(relation in caption for relation in RELATIONS):
        return "pair"
    return "count" if caption.startswith(COUNTS) else "one"


def _caption(scene: Scene, kind: str) -> str:
    """What the scene would be called in a caption of this kind, in the tokenizer's spelling."""
    return " ".join(split_words(scene.slots[0] if kind == "one" else scene.caption))


def _says(scene: Scene, kind: str) -> object:
    """Two scenes of a kind are told by the same captions when this is equal."""
    if kind == "pair":
        return meaning(scene)
    if kind == "between":
        return scene.objects[0], frozenset(scene.objects[1:])
    return _caption(scene, kind)
