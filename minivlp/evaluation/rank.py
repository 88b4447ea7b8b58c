"""How well does a caption fit each of many pictures? Ask both heads of a trained ViLT.

    match_odds    the matching head reads the caption with each picture: log odds of a match
    word_scores   the masked-word head reads it with its nouns hidden: how probable they are in each picture
    rank          log p(match) + log p(nouns): the order in which pictures are shown for a caption

A picture costs two forward passes. A ViLT that was trained for a day ranks by matching alone; a small one has
seen one bit a row there and a whole word for every hidden noun, so its words know more (README, first table).

Sources: Kim, Son and Kim 2021 (ViLT), section 4.4: a caption is read with every candidate picture. Salazar et
al. 2020 (Masked language model scoring), equation 2: a text's score is the sum over its hidden words.
Left out: the words that are no nouns, and hiding one at a time, which is as many passes as words.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minivlp.core.require import fail
from minivlp.models.vilt import Vilt
from minivlp.text import WordPiece

BATCH = 64  # texts a forward pass: on a CPU more of them leave the cache and are no faster


def whole_rows(tokenizer: WordPiece, texts: Sequence[str], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """`tokenizer.batch` without word numbers, and a ValueError for a text that it would cut short."""
    ids, _, mask = tokenizer.batch(texts, longest + 1)
    if ids.shape[1] > longest:
        text = texts[int(mask.sum(1).argmax())]
        fail("texts", f"must fit the model's {longest} tokens with [CLS] and [SEP]", repr(text))
    return ids, mask


def match_scores(model: Vilt, states: dict[str, Tensor]) -> Tensor:
    """The log odds of a match, (B,): the difference of the two ITM logits."""
    return model.itm_logits(states["pooled"]).diff(dim=-1)[:, 0]


def rank(
    model: Vilt, tokenizer: WordPiece, caption: str, hidden: tuple[str, Sequence[int]], pixels: Tensor
) -> np.ndarray:
    """How well one caption fits each picture, by both heads: pixels (B, 3, H, W) → (B,), at most 0.

    log p(match | caption, picture) + log p(nouns | the caption without them, picture), where `hidden` is what
    `tasks.hide_nouns` or `hide_slots` gives: the caption with [MASK]s and the ids under them.
    """
    odds = match_odds(model, tokenizer, caption, pixels)
    return both_heads(odds, word_scores(model, tokenizer, *hidden, pixels))


def both_heads(odds: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Log odds of a match and log probabilities of the hidden words → the score of a pair."""
    return words - np.logaddexp(0, -odds)  # log p of odds o is −log(1 + e⁻ᵒ)


@torch.inference_mode()
def match_odds(model: Vilt, tokenizer: WordPiece, caption: str, pixels: Tensor) -> np.ndarray:
    """The log odds that one caption matches each picture: pixels (B, 3, H, W) → (B,)."""
    read = _with_each(model, tokenizer, caption, pixels)
    return torch.cat([match_scores(model, states) for _, states in read]).float().cpu().numpy()


@torch.inference_mode()
def word_scores(
    model: Vilt, tokenizer: WordPiece, text: str, ids: Sequence[int], pixels: Tensor
) -> np.ndarray:
    """The log probability of the ids under the [MASK]s of one text, given each picture: → (B,)."""
    scores = []
    for mask, states in _with_each(model, tokenizer, text, pixels):
        logits = model.mlm_logits(states["text"][:, mask])  # (b, masks, V)
        which = torch.tensor(ids, dtype=torch.int64, device=logits.device).expand(len(logits), -1)
        scores.append(logits.log_softmax(-1).gather(2, which[..., None]).sum((1, 2)))
    return torch.cat(scores).float().cpu().numpy()


def _with_each(model, tokenizer, text: str, pixels: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """One text with each picture, in batches: which tokens are [MASK] (L,), and the states."""
    ids = torch.from_numpy(whole_rows(tokenizer, [text], model.config.max_text_len)[0])  # (1, L)
    words = ids.to(next(model.parameters()).device)
    for some in pixels.split(BATCH):
        rows = words.expand(len(some), -1)
        states = model.encode(rows, torch.ones_like(rows, dtype=torch.bool), some.to(words.device))
        yield words[0] == tokenizer.mask_id, states
