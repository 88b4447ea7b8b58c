"""Laws of asking a generator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import bayes
from minivlp.bayes import debias, pmi, posterior
from tests.held import same_in_float32
from tests.laws import central_differences, close, law, obeys, refuses
from tests.strategies import arrays, sizes


@st.composite
def scores(draw, scale=3.0):
    """loglik (B, C), and sometimes a log_prior (C,)."""
    B, C = draw(sizes(4)), draw(sizes(5))
    loglik = draw(arrays(B, C, scale=scale))
    return (loglik, draw(arrays(C, scale=2.0))) if draw(st.booleans()) else (loglik,)


@law("posterior", hint="Bayes: exp(loglik + log_prior), each row divided by its own sum.")
@given(case=scores())
def is_bayes_rule(f, case):
    joint = np.exp(case[0]) * (1 if len(case) == 1 else np.exp(case[1]))
    close(f(*case), joint / joint.sum(1, keepdims=True))


@law("posterior", hint="Only differences within a row count: nothing overflows, however small p(x | c) is.")
@given(case=scores(), shift=st.sampled_from([-3000.0, 800.0]))
def a_constant_a_row_is_nothing(f, case, shift):
    rows = shift * (1 + np.arange(len(case[0])))[:, None]
    close(f(case[0] + rows, *case[1:]), f(*case), rtol=1e-8)


@law("posterior", hint="A row sums to one: raising one entry lowers the others. Priors enter every row.")
@given(case=scores(), seed=st.integers(0, 99))
def gradients_are_the_slopes(f, case, seed):
    upstream = np.random.default_rng(seed).standard_normal(case[0].shape)
    for which, gradient in enumerate(f.grads(*case, grad=upstream)):
        close(gradient, central_differences(f, case, which, grad=upstream), rtol=1e-6, atol=1e-8)


@law("posterior", hint="float32 comes in, float32 goes out.")
@given(case=scores())
def float32_is_enough(f, case):
    same_in_float32(f, case, {}, near=1e-5)


def world(seed=0, pictures=6, captions=4):
    """A joint table p(x, c) known exactly, whose pictures are not equally likely."""
    rng = np.random.default_rng(seed)
    joint = rng.dirichlet(np.full(pictures * captions, 0.5)).reshape(pictures, captions)
    return joint / joint.sum(0) / captions  # captions equally likely


@law("pmi", hint="log p(x|c) − log p(x), and p(x) is the mean of p(x|c) over the captions: take off its log.")
@given(seed=st.integers(0, 99))
def equals_the_table(f, seed):
    joint = world(seed)
    p_x, p_c = joint.sum(1, keepdims=True), joint.sum(0)
    close(f(np.log(joint / p_c)), np.log(joint / (p_x * p_c)))
    found = f(torch.from_numpy(np.log(joint / p_c)))
    assert torch.is_tensor(found), "a tensor must come back for a tensor"
    close(found.numpy(), np.log(joint / (p_x * p_c)))


@law("pmi", hint="A picture that is likelier under every caption gains nothing by it.")
@given(seed=st.integers(0, 99))
def a_likely_picture_is_no_better(f, seed):
    S = np.random.default_rng(seed).normal(size=(4, 3))
    easy = S + np.array([800.0, 0, -2000, 3])[:, None]
    close(f(easy), f(S), rtol=1e-7, atol=1e-9)
    close(np.exp(f(S)).mean(1), np.ones(4))


@law("debias", hint="The prior is taken off in logarithms: log p(c|x) − α log p(c), the same c in every row.")
@given(seed=st.integers(0, 99), alpha=st.sampled_from([0.0, 0.5, 1.0]))
def takes_the_share_of_the_prior(f, seed, alpha):
    joint = np.random.default_rng(seed).dirichlet(np.ones(12)).reshape(4, 3)
    given_x, p_c = joint / joint.sum(1, keepdims=True), joint.sum(0)
    wanted = [[np.log(given_x[i, j] / p_c[j] ** alpha) for j in range(3)] for i in range(4)]
    close(f(np.log(given_x), np.log(p_c), alpha), wanted)
    close(f(np.log(given_x), np.tile(np.log(p_c), (4, 1)), alpha), wanted)


test_laws = obeys(bayes)

S = np.zeros((2, 3))
test_refusals = refuses(
    bayes,
    [
        ("posterior", "one axis", (S[0],), {}, "loglik must have shape"),
        ("posterior", "no class", (S[:, :0],), {}, "at least one class"),
        ("posterior", "NaN", (S * np.nan,), {}, "loglik must"),
        ("posterior", "prior of another length", (S, np.zeros(2)), {}, "log_prior must have shape"),
        ("pmi", "one axis", (S[0],), {}, "loglik must have shape"),
        ("debias", "prior of another length", (S, np.zeros(2)), {}, "prior_loglik must have shape"),
        ("debias", "alpha", (S, np.zeros(3)), {"alpha": np.inf}, "alpha must be finite"),
    ],
)


def test_raw_columns_mislead_and_pmi_does_not():
    """A picture chosen for a caption: raw likelihoods choose the likeliest picture, information its own."""
    joint = np.full((3, 3), 0.02)
    joint[0] = 0.2, 0.19, 0.19  # likely under every caption
    joint[1, 1] = joint[2, 2] = 0.1
    joint /= joint.sum(0)
    loglik = np.log(joint)
    assert loglik.argmax(0).tolist() == [0, 0, 0] and pmi(loglik).argmax(0).tolist() == [0, 1, 2]
    assert pmi(torch.from_numpy(loglik)).argmax(0).tolist() == [0, 1, 2]


def test_debias_by_one_is_information():
    joint = np.random.default_rng(0).dirichlet(np.ones(12)).reshape(4, 3)
    p_x, p_c = joint.sum(1, keepdims=True), joint.sum(0)
    information = np.log(joint / p_x / p_c)
    close(debias(np.log(joint / p_x), np.log(p_c)), information)
    if np.allclose(p_c, 1 / 3):
        close(pmi(np.log(joint / p_c)), information)


def test_a_uniform_prior_changes_nothing():
    loglik = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(posterior(loglik, torch.full((3,), 7.0, dtype=torch.float64)), posterior(loglik))
    assert torch.equal(posterior(loglik).argmax(1), loglik.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_are_added_up_in_float32(dtype):
    loglik = (torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    found, wanted = posterior(loglik), posterior(loglik.double())
    assert found.dtype == dtype
    assert (found.double() - wanted).abs().max() <= 2 * (
        wanted.to(dtype).double() - wanted
    ).abs().max() + 1e-9
