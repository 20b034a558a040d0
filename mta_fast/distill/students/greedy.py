"""Which blocks of a teacher a student keeps, by the loss without them on a few rows of text."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mta_fast.distill.heads import HeadStates, LMHead, deferring, take_apart
from mta_fast.distill.methods.losses import TokenMethod
from mta_fast.distill.students.cut import blocks_of, check_cut, check_layers, cut_layers
from mta_fast.errors import InputError
from mta_fast.inputs import model_inputs
from mta_fast.layers import block_list, evaluating, num_layers
from mta_fast.spans.collate import SpanCollator

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 128
TOLERANCE = 1e-3  # relative difference of a student's loss and that of the teacher's passes without the same block


def greedy_layers(
    teacher: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    keep: int,
    *,
    length: int = LENGTH,
    report: Callable[[int, float], None] | None = None,
) -> list[int]:
    """The blocks that are left when the one without which the loss is smallest has gone, again and again.

    A block's cost, the rise of the loss without it, is computed anew only where its last one, of an earlier round, is
    below the smallest of this round: it rarely falls when other blocks go.

    Args:
        teacher: as ``cut_layers`` takes it.
        tokenizer: its fast tokenizer.
        rows: as ``row_batch`` takes them, a single batch: memory grows with their number.
        keep: how many blocks are left.
        length: tokens of a row.
        report: called after each removal with the block and the loss without it, in nats.

    Returns:
        The blocks for ``cut_layers``, which accepts them.

    Raises:
        InputError: as ``row_batch`` and ``cut_layers`` do; a model of whose blocks none can go but the last, or whose
            blocks hand on more than one stream of states.
    """
    depth = num_layers(teacher)
    check_layers(keep, depth)
    batch = row_batch(teacher, tokenizer, rows, length=length)
    if keep == depth:
        return list(range(depth))
    left = _BlocksLeft(teacher, batch)
    _check_passes(left)
    costs = dict.fromkeys(left.blocks, -math.inf)
    while len(left.blocks) > keep:
        block = _cheapest(left, costs)
        left.remove(block)
        if report is not None:
            report(block, left.loss)
    return left.blocks


def _cheapest(left: _BlocksLeft, costs: dict[int, float]) -> int:
    """The block of the least cost among those that can go; ``costs``, of earlier rounds, are brought up to date."""
    candidates, fresh, reason = set(left.blocks), set(), ""
    while candidates:
        block = min(sorted(candidates), key=costs.__getitem__)
        if block not in fresh:
            costs[block] = left.loss_without(block) - left.loss
            fresh.add(block)
            continue
        try:
            check_cut(left.model, left.others(block))
        except InputError as error:
            candidates.remove(block)
            reason = str(error)
            continue
        return block
    raise InputError(f"layers: expected a block of {left.blocks} that can go, there is none; {reason}")


def _check_passes(left: _BlocksLeft) -> None:
    """Refuse a model whose passes without a block say nothing of a student without it, before all of them are run."""
    reason = "it has one"
    for block in left.blocks[:-1]:
        try:
            check_cut(left.model, left.others(block))
        except InputError as error:
            reason = str(error)
            continue
        student = mean_loss(cut_layers(left.model, left.others(block)), left.batch)
        made = left.loss_without(block)
        if not abs(student - made) <= TOLERANCE * abs(student):
            raise InputError(
                f"layers: expected blocks that hand on one stream of states, a student of {type(left.model).__name__} "
                f"without block {block} has a loss of {student:.4f}, its passes without it {made:.4f}; choose the "
                f"blocks with --keep or --even"
            )
        return
    raise InputError(
        f"layers: expected a model that can do without a block before its last, {type(left.model).__name__} can't "
        f"({reason}); choose the blocks with --keep or --even"
    )


# --- the loss ----------------------------------------------------------------------------------------------------


def row_batch(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, length: int = LENGTH
) -> dict[str, Any]:
    """Rows as a batch on the model's device.

    Args:
        rows: with "prompt" and "output", whose tokens and end count in the loss, or only "text", all of which counts.
        length: tokens that a row is truncated to.

    Raises:
        InputError: no rows, none with a token that counts, or tokens that the model doesn't know.
    """
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    collate = SpanCollator(tokenizer, granularity=(), max_length=length, num_embeddings=known)
    batch = collate.tokenize(rows).batch
    if not counted(batch):
        raise InputError(
            f"rows: expected a response within the first {length} tokens, got none in {len(rows)} rows; raise the "
            f"length, or give rows with shorter prompts"
        )
    return {name: value.to(model.device) for name, value in batch.items()}


def counted(batch: Mapping[str, Any]) -> int:
    """How many tokens count in the loss."""
    return int(_METHOD.counts(batch))


def mean_loss(model: PreTrainedModel, batch: Mapping[str, Any], head: LMHead | str | None = None) -> float:
    """The mean of -log q(token | those before it) over the tokens that count, in nats.

    Args:
        batch: of ``row_batch``.
        head: what ``take_apart`` said of the model, where it is known; through a head no other logits are made.
    """
    head = take_apart(model) if head is None else head
    with evaluating(model), torch.no_grad():
        with deferring(head if isinstance(head, LMHead) else None) as read:
            logits = model(**model_inputs(model, batch), use_cache=False).logits
        return float(_METHOD.sums(_Output(logits, read), _Output(), batch)) / counted(batch)


class _Output(NamedTuple):
    """A pass; with nothing in it the teacher's, which isn't read."""

    logits: Any = None
    head: HeadStates | None = None
    hidden_states: Any = None


_METHOD = TokenMethod("cross_entropy")


# --- passes without some blocks ----------------------------------------------------------------------------------


class _BlocksLeft:
    """A model of whose blocks some are left, and passes that begin where a block is missing.

    Attributes:
        blocks: those that are left.
        loss: with all of them.
    """

    def __init__(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
        self.model, self.batch, self._head = model, batch, take_apart(model)
        self._modules = blocks_of(model, block_list(model))
        self._read: dict[int, Tensor] = {}  # [B, S, d] that each block reads
        self._beside: dict[int, tuple[Any, ...] | None] = {}  # what it returns behind its states; None: them alone
        self.blocks = list(range(len(self._modules)))
        self.loss = self._pass(self.blocks, None, keep=True)

    def others(self, block: int) -> list[int]:
        """Those that are left without this one."""
        return [other for other in self.blocks if other != block]

    def loss_without(self, block: int) -> float:
        """The loss if this block went too."""
        return self._pass(self._behind(block), self._read[block])

    def remove(self, block: int) -> None:
        """Let a block go."""
        behind = self._behind(block)
        self.blocks.remove(block)
        self.loss = self._pass(behind, self._read.pop(block), keep=True)

    def _behind(self, block: int) -> list[int]:
        return self.blocks[self.blocks.index(block) + 1 :]

    def _pass(self, blocks: Sequence[int], start: Tensor | None, *, keep: bool = False) -> float:
        """The loss of a pass through these blocks.

        Args:
            start: what the first of them reads; None: the embeddings.
            keep: keep what each of them reads.
        """
        for number, module in enumerate(self._modules):
            module._compiled_call_impl = functools.partial(self._call, number, blocks, start, keep)
        try:
            return mean_loss(self.model, self.batch, self._head)
        finally:
            for module in self._modules:
                module._compiled_call_impl = None

    def _call(
        self, number: int, blocks: Sequence[int], start: Tensor | None, keep: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """What the model calls in a block's place: the block, or nothing but its states."""
        states = args[0] if args else kwargs["hidden_states"]
        if number == 0 and start is not None:
            states = start
        if number not in blocks:
            beside = self._beside[number]
            return states if beside is None else (states, *beside)
        if keep:
            self._read[number] = states
        module: Any = self._modules[number]
        module._compiled_call_impl = None
        output = module(states, *args[1:], **kwargs) if args else module(**kwargs | {"hidden_states": states})
        self._beside[number] = None if isinstance(output, Tensor) else tuple(output[1:])
        return output
