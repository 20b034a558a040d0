"""`mta-fast cut`: blocks by the loss, evenly or by hand; the student of them, and the loss before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mta_fast.distill.data import PromptRow, drop_long_rows, load_rows
from mta_fast.distill.students.cut import check_layers, cut_layers
from mta_fast.distill.students.greedy import LENGTH, counted, greedy_layers, mean_loss, row_batch
from mta_fast.errors import InputError
from mta_fast.layers import num_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_AHEAD = 8  # rows that are read for one that is used: those whose prompt fills the length are left out


@dataclass(frozen=True, eq=False)
class Cut:
    """A student and how it was cut.

    Attributes:
        student: the model.
        blocks: of the teacher, in the student's order.
        how: who chose them, in words.
        removed: (block, loss on the rows that chose once it had gone), in nats a token and in order.
        losses: the teacher's and the student's, in nats a token; judged_on: which rows those are of, in words.
    """

    student: PreTrainedModel
    blocks: list[int]
    how: str
    removed: Sequence[tuple[int, float]]
    losses: tuple[float, float]
    judged_on: str

    def facts(self) -> dict[str, Any]:
        """What is recorded with the student."""
        made: dict[str, Any] = {"blocks": self.blocks, "chosen": self.how}
        if self.removed:
            made["removed"] = [{"block": block, "loss": round(loss, 4)} for block, loss in self.removed]
        teacher, student = (round(loss, 4) for loss in self.losses)
        return made | {"loss": {"teacher": teacher, "student": student, "on": self.judged_on}}

    def lines(self) -> list[str]:
        """The same for a reader."""
        teacher, student = self.losses
        return [
            f"blocks {','.join(map(str, self.blocks))}, chosen {self.how}",
            f"loss in nats a token, on {self.judged_on}: teacher {teacher:.3f}, student {student:.3f}",
        ]


def parse_blocks(layers: str | None, keep: str | None, *, even: bool = False) -> int | list[int]:
    """How many blocks or which ones: the options --layers ("10", or "0,4,9" as --keep has it), --keep and --even.

    Raises:
        InputError: not one of --layers and --keep, no such numbers, or --even beside numbers of blocks.
    """
    given = {name: text for name, text in (("layers", layers), ("keep", keep)) if text is not None}
    if len(given) != 1:
        got = " and ".join(f"--{name} {text}" for name, text in given.items()) or "neither"
        raise InputError(f"cut: expected one of --layers (how many blocks) and --keep (which ones), got {got}")
    ((name, text),) = given.items()
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        form = "numbers such as 0,4,9" if name == "keep" else "a number"
        raise InputError(f"{name}: expected {form}, got {text!r}") from None
    if name == "layers" and "," not in text:
        return numbers[0]
    if even:
        raise InputError(f"cut: expected --even beside --layers NUMBER, got it beside the blocks {text}; leave it out")
    return numbers


def read_text(source: str, tokenizer: Any, *, rows: int, length: int = LENGTH, **options: Any) -> list[PromptRow]:
    """The first rows of a source with room for a response: ``rows`` to choose by, then at most as many others.

    Args:
        length: tokens of a row.
        options: of ``load_rows``.

    Raises:
        InputError: as ``load_rows`` does, or prompts that all fill the length.
    """
    found = load_rows(source, tokenizer=tokenizer, limit=2 * READ_AHEAD * rows, **options)
    return drop_long_rows(found, tokenizer, max_length=length).rows[: 2 * rows]


def cut_student(
    teacher: PreTrainedModel,
    tokenizer: Any,
    layers: int | Sequence[int],
    text: Sequence[Mapping[str, Any]],
    *,
    rows: int,
    length: int = LENGTH,
    even: bool = False,
    report: Callable[[int, float], None] | None = None,
) -> Cut:
    """Choose blocks, cut the teacher, and compare the two.

    Args:
        teacher, tokenizer, report: as ``greedy_layers`` takes them.
        layers: how many blocks, chosen by the loss; or which ones.
        text: rows that ``read_text`` gives.
        rows: so many of them choose, and those behind give the loss, if there are any; length: tokens of a row.
        even: of a number of layers, spread them evenly.

    Raises:
        InputError: as ``greedy_layers`` and ``cut_layers`` do.
    """
    removed: list[tuple[int, float]] = []
    chosen_by, others = text[:rows], text[rows:]

    def note(block: int, loss: float) -> None:
        removed.append((block, loss))
        if report is not None:
            report(block, loss)

    if isinstance(layers, int) and not even:
        blocks = greedy_layers(teacher, tokenizer, chosen_by, layers, length=length, report=note)
        how = f"by the loss on rows 1 to {len(chosen_by)} of the text"
    else:
        blocks = check_layers(layers, num_layers(teacher))
        how = "evenly" if even else "by hand"
    student = cut_layers(teacher, blocks)
    batch = row_batch(teacher, tokenizer, others or chosen_by, length=length)
    begin, end = (rows, len(text)) if others else (0, len(text))
    judged_on = f"rows {begin + 1} to {end} of the text ({counted(batch)} tokens)"
    return Cut(student, blocks, how, removed, (mean_loss(teacher, batch), mean_loss(student, batch)), judged_on)
