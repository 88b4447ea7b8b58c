"""The claims: what is said, by whom, how it is tested here, and which number decides.

The number is a mean over seeds and test items of one measure, of one experiment or of a difference of two
(verdict.py); the margin was chosen before anything was measured, as the smallest difference worth the words.
"""

from collections.abc import Callable, Sequence

from minivlp.claims.archetypes import ARCHETYPES, CONTROL
from minivlp.claims.claim import Claim, Measure
from minivlp.claims.clock import PARTS
from minivlp.claims.exam import CHANCE
from minivlp.claims.naming import LOSSES
from minivlp.claims.settings import Settings
from minivlp.core.require import fail


def always(name: str, measure: str) -> Callable[[Settings], Measure]:
    return lambda settings: (name, measure)


def _constant(value: float) -> Callable[[Settings], float]:
    return lambda settings: value


def _each(names: Sequence[str], measure: str) -> Callable[[Settings], dict[str, Measure]]:
    return lambda settings: {name: (name, measure) for name in names}


def _batches(settings: Settings) -> dict[str, Measure]:
    return {f"{loss} {b}": (loss, f"batch {b}") for loss in LOSSES for b in settings.naming.batches}


def _layers(settings: Settings) -> dict[str, Measure]:
    depth = range(settings.world.train.layers + 1)
    return {
        f"{kind} {k}": ("patch", f"layer {k} {kind}")
        for kind in ("true", "wrong", "mismatched")
        for k in depth
    }


def _parts(settings: Settings) -> dict[str, Measure]:
    return {f"{kind} {part}": ("clock", f"ms {kind} {part}") for kind in ARCHETYPES for part in PARTS}


def _difference(
    says: str, source: str, tested: str, number: str, measures: Sequence[Measure], margin: float,
    guess: float | None = None, axis: str = "share of items that are right",
) -> Claim:  # fmt: skip
    """The claim that the first of these measures is more than `margin` above the second; all are shown."""
    first, second, *_ = (always(*measure) for measure in measures)
    points = {", ".join(measure).removeprefix("coca-"): measure for measure in measures}
    return Claim(
        says, source, tested, number, first, margin, lambda settings: points, second,
        floor=None if guess is None else _constant(guess), chance=guess, axis=axis,
    )  # fmt: skip


EVERYONE = (*ARCHETYPES, CONTROL)
_PAIRS = "Pairs of objects in new pictures"
_EIGHT = "Eight objects, pictures of two, the same rows and steps for all, parameters within a tenth"

