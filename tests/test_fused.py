"""The fused rungs beside the tile loop's own: the plain rungs' values and gradients, with less kept.

Alignment by transport, attention, noise-contrastive estimation and the patch embedding, at shapes beyond
those of the laws: several groups, blocks and tiles, padding, half precisions.
"""

import numpy as np
import pytest
import torch

from minivlp import attention, ipot, nce, patch, sinkhorn, stream
from minivlp.core import transport


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def lengths(size: int, *real: int) -> torch.Tensor:
    """A mask (B, size) with as many True in front as `real` says."""
    return torch.arange(size) < torch.tensor(real)[:, None]


def arguments(name: str, M: int = 12, N: int = 18, D: int = 6) -> tuple[list[torch.Tensor], dict]:
    """Arrays to differentiate and settings; M and N are rows and columns of what a plain rung makes."""
    if name == "wpa":
        masks = {"word_mask": lengths(M, M, 1, M - 5), "patch_mask": lengths(N, 3, N, N - 7)}
        return [numbers(3, M, D), numbers(3, N, D)], masks
    if name == "sinkhorn_cost":
        return [numbers(M, D), numbers(N, D)], {"eps": 0.2, "iters": 20}
    if name == "attention":
        mask = numbers(2, 1, M, N) > -0.5
        mask[..., 0] = True
        return [numbers(2, 2, n, D, seed=i) for i, n in enumerate((M, N, N))], {"mask": mask, "causal": True}
    if name == "nce":
        return [numbers(M), numbers(M, N), numbers(M) - 1, numbers(M, N) - 1], {}
    return [numbers(2, 3, 4 * M, 2 * N), numbers(D, 3, 2, 2), numbers(D)], {}


PLAIN = {
    "wpa": ipot.RUNGS["wpa"]["torch"],
    "sinkhorn_cost": sinkhorn.RUNGS["sinkhorn_cost"]["torch"],
    "attention": attention.RUNGS["attention"]["torch"],
    "nce": nce.RUNGS["nce"]["torch"],
    "patch_embed": patch.RUNGS["patch_embed"]["torch"],
}
FUSED = {
    "wpa": ipot.RUNGS["wpa"]["fused"],
    "sinkhorn_cost": sinkhorn.RUNGS["sinkhorn_cost"]["fused"],
    "attention": attention.RUNGS["attention"]["fused"],
    "nce": nce.RUNGS["nce"]["fused"],
    "patch_embed": patch.RUNGS["patch_embed"]["fused"],
}


@pytest.fixture
def small_pieces(monkeypatch):
    """Groups, blocks and tiles so small that every loop over them takes several turns, the last shorter."""
    monkeypatch.setattr(ipot, "GROUP", 2 * 12 * 18)
    monkeypatch.setattr(transport, "BLOCK", 100)
    monkeypatch.setattr(nce, "BLOCK", 50)
    monkeypatch.setattr(stream, "TILE", (5, 4))


def value_and_gradients(f, arrays, settings, dtype=torch.float64, wanted=None):
    """[value, *gradients], in float64, of Σ value · upstream with an upstream far from one."""
    arrays = [
        z.detach().to(dtype).requires_grad_(wanted is None or i in wanted) for i, z in enumerate(arrays)
    ]
    value = f(*arrays, **settings)
    assert value.dtype == dtype
    upstream = 3 * numbers(*value.shape, seed=9).to(dtype)
    found = torch.autograd.grad(value, [z for z in arrays if z.requires_grad], upstream)
    assert all(g.dtype == dtype for g in found)
    return [z.detach().double() for z in (value, *found)]


