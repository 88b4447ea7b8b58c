"""What `python -m minivlp bench` measures: for each concept its rungs, its peers and its sizes.

Left out: NumPy rungs, which derive a gradient and are not meant to be fast; boxes and matching, which cost
nothing beside the towers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from minivlp import attention, chamfer, infonce, ipot, masks, mlm, nce, patch, sigmoid, sinkhorn
from minivlp.bench import peers, problems
from minivlp.bench.peers import Loss
from minivlp.bench.problems import Problem

Size = dict[str, int | str]
RUNGS = ("torch", "fused")


BARE = "bare"  # the products alone, beside the variants


@dataclass(frozen=True)
class Case:
    """One concept. `sizes` by the name of the set; `memory_only` sizes are too large to be timed often."""

    what: str
    unit: str  # what the bare work is
    rungs: Mapping[str, Loss]
    peers: Mapping[str, Callable[[], Loss]]
    problem: Callable[..., Problem]
    sizes: Mapping[str, tuple[Size, ...]]
    memory_only: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    growth: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    one_thread: bool = False  # small kernels on several threads measure the scheduler
    # What a variant makes of the arguments, before it is measured.
    adapters: Mapping[str, Callable[..., tuple]] = field(default_factory=dict)

    def loss(self, variant: str) -> Loss:
        """The function of a variant. Raises Absent when it is not there."""
        if variant in self.peers:
            return self.peers[variant]()
        if variant not in self.rungs:
            raise peers.Absent("this concept has no such rung")
        return self.rungs[variant]

    def posed(self, variant: str, problem: Problem) -> Problem:
        """The problem with its arguments as the variant takes them: made beforehand, and not measured."""
        adapt = self.adapters.get(variant)
        return problem if adapt is None else replace(problem, arguments=adapt(*problem.arguments))

    def variants(self) -> tuple[list[str], dict[str, str]]:
        """The variants that can be measured here, and the others with the reason why not."""
        present, absent = [], {}
        for name in (*RUNGS, *self.peers):
            try:
                self.loss(name)
                present.append(name)
            except peers.Absent as reason:
                absent[name] = str(reason)
        return present, absent


def _square(*sides: int, D: int) -> tuple[Size, ...]:
    return tuple({"B": B, "D": D} for B in sides)


def _sets(*sides: int, D: int) -> tuple[Size, ...]:
    return tuple({"M": M, "N": M, "D": D} for M in sides)


def _tables(L: int, **sizes: int) -> tuple[Size, ...]:
    return tuple({"L": L, "table": table, **sizes} for table in ("full", "prefix", "towers"))


_ROWS = {"tiny": _square(48, D=16), "default": _square(2048, D=512), "full": _square(4096, 8192, D=512)}
_ROW_GROWTH = {
    "tiny": _square(64, 128, 256, D=16),
    "default": _square(1024, 2048, 4096, D=256),
    "full": _square(2048, 4096, 8192, D=512),
}
# The model of the default run, and ViLT-B/32 at its own picture size.
_SMALL_VILT = {
    "B": 64, "L": 12, "side": 48, "p": 8, "D": 96, "layers": 4, "heads": 3, "hidden": 192, "V": 512,
}  # fmt: skip
_VILT_B32 = {
    "B": 4, "L": 40, "side": 384, "p": 32, "D": 768, "layers": 12, "heads": 12, "hidden": 3072, "V": 30522,
}  # fmt: skip
_CONTRASTIVE = {"sizes": _ROWS, "growth": _ROW_GROWTH, "memory_only": {"full": _square(16384, D=512)}}

CASES = {
    "infonce": Case(
        what="InfoNCE",
        unit="3 products",
        rungs=infonce.RUNGS["infonce"],
        peers={"open_clip ClipLoss": peers.open_clip_infonce},
        problem=problems.contrastive({"scale": 1 / 0.07}),
        **_CONTRASTIVE,
    ),
    "sigmoid": Case(
        what="sigmoid loss",
        unit="3 products",
        rungs=sigmoid.RUNGS["sigmoid_loss"],
        peers={
            "open_clip SigLipLoss": peers.open_clip_sigmoid,
            "open_clip SigLipLoss, chunks": peers.open_clip_sigmoid_chunks,
        },
        problem=problems.contrastive({"scale": 10.0, "bias": -10.0}),
        **_CONTRASTIVE,
    ),
    "chamfer": Case(
        what="Chamfer alignment",
        unit="1 product",
        rungs=chamfer.RUNGS["chamfer"],
        peers={"naive torch": peers.naive_chamfer},
        problem=problems.token_sets,
        sizes={"tiny": _sets(48, D=16), "default": _sets(2048, D=512), "full": _sets(4096, 16384, D=512)},
        growth={
            "tiny": _sets(64, 128, 256, D=16),
            "default": _sets(1024, 2048, 4096, D=256),
            "full": _sets(2048, 4096, 8192, D=512),
        },
    ),
    "mlm": Case(
        what="masked-word cross-entropy",
        unit="3 products",
        rungs=mlm.RUNGS["mlm_loss"],
        peers={
            "F.linear + F.cross_entropy": peers.linear_then_cross_entropy,
            "F.linear_cross_entropy": peers.linear_cross_entropy,
        },
        problem=problems.masked_words,
        sizes={
            "tiny": ({"M": 24, "V": 96, "D": 16},),
            "default": ({"M": 1024, "V": 8192, "D": 768},),
            "full": ({"M": 4096, "V": 30522, "D": 768},),
        },
    ),
    "wpa": Case(
        what="word-patch alignment, 50 iterations",
        unit="3 products",
        rungs=ipot.RUNGS["wpa"],
        peers={
            "published procedure": peers.published_alignment,
            "POT sinkhorn_log, pair by pair": peers.pot_alignment,
        },
        problem=problems.pairs,
        sizes={
            "tiny": ({"B": 3, "L": 5, "N": 9, "D": 16, "N_min": 4},),
            "default": ({"B": 64, "L": 40, "N": 240, "D": 768, "N_min": 144},),
            "full": ({"B": 64, "L": 40, "N": 240, "D": 768, "N_min": 144},),
        },
        one_thread=True,
    ),
    "transport": Case(
        what="one large word-patch alignment, 50 iterations",
        unit="3 products",
        rungs=ipot.RUNGS["wpa"],
        peers={
            "published procedure": peers.published_alignment,
            "POT sinkhorn_log": peers.pot_alignment,
        },
        problem=problems.pairs,
        sizes={
            "tiny": ({"B": 1, "L": 24, "N": 32, "D": 16},),
            "default": ({"B": 1, "L": 1024, "N": 1024, "D": 768},),
            "full": ({"B": 1, "L": 2048, "N": 2048, "D": 768},),
        },
        one_thread=True,
    ),
    "sinkhorn": Case(
        what="one large Sinkhorn cost, 50 iterations",
        unit="3 products",
        rungs=sinkhorn.RUNGS["sinkhorn_cost"],
        peers={
            "POT sinkhorn_log": peers.pot_sinkhorn,
            "geomloss, its own schedule": peers.geomloss_sinkhorn,
        },
        problem=problems.one_transport,
        sizes={"tiny": _sets(24, D=16), "default": _sets(1024, D=768), "full": _sets(2048, D=768)},
        one_thread=True,
    ),
    "attention": Case(
        what="attention",
        unit="6 products",
        rungs=attention.RUNGS["attention"],
        peers={"F.scaled_dot_product_attention": peers.scaled_dot_product_attention},
        problem=problems.heads,
        sizes={
            "tiny": ({"B": 1, "H": 2, "L": 16, "d": 8},),
            "default": ({"B": 2, "H": 12, "L": 281, "d": 64},),
            "full": ({"B": 1, "H": 12, "L": 2048, "d": 64},),
        },
    ),
    "blocks": Case(
        what="attention of four segments under a table",
        unit="6 products of the blocks that count",
        rungs=masks.RUNGS["attention_blocks"],
        peers={},
        problem=problems.blocks,
        sizes={
            "tiny": _tables(16, B=1, H=2, d=8),
            "default": _tables(1024, B=1, H=4, d=64),
            "full": _tables(4096, B=1, H=12, d=64),
        },
    ),
    "nce": Case(
        what="noise-contrastive estimation",
        unit="2 copies of the scores",
        rungs=nce.RUNGS["nce"],
        peers={},
        problem=problems.noise,
        sizes={
            "tiny": ({"B": 16, "K": 8},),
            "default": ({"B": 2048, "K": 1024},),
            "full": ({"B": 8192, "K": 4096},),
        },
    ),
    "patch": Case(
        what="patch embedding",
        unit="2 products",
        rungs=patch.RUNGS["patch_embed"],
        peers={"strided convolution": peers.strided_convolution},
        problem=problems.images,
        sizes={
            "tiny": ({"B": 2, "side": 16, "p": 4, "D": 16},),
            "default": ({"B": 8, "side": 384, "p": 32, "D": 768},),
            "full": ({"B": 64, "side": 384, "p": 32, "D": 768},),
        },
    ),
    "vilt": Case(
        what="one training step of ViLT, masked words and matching",
        unit="the products of its layers",
        rungs={"torch": peers.training_step},
        peers={"transformers ViltModel": peers.hugging_face_vilt},
        adapters={"transformers ViltModel": lambda model, *batch: (peers.HuggingFaceVilt(model), *batch)},
        problem=problems.training_step,
        sizes={
            "tiny": (_SMALL_VILT | {"B": 2, "L": 8, "side": 16, "layers": 1},),
            "default": (_SMALL_VILT,),
            "full": (_SMALL_VILT, _VILT_B32),
        },
        one_thread=True,
    ),
}
