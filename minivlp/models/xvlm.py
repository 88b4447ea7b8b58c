"""X-VLM: phrases aligned with the parts of a picture that they speak of, from single objects to the whole.

    patches = Encoder(patch · W + position)         words = Encoder(LN(word + position))
    region  = [mean of its patches ; its patches]   (regions.py)        fused = CrossEncoder(words, region)

Three encoders: one for the picture, one for the text, and a cross-modal one in which the words look at one
another and then at the tokens of a region. Before they meet, text [CLS] and region mean can be compared by a
dot product, as in CLIP. After it, the fused [CLS] tells whether they match and, read with the whole picture,
where in it the phrase is: box = sigmoid(MLP(fused [CLS])), centre and size as fractions of the picture.

Sources: Zeng, Zhang and Li 2022 (X-VLM), sections 3.1 to 3.3; Trockman and Kolter 2023 (mimetic
initialization) for the small initial values.
Left out: Swin as the image encoder and BERT's published weights in the two others (all start fresh here);
dropout; pictures of several sizes in one batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from minivlp.core import require
from minivlp.infonce import InfoNCE
from minivlp.models.parts import (
    MaskedWords,
    MlmHead,
    alike,
    check_text,
    classifier,
    mean_of_seen,
    resize_positions,
    sine_cosine_positions,
)
from minivlp.patch import PatchEmbed, check_pixels, patches_a_side
from minivlp.regions import region_tokens
from minivlp.transformer import CrossEncoder, Encoder, key_mask, normal_init


@dataclass(frozen=True)
class XvlmConfig:
    """The sizes of an X-VLM; all three encoders have one width, number of heads and MLP width."""

    vocab_size: int = 512
    max_text_len: int = 24
    dim: int = 96
    image_layers: int = 3
    text_layers: int = 2
    cross_layers: int = 2
    heads: int = 3
    hidden: int = 192
    embed: int = 96  # width of the space in which texts and regions are compared
    patch: int = 8
    image_size: int = 48  # pixels; positions are stored on a grid of image_size / patch squared
    eps: float = 1e-6

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)

    @property
    def grid(self) -> int:
        """Rows (and columns) of the stored position grid."""
        return patches_a_side(self.image_size, self.patch)


class Xvlm(MaskedWords, nn.Module):
    """X-VLM: three encoders and four heads. Initial values use torch's default generator."""

    def __init__(self, config: XvlmConfig):
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.text_position = nn.Embedding(c.max_text_len, c.dim)
        self.text_norm = nn.LayerNorm(c.dim, c.eps)
        self.position = nn.Parameter(torch.empty(c.grid**2, c.dim).normal_(std=0.02))
        self.image = Encoder(c.dim, c.heads, c.hidden, c.image_layers, c.eps)
        self.text = Encoder(c.dim, c.heads, c.hidden, c.text_layers, c.eps)
        self.cross = CrossEncoder(c.dim, c.heads, c.hidden, c.cross_layers, c.eps)
        self.image_project = nn.Linear(c.dim, c.embed)
        self.text_project = nn.Linear(c.dim, c.embed)
        self.mlm = MlmHead(c.vocab_size, c.dim, c.eps, tied=False)
        self.itm = classifier(c.dim, 2 * c.dim, 2)
        self.box = classifier(c.dim, 2 * c.dim, 4)
        self.apply(normal_init)
        self.contrast = InfoNCE()
        self.patch = PatchEmbed(c.dim, c.patch)

    # Before words and patches meet

    def image_patches(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W), normalised, H and W multiples of the patch → patches (B, N, D), row-major.

        Raises ValueError on other shapes, dtypes and NaN.
        """
        c = self.config
        _, H, W = check_pixels(pixels, c.patch)
        z = self.patch(pixels)  # (B, N, D)
        stored = self.position.view(c.grid, c.grid, c.dim)
        return self.image(z + resize_positions(stored, H // c.patch, W // c.patch).flatten(0, 1))

    def text_words(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        """ids (R, L) integers with [CLS] first, text_mask (R, L) bool, True = a word → words (R, L, D).

        Raises ValueError on bad shapes, dtypes, ids outside the vocabulary and texts without words.
        """
        c = self.config
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        z = self.text_norm(self.word(ids) + self.text_position.weight[:L])
        return self.text(z, key_mask(text_mask))

    def image_vector(self, mean: Tensor) -> Tensor:
        """The mean of a region (or of a picture, or one patch), (…, D) → unit rows (…, embed)."""
        return normalize(self.image_project(mean), dim=-1)

    def text_vector(self, words: Tensor) -> Tensor:
        """Words (R, L, D) → unit rows (R, embed), read at [CLS]."""
        return normalize(self.text_project(words[:, 0]), dim=-1)

    @property
    def scale(self) -> Tensor:
        """1/τ of the dot products, a differentiable scalar, at most 100."""
        self.contrast.clamp_scale()
        return self.contrast.scale

    # Where they meet

    def fuse(self, words: Tensor, text_mask: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        """Words (R, L, D) read with tokens (R, K, D) of a region → fused words (R, L, D).

        text_mask (R, L) and token_mask (R, K) bool, True = real. Raises ValueError when they do not fit.
        """
        require.shapes(words=(words, "R L D"), text_mask=(text_mask, "R L"))
        require.shapes(words=(words, "R L D"), tokens=(tokens, "R K D"), token_mask=(token_mask, "R K"))
        require.mask("text_mask", text_mask, whole_rows=True)
        require.mask("token_mask", token_mask, whole_rows=True)
        return self.cross(words, tokens, key_mask(text_mask), key_mask(token_mask))

    def encode(
        self, ids: Tensor, text_mask: Tensor, pixels: Tensor, pixel_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Words and whole pictures in, states out, under ViLT's names: what measures one measures the other.

        Arguments as in `image_patches` and `text_words`, one picture a text; pixel_mask must be None. Returns
        "text" (B, L, D) fused, "image" (B, N+1, D) with the mean first and the patches row-major,
        "image_mask" (B, N+1) all True and "pooled" (B, D), the fused [CLS]. Raises ValueError as they do.
        """
        if pixel_mask is not None:
            require.fail("pixel_mask", "must be None: pictures of a batch have one size", "a mask")
        words, patches = self.text_words(ids, text_mask), self.image_patches(pixels)
        if len(words) != len(patches):
            require.fail("pixels", f"must hold one image per text, B={len(words)}", tuple(pixels.shape))
        image = whole_picture(patches)
        mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        fused = self.fuse(words, text_mask, image, mask)
        return {"text": fused, "image": image, "image_mask": mask, "pooled": fused[:, 0]}

    def boxes(self, pooled: Tensor) -> Tensor:
        """Where the phrase is: fused [CLS] of phrase and whole picture (R, D) → cxcywh in (0, 1), (R, 4)."""
        return self.box(pooled).sigmoid()

    def itm_logits(self, pooled: Tensor) -> Tensor:
        """Does the text match the region? Fused [CLS] (R, D) → (R, 2), column 1 = match."""
        return self.itm(pooled)


