"""Laws of low-rank changes and of what is frozen."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minivlp import lora
from minivlp.lora import Lora, freeze, lora_fused
from tests.held import keeps_no_matrix, same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def cases(draw):
    """x (M, D), weight (O, D), down (r, D), up (O, r), scale."""
    M, D, O, r = (draw(sizes(n)) for n in (4, 5, 4, 3))
    scale = draw(st.sampled_from([0.5, 1.0, 3.0]))
    return draw(arrays(M, D)), draw(arrays(O, D)), draw(arrays(r, D)), draw(arrays(O, r)), scale


@law("lora", hint="Where up is 0, y is the frozen product alone, whatever down and the scale are.")
@given(case=cases())
def begins_at_the_frozen_product(f, case):
    x, weight, down, up, scale = case
    close(f(x, weight, down, 0 * up, scale), x @ weight.T)


@law("lora", hint="y = x (W + s B A)ᵀ; the scale comes as it is used, and is not divided by the rank again.")
@given(case=cases())
def equals_the_dense_product(f, case):
    x, weight, down, up, scale = case
    changed = weight.copy()
    for o, i, k in np.ndindex(*up.shape, down.shape[1]):
        changed[o, k] += scale * up[o, i] * down[i, k]
    close(f(*case), x @ changed.T)


@law("lora", hint="At up = 0 down has no gradient, and up has one, by which training begins.")
@given(case=cases())
def up_moves_first(f, case):
    x, weight, down, up, scale = case
    _, _, ddown, dup, _ = f.grads(x, weight, down, 0 * up, scale)
    close(ddown, 0 * down)
    close(dup, scale * np.ones((len(up), 1)) * (x @ down.T).sum(0))


@law("lora", hint="Two ways lead from x to y, and each factor is felt through the other. Which is missing?")
@given(case=cases(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal((len(case[0]), len(case[1])))
    for which, gradient in enumerate(f.grads(*case, grad=upstream)):
        slope = central_differences(f, case, which, grad=upstream)
        close(gradient, slope, rtol=1e-6, atol=1e-7)


@law("lora", hint="float32 comes in, float32 goes out.")
@given(case=cases())
def float32_is_enough(f, case):
    same_in_float32(f, case, near=1e-5)


@law("lora", hint="Make h = x Aᵀ again in the backward pass: the arguments are all that it needs.")
def nothing_is_kept(f):
    rng = np.random.default_rng(0)
    args = [rng.standard_normal(shape) for shape in ((64, 6), (5, 6), (4, 6), (5, 4))]
    keeps_no_matrix(f, (*args, 2.0), {}, 64 * 4, "h", 0)


def adapted(f, bias=True, rank=2, alpha=6.0, D=5, O=4):
    """An adapter of a Linear in float64, and that Linear as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Linear(D, O, bias, dtype=torch.float64)
    before = copy.deepcopy(base)
    return f(base, rank, alpha, np.random.default_rng(0)), before


def rows(M=7, D=5):
    return torch.from_numpy(np.random.default_rng(1).standard_normal((M, D)))


def trained(module, x, steps=3):
    """After some steps of AdamW over all of its parameters, with weight decay."""
    adam = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        adam.zero_grad()
        (module.train()(x) - 1).square().sum().backward()
        adam.step()
    return module


@law("adapter", hint="At first the output is the Linear's own, bit for bit.")
def begins_at_its_base(f):
    for bias in (True, False):
        module, before = adapted(f, bias)
        assert torch.equal(module(rows()), before(rows())), "the output is another's before any training"


@law("adapter", hint="One of the two factors starts at random, or neither ever has a gradient.")
def learns(f):
    module, before = adapted(f)
    trained(module, rows())
    assert (module.up != 0).all() and not torch.equal(module(rows()), before(rows())), "nothing was learned"
    module(rows()).square().sum().backward()
    assert module.down.grad.abs().sum() > 0, "the first factor has no gradient after three steps"


@law("adapter", hint="The base does not learn: not by its gradient, and not by weight decay.")
def the_base_stays(f):
    module, before = adapted(f)
    trained(module, rows())
    for name, weight in module.base.state_dict().items():
        assert torch.equal(weight, before.state_dict()[name]), f"{name} of the base has moved"


@law("adapter", hint="The scale is alpha / rank.")
def the_scale_is_alpha_by_rank(f):
    for rank, alpha in ((2, 6.0), (3, 1.5)):
        module, before = adapted(f, rank=rank, alpha=alpha)
        with torch.no_grad():
            module.up.normal_(generator=torch.Generator().manual_seed(0))
        expected = before(rows()) + alpha / rank * rows() @ (module.up @ module.down).T
        close(module(rows()).detach(), expected.detach())


