# %% [markdown]
# # 10 · Energy to NCE
#
# **The question.** Below are two rows of drawings. One row was drawn from a bag whose contents nobody told
# you, the other from a bag that you filled yourself. If you can say of any drawing, with honest odds, which
# bag it came from, what do you know about the first bag?
#
# Everything, it turns out: how often each drawing lies in it, as probabilities that sum to one, although
# nobody ever summed them. That is noise-contrastive estimation (NCE). It turns the hardest part of a
# probability model, its normaliser, into a yes-or-no question, and the losses of chapters 12 and 13 are that
# question asked of pictures and captions.
#
# You need: chapter 01, logarithms and Bayes' rule. Plan for two and a half hours with the three exercises.

# %%
import os
import sys
from pathlib import Path

here = Path(globals().get("__file__", "chapter")).resolve()  # a script knows its file, a notebook its folder
places = (*here.parents, *here.parent.glob("*/"))
root = next((p for p in places if os.path.isfile(p / "minivlp/ipot.py")), None)  # in a closed folder is none
if root is None:
    raise RuntimeError("minivlp is not here: clone it beside this notebook (Colab) or start in a clone")
sys.path.insert(0, str(root))

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp import nce
from minivlp.data import CPU_NOUNS, load_emojivl
from tests import check
from tests.bugs import nce as bugs

np.set_printoptions(precision=3, suppress=True)

# %%
emojivl = load_emojivl()
things = emojivl.nouns(CPU_NOUNS[:8])
rng = np.random.default_rng(0)
energy = np.array([0.0, 2.5, 1.0, 3.0, 0.5, 2.0, 3.5, 1.5])  # of the first bag; small = frequent
p_data = np.exp(-energy) / np.exp(-energy).sum()
q = np.array([4.0, 3, 1, 3, 3, 1, 3, 2]) / 20  # of the second bag, which is ours

fig, axes = plt.subplots(2, 10, figsize=(7.5, 1.9), constrained_layout=True)
for row, share, name in zip(axes, (p_data, q), ("bag 1", "bag 2"), strict=True):
    for ax, u in zip(row, rng.choice(8, 10, p=share), strict=True):
        ax.imshow(emojivl.sheets["noto"][things[u].id])
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(name)
plt.show()
assert (p_data**2).sum() > 1.5 * (q**2).sum()  # the probability that two drawings of a bag are the same

# %% [markdown]
# What to see: the first row repeats itself more. One drawing alone decides nothing; a rare one of bag 1 that
# is common in bag 2 says more than any other.
#
# ## An energy is cheap, a probability is not
#
# Let $u$ be one of the things that can happen: here one of eight drawings. An **energy-based model** gives
# every $u$ a number $E(u)$, as it likes, and means by it the probability
#
# $$p(u) = \frac{e^{-E(u)}}{Z}, \qquad Z = \sum_v e^{-E(v)}.$$
#
# Low energy means likely. Any network with one output is such an $E$, and so is a score: the entry $S_{ij}$
# of chapter 01 is the negative energy of picture $i$ with caption $j$. Only the **normaliser** $Z$ makes
# probabilities of energies. Three things, by hand:

# %%
E3 = np.array([0.0, 1.0, 2.0])
Z3 = np.exp(-E3).sum()
p3 = np.exp(-E3) / Z3
print(
    "exp(−E) =",
    np.exp(-E3),
    f"  Z = {Z3:.4f}, log Z = {np.log(Z3):.4f}\np       =",
    p3,
    f"  sum {p3.sum():.4f}",
)

# %% [markdown]
# With eight things $Z$ is a sum of eight terms. With captions or pictures it is not a sum that anyone will
# finish:

# %%
for what, log10 in (
    ("captions of 8 words out of 500", 8 * np.log10(500)),
    ("pictures of 28 × 28 pixels, 3 × 8 bits each", 28 * 28 * 3 * np.log10(256)),
):
    print(f"{what:<44} 10^{log10:.0f} terms in Z")

