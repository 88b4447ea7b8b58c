"""A noun finds its picture: a contrast by which words find their patches before both are read together.

A pair's alignment distance falls as soon as the model knows that the pair matches: it can move all words and
all patches together, and then no word points. A word that has not seen the picture cannot know. So captions
and pictures also pass the first half of the same blocks, each by themselves, and one noun of every caption b,
of P_b pieces, has to find its picture a among all pictures of the step by the patches it likes best,

    S_ba = 1/P_b Σₚ maxₙ cos(xₙ, yₚ),        L = InfoNCE(scale · S),

the half of FILIP's similarity that goes from words to patches. FILIP takes all words; but then each of them
looks for the patches of objects, and in a plan, where a patch has mass for few words, the noun can lose its
object to the others. Other nouns of the caption should be hidden: from "a dog left of a guitar" the word
"guitar" learns of the dog, finds the picture by it, and need not know a guitar.

Sources: Yao et al. 2022 (FILIP), section 3.1, for the similarity; Li et al. 2021 (ALBEF), section 3.1, for
aligning before fusing.
Left out: towers and projections of their own, which ALBEF has: these are the blocks that read pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm

from minivlp.core.require import fail
from minivlp.filip import late_interaction
from minivlp.models.vilt import Vilt
from minivlp.recipes.vilt_batches import ViltBatch
from minivlp.training.workers import ONE_PROCESS, Workers

SCALE = 20.0  # one over the temperature


def encode_separately(
    model: Vilt, ids: Tensor, text_mask: Tensor, pixels: Tensor, layers: int
) -> tuple[Tensor, Tensor]:
    """Words and patches that pass the first `layers` blocks without seeing each other.

    ids (B, L), text_mask (B, L) bool and pixels (B, 3, H, W) as `Vilt.encode` takes them; layers lies in [1,
    the model's]. Returns the states after these blocks, of words (B, L, D) and of patches (B, N, D), before
    any norm. Raises ValueError as `Vilt.encode` does.
    """
    if not 1 <= layers <= model.config.layers:
        fail("layers", f"must lie in [1, {model.config.layers}]", layers)
    text, (image, _) = model.embed_text(ids, text_mask), model.embed_image(pixels)
    for block in model.encoder.blocks[:layers]:
        text, image = block(text, text_mask[:, None, None]), block(image)
    return text, image[:, 1:]


def noun_contrast_loss(
    model: Vilt, ids: Tensor, text_mask: Tensor, noun: Tensor, pixels: Tensor, workers: Workers = ONE_PROCESS
) -> Tensor:
    """Do nouns find their pictures, and pictures their nouns? A mean over both, scalar in nats.

    ids (B, L), text_mask (B, L) bool, noun (B, L) bool, True at the pieces of the word that looks, one at
    least in a row; pixels (B, 3, H, W) without padding. Equal captions are no rivals of each other. Of
    several workers, each with its part of the pairs, all receive the loss of the whole batch. Raises
    ValueError as `Vilt.encode` and `late_interaction` do.
    """
    half = (model.config.layers + 1) // 2
    text, patches = encode_separately(model, ids, text_mask, pixels, half)
    text, patches = (layer_norm(z, z.shape[-1:]) for z in (text, patches))
    ids, noun, text, patches = (workers.gathered(z) for z in (ids, noun, text, patches))
    first = noun.int().argsort(dim=1, descending=True, stable=True)[:, : noun.sum(1).max()]  # (B, P)
    pieces = text.take_along_dim(first[..., None], 1)  # (B, P, D): a few of L words
    S = SCALE * late_interaction(pieces, patches, noun.take_along_dim(first, 1))  # (captions, pictures)
    same = (ids[:, None] == ids).all(-1)
    S = S.masked_fill(same & ~torch.eye(len(S), dtype=torch.bool, device=S.device), -torch.inf)
    own = torch.arange(len(S), device=S.device)
    return (cross_entropy(S, own) + cross_entropy(S.T, own)) / 2


def noun_contrast(model: Vilt, batch: ViltBatch, workers: Workers = ONE_PROCESS) -> Tensor:
    """`noun_contrast_loss` of the examples that take part; each is compared with all others of its batch."""
    rows = batch.noun.any(1)  # (B,)
    pairs = (z[rows] for z in (batch.contrast_ids, batch.contrast_mask, batch.noun, batch.pixels))
    return noun_contrast_loss(model, *pairs, workers)
