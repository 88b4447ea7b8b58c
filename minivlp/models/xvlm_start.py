"""Initial values with which a small X-VLM learns from little data: vilt_start.py's, for three encoders.

    picture       as there: patches and positions of unit variance, queries equal to keys
    text          queries and keys near zero, W_out = W_vᵀ with W_v orthogonal: every token is given the
                  mean of the words, [CLS] too, which is the same in all texts and says nothing by itself
    cross-modal   among words as in the text; from words to patches queries equal to keys, and W_out = W_vᵀ: a
                  word is given the mean of the patches that are like it, with their places
    projections   the two into the space of comparison are equal: what brings a phrase and its region together
                  there brings their states together, and the phrase's query finds the patches' keys

Sources: as in vilt_start.py; attention that begins as a meaningful map: Trockman and Kolter 2023.
"""

import math

import torch
from torch import Tensor, nn

from minivlp.models.vilt_start import sine_cosine_positions
from minivlp.models.xvlm import Xvlm


@torch.no_grad()
def start_xvlm(model: Xvlm) -> Xvlm:
    """Give `model` the initial values above, in place, from torch's default generator; return it."""
    c = model.config
    nn.init.normal_(model.patch.weight, std=1 / math.sqrt(3 * c.patch**2 / 4))  # pixels have deviation ½
    model.position.copy_(sine_cosine_positions(c.grid, c.dim))
    for table in (model.word, model.text_position):
        nn.init.normal_(table.weight, std=0.5)  # a LayerNorm follows: only the ratio counts
    for block in model.image.blocks:
        query, key, value = block.qkv.weight.view(3, c.dim, c.dim)
        nn.init.orthogonal_(query)
        key.copy_(query)
        nn.init.orthogonal_(value)
    for block in (*model.text.blocks, *model.cross.blocks):
        _mean(block.qkv.weight[2 * c.dim :], block.proj.weight)
    for block in model.cross.blocks:
        key, value = block.kv.weight.view(2, c.dim, c.dim)
        nn.init.orthogonal_(block.q.weight)
        key.copy_(block.q.weight)
        _mean(value, block.proj_cross.weight)
    for block in (*model.image.blocks, *model.text.blocks, *model.cross.blocks):
        nn.init.orthogonal_(block.fc1.weight)
    nn.init.orthogonal_(model.image_project.weight)
    model.text_project.weight.copy_(model.image_project.weight)
    return model


def _mean(value: Tensor, out: Tensor) -> None:
    """Let attention give the mean of what it sees: W_out W_v = 1."""
    nn.init.orthogonal_(value)
    out.copy_(value.T)
