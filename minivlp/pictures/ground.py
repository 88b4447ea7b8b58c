"""The demo of X-VLM: type a phrase, see the box that the model draws for it in pictures it is true of.

All pictures are by artists that training never showed, where the data has some. A name is asked for among
other objects, a place or a relation among twins: "a dog left of the middle", "a dog above a guitar".
"""

from pathlib import Path

from minivlp.core.require import fail
from minivlp.data import load_emojivl
from minivlp.data.crowds import Crowds, phrases
from minivlp.evaluation.xvlm import iou, predict_boxes, true_boxes
from minivlp.pictures.queries import check_words, named_in, shown_artists
from minivlp.pictures.sheets import grounding_sheet
from minivlp.text import split_words
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained

SHOWN, SEED = 10, 11
TRIES = 2000  # scenes looked through for those that the phrase is true of
OTHERS = 4  # nouns that may lie beside those of the phrase


def ground(caption: str, trained: Trained, out: Path, device: str, screen: Screen) -> None:
    """Find the phrase in ten pictures, print, and write demo.png into the folder `out`.

    Raises ValueError for a word that the model has never read, and for what is no phrase about one object.
    """
    emojivl, words = load_emojivl(), split_words(caption)
    nouns, caption = trained.nouns(emojivl), " ".join(words)
    check_words(words, nouns)
    need_writable(out / "demo.png", make_folder=True)
    named = named_in(caption, nouns)
    few = named + [c for c in nouns if c not in named][:OTHERS]
    source = Crowds(emojivl, few, shown_artists(emojivl), trained.canvas, "all", seed=SEED)
    items = []
    for scene in map(source.__getitem__, range(TRIES)):
        items += [(scene, p) for p in phrases(scene) if " ".join(split_words(p.text)) == caption]
        if len(items) >= SHOWN:
            break
    if not items:
        example = '"a dog", "a dog left of the middle" or "a dog above a guitar"'
        fail("caption", f"must be a phrase about one object, as {example}", repr(caption))
    predicted, true = predict_boxes(trained.model.to(device), trained.tokenizer, items), true_boxes(items)
    overlaps = iou(predicted, true)
    right = int((overlaps >= 0.5).sum())
    by = ", ".join(shown_artists(emojivl))
    screen.say(f"{len(items)} pictures by {by}; {right} boxes right (IoU at least 0.5)")
    screen.say(" IoU  the picture shows")
    for (scene, _), overlap in zip(items, overlaps, strict=True):
        screen.say(f"{overlap:.2f}  {scene.caption}")
    rows = [(s.image, caption, *boxes) for (s, _), *boxes in zip(items, true, predicted, strict=True)]
    grounding_sheet(out / "demo.png", rows)
    screen.say(f"wrote {out / 'demo.png'}")
