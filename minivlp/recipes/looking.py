"""What a Q-Former and a bridge share: pictures are what the shipped ViLT, frozen, has made of them."""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from minivlp.models.vilt import Vilt
from minivlp.recipes.base import WEIGHTS, Recipe, load_trained


class LookingRecipe(Recipe):
    """A recipe whose settings say how many blocks of the ViLT a picture passes, `image_layers`."""

    @cached_property
    def eye(self) -> Vilt:
        """The shipped ViLT, frozen."""
        return load_trained(WEIGHTS / "vilt_tiny.safetensors").model.requires_grad_(False)

    @torch.no_grad()
    def look(self, pixels: Tensor) -> Tensor:
        """The states of pictures (B, 3, H, W) in [−1, 1] → (B, N, I), each row of mean 0 and variance 1."""
        eye = self.eye.to(pixels.device)
        image = eye.embed_image(pixels)[0]
        for block in eye.encoder.blocks[: self.settings.image_layers]:
            image = block(image)
        return layer_norm(image[:, 1:], image.shape[-1:])  # without [CLS]
