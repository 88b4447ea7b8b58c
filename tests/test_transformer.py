"""Laws of LayerNorm; the block and the encoder against torch's own transformer layer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import transformer
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, widths

EPS = 0.1  # large enough to see where it stands


@st.composite
def cases(draw):
    """x (…, D) with one, two or three axes, weight (D,), bias (D,)."""
    D = draw(widths(5))
    leading = draw(st.sampled_from([(), (3,), (2, 3)]))
    return draw(arrays(*leading, D)), draw(arrays(D)), draw(arrays(D))


@law("layer_norm", hint="Per row: subtract the mean, divide by √(variance + eps), times weight, plus bias.")
@given(case=cases())
def equals_the_slow_loop(f, case):
    x, weight, bias = case
    out = f(x, weight, bias, eps=EPS)
    for place in np.ndindex(x.shape[:-1]):
        row, D = x[place], x.shape[-1]
        mean = sum(row) / D
        spread = (sum((value - mean) ** 2 for value in row) / D + EPS) ** 0.5
        close(out[place], np.array([(row[i] - mean) / spread * weight[i] + bias[i] for i in range(D)]))


@law("layer_norm", hint="Subtract the mean before squaring: E[x²] − E[x]² loses all digits far from zero.")
@given(case=cases())
def ignores_a_common_shift(f, case):
    x, weight, bias = case
    # x + 2²⁷ is exact to 2⁻²⁵; x² then has 2⁵⁴, where neighbouring float64 numbers are 4 apart.
    close(f(x + 2.0**27, weight, bias, eps=EPS), f(x, weight, bias, eps=EPS), rtol=1e-5, atol=1e-5)


@law(
    "layer_norm",
    hint="Mean and variance depend on all entries of a row: dx has three parts.",
)
@given(case=cases(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal(case[0].shape)
    for which, gradient in enumerate(f.grads(*case, grad=upstream, eps=EPS)):
        slope = central_differences(lambda *a: f(*a, eps=EPS), case, which, grad=upstream)
        close(gradient, slope, rtol=1e-6, atol=1e-7)


@law("layer_norm", hint="Where all entries of a row are equal the divisor is √eps, and the gradient finite.")
@given(
    case=cases(),
    eps=st.sampled_from([1e-6, 1e-2]),
    level=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 99),
)
def constant_rows_are_divided_by_root_eps(f, case, eps, level, seed):
    x, weight, bias = case
    x = x * 0 + level
    close(f(x, weight, bias, eps=eps), np.broadcast_to(bias, x.shape))
    upstream = np.random.default_rng(seed).standard_normal(x.shape)
    g = weight * upstream
    wanted = (g - g.mean(-1, keepdims=True)) / eps**0.5
    dx, dweight, _ = f.grads(x, weight, bias, grad=upstream, eps=eps)
    close(dx, wanted, rtol=1e-9, atol=1e-9)
    close(dweight, np.zeros_like(weight))


@law("layer_norm", hint="The slope of a row is as small as the row is long, and as steep as it is short.")
@given(case=cases(), length=st.sampled_from([1e-2, 1e4, 1e7]), seed=st.integers(0, 99))
def long_rows_turn_slowly(f, case, length, seed):
    x, weight, bias = case
    upstream = np.random.default_rng(seed).standard_normal(x.shape)
    eps = 1e-6
    dx, *_ = f.grads(length * x, weight, bias, grad=upstream, eps=eps)
    # LN(c x) with eps is LN(x) with eps / c², so their slopes differ by the factor c.
    other, *_ = f.grads(x, weight, bias, grad=upstream, eps=eps / length**2)
    close(length * dx, other, rtol=1e-6, atol=1e-9)


@law("layer_norm", hint="float32 comes in, float32 goes out.")
@given(case=cases())
def float32_is_enough(f, case):
    same_in_float32(f, case, {"eps": EPS}, near=1e-5)


test_laws = obeys(transformer)

x, w, b = np.ones((2, 3)), np.ones(3), np.ones(3)
test_refusals = refuses(
    transformer,
    [
        ("layer_norm", "weight too long", (x, np.ones(4), b), {}, "weight must have shape"),
        ("layer_norm", "bias too long", (x, w, np.ones(4)), {}, "bias must have shape"),
        ("layer_norm", "NaN", (x * np.nan, w, b), {}, "x must not contain NaN"),
        ("layer_norm", "integers", (x.astype(int), w, b), {}, "x must have a floating dtype"),
        ("layer_norm", "eps", (x, w, b), {"eps": 0.0}, "eps must be a finite number > 0"),
    ],
)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_layer_norm_equals_torch(dtype, tolerance):
    """Outside truth, which the blocks use: torch.nn.functional.layer_norm; on a view, twice backward."""
    x = torch.randn(7, 2, 3, dtype=dtype).permute(1, 2, 0).requires_grad_()
    weight, bias = torch.randn(7, dtype=dtype), torch.randn(7, dtype=dtype, requires_grad=True)
    out = transformer.layer_norm(x, weight, bias, 1e-6)
    expected = torch.nn.functional.layer_norm(x, (7,), weight, bias, 1e-6)
    assert out.dtype == dtype
    assert torch.allclose(out, expected, atol=tolerance)
    upstream = torch.randn(2, 3, 7, dtype=dtype)
    first = torch.autograd.grad(out, (x, bias), upstream, retain_graph=True)
    second = torch.autograd.grad(out, (x, bias), upstream)
    reference = torch.autograd.grad(expected, (x, bias), upstream)
    for one, two, three in zip(first, second, reference, strict=True):
        assert torch.equal(one, two)
        assert torch.allclose(one, three, atol=10 * tolerance)


@pytest.mark.parametrize("how", ["plain", "mask", "causal"])
def test_block_equals_torch(how):
    """Outside truth: torch's TransformerEncoderLayer, norm_first, with the exact GELU, on equal weights."""
    torch.manual_seed(0)
    block = transformer.Block(dim=12, heads=3, hidden=20, eps=1e-3)
    for parameter in block.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    layer = torch.nn.TransformerEncoderLayer(
        12, 3, 20, dropout=0.0, activation="gelu", layer_norm_eps=1e-3, batch_first=True, norm_first=True
    )
    names = {"in_proj_": "qkv.", "out_proj.": "proj.", "linear1.": "fc1.", "linear2.": "fc2."}
    state = {}
    for name in layer.state_dict():
        ours = name.removeprefix("self_attn.")
        for theirs, mine in names.items():
            ours = ours.replace(theirs, mine)
        state[name] = block.state_dict()[ours]
    layer.load_state_dict(state)
    x = torch.randn(2, 5, 12)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    ours = {"plain": {}, "mask": {"mask": real[:, None, None]}, "causal": {"causal": True}}[how]
    theirs = {"plain": {}, "mask": {"src_key_padding_mask": ~real}, "causal": {"src_mask": ~past}}[how]
    keep = real if how == "mask" else torch.ones_like(real)  # torch may return zeros under padding
    layer.train()  # its inference path has kernels of its own
    assert torch.allclose(block(x, **ours)[keep], layer(x, **theirs)[keep], atol=1e-5)


