"""What the three views share: wording, visible characters, colours, and where span marks go."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from mta_fast.inspection.measure import Floats, Inspection, LayerPair, Span
from mta_fast.inspection.side import Token

STRONG_IMPORTANCE = 3.0  # times an average token: the end of the colour scale
WITHIN_SCALE = 0.98  # share of the span pairs inside the colour scales: one outlier would pale all others
CONTINUED = "⋯"  # a token that only holds further bytes of the character before

Length = TypeVar("Length", int, float)  # columns of a terminal, inches of a picture
Colour = tuple[int, int, int]
Ramp = tuple[tuple[float, Colour], ...]

# Distances: strong colour is near. Differences: blue where the student has two spans too close, red too far apart.
NEAR_TO_FAR: dict[str, Ramp] = {
    "light": ((0.0, (11, 69, 66)), (0.35, (42, 143, 132)), (0.7, (168, 213, 205)), (1.0, (244, 248, 247))),
    "dark": ((0.0, (190, 246, 230)), (0.35, (66, 178, 161)), (0.7, (29, 84, 79)), (1.0, (22, 32, 33))),
}
CLOSER_TO_FARTHER: dict[str, Ramp] = {
    "light": ((0.0, (29, 78, 216)), (0.5, (246, 246, 247)), (1.0, (200, 30, 30))),
    "dark": ((0.0, (120, 170, 255)), (0.5, (27, 30, 36)), (1.0, (255, 120, 110))),
}
IMPORTANCE: dict[str, Ramp] = {
    "light": ((0.0, (255, 255, 255)), (0.34, (255, 228, 181)), (1.0, (240, 124, 32))),
    # neither dark nor light: legible black text on it, and visible on any terminal's background
    "terminal": ((0.0, (196, 182, 158)), (0.34, (214, 168, 96)), (1.0, (238, 96, 30))),
}

EXPLANATION = (
    (
        "Which tokens matter",
        "The colour of a token is its importance: how much the other tokens attend to it in the teacher, the big "
        "model. Words and phrases (underlined) inherit it from their tokens as salience.",
    ),
    (
        "How a model arranges the text",
        "Each cell of a matrix is the distance of two words or phrases inside one model, 1 - cosine of their hidden "
        "states: the stronger the colour, the closer the model puts them.",
    ),
    (
        "What MTA changes",
        "Training with MTA makes the matrix of the student, the small model, like the teacher's. DSA, the loss, is the "
        "squared difference of the two, weighted by salience: 0 when they are equal.",
    ),
)


class Scales(NamedTuple):
    """The ends of a layer pair's two colour scales."""

    distance: float
    difference: float


def scales(pair: LayerPair) -> Scales:
    """Both matrices share one scale, so that equal colours are equal distances; a few outliers lie beyond it."""
    upper = np.triu_indices(len(pair.spans), 1)
    teacher, student = pair.teacher_distances[upper], pair.student_distances[upper]
    if not teacher.size:
        return Scales(1.0, 1.0)
    distance = np.quantile(np.concatenate([teacher, student]), WITHIN_SCALE)
    difference = np.quantile(np.abs(student - teacher), WITHIN_SCALE)
    return Scales(float(distance) or 1.0, float(difference) or 1.0)


def colours(values: Floats, ramp: Ramp) -> np.ndarray:
    """Values in 0 ... 1 of any shape to [..., 3] RGB of 0 ... 255."""
    stops, anchors = zip(*ramp, strict=True)
    channels = [np.interp(values, stops, [anchor[c] for anchor in anchors]) for c in range(3)]
    return np.rint(np.stack(channels, -1)).astype(np.uint8)


def distance_colours(distances: Floats, pair: LayerPair, theme: str) -> np.ndarray:
    """[N, N, 3] of a distance matrix."""
    return colours(distances / scales(pair).distance, NEAR_TO_FAR[theme])


def difference_colours(pair: LayerPair, theme: str) -> np.ndarray:
    """[N, N, 3] of student minus teacher."""
    difference = pair.student_distances - pair.teacher_distances
    return colours(difference / scales(pair).difference / 2 + 0.5, CLOSER_TO_FARTHER[theme])


def weight_shares(pair: LayerPair) -> Floats:
    """[N] salience over the largest of the layer pair, 0 ... 1."""
    made: Floats = pair.salience / (pair.salience.max(initial=0) or 1.0)
    return made


def strength(relative_importance: Floats | float) -> Floats:
    """Relative importance to 0 ... 1 of the colour scale."""
    made: Floats = np.clip(np.asarray(relative_importance) / STRONG_IMPORTANCE, 0, 1)
    return made


# --- characters --------------------------------------------------------------------------------------------------


def visible(token: Token) -> str:
    """The token's characters with control characters, line breaks and lone marks made visible."""
    return CONTINUED if token.continues else shown(token.text)


def shown(text: str) -> str:
    """``text`` on one line, without characters that steer a terminal or hide."""
    if len(text) > 1 and text.strip(" ") == "":  # indentation
        return "·" * len(text)
    if all(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text):
        return "".join(f"◌{c}" if unicodedata.category(c)[0] == "M" else f"U+{ord(c):04X}" for c in text)
    return "".join(map(_shown_character, text))


