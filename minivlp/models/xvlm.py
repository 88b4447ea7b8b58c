"""X-VLM: phrases aligned with the parts of a picture that they speak of, from single objects to the whole.

    patches = Encoder(patch · W + position)         words = Encoder(LN(word + position))
    region  = [mean of its patches ; its patches]   (regions.py)        fused = CrossEncoder(words, region)

Three encoders: one for the picture, one for the text, and a cross-modal one in which the words look at one
another and then at the tokens of a region. Before they meet, text [CLS] and region mean can be compared by a
dot product, as in CLIP. After it, the fused [CLS] tells whether they match and, read with the whole picture,
where in it the phrase is: box = sigmoid(MLP(fused [CLS])), centre and size as fractions of the picture.

Sources: Zeng, Zhang and Li 2022 (X-VLM), sections 3.1 to 3.3.
Left out: Swin as the image encoder and BERT's published weights in the two others (all start fresh here);
dropout; pictures of several sizes in one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, normalize

from minivlp.attention import attention
from minivlp.core import require
from minivlp.infonce import InfoNCE
from minivlp.models.vilt import MlmHead, classifier, resize_positions
from minivlp.patch import PatchEmbed, patches_a_side
from minivlp.regions import region_tokens
from minivlp.transformer import Block, Encoder, normal_init


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


class CrossBlock(Block):
    """A pre-norm block whose tokens look at one another, then at tokens of another kind, before the MLP."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float = 1e-6, activation: Callable = gelu):
        super().__init__(dim, heads, hidden, eps, activation)
        self.norm_cross = nn.LayerNorm(dim, eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj_cross = nn.Linear(dim, dim)
        self.apply(normal_init)

    def forward(self, x: Tensor, others: Tensor, mask: Tensor | None, others_mask: Tensor | None) -> Tensor:
        """x (B, L, D), others (B, K, D) → (B, L, D); masks (True = may be seen) broadcast to (…, L or K)."""
        x = self.attend(x, mask)
        (B, L, D), K = x.shape, others.shape[1]
        q = (
            self.q(self.norm_cross(x)).view(B, L, self.heads, D // self.heads).transpose(1, 2)
        )  # (B, heads, L, d)
        k, v = self.kv(others).view(B, K, 2, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mixed = attention(q, k, v, others_mask).transpose(1, 2).reshape(B, L, D)
        return self.transform(x + self.proj_cross(mixed))


class CrossEncoder(nn.Module):
    """`layers` CrossBlocks and the final LayerNorm. The other tokens come normed from an Encoder."""

    def __init__(self, dim: int, heads: int, hidden: int, layers: int, eps: float = 1e-6):
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, hidden, eps) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, others: Tensor, mask: Tensor | None, others_mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, others, mask, others_mask)
        return self.norm(x)


class Xvlm(nn.Module):
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
        c, (H, W) = self.config, (require.shapes(pixels=(pixels, "B 3 H W"))[k] for k in "HW")
        z = self.patch(pixels)  # (B, N, D)
        stored = self.position.view(c.grid, c.grid, c.dim)
        return self.image(z + resize_positions(stored, H // c.patch, W // c.patch).flatten(0, 1))

    def text_words(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        """ids (R, L) integers with [CLS] first, text_mask (R, L) bool, True = a word → words (R, L, D).

        Raises ValueError on bad shapes, dtypes, ids outside the vocabulary and texts without words.
        """
        c = self.config
        L = require.shapes(ids=(ids, "R L"), text_mask=(text_mask, "R L"))["L"]
        require.integers(ids=ids)
        require.mask("text_mask", text_mask, whole_rows=True)
        if not 1 <= L <= c.max_text_len:
            require.fail("ids", f"must have 1 to {c.max_text_len} words", L)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= c.vocab_size):
            require.fail("ids", f"must lie in [0, {c.vocab_size})", f"{int(ids.min())} to {int(ids.max())}")
        z = self.text_norm(self.word(ids) + self.text_position.weight[:L])
        return self.text(z, _keys(text_mask))

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
        return self.cross(words, tokens, _keys(text_mask), _keys(token_mask))

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
        image = whole(patches)
        mask = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        fused = self.fuse(words, text_mask, image, mask)
        return {"text": fused, "image": image, "image_mask": mask, "pooled": fused[:, 0]}

    def boxes(self, pooled: Tensor) -> Tensor:
        """Where the phrase is: fused [CLS] of phrase and whole picture (R, D) → cxcywh in (0, 1), (R, 4)."""
        return self.box(pooled).sigmoid()

    def itm_logits(self, pooled: Tensor) -> Tensor:
        """Does the text match the region? Fused [CLS] (R, D) → (R, 2), column 1 = match."""
        return self.itm(pooled)

    @property
    def mlm_weight(self) -> Tensor:
        """The masked-word decoder (V, D)."""
        return self.mlm.weight

    @property
    def mlm_bias(self) -> Tensor:
        """The masked-word decoder's bias (V,)."""
        return self.mlm.bias

    def mlm_hidden(self, text: Tensor) -> Tensor:
        """The masked-word head before its decoder: fused words (…, D) → (…, D)."""
        return self.mlm.norm(gelu(self.mlm.dense(text)))

    def mlm_logits(self, text: Tensor) -> Tensor:
        """Scores over the vocabulary: fused words (…, D) → (…, V)."""
        return linear(self.mlm_hidden(text), self.mlm_weight, self.mlm_bias)


def whole(patches: Tensor) -> Tensor:
    """The region that is the whole picture: patches (B, N, D) → (B, 1+N, D), their mean first."""
    return region_tokens(patches, torch.ones(patches.shape[:2], dtype=torch.bool, device=patches.device))


def _keys(mask: Tensor) -> Tensor | None:
    """A padding mask (B, L) as `attention` wants it; None, which is faster, where nothing is padded."""
    return None if bool(mask.all()) else mask[:, None, None]