# %% [markdown]
# Can we avoid it? Maximum likelihood asks for a high $\log p(u) = -E(u) - \log Z$ at the data. Its gradient
# in the weights of $E$ has two parts, and the second is an average over everything, since
#
# $$-\nabla \log Z = -\frac1Z \sum_v \nabla e^{-E(v)} = \sum_v p(v)\, \nabla E(v), \qquad
#   \nabla \log p(u) = -\nabla E(u) + \sum_v p(v)\, \nabla E(v).$$
#
# In words: lower the energy of what was seen, raise the energy of what the model itself believes in. The
# second part cannot be left out: without it the best $E$ is $-\infty$ everywhere. But it is a mean over the
# model's own distribution, and a mean can be estimated from samples. Such samples need no $Z$. The
# **Metropolis algorithm** walks: from the present thing $u$ it proposes another, $v$, and goes there with the
# probability $\min(1, e^{E(u) - E(v)})$, where only a difference of energies occurs. In the long run it
# stands on each thing as often as $e^{-E}/Z$ says. **Langevin's method** walks among vectors of numbers by
# the gradient of $E$, which has no $Z$ in it either; its error falls with its step. Here is Metropolis's walk
# on the eight drawings. A proposal is any of them, or only a neighbour on a ring. Last, on the ring, the
# likely drawings stand on two islands with a wall of energy between them.

# %%
islands = np.array([0.0, 1.0, 14.0, 14.0, 0.5, 1.5, 14.0, 14.0])


def metropolis(E, neighbours, steps, seed):
    """The share of the steps at which the walk stood on each of the eight things; it begins on thing 0."""
    draw, u, visits = np.random.default_rng(seed), 0, np.zeros(8)
    jumps = draw.choice([-1, 1], steps) if neighbours else draw.integers(1, 8, steps)
    for jump, coin in zip(jumps, draw.random(steps), strict=True):
        v = (u + jump) % 8
        if coin < np.exp(E[u] - E[v]):
            u = v
        visits[u] += 1
    return visits / steps


for name, E, neighbours in (
    ("any other thing", energy, False),
    ("a neighbour", energy, True),
    ("a neighbour, islands", islands, True),
):
    p = np.exp(-E) / np.exp(-E).sum()
    wrong = [np.abs(metropolis(E, neighbours, 20_000, seed) - p).max() for seed in range(3)]
    print(f"proposal: {name:<21} largest error of a probability in three walks {np.array(wrong)}")
    assert max(wrong) < 0.05 if E is energy else min(wrong) > 0.2

# %% [markdown]
# What to see: without knowing $Z$, the walk finds all probabilities to a few hundredths. Between the islands
# it fails. To get from one to the other it has to step on things of probability near $e^{-14}$, and in 20,000
# steps it did not. This is the true obstacle. Samples are easy to begin with and hard to
# **mix**: the walk must visit every region that matters, and in many dimensions it may not do so in any time
# that one has.
#
# Training needs samples after every step, as the energies have changed, but they need not be drawn from the
# beginning. *Contrastive divergence* (Hinton 2002) takes a few steps of the walk that start at the data.
# *Persistent* contrastive divergence (Tieleman 2008) goes on where the walk of the last update stood. *Score
# matching* (Hyvärinen 2005) avoids samples: it fits the gradient of $\log p$ in $u$, which is $-\nabla_u E$
# and has no $Z$ in it, and *denoising* score matching (Vincent 2011) fits it at data to which noise was
# added. This chapter takes another road.
#
# ## Another question: data or noise?
#
# Let $p_{\text{data}}$ be the distribution that the data come from. NCE adds samples that are easy to draw
# and whose density is known, the **noise** $q$: for each sample of data take $K$ of noise, shuffle, and ask
# of every one where it came from. Before looking, the odds are 1 to $K$. Having seen $u$, Bayes' rule says
#
# $$\frac{P(\text{data} \mid u)}{P(\text{noise} \mid u)} = \frac{p_{\text{data}}(u)}{K\, q(u)}, \qquad
#   h(u) := \log\frac{p_{\text{data}}(u)}{K\,q(u)} = \log p_{\text{data}}(u) - \log q(u) - \log K.$$
#
# $h$ is called the *log-odds*, and $P(\text{data} \mid u) = \sigma(h(u))$ with the logistic function
# $\sigma(t) = 1/(1 + e^{-t})$. We do not know $\log p_{\text{data}}$. So put a model's **score** $f(u)$ in
# its place: any number, for instance $f(u) = -E(u) - c$ with one more weight $c$ in the role of $\log Z$.
# Then learn it like every classifier, by what the right answer costs: minus the logarithm of its probability,
# in *nats* when the logarithm is natural. With $\operatorname{softplus}(t) = \log(1 + e^t)$,
#
# $$-\log \sigma(h) = \operatorname{softplus}(-h), \qquad -\log(1 - \sigma(h)) = \operatorname{softplus}(h),$$
#
# and with $B$ samples of data $u_b$ and $K$ of noise $v_{bk}$ for each, the loss is
#
# $$L = \frac1B \sum_b \Big[ \operatorname{softplus}(-h(u_b)) + \sum_k \operatorname{softplus}(h(v_{bk}))
#   \Big], \qquad h = f - \log q - \log K.$$
#
# Our three things again, with uniform noise, $K = 2$, and a model that says $f = -E$, forgetting $\log Z$:

