"""What several tests compare with, and the rows on which they do."""

import importlib.util
import math
import sys
from types import ModuleType

import pytest
import torch

from minivlp.bench import peers as bench_peers


def open_clip_loss() -> ModuleType:
    """open_clip's losses, or a skip."""
    try:
        return bench_peers.open_clip_loss()
    except bench_peers.Absent as reason:
        pytest.skip(f"{reason}: see tests/requirements-peers-nodeps.txt")


def unit_rows(B: int, D: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x (B, D) and y (B, D) of unit rows, always the same; x is not contiguous."""
    x, y = torch.randn(2, B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y = (torch.nn.functional.normalize(t, dim=-1).to(dtype) for t in (x, y))
    return [x.T.contiguous().T, y]


def softplus(t: float) -> float:
    """log(1 + exp(t)), one number at a time."""
    return max(t, 0.0) + math.log1p(math.exp(-abs(t)))


def open_clip_coca() -> type:
    """open_clip's CoCa, or a skip. Its package asks for torchvision, of which CoCa needs one class."""
    pytest.importorskip("transformers")
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed: see tests/requirements-peers-nodeps.txt")
    bare = ModuleType("open_clip")
    bare.__path__ = list(spec.submodule_search_locations)
    misc = ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = torch.nn.BatchNorm2d
    stubs = {"open_clip": bare, "torchvision": ModuleType("torchvision"), "torchvision.ops.misc": misc}
    stubs["torchvision.ops"] = ModuleType("torchvision.ops")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("open_clip.coca_model").CoCa


def torchmultimodal_qformer() -> type:
    """torchmultimodal's Q-Former for captions, or a skip. It asks for torchvision and needs one class."""
    if importlib.util.find_spec("torchmultimodal") is None:
        pytest.skip("torchmultimodal is not installed: see tests/requirements-peers-nodeps.txt")
    depth = ModuleType("torchvision.ops.stochastic_depth")
    depth.StochasticDepth = torch.nn.Dropout
    stubs = {"torchvision.ops.stochastic_depth": depth}
    stubs |= {name: ModuleType(name) for name in ("torchvision", "torchvision.ops")}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("torchmultimodal.models.blip2.qformer_model").QformerForCLM
