"""Problems to measure losses on: the arguments of a loss, and the products that no algorithm can avoid.

The time of these bare products is the unit of all others: a loss at 1.2 costs a fifth more than its products
alone. They run in the tiles of stream.py, each product of a tile at once, into buffers made beforehand.

Numbers are random, rows of width D have length 1 or about √D; the work does not depend on them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.mlm import IGNORE
from minivlp.models.vilt import Vilt, ViltConfig
from minivlp.stream import TILE


@dataclass(frozen=True)
class Problem:
    """The arguments of a variant, and the bare work."""

    arguments: tuple
    bare: Callable[[], object]

    @property
    def wanted(self) -> list[Tensor]:
        """What a step differentiates by: tensors that require gradients, and all weights of a model."""
        tensors = [t for t in self.arguments if isinstance(t, Tensor) and t.requires_grad]
        return tensors + [p for m in self.arguments if isinstance(m, nn.Module) for p in m.parameters()]

    def step(self, loss: Callable[..., Tensor]) -> None:
        """The loss and all gradients, which are dropped."""
        value = loss(*self.arguments)
        torch.autograd.grad(value, self.wanted, torch.ones_like(value))


def bare_products(x: Tensor, y: Tensor, gradients: bool = True) -> Callable[[], tuple[Tensor, Tensor]]:
    """S = x yᵀ tile by tile and, with `gradients`, (S y, Sᵀ x): x (M, D), y (N, D)."""
    x, y = x.detach(), y.detach()
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    S = x.new_empty(math.prod(TILE))

    def run() -> tuple[Tensor, Tensor]:
        dx.zero_()
        dy.zero_()
        for xs, dxs in zip(x.split(TILE[0]), dx.split(TILE[0]), strict=True):
            for ys, dys in zip(y.split(TILE[1]), dy.split(TILE[1]), strict=True):
                tile = S[: len(xs) * len(ys)].view(len(xs), len(ys))
                torch.mm(xs, ys.T, out=tile)
                if gradients:
                    dxs.addmm_(tile, ys)
                    dys.addmm_(tile.T, xs)
        return dx, dy

    return run


def bare_batched(x: Tensor, y: Tensor, repeats: int = 1) -> Callable[[], object]:
    """The same three products for a batch of small pairs, x (B, M, D) and y (B, N, D), `repeats` times."""
    x, y = x.detach(), y.detach()
    S, dx, dy = x.new_empty(len(x), x.shape[1], y.shape[1]), torch.empty_like(x), torch.empty_like(y)

    def run() -> None:
        for _ in range(repeats):
            torch.bmm(x, y.mT, out=S)
            torch.bmm(S, y, out=dx)
            torch.bmm(S.mT, x, out=dy)

    return run


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def contrastive(scalars: Mapping[str, float]) -> Callable[..., Problem]:
    """Unit rows x, y (B, D) and learnable scalars."""

    def problem(B: int, D: int) -> Problem:
        x, y = (F.normalize(_random(B, D, seed=s), dim=-1).requires_grad_() for s in (0, 1))
        learned = (torch.tensor(value, requires_grad=True) for value in scalars.values())
        return Problem((x, y, *learned), bare_products(x, y))

    return problem


def token_sets(M: int, N: int, D: int) -> Problem:
    """Two sets of tokens for Chamfer: one product, because its gradients are gathers."""
    x, y = _random(M, D).requires_grad_(), _random(N, D, seed=1).requires_grad_()
    return Problem((x, y), bare_products(x, y, gradients=False))


def masked_words(M: int, V: int, D: int) -> Problem:
    """Hidden states of M masked tokens, V words."""
    hidden, embedding = _random(M, D).requires_grad_(), (_random(V, D, seed=1) / D**0.5).requires_grad_()
    targets = torch.randint(V, (M,), generator=torch.Generator().manual_seed(2))
    bias = torch.zeros(V, requires_grad=True)
    return Problem((hidden, embedding, bias, targets), bare_products(hidden, embedding))


def pairs(B: int, L: int, N: int, D: int, N_min: int | None = None) -> Problem:
    """B pairs of L words and `N_min` to N patches (all of them N when None), the rest padding."""
    words, patches = _random(B, L, D).requires_grad_(), _random(B, N, D, seed=1).requires_grad_()
    real = torch.randint(N_min or N, N + 1, (B, 1), generator=torch.Generator().manual_seed(2))
    masks = torch.ones(B, L, dtype=torch.bool), torch.arange(N) < real
    return Problem((words, patches, *masks), bare_batched(words, patches))


def one_transport(M: int, N: int, D: int) -> Problem:
    """One pair for Sinkhorn: uniform marginals, ε = 0.01, 50 iterations."""
    x, y = _random(M, D).requires_grad_(), _random(N, D, seed=1).requires_grad_()
    return Problem((x, y, None, None, 0.01, 50), bare_products(x, y))


def heads(B: int, H: int, L: int, d: int) -> Problem:
    """Queries, keys, values (B, H, L, d): Q Kᵀ and P V, and two products back through each."""
    q, k, v = (_random(B, H, L, d, seed=s).requires_grad_() for s in range(3))
    return Problem((q, k, v), bare_batched(q.flatten(0, 1), k.flatten(0, 1), repeats=2))


def blocks(L: int, table: str, B: int, H: int, d: int, S: int = 4) -> Problem:
    """Queries, keys, values (B, H, L, d) of S equal segments: the products of the blocks that count."""
    q, k, v = (_random(B, H, L, d, seed=s).requires_grad_() for s in range(3))
    sees = {"full": np.ones((S, S), int), "prefix": np.tri(S, dtype=int), "towers": np.eye(S, dtype=int)}[
        table
    ]
    rows, columns = (z.detach().flatten(0, 1).chunk(S, 1) for z in (q, k))
    live = [bare_batched(rows[s], columns[t], repeats=2) for s, t in np.argwhere(sees)]
    return Problem((q, k, v, [L // S] * S, sees.tolist(), (S - 1,)), lambda: [run() for run in live])


def noise(B: int, K: int) -> Problem:
    """Scores of B data and of K noise samples each; what must be done is to read them and write gradients."""
    data, samples = _random(B).requires_grad_(), _random(B, K, seed=1).requires_grad_()
    density = torch.full((B,), -math.log(K)), torch.full((B, K), -math.log(K))
    scores, gradient = samples.detach(), torch.empty(B, K)

    def copies() -> None:
        gradient.copy_(scores)
        gradient.copy_(density[1])

    return Problem((data, samples, *density), copies)


def images(B: int, side: int, p: int, D: int) -> Problem:
    """Pictures (B, 3, side, side) and the projection of their patches; the pictures need no gradient."""
    weight = (_random(D, 3, p, p, seed=1) / p).requires_grad_()
    patches, W = _random(B * (side // p) ** 2, 3 * p * p), weight.detach().flatten(1)
    out, dW = torch.empty(len(patches), D), torch.empty_like(W)

    def products() -> None:
        torch.mm(patches, W.T, out=out)
        torch.mm(out.T, patches, out=dW)

    return Problem((_random(B, 3, side, side), weight, torch.zeros(D, requires_grad=True)), products)


def training_step(
    B: int, L: int, side: int, p: int, D: int, layers: int, heads: int, hidden: int, V: int
) -> Problem:
    """A ViLT and its batch: texts of L words, every seventh to predict, square pictures, match labels."""
    sizes = {"dim": D, "layers": layers, "heads": heads, "hidden": hidden, "patch": p, "image_size": side}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # One eps in all norms, as Hugging Face's model has it.
        model = Vilt(ViltConfig(vocab_size=V, max_text_len=L, **sizes, eps=1e-12, text_eps=1e-12))
    ids = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(B * L).view(B, L) % 7 == 3, ids, IGNORE)
    batch = (ids, torch.ones_like(ids, dtype=torch.bool), _random(B, 3, side, side), labels, ids[:, 0] % 2)
    N, words = model.config.grid**2, int((labels != IGNORE).sum())
    rows, last = B * (L + 1 + N), B * L  # of the last block, words alone: the losses read no patch
    linear = [  # (rows, width in, width out, how often)
        (rows, D, 2 * D, layers),  # keys and values
        *((n, *shape, times) for n, times in ((rows, layers - 1), (last, 1)) for shape in (
            (D, D), (D, D), (D, hidden), (hidden, D),  # queries, what the heads found, MLP
        )),
        (B * N, 3 * p * p, D, 1), (words, D, D, 1), (words, D, V, 1),
    ]  # fmt: skip
    products = [bare_batched(_random(1, n, k), _random(1, m, k), times) for n, k, m, times in linear]
    q = _random(B * heads, rows // B, D // heads)
    products += [bare_batched(q, q, 2 * (layers - 1)), bare_batched(q[:, :L], q, 2)]
    return Problem((model, *batch), lambda: [run() for run in products])
