"""Plausible wrong changes of low rank, and ways to freeze that do not."""

import copy

import torch

from minivlp.lora import Lora, freeze, lora, lora_fused, lora_np
from tests.laws import bug

BEGINS, DENSE, FIRST = "begins_at_the_frozen_product", "equals_the_dense_product", "up_moves_first"
SLOPES, KEPT = "gradients_are_the_slopes", "nothing_is_kept"


@bug("lora", BEGINS, "The frozen product is scaled too.")
def all_scaled(x, weight, down, up, scale):
    return scale * (x @ weight.T + x @ down.T @ up.T)


@bug("lora", BEGINS, "The low rank replaces the weight.")
def base_forgotten(x, weight, down, up, scale):
    return scale * (x @ down.T @ up.T)


@bug("lora", DENSE, "The scale is divided by the rank once more.")
def lora_scale_r(x, weight, down, up, scale):
    return lora(x, weight, down, up, scale / len(down))


@bug("lora", DENSE, "The scale is left out.")
def unscaled(x, weight, down, up, scale):
    return lora(x, weight, down, up, 1.0) + 0 * scale


@bug("lora", DENSE, "The scale on both factors.")
def scaled_twice(x, weight, down, up, scale):
    return lora(x, weight, down, up, scale**2)


@bug("lora", DENSE, "down and up exchanged: it runs where both are square.")
def exchanged(x, weight, down, up, scale):
    return x @ weight.T + scale * (x @ up @ down)


@bug("lora", DENSE, "Merged twice: the change is in the weight, and added to it.")
def merged_twice(x, weight, down, up, scale):
    return lora_fused(x, weight + scale * up @ down, down, up, scale)


@bug("lora", FIRST, "Both factors at 0 in thought: up is taken for 0 and never gets a gradient.")
def up_detached(x, weight, down, up, scale):
    return lora(x, weight, down, up.detach(), scale) + 0 * up.sum()


@bug("lora", FIRST, "The gradient of up without the scale.", rung="np")
def dup_unscaled(x, weight, down, up, scale, grad=None):
    out, (dx, dweight, ddown, dup, dscale) = lora_np(x, weight, down, up, scale, grad)
    return out, (dx, dweight, ddown, dup / scale, dscale)


@bug("lora", SLOPES, "The gradient of down without the scale.", rung="np")
def ddown_unscaled(x, weight, down, up, scale, grad=None):
    out, (dx, dweight, ddown, dup, dscale) = lora_np(x, weight, down, up, scale, grad)
    return out, (dx, dweight, ddown / scale, dup, dscale)


@bug("lora", SLOPES, "x is felt through the frozen weight alone.")
def dx_of_the_base(x, weight, down, up, scale):
    z = x.detach()
    return x @ weight.T + scale * (z @ down.T @ up.T)


@bug("lora", SLOPES, "A frozen weight that is cut off: x is felt through the low rank alone.")
def no_grad_through_the_base(x, weight, down, up, scale):
    with torch.no_grad():
        base = x @ weight.T
    return base + scale * (x @ down.T @ up.T) + 0 * weight.sum()


@bug("lora", SLOPES, "The upstream gradient is ignored.", rung="np")
def no_upstream(x, weight, down, up, scale, grad=None):
    return lora_np(x, weight, down, up, scale)


@bug("lora", "float32_is_enough", "Computed in float64 and left there.")
def computed_in_float64(x, weight, down, up, scale):
    return lora(x.double(), weight.double(), down.double(), up.double(), scale)


@bug("lora", KEPT, "The plain function, which keeps h.", rung="fused")
def plain(x, weight, down, up, scale):
    return lora(x, weight, down, up, scale)


@bug("lora", KEPT, "The merged weight is kept for the backward pass.", rung="fused")
def merged_kept(x, weight, down, up, scale):
    return x @ (weight + scale * up @ down).T


