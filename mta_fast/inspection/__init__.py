"""What MTA sees in one text: measured once (``measure``), shown in a terminal, as a web page or as a picture."""

from mta_fast.inspection.measure import Inspection, LayerPair, Span, SpanPair, inspect_text
from mta_fast.inspection.page import write_html
from mta_fast.inspection.picture import write_png
from mta_fast.inspection.side import Token
from mta_fast.inspection.terminal import render_terminal

__all__ = [
    "Inspection",
    "LayerPair",
    "Span",
    "SpanPair",
    "Token",
    "inspect_text",
    "render_terminal",
    "write_html",
    "write_png",
]