def _shown_character(c: str) -> str:
    known = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x7f": "␡", "\u2028": "↵", "\u2029": "↵"}.get(c)
    if known is not None:
        return known
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    category = unicodedata.category(c)
    if category in ("Cc", "Cs") or (category == "Cf" and c not in "\u200c\u200d"):  # joiners shape the letters
        return "�"
    return c


def label(text: str, width: int) -> str:
    """A span's text on one line of at most ``width`` characters."""
    line = shown(" ".join(text.split()) or text)
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def line_ends(tokens: Sequence[Token]) -> set[int]:
    """The tokens after which the text goes on in a new line; of several line breaks in a row the last."""
    made = set()
    for i, token in enumerate(tokens):
        if token.special or token.continues or not token.text.rstrip(" \t").endswith(("\n", "\r")):
            continue
        following = tokens[i + 1] if i + 1 < len(tokens) else None
        if following is None or following.text.strip() or not following.text.endswith(("\n", "\r")):
            made.add(i)
    return made


class Box(NamedTuple, Generic[Length]):
    """A token on its line."""

    token: int  # its position in the text
    text: str
    left: Length
    width: Length


def lines(
    tokens: Sequence[Token], width_of: Callable[[str], Length], room: Length, thinnest: Length
) -> list[list[Box[Length]]]:
    """The text in lines of at most ``room``; a token alone may be wider. None is drawn thinner than ``thinnest``."""
    made: list[list[Box[Length]]] = [[]]
    start = at = type(room)()
    ends = line_ends(tokens)
    for i, token in enumerate(tokens):
        text = visible(token)
        width = max(width_of(text), thinnest)
        gap = width_of(shown(token.gap)) if token.gap and made[-1] else start
        if made[-1] and at + gap + width > room:
            made.append([])
            at = gap = start
        made[-1].append(Box(i, text, at + gap, width))
        at += gap + width
        if i in ends and i + 1 < len(tokens):
            made.append([])
            at = start
    return made


def right_to_left(text: str) -> bool:
    """Whether the first letter with a direction is written from right to left."""
    directions = (unicodedata.bidirectional(c) for c in text)
    return next((d for d in directions if d in ("L", "R", "AL")), "L") != "L"


# --- spans -------------------------------------------------------------------------------------------------------


def lanes(spans: Sequence[Span]) -> list[int]:
    """The row of each span's mark: spans that share a token get rows of their own."""
    ends: list[int] = []
    made = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: (spans[i].teacher_tokens[0], -spans[i].teacher_tokens[1])):
        first, last = spans[i].teacher_tokens
        lane = next((lane for lane, end in enumerate(ends) if end <= first), len(ends))
        ends[lane:] = [last, *ends[lane + 1 :]]
        made[i] = lane
    return made


def most_salient(pair: LayerPair, count: int) -> list[int]:
    """At most ``count`` spans with the largest salience, in the order of the text."""
    order = np.argsort(-pair.salience, kind="stable")[:count]
    return sorted(order.tolist(), key=lambda i: (pair.spans[i].start, pair.spans[i].end))


# --- wording -----------------------------------------------------------------------------------------------------


def plural(count: int, noun: str) -> str:
    """'1 word', '2 words'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def title(inspection: Inspection) -> str:
    """Of the page, the picture and what is printed."""
    return f"What MTA sees: {inspection.teacher} teaches {inspection.student}"


def summary(inspection: Inspection) -> list[str]:
    """Facts about the text, one sentence each."""
    counts = [plural(len(spans), kind) for kind, spans in inspection.spans.items()]
    facts = [f"{', '.join([plural(len(inspection.tokens), 'token'), *counts])}."]
    if inspection.two_tokenizers:
        facts.append(f"The student's tokenizer makes {plural(len(inspection.student_tokens), 'token')} of the text.")
    if inspection.truncated:
        facts.append("The text is longer; only its beginning was read.")
    for kind, dropped in inspection.dropped.items():
        if dropped:
            facts.append(f"{plural(dropped, kind)} cut by truncation or without a token of their own: left out.")
    return facts


def heading(pair: LayerPair, inspection: Inspection) -> str:
    """Which layers are compared."""
    return (
        f"student layer {pair.student_layer} of {inspection.student_depth} ← "
        f"teacher layer {pair.teacher_layer} of {inspection.teacher_depth}, {pair.granularity}s"
    )


def values(pair: LayerPair) -> str:
    """The two terms of this layer pair."""
    hid = "Hid not measured (it needs trained projections)" if pair.hid is None else f"Hid {number(pair.hid)}"
    return f"DSA {number(pair.dsa)}; {hid}"


def nothing_to_compare(pair: LayerPair) -> str | None:
    """Why there are no matrices, or None."""
    if len(pair.spans) >= 2:
        return None
    if not pair.spans:
        return f"No {pair.granularity}s were found in this text: MTA has nothing to compare here, DSA is 0."
    return (
        f"Only one {pair.granularity} ({label(pair.spans[0].text, 40)}) was found: DSA compares pairs, so it is 0 here."
    )


def verdict(teacher: float, student: float) -> str:
    """What the student does wrong with two spans."""
    return "too far apart" if student > teacher else "too close"


def number(value: float) -> str:
    """Three significant digits, without exponents where they can be avoided."""
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def quoted(texts: Iterable[str], width: int) -> list[str]:
    """Labels of spans in quotation marks."""
    return [f"“{label(text, width)}”" for text in texts]