@law("adapter", hint="Merged, the output is the same; the bias goes along once.")
def merged_is_unmerged(f):
    for bias in (True, False):
        module, before = adapted(f, bias)
        trained(module, rows())
        merged, said = module.merge(), module(rows()).detach()
        assert type(merged) is nn.Linear and (merged.bias is None) == (not bias)
        close(merged(rows()).detach(), said)
        assert merged.weight.requires_grad and torch.equal(module.base.weight, before.weight)


@law("adapter", hint="The random factor is drawn from the generator that is given, and from no other.")
def the_generator_decides(f):
    def draw(seed):
        base = nn.Linear(300, 9)
        return f(base, 40, 1.0, np.random.default_rng(seed)).down.detach()

    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    one, two, other = draw(0), draw(0), draw(1)
    assert torch.equal(one, two) and not torch.equal(one, other)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(draw(0), one)
    assert (np.random.get_state()[1] == before[1]).all()
    assert one.shape == (40, 300) and abs(one.std() * 300**0.5 - 1) < 0.05  # h is as large as x


class Reader(nn.Module):
    """Something that learns, then something that is to be frozen: dropout, running means, parts of parts."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.bridge = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
            inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.GELU())
            self.model = nn.Sequential(inner, nn.Dropout(0.5), nn.Linear(6, 3))
        self.double()

    def forward(self, x):
        return self.model(self.bridge(x))


def frozen(f):
    """A reader in training mode whose model is frozen, and that model as it was, in evaluation mode."""
    reader = Reader()
    before = copy.deepcopy(reader.model).eval()
    reader.model = f(reader.model)
    return reader.train(), before


@law("freeze", hint="The module itself is frozen and returned, no copy of it.")
def it_is_the_module_itself(f):
    reader = Reader()
    assert f(reader.model) is reader.model, "what came back is another module"


@law(
    "freeze",
    hint="A parent's .train() reaches all of its parts: the frozen ones must not follow, nor theirs.",
)
def it_stays_in_evaluation_mode(f):
    reader, before = frozen(f)
    shared = nn.ModuleList([reader.model[0], reader.model[0][1]]).train()  # parts with another parent
    assert not any(part.training for part in (*reader.model.modules(), *shared[0].modules()))
    x = rows(D=6)
    assert torch.equal(reader.model(x), before(x)), "in training mode of its parent it says something else"


@law("freeze", hint="Frozen weights get no gradient; what they are given does, or nothing below them learns.")
def gradients_flow_through(f):
    (reader, before), x = frozen(f), rows(D=6).requires_grad_()
    (wanted,) = torch.autograd.grad(before(x).square().sum(), x)
    out = reader.model(x)
    assert out.requires_grad, "no gradient leaves the frozen module"
    (found,) = torch.autograd.grad(out.square().sum(), x)
    close(found, wanted)


@law(
    "freeze", hint="AdamW shrinks a weight whose gradient is 0; a weight without a gradient it leaves alone."
)
def not_a_byte_changes(f):
    reader, _ = frozen(f)
    before, bridge = numbers(reader.model), numbers(reader.bridge)
    trained(reader, rows(D=4), steps=5)
    moved = [name for name, value in numbers(reader.model).items() if value != before[name]]
    assert not moved, f"these moved: {', '.join(moved)}"
    assert all(value != bridge[name] for name, value in numbers(reader.bridge).items()), "nothing learned"


def numbers(module):
    """The bytes of every weight and buffer."""
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


test_laws = obeys(lora)

x, weight, down, up = np.ones((3, 5)), np.ones((4, 5)), np.ones((2, 5)), np.ones((4, 2))
rng = np.random.default_rng(0)
test_refusals = refuses(
    lora,
    [
        ("lora", "widths", (x[:, :4], weight, down, up, 1.0), {}, r"weight must have shape \(O, D=4\)"),
        ("lora", "ranks", (x, weight, down, up[:, :1], 1.0), {}, r"up must have shape \(O=4, r=2\)"),
        ("lora", "rows of rows", (x[None], weight, down, up, 1.0), {}, "x must have shape"),
        ("lora", "integers", (x, weight, down.astype(int), up, 1.0), {}, "down must have a floating dtype"),
        ("lora", "NaN", (x, weight, down, up * np.nan, 1.0), {}, "up must not contain NaN"),
        ("lora", "scale", (x, weight, down, up, 0.0), {}, "scale must be a finite number > 0, got 0"),
        ("lora", "overflow", (x, weight, 1e200 * down, 1e200 * up, 1.0), {}, "up must give a change of the"),
        ("lora", "result", (1e200 * x, 1e200 * weight, down, up, 1.0), {}, "x must give a result"),
        ("adapter", "no Linear", (nn.Conv2d(1, 1, 1), 1, 1.0, rng), {}, "base must be a Linear, got Conv2d"),
        ("adapter", "rank", (nn.Linear(2, 2), 0, 1.0, rng), {}, "rank must be at least 1, got 0"),
        ("adapter", "alpha", (nn.Linear(2, 2), 1, 0.0, rng), {}, "alpha must be a finite number > 0"),
        (
            "adapter",
            "seed",
            (nn.Linear(2, 2), 1, 1.0, 0),
            {},
            "rng must be a numpy.random.Generator, got int",
        ),
    ],
)


def test_the_published_package_gives_the_same():
    """Outside truth: peft's LoRA layer, before and after merging, with the names lora_A and lora_B."""
    peft = pytest.importorskip(
        "peft", reason="peft is not installed: see tests/requirements-peers-nodeps.txt"
    )
    for rank, alpha in ((2, 16), (3, 1)):
        ours, base = adapted(Lora, rank=rank, alpha=float(alpha))
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], lora_dropout=0.0)
        theirs = peft.get_peft_model(nn.Sequential(base), config).double()
        layer = theirs.base_model.model[0]
        with torch.no_grad():
            assert not layer.lora_B["default"].weight.any()
            ours.up.normal_(generator=torch.Generator().manual_seed(0))
            layer.lora_A["default"].weight.copy_(ours.down)
            layer.lora_B["default"].weight.copy_(ours.up)
        one, two = ours(rows()), theirs(rows())
        close(one.detach(), two.detach())
        (one.square().sum() + two.square().sum()).backward()
        close(ours.down.grad, layer.lora_A["default"].weight.grad)
        close(ours.up.grad, layer.lora_B["default"].weight.grad)
        close(ours.merge().weight.detach(), theirs.merge_and_unload()[0].weight.detach())


