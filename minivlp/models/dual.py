"""The dual encoder: one tower for images, one for texts, and between the two nothing but a dot product.

    x = unit(pool(Encoder(patches))),        y = unit(pool(Encoder(words))),        S = scale · x yᵀ + bias.

Either tower runs without the other: a million images are encoded once, and a query costs one text and one
product. For the same reason no word ever meets a patch before both sides are summed up in one vector each.

Two forms. CLIP's: an image [CLS] token and a norm before the blocks; a causal text tower, read at the
end-of-text token, the only one that has seen every word; projections without bias. SigLIP's: patches alone,
pooled by attention (MAP: no token has to carry the sum through the blocks); a text tower that looks both
ways, read at the last position, padding or not.

Late interaction compares tokens, not sums: `image_tokens` and `text_tokens` give each token the pooling and
the projection of its tower, as if it stood alone.

Sources: Radford et al. 2021 (CLIP), section 2.4; Zhai et al. 2023 (SigLIP), section 4; Yao et al. 2022
(FILIP), section 3.1, for tokens; Hendrycks and Gimpel 2016 for the two approximations of GELU; for the small
initial values, Trockman and Kolter 2023 (mimetic initialization).
Left out: images of other sizes than the stored grid of positions; dropping of patches; the pixel pipelines
and the vocabularies of the published models.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from minivlp.core import require
from minivlp.models.parts import MapPool, check_text, mean_of_seen
from minivlp.models.published import clip_siglip as weights
from minivlp.models.published.safetensors import filled, load_state, save_state
from minivlp.patch import PatchEmbed
from minivlp.transformer import Encoder, key_mask, normal_init

__all__ = ["Dual", "DualConfig", "load_clip", "load_siglip", "save_clip", "save_siglip", "small_init"]


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the approximation of x Φ(x) that OpenAI's CLIP was trained with."""
    return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu, "gelu_pytorch_tanh": partial(gelu, approximate="tanh"), "quick_gelu": quick_gelu,
}  # fmt: skip


@dataclass(frozen=True)
class DualConfig:
    """The sizes of a dual encoder; the defaults are a small model of CLIP's form, for a CPU."""

    vocab_size: int = 512
    max_text_len: int = 16
    patch: int = 8
    image_size: int = 64  # pixels a side, of every image
    embed: int = 128  # width of the shared space
    image_dim: int = 128
    image_layers: int = 4
    image_heads: int = 4
    image_hidden: int = 256
    text_dim: int = 128
    text_layers: int = 2
    text_heads: int = 4
    text_hidden: int = 256
    image_pool: str = "cls"  # CLIP's [CLS] token, or "map": SigLIP's attention pooling
    text_pool: str = "eot"  # CLIP's causal tower, read at its end-of-text token, or "last": SigLIP's
    eot: int | None = None  # id of the end-of-text token; None = the largest id of each text, as OpenAI's
    activation: str = "gelu"
    eps: float = 1e-5
    init_scale: float = 1 / 0.07
    init_bias: float | None = None  # of the logits, for the sigmoid loss; None = no bias to learn

    def __post_init__(self):
        for name, allowed in [
            ("image_pool", ("cls", "map")),
            ("text_pool", ("eot", "last")),
            ("activation", tuple(ACTIVATIONS)),
        ]:
            if getattr(self, name) not in allowed:
                require.fail(name, f"must be one of {', '.join(allowed)}", getattr(self, name))
        if not 1 <= self.patch <= self.image_size:
            require.fail("image_size", f"must be at least patch={self.patch}", self.image_size)
        if self.image_pool == "map" and self.embed != self.image_dim:
            require.fail("embed", f"must be image_dim={self.image_dim} with image_pool 'map'", self.embed)
        if self.eot is not None and not 0 <= self.eot < self.vocab_size:
            require.fail("eot", f"must lie in [0, {self.vocab_size})", self.eot)
        require.positive(eps=self.eps, init_scale=self.init_scale)


