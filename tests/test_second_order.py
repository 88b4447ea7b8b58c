"""Every plain rung can be differentiated twice (`create_graph=True`), which gradient penalties need."""

import pytest
import torch

from minivlp import (
    attention,
    boxes,
    chamfer,
    decoder,
    filip,
    hinge,
    infonce,
    ipot,
    itm,
    lora,
    mlm,
    nce,
    patch,
    sigmoid,
    sinkhorn,
    transformer,
)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


WORDS, LABELS = torch.tensor([1, -100, 4]), torch.tensor([1, 0, 1])
SCALE, BIAS = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
CASES = {
    "patch_embed": (patch.patch_embed, numbers(2, 3, 4, 6), numbers(5, 3, 2, 2), numbers(5)),
    "attention": (attention.attention, numbers(1, 2, 3, 4), numbers(1, 2, 5, 4), numbers(1, 2, 5, 4).exp()),
    "layer_norm": (transformer.layer_norm, numbers(3, 4), numbers(4), numbers(4)),
    "rms_norm": (decoder.rms_norm, numbers(3, 4), numbers(4)),
    "rotary": (lambda x: decoder.rotary(x, torch.arange(3)), numbers(2, 1, 3, 4)),
    "mlm_loss": (lambda h, e, b: mlm.mlm_loss(h, e, b, WORDS), numbers(3, 4), numbers(6, 4), numbers(6)),
    "lora": (lora.lora, numbers(3, 4), numbers(5, 4), numbers(2, 4), numbers(5, 2), SCALE),
    "itm_loss": (lambda z: itm.itm_loss(z, LABELS), numbers(3, 2)),
    "nce": (nce.nce, numbers(3), numbers(3, 2), numbers(3) - 1, numbers(3, 2) - 1),
    "infonce": (infonce.infonce, numbers(3, 4), numbers(4, 3).T, SCALE),
    "sigmoid_loss": (sigmoid.sigmoid_loss, numbers(3, 4), numbers(4, 3).T, SCALE, BIAS),
    "chamfer": (chamfer.chamfer, numbers(2, 3, 4), numbers(2, 5, 4)),
    "filip": (filip.filip, numbers(3, 2, 4), numbers(3, 5, 4), SCALE),
    "hinge": (hinge.hinge, numbers(3, 4), numbers(4, 3).T),
    "sinkhorn": (lambda cost: sinkhorn.sinkhorn(cost, eps=0.5, iters=5), numbers(3, 4)),
    "box_loss": (boxes.box_loss, numbers(3, 4).sigmoid(), numbers(3, 5)[:, 1:].sigmoid()),
}


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_the_slopes_of_the_first(name):
    function, *inputs = CASES[name]
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(function, inputs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (ipot.wpa, (numbers(2, 3, 4), numbers(2, 5, 4))),
        (sinkhorn.sinkhorn_cost, (numbers(3, 4), numbers(5, 4))),
    ],
    ids=["wpa", "sinkhorn_cost"],
)
def test_with_the_plan_held_fixed_second_derivatives_exist(function, inputs):
    """Numerical slopes would move the plan, so they are no reference here."""
    x, y = (t.clone().requires_grad_() for t in inputs)
    (first,) = torch.autograd.grad(function(x, y).sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (x, y))
    assert all(bool(torch.isfinite(g).all()) and float(g.abs().sum()) > 0 for g in second)
