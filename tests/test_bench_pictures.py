"""The experiment's pictures: what they show, and that nothing of it is cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from bench.experiment import pictures
from bench.experiment.pictures import Difference, forest, learning_curves
from mta_fast.errors import InputError

STEPS = range(0, 601, 100)


def _arm(end: float, seeds: int) -> list[list[tuple[int, float]]]:
    return [[(step, end + seed / 10 + 8 * 0.5 ** (step / 50)) for step in STEPS] for seed in range(seeds)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, each laid out and written, and seen to lie on its page."""
    figures: list[Any] = []
    save = pictures.save_figure

    def checked(figure: Any, path: Path, *, dpi: int) -> None:
        save(figure, path, dpi=dpi)
        box, page = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.02
        assert box.x1 < page[0] + 0.02
        assert box.y1 < page[1] + 0.02
        figures.append(figure)

    monkeypatch.setattr(pictures, "save_figure", checked)
    return figures


def test_curves_are_means_with_their_intervals(tmp_path: Path, drawn: list[Any]) -> None:
    curves = {
        "base": _arm(2.0, 3),
        "base + MTA": _arm(1.9, 3),
        "base + placebo": _arm(1.95, 1),
        "base, time of MTA": _arm(1.97, 2),
    }
    file = tmp_path / "curves.png"
    learning_curves(file, curves, title="A student", y_label="forward KL, nats", reference=("teacher", 1.5))
    assert file.read_bytes().startswith(b"\x89PNG")
    whole, later = drawn[0].axes
    base = whole.lines[0]
    assert list(base.get_xdata()) == list(STEPS)
    assert base.get_ydata()[-1] == pytest.approx(2.1 + 8 * 0.5**12)  # the mean of 2.0, 2.1 and 2.2 at the end
    band = whole.collections[0].get_paths()[0].vertices
    ends = band[band[:, 0] == 600][:, 1] - base.get_ydata()[-1]
    assert max(ends) == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t with 2 degrees of freedom
    assert min(ends) == pytest.approx(-max(ends))
    alone = whole.collections[2].get_paths()[0].vertices  # one seed has no band
    assert set(alone[alone[:, 0] == 600][:, 1]) == {whole.lines[2].get_ydata()[-1]}
    assert (whole.get_yscale(), later.get_yscale()) == ("log", "linear")
    assert later.get_xlim()[0] == 300
    words = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert words == [
        *("base (3 seeds)", "base + MTA (3 seeds)", "base + placebo (1 seed)", "base, time of MTA (2 seeds)"),
        "teacher: 1.5",
    ]


@pytest.mark.parametrize(
    ("seeds", "got"), [([], "no points"), ([[]], "0 points"), ([[(0, 1.0), (10, 1.0)], [(0, 1.0)]], "2 and 1 points")]
)
def test_runs_that_ended_early_make_no_mean(seeds: list[list[tuple[int, float]]], got: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"points of 'full' at the same steps with every seed, got {got}"):
        learning_curves(tmp_path / "curves.png", {"full": seeds}, title="", y_label="")
    assert not any(tmp_path.iterdir())


def test_differences_stand_beside_their_numbers(tmp_path: Path, drawn: list[Any]) -> None:
    groups = [
        (
            "A student from scratch: forward KL on out-of-domain text",
            [
                Difference("base + MTA − base", -0.0912, -0.12, -0.0624, 8, "better"),
                Difference("base, for the time of MTA − base", -0.02, -0.05, 0.01, 8, "undecided"),
            ],
        ),
        (
            "A healed cut",
            [
                Difference("base + MTA − base", 0.03, 0.01, 0.05, 3, "worse"),
                Difference("placebo − base", 0.01, 0.01, 0.01, 1, "undecided"),
                Difference("ridge start − base", None, None, None, 0, "failed"),
            ],
        ),
    ]
    forest(tmp_path / "forest.png", groups, title="Differences", x_label="nats a token")
    axes, numbers = drawn[0].axes
    assert [text.get_text() for text in numbers.get_yticklabels()] == [
        "−0.091 [−0.120 … −0.062]   better, n = 8",
        "−0.020 [−0.050 … +0.010]   undecided, n = 8",
        "+0.030 [+0.010 … +0.050]   worse, n = 3",
        "+0.010 [one pair]   undecided, n = 1",
        "no pair of runs   failed",
    ]
    points = {int(line.get_ydata()[0]): line for line in axes.lines if line.get_marker() == "o"}
    assert {y: line.get_xdata()[0] for y, line in points.items()} == {1: -0.0912, 2: -0.02, 4: 0.03, 5: 0.01}
    looks = [(line.get_color(), line.get_markerfacecolor()) for line in points.values()]
    assert looks == [
        *((pictures.BLUE, pictures.BLUE), (pictures.SOFT, "white"), (pictures.VERMILLION, pictures.VERMILLION)),
        (pictures.SOFT, "white"),
    ]
    low, high = axes.get_xlim()
    assert low < -0.12
    assert high > 0.05


def test_no_differences_no_picture(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected at least one difference, got none"):
        forest(tmp_path / "forest.png", [("empty", [])], title="", x_label="")
