"""What others offer for the same losses, each called with the arguments of our rungs.

A peer is a function that returns the loss, or raises Absent with the reason, so that a table can name what it
could not measure. Two are written here from their descriptions, plainly, because no package offers them:

    published_alignment   word-patch alignment as ViLT and UNITER publish it
    naive_chamfer         the maximum both ways, left to autograd

Sources: Chen et al. 2020 (UNITER) and Kim, Son and Kim 2021 (ViLT) with their released procedure.
Left out: losses that need a GPU (Inf-CL, Liger, cut cross-entropy, flash-sinkhorn).
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.itm import itm_loss
from minivlp.mlm import IGNORE, mlm_loss
from minivlp.models.published.vilt import hugging_face_config, to_hugging_face

Loss = Callable[..., Tensor]
BLUR = 0.1  # of geomloss, whose ε is its square: 0.01, at which the other transports end too


class Absent(Exception):
    """A peer is not installed, or its version lacks what is asked for; the message is the reason."""


def _module(name: str, package: str) -> ModuleType:
    """Import a peer, or raise Absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{package} is not installed") from error


def open_clip_loss() -> ModuleType:
    """open_clip/loss.py, by its path: the file needs torch alone, the package torchvision and timm too."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        raise Absent("open_clip_torch is not installed")
    path = Path(found.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def open_clip_infonce() -> Loss:
    """ClipLoss(x, y, scale)."""
    return open_clip_loss().ClipLoss()


def open_clip_sigmoid() -> Loss:
    """SigLipLoss(x, y, scale, bias)."""
    return open_clip_loss().SigLipLoss()


def open_clip_sigmoid_chunks() -> Loss:
    """SigLipLoss by chunks of 1024 rows, which versions after 3.3 offer."""
    loss = open_clip_loss().SigLipLoss
    if "chunk_size" not in inspect.signature(loss).parameters:
        raise Absent(f"SigLipLoss of open_clip_torch {version('open_clip_torch')} has no chunk_size")
    return loss(chunk_size=1024)


def linear_then_cross_entropy() -> Loss:
    """F.linear, then F.cross_entropy: the logits in full."""
    return lambda hidden, embedding, bias, targets: F.cross_entropy(
        F.linear(hidden, embedding, bias), targets
    )


def linear_cross_entropy() -> Loss:
    """torch's own chunked loss, with its default options."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, embedding, bias, targets: F.linear_cross_entropy(
        hidden, embedding, targets, linear_bias=bias, options=options
    )


def scaled_dot_product_attention() -> Loss:
    """torch's own attention."""
    return F.scaled_dot_product_attention


def strided_convolution() -> Loss:
    """The patch embedding as published code writes it: a convolution whose stride is its size."""
    return lambda images, weight, bias: (
        F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    )


def naive_chamfer() -> Loss:
    """The maximum along rows and along columns of the whole matrix, differentiated by autograd."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        S = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT  # (M, N)
        return (S.max(1).values.mean() + S.max(0).values.mean()) / 2

    return loss


def published_alignment() -> Loss:
    """Word-patch alignment by the published procedure; arguments and value of `ipot.wpa`."""
    return _published_alignment


def _published_alignment(words, patches, word_mask, patch_mask, beta=0.5, iters=50) -> Tensor:
    unit_words, unit_patches = (F.normalize(t, dim=-1, eps=1e-5) for t in (words, patches))
    padded = ~(word_mask[:, :, None] & patch_mask[:, None])  # (B, L, N)
    cost = (1 - unit_words @ unit_patches.mT).masked_fill(padded, 0)
    plan = _published_plan(cost.detach(), word_mask, patch_mask, padded, beta, iters)  # (B, N, L)
    # The trace by way of a whole (B, L, L) product, of which all but the diagonal is thrown away.
    product = cost @ plan
    diagonal = torch.eye(product.shape[1], dtype=torch.bool).expand_as(product)
    return product.masked_select(diagonal).view(len(product), -1).sum(-1)  # (B,)


@torch.no_grad()
def _published_plan(cost, word_mask, patch_mask, padded, beta, iters) -> Tensor:
    """The plan (B, N, L), image side first: patches are scaled first and words last in every step."""
    n_words, n_patches = word_mask.sum(1)[:, None, None], patch_mask.sum(1)[:, None, None]  # (B, 1, 1)
    off_words = 1e4 * (~word_mask)[:, :, None]  # (B, L, 1): a padded row is divided by this, not by 0
    off_patches = 1e4 * (~patch_mask)[:, :, None]  # (B, N, 1)
    kernel = (-cost.mT / beta).exp().masked_fill(padded.mT, 0)  # (B, N, L)
    plan = torch.ones_like(kernel).masked_fill(padded.mT, 0)
    word_scaling = (word_mask[:, :, None] / n_words).to(cost.dtype)  # (B, L, 1)
    for _ in range(iters):
        step = kernel * plan
        patch_scaling = 1 / (n_patches * (step @ word_scaling) + off_patches)  # (B, N, 1)
        word_scaling = 1 / (n_words * (step.mT @ patch_scaling) + off_words)  # (B, L, 1)
        plan = patch_scaling * step * word_scaling.mT
    return plan.masked_fill(padded.mT, 0)


def pot_alignment() -> Loss:
    """POT's sinkhorn_log pair by pair, which has no batches with masks; ε = 0.01, where IPOT ends."""
    solve = _pot_cost()

    def loss(words: Tensor, patches: Tensor, word_mask: Tensor, patch_mask: Tensor) -> Tensor:
        rows = zip(words, patches, word_mask, patch_mask, strict=True)
        return torch.stack([solve(w[real_w], p[real_p]) for w, p, real_w, real_p in rows])  # (B,)

    return loss