# %%
data3, noise3, K = np.array([0, 0, 1]), np.array([[0, 1], [2, 0], [1, 2]]), 2
f3, log_q3 = -E3, np.full(3, np.log(1 / 3))
args = (f3[data3], f3[noise3], log_q3[data3], log_q3[noise3])
h_data, h_noise = (args[i] - args[i + 2] - np.log(K) for i in (0, 1))
print("h of the data ", h_data, "  P(data) =", 1 / (1 + np.exp(-h_data)))
print("h of the noise\n", h_noise)
costs = np.log1p(np.exp(-h_data)) + np.log1p(np.exp(h_noise)).sum(1)
print("\ncost of each row", costs, f"  L = {costs.mean():.4f}; nce_np says {nce.nce_np(*args)[0]:.4f}")

# %% [markdown]
# ## The gradient by hand
#
# The derivative of softplus is $\sigma$: $\frac{d}{dt}\log(1 + e^t) = e^t/(1 + e^t)$. So a sample of data
# receives $-\sigma(-h) / B = (\sigma(h) - 1)/B$ and a sample of noise $\sigma(h)/B$. With a *label* of 1 for
# data and 0 for noise this is one line, and $h = f - \log q - \log K$ passes it on:
#
# $$\frac{\partial L}{\partial h} = \frac{\sigma(h) - \text{label}}{B}, \qquad
#   \frac{\partial L}{\partial f} = \frac{\partial L}{\partial h}, \qquad
#   \frac{\partial L}{\partial \log q} = -\frac{\partial L}{\partial h}.$$
#
# Belief minus truth, as in every logistic regression. There is one subtlety for the computer: near certainty
# $1 - \sigma(h)$ would lose all its digits, and $\sigma(-h) = e^{-\operatorname{softplus}(h)}$ keeps them.

# %%
dh_data, dh_noise = -np.exp(-np.logaddexp(0, h_data)) / 3, np.exp(-np.logaddexp(0, -h_noise)) / 3
print("dL/df of the data ", dh_data, "\ndL/df of the noise\n", dh_noise)

step, slopes = 1e-5, np.zeros((3, 2))
for index in np.ndindex(slopes.shape):
    bump = np.zeros((3, 2))
    bump[index] = step
    up, down = (nce.nce_np(args[0], args[1] + sign * bump, *args[2:])[0] for sign in (1, -1))
    slopes[index] = (up - down) / (2 * step)