@pytest.mark.parametrize("form", [nn.Sequential, lambda part: nn.ModuleDict({"part": part})])
def test_what_is_frozen_can_be_copied_and_stored(form):
    """A copy is frozen by itself: it does not hold the module that it is a copy of."""
    whole = form(freeze(nn.Sequential(nn.Linear(2, 2), nn.Dropout())))
    for other in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        other.train()
        (part,) = other.children()
        assert not part.training and not part[1].training and other.training
        assert part.train() is part and part[1].train() is part[1]
    assert set(whole.state_dict()) == set(copy.deepcopy(whole).state_dict()) and len(whole.state_dict()) == 2


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_module_takes_any_leading_axes_and_keeps_the_dtype(kind):
    base = nn.Linear(5, 4).bfloat16()
    module = Lora(base, 2, 4.0, np.random.default_rng(0))
    module = module if kind == "adapter" else module.merge()
    out = module(torch.randn(2, 3, 5).bfloat16())
    assert out.shape == (2, 3, 4) and {p.dtype for p in module.parameters()} == {out.dtype} == {
        torch.bfloat16
    }


def test_the_adapter_and_the_function_are_one():
    module, _ = adapted(Lora, bias=False)
    trained(module, rows())
    found = lora_fused(rows(), module.base.weight, module.down, module.up, module.scale)
    close(found.detach(), module(rows()).detach())


def test_a_frozen_weight_costs_no_gradient_of_its_size():
    """The fused rung makes dW only where W learns; other rungs leave that to autograd."""
    shapes, made = ((3, 50), (40, 50), (2, 50), (40, 2)), []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            made.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    args = [torch.randn(shape, requires_grad=i != 1) for i, shape in enumerate(shapes)]
    out = lora_fused(*args, 2.0).sum()
    with Sizes():
        out.backward()
    assert args[1].grad is None and max(made) <= 3 * 50


@pytest.mark.parametrize("which", range(5))
def test_each_gradient_alone_is_what_it_is_among_all(which):
    """The fused rung makes no gradient that nobody asks for, and mixes none up."""
    shapes = ((3, 5), (4, 5), (2, 5), (4, 2), ())
    args = [torch.rand(shape, dtype=torch.float64) + 0.5 for shape in shapes]
    alone = [x.clone().requires_grad_(i == which) for i, x in enumerate(args)]
    together = [x.clone().requires_grad_() for x in args]
    lora_fused(*alone).square().sum().backward()
    lora.lora(*together).square().sum().backward()
    close(alone[which].grad, together[which].grad)
    assert all(x.grad is None for i, x in enumerate(alone) if i != which)
