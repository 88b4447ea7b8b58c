"""Laws of ViLT in functions: each is the library's own module, optimiser or loop, asked the same question."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from minivlp import build_vilt, transformer
from minivlp.build_vilt import under
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.recipes.vilt import pretraining_loss
from minivlp.recipes.vilt_batches import ViltBatch
from minivlp.training import loop
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses

SEEDS = st.integers(0, 9)
CONFIG = ViltConfig(
    vocab_size=11, max_text_len=6, dim=8, layers=2, heads=2, hidden=12, patch=2, image_size=4, text_eps=1e-12
)


@st.composite
def tokens(draw):
    """z (B, L, D), the four maps in two matrices, their biases; heads; real tokens (B, 1, 1, L) or None."""
    B, L, heads, width = draw(st.tuples(*map(st.sampled_from, ((1, 2), (1, 3), (1, 2), (1, 2)))))
    D, rng = heads * width, np.random.default_rng(draw(SEEDS))
    shapes = ((B, L, D), (3 * D, D), (3 * D,), (D, D), (D,))
    case = tuple(rng.integers(-3, 4, shape) / 2.0 for shape in shapes)
    mask = draw(st.sampled_from((None, np.arange(L) < [[L], [1]][:B])))
    return case, heads, mask if mask is None else np.reshape(mask, (B, 1, 1, L))


@law("multi_head", hint="Each head takes its own columns of queries, keys and values, divided by √d, not √D.")
@given(case=tokens())
def equals_the_slow_loop(f, case):
    (z, W, c, U, e), heads, mask = case
    out = f(z, W, c, U, e, heads, mask=mask)
    D, d = z.shape[-1], z.shape[-1] // heads
    for b, rows in enumerate(z):
        q, k, v = (rows @ W[i * D :][:D].T + c[i * D :][:D] for i in range(3))
        seen = [j for j in range(len(rows)) if mask is None or mask[b, 0, 0, j]]
        for i in range(len(rows)):
            joined = []
            for h in range(heads):
                cut = slice(h * d, h * d + d)
                scores = np.array([q[i, cut] @ k[j, cut] / d**0.5 for j in seen])
                P = np.exp(scores - scores.max())
                joined += list(sum(p * v[j, cut] for p, j in zip(P / P.sum(), seen, strict=True)))
            close(out[b, i], U @ np.array(joined) + e)


@law("multi_head", hint="Queries, keys and values were all made from z: three gradients come back to it.")
@given(case=tokens(), seed=SEEDS)
def gradients_are_the_slopes(f, case, seed):
    args, heads, mask = case
    args = tuple(a[:2] if i == 0 else a for i, a in enumerate(args))
    upstream = np.random.default_rng(seed).standard_normal(args[0].shape)
    for which, gradient in enumerate(f.grads(*args, heads=heads, mask=mask, grad=upstream)):
        slope = central_differences(lambda *a: f(*a, heads=heads, mask=mask), args, which, grad=upstream)
        close(gradient, slope, rtol=1e-5, atol=1e-6)


@law("multi_head", hint="float32 comes in, float32 goes out.")
@given(case=tokens())
def float32_is_enough(f, case):
    args, heads, mask = case
    same_in_float32(f, args, {"heads": heads, "mask": mask}, near=1e-4)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module by name, all of them moved away from their first values, in float64."""
    module.double()
    return {name: value + 0.4 * torch.randn_like(value) for name, value in module.state_dict().items()}


def model_of(seed: int) -> tuple[Vilt, dict[str, Tensor]]:
    """A ViLT in modules, and its weights."""
    torch.manual_seed(seed)
    model = Vilt(CONFIG)
    model.load_state_dict(w := weights(model))
    return model, w


def batch_of(seed: int, written: bool = False, kinds: str = "all") -> ViltBatch:
    """Six captions with pictures; kinds: "all", or words alone are predicted, or pairs alone are matched."""
    torch.manual_seed(seed)
    lengths = torch.tensor([6, 5, 4, 6, 3, 4])
    ids, mask = torch.randint(11, (6, 6)), torch.arange(6) < lengths[:, None]
    labels = torch.where(mask & (torch.rand(6, 6) < 0.4), ids, -100)
    labels[0, 1] = 3
    match, align = torch.tensor([1, 0, 1, 0, -1, -1]), torch.tensor([1.0, -1, 1, 0, 0, 0])
    if kinds == "words":
        match, align = -torch.ones_like(match), 0 * align
    if kinds != "words":
        labels[match >= 0] = -100
        labels[5, 1] = 3
    return ViltBatch(ids, mask, labels, match, align, torch.randn(6, 3, 4, 4).double(), written=written)


