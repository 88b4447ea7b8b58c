"""Plausible wrong patch embeddings."""

import numpy as np

from minivlp.patch import patch_embed, patch_embed_np, to_patches
from tests.laws import bug

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
