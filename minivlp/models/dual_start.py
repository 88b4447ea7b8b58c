"""Initial values with which a small dual encoder learns at once. The architecture stays as it is.

CLIP reads an image at its [CLS] token and a text at its end, two tokens that begin as constants. With BERT's
values (normal, 0.02) attention adds next to nothing to them, so at first all images have nearly the same
vector, all texts too, and much of a short run is over before that changes. Here each block begins with

    W_out = W_vᵀ,        W_v orthogonal:

what attention gives a token is a mean of the normalised tokens that it sees. Embeddings stay small: with them
at unit variance, as ViLT starts here, AdamW's steps change them too slowly (tried: worse than 0.02).

Source: attention that begins as a meaningful map: Trockman and Kolter 2023 (mimetic initialization).
Left out: queries and keys, which begin near zero, so that every token first sees all others alike.
"""

import torch
from torch import nn

from minivlp.models.dual import Dual


@torch.no_grad()
def start_mean(model: Dual) -> Dual:
    """Give `model` the initial values above, in place, from torch's default generator; return it."""
    for tower in (model.image, model.text):
        for block in tower.encoder.blocks:
            value = block.qkv.weight.chunk(3)[2]  # (D, D), a view
            nn.init.orthogonal_(value)
            block.proj.weight.copy_(value.T)
    return model
