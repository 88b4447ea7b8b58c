"""Laws of targets."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minivlp import targets
from minivlp.targets import next_words
from tests.laws import close, law, obeys, refuses
from tests.strategies import sizes


@st.composite
def captions(draw):
    """ids (B, L) in several dtypes, mask (B, L) with real words anywhere."""
    B, L = draw(sizes(3)), draw(sizes(6))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    ids = rng.integers(0, 200, (B, L)).astype(draw(st.sampled_from([np.int64, np.int32, np.uint8])))
    return ids, rng.random((B, L)) < draw(st.sampled_from([0.5, 1.0]))


@law(
    "next_words",
    hint="Position i is asked for word i + 1, once; −100 where that is padding or beyond the end.",
)
@given(case=captions())
def each_position_is_asked_for_the_next_real_word(f, case):
    ids, mask = case
    wanted = np.full(ids.shape, -100)
    for b, i in np.ndindex(len(ids), ids.shape[1] - 1):
        if mask[b, i + 1]:
            wanted[b, i] = ids[b, i + 1]
    before = ids.copy()
    found = f(ids, mask)
    close(np.asarray(found), wanted)
    assert np.array_equal(ids, before), "ids were changed"


test_laws = obeys(targets)

ids, real = np.ones((2, 3), dtype=np.int64), np.ones((2, 3), dtype=bool)
test_refusals = refuses(
    targets,
    [
        ("next_words", "one row", (ids[0], real[0]), {}, "ids must have shape"),
        ("next_words", "lengths differ", (ids, real[:, :2]), {}, "mask must have shape"),
        ("next_words", "numbers", (ids * 1.0, real), {}, "ids must have an integer dtype"),
        ("next_words", "mask of numbers", (ids, ids), {}, "mask must be bool"),
        ("next_words", "two libraries", (ids, torch.from_numpy(real)), {}, "mask must be a NumPy array"),
    ],
)


def test_tensors_in_tensors_out():
    ids, mask = torch.tensor([[5, 200, 7, 0]], dtype=torch.uint8), torch.tensor([[True, True, True, False]])
    labels = next_words(ids, mask)
    assert labels.dtype == torch.int64 and labels.tolist() == [[200, 7, -100, -100]]
    assert next_words(ids.numpy(), mask.numpy()).tolist() == labels.tolist()