class ImageTower(nn.Module):
    """Pixels (B, 3, H, W) → pooled images (B, embed), not yet of unit length."""

    def __init__(
        self, embed: int, patch: int, image_size: int, dim: int, layers: int, heads: int, hidden: int,
        eps: float, activation: str, pool: str,
    ):  # fmt: skip
        super().__init__()
        cls, nonlinear = pool == "cls", ACTIVATIONS[activation]
        self.size, self.p = image_size, patch
        self.cls = nn.Parameter(torch.empty(dim).normal_(std=0.02)) if cls else None
        tokens = (image_size // patch) ** 2 + cls
        self.position = nn.Parameter(torch.empty(tokens, dim).normal_(std=0.02))  # row 0 for cls
        self.pre_norm = nn.LayerNorm(dim, eps) if cls else None
        self.encoder = Encoder(dim, heads, hidden, layers, eps, nonlinear)
        self.pool = None if cls else MapPool(dim, heads, hidden, eps, nonlinear)
        self.project = nn.Linear(dim, embed, bias=False) if cls else None
        self.apply(normal_init)
        self.patch = PatchEmbed(dim, patch, bias=not cls)

    def states(self, pixels: Tensor) -> Tensor:
        """The tokens after the final norm: (B, N, D), or (B, 1+N, D) with [CLS] first."""
        B = require.shapes(pixels=(pixels, "B 3 H W"))["B"]
        # As published: what a side has beyond its last whole patch is not seen, 6 of 384 pixels in 14s.
        if any(side // self.p != self.size // self.p for side in pixels.shape[2:]):
            require.fail("pixels", f"must be {self.size} × {self.size}", tuple(pixels.shape))
        require.floats(pixels=pixels)
        whole = self.size // self.p * self.p
        z = self.patch(pixels[..., :whole, :whole])  # (B, N, D)
        if self.cls is None:
            return self.encoder(z + self.position)
        z = torch.cat([self.cls.expand(B, 1, -1), z], 1) + self.position  # (B, 1+N, D)
        return self.encoder(self.pre_norm(z))

    def forward(self, pixels: Tensor) -> Tensor:
        z = self.states(pixels)
        return self.project(z[:, 0]) if self.pool is None else self.pool(z)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Every patch as if it stood alone, (B, N, embed): projected, or pooled with no other to look at."""
        z = self.states(pixels)
        return self.project(z[:, 1:]) if self.pool is None else self.pool(z.flatten(0, 1)[:, None]).view_as(z)


class TextTower(nn.Module):
    """Ids (B, L) → pooled texts (B, embed), not yet of unit length."""

    def __init__(
        self, embed: int, vocab_size: int, max_text_len: int, eot: int | None, dim: int, layers: int,
        heads: int, hidden: int, eps: float, activation: str, pool: str,
    ):  # fmt: skip
        super().__init__()
        self.causal, self.eot = pool == "eot", eot
        self.word = nn.Embedding(vocab_size, dim)
        self.position = nn.Parameter(torch.empty(max_text_len, dim).normal_(std=0.02))
        self.encoder = Encoder(dim, heads, hidden, layers, eps, ACTIVATIONS[activation])
        self.project = nn.Linear(dim, embed, bias=not self.causal)
        self.apply(normal_init)

    def states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens after the final norm, (B, L, D)."""
        L = check_text(ids, mask, len(self.word.weight), len(self.position))
        keys = None if mask is None else key_mask(mask)
        return self.encoder(self.word(ids) + self.position[:L], keys, self.causal)

    def _end(self, ids: Tensor) -> Tensor:
        """The position of each text's end-of-text token, (B,): the first, where padding repeats its id."""
        if self.eot is None:
            return ids.argmax(1)
        found = ids == self.eot
        if not bool(found.any(1).all()):  # argmax would say 0: every such text the same vector
            require.fail("ids", f"must hold the end-of-text id {self.eot} in every row", "a row without")
        return found.int().argmax(1)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        z = self.states(ids, mask)
        if not self.causal:
            return self.project(z[:, -1])
        return self.project(z[torch.arange(len(z), device=z.device), self._end(ids)])


class Dual(nn.Module):
    """Two towers and their scale and bias. Initial values use torch's default generator."""

    def __init__(self, config: DualConfig):
        super().__init__()
        self.config = config
        both = {"embed": config.embed, "eps": config.eps, "activation": config.activation}
        tower = ("dim", "layers", "heads", "hidden", "pool")
        image, text = ({k: getattr(config, f"{t}_{k}") for k in tower} for t in ("image", "text"))
        self.image = ImageTower(patch=config.patch, image_size=config.image_size, **both, **image)
        words = {"vocab_size": config.vocab_size, "max_text_len": config.max_text_len, "eot": config.eot}
        self.text = TextTower(**words, **both, **text)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.init_scale)))
        bias = config.init_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    @property
    def scale(self) -> Tensor:
        """1/τ, a differentiable scalar; training keeps it at most 100 with `clamp_scale`."""
        return self.log_scale.exp()

    @property
    def bias(self) -> Tensor:
        """What is added to every score, a scalar; 0 for CLIP."""
        return self.log_scale.new_zeros(()) if self.logit_bias is None else self.logit_bias

    @torch.no_grad()
    def clamp_scale(self, largest: float = 100.0) -> None:
        """Pull the scale back to at most `largest`, as CLIP does after each step."""
        self.log_scale.clamp_(max=math.log(largest))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W), normalised, H = W = image_size → unit rows (B, embed).

        Pixels beyond the last whole patch are not seen, and there may be fewer than a patch more. Raises
        ValueError on other shapes, dtypes and NaN.
        """
        return normalize(self.image(pixels), dim=-1)

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (B, L) integers, mask (B, L) bool with True = a word (None = all) → unit rows (B, embed).

        CLIP's form reads the end-of-text token, SigLIP's position L − 1 whatever stands there: pad all texts
        to one length. Published SigLIP models were trained without a mask, on texts padded to 64. Raises
        ValueError on bad shapes, dtypes, ids outside the vocabulary and a text without end or without words.
        """
        return normalize(self.text(ids, mask), dim=-1)

    def image_tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Unit patches (B, N, embed), row-major, and their mask (B, N), all True; errors of encode_image."""
        tokens = normalize(self.image.tokens(pixels), dim=-1)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def text_tokens(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Unit words (B, L, embed) and their mask (B, L); arguments and errors as in `encode_text`."""
        tokens = normalize(self.text.project(self.text.states(ids, mask)), dim=-1)
        return tokens, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask

    def logits(self, x: Tensor, y: Tensor) -> Tensor:
        """Scores S = scale · x yᵀ + bias of unit rows x (A, embed) and y (B, embed) → (A, B)."""
        return self.scale * x @ y.T + self.bias