CLAIMS = {
    "split": Claim(
        says="Without convolutions the picture's embedding costs next to nothing beside the transformer.",
        source="Kim, Son and Kim 2021 (ViLT), figure 1",
        tested="The parts of four archetypes of equal numbers of parameters, in turn, on one thread",
        number="share of the picture's embedding in the time of grid, minus that in the time of patch",
        first=always("clock", "share grid"),
        second=always("clock", "share patch"),
        margin=0.1,
        points=_parts,
        draw="stacks",
        axis="milliseconds a pair",
    ),
    "patches": Claim(
        says="A patch projection is as good as a convolutional grid where words must find places.",
        source="Kim, Son and Kim 2021 (ViLT), table 2 to 4, against Pixel-BERT",
        tested=f"{_EIGHT}; a caption against the same with its nouns exchanged",
        number="accuracy of patch minus that of grid",
        first=always("patch", "swapped"),
        second=always("grid", "swapped"),
        margin=-0.05,
        floor=_constant(CHANCE["swapped"]),
        points=_each(EVERYONE, "swapped"),
        chance=CHANCE["swapped"],
    ),
    "relations": Claim(
        says="A dot product of two encoders binds words to places worse than a transformer over both.",
        source="Kim, Son and Kim 2021 (ViLT), section 2.1; Thrush et al. 2022 (Winoground)",
        tested=f"{_EIGHT}; two pictures and two captions that differ in order alone, all four right",
        number="group score of patch minus that of towers",
        first=always("patch", "group"),
        second=always("towers", "group"),
        margin=0.05,
        floor=_constant(CHANCE["group"]),
        points=_each(EVERYONE, "group"),
        chance=CHANCE["group"],
    ),
    "statements": Claim(
        says="A dot product stays at guessing on statements about two pictures.",
        source="Kim, Son and Kim 2021 (ViLT), section 2.1: 51 % on NLVR2 with CLIP's features",
        tested=f"{_EIGHT}; “F in one picture only”, from whether F matches each picture; half of the items "
        "can be told by their objects",
        number="accuracy of towers",
        first=always("towers", "statements"),
        margin=0.55,
        above=False,
        floor=_constant(CHANCE["statements"]),
        learned=lambda settings: [("towers", "statements"), ("patch", "statements")],
        points=lambda settings: {
            label: (name, measure)
            for name in EVERYONE
            for label, measure in ((name, "statements"), (f"{name}, same objects", "order"))
        },
        chance=CHANCE["statements"],
    ),
    "retrieval": Claim(
        says="For finding a caption's picture a transformer over both is better than a dot product.",
        source="Kim, Son and Kim 2021 (ViLT), section 2.1",
        tested=f"{_EIGHT}; one picture of a set in which the same objects come in other relations",
        number="R@1 of patch minus that of towers",
        first=always("patch", "retrieval"),
        second=always("towers", "retrieval"),
        margin=0.02,
        floor=lambda settings: 1 / settings.world.candidates,
        points=_each(EVERYONE, "retrieval"),
    ),
    "batch": Claim(
        says="At small batches a sigmoid loss learns more than a softmax.",
        source="Zhai et al. 2023 (SigLIP), section 4.2",
        tested="Names of drawings, the same towers and steps; R@1 among all names, smallest batch",
        number="R@1 with the sigmoid minus that with the softmax",
        first=lambda settings: ("sigmoid", f"batch {settings.naming.batches[0]}"),
        second=lambda settings: ("softmax", f"batch {settings.naming.batches[0]}"),
        margin=0.01,
        floor=_constant(0.05),  # five times a guess among a hundred names
        points=_batches,
        draw="lines",
        axis="R@1",
    ),
    "chunks": Claim(
        says="The sigmoid loss in chunks equals the whole one.",
        source="Zhai et al. 2023 (SigLIP), section 3.3",
        tested="Value and all gradients in float64, blocks of several sizes and the tiled loss",
        number="log10 of the largest relative difference",
        first=always("chunks", "largest"),
        margin=-9.0,
        above=False,
        points=lambda settings: {
            name: ("chunks", f"error {name}")
            for name in (*(f"block {b}" for b in settings.chunks.blocks), "tiled")
        },
        axis="log10 of the relative difference",
    ),
    "words": Claim(
        says="Hiding whole words makes the picture needed, hiding pieces does not.",
        source="Kim, Son and Kim 2021 (ViLT), section 3.3",
        tested="Eight objects whose names fall to pieces; a hidden noun, all its pieces right",
        number="accuracy after whole words minus that after pieces",
        first=always("words", "noun"),
        second=always("pieces", "noun"),
        margin=0.02,
        floor=lambda settings: 1 / (len(settings.world.train.nouns) - 1),
        points=lambda settings: {
            f"{name}, {said}": (name, measure)
            for measure, said in (("noun", "hidden noun"), ("matching", "matching"))
            for name in ("words", "pieces")
        },
    ),
    "pointing": Claim(
        says="Word-patch alignment makes words point at things.",
        source="Kim, Son and Kim 2021 (ViLT), sections 3.2 and 4.7",
        tested="Eight objects; does the plan put a noun's largest entry into its box?",
        number="accuracy with the alignment minus that without",
        first=always("patch", "pointing"),
        second=always("unaligned", "pointing"),
        margin=0.05,
        floor=_constant(0.3),  # a box has at most a quarter of the patches
        points=_each(("patch", "unaligned"), "pointing"),
    ),
    "alignment": Claim(
        says="Word-patch alignment helps matching.",
        source="Chen et al. 2020 (UNITER), table 2; Kim, Son and Kim 2021 (ViLT), section 3.2",
        tested="Eight objects; captions that are true, of another picture, or in the wrong order",
        number="accuracy with the alignment minus that without",
        first=always("patch", "matching"),
        second=always("unaligned", "matching"),
        margin=0.02,
        floor=_constant(CHANCE["matching"]),
        points=_each(("patch", "unaligned"), "matching"),
        chance=CHANCE["matching"],
    ),
    "regions": Claim(
        says="Regions with phrases align words with parts of a picture better than captions alone.",
        source="Zeng, Zhang and Li 2022 (X-VLM), section 4",
        tested="Eight objects in crowds of two to four; the noun of an object's region",
        number="accuracy with regions minus that without",
        first=always("xvlm-regions", "naming"),
        second=always("xvlm-captions", "naming"),
        margin=0.05,
        floor=lambda settings: 1 / len(settings.regions.train.nouns),
        points=lambda settings: {
            f"{name}, {measure}": (f"xvlm-{name}", measure)
            for measure in ("naming", "pointing", "grounding")
            for name in ("regions", "captions")
        },
    ),
    "layers": Claim(
        says="Words and their patches come closer the deeper the layer, beyond what wrong pairs do.",
        source="Lin et al. 2024 (VILA), section 3.1",
        tested="Eight objects; Chamfer similarity of patch's words and patches, true minus wrong pairs",
        number="that gap after the last layer minus that before the first",
        first=always("patch", "deepening"),
        margin=0.02,
        floor=_constant(CHANCE["matching"]),
        learned=lambda settings: [("patch", "matching")],
        points=_layers,
        draw="lines",
        axis="Chamfer similarity",
    ),
    "captioner": _difference(
        "A captioner knows order where a contrast does not.",
        "Tschannen et al. 2023; Lin et al. 2023 (VisualGPTScore)",
        f"{_PAIRS}, CoCa with both losses; a caption against the same with its nouns exchanged",
        "accuracy by p(caption given picture) minus that by the cosine",
        (("coca-both", "order"), ("coca-both", "order contrast"), ("coca-captions", "order"),
         ("coca-contrast", "order contrast")), 0.3, 0.5,
    ),
    "coca_retrieval": _difference(
        "Captioning helps a contrast to find pictures.", "Yu et al. 2022 (CoCa), section 4.4",
        f"{_PAIRS}, CoCa in as many steps; R@1 by the cosine in a set of 16",
        "R@1 with both losses minus that with the contrast alone",
        (("coca-both", "retrieval"), ("coca-contrast", "retrieval")), 0.02, 1 / 16,
    ),
    "coca_captions": _difference(
        "A contrast helps captioning.", "Yu et al. 2022 (CoCa), section 4.4",
        f"{_PAIRS}, CoCa in as many steps; the captions that it writes",
        "share of true ones with both losses minus that with captions alone",
        (("coca-both", "true"), ("coca-captions", "true")), 0.02, 1 / 24,
    ),
    "restart": _difference(
        "Restarting dead codes keeps a VQ-VAE from collapsing.",
        "van den Oord et al. 2017 (VQ-VAE); Łańcucki et al. 2020",
        "A VQ-VAE of 256 codes on patches of composed scenes; the codes of new pictures",
        "perplexity with restarts minus that without",
        (("vq-restarted", "perplexity"), ("vq-plain", "perplexity"), ("vq-restarted", "decibels"),
         ("vq-plain", "decibels")), 50, axis="perplexity, or decibels of the pictures made of them",
    ),
    "qk_norm": _difference(
        "QK-norm bounds the scores of attention.",
        "Dehghani et al. 2023 (ViT-22B), section 2; Chameleon team 2024, section 2.3",
        "A small Chameleon at five times the usual rates; the largest score in each new pair",
        "log of the largest score without QK-norm minus that with it; log 2 is 0.693",
        (("qk-plain", "scores"), ("qk-norm", "scores"), ("qk-plain", "nats"), ("qk-norm", "nats")),
        0.693, axis="log of the largest score, or nats of a pair",
    ),
}  # fmt: skip


def chosen(names: Sequence[str] | None) -> list[str]:
    """The claims named, or all. Raises ValueError for a name that is none."""
    names = list(CLAIMS) if names is None else list(dict.fromkeys(names))
    for name in names:
        if name not in CLAIMS:
            fail("--only", f"must name some of {', '.join(CLAIMS)}", repr(name))
    if not names:
        fail("--only", f"must name some of {', '.join(CLAIMS)}", "none")
    return names
