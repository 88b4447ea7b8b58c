"""The diagrams of the course, drawn by code: `python -m chapters diagrams` writes chapters/pictures/*.svg.

One visual language in all of them:

    picture    blue, square corners        word      orange, round corners
    state      grey: rows that know both   weight    violet, slanted sides: what is learned
    loss       green, a pill               mask      black: what may not be seen
    data and states flow along grey arrows; gradients along dashed red ones

A drawing is at most 520 units wide with letters of 14 or more, so that it can be read on a phone. Every
drawing has a title and a description for those who cannot see it.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np

from minivlp.core.files import whole_file

FOLDER = Path(__file__).parent / "pictures"
WIDTH, SIZE = 520, 15
INK, FLOW, GRADIENT = "#222222", "#777777", "#C8102E"
KINDS = {  # kind → fill, outline
    "picture": ("#CFE6F5", "#0072B2"),
    "word": ("#FCE3BF", "#C97A00"),
    "state": ("#ECECEC", "#777777"),
    "weight": ("#E6DAF0", "#7A4CA0"),
    "loss": ("#CDEBDF", "#00795A"),
    "mask": ("#222222", "#222222"),
    "seen": ("#FFFFFF", "#AAAAAA"),
}


class Drawing:
    """An SVG picture that grows by shapes, arrows and words."""

    def __init__(self, height: float, title: str, what: str, width: float = WIDTH):
        self.width, self.height, self.title, self.what = width, height, title, what
        self.parts: list[str] = []

    def box(
        self, kind: str, x: float, y: float, w: float, h: float, text: str = "", size: float = SIZE
    ) -> None:
        """A shape of this kind with its upper left corner at (x, y), and words in its middle."""
        fill, line = KINDS[kind]
        style = f'fill="{fill}" stroke="{line}" stroke-width="1.5"'
        if kind == "weight":
            s = min(10, w / 6)
            points = f"{x + s},{y} {x + w},{y} {x + w - s},{y + h} {x},{y + h}"
            self.parts.append(f'<polygon points="{points}" {style}/>')
        else:
            r = {"word": 9, "loss": h / 2}.get(kind, 0)
            self.parts.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}" {style}/>')
        lines = text.split("\n") if text else []
        for i, line_of_text in enumerate(lines):
            middle = y + h / 2 + (i - (len(lines) - 1) / 2) * size * 1.2 + size * 0.35
            self.text(x + w / 2, middle, line_of_text, size, colour="white" if kind == "mask" else INK)

    def text(
        self, x: float, y: float, text: str, size: float = SIZE, at: str = "middle", colour: str = INK,
        bold: bool = False,
    ) -> None:  # fmt: skip
        weight = ' font-weight="bold"' if bold else ""
        place = f'x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{at}"'
        self.parts.append(f'<text {place} fill="{colour}"{weight}>{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float], gradient: bool = False, head: bool = True) -> None:
        """A line through points; a dashed red one where a gradient flows."""
        colour, dash = (GRADIENT, ' stroke-dasharray="6 4"') if gradient else (FLOW, "")
        end = f' marker-end="url(#{"g" if gradient else "f"})"' if head else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}{end}/>'
        )

    def grid(self, x: float, y: float, side: float, table: np.ndarray, kinds: tuple[str, str]) -> None:
        """A table of squares: kinds[1] where the table is true."""
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                self.box(kinds[int(bool(value))], x + j * side, y + i * side, side, side)

    def svg(self) -> str:
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{colour}"/></marker>'
            for name, colour in (("f", FLOW), ("g", GRADIENT))
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" '
            f'font-family="Helvetica, Arial, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n<desc>{escape(self.what)}</desc>\n<defs>{heads}</defs>\n"
            f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n"
        )


def legend() -> Drawing:
    d = Drawing(118, "The colours and shapes of the diagrams", "One sample of each kind of shape and arrow.")
    for i, kind in enumerate(("picture", "word", "state", "weight", "loss", "mask")):
        d.box(kind, 8 + 86 * i, 12, 76, 34, kind, 14)
    d.arrow((20, 80), (90, 80))
    d.text(100, 85, "rows flow", at="start")
    d.arrow((270, 80), (200, 80), gradient=True)
    d.text(280, 85, "gradients flow back", at="start")
    d.text(260, 110, "the same in every chapter", 14, colour=FLOW)
    return d


def families() -> Drawing:
    d = Drawing(
        640,
        "Families of vision-language models",
        "Six ways to bring a picture and words together: two towers, one sequence, towers and a fusion, a "
        "captioner, one vocabulary, and a bridge to a frozen language model.",
    )
    cells = [
        ("two towers", "CLIP, SigLIP", "partner in the batch"),
        ("one sequence", "ViLT", "hidden words, match"),
        ("towers, then together", "X-VLM, FLAVA, MaskVLM", "hidden words or patches, box"),
        ("a captioner", "CoCa", "next word, partner"),
        ("one vocabulary", "CM3Leon, Chameleon", "next token of either kind"),
        ("a bridge", "BLIP-2, LLaVA, MiniGPT-4", "next word; the reader is frozen"),
    ]
    for n, (name, who, what) in enumerate(cells):
        x, y = 8 + 260 * (n % 2), 8 + 212 * (n // 2)
        d.parts.append(
            f'<rect x="{x}" y="{y}" width="244" height="200" rx="4" fill="none" stroke="#CCCCCC"/>'
        )
        d.text(x + 122, y + 22, name, 17, bold=True)
        left, right, base = x + 20, x + 132, y + 128
        if n in (0, 2):
            d.box("state", left, base - 42, 92, 28, "tower", 14)
            d.box("state", right, base - 42, 92, 28, "tower", 14)
            d.arrow((left + 46, base), (left + 46, base - 14))
            d.arrow((right + 46, base), (right + 46, base - 14))
            if n == 0:
                d.box("loss", x + 82, base - 90, 80, 26, "compare", 14)
                d.arrow((left + 46, base - 42), (x + 96, base - 63))
                d.arrow((right + 46, base - 42), (x + 148, base - 63))
            else:
                d.box("state", left, base - 88, 204, 28, "blocks over both", 14)
                d.arrow((left + 46, base - 42), (left + 46, base - 60))
                d.arrow((right + 46, base - 42), (right + 46, base - 60))
        elif n in (1, 4):
            words = "blocks over both" if n == 1 else "causal blocks over codes"
            d.box("state", left, base - 70, 204, 40, words, 14)
            d.arrow((left + 46, base), (left + 46, base - 30))
            d.arrow((right + 46, base), (right + 46, base - 30))
        else:
            name = "reads causally" if n == 3 else "frozen reader"
            d.box("state", left, base - 42, 92, 28, "tower", 14)
            d.box("state" if n == 3 else "seen", right - 12, base - 88, 112, 40, name, 14)
            d.arrow((left + 46, base), (left + 46, base - 14))
            d.arrow((right + 46, base), (right + 46, base - 48))
            if n == 3:
                d.arrow((left + 46, base - 42), (left + 46, base - 68), (right - 12, base - 68))
            else:
                d.box("weight", left + 6, base - 84, 80, 26, "bridge", 14)
                d.arrow((left + 46, base - 42), (left + 46, base - 58))
                d.arrow((left + 86, base - 71), (right - 12, base - 71))
        d.box("picture", left, base, 92, 24, "picture", 14)
        d.box("word", right, base, 92, 24, "words", 14)
        d.text(x + 122, y + 172, who, 14, bold=True)
        d.text(x + 122, y + 191, what, 14, colour="#444444")
    return d


def backward() -> Drawing:
    d = Drawing(
        270,
        "The graph of a contrastive loss, forwards and backwards",
        "X, Y, the scale and the bias make S; S makes the loss. Backwards the loss gives G to S, and S "
        "gives G "
        "times the other factor to each of its parents.",
    )
    d.box("picture", 14, 16, 92, 40, "X  (M, D)")
    d.box("word", 14, 76, 92, 40, "Y  (N, D)")
    d.box("weight", 14, 136, 92, 40, "scale s")
    d.box("weight", 14, 196, 92, 40, "bias b")
    d.box("state", 226, 86, 136, 64, "S = s X Yᵀ + b\n(M, N)")
    d.box("loss", 436, 96, 76, 44, "loss")
    names = ("dX = s G Y", "dY = s GᵀX", "ds = ⟨G, XYᵀ⟩", "db = Σ G")
    for y, name in zip((36, 96, 156, 216), names, strict=True):
        middle = 100 + (y - 36) / 5
        d.arrow((106, y), (224, middle))
        d.arrow((226, middle + 6), (108, y + 10), gradient=True)
        d.text(60, y + 34, name, 14, colour=GRADIENT)
    d.arrow((362, 112), (436, 112))
    d.arrow((436, 128), (362, 128), gradient=True)
    d.text(399, 152, "G = dL/dS", 14, colour=GRADIENT)
    return d


def patches() -> Drawing:
    d = Drawing(
        300,
        "A picture becomes rows",
        "A picture of 3 times 3 patches is cut row by row; each patch becomes one row of numbers, and a "
        "weight "
        "turns each row into one of width D.",
    )
    for i in range(3):
        for j in range(3):
            n = 3 * i + j
            d.box("picture", 10 + 46 * j, 40 + 46 * i, 46, 46, str(n))
            d.box("picture", 232, 14 + 29 * n, 92, 23, f"patch {n}", 14)
            d.box("state", 426, 14 + 29 * n, 84, 23, f"row {n}", 14)
    d.arrow((152, 109), (228, 109))
    d.text(190, 98, "cut", 15)
    d.box("weight", 346, 88, 58, 62, "W\nK×D")
    d.arrow((326, 118), (346, 118))
    d.arrow((402, 118), (424, 118))
    d.text(78, 200, "H × W × C", 15)
    d.text(278, 290, "N rows of K = C p²", 14)
    d.text(462, 290, "N rows of D", 14)
    return d


def merges() -> Drawing:
    d = Drawing(
        250,
        "The merges of a tokenizer as a tree",
        "The letters of the word clipboard are merged in five steps into the pieces clip and board.",
    )
    letters = "clipboard"
    x = [14 + 56 * i for i in range(9)]
    for i, letter in enumerate(letters):
        d.box("word", x[i], 206, 42, 32, letter, 17)
    joins = [(0, 1, 160, "cl"), (2, 3, 160, "ip"), (4, 5, 160, "bo"), (7, 8, 160, "rd")]
    for a, b, y, piece in joins:
        middle = (x[a] + x[b] + 42) / 2
        d.box("word", middle - 28, y, 56, 30, piece, 17)
        for k in (a, b):
            d.arrow((x[k] + 21, 206), (middle, y + 31), head=False)
    d.box("word", 88, 104, 72, 30, "clip", 17)
    d.arrow((63, 160), (112, 135), head=False)
    d.arrow((175, 160), (136, 135), head=False)
    d.box("word", 378, 104, 72, 30, "ard", 17)
    d.arrow((x[6] + 21, 206), (400, 135), head=False)
    d.arrow((455, 160), (428, 135), head=False)
    d.box("word", 290, 50, 82, 30, "board", 17)
    d.arrow((287, 160), (320, 81), head=False)
    d.arrow((410, 104), (348, 81), head=False)
    d.text(124, 94, "a piece of the vocabulary", 14, colour=FLOW)
    d.text(331, 40, "another", 14, colour=FLOW)
    return d


def whole_word() -> Drawing:
    d = Drawing(
        190,
        "Hiding pieces and hiding whole words",
        "Above, one piece of a word is hidden and its other piece gives it away. Below, all pieces are "
        "hidden.",
    )
    row = ["a", "lady", "##bug", "above", "a", "bear"]
    width = [40, 74, 86, 92, 40, 74]
    for y, hidden, name, colour in (
        (30, {2}, "a piece hidden: its neighbour gives it away", GRADIENT),
        (118, {1, 2}, "the whole word hidden: only the picture can tell", INK),
    ):
        x = 28.0
        d.text(28, y - 10, name, 15, "start", colour)
        for n, (word, w) in enumerate(zip(row, width, strict=True)):
            d.box("mask" if n in hidden else "word", x, y, w, 36, "[MASK]" if n in hidden else word, 16)
            x += w + 8
    return d


def wrong_pairs() -> Drawing:
    d = Drawing(
        300,
        "Right and wrong pairs",
        "Four pictures and four captions. The right pairs lie on the diagonal. A derangement gives every "
        "caption another picture; a hard negative is the wrong picture that scores highest.",
    )
    hard = {(0, 2), (1, 0), (2, 3), (3, 2)}
    for i in range(4):
        d.box("word", 10, 54 + 58 * i, 108, 46, f"caption {i}")
        d.box("picture", 134 + 72 * i, 8, 62, 36, f"pict. {i}", 14)
        for j in range(4):
            x, y = 134 + 72 * j, 54 + 58 * i
            d.box(
                "loss" if i == j else "state",
                x,
                y,
                62,
                46,
                "match" if i == j else ("hard" if (i, j) in hard else ""),
                14,
            )
    d.text(430, 84, "diagonal:", 15, "start")
    d.text(430, 104, "right pairs", 15, "start")
    d.text(430, 150, "hard: the", 15, "start")
    d.text(430, 170, "wrong one", 15, "start")
    d.text(430, 190, "that fits", 15, "start")
    d.text(430, 210, "best", 15, "start")
    return d


def qkv() -> Drawing:
    d = Drawing(
        330,
        "Attention with its shapes",
        "Q times K transposed gives S, Lq by Lk; a row softmax gives P; P times V gives O. A mask forbids "
        "keys "
        "in S before the softmax.",
    )
    d.box("state", 14, 20, 60, 90, "Q\nLq×d")
    d.box("state", 14, 130, 60, 120, "K\nLk×d")
    d.box("state", 330, 130, 60, 120, "V\nLk×d")
    d.box("state", 150, 20, 76, 90, "S\nLq×Lk")
    d.box("mask", 226, 20, 28, 90)
    d.box("state", 330, 20, 76, 90, "P\nLq×Lk")
    d.box("mask", 406, 20, 28, 90)
    d.box("state", 450, 190, 60, 90, "O\nLq×d")
    d.arrow((74, 65), (148, 65))
    d.text(110, 54, "Q Kᵀ / √d", 14)
    d.arrow((74, 190), (200, 190), (200, 112))
    d.arrow((254, 65), (328, 65))
    d.text(291, 54, "softmax", 14)
    d.arrow((434, 65), (480, 65), (480, 188))
    d.arrow((390, 230), (448, 230))
    d.text(420, 310, "O = P V", 15)
    d.text(240, 140, "−∞ here", 14, at="start")
    d.text(408, 128, "0 here", 14, at="start")
    return d


def heads() -> Drawing:
    d = Drawing(
        400,
        "Multi-head attention",
        "Z of L rows and D columns passes three maps. Q, K and V are cut into columns, one group a head. "
        "Each "
        "head makes S, P and O. The heads are joined side by side and pass the fourth map.",
    )
    d.box("state", 10, 150, 62, 90, "Z\nL×D")
    for n, letter in enumerate("QKV"):
        y = 30 + 122 * n
        d.box("weight", 96, y + 24, 66, 40, f"W{letter}", 17)
        d.arrow((72, 195), (98, y + 44))
        for h in range(2):
            d.box("state", 186 + 36 * h, y, 36, 88, f"{letter}{'₁₂'[h]}", 17)
        d.arrow((160, y + 44), (184, y + 44))
    d.text(222, 388, "L × d each", 14)
    for h in range(2):
        y = 66 + 168 * h
        d.box("state", 292, y, 56, 56, f"P{'₁₂'[h]}\nL×L")
        d.box("state", 366, y - 16, 36, 88, f"O{'₁₂'[h]}", 17)
        for n in range(2):  # queries and keys make P
            d.arrow((260, 74 + 122 * n), (290, y + 14 + 28 * n))
        d.arrow((348, y + 28), (364, y + 28))
    d.arrow((260, 300), (276, 300), (276, 180), (384, 180), (384, 141))  # values join behind the softmax
    d.arrow((260, 330), (384, 330), (384, 309))
    d.text(320, 54, "head 1", 14)
    d.text(320, 310, "head 2", 14)
    d.box("weight", 420, 172, 42, 44, "WO", 16)
    d.arrow((402, 94), (438, 170))
    d.arrow((402, 262), (438, 218))
    d.box("state", 474, 150, 42, 90, "L×D", 14)
    d.arrow((460, 194), (473, 194))
    return d


def three_paths() -> Drawing:
    d = Drawing(
        300,
        "The gradient of Z by three paths",
        "From the output the gradient passes the fourth map, then attention, and comes back to Z through the "
        "queries, the keys and the values, where the three are added.",
    )
    d.box("state", 12, 116, 66, 66, "Z")
    d.box("loss", 446, 126, 66, 44, "G")
    d.box("state", 250, 40, 92, 218, "attention\nof every\nhead")
    d.box("weight", 366, 126, 60, 44, "WO", 17)
    d.arrow((446, 148), (424, 148), gradient=True)
    d.arrow((368, 148), (344, 148), gradient=True)
    for n, letter in enumerate("QKV"):
        y = 44 + 82 * n
        d.box("weight", 128, y, 66, 44, f"W{letter}", 17)
        d.arrow((250, y + 22), (192, y + 22), gradient=True)
        d.text(222, y + 14, f"d{letter}", 15, colour=GRADIENT)
        d.arrow((130, y + 22), (80, 132 + 16 * n), gradient=True)
    d.text(260, 288, "dZ = dQ WQ + dK WK + dV WV", 17, colour=GRADIENT)
    return d


def block() -> Drawing:
    d = Drawing(
        430,
        "One pre-norm block and its stream",
        "A straight stream runs from the bottom to the top. Two branches leave it, pass a LayerNorm, then "
        "attention or the MLP, and are added to the stream.",
    )
    d.arrow((120, 410), (120, 16))
    for y, what, about in ((300, "attention", "between tokens"), (120, "MLP", "inside each token")):
        d.arrow((120, y + 74), (300, y + 74), (300, y + 62))
        d.box("weight", 240, y + 26, 120, 34, "LayerNorm")
        d.arrow((300, y + 26), (300, y + 4))
        d.box("weight", 240, y - 34, 120, 36, what)
        d.arrow((300, y - 34), (300, y - 60), (134, y - 60))
        d.text(372, y - 10, about, 15, "start")
        d.parts.append(
            f'<circle cx="120" cy="{y - 60}" r="12" fill="white" stroke="{INK}" stroke-width="1.5"/>'
        )
        d.text(120, y - 54, "+", 18)
    d.box("state", 70, 388, 100, 30, "z  (L, D)")
    d.text(108, 34, "the stream", 15, "end")
    d.arrow((92, 110), (92, 330), gradient=True)
    d.text(84, 224, "gradient", 14, "end", GRADIENT)
    return d


def vilt() -> Drawing:
    d = Drawing(
        470,
        "ViLT as a whole",
        "Words and patches are embedded, laid end to end, and pass the encoder. The states of hidden words "
        "answer for words, the first state for the pair, and words and patches for the alignment.",
    )
    for n, word in enumerate(("[CLS]", "a", "[MASK]", "left of")):
        d.box("mask" if word == "[MASK]" else "word", 8 + 63 * n, 420, 58, 30, word, 14)
        d.box("word", 8 + 63 * n, 310, 58, 26)
        d.box("state", 8 + 63 * n, 160, 58, 26)
        d.arrow((37 + 63 * n, 310), (37 + 63 * n, 256))
        d.arrow((37 + 63 * n, 210), (37 + 63 * n, 187))
    for n in range(4):
        d.box("picture", 268 + 63 * n, 420, 58, 30, "[CLS]" if n == 0 else f"patch {n}", 14)
        d.box("picture", 268 + 63 * n, 310, 58, 26)
        d.box("state", 268 + 63 * n, 160, 58, 26)
        d.arrow((297 + 63 * n, 310), (297 + 63 * n, 256))
        d.arrow((297 + 63 * n, 210), (297 + 63 * n, 187))
    d.box("weight", 8, 362, 248, 34, "word + position, LN, + type 0", 14)
    d.box("weight", 266, 362, 248, 34, "projection + position + type 1", 14)
    for x in (134, 390):
        d.arrow((x, 420), (x, 397))
        d.arrow((x, 362), (x, 338))
    d.box("weight", 8, 212, 504, 44, "encoder: blocks over one sequence", 17)
    d.box("loss", 8, 92, 108, 36, "match?", 16)
    d.arrow((38, 160), (52, 130))
    d.box("loss", 126, 92, 136, 36, "hidden word", 16)
    d.arrow((166, 160), (184, 130))
    d.box("loss", 290, 92, 214, 36, "words ↔ patches", 16)
    for x in (226, 360, 423, 486):
        d.arrow((x, 160), (340 if x == 226 else x, 130))
    d.text(62, 80, "matching", 14, colour=FLOW)
    d.text(194, 80, "masked words", 14, colour=FLOW)
    d.text(397, 80, "alignment", 14, colour=FLOW)
    d.text(260, 30, "one transformer reads words and patches", 17, bold=True)
    return d


def losses() -> Drawing:
    d = Drawing(
        360,
        "Two ways through the same blocks",
        "On the left captions and pictures pass all blocks together and serve three losses. On the right "
        "they "
        "pass the first half of the same blocks apart, and a noun has to find its picture.",
    )
    d.text(128, 24, "together", 17, bold=True)
    d.text(394, 24, "apart", 17, bold=True)
    d.box("word", 20, 316, 100, 32, "words")
    d.box("picture", 136, 316, 100, 32, "patches")
    d.box("weight", 20, 216, 216, 70, "blocks 1 and 2")
    d.box("weight", 20, 122, 216, 70, "blocks 3 and 4")
    for x in (70, 186):
        d.arrow((x, 316), (x, 287))
        d.arrow((x, 216), (x, 193))
        d.arrow((x, 122), (x, 96))
    d.box("loss", 12, 58, 232, 36, "word, match, alignment", 16)
    d.box("word", 286, 316, 100, 32, "one noun")
    d.box("picture", 402, 316, 100, 32, "patches")
    d.box("weight", 286, 216, 100, 70, "blocks\n1 and 2")
    d.box("weight", 402, 216, 100, 70, "blocks\n1 and 2")
    for x in (336, 452):
        d.arrow((x, 316), (x, 287))
        d.arrow((x, 216), (x, 96))
    d.box("loss", 278, 58, 232, 36, "whose picture is it?", 16)
    d.arrow((236, 251), (288, 251), head=False)
    d.text(262, 206, "same weights", 14, colour=FLOW)
    return d


def loop() -> Drawing:
    d = Drawing(
        300,
        "One step of the training loop",
        "A batch passes the model to the loss; the loss's gradient reaches every weight; the optimiser "
        "updates "
        "the weights, matrices by Muon and the rest by AdamW; then comes the next batch.",
    )
    d.box("picture", 14, 52, 92, 30, "pictures")
    d.box("word", 14, 92, 92, 30, "captions")
    d.box("weight", 160, 50, 120, 74, "model\nweights w", 17)
    d.box("loss", 350, 66, 130, 42, "loss terms", 16)
    d.arrow((106, 86), (164, 86))
    d.arrow((278, 80), (350, 80))
    d.arrow((350, 98), (276, 98), gradient=True)
    d.text(314, 120, "dL/dw", 15, colour=GRADIENT)
    d.box("state", 60, 192, 170, 62, "matrices of blocks:\nMuon")
    d.box("state", 270, 192, 190, 62, "tables, norms, biases:\nAdamW")
    d.arrow((236, 124), (330, 190), gradient=True)
    d.arrow((206, 124), (160, 190), gradient=True)
    d.arrow((120, 192), (184, 126))
    d.arrow((400, 192), (262, 126))
    d.text(260, 284, "rate: up in the warm-up, flat, down to zero", 15)
    return d


def who_sees() -> Drawing:
    d = Drawing(
        310,
        "Who sees whom, as tables",
        "Two tables of queries by keys. In the first padding is forbidden to all. In the second, for "
        "writing, "
        "each word sees earlier words and the picture, and the picture sees no word.",
    )
    filling = np.ones((6, 6), bool)
    filling[:, 2] = False
    writing = np.ones((6, 6), bool)
    writing[:3, :3] = np.tri(3, dtype=bool)
    writing[3:, :3] = False
    for x, table, name in ((44, filling, "filling in"), (310, writing, "writing")):
        d.text(x + 90, 26, name, 17, bold=True)
        for k in range(6):
            kind = "word" if k < 3 else "picture"
            d.box(kind, x + 30 * k, 46, 30, 24, "w" if k < 3 else "p", 14)
            d.box(kind, x - 32, 76 + 30 * k, 30, 30, "w" if k < 3 else "p", 14)
        d.grid(x, 76, 30, table, ("mask", "seen"))
    d.text(134, 286, "the third word is padding", 14)
    d.text(400, 286, "no word sees a later one", 14)
    return d


def course() -> Drawing:
    d = Drawing(
        400,
        "Part I of the course",
        "Chapters 01 to 03 make rows of pictures and words, 04 and 05 let rows look at rows, 06 and 07 say "
        "what "
        "is predicted, and 08 puts them together into a ViLT that the learner trains.",
    )
    d.box("state", 150, 14, 220, 40, "00 the field in one hour")
    d.box("state", 14, 84, 150, 46, "01 one matrix")
    d.box("picture", 182, 84, 150, 46, "02 patches")
    d.box("word", 350, 84, 156, 46, "03 words")
    d.box("weight", 90, 164, 160, 46, "04 attention")
    d.box("weight", 272, 164, 160, 46, "05 the block")
    d.box("loss", 60, 246, 190, 46, "06 masking words")
    d.box("loss", 272, 246, 190, 46, "07 matching pairs")
    d.box("weight", 100, 330, 320, 56, "08 ViLT, built and trained\nby you", 17)
    for x in (89, 257, 428):
        d.arrow((260, 54), (x, 83))
    d.arrow((89, 130), (150, 163))
    d.arrow((257, 130), (180, 163))
    d.arrow((428, 130), (230, 163))
    d.arrow((248, 187), (274, 187))
    d.arrow((170, 210), (155, 245))
    d.arrow((352, 210), (366, 245))
    d.arrow((155, 292), (200, 329))
    d.arrow((366, 292), (320, 329))
    return d


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    one.__name__: one
    for one in (
        legend, families, backward, patches, merges, whole_word, wrong_pairs, qkv, heads, three_paths,
        block, vilt, losses, loop, who_sees, course,
    )
}  # fmt: skip


def write(folder: Path = FOLDER) -> list[Path]:
    """Write all diagrams; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in DRAWINGS.items():
        paths.append(folder / f"{name}.svg")
        with whole_file(paths[-1]) as file:
            file.write(draw().svg().encode())
    return paths
