"""Initial values with which a small ViLT learns from little data. The architecture stays as it is.

With BERT's values (normal, 0.02) the content of a patch, its position and the attention logits all start near
zero, and a small model spends most of a short run growing them. Here they start at the size they will need:

    patches      a patch of unit-variance pixels becomes a vector of unit variance
    positions    sines and cosines of row and column, of unit variance too: content does not drown place
    attention    W_k = W_q = orthogonal: a token first looks at tokens like itself, hence a word, once its
                 vector resembles its patches', at its patches; W_v orthogonal, outputs near zero

Sources: sine-cosine positions on a grid: Chen, Xie and He 2021 (MoCo v3); starting queries and keys alike:
Trockman and Kolter 2023 (mimetic initialization).
"""

import math

import torch
from torch import Tensor, nn

from minivlp.models.vilt import Vilt


def sine_cosine_positions(grid: int, dim: int) -> Tensor:
    """Positions (grid², dim), row-major, of unit variance: a quarter each of sin and cos of row and column.

    The wavelengths run geometrically from about one grid width to far beyond it. dim must be divisible by 4.
    """
    wave = 100 ** -(torch.arange(dim // 4) / (dim // 4))  # (dim/4,)
    angle = torch.linspace(0, 6, grid)[:, None] * wave  # (grid, dim/4)
    code = math.sqrt(2) * torch.cat([angle.sin(), angle.cos()], 1)  # (grid, dim/2)
    rows, columns = code[:, None].expand(-1, grid, -1), code[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], -1).reshape(grid * grid, dim)


@torch.no_grad()
def start_small(model: Vilt) -> Vilt:
    """Give `model` the initial values above, in place, from torch's default generator; return it."""
    c = model.config
    nn.init.normal_(model.patch.weight, std=1 / math.sqrt(3 * c.patch**2 / 4))  # pixels have deviation ½
    model.position[1:] = sine_cosine_positions(c.grid, c.dim)
    for table in (model.word, model.text_position, model.segment):
        nn.init.normal_(table.weight, std=0.5)  # a LayerNorm follows: only the ratios count
    nn.init.normal_(model.modality.weight, std=0.2)
    for block in model.encoder.blocks:
        query, key, value = block.qkv.weight.view(3, c.dim, c.dim)
        nn.init.orthogonal_(query)
        key.copy_(query)
        nn.init.orthogonal_(value)
        nn.init.orthogonal_(block.fc1.weight)
    return model
