"""FLAVA: one model of pictures, of texts and of both, taught by hiding patches and words.

    z_v = Blocks([cls ; patch · W] + position)        a hidden patch is the mask token in place of patch · W
    z_t = Blocks(LN(word + position + segment))       a hidden word is [MASK]
    z_m = LN(Blocks([cls_m ; A z_v ; B z_t]))         the fusion encoder, in which all see all

Each encoder has its own kind of data, and six terms teach the three; all have weight 1.

    mim         LN z_v at a hidden patch → the code of the patch            pictures without a text
    mlm         LN z_t at a hidden word → the word                          texts without a picture
    mmm_image   z_m at a hidden patch → its code                            pairs, both sides hidden in part
    mmm_text    z_m at a hidden word → the word                             the same
    itm         z_m at cls_m → do they match?                               the same
    contrast    LN z_v and LN z_t at their [CLS], projected → the partner   pairs, whole

The code of a patch is the number of the nearest of K patches, so words and patches are predicted by one loss,
`mlm_loss`. A pair that does not match serves no masked term: its words say nothing of its picture. In the
contrast it is no question either, but it stays among the answers; its rows are left out and its columns are
not. With labels t_i = i for true pairs and −100 for the others this too is `mlm_loss`, once with the texts
for a vocabulary and once with the pictures, and where all pairs are true it is InfoNCE.

Sources: Singh et al. 2022 (FLAVA), sections 3.1 to 3.3.
Left out: the discrete VAE whose codes FLAVA predicts (here the K patches are a buffer, or codes are given);
pictures of other sizes than the stored grid of positions; the poolers that no loss reads. Two habits of
published code are not followed: it writes −100 into the caller's array of codes, and a batch in which nothing
is hidden costs NaN; here the array stays as it was and the term is 0.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from minivlp.core import require
from minivlp.infonce import InfoNCE
from minivlp.itm import itm_loss
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.parts import MlmHead, check_text
from minivlp.models.published import flava as weights
from minivlp.models.published.safetensors import filled, load_state
from minivlp.patch import PatchEmbed, check_pixels, patches_a_side, to_patches
from minivlp.transformer import Encoder, key_mask, normal_init
from minivlp.vq import nearest

__all__ = ["Flava", "FlavaConfig", "load_flava"]


@dataclass(frozen=True)
class FlavaConfig:
    """The sizes of a FLAVA; its three encoders have one width. The defaults are the published model's."""

    vocab_size: int = 30522
    max_text_len: int = 512
    segments: int = 2  # rows of BERT's segment table, of which FLAVA reads row 0
    dim: int = 768
    image_layers: int = 12
    text_layers: int = 12
    fusion_layers: int = 6
    heads: int = 12
    hidden: int = 3072
    embed: int = 768  # width of the space in which pictures and texts are compared
    patch: int = 16
    image_size: int = 224  # pixels a side, of every picture
    codes: int = 8192  # K
    codebook: bool = False  # does the model hold the K patches?
    eps: float = 1e-12

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)

    @property
    def patches(self) -> int:
        """N, the patches of a picture."""
        return patches_a_side(self.image_size, self.patch) ** 2


