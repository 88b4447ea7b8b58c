"""Plausible wrong LayerNorms."""

import numpy as np

from minivlp.transformer import layer_norm, layer_norm_np
from tests.laws import bug

CONSTANT, LONG, SINGLE = "constant_rows_are_divided_by_root_eps", "long_rows_turn_slowly", "float32_is_enough"
LOOP, SHIFT, SLOPES = "equals_the_slow_loop", "ignores_a_common_shift", "gradients_are_the_slopes"


@bug("layer_norm", LOOP, "The unbiased variance, over D − 1, as torch's .var() gives it.")
def unbiased(x, weight, bias, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    return weight * centred / (variance + eps).sqrt() + bias


@bug("layer_norm", LOOP, "eps added to the standard deviation, outside the root.")
def eps_outside(x, weight, bias, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True).sqrt() + eps) + bias


@bug("layer_norm", LOOP, "The mean is not subtracted: RMSNorm.")
def root_mean_square(x, weight, bias, eps=1e-6):
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() + bias


@bug("layer_norm", LOOP, "Mean and variance over all rows, not per row.")
def over_everything(x, weight, bias, eps=1e-6):
    centred = x - x.mean()
    return weight * centred * (centred.square().mean() + eps).rsqrt() + bias


@bug("layer_norm", SHIFT, "The variance as E[x²] − E[x]².")
def one_pass(x, weight, bias, eps=1e-6):
    mean = x.mean(-1, keepdim=True)
    variance = x.square().mean(-1, keepdim=True) - mean.square()
    return weight * (x - mean) * (variance + eps).rsqrt() + bias


@bug("layer_norm", SLOPES, "Mean and variance taken as constants: dx = g / √(var + eps).", rung="np")
def constant_statistics(x, weight, bias, eps=1e-6, grad=None):
    out, (_, dweight, dbias) = layer_norm_np(x, weight, bias, eps, grad)
    G = np.ones_like(out) if grad is None else grad
    return out, (weight * G / np.sqrt(x.var(-1, keepdims=True) + eps), dweight, dbias)


@bug("layer_norm", SLOPES, "The mean of g is subtracted before the weight is applied.", rung="np")
def weight_applied_late(x, weight, bias, eps=1e-6, grad=None):
    out, (_, dweight, dbias) = layer_norm_np(x, weight, bias, eps, grad)
    G = np.ones_like(out) if grad is None else grad
    dx = layer_norm_np(x, np.ones_like(weight), bias, eps, G)[1][0]
    return out, (weight * dx, dweight, dbias)


@bug("layer_norm", SLOPES, "The bias detached.")
def frozen_bias(x, weight, bias, eps=1e-6):
    return layer_norm(x, weight, bias.detach(), eps)


@bug(
    "layer_norm", CONSTANT, "No gradient where a row does not vary: its divisor √eps is forgotten.", rung="np"
)
def nothing_for_constant_rows(x, weight, bias, eps=1e-6, grad=None):
    out, (dx, dweight, dbias) = layer_norm_np(x, weight, bias, eps, grad)
    return out, (np.where(x.var(-1, keepdims=True) < 1e-20, 0, dx), dweight, dbias)


@bug("layer_norm", CONSTANT, "The divisor is a fixed number where the variance is 0, not √eps.", rung="np")
def another_floor(x, weight, bias, eps=1e-6, grad=None):
    out, (dx, dweight, dbias) = layer_norm_np(x, weight, bias, eps, grad)
    return out, (np.where(x.var(-1, keepdims=True) < 1e-20, dx * eps**0.5, dx), dweight, dbias)


@bug("layer_norm", LONG, "eps is forgotten in the gradient where it is small: 1/√var.", rung="np")
def small_eps_forgotten(x, weight, bias, eps=1e-6, grad=None):
    out, (dx, dweight, dbias) = layer_norm_np(x, weight, bias, eps, grad)
    variance = x.var(-1, keepdims=True)
    bare = layer_norm_np(x, weight, bias, 1e-30, grad)[1][0]
    return out, (np.where((eps < 1e-3) & (variance > 1e-20), bare, dx), dweight, dbias)


@bug(
    "layer_norm", LONG, "The divisor is held below 1,000 in the gradient: long rows turn too fast.", rung="np"
)
def divisor_held_below(x, weight, bias, eps=1e-6, grad=None):
    out, (dx, dweight, dbias) = layer_norm_np(x, weight, bias, eps, grad)
    root = np.sqrt(x.var(-1, keepdims=True) + eps)
    return out, (dx * root / root.clip(None, 1e3), dweight, dbias)


@bug("layer_norm", SINGLE, "The statistics are float64, and float32 leaves as float64.")
def statistics_in_float64(x, weight, bias, eps=1e-6):
    return layer_norm(x.double(), weight, bias, eps)