def test_encoder_is_blocks_and_a_final_norm():
    torch.manual_seed(0)
    encoder = transformer.Encoder(dim=8, heads=2, hidden=16, layers=3, eps=1e-3)
    x = torch.randn(2, 4, 8)
    z = x
    for block in encoder.blocks:
        z = block(z)
    expected = transformer.layer_norm(z, encoder.norm.weight, encoder.norm.bias, 1e-3)
    assert torch.allclose(encoder(x), expected, atol=1e-6)
    rows = encoder(x).detach()
    assert rows.mean(-1).abs().max() < 1e-6


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads must divide dim=8, got 3"):
        transformer.Block(dim=8, heads=3, hidden=16)


def test_initial_weights():
    """BERT's: std 0.02, biases 0, norms the identity."""
    torch.manual_seed(0)
    block = transformer.Block(dim=64, heads=4, hidden=256)
    assert all(abs(m.weight.std() - 0.02) < 0.001 for m in (block.qkv, block.proj, block.fc1, block.fc2))
    assert all((m.bias == 0).all() for m in (block.qkv, block.proj, block.fc1, block.fc2))
    assert (block.norm1.weight == 1).all() and (block.norm1.bias == 0).all()


@pytest.mark.parametrize("how", ["plain", "mask", "causal"])
def test_the_first_tokens_alone(how):
    """The last block may compute the first tokens alone: the same rows, and the same gradients of them."""
    torch.manual_seed(0)
    encoder = transformer.Encoder(dim=8, heads=2, hidden=16, layers=2, eps=1e-3)
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, real = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [True, True, False, True, False]])
    settings = {"plain": {}, "mask": {"mask": real[:, None, None]}, "causal": {"causal": True}}[how]
    for first in (1, 3, 5):
        some, everything = encoder(x, **settings, first=first), encoder(x, **settings)[:, :first]
        assert some.shape == (2, first, 8)
        torch.testing.assert_close(some, everything)
        upstream, weights = torch.randn_like(some), list(encoder.parameters())
        ours, all_rows = (torch.autograd.grad(out, weights, upstream) for out in (some, everything))
        for a, b in zip(ours, all_rows, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_heads_are_split_and_joined():
    x = torch.arange(24.0).view(1, 3, 8)
    split = transformer.split_heads(x, 2)
    assert split.shape == (1, 2, 3, 4) and split[0, 1, 2].tolist() == [20, 21, 22, 23]
    assert split.data_ptr() == x.data_ptr() and torch.equal(transformer.join_heads(split), x)


def test_a_mask_that_hides_nothing_is_none():
    mask = torch.tensor([[True, True], [True, False]])
    assert transformer.key_mask(mask[:1]) is None
    assert torch.equal(transformer.key_mask(mask), mask[:, None, None])