tensors = [torch.tensor(a, requires_grad=True) for a in args]
logits = torch.cat([tensors[0] - tensors[2], (tensors[1] - tensors[3]).flatten()]) - np.log(K)
labels = torch.tensor([1.0] * 3 + [0.0] * 6, dtype=torch.float64)
torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum").div(3).backward()
hand = (dh_data, dh_noise, -dh_data, -dh_noise)
worst = max(np.abs(t.grad.numpy() - g).max() for t, g in zip(tensors, hand, strict=True))
assert np.abs(dh_noise - slopes).max() < 1e-8 and worst < 1e-12
print(f"\nwithin 1e-8 of the slopes:                   {np.abs(dh_noise - slopes).max() < 1e-8}")
print(f"all four within 1e-12 of autograd's:         {worst < 1e-12}")

# %% [markdown]
# **Exercise 1** · `nce_np` · difficulty 2 of 3 · 30 minutes. **Exercise 2** · `nce` · difficulty 1 · 10
# minutes. Open `chapters/exercises/nce.py`, replace `raise Todo`, and run the next cell. There `score` is $f$
# and `logp` is $\log q$. For the second, `torch.nn.functional.logsigmoid` does most of the work.

# %%
check("nce_np", "nce")

# %% [markdown]
# ## Why the best score is the normalised log-density
#
# Let the samples become so many that sums turn into probabilities. The thing $u$ arrives as data with
# frequency $p_{\text{data}}(u)$ and as noise with frequency $K q(u)$, so the loss is a sum over things,
#
# $$\bar L = \sum_u \Big[ p_{\text{data}}(u) \operatorname{softplus}(-h(u)) + K q(u)
#   \operatorname{softplus}(h(u)) \Big],$$
#
# and if every $f(u)$ is free, each can be chosen alone. Its derivative is
#
# $$\frac{\partial \bar L}{\partial f(u)} = -p_{\text{data}}(u)\,(1 - \sigma(h)) + K q(u)\, \sigma(h),$$
#
# a pull of the data and a push of the noise. They cancel where $\sigma/(1-\sigma) = p_{\text{data}}/Kq$. The
# left side is $e^{h} = e^{f}/Kq$, so $e^{f(u)} = p_{\text{data}}(u)$. The second derivative,
# $(p_{\text{data}} + Kq)\,\sigma(1 - \sigma)$, is positive, so there is no other minimum. **The best score is
# $\log p_{\text{data}}$ itself, normaliser included**, at every $u$ that the noise reaches. If $q(u) = 0$ the
# log-odds are infinite whatever $f(u)$ is, and nothing is learned; if $q(u)$ is so small that no noise falls
# on $u$, nothing pushes, and the score runs away. Where the scores come from a network instead of a table,
# the same is sought among what the network can express.
#
# Let us watch it. The scores are a table of eight numbers that start at 0, so that "probabilities" sum to
# eight. We draw from the two bags and go downhill. Beside the library's loss run two plausible mistakes: one
# forgets $\log K$, one leaves $\log q$ out of the log-odds.

# %%
torch.set_num_threads(1)
B, K = 2000, 4
data = torch.from_numpy(rng.choice(8, B, p=p_data))
noise = torch.from_numpy(rng.choice(8, (B, K), p=q))
log_q = torch.from_numpy(np.log(q))
losses = {
    "nce": nce.nce,
    "log K forgotten": bugs.log_K_forgotten,
    "log q left out": bugs.noise_density_left_out,
}
learned, sums = {}, {}
for name, loss in losses.items():
    f = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([f], lr=0.1)
    sums[name] = []
    for _ in range(200):
        sums[name].append(f.detach().exp().sum().item())
        optimizer.zero_grad()
        loss(f[data], f[noise], log_q[data], log_q[noise]).backward()
        optimizer.step()
    learned[name] = f.detach().numpy()

fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3), constrained_layout=True)
for (name, f), marker in zip(learned.items(), "o^s", strict=True):
    left.plot(np.log(p_data), f, marker, label=name)
    right.plot(sums[name], label=name)
    print(f"{name:<16} sum of exp(score) {np.exp(f).sum():.3f}; truth 1, 1/K = {1 / K}")