@pytest.mark.parametrize("name", FUSED)
def test_is_the_plain_rung_piece_by_piece(name, small_pieces):
    arrays, settings = arguments(name)
    wanted = value_and_gradients(PLAIN[name], arrays, settings)
    for got, expected in zip(value_and_gradients(FUSED[name], arrays, settings), wanted, strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_at_most_twice_as_much_as_the_plain_rung(name, dtype, small_pieces):
    """Against float64 on the same rounded numbers; the largest entry of each array sets its scale."""
    arrays, settings = arguments(name)
    arrays = [z.to(dtype).double() for z in arrays]
    exact = value_and_gradients(PLAIN[name], arrays, settings)
    plain, fused = (value_and_gradients(f[name], arrays, settings, dtype) for f in (PLAIN, FUSED))
    for reference, theirs, ours in zip(exact, plain, fused, strict=True):
        largest = reference.abs().max()
        allowed = 2 * (theirs - reference).abs().max() + 4 * torch.finfo(dtype).eps * largest
        assert (ours - reference).abs().max() <= allowed


@pytest.mark.parametrize("name", FUSED)
def test_takes_views_and_frozen_sides_and_gives_the_same_gradient_twice(name, small_pieces):
    arrays, settings = arguments(name)
    views = [z.transpose(0, -1).contiguous().transpose(0, -1) for z in arrays]
    assert not views[1].is_contiguous() or name == "patch_embed"
    whole = value_and_gradients(FUSED[name], arrays, settings)
    for kept in ([0], [1], [0, 1]):
        found = value_and_gradients(FUSED[name], views, settings, wanted=kept)
        for got, expected in zip(found, [whole[0], *(whole[1 + i] for i in kept)], strict=True):
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-13)
    arrays = [z.clone().requires_grad_() for z in arrays]
    value = FUSED[name](*arrays, **settings).square().sum()
    first, second = (torch.autograd.grad(value, arrays, retain_graph=True) for _ in "ab")
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with torch.no_grad():
        assert not FUSED[name](*arrays, **settings).requires_grad


def kept_numbers(f, arrays, settings) -> float:
    """Float64 numbers that the graph holds for the backward pass, those of the arguments not counted."""
    tensors = [z for z in (*arrays, *settings.values()) if isinstance(z, torch.Tensor)]
    given = {z.untyped_storage().data_ptr() for z in tensors}
    kept = {}

    def pack(z):
        kept[z.untyped_storage().data_ptr()] = z.untyped_storage().nbytes() / 8
        return z

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda z: z):
        held = f(*arrays, **settings)
    assert held.requires_grad
    return sum(n for place, n in kept.items() if place not in given)


# What a fused rung may keep beside its arguments: a potential a token; both gradients; the output and one
# logsumexp a query; a slope a score; nothing.
KEPT = {
    "wpa": lambda words, patches: words[..., 0].numel() + patches[..., 0].numel(),
    "sinkhorn_cost": lambda x, y: x.numel() + y.numel(),
    "attention": lambda q, k, v: q.numel() + q[..., 0].numel(),
    "nce": lambda data, noise, *_: data.numel() + noise.numel(),
    "patch_embed": lambda *_: 0,
}


@pytest.mark.parametrize("name", FUSED)
def test_keeps_no_matrix_for_the_backward_pass(name):
    """The plain rungs keep the plan, P, the scores or the patches: M × N numbers, and twice the bound."""
    M, N = 60, 90
    arrays, settings = arguments(name, M, N, 2)
    arrays = [z.requires_grad_() for z in arrays]
    assert kept_numbers(FUSED[name], arrays, settings) <= KEPT[name](*arrays)
    assert kept_numbers(PLAIN[name], arrays, settings) >= max(M * N, 2 * KEPT[name](*arrays))


@pytest.mark.parametrize("name", ["wpa", "sinkhorn_cost", "attention", "nce"])
def test_a_gradient_of_its_gradient_is_refused(name):
    arrays, settings = arguments(name)
    value = FUSED[name](*[z.requires_grad_() for z in arrays], **settings).sum()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(value, arrays, create_graph=True)


