"""How well does a caption fit each of many pictures? Ask both heads of a trained ViLT.

    match_odds    the matching head reads the caption with each picture: log odds of a match
    word_scores   the masked-word head reads it with its nouns hidden: how probable they are in each picture
    rank          log p(match) + log p(nouns): the order in which pictures are shown for a caption
    wins          is the caption's own picture first in that order? exactly, with about half of the passes

A ViLT that was trained for a day ranks by matching alone. A small one knows more by its words: its matching
head has seen one bit a row, its masked-word head a whole word for every hidden noun (README, first table).

Sources: Kim, Son and Kim 2021 (ViLT), section 4.4: a caption is read with every candidate picture. Salazar et
al. 2020 (Masked language model scoring), equation 2: a text's score is the sum over its hidden words.
Left out: the words that are no nouns, and hiding one at a time, which is as many passes as words.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minivlp.data import Scene
from minivlp.evaluation.reading import encoded
from minivlp.evaluation.splits import Tick, silent
from minivlp.models.vilt import Vilt
from minivlp.text import WordPiece

Hidden = tuple[str, Sequence[int]]  # a text with [MASK]s and the ids under them, as `probes.hide_slots` gives


def match_scores(model: Vilt, states: dict[str, Tensor]) -> Tensor:
    """The log odds of a match, (B,): the difference of the two ITM logits."""
    return model.itm_logits(states["pooled"]).diff(dim=-1)[:, 0]


@torch.inference_mode()
def match_odds(
    model: Vilt, tokenizer: WordPiece, captions: Sequence[str], scenes: Sequence[Scene], tick: Tick = silent
) -> np.ndarray:
    """The log odds that caption i matches picture i: (n,)."""
    odds = np.zeros(len(captions))
    for rows, _, states in encoded(model, tokenizer, captions, scenes, tick):
        odds[rows] = match_scores(model, states).float().cpu()
    return odds


@torch.inference_mode()
def word_scores(
    model: Vilt, tokenizer: WordPiece, hidden: Sequence[Hidden], scenes: Sequence[Scene]
) -> np.ndarray:
    """The log probability of all ids hidden in text i, given the rest and picture i: (n,), at most 0."""
    scores = np.zeros(len(hidden))
    for rows, ids, states in encoded(model, tokenizer, [text for text, _ in hidden], scenes):
        row, position = (ids == tokenizer.mask_id).nonzero(as_tuple=True)  # (masks,) each, row after row
        log_p = model.mlm_logits(states["text"][row, position]).log_softmax(-1)  # (masks, V)
        answers = torch.tensor([i for k in rows for i in hidden[k][1]], dtype=torch.int64, device=ids.device)
        log_p = log_p.gather(1, answers[:, None])[:, 0]
        scores[rows] = np.bincount(row.cpu(), log_p.float().cpu(), len(rows))
    return scores


def both_heads(odds: np.ndarray, words: np.ndarray | float) -> np.ndarray:
    """Log odds of a match and log probabilities of the hidden words → the score of a pair, at most 0."""
    return words - np.logaddexp(0, -odds)  # log p of odds o is −log(1 + e⁻ᵒ)


def rank(
    model: Vilt, tokenizer: WordPiece, caption: str, hidden: Hidden, scenes: Sequence[Scene]
) -> np.ndarray:
    """The score of one caption with each picture, (n,), at most 0.

    log p(match | caption, picture) + log p(nouns | the caption without them, picture), where `hidden` is what
    `probes.hide_nouns` or `hide_slots` gives: the caption with [MASK]s and the ids under them.
    """
    n = len(scenes)
    odds = match_odds(model, tokenizer, [caption] * n, scenes)
    return both_heads(odds, word_scores(model, tokenizer, [hidden] * n, scenes))


def wins(
    model: Vilt, tokenizer: WordPiece, hidden: Sequence[Hidden], scenes: Sequence[Scene], odds: np.ndarray
) -> np.ndarray:
    """Does picture i score strictly above all others for caption i? (n,) bool, from all odds (n, n).

    odds: row i those of caption i with every picture; hidden: the captions without their nouns. The answer
    is that of `rank` for every caption, but the nouns are read with few pictures only.
    """
    # A score is log p(match) + log p(nouns), and log p(nouns) ≤ 0. So a picture whose log p(match) lies below
    # the score of the caption's own picture scores below it too, whatever it says of the nouns: only the
    # others, the rivals, need the second pass. Rounding preserves ≤, so this holds for computed scores.
    own = both_heads(odds.diagonal(), word_scores(model, tokenizer, hidden, scenes))  # (n,)
    rival = ~(both_heads(odds, 0) < own[:, None])  # (n, n); a NaN is a rival
    np.fill_diagonal(rival, False)
    i, j = rival.nonzero()
    if not len(i):
        return np.ones(len(own), dtype=bool)
    words = word_scores(model, tokenizer, [hidden[k] for k in i], [scenes[k] for k in j])
    beaten = own[i] > both_heads(odds[i, j], words)
    return np.bincount(i[~beaten], minlength=len(own)) == 0
