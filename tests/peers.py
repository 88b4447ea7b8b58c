"""What several tests compare with, and the rows on which they do."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch


def open_clip_loss() -> ModuleType:
    """open_clip/loss.py, by its path: the file needs torch alone, the package torchvision and timm too."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("open_clip_torch is not installed: see tests/requirements-peers-nodeps.txt")
    path = Path(found.submodule_search_locations[0]) / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unit_rows(B: int, D: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x (B, D) and y (B, D) of unit rows, always the same; x is not contiguous."""
    x, y = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (torch.nn.functional.normalize(t, dim=-1).to(dtype) for t in (x, y))
    return [x.T.contiguous().T, y]


def softplus(t: float) -> float:
    """log(1 + exp(t)), one number at a time."""
    return max(t, 0.0) + math.log1p(math.exp(-abs(t)))