class Flava(nn.Module):
    """FLAVA: three encoders, their heads and six terms. Initial values use torch's default generator."""

    def __init__(self, config: FlavaConfig):
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.text_position = nn.Embedding(c.max_text_len, c.dim)
        self.segment = nn.Embedding(c.segments, c.dim)
        self.text_norm = nn.LayerNorm(c.dim, c.eps)
        self.cls, self.mask, self.fusion_cls = (
            nn.Parameter(torch.empty(c.dim).normal_(std=0.02)) for _ in range(3)
        )
        self.position = nn.Parameter(torch.empty(1 + c.patches, c.dim).normal_(std=0.02))  # row 0 for cls
        self.image = Encoder(c.dim, c.heads, c.hidden, c.image_layers, c.eps)
        self.text = Encoder(c.dim, c.heads, c.hidden, c.text_layers, c.eps)
        self.fusion = Encoder(c.dim, c.heads, c.hidden, c.fusion_layers, c.eps)
        self.image_to_fusion, self.text_to_fusion = (nn.Linear(c.dim, c.dim) for _ in range(2))
        self.image_project, self.text_project = (nn.Linear(c.dim, c.embed) for _ in range(2))
        self.mim, self.mmm_image = (MlmHead(c.codes, c.dim, c.eps, tied=False) for _ in range(2))
        self.mlm, self.mmm_text = (MlmHead(c.vocab_size, c.dim, c.eps, tied=False) for _ in range(2))
        self.pooler, self.itm = nn.Linear(c.dim, c.dim), nn.Linear(c.dim, 2)
        self.apply(normal_init)
        self.contrast = InfoNCE()
        self.patch = PatchEmbed(c.dim, c.patch)
        self.register_buffer("codebook", torch.zeros(c.codes, 3 * c.patch**2) if c.codebook else None)

    # Who sees whom

    def image_states(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """z_v (B, 1+N, D), [CLS] first, before the norm of the heads.

        pixels (B, 3, H, W) normalised, H = W = image_size; hidden (B, N) bool, True = the patch is not seen.
        Raises ValueError on other shapes, dtypes and NaN.
        """
        c = self.config
        B, *size = check_pixels(pixels, c.patch)
        if size != [c.image_size] * 2:
            require.fail("pixels", f"must be {c.image_size} × {c.image_size}", tuple(pixels.shape))
        z = self.patch(pixels)  # (B, N, D)
        if hidden is not None:
            self._check_hidden(hidden, B)
            z = torch.where(hidden[..., None], self.mask, z)  # a product with 0 would let a NaN through
        z = torch.cat([self.cls.expand(B, 1, -1), z], 1) + self.position
        return _before_norm(self.image, z)

    def text_states(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        """z_t (B, L, D), before the norm of the heads.

        ids (B, L) integers with [CLS] first, text_mask (B, L) bool, True = a word. Raises ValueError on bad
        shapes, dtypes, ids outside the vocabulary and texts without words.
        """
        c = self.config
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        z = self.word(ids) + (self.text_position.weight[:L] + self.segment.weight[0])
        return _before_norm(self.text, self.text_norm(z), key_mask(text_mask))

    def fuse(self, image: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """z_m (B, 2+N+L, D) of z_v (B, 1+N, D) and z_t (B, L, D): cls_m, [CLS] and patches, then the words.

        Raises ValueError when they do not fit.
        """
        sizes = require.shapes(image=(image, "B M D"), text=(text, "B L D"), text_mask=(text_mask, "B L"))
        require.mask("text_mask", text_mask, whole_rows=True)
        first = self.fusion_cls.expand(sizes["B"], 1, -1)
        mask = torch.cat([text_mask.new_ones(sizes["B"], 1 + sizes["M"]), text_mask], 1)
        z = torch.cat([first, self.image_to_fusion(image), self.text_to_fusion(text)], 1)
        return self.fusion(z, key_mask(mask))

    # What is predicted

    def codes(self, pixels: Tensor) -> Tensor:
        """The code of every patch, (B, N) int64 in [0, K). Raises ValueError for a model without codebook."""
        if self.codebook is None:
            require.fail("model", "must have a codebook", "a configuration without it")
        patches = to_patches(pixels, self.config.patch)  # (B, N, 3pp)
        return nearest(patches.flatten(0, 1), self.codebook).view(patches.shape[:2])

    def image_vector(self, image: Tensor) -> Tensor:
        """z_v (B, 1+N, D) → unit rows (B, embed), read at [CLS]."""
        return normalize(self.image_project(self.image.norm(image[:, 0])), dim=-1)

    def text_vector(self, text: Tensor) -> Tensor:
        """z_t (B, L, D) → unit rows (B, embed), read at [CLS]."""
        return normalize(self.text_project(self.text.norm(text[:, 0])), dim=-1)

    @property
    def scale(self) -> Tensor:
        """1/τ of the dot products, a differentiable scalar, at most 100."""
        self.contrast.clamp_scale()
        return self.contrast.scale

    def itm_logits(self, fused: Tensor) -> Tensor:
        """Does the text match the picture? z_m (B, 2+N+L, D) → (B, 2), column 1 = match."""
        return self.itm(self.pooler(fused[:, 0]).tanh())

    def filled(self, pixels: Tensor, hidden: Tensor, ids: Tensor, text_mask: Tensor) -> Tensor:
        """Scores of the codes of all patches, (B, N, K), hidden ones (B, N) not seen, the texts read."""
        fused = self.fuse(self.image_states(pixels, hidden), self.text_states(ids, text_mask), text_mask)
        return self.mmm_image.logits(fused[:, 2 : 2 + self.config.patches], self.mmm_image.weight)

    def mim_loss(self, pixels: Tensor, hidden: Tensor, codes: Tensor) -> Tensor:
        """Pictures alone: cross-entropy of the codes (B, N) of the hidden patches (B, N), in nats."""
        states = self.image.norm(self.image_states(pixels, hidden)[:, 1:])
        return _masked(self.mim, states, torch.where(hidden, codes, IGNORE))

    def mlm_loss(self, masked: Tensor, text_mask: Tensor, labels: Tensor) -> Tensor:
        """Texts alone: cross-entropy of the hidden words, labels (B, L) with −100 where nothing is asked."""
        return _masked(self.mlm, self.text.norm(self.text_states(masked, text_mask)), labels)

    def pair_losses(
        self,
        ids: Tensor,
        masked: Tensor,
        text_mask: Tensor,
        labels: Tensor,
        pixels: Tensor,
        hidden: Tensor,
        codes: Tensor,
        match: Tensor,
        masked_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The four terms of pairs, in nats.

        ids (B, L) the words and masked (B, L') the same with some hidden, labels (B, L') those, −100
        elsewhere; text_mask (B, L) and masked_mask (B, L', None = text_mask) bool, True = a word; pixels
        (B, 3, H, W); hidden (B, N) bool and codes (B, N) of all patches; match (B,) 1 = a true pair, 0 = a
        wrong one, −100 = a true pair that matching does not ask about. Each term is the mean over what it
        asks, and 0 where it asks nothing. Raises ValueError as the states do.
        """
        text_states = self.text_states(ids, text_mask)
        x, y = self.image_vector(self.image_states(pixels)), self.text_vector(text_states)
        masked_mask = text_mask if masked_mask is None else masked_mask
        text = self.text_states(masked, masked_mask)
        fused = self.fuse(self.image_states(pixels, hidden), text, masked_mask)
        N, true, asked = self.config.patches, match != 0, match != IGNORE
        patches, words = fused[:, 2 : 2 + N], fused[:, 2 + N :]
        matched = itm_loss(self.itm_logits(fused)[asked], match[asked]) if asked.any() else fused.sum() * 0
        return {
            "contrast": contrast_of_true(x, y, self.scale, true),
            "mmm_text": _masked(self.mmm_text, words, torch.where(true[:, None], labels, IGNORE)),
            "mmm_image": _masked(self.mmm_image, patches, torch.where(true[:, None] & hidden, codes, IGNORE)),
            "itm": matched,
        }

    def _check_hidden(self, hidden: Tensor, B: int) -> None:
        require.mask("hidden", hidden)
        shape = (B, self.config.patches)
        if hidden.shape != shape:
            require.fail("hidden", f"must have shape (B, N) = {shape}", tuple(hidden.shape))


def _before_norm(encoder: Encoder, z: Tensor, mask: Tensor | None = None) -> Tensor:
    """The blocks without the final norm: FLAVA's fusion encoder reads the stream as it is."""
    for block in encoder.blocks:
        z = block(z, mask)
    return z


def _masked(head: MlmHead, states: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of a head at the states (B, M, D) whose label (B, M) is not −100; 0 without any."""
    asked = labels != IGNORE
    return mlm_loss(head(states[asked]), head.weight, head.bias, labels[asked])


def contrast_of_true(x: Tensor, y: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """InfoNCE of pairs of which some are wrong: unit rows x, y (B, E), scale = 1/τ, true (B,) bool → scalar.

    A wrong pair asks for no partner, but both its sides are offered to the others. 0 without a true pair.
    """
    partner = torch.where(true, torch.arange(len(true), device=true.device), IGNORE)
    none = x.new_zeros(len(x))
    return (mlm_loss(scale * x, y, none, partner) + mlm_loss(scale * y, x, none, partner)) / 2


def load_flava(
    source: Mapping[str, Tensor] | str | os.PathLike, heads: int | None = None, eps: float | None = None
) -> Flava:
    """A Flava with the weights of Hugging Face's FlavaForPreTraining, on CPU in float32.

    source: a state dict, a folder, or a `.safetensors` or `.bin` file; a config.json beside it is read. heads
    and eps: config.json's, or D / 64 and 1e-12. The picture codebook of the file is passed over: `codes` are
    then the caller's. Raises ValueError on missing or unexpected tensors.
    """
    state, beside = load_state(source)
    tensors, spelling = weights.from_published(state)
    config = FlavaConfig(**weights.config_fields(tensors, spelling, beside, heads, eps))
    return filled(lambda: Flava(config), tensors, spelling)
