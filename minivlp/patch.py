"""Patch embedding: cut an image into p × p squares, map each with one linear layer; ViLT's visual embedder.

With patch n = (row r, column c) of the grid, flattened in (C, p, p) order to a vector u_bn:

    out_bn = W u_bn + bias,        W (D, C·p·p), rows r first: n = r · (W/p) + c.

Gradient, with G = dL/dout: dW = Σ_bn G_bn u_bnᵀ, dbias = Σ_bn G_bn, du_bn = Wᵀ G_bn; the images take their du
back through the inverse of the cut. A stride-p convolution with a p × p kernel is the same map.

Rungs:
    patch_embed_np      reshape, one matrix product; keeps the (B, N, C·p·p) patches for the gradient
    patch_embed         the same in PyTorch, differentiated by autograd
    patch_embed_fused   a convolution with stride p: the cut is never made, the images alone are kept

Sources: Dosovitskiy et al. 2021 (ViT), eq. 1; Kim, Son and Kim 2021 (ViLT), section 3.1.
Left out: overlapping patches and convolutional stems, which are other visual embedders, not this one.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.core import require
from minivlp.core.precision import at_least_float32, working_np


def _check(library, images, weight, bias) -> int:
    """Refuse what is not `images (B, C, H, W)`, `weight (D, C, p, p)`, `bias (D,)`; return p."""
    sizes = require.shapes(library, images=(images, "B C H W"), weight=(weight, "D C p p"), bias=(bias, "D"))
    require.floats(images=images, weight=weight, bias=bias)
    _check_grid(sizes["H"], sizes["W"], sizes["p"])
    return sizes["p"]


def check_pixels(pixels: Tensor, p: int) -> tuple[int, int, int]:
    """Refuse what is not `pixels (B, 3, H, W)` of whole patches, without NaN; return B, H and W.

    A model calls this once, and its PatchEmbed then looks at nothing.
    """
    B, H, W = (require.shapes(pixels=(pixels, "B 3 H W"))[k] for k in "BHW")
    require.floats(pixels=pixels)
    _check_grid(H, W, p, "pixels")
    return B, H, W


def _check_grid(height: int, width: int, p: int, name: str = "images") -> None:
    if p < 1 or height % p or width % p or height < p or width < p:
        require.fail(name, f"must have height and width that are multiples of p={p}", f"{height} × {width}")


def patches_a_side(image_size: int, patch: int) -> int:
    """Patches of `patch` pixels that fill the side of a square image. Raises ValueError when they do not."""
    if patch < 1 or image_size < patch or image_size % patch:
        require.fail("image_size", f"must be a multiple of patch={patch}", image_size)
    return image_size // patch


def to_patches(images, p: int):
    """Cut images (B, C, H, W) into patches (B, N, C·p·p), row-major over the grid, each in (C, p, p) order.

    Takes NumPy arrays and torch tensors. Raises ValueError when H or W is not a multiple of p.
    """
    sizes = require.shapes(images=(images, "B C H W"))
    _check_grid(sizes["H"], sizes["W"], p)
    return _cut(images, p)


def _cut(images, p: int):
    """`to_patches`, unchecked."""
    B, C, H, W = images.shape
    blocks = images.reshape(B, C, H // p, p, W // p, p)  # (B, C, rows, p, columns, p)
    order = (0, 2, 4, 1, 3, 5)  # grid axes first, then the content of a patch
    blocks = blocks.permute(order) if isinstance(blocks, Tensor) else blocks.transpose(order)
    return blocks.reshape(B, (H // p) * (W // p), C * p * p)


def from_patches(patches, p: int, height: int, width: int):
    """The inverse of `to_patches`: patches (B, N, C·p·p) back to images (B, C, height, width)."""
    _check_grid(height, width, p)
    rows, columns = height // p, width // p
    sizes = require.shapes(patches=(patches, "B N K"))
    B, N, K = (sizes[k] for k in "BNK")
    if rows * columns != N or K % (p * p):
        require.fail(
            "patches", f"must hold {rows * columns} patches of C·{p}·{p} numbers", tuple(patches.shape)
        )
    C = K // (p * p)
    blocks = patches.reshape(B, rows, columns, C, p, p)
    order = (0, 3, 1, 4, 2, 5)
    blocks = blocks.permute(order) if isinstance(blocks, Tensor) else blocks.transpose(order)
    return blocks.reshape(B, C, height, width)


def patch_embed_np(images: np.ndarray, weight: np.ndarray, bias: np.ndarray, grad: np.ndarray | None = None):
    """Patch embedding and its gradients by hand.

    images (B, C, H, W), weight (D, C, p, p), bias (D,), grad (B, N, D) the upstream gradient (None = ones).
    Returns `(out (B, N, D), (d images, d weight, d bias))`. Raises ValueError on bad shapes, mixed
    dtypes, NaN, infinities and sums that overflow.
    """
    p, dtype = _check(np.ndarray, images, weight, bias), images.dtype
    images, weight, bias = working_np(images, weight, bias)
    u = to_patches(images, p)  # (B, N, C·p·p)
    W = weight.reshape(len(weight), -1)  # (D, C·p·p)
    out = u @ W.T + bias  # (B, N, D)
    require.held(out, "result", "images", dtype)
    G = np.ones_like(out) if grad is None else grad
    # out_bnd = Σ_k u_bnk W_dk + bias_d: each factor's gradient is G times the other, summed over b and n.
    dW = np.einsum("bnd,bnk->dk", G, u).reshape(weight.shape)
    dbias = G.sum((0, 1))
    # u_bnk touches out_bnd through W_dk for every d; the cut is a permutation: its gradient is its inverse.
    dimages = from_patches(G @ W, p, images.shape[2], images.shape[3])
    return out, (dimages, dW, dbias)


def patch_embed(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Patch embedding: images (B, C, H, W), weight (D, C, p, p), bias (D,) → (B, N, D), row-major patches.

    Raises ValueError as `patch_embed_np` does. Half precisions are added up in float32, also under autocast.
    """
    _check(Tensor, images, weight, bias)
    with at_least_float32(images, weight, bias) as arrays:
        out = embed(*arrays).to(images.dtype)
    require.held(out, "result", "images", images.dtype)
    return out