def pot_sinkhorn() -> Loss:
    """POT's sinkhorn_log for one pair, with the arguments of `sinkhorn_cost`; a, b are uniform."""
    solve = _pot_cost()
    return lambda x, y, a, b, eps, iters: solve(x, y, eps, iters)


def _pot_cost() -> Callable[..., Tensor]:
    """⟨sg(T), C⟩ with T from POT, run for all iterations."""
    ot = _module("ot", "POT")

    def cost(x: Tensor, y: Tensor, eps: float = 0.01, iters: int = 50) -> Tensor:
        C = 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT  # (M, N)
        settings = {"method": "sinkhorn_log", "numItermax": iters, "stopThr": 0, "warn": False}
        T = ot.sinkhorn([], [], C.detach(), eps, **settings)
        return (T * C).sum()

    return cost


def geomloss_sinkhorn() -> Loss:
    """geomloss, annealed to ε = 0.01 by halves; on unit rows its cost |x − y|²/2 is 1 − cos.

    It stops by its own schedule and returns the dual value, entropy included.
    """
    loss = _module("geomloss", "geomloss").SamplesLoss(
        "sinkhorn", p=2, blur=BLUR, scaling=0.5, debias=False, backend="tensorized"
    )
    return lambda x, y, a, b, eps, iters: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1))


def training_step(model: nn.Module, ids, text_mask, pixels, labels, match) -> Tensor:
    """ViLT's two losses of one batch, for whatever has its `encode`, its `mlm` head and its `itm` head."""
    out, hidden = model.encode(ids, text_mask, pixels, first=ids.shape[1]), labels != IGNORE
    states = model.mlm(out["text"][hidden])  # (hidden words, D)
    words = mlm_loss(states, model.mlm.weight, model.mlm.bias, labels[hidden])
    return words + itm_loss(model.itm(out["pooled"]), match)


def hugging_face_vilt() -> Loss:
    """Hugging Face's ViltModel, which `HuggingFaceVilt` puts under the heads and losses of ours."""
    _module("transformers", "transformers")
    return training_step


class HuggingFaceVilt(nn.Module):
    """Hugging Face's ViltModel with the weights of a Vilt, which it shares, and with the Vilt's own heads."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        transformers = _module("transformers", "transformers")
        state, head = to_hugging_face(ours.state_dict()), "vilt."
        body = {name.removeprefix(head): t for name, t in state.items() if name.startswith(head)}
        self.body = transformers.ViltModel(transformers.ViltConfig(**hugging_face_config(ours.config)))
        self.body.load_state_dict(body, assign=True)
        self.mlm, self.itm = ours.mlm, ours.itm

    def encode(self, ids: Tensor, text_mask: Tensor, pixels: Tensor, first: int) -> dict[str, Tensor]:
        """As of a Vilt; the states of the patches, which nobody reads, are computed here too."""
        out = self.body(input_ids=ids, attention_mask=text_mask, pixel_values=pixels)
        return {"text": out.last_hidden_state[:, :first], "pooled": out.pooler_output}