def same(got: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...] = ()) -> None:
    """Equal values, and equal gradients of their squares in `leaves`."""
    __tracebackhide__ = True
    close(got.detach().numpy(), wanted.detach().numpy(), rtol=1e-7, atol=1e-9)
    if leaves:
        pairs = [
            torch.autograd.grad((x**2).sum(), leaves, retain_graph=True, allow_unused=True)
            for x in (got, wanted)
        ]
        for ours, theirs in zip(*pairs, strict=True):
            assert (ours is None) == (theirs is None), "a gradient is missing: was a tensor detached?"
            if ours is not None:
                close(ours.numpy(), theirs.numpy(), rtol=1e-6, atol=1e-8)


@law("block", hint="A norm before each half, and the input of each half is added to what it makes.")
@given(seed=SEEDS, masked=st.booleans(), eps=st.sampled_from((1e-6, 0.3)))
def equals_the_module(f, seed, masked, eps):
    torch.manual_seed(seed)
    module = transformer.Block(8, 2, 12, eps)
    module.load_state_dict(w := weights(module))
    z = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(5) < torch.tensor([[5], [3]]))[:, None, None] if masked else None
    same(f(z, w, 2, mask, eps), module(z, mask), (z,))


@law("encoder", hint="Each block reads what the one before it made; one norm follows the last.")
@given(seed=SEEDS, layers=st.sampled_from((1, 2, 3)), masked=st.booleans(), eps=st.sampled_from((1e-6, 0.3)))
def equals_the_encoder(f, seed, layers, masked, eps):
    torch.manual_seed(seed)
    module = transformer.Encoder(8, 2, 12, layers, eps)
    module.load_state_dict(w := weights(module))
    z = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    mask = (torch.arange(4) < torch.tensor([[4], [2]]))[:, None, None] if masked else None
    same(f(z, w, layers, 2, mask, eps), module(z, mask), (z,))


@law("embed_words", hint="Word, position and segment are added before the norm, the type after it.")
@given(seed=SEEDS, L=st.sampled_from((1, 3, 6)))
def equals_the_models_rows_of_words(f, seed, L):
    model, w = model_of(seed)
    leaves = (w["word.weight"].requires_grad_(), w["text_position.weight"].requires_grad_())
    ids = torch.randint(11, (2, L))
    wanted = torch.func.functional_call(Rows(model), {f"model.{k}": v for k, v in w.items()}, (ids,))
    same(f(ids, w), wanted, leaves)


class Rows(nn.Module):
    """`embed_text` of a model as a forward pass."""

    def __init__(self, model: Vilt):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.embed_text(ids, torch.ones_like(ids, dtype=torch.bool))


