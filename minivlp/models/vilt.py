"""ViLT: words and image patches in one sequence, one transformer, no convolution and no region detector.

    z⁰ = [LN(word + position + segment) + type 0 ; patch · W + position + type 1],   z^D = Encoder(z⁰),
    pooled = tanh(W_p z^D_[CLS] + b_p).

The text [CLS] is pooled; the image has a [CLS] of its own that no head reads. Text embeddings pass a
LayerNorm of their own, patches do not. Images of a batch may differ in size: they are padded at the right and
the bottom, and each takes the stored grid of positions resized to its own grid of patches.

Sources: Kim, Son and Kim 2021 (ViLT), eq. 1 to 6 and sections 3.1, 4.1, 5.1 to 5.3 for the heads;
Trockman and Kolter 2023 (mimetic initialization) for the small initial values.
Left out: dropout (see transformer.py); sampling a subset of the patches (200 in pretraining: the small images
here need no cap, and the published fine-tuned models use all), which also shuffles them: here patches stay in
row-major order; the masked-patch head, an ablation that did not help; copying ITM's row 1 into a new rank
head and image type 1 into type 2.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from minivlp.core import require
from minivlp.masks import visible
from minivlp.models.parts import (
    MaskedWords,
    MlmHead,
    alike,
    check_text,
    classifier,
    resize_positions,
    sine_cosine_positions,
)
from minivlp.models.published import vilt as vilt_weights
from minivlp.models.published.pixels import vilt_pixels
from minivlp.models.published.safetensors import filled, load_state, save_state
from minivlp.patch import PatchEmbed, check_pixels, patches_a_side
from minivlp.transformer import Encoder, key_mask, normal_init

__all__ = ["Vilt", "ViltConfig", "load_vilt", "resize_positions", "save_vilt", "small_init", "vilt_pixels"]


WRITING = ((1, 1), (0, 1))  # words see words, causally, and patches; patches see patches


@dataclass(frozen=True)
class ViltConfig:
    """The sizes of a ViLT and the heads it has; the defaults are ViLT-B/32 with its two pretraining heads."""

    vocab_size: int = 30522
    max_text_len: int = 40
    dim: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    patch: int = 32
    image_size: int = 384  # pixels; positions are stored on a grid of image_size / patch squared
    image_types: int = 1  # pictures per text: 2 for NLVR2
    segments: int = 2  # rows of BERT's segment table, of which ViLT reads row 0
    eps: float = 1e-6  # LayerNorms of the blocks and the final one
    text_eps: float = 1e-12  # LayerNorms of the text embedding and the masked-word head
    mlm: bool = True
    mlm_tied: bool = False  # does the masked-word decoder share the word embedding? the original does not
    itm: bool = True
    num_answers: int = 0  # > 0: a VQA head of that many answers
    nlvr2: bool = False
    rank: bool = False

    def __post_init__(self):
        patches_a_side(self.image_size, self.patch)
        if self.nlvr2 and self.image_types < 2:
            require.fail("image_types", "must be at least 2 for the nlvr2 head", self.image_types)

    @property
    def grid(self) -> int:
        """Rows (and columns) of the stored position grid."""
        return patches_a_side(self.image_size, self.patch)


class Vilt(MaskedWords, nn.Module):
    """ViLT: `encode` gives the states, each head its logits. Initial values use torch's default generator."""

    def __init__(self, config: ViltConfig):
        super().__init__()
        self.config = c = config
        self.word = nn.Embedding(c.vocab_size, c.dim)
        self.text_position = nn.Embedding(c.max_text_len, c.dim)
        self.segment = nn.Embedding(c.segments, c.dim)
        self.text_norm = nn.LayerNorm(c.dim, c.text_eps)
        self.modality = nn.Embedding(1 + c.image_types, c.dim)  # row 0 text, 1 image, 2 a second image
        self.cls = nn.Parameter(torch.empty(c.dim).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(1 + c.grid**2, c.dim).normal_(std=0.02))  # row 0 for cls
        self.encoder = Encoder(c.dim, c.heads, c.hidden, c.layers, c.eps)
        self.pooler = nn.Linear(c.dim, c.dim)
        self.mlm = MlmHead(c.vocab_size, c.dim, c.text_eps, c.mlm_tied) if c.mlm else None
        self.itm = nn.Linear(c.dim, 2) if c.itm else None
        self.vqa = classifier(c.dim, 2 * c.dim, c.num_answers) if c.num_answers else None
        self.nlvr2 = classifier(2 * c.dim, 2 * c.dim, 2) if c.nlvr2 else None
        self.rank = nn.Linear(c.dim, 1) if c.rank else None
        self.apply(normal_init)
        self.patch = PatchEmbed(c.dim, c.patch)

    def encode(
        self,
        ids: Tensor,
        text_mask: Tensor,
        pixels: Tensor,
        pixel_mask: Tensor | None = None,
        image_type: int = 1,
        first: int | None = None,
        writing: bool = False,
    ) -> dict[str, Tensor]:
        """Words and pixels in, states out.

        ids (B, L) integers with [CLS] first; text_mask (B, L) bool, True = a word; pixels (B, 3, H, W)
        normalised, H and W multiples of the patch; pixel_mask (B, H, W) bool, True over the real pixels, a
        rectangle from the upper left corner (None = all real); image_type 1, or 2 for NLVR2's second picture.
        first (1 to L) asks for the states of the first words alone, 1 where only "pooled" is read and L where
        no patch is: the last block skips all other tokens, "text" is (B, first, D), and "image" is left out.
        writing makes a captioner of the same weights: no word sees a later one, and no patch a word.

        Returns "text" (B, L, D), "image" (B, N+1, D) with the image [CLS] first and the patches row-major
        over the padded grid, "image_mask" (B, N+1) and "pooled" (B, D). A patch counts as real when its upper
        left pixel is. Raises ValueError on bad shapes, dtypes, NaN, ids outside the vocabulary and masks that
        are not as said.
        """
        text = self.embed_text(ids, text_mask)  # (B, L, D)
        image, image_mask = self.embed_image(pixels, pixel_mask, image_type)  # (B, N+1, D), (B, N+1)
        if len(text) != len(image):
            require.fail("pixels", f"must hold one image per text, B={len(text)}", tuple(pixels.shape))
        L = text.shape[1]
        if first is not None and not 1 <= first <= L:
            require.fail("first", f"must lie in [1, {L}]", first)
        mask = key_mask(torch.cat([text_mask, image_mask], 1))  # (B, 1, 1, L+N+1), or None
        if writing:
            table = torch.from_numpy(visible((L, image.shape[1]), WRITING, causal=(0,))).to(ids.device)
            mask = table if mask is None else table & mask
        z = self.encoder(torch.cat([text, image], 1), mask, first=first)  # (B, L+N+1, D)
        states = {"text": z[:, :L], "image": z[:, L:]} if first is None else {"text": z}
        return states | {"image_mask": image_mask, "pooled": self.pooler(z[:, 0]).tanh()}

    def embed_text(self, ids: Tensor, text_mask: Tensor) -> Tensor:
        """Rows of words before the first block, (B, L, D); arguments and errors as of `encode`."""
        c = self.config
        L = check_text(ids, text_mask, c.vocab_size, c.max_text_len, "text_mask")
        words = self.word(ids) + (self.text_position.weight[:L] + self.segment.weight[0])  # (B, L, D)
        return self.text_norm(words) + self.modality.weight[0]

    def embed_image(
        self, pixels: Tensor, pixel_mask: Tensor | None = None, image_type: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Rows of the image [CLS] and of patches before the first block, (B, N+1, D), and their mask."""
        c = self.config
        B, H, W = check_pixels(pixels, c.patch)
        if not 1 <= image_type <= c.image_types:
            require.fail("image_type", f"must lie in [1, {c.image_types}]", image_type)
        patches = self.patch(pixels)  # (B, N, D)
        grid, stored = (H // c.patch, W // c.patch), self.position[1:].view(c.grid, c.grid, c.dim)
        valid = None if pixel_mask is None else self._valid_patches(pixel_mask, (B, H, W))
        if valid is None or bool(valid.all()):
            positions = resize_positions(stored, *grid).flatten(0, 1)  # (N, D), the same for all
            image_mask = torch.ones(B, 1 + patches.shape[1], dtype=torch.bool, device=pixels.device)
        else:
            sizes = list(zip(valid[:, :, 0].sum(1).tolist(), valid[:, 0].sum(1).tolist(), strict=True))
            table = {size: self._padded_positions(stored, size, grid) for size in sizes}
            positions = torch.stack([table[size] for size in sizes])  # (B, N, D)
            image_mask = pad(valid.flatten(1), (1, 0), value=True)  # (B, N+1): the image [CLS] is real
        cls = (self.cls + self.position[0]).expand(B, 1, -1)
        return torch.cat([cls, patches + positions], 1) + self.modality.weight[image_type], image_mask

    def _valid_patches(self, pixel_mask: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """Which patches are real, (B, H/p, W/p) bool: they must fill a rectangle from the upper left."""
        require.mask("pixel_mask", pixel_mask)
        if tuple(pixel_mask.shape) != shape:
            require.fail("pixel_mask", f"must have shape (B, H, W) = {shape}", tuple(pixel_mask.shape))
        valid = pixel_mask[:, :: self.config.patch, :: self.config.patch]
        rows, columns = valid[:, :, 0], valid[:, 0]
        # The left and the upper edge, each cut at its first False, span the rectangle that the mask must be.
        rectangle = rows.cummin(1).values[:, :, None] & columns.cummin(1).values[:, None, :]
        if not bool(valid[:, 0, 0].all()) or not torch.equal(rectangle, valid):
            require.fail("pixel_mask", "must be a rectangle from the upper left corner", "another shape")
        return valid

    def _padded_positions(self, stored: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Positions of a size = (h, w) image in the corner of a larger grid (N, D), 0 under the padding."""
        below, right = grid[0] - size[0], grid[1] - size[1]
        return pad(resize_positions(stored, *size), (0, 0, 0, right, 0, below)).flatten(0, 1)

    def itm_logits(self, pooled: Tensor) -> Tensor:
        """Does the text match the image? pooled (B, D) → (B, 2), column 1 = match."""
        return self._head("itm")(pooled)

    def vqa_logits(self, pooled: Tensor) -> Tensor:
        """pooled (B, D) → (B, answers); each answer is a yes or no of its own."""
        return self._head("vqa")(pooled)

    def nlvr2_logits(self, pooled_a: Tensor, pooled_b: Tensor) -> Tensor:
        """The statement read with each of two images, pooled (B, D) both → (B, 2), column 1 = true."""
        return self._head("nlvr2")(torch.cat([pooled_a, pooled_b], -1))

    def rank_logits(self, pooled: Tensor) -> Tensor:
        """Retrieval score: pooled (B, D) → (B, 1)."""
        return self._head("rank")(pooled)


@torch.no_grad()
def small_init(model: Vilt) -> Vilt:
    """Give `model` values with which a small ViLT learns from little data, in place; return it.

    With BERT's values (normal, 0.02) the content of a patch, its position and the attention logits all start
    near zero, and a small model spends most of a short run growing them. Here they start at the size they
    will need; the numbers come from torch's default generator:

        patches      a patch of unit-variance pixels becomes a vector of unit variance
        positions    sines and cosines of row and column, of unit variance too: content does not drown place
        attention    W_k = W_q = orthogonal: a token first looks at tokens like itself, hence a word, once
                     its vector resembles its patches', at its patches; W_v orthogonal, outputs near zero
    """
    c = model.config
    nn.init.normal_(model.patch.weight, std=1 / math.sqrt(3 * c.patch**2 / 4))  # pixels have deviation ½
    model.position[1:] = sine_cosine_positions(c.grid, c.dim)
    for table in (model.word, model.text_position, model.segment):
        nn.init.normal_(table.weight, std=0.5)  # a LayerNorm follows: only the ratios count
    nn.init.normal_(model.modality.weight, std=0.2)
    for block in model.encoder.blocks:
        query, key, value = block.qkv.weight.chunk(3)
        alike(query, key)
        nn.init.orthogonal_(value)
        nn.init.orthogonal_(block.fc1.weight)
    return model


def load_vilt(
    source: Mapping[str, Tensor] | str | os.PathLike,
    heads: int | None = None,
    eps: float | None = None,
    image_size: int | None = None,
) -> Vilt:
    """A Vilt with published weights, on CPU in float32.

    source: a state dict, a folder, or a `.safetensors`, `.bin` or `.ckpt` file, with Hugging Face's or the
    original names; a config.json beside it is read. heads: D / 64 unless config.json or this says otherwise.
    eps: config.json's, or 1e-12 for Hugging Face names, 1e-6 (blocks) and 1e-12 (text, masked-word head) for
    original ones; a number given here is for all of them. image_size (pixels) resizes the stored grid of
    positions. Raises ValueError on missing or unexpected tensors.
    """
    state, beside = load_state(source)
    published = vilt_weights.from_published(state)
    tensors, fields = published.tensors, vilt_weights.config_fields(published, beside, heads, eps)
    stored = fields["image_size"] // fields["patch"]
    config = ViltConfig(**fields | ({} if image_size is None else {"image_size": image_size}))
    if config.grid != stored:
        cls, square = tensors["position"].float().split([1, stored**2])
        square = resize_positions(square.view(stored, stored, -1), config.grid, config.grid)
        tensors["position"] = torch.cat([cls, square.flatten(0, 1)])
    if config.mlm_tied:
        tensors.pop("mlm.weight", None)
    return filled(lambda: Vilt(config), tensors, published.spelling)


def save_vilt(model: Vilt, folder: str | os.PathLike) -> None:
    """Write `model.safetensors` and `config.json` with Hugging Face's names, each whole or not at all.

    Heads that Hugging Face does not have, or not together in one model, keep the original code's names.
    """
    config = vilt_weights.hugging_face_config(model.config)
    save_state(folder, vilt_weights.to_hugging_face(model.state_dict()), config)
