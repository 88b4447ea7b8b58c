"""In which precision numbers are made: half precisions are added up in float32, also under autocast.

The squares of float16 end at 65,504, and bfloat16 keeps 8 bits: a sum over 6,500 words is lost in either. An
answer is rounded to the dtype of the arguments once, at its end.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor


def working(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with half precisions as float32."""
    return tuple(t.float() if torch.finfo(t.dtype).bits < 32 else t for t in tensors)


def working_np(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same for NumPy, whose only half precision is float16."""
    return tuple(a.astype(np.float32) if a.dtype == np.float16 else a for a in arrays)


def without_autocast(like: Tensor) -> AbstractContextManager:
    """`with without_autocast(x):` every operation in the dtype of its arguments."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@contextmanager
def at_least_float32(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`with at_least_float32(images, texts) as (x, y):` the tensors as in `working`, and autocast off."""
    with without_autocast(tensors[0]):
        yield working(*tensors)