@bug(
    "adapter", "begins_at_its_base", "Both factors at random: training begins at another model.", rung="plain"
)
class both_random(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.up.data.copy_(torch.from_numpy(rng.standard_normal(tuple(self.up.shape))))


@bug("adapter", "begins_at_its_base", "The bias is added with the change as well.", rung="plain")
class bias_twice(Lora):
    def forward(self, x):
        out = super().forward(x)
        return out if self.base.bias is None else out + self.base.bias


@bug("adapter", "learns", "Both factors at 0: neither has a gradient, for ever.", rung="plain")
class lora_both_zero(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.down.data.zero_()


@bug("adapter", "the_base_stays", "The base is not frozen.", rung="plain")
class base_learns(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.base.requires_grad_(True)


@bug("adapter", "the_base_stays", "The bias of the base learns.", rung="plain")
class bias_learns(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        if base.bias is not None:
            base.bias.requires_grad_(True)


@bug("adapter", "the_base_stays", "The gradient of the base is set to 0, and AdamW decays it.", rung="plain")
class base_masked(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        for weight in base.requires_grad_(True).parameters():
            weight.register_hook(torch.zeros_like)


@bug("adapter", "the_scale_is_alpha_by_rank", "The scale is alpha.", rung="plain")
class scale_of_alpha(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.scale = alpha


@bug("adapter", "the_scale_is_alpha_by_rank", "The scale is alpha by the root of the rank.", rung="plain")
class scale_by_root(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.scale = alpha / rank**0.5


@bug("adapter", "merged_is_unmerged", "Merged without the scale.", rung="plain")
class merged_unscaled(Lora):
    def merge(self):
        merged = super().merge()
        merged.weight.data.copy_(self.base.weight + self.up @ self.down)
        return merged


@bug(
    "adapter",
    "merged_is_unmerged",
    "Merged into the base itself, which then has the change twice.",
    rung="plain",
)
class merged_in_place(Lora):
    def merge(self):
        merged = super().merge()
        self.base.weight.data.copy_(merged.weight)
        return merged


@bug("adapter", "merged_is_unmerged", "The bias is lost.", rung="plain")
class merged_without_bias(Lora):
    def merge(self):
        merged = super().merge()
        if merged.bias is not None:
            merged.bias.data.zero_()
        return merged


@bug("adapter", "the_generator_decides", "Drawn from torch's own generator.", rung="plain")
class drawn_by_torch(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.down.data.normal_(std=self.down.shape[1] ** -0.5)


@bug("adapter", "the_generator_decides", "Deviation 1: h is √D times as large as x.", rung="plain")
class drawn_too_large(Lora):
    def __init__(self, base, rank, alpha, rng):
        super().__init__(base, rank, alpha, rng)
        self.down.data.mul_(self.down.shape[1] ** 0.5)


ITSELF, MODE = "it_is_the_module_itself", "it_stays_in_evaluation_mode"
THROUGH, BYTES = "gradients_flow_through", "not_a_byte_changes"


@bug("freeze", BYTES, "Every gradient is set to 0: AdamW decays the weights all the same.", rung="plain")
def frozen_by_mask(module):
    for weight in freeze(module).requires_grad_(True).parameters():
        weight.register_hook(torch.zeros_like)
    return module


@bug("freeze", ITSELF, "A copy is frozen, and the module that others hold is not.", rung="plain")
def copy_frozen(module):
    return freeze(copy.deepcopy(module))


@bug("freeze", BYTES, "The weights of the module itself, not those of its parts.", rung="plain")
def own_weights_only(module):
    freeze(module).requires_grad_(True)
    for weight in module.parameters(recurse=False):
        weight.requires_grad_(False)
    return module


@bug("freeze", THROUGH, "no_grad around the module: nothing below it has a gradient.", rung="plain")
def no_grad_lm(module):
    forward = freeze(module).forward

    def without(x):
        with torch.no_grad():
            return forward(x)

    module.forward = without
    return module


@bug("freeze", THROUGH, "The states are cut off behind the module.", rung="plain")
def detached(module):
    forward = freeze(module).forward
    module.forward = lambda x: forward(x).detach()
    return module


@bug(
    "freeze", MODE, "No gradients, but in training mode: dropout drops, and running means move.", rung="plain"
)
def in_training_mode(module):
    return module.requires_grad_(False)


@bug("freeze", MODE, "In evaluation mode until the parent calls .train().", rung="plain")
def undone_by_the_parent(module):
    return module.eval().requires_grad_(False)


@bug("freeze", MODE, "The top alone refuses: a part that another module holds follows it.", rung="plain")
def top_alone(module):
    module.eval().requires_grad_(False)
    module.train = lambda mode=True: module
    return module