left.plot([-4.5, -0.5], [-4.5, -0.5], "k-", linewidth=0.8, label="score = log p")
left.set(xlabel="true log p of the drawing", ylabel="learned score")
right.axhline(1, color="black", linewidth=0.8)
right.set(xlabel="step", ylabel="sum of exp(score)")
left.legend(fontsize=8)
plt.show()
far = {name: f - np.log(p_data) for name, f in learned.items()}
assert np.abs(far["nce"]).max() < 0.3 and abs(np.exp(learned["nce"]).sum() - 1) < 0.1
assert np.abs(far["log K forgotten"] + np.log(K)).max() < 0.3
assert np.abs(far["log q left out"] + np.log(q)).max() < 0.3
assert (learned["log q left out"].argsort() != p_data.argsort()).any()  # another order

# %% [markdown]
# What to see: the circles lie on the line, up to what 2,000 draws can tell, and their sum goes to one
# although nothing in the loss asks for it. Without $\log K$ the same shape lies lower by $\log K$. A constant
# changes no ranking, but the number is no probability. Without $\log q$ the scores are $\log p - \log q$, and
# here even the order is wrong. (Negative sampling, known from word vectors, leaves out $\log K$ as well: it
# learns the ratio up to a constant, which may be what one wants.)
#
# A law that needs no training catches both. If the scores *are* the noise density, $f = \log q$, nothing can
# be told apart: every log-odds is $-\log K$ and the loss is the cost of guessing with odds 1 to $K$,
# $\operatorname{softplus}(\log K) + K \operatorname{softplus}(-\log K)$. The course's tests call it
# `equal_densities_cost_the_odds`:

# %%
odds = np.log1p(K) + K * np.log1p(1 / K)
for name, loss in losses.items():
    value = loss(log_q[data], log_q[noise], log_q[data], log_q[noise]).item()
    print(f"{name:<16} {value:.4f}; law {odds:.4f}")
    assert np.isclose(value, odds) == (name == "nce")

# %% [markdown]
# ## What K is good for
#
# More noise per sample of data costs more and brings two things. **First, precision.** Say the energies of $p
# = p_{\text{data}}$ are known and only $c$ is learned, so that NCE estimates $\log Z$. For this one parameter
# Gutmann and Hyvärinen (2012, theorem 3) give the variance of the estimate, for large $B$,
#
# $$\operatorname{Var}(c) \approx \frac1B \Big(\frac1a - 1 - \frac1K\Big), \qquad
#   a = \sum_u p(u)\, \frac{K q(u)}{p(u) + K q(u)}.$$
#
# We repeat the estimate 400 times. As the gradient in $c$ depends only on how often each thing was drawn, the
# counts of the draws are all we need, and as $L$ is convex in $c$, halving an interval finds the best one.
#
# **Second, the likelihood.** Suppose a model with normalised scores, $f = \log p$. Then $K q\, \sigma(h) =
# p\,(1 - \sigma(h))$, so the derivative above becomes $-w(u)\,(p_{\text{data}}(u) - p(u))$ with the weight
#
# $$w(u) = 1 - \sigma(h(u)) = \frac{K q(u)}{p(u) + K q(u)}.$$
#
# Maximum likelihood has the same with $w = 1$ (its gradient above, with $f$ for $-E$ and a minus to make it a
# loss). As $K \to \infty$ all weights go to one: NCE turns into maximum likelihood, the noise samples
# standing in for the model's own (Mnih and Teh 2012).