def whole_picture(patches: Tensor) -> Tensor:
    """The region that is the whole picture: patches (B, N, D) → (B, 1+N, D), their mean first."""
    return region_tokens(patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))


@torch.no_grad()
def small_init(model: Xvlm) -> Xvlm:
    """Give `model` values with which a small X-VLM learns from little data, in place; return it.

    As `vilt.small_init`, for three encoders, from torch's default generator:

        picture       as there: patches and positions of unit variance, queries equal to keys
        text          queries and keys near zero, W_out = W_vᵀ with W_v orthogonal: every token is given the
                      mean of the words, [CLS] too, which is the same in all texts and says nothing by itself
        cross-modal   among words as in the text; from words to patches queries equal to keys, and W_out =
                      W_vᵀ: a word is given the mean of the patches that are like it, with their places
        projections   the two into the space of comparison are equal: what brings a phrase and its region
                      together there brings their states together, and the phrase's query finds the patches'
                      keys
    """
    c = model.config
    nn.init.normal_(model.patch.weight, std=1 / math.sqrt(3 * c.patch**2 / 4))  # pixels have deviation ½
    model.position.copy_(sine_cosine_positions(c.grid, c.dim))
    for table in (model.word, model.text_position):
        nn.init.normal_(table.weight, std=0.5)  # a LayerNorm follows: only the ratio counts
    for block in model.image.blocks:
        query, key, value = block.qkv.weight.chunk(3)
        alike(query, key)
        nn.init.orthogonal_(value)
    for block in (*model.text.blocks, *model.cross.blocks):
        mean_of_seen(block.qkv.weight.chunk(3)[2], block.proj.weight)
    for block in model.cross.blocks:
        key, value = block.kv.weight.chunk(2)
        alike(block.q.weight, key)
        mean_of_seen(value, block.proj_cross.weight)
    for block in (*model.image.blocks, *model.text.blocks, *model.cross.blocks):
        nn.init.orthogonal_(block.fc1.weight)
    nn.init.orthogonal_(model.image_project.weight)
    model.text_project.weight.copy_(model.image_project.weight)
    return model
