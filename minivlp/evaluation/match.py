"""What a trained dual encoder is for: similarities of any pictures with any texts, each encoded once.

Both sides become sets of unit tokens, one vector each, or with late interaction (filip) every patch and every
word; the similarity of two sets is late interaction's, which for single vectors is their cosine. A name is
read in several prompts. Of vectors the mean is taken, and its length made 1; of sets of tokens, whose sizes
differ, the similarities are averaged.

Sources: Radford et al. 2021 (CLIP), section 3.1.4 (prompt ensembles); Yao et al. 2022 (FILIP), section 3.1.
Left out: an index for millions of pictures; here one product compares all with all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from minivlp.core.require import fail
from minivlp.evaluation.reading import fitting_rows
from minivlp.filip import late_interaction
from minivlp.models.dual import Dual
from minivlp.text import WordPiece

BATCH = 128  # pictures or texts a forward pass
Tokens = tuple[Tensor, Tensor]  # unit tokens (n, M, E) and their mask (n, M)


@dataclass(frozen=True)
class Matcher:
    """A model in eval mode with its tokenizer; tokens: compare token by token, as filip does."""

    model: Dual
    tokenizer: WordPiece
    tokens: bool = False

    @torch.inference_mode()
    def pictures(self, pixels: Tensor) -> Tokens:
        """pixels (n, 3, H, W) → n sets of tokens, on the CPU."""
        device = next(self.model.parameters()).device
        encode = self.model.image_tokens if self.tokens else self.model.encode_image
        return _sets([encode(batch.to(device)) for batch in pixels.split(BATCH)])

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tokens:
        """n texts → n sets of tokens, on the CPU. Raises ValueError for a text that is too long."""
        config, device = self.model.config, next(self.model.parameters()).device
        ids, mask = fitting_rows(self.tokenizer, texts, config.max_text_len)
        ids, mask = padded(ids, mask, config.max_text_len, self.tokenizer, config.text_pool == "last")
        ids = ids.to(device).split(BATCH)
        if not self.tokens:
            return _sets([self.model.encode_text(batch) for batch in ids])
        return _sets([*map(self.model.text_tokens, ids, mask.to(device).split(BATCH))])

    def ensembles(self, names: Sequence[str], prompts: Sequence[str]) -> list[Tokens]:
        """The names in these prompts: one set of vectors, or for tokens one set a prompt."""
        if not prompts:
            fail("prompts", "must hold at least one", "none")
        read = [self.texts([prompt.format(name) for name in names]) for prompt in prompts]
        if self.tokens or len(read) == 1:
            return read
        mean = torch.stack([tokens for tokens, _ in read]).mean(0)  # (n, 1, E)
        return [(normalize(mean, dim=-1), read[0][1])]


def similarities(x: Tokens, y: Tokens) -> np.ndarray:
    """Sets x (A) and y (B) → (A, B) float32, from x to y; of tokens the two directions differ."""
    rows = max(1, 2**22 // max(1, y[1].numel() * x[1].shape[1]))  # so many cosines stay in the cache
    parts = zip(x[0].split(rows), x[1].split(rows), strict=True)
    return torch.cat([late_interaction(a, y[0], mask, y[1]) for a, mask in parts]).float().numpy()


def padded(
    ids: np.ndarray, mask: np.ndarray, length: int, tokenizer: WordPiece, fixed: bool
) -> tuple[Tensor, Tensor]:
    """ids and mask (B, L) as tensors, with `fixed` padded to one length: SigLIP reads the last position."""
    more = ((0, 0), (0, length - ids.shape[1] if fixed else 0))
    ids = np.pad(ids, more, constant_values=tokenizer.pad_id)
    return torch.from_numpy(ids), torch.from_numpy(np.pad(mask, more))


def _sets(batches: list[Tensor] | list[Tokens]) -> Tokens:
    """Batches of sets of tokens in one, on the CPU; a vector is a set of one."""
    if isinstance(batches[0], Tensor):  # (b, E) each
        batches = [(x[:, None], torch.ones(len(x), 1, dtype=torch.bool)) for x in batches]
    tokens, mask = (torch.cat(parts).cpu() for parts in zip(*batches, strict=True))
    return tokens, mask


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many wrong candidates score at least as high as the best right one: (A, C), (A, C) bool → (A,).

    So R@k is the share of ranks < k; a tie is no hit. Raises ValueError for a row without a right candidate.
    """
    if not right.any(1).all():
        fail("right", "must have a True in every row", "a row without")
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    return ((scores >= best) & ~right).sum(1)
