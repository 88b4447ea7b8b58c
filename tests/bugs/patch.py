"""Plausible wrong patch embeddings."""

import numpy as np
import torch
import torch.utils.checkpoint

from minivlp.patch import patch_embed, patch_embed_np, to_patches
from tests.laws import bug

SINGLE, COPIED = "float32_is_enough", "no_patch_is_copied"
LOOP, SLOPES = "equals_the_slow_loop", "gradients_are_the_slopes"


@bug("patch_embed", LOOP, "Patches in column-major order.")
def columns_first(images, weight, bias):
    return patch_embed(images.transpose(2, 3), weight.transpose(2, 3), bias)


@bug("patch_embed", LOOP, "A plain reshape: neighbours in memory, not in the picture.")
def reshape_only(images, weight, bias):
    p, C = weight.shape[-1], images.shape[1]
    return images.reshape(len(images), -1, C * p * p) @ weight.flatten(1).T + bias


@bug("patch_embed", LOOP, "Channels last inside a patch.")
def channels_last(images, weight, bias):
    return to_patches(images, weight.shape[-1]) @ weight.permute(0, 2, 3, 1).flatten(1).T + bias


@bug("patch_embed", LOOP, "The bias is forgotten.")
def no_bias(images, weight, bias):
    return patch_embed(images, weight, bias * 0)


@bug("patch_embed", SLOPES, "The bias gradient is a mean over patches, not a sum.", rung="np")
def bias_gradient_mean(images, weight, bias, grad=None):
    out, (dx, dw, db) = patch_embed_np(images, weight, bias, grad)
    return out, (dx, dw, db / np.prod(out.shape[:2]) * 0.5)


@bug("patch_embed", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(images, weight, bias, grad=None):
    return patch_embed_np(images, weight, bias)


CUT, TENSORS = "cuts_squares_row_by_row", "takes_tensors_too"


def _as_images_are(function):
    """Write a wrong cut for arrays, get it for tensors too."""

    def either(images, p):
        out = function(np.asarray(images), p)
        return out if isinstance(images, np.ndarray) else torch.from_numpy(np.ascontiguousarray(out))

    either.__name__, either.__module__ = function.__name__, function.__module__
    return either


@bug("to_patches", CUT, "A plain reshape: neighbours in memory, not in the picture.", rung="plain")
@_as_images_are
def cut_by_reshape(images, p):
    return images.reshape(len(images), -1, images.shape[1] * p * p)


@bug("to_patches", CUT, "Patches column by column.", rung="plain")
@_as_images_are
def cut_column_by_column(images, p):
    B, C, H, W = images.shape
    blocks = images.reshape(B, C, H // p, p, W // p, p).transpose(0, 4, 2, 1, 3, 5)
    return blocks.reshape(B, -1, C * p * p)


@bug("to_patches", CUT, "Channels last inside a patch.", rung="plain")
@_as_images_are
def cut_with_channels_last(images, p):
    B, C, H, W = images.shape
    blocks = images.reshape(B, C, H // p, p, W // p, p).transpose(0, 2, 4, 3, 5, 1)
    return blocks.reshape(B, -1, C * p * p)


@bug("to_patches", CUT, "Rows and columns inside a patch exchanged.", rung="plain")
@_as_images_are
def cut_and_turned(images, p):
    patches = to_patches(images, p)
    B, N, K = patches.shape
    return patches.reshape(B, N, K // p**2, p, p).transpose(0, 1, 2, 4, 3).reshape(B, N, K)


@bug("to_patches", TENSORS, "Written for arrays alone.", rung="plain")
def arrays_alone(images, p):
    if isinstance(images, torch.Tensor):
        raise TypeError("transpose() takes two axes")
    return to_patches(images, p)


@bug("patch_embed", SINGLE, "Computed in float64 and left there.")
def computed_in_float64(images, weight, bias):
    return patch_embed(images.double(), weight.double(), bias.double())


@bug(
    "patch_embed",
    COPIED,
    "The plain function: the patches are copied out, and the copy is kept.",
    rung="fused",
)
def plain(images, weight, bias):
    return patch_embed(images, weight, bias)


@bug("patch_embed", COPIED, "unfold copies the windows out, which is the same copy.", rung="fused")
def unfolded(images, weight, bias):
    p = weight.shape[-1]
    windows = torch.nn.functional.unfold(images, p, stride=p)  # (B, C·p·p, N)
    return windows.mT @ weight.flatten(1).T + bias


@bug("patch_embed", COPIED, "The copy is not kept, but made again in the backward pass.", rung="fused")
def copied_twice(images, weight, bias):
    return torch.utils.checkpoint.checkpoint(patch_embed, images, weight, bias, use_reentrant=False)