@law("embed_patches", hint="[CLS] stands first and has the first position; type 1 is added to all rows.")
@given(seed=SEEDS, B=st.sampled_from((1, 2)))
def equals_the_models_rows_of_a_picture(f, seed, B):
    model, w = model_of(seed)
    pixels = torch.randn(B, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    same(f(pixels, w), model.embed_image(pixels)[0], (pixels,))


@law(
    "encode",
    hint="Words first, then the picture; the mask says who is real and, in writing, who comes later.",
)
@given(seed=SEEDS, writing=st.booleans())
def equals_the_models_states(f, seed, writing):
    model, w = model_of(seed)
    b = batch_of(seed)
    pixels = b.pixels.requires_grad_()
    text, image = f(b.ids, b.text_mask, pixels, w, 2, 2, writing)
    states = model.encode(b.ids, b.text_mask, pixels, writing=writing)
    same(text, states["text"], (pixels,))
    same(image, states["image"], (pixels,))


@law("mlm_hidden", hint="Linear, then GELU, then the norm.")
@given(seed=SEEDS, rows=st.sampled_from((0, 1, 3)))
def equals_the_models_head_of_words(f, seed, rows):
    model, w = model_of(seed)
    states = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    same(f(states, w), model.mlm_hidden(states), (states,))


@law("itm_logits", hint="The tanh stands between the two maps.")
@given(seed=SEEDS)
def equals_the_models_pooler_and_head(f, seed):
    model, w = model_of(seed)
    cls = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    same(f(cls, w), model.itm_logits(model.pooler(cls).tanh()), (cls,))


@law("pretraining_loss", hint="Which examples serve which term, and what is each mean over?")
@given(
    seed=SEEDS,
    kinds=st.sampled_from(("all", "words")),
    written=st.booleans(),
    weight=st.sampled_from((0.1, 2.0)),
)
def equals_the_recipes_terms(f, seed, kinds, written, weight):
    model, w = model_of(seed)
    b = batch_of(seed, written, kinds)
    wanted = pretraining_loss(model, [b], weight)
    found = f(b, w, 2, 2, weight)
    assert set(found) == set(wanted), f"your terms are {sorted(found)}, expected {sorted(wanted)}"
    for name, term in wanted.items():
        try:
            close(found[name].detach().numpy(), term.detach().numpy(), rtol=1e-7)
        except AssertionError as error:
            raise AssertionError(f"the term {name}: {error}") from None


@law("rate", hint="Ask for the first step, the last step of the warm-up, and the last step of the run.")
@given(
    steps=st.sampled_from((1, 4, 10, 2800)),
    warmup=st.sampled_from((0, 1, 3, 30)),
    cooldown=st.sampled_from((0.0, 0.4, 1.0)),
)
def equals_the_librarys_share(f, steps, warmup, cooldown):
    for step in {0, 1, 2, steps // 2, steps - 2, steps - 1} & set(range(steps)):
        wanted = loop.rate(loop.Rates(steps=steps, warmup=warmup, cooldown=cooldown), step)
        close(f(step, steps, warmup, cooldown), wanted)


def weights_and_gradients(seed: int, *shape: int) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(shape)) for _ in range(4)]


@law(
    "adamw",
    hint="Compute the first step by hand: what are both means after it, and by what are they divided?",
)
@given(seed=SEEDS, decay=st.sampled_from((0.0, 0.5)), size=st.sampled_from((1.0, 1e-8)))
def equals_torchs_adamw(f, seed, decay, size):
    start, *grads = weights_and_gradients(seed, 2, 3)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.98), eps=1e-8, weight_decay=decay)
    ours, mean, square = start, 0 * start, 0 * start
    for count, grad in enumerate(grads, 1):
        theirs.grad = size * grad
        optimizer.step()
        answer = f(ours, size * grad, mean, square, count, 0.1, decay)
        assert len(answer) == 3, f"return (weight, mean, square), not {len(answer)} values"
        ours, mean, square = answer
        close(ours.numpy(), theirs.detach().numpy(), rtol=1e-9)


@law(
    "muon",
    hint="Rotate into the singular vectors: each singular value goes through the polynomial by itself.",
)
@given(seed=SEEDS, shape=st.sampled_from(((2, 3), (4, 2), (3, 3), (1, 2))), size=st.sampled_from((1.0, 1e-5)))
def each_singular_value_by_itself(f, seed, shape, size):
    start, *grads = weights_and_gradients(seed, *shape)
    ours, mean, momentum = start, 0 * start, 0 * start.numpy()
    for grad in grads[:2]:
        before = ours
        ours, mean = f(ours, size * grad, mean, 0.1)
        momentum = 0.95 * momentum + 0.05 * size * grad.numpy()
        U, s, V = np.linalg.svd(0.95 * momentum + 0.05 * size * grad.numpy(), full_matrices=False)
        s = s / (s**2).sum() ** 0.5
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        wanted = before.numpy() - 0.1 * max(1, shape[0] / shape[1]) ** 0.5 * (U * s) @ V
        close(ours.numpy(), wanted, rtol=1e-6, atol=1e-8)


SETTINGS = {"lr": 0.05, "matrix_lr": 0.2, "decay": 0.3, "warmup": 2, "cooldown": 0.5}


def small_problem(seed: int, size: float = 1.0) -> tuple[dict[str, Tensor], Callable]:
    """Four weights, of which `late` is read in every second step alone, and terms to lower."""
    rng = np.random.default_rng(seed)
    shapes = {"table": (3, 2), "bias": (2,), "matrix": (2, 2), "late": (2, 2)}
    w = {name: torch.from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()}
    x = torch.from_numpy(rng.standard_normal((8, 3)))

    def loss(w, step):
        terms = {"near": size * ((x @ w["table"] + w["bias"]) @ w["matrix"] - 1).square().mean()}
        return terms | ({"late": (w["late"] - 2).square().sum()} if step % 2 else {})

    return w, loss