@torch.no_grad()
def small_init(model: Dual) -> Dual:
    """Give `model` values with which a small dual encoder learns at once, in place; return it.

    CLIP reads an image at its [CLS] token and a text at its end, two tokens that begin as constants. With
    BERT's values (normal, 0.02) attention adds next to nothing to them, so at first all images have nearly
    the same vector, all texts too, and much of a short run is over before that changes. Here each block
    begins with W_out = W_vᵀ and W_v orthogonal, from torch's default generator: what attention gives a token
    is a mean of the normalised tokens that it sees. Queries and keys begin near zero, so that every token
    first sees all others alike. Embeddings stay small: with them at unit variance, as ViLT starts here,
    AdamW's steps change them too slowly (tried: worse than 0.02).
    """
    for tower in (model.image, model.text):
        for block in tower.encoder.blocks:
            mean_of_seen(block.qkv.weight.chunk(3)[2], block.proj.weight)
    return model


def load_clip(
    source: Mapping[str, Tensor] | str | os.PathLike,
    heads: int | tuple[int, int] | None = None,
    activation: str | None = None,
    eot: int | None = None,
) -> Dual:
    """A Dual with the weights of Hugging Face's CLIPModel, on CPU in float32.

    source: a state dict, a folder, or a `.safetensors` or `.bin` file; a config.json beside it is read. heads
    for both towers, or one number each for (image, text): config.json's, or D / 64, in the image tower at
    most 16. activation: config.json's, or "quick_gelu"; models of open_clip have "gelu". eot: the id of the
    end-of-text token; config.json's, or the largest id of each text, which config.json says with
    eos_token_id 2. Raises ValueError on missing or unexpected tensors.
    """
    return _load(weights.CLIP, source, heads, activation, eot)


def load_siglip(
    source: Mapping[str, Tensor] | str | os.PathLike, heads: int | tuple[int, int] | None = None
) -> Dual:
    """A Dual with the weights of Hugging Face's SiglipModel, on CPU in float32.

    source and heads as in `load_clip`, but D / 64 is at most 16 in both towers. Raises ValueError on missing
    or unexpected tensors.
    """
    return _load(weights.SIGLIP, source, heads, None, None)


def _load(form: weights.Form, source, heads, activation, eot) -> Dual:
    state, beside = load_state(source)
    tensors, spelling = weights.from_published(form, state)
    config = DualConfig(**weights.config_fields(form, tensors, spelling, beside, heads, activation, eot))
    return filled(lambda: Dual(config), tensors, spelling)


def save_clip(model: Dual, folder: str | os.PathLike) -> None:
    """Write `model.safetensors` and `config.json` as Hugging Face's CLIPModel, each whole or not at all.

    Raises ValueError for a model that is not of CLIP's form.
    """
    _save(weights.CLIP, model, folder)


def save_siglip(model: Dual, folder: str | os.PathLike) -> None:
    """The same as Hugging Face's SiglipModel, for a model of SigLIP's form."""
    _save(weights.SIGLIP, model, folder)


def _save(form: weights.Form, model: Dual, folder: str | os.PathLike) -> None:
    settings = weights.hugging_face_config(form, model.config)
    save_state(folder, weights.to_hugging_face(form, model.state_dict()), settings)
