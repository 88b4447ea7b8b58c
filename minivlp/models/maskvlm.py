"""MaskVLM: one side is hidden at a time, and the other, whole, helps to fill it in.

    z_v = Encoder([cls ; patch · W] + position)       a hidden patch is the mask token in place of patch · W
    z_t = Encoder(LN(word + position))                a hidden word is [MASK]
    c_v = Cross_v(z_v, z_t)                           patches look at one another, then at the words
    c_t = Cross_t(z_t, z_v)                           words look at one another, then at the patches

    words      from Cross_t of the masked words and of the whole picture
    pixels     W_p Decoder(Cross_v(hidden picture, whole text), whole text), every patch its 3 p² colours
    match      from the [CLS] of c_t, so that Cross_v has nothing to do but to fill in
    contrast   z_v and z_t at their [CLS], projected, as in CLIP

Where both sides are hidden in part, as in FLAVA, a hidden patch may need a word that is hidden too. Here it
never does. What is predicted of a patch are its colours, no codes: the error is |x − x̂|, the negative log
likelihood of a Laplace distribution up to its width.

Sources: Kwon et al. 2023 (MaskVLM), sections 3.1 to 3.3.
Left out: RoBERTa's and ViT-B's weights in the two encoders; momentum encoders.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from minivlp.core import require
from minivlp.infonce import InfoNCE
from minivlp.models.parts import MaskedWords, MlmHead, check_text, classifier
from minivlp.patch import PatchEmbed, check_pixels, patches_a_side, to_patches
from minivlp.transformer import CrossEncoder, Encoder, key_mask, normal_init


@dataclass(frozen=True)
class MaskVlmConfig:
    """The sizes of a MaskVLM; all encoders have one width, number of heads and MLP width."""

    vocab_size: int = 512
    max_text_len: int = 24
    dim: int = 96
    tower_layers: int = 2  # of the picture encoder, and of the text encoder
    cross_layers: int = 1  # of both cross stacks, and of the decoder
    heads: int = 3
    hidden: int = 192
    embed: int = 96  # width of the space in which pictures and texts are compared
    patch: int = 8
    image_size: int = 48  # pixels a side, of every picture
    eps: float = 1e-6

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)

    @property
    def patches(self) -> int:
        """N, the patches of a picture."""
        return patches_a_side(self.image_size, self.patch) ** 2


class MaskVlm(MaskedWords, nn.Module):
    """MaskVLM: two encoders, two cross stacks, a pixel decoder. Initial values use torch's generator."""

    def __init__(self, config: MaskVlmConfig):
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.text_position = nn.Embedding(c.max_text_len, c.dim)
        self.text_norm = nn.LayerNorm(c.dim, c.eps)
        self.cls, self.mask = (nn.Parameter(torch.empty(c.dim).normal_(std=0.02)) for _ in range(2))
        self.position = nn.Parameter(torch.empty(1 + c.patches, c.dim).normal_(std=0.02))  # row 0 for cls
        self.image = Encoder(c.dim, c.heads, c.hidden, c.tower_layers, c.eps)
        self.text = Encoder(c.dim, c.heads, c.hidden, c.tower_layers, c.eps)
        self.image_cross, self.text_cross, self.decoder = (
            CrossEncoder(c.dim, c.heads, c.hidden, c.cross_layers, c.eps) for _ in range(3)
        )
        self.image_project, self.text_project = (nn.Linear(c.dim, c.embed) for _ in range(2))
        self.mlm = MlmHead(c.vocab_size, c.dim, c.eps, tied=False)
        self.itm = classifier(c.dim, 2 * c.dim, 2)
        self.colours = nn.Linear(c.dim, 3 * c.patch**2)
        self.apply(normal_init)
        self.contrast = InfoNCE()
        self.patch = PatchEmbed(c.dim, c.patch)

    def image_states(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """z_v (B, 1+N, D), [CLS] first.

        pixels (B, 3, H, W) normalised, H = W = image_size; hidden (B, N) bool, True = the patch is not seen.
        Raises ValueError on other shapes, dtypes and NaN.
        """
        c = self.config
        B, *size = check_pixels(pixels, c.patch)
        if size != [c.image_size] * 2:
            require.fail("pixels", f"must be {c.image_size} × {c.image_size}", tuple(pixels.shape))
        z = self.patch(pixels)  # (B, N, D)
        if hidden is not None:
            require.mask("hidden", hidden)
            if hidden.shape != z.shape[:2]:
                require.fail("hidden", f"must have shape (B, N) = {tuple(z.shape[:2])}", tuple(hidden.shape))
            z = torch.where(hidden[..., None], self.mask, z)
        return self.image(torch.cat([self.cls.expand(B, 1, -1), z], 1) + self.position)

    def text_states(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        """z_t (B, L, D).

        ids (B, L) integers with [CLS] first, text_mask (B, L) bool, True = a word. Raises ValueError on bad
        shapes, dtypes, ids outside the vocabulary and texts without words.
        """
        c = self.config
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        z = self.text_norm(self.word(ids) + self.text_position.weight[:L])
        return self.text(z, key_mask(text_mask))

    def image_vector(self, image: Tensor) -> Tensor:
        """z_v (B, 1+N, D) → unit rows (B, embed), read at [CLS]."""
        return normalize(self.image_project(image[:, 0]), dim=-1)

    def text_vector(self, text: Tensor) -> Tensor:
        """z_t (B, L, D) → unit rows (B, embed), read at [CLS]."""
        return normalize(self.text_project(text[:, 0]), dim=-1)

    @property
    def scale(self) -> Tensor:
        """1/τ of the dot products, a differentiable scalar, at most 100."""
        self.contrast.clamp_scale()
        return self.contrast.scale

    def read(self, text: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        """c_t (B, L, D): the words z_t (B, L, D), having looked at the picture z_v (B, 1+N, D)."""
        return self.text_cross(text, image, key_mask(text_mask), None)

    def fill(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """The colours of all patches, (B, N, 3pp) as `to_patches` cuts them, of z_v and of the words z_t."""
        mask = key_mask(text_mask)
        looked = self.image_cross(image, text, None, mask)  # c_v (B, 1+N, D)
        return self.colours(self.decoder(looked, text, None, mask)[:, 1:])

    def itm_logits(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Does the text match the picture? z_v (B, 1+N, D), z_t (B, L, D) → (B, 2), column 1 = match."""
        return self.itm(self.read(text, text_mask, image)[:, 0])

    def colour_errors(self, pixels: Tensor, hidden: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """|x − x̂| of a patch, the mean over its 3 p² colours, (B, N); hidden ones (B, N) are not seen."""
        filled = self.fill(self.image_states(pixels, hidden), text, text_mask)
        return (filled - to_patches(pixels, self.config.patch)).abs().mean(-1)