# %%
Ks, runs, B = 4 ** np.arange(6), 400, 100
log_Z = np.log(np.exp(-energy).sum())
rare = np.exp(energy / 2) / np.exp(energy / 2).sum()  # shows most what the data have least
noises = {"bag 2": q, "rare": rare, "bag 1": p_data}
fig, (left, right) = plt.subplots(1, 2, figsize=(7.5, 3), constrained_layout=True)
print("scatter of the estimate of log Z for K =", Ks)
scatter = {}
for (name, noise_p), colour in zip(noises.items(), ("C0", "C1", "C2"), strict=True):
    found, theory = [], []
    for K in Ks:
        n_data = rng.multinomial(B, p_data, runs)  # (runs, 8): how often each thing was data
        n_noise = rng.multinomial(B * K, noise_p, runs)  # and how often noise
        low, high = np.full((runs, 1), log_Z - 6), np.full((runs, 1), log_Z + 6)
        for _ in range(30):
            c = (low + high) / 2
            belief = 1 / (1 + np.exp(-(-energy - c - np.log(noise_p * K))))  # (runs, 8), σ(h)
            falling = (n_noise * belief).sum(1) > (n_data * (1 - belief)).sum(1)  # dL/dc < 0: c is too small
            low, high = np.where(falling[:, None], c, low), np.where(falling[:, None], high, c)
        a = (p_data * K * noise_p / (p_data + K * noise_p)).sum()
        theory.append(np.sqrt(max(0, 1 / a - 1 - 1 / K) / B))
        found.append(np.sqrt(((c - log_Z) ** 2).mean()))
    print(f"{name:<8} measured", np.array(found), "theory", np.array(theory))
    scatter[name] = np.array(found)
    assert np.allclose(found, theory, rtol=0.25, atol=1e-6)
    if name != "bag 1":
        left.loglog(Ks, found, "o", color=colour, label=f"noise: {name}")
        left.loglog(Ks, theory, color=colour)
left.set(xlabel="K, noise per sample of data", ylabel="scatter of c", title="points: 400 runs, lines: theory")
left.legend(fontsize=8)
order = np.argsort(p_data / q)[::-1]
weights = Ks * q[:, None] / (p_data[:, None] + Ks * q[:, None])  # (8, Ks)
for rank, u in enumerate(order):
    label = f"{things[u].noun}, p/q = {p_data[u] / q[u]:.1f}"
    right.semilogx(Ks, weights[u], color=plt.cm.viridis(1 - rank / 7), label=label)
right.set(xlabel="K", ylabel="weight w(u)")
right.legend(fontsize=6)
plt.show()
ratio = scatter["bag 2"][2:-1] / scatter["bag 2"][3:]
assert ((ratio > 1.5) & (ratio < 2.6)).all() and (scatter["rare"] > scatter["bag 2"]).all()
assert scatter["bag 1"].max() < 1e-6 and (np.diff(weights[order], axis=0) >= 0).all()

# %% [markdown]
# What to see: on the left, once $K$ is not small, four times the noise about halves the scatter, and noise
# that favours what the data have least is worse at every $K$. In the last printed line the noise is the
# data's own distribution, and the scatter is zero. There all log-odds are one and the same number, which
# depends on $c$ and not on what was drawn, so every draw gives the same best $c$. For $c$ alone no noise is
# better than that, while noise that is easily told from the data teaches little. On the right, with $p =
# p_{\text{data}}$, the curves lie in the order of $p/q$. The last weights to become one are those of drawings
# that are frequent in the data and not in the noise.
#
# ## A trap: certainty
#
# A classifier that is sure and wrong should pay for it in full. Two common ways to write softplus fail here.
# $\log(1 + e^{h})$ as it is written overflows. Probabilities that are clipped before the logarithm limit the
# cost, and beyond the limit the gradient is 0. Both pass every test in which $h$ is small.

# %%
far = np.array([0.0]), np.array([[1000.0]]), np.array([0.0]), np.array([[0.0]])  # noise with score 1000
with np.errstate(over="ignore"):
    print(f"literal  {bugs.softplus_overflows(*far)[0]:.2f}")
