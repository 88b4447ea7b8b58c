"""All families on one axis: what each proves of the nats that a picture tells of its caption.

The captions of a pair are a table that is known: which two nouns, which of them first, and which relation,
all alike. Given the picture only the order of naming is open. So H(c), H(c | x) and I(c; x) are exact
(`caption_nats`), and every family gives a number for each pair whose mean is at most I:

    captioner       H(c) + log q(c | x), the log_p of a Writer
    masked words    H(c | L) + Σ_k log q(word_k | words before it in some order, x)          `revealed`
    contrast        log B + S_ii − logsumexp of its row and of its column, averaged          `contrasted`
    generator       log q(x | c) − log Σ_c' p(c') q(x | c')                                  `pmi` of `drawn`

The first, the second and the last are H(c) less the cross-entropy of some q(c | x) that sums to one; the
contrast is log B less that of finding the partner. A masked model is told the length L of the caption by the
number of its masks, so it is measured on what is left, H(c | L), and is bounded by I(c; x | L).

What is no bound: a difference of two models, log q(c | x) − log q(c), whose second may be bad; sums of words
or patches each hidden alone; and a log p(x) by the model itself.

Sources: Barber and Agakov 2003, for the bound of a decoder; van den Oord et al. 2018 (CPC), eq. 5; Wang and
Cho 2019 and Salazar et al. 2020, for probabilities of masked models.
Left out: I in other data, where nobody knows H(c).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from minivlp.core.require import fail
from minivlp.data import Scenes
from minivlp.data.scenes import OPPOSITE, with_article
from minivlp.evaluation.reading import equal_lengths
from minivlp.information import entropies
from minivlp.models.chameleon import Chameleon
from minivlp.models.flava import Flava
from minivlp.models.maskvlm import MaskVlm
from minivlp.text import WordPiece

Words = Callable[[Tensor, Tensor], Tensor]  # ids (b, L) with masks, pixels (b, 3, H, W) → logits (b, L, V)


def meanings(source: Scenes) -> dict[str, str]:
    """Every caption of pairs, all equally likely, and the other one that is true of the same pictures."""
    names = {concept.id: with_article(concept) for concept in source.nouns}
    pairs = [(names[a], names[b]) for a in names for b in source.partners(a)]
    return {f"{a} {r} {b}": f"{b} {other} {a}" for a, b in pairs for r, other in OPPOSITE.items()}


def caption_nats(source: Scenes, tokenizer: WordPiece) -> dict[str, float]:
    """Exact entropies in nats: "caption" H(c), "given_picture" H(c | x), "information" I, "length" H(L).

    What a picture tells is which caption or its other form is true of it.
    """
    other = meanings(source)
    shown = {c: i for i, c in enumerate(c for c in other if c < other[c])}
    of_pictures = np.zeros((len(other), len(shown)))
    of_pictures[np.arange(len(other)), [shown[min(c, o)] for c, o in other.items()]] = 1 / len(other)
    lengths = np.array([len(tokenizer.encode(c)) for c in other])
    of_lengths = (lengths[:, None] == np.unique(lengths)) / len(other)
    of = entropies(of_pictures)
    told = {"caption": of["x"], "given_picture": of["x_given_y"], "information": of["mutual"]}
    return told | {"length": entropies(of_lengths)["y"]}


def contrasted(scores: np.ndarray, B: int) -> np.ndarray:
    """log B less the InfoNCE loss of each pair: scores (n, n) of n pairs, in batches of B → (n,).

    Raises ValueError when B does not divide n.
    """
    n = len(scores)
    if B < 1 or n % B:
        fail("B", f"must be ≥ 1 and divide {n}", B)
    S = np.stack([scores[i : i + B, i : i + B] for i in range(0, n, B)]).astype(np.float64)
    own = np.diagonal(S, axis1=1, axis2=2)  # (n/B, B)
    rivals = (np.logaddexp.reduce(S, 1) + np.logaddexp.reduce(S, 2)) / 2
    return (math.log(B) + own - rivals).ravel()


def masked_words(model: Flava | MaskVlm) -> Words:
    """What a model says of the words under masks, the picture whole."""

    def words(ids: Tensor, pixels: Tensor) -> Tensor:
        mask = torch.ones_like(ids, dtype=torch.bool)
        image, text = model.image_states(pixels), model.text_states(ids, mask)
        if isinstance(model, MaskVlm):
            return model.mlm.logits(model.read(text, mask, image), model.mlm.weight)
        fused = model.fuse(image, text, mask)[:, 2 + model.config.patches :]
        return model.mmm_text.logits(fused, model.mmm_text.weight)

    return words


@torch.inference_mode()
def revealed(
    words: Words, tokenizer: WordPiece, captions: Sequence[str], pixels: Tensor, first: Sequence[int] | None
) -> np.ndarray:
    """log q of caption i's words, each asked for after those before it: (n,), nats.

    All words are hidden; those at the places `first` (0 = the first word, −1 the last) are uncovered first,
    then the others from left to right. None hides each word by itself in the whole caption: that sum is the
    log probability of nothing.
    """
    total, longest = np.zeros(len(captions)), max(map(len, captions), default=0) + 2  # letters ≥ pieces
    for rows, ids in equal_lengths(tokenizer, captions, longest):
        true, n = torch.from_numpy(ids), ids.shape[1] - 2
        order = [place % n for place in first or ()]
        hidden = true.clone()
        if first is not None:
            hidden[:, 1:-1] = tokenizer.mask_id
        for k in order + [k for k in range(n) if k not in order]:
            hidden[:, k + 1] = tokenizer.mask_id
            log_q = words(hidden, pixels[torch.from_numpy(rows)])[:, k + 1].log_softmax(-1)
            total[rows] += log_q.gather(1, true[:, k + 1, None])[:, 0].double().numpy()
            hidden[:, k + 1] = true[:, k + 1]
    return total


@torch.inference_mode()
def drawn(model: Chameleon, tokenizer: WordPiece, captions: Sequence[str], pixels: Tensor) -> np.ndarray:
    """log q(picture | caption) of every picture with every caption, pixels (n, 3, H, W) → (n, C), nats.

    A caption is read once for all pictures: no word of it sees a code.
    """
    c, images = model.config, model.with_begin(model.tokenise(pixels))  # (n, 1+N)
    S, codes = np.zeros((len(images), len(captions))), images[:, 1:, None] - c.begin - 1
    for rows, ids in equal_lengths(tokenizer, captions, c.max_text_len):
        L, b, places = ids.shape[1], len(ids), model.layout(ids.shape[1])[:-1]
        seen = torch.ones(len(places), len(places), dtype=torch.bool).tril()
        _, cache = model.run(torch.from_numpy(ids), places[:L], seen[:L, :L])
        for i, image in enumerate(images):
            states, _ = model.run(image[:-1].expand(b, -1), places[L:], seen[L:], cache)
            log_q = linear(states, model.head.weight[c.begin + 1 :]).log_softmax(-1)
            S[i, rows] = log_q.gather(2, codes[i].expand(b, -1, -1)).sum((1, 2)).double().numpy()
    return S