def structured(M: int, N: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and patches as trained ones: a patch lies near a word or opposite to one, costs from 0 to 2."""
    words = torch.nn.functional.normalize(numbers(3, M, 16, seed=seed), dim=-1)
    near = torch.randint(M, (3, N), generator=torch.Generator().manual_seed(seed))
    patches = words[torch.arange(3)[:, None], near] * torch.where(numbers(3, N, 1) > -0.5, 1.0, -1.0)
    return words, patches + 0.02 * numbers(3, N, 16, seed=seed + 1)


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("M, N", [(8, 36), (1, 20), (20, 1)])
def test_alignment_of_trained_tokens(M, N, beta):
    """T holds exp(−50 · 2/β), that is e^−200 to e^−5000: in no float32, for two of the β in no float64."""
    words, patches = structured(M, N)
    if min(M, N) > 1:
        cosines = words @ torch.nn.functional.normalize(patches, dim=-1).mT
        assert float(cosines.amax() - cosines.amin()) > 1.9
    settings = {"beta": beta, "iters": 50}
    exact = value_and_gradients(ipot.wpa, [words, patches], settings)
    for got, expected in zip(
        value_and_gradients(ipot.wpa_fused, [words, patches], settings), exact, strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))
    single = [z.float().double() for z in (words, patches)]
    exact = value_and_gradients(ipot.wpa, single, settings)
    plain, fused = (
        value_and_gradients(f, single, settings, torch.float32) for f in (ipot.wpa, ipot.wpa_fused)
    )
    for reference, theirs, ours in zip(exact, plain, fused, strict=True):
        allowed = 2 * (theirs - reference).abs().max() + 4 * 2**-23 * reference.abs().max()
        assert (ours - reference).abs().max() <= allowed


def test_the_form_of_the_solver_follows_from_the_range_of_the_costs():
    """The largest float32 is e^88.7: three quarters are 66, a quarter is 22; of float64 532 and 177."""
    single, double = (torch.tensor([[0.0, -1.0]], dtype=d) for d in (torch.float32, torch.float64))
    assert [transport.safe_steps(single * r) for r in (4, 22, 23)] == [5, 1, 0]
    assert [transport.safe_steps(double * r) for r in (4, 177, 178)] == [44, 1, 0]
    assert transport.exponent_budget(single * 66) >= 1 > transport.exponent_budget(single * 67)
    assert transport.safe_steps(single * 0) > 10**6  # equal costs: one base serves for ever


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reach", [0.0, 3.0, 21.9, 23.0, 170.0, 600.0])
def test_both_forms_solve_hard_costs(reach, dtype):
    """Costs of 0 and `reach` alone; all rows wanting one column; a chain in which each outbids the next."""
    L, N = 9, 14
    steps = (torch.arange(L)[:, None] / (L - 1) - (torch.arange(N) / (N - 1)) ** 3).abs()
    one_column = 1 - torch.eye(N)[:1].expand(L, N) + 1e-3 * numbers(L, N).abs()
    C = torch.stack([(numbers(L, N) > -1).double(), one_column.double(), steps.double()])
    C = (reach * C / C.amax((1, 2), keepdim=True)).to(dtype)
    mu, nu = C.new_full((3, L, 1), 1 / L), C.new_full((3, 1, N), 1 / N)
    exact = ipot.ipot(C.double(), beta=1.0, iters=30)
    u, v = transport.ipot_scalings(-C, torch.zeros_like(C, dtype=torch.bool), mu, nu, 30)
    T = transport.gibbs(-C, u, v, torch.empty_like(C), 30).double()
    off = 30 * (1 + reach) * torch.finfo(dtype).eps  # rounding the costs alone turns T by this factor
    assert (T - exact).abs().sum((1, 2)).max() < 4 * off
    plan = transport.sinkhorn_scaled(-C[2], mu[0], nu[0], 30).double()
    assert (plan - sinkhorn.sinkhorn(C[2].double(), eps=1.0, iters=30)).abs().sum() < 4 * off


def test_a_batch_without_pairs_and_marginals_with_zeros():
    """No pair, no value; a token without weight has no gradient; weights may be off by their rounding."""
    empty = numbers(0, 3, 4).requires_grad_()
    value = ipot.wpa_fused(empty, numbers(0, 5, 4))
    assert value.shape == (0,)
    assert torch.autograd.grad(value.sum(), empty)[0].shape == (0, 3, 4)
    x, y = numbers(6, 4).requires_grad_(), numbers(9, 4)
    a = torch.tensor([0, 0.25, 0.25, 0, 0.5, 0]).double()
    for eps in (0.5, 1e-3):  # product form, and logarithms
        plain, fused = (
            f(x, y, a * (1 + 4e-7), eps=eps) for f in (sinkhorn.sinkhorn_cost, FUSED["sinkhorn_cost"])
        )
        assert abs(float((plain / fused).detach()) - 1) < 1e-9
        (gradient,) = torch.autograd.grad(fused, x)
        assert not gradient[a == 0].any()
        assert bool(gradient[a > 0].any(1).all())


def test_infinite_tokens_are_refused():
    for family, first, x in (("wpa", "words", numbers(2, 3, 4)), ("sinkhorn_cost", "x", numbers(3, 4))):
        for f in (PLAIN[family], FUSED[family]):
            with pytest.raises(ValueError, match=f"{first} must be finite, got 1 infinite entries"):
                f(torch.where(x == x.max(), np.inf, x), x)


def test_a_query_whose_first_keys_are_all_forbidden(small_pieces):
    """Its running softmax meets whole tiles without a key before the first real one, and after the last."""
    arrays, _ = arguments("attention")
    mask = torch.zeros(12, 18, dtype=torch.bool)
    mask[torch.arange(12), torch.arange(12) + 3] = True
    for got, expected in zip(
        *(value_and_gradients(f["attention"], arrays, {"mask": mask}) for f in (FUSED, PLAIN)), strict=True
    ):
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-14)
