"""Search drawings with words: every drawing of an unseen artist ranked for a query, the best on a sheet.

Left out: an index on disk. All drawings are encoded anew in about a second; a real search would do it once.
"""

from pathlib import Path

import numpy as np

from minivlp.core.require import fail
from minivlp.data import EmojiVL
from minivlp.data.drawings import Portraits
from minivlp.data.names import named
from minivlp.evaluation.match import Matcher, similarities
from minivlp.pictures.sheets import Sheet, contact_sheet
from minivlp.text import split_words
from minivlp.training.run import need_writable
from minivlp.training.screen import Screen
from minivlp.training.trained import Trained

SHOWN, LISTED = 18, 5  # drawings on the sheet, and in the terminal
PAPER = 235  # grey value behind the drawings of a sheet


class DrawingIndex:
    """All drawings by one artist, the first unseen one where there is one, encoded once.

    tokens: compare token by token, as filip does.
    """

    def __init__(self, trained: Trained, emojivl: EmojiVL, device: str = "cpu", tokens: bool = False):
        self.trained, self.language = trained, trained.settings["train"]["language"]
        self.artist = (*emojivl.unseen_artists, *emojivl.sheets)[0]
        self.concepts = [c for c in emojivl.concepts if self.artist in c.artists]
        self.matcher = Matcher(trained.model.to(device), trained.tokenizer, tokens)
        portraits = Portraits(emojivl, trained.canvas)
        ids = [c.id for c in self.concepts]
        self.pictures = self.matcher.pictures(portraits.plain(ids, [self.artist] * len(ids)))
        self._sheet = emojivl.sheets[self.artist]

    def scores(self, query: str) -> np.ndarray:
        """The similarity of the query with every drawing, (n,) in [−1, 1]."""
        return similarities(self.matcher.texts([query]), self.pictures)[0]

    def sheet(self, query: str, shown: int = SHOWN, title: str = "") -> Sheet:
        """An entry of `contact_sheet`; a frame marks concepts that training never showed.

        title: in place of the query, which may be in a script that the font lacks.
        """
        best = np.argsort(-self.scores(query), kind="stable")[:shown]
        drawn = [(self._image(i), self.concepts[i]) for i in best]
        return title or query, [(image, named(c, "en"), c.split != "train") for image, c in drawn]

    def _image(self, i: int) -> np.ndarray:
        """The drawing as it is in the data, on light grey."""
        tile = self._sheet[self.concepts[i].id].astype(np.float32)  # (64, 64, 4)
        alpha = tile[..., 3:] / 255
        return (tile[..., :3] * alpha + PAPER * (1 - alpha)).astype(np.uint8)


def search(query: str, index: DrawingIndex, out: Path, screen: Screen) -> None:
    """Rank, print, and write demo.png into the folder `out`. Raises ValueError without one known word."""
    words, tokenizer = split_words(query), index.trained.tokenizer
    unknown = [word for word in words if tokenizer.unk_id in tokenizer.encode(word)]  # in any form
    if len(unknown) == len(words):
        got = ", ".join(map(repr, words)) or "none"
        fail("caption", "must hold at least one word the model has read", got)
    need_writable(out / "demo.png", make_folder=True)
    scores = index.scores(query)
    screen.say(f"{len(scores)} drawings by {index.artist}")
    if unknown:
        screen.say(f"never read in training, so passed over: {', '.join(unknown)}")
    screen.say("rank  cosine  the drawing shows")
    for place, i in enumerate(np.argsort(-scores, kind="stable")[:LISTED], start=1):
        concept = index.concepts[i]
        new = "" if concept.split == "train" else "  (never shown in training)"
        screen.say(f"{place:4d}  {scores[i]:+6.3f}  {named(concept, index.language)}{new}")
    title = "" if index.language == "en" else "what was asked for in Chinese"
    contact_sheet(out / "demo.png", [index.sheet(query, title=title)])
    screen.say(f"wrote {out / 'demo.png'}")