clipped = [torch.tensor(a, requires_grad=True) for a in far]
cost = bugs.clipped_probabilities(*clipped)
cost.backward()
print(f"clipped  {cost.item():.2f}, gradient {abs(clipped[1].grad.item()):.2f}")
print(f"nce_np   {nce.nce_np(*far)[0]:.2f}, gradient {nce.nce_np(*far)[1][1].item():.2f}")
assert clipped[1].grad.item() == 0 and cost.item() < 100 < nce.nce_np(*far)[0]
assert np.isclose(nce.nce_np(*far)[1][1].item(), 1)

# %% [markdown]
# ## The rungs, and what they cost
#
# There is no matrix product here: an array of $B(K+1)$ scores comes in, one number goes out, and a dozen
# elementary operations lie between. What costs is moving numbers to and from memory.
#
# | rung | what it does | in units of $BK$ numbers |
# |---|---|---|
# | `nce_np` | the formulas, an array for each line | a few arrays at a time |
# | `nce` | the same; autograd keeps what it needs | writes or reads some 20 |
# | `nce_fused` | one pass in blocks: loss and slopes together | reads 2, writes 1 and keeps it |
#
# The last rung works because $\partial L/\partial h$ is known as soon as $h$ is, long before anyone calls
# `backward`: there is no normaliser to wait for. So `forward` stores the slopes and `backward` only
# multiplies them by the upstream gradient and hands them out, with a minus to $\log q$.
#
# **Exercise 3** · `nce_fused` · difficulty 3 of 3 · 40 minutes. Open `chapters/exercises/nce.py`.
# `minivlp.stream.GradientsFromForward` is an `autograd.Function` whose `backward` is already written: it
# hands out what `forward` saved, in the order of the inputs. No blocks are needed to obey the laws.

# %%
check("nce_fused")

# %% [markdown]
# The times are those of the machine that made this page, forward and backward on one thread.

# %% tags=["measured"]
from time import perf_counter

torch.set_num_threads(1)
B, K = 256, 4096
g = torch.Generator().manual_seed(0)
args = [torch.randn(shape, generator=g) for shape in ((B,), (B, K), (B,), (B, K))]
best = {}
print(f"B = {B}, K = {K}, float32")
for name, loss in (("torch", nce.nce), ("fused", nce.nce_fused)):
    times = []
    for _ in range(5):
        tensors, kept = [t.clone().requires_grad_() for t in args], {}
        start = perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.update({t.untyped_storage().data_ptr(): t.numel()}), t)[1], lambda t: t
        ):
            value = loss(*tensors)
        value.backward()
        times.append(perf_counter() - start)
    best[name] = min(times)
    held = sum(kept.values()) / (B * K)
    print(f"{name}: loss {value.item():.2f}, {1000 * best[name]:.0f} ms, {held:.1f} BK numbers kept")
print(f"torch / fused: {best['torch'] / best['fused']:.1f}")

# %% [markdown]
# ## What we left out
#
# * Where noise comes from. For pictures and captions the answer of chapters 12 and 13 is: from the batch. The
#   captions of the *other* pictures are the noise, and their density need not be known.
# * Choosing one of $K + 1$ samples instead of answering $K + 1$ questions. Then $\log K$ and the unknown
#   constant cancel: InfoNCE, chapter 12. Keeping the questions gives the sigmoid loss, chapter 13, where a
#   learned bias takes the place of $-\log K$.
# * Noise that the data's support does not share, and noise that learns.
# * Training with samples of the model, and by score matching: named above, not tried.
# * How precise NCE is for more than one parameter. The theorem quoted has the general form; the best noise is
#   then, in general, not the data's own distribution.
#
# ## Sources
#
# Noise-contrastive estimation: Gutmann and Hyvärinen 2010, for $K = 1$, and 2012, for any $K$ and with the
# variance (theorem 3). The limit $K \to \infty$ and a language model trained this way: Mnih and Teh 2012. The
# best noise: Chehab, Gramfort and Hyvärinen 2022. The walk: Metropolis et al. 1953. Other ways around $Z$:
# Hinton 2002 (contrastive divergence); Tieleman 2008 (persistent chains); Hyvärinen 2005 (score matching);
# Vincent 2011 (denoising score matching).