@law(
    "train",
    hint="Follow one weight of each kind through three steps: a matrix, a table, a bias, one not read.",
)
@given(seed=st.integers(0, 4), steps=st.sampled_from((1, 2, 6)), size=st.sampled_from((0.01, 30.0)))
def equals_the_librarys_updates(f, seed, steps, size):
    w, loss = small_problem(seed, size)
    told = []
    found = f(
        w, loss, {"matrix"}, steps, **SETTINGS, look=lambda step, w, terms: told.append((step, set(terms)))
    )
    assert told == [(s + 1, {"near"} | ({"late"} if s % 2 else set())) for s in range(steps)], (
        "look: (steps done, w, terms)"
    )
    now = {name: value.clone().requires_grad_() for name, value in w.items()}
    rates = loop.Rates(steps=steps, warmup=2, cooldown=0.5, lr=0.05, matrix_lr=0.2, weight_decay=0.3)
    model = SimpleNamespace(parameters=lambda: list(now.values()))
    adam = loop.optimizers(model, [now["matrix"]], rates)[1]
    mean = 0 * w["matrix"]
    for step in range(steps):
        adam.zero_grad(set_to_none=True)
        now["matrix"].grad = None
        sum(loss(now, step).values()).backward()
        torch.nn.utils.clip_grad_norm_(
            [p for n, p in now.items() if p.grad is not None and n in ("table", "late")], 1.0
        )
        share = loop.rate(rates, step)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * share
        adam.step()
        with torch.no_grad():
            new, mean = build_vilt.muon(now["matrix"], now["matrix"].grad, mean, share * 0.2)
            now["matrix"].copy_(new)
    assert set(found) == set(w), "the trained weights have the names of those that were given"
    for name in w:
        try:
            close(found[name].detach().numpy(), now[name].detach().numpy(), rtol=1e-7, atol=1e-9)
        except AssertionError as error:
            raise AssertionError(f"the weight {name} after {steps} steps: {error}") from None


test_laws = obeys(build_vilt)

z, W, c, U, e = np.ones((1, 2, 4)), np.ones((12, 4)), np.ones(12), np.ones((4, 4)), np.ones(4)
test_refusals = refuses(
    build_vilt,
    [
        ("multi_head", "rows of the maps", (z, np.ones((8, 4)), np.ones(8), U, e), {}, "w_qkv must have 3"),
        ("multi_head", "heads", (z, W, c, U, e), {"heads": 3}, "heads must divide D=4"),
        ("multi_head", "NaN", (z * np.nan, W, c, U, e), {}, "z must not contain NaN"),
        ("multi_head", "output map", (z, W, c, np.ones((4, 3)), e), {}, "w_out must have shape"),
        ("multi_head", "nobody", (z, W, c, U, e), {"mask": np.zeros((1, 1, 1, 2), bool)}, "mask must"),
    ],
)


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_equals_torchs_module(causal):
    """Outside truth: nn.MultiheadAttention, whose weights have the same shapes and order."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_bias.data.normal_()
    theirs.out_proj.bias.data.normal_()
    x = torch.randn(2, 5, 12)
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    maps = theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight, theirs.out_proj.bias
    ours = build_vilt.multi_head(x, *maps, 3, past if causal else None)
    wanted, _ = theirs(x, x, x, attn_mask=~past if causal else None, need_weights=False)
    assert torch.allclose(ours, wanted, atol=1e-5)


def test_muon_equals_torchs():
    """Outside truth, in bfloat16 there: torch.optim.Muon, three steps of it."""
    start, *grads = (x.float() for x in weights_and_gradients(0, 5, 3))
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95)
    ours, mean = start, 0 * start
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
        ours, mean = build_vilt.muon(ours, grad, mean, 0.1)
    assert (ours - theirs).abs().max() < 0.01 < (ours - start).abs().max()


def test_under_takes_a_part():
    assert under({"a.b": 1, "ab": 2, "a.a.b": 3}, "a.") == {"b": 1, "a.b": 3}