def embed(images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`patch_embed`, unchecked, and with a bias or without: what the models call."""
    out = _cut(images, weight.shape[-1]) @ weight.flatten(1).T  # (B, N, D)
    return out if bias is None else out + bias


def patch_embed_fused(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`patch_embed` as a strided convolution, which reads the pixels where they lie; arguments as there.

    The plain rung first writes all pixels in the order of the patches, and keeps that copy for the gradient.
    In PyTorch on CPUs the convolution is the slower one all the same (`python -m minivlp bench --only
    patch`), so models take the plain rung.
    """
    p = _check(Tensor, images, weight, bias)
    with at_least_float32(images, weight, bias) as arrays:
        out = F.conv2d(*arrays, stride=p).flatten(2).mT.to(images.dtype)  # (B, D, rows, columns) → (B, N, D)
    require.held(out, "result", "images", images.dtype)
    return out


class PatchEmbed(torch.nn.Module):
    """The learnable patch projection: `weight (dim, channels, patch, patch)` and a `bias (dim,)` or None."""

    def __init__(self, dim: int, patch: int, channels: int = 3, bias: bool = True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(dim, channels, patch, patch))
        self.bias = torch.nn.Parameter(torch.zeros(dim)) if bias else None
        torch.nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return embed(images, self.weight, self.bias)


RUNGS = {"patch_embed": {"np": patch_embed_np, "torch": patch_embed, "fused": patch_embed_fused}}
CORES = {"patch_embed": embed}  # what the models call
