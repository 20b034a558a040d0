"""A teacher whose states are on disk: the same outputs, and what stands in the model's place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mta_fast.distill.heads import HeadStates, LMHead, frozen_linear, head_rows
from mta_fast.distill.teacher.contents import ENTROPY, LAST, Contents, Record
from mta_fast.distill.teacher.live import LiveTeacher, TeacherOutput, TeacherReads
from mta_fast.distill.teacher.rows import TeacherRow, row_places, side_of, teacher_rows
from mta_fast.distill.teacher.store import TeacherStore
from mta_fast.errors import InputError
from mta_fast.layout import Rows
from mta_fast.ops.importance import token_importance


class CachedTeacher:
    """Reads rows from a store; those that it lacks are run by the live teacher, and kept where they are wanted.

    A row that is kept is used as it is read later, rounded, so that an epoch doesn't depend on which one was first.

    Args:
        store: the rows.
        reads: what the run reads of them.
        importance: the layers whose importance it reads.
        device: where the outputs go.
        head: the LM head, where the base method reads it.
        live: the teacher, where it is loaded.
        backend: of the importance.

    Attributes:
        wanted: keys of the rows to keep, those of the data; None: all.

    A batch of none but rows that are not wanted (the student's own) is the live teacher's, not rounded.
    """

    def __init__(
        self,
        store: TeacherStore,
        reads: TeacherReads,
        *,
        importance: Sequence[int],
        device: torch.device,
        head: LMHead | None,
        live: LiveTeacher | None,
        backend: str = "auto",
    ) -> None:
        self.store, self.live, self._reads = store, live, reads
        self._importance, self._device, self._backend = importance, device, backend
        read = head if head is None or reads.ids is None or not reads.logits else head_rows(head, reads.ids)
        self._head, self._own_head = _on(device, read), head
        self.wanted: Collection[bytes] | None = None

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> TeacherOutput:
        """The output for a batch; zeros where nothing is stored (padding, last states of prompts), which no loss reads.

        Raises:
            InputError: a row that isn't stored, and no teacher to run; or a damaged shard.
        """
        rows = [row for row in teacher_rows(batch) if len(row.tokens)]
        missing = [row for row in rows if row.key not in self.store]
        if missing:
            self.store.refresh()
            missing = [row for row in missing if row.key not in self.store]
        if missing and self.live is None:
            raise InputError(
                f"{self.store.folder}: expected the states of every row, {len(missing)} of a batch of {len(rows)} are "
                f"not there, and the teacher isn't loaded; run mta-fast teach on these rows, or give the teacher"
            )
        if self.live is not None and len(missing) == len(rows) and not any(self._keeps(row.key) for row in missing):
            return self.live(batch)
        made = self.recorded(batch, missing) if missing else {}
        for key, record in made.items():
            if self.store.writable and self._keeps(key):
                self.store.add(key, record)
        records = [made[row.key] if row.key in made else self.store.read(row.key) for row in rows]
        return self._output(batch, rows, records)

    def _keeps(self, key: bytes) -> bool:
        return self.wanted is None or key in self.wanted

    @torch.no_grad()
    def recorded(self, batch: Mapping[str, Any], missing: Sequence[TeacherRow]) -> dict[bytes, Record]:
        """These rows of a batch, run by the live teacher, as they are stored."""
        live, contents = self.live, self.store.contents
        assert live is not None
        side = side_of(batch)
        if batch.get(f"{side}attention_mask") is not None:  # without a mask rows lie in one, which is run whole
            size = batch[f"{side}input_ids"].shape[1]
            chosen = torch.tensor([int(row.tokens[0]) // size for row in missing])
            names = [f"{side}{name}" for name in ("input_ids", "attention_mask", "labels", "position_ids")]
            batch = {name: batch[name][chosen.to(batch[name].device)] for name in names if name in batch}
            missing = teacher_rows(batch)
        states, read, _ = live.run(
            batch, list(contents.layers), self._own_head if contents.last or contents.entropy else None
        )
        flat = {layer: state.flatten(0, 1) for layer, state in states.items()}
        importance = {}
        if contents.importance:
            places = row_places(batch, side)
            for layer in contents.importance:
                importance[layer] = self._importances(flat[layer], places)
        last = None if read is None else read.states.flatten(0, 1)
        entropy = None
        if contents.entropy:
            assert read is not None
            read.vocabulary = contents.entropy
            entropy = live.entropy_of(read).flatten()
        made = {}
        for row in missing:
            place = row.tokens.to(self._device)
            made[row.key] = contents.encode(
                {layer: state[place] for layer, state in flat.items()},
                {layer: values[place] for layer, values in importance.items()},
                None if last is None else last[place.to(last.device)],
                None if entropy is None else entropy[place.to(entropy.device)],
                row.counted,
            )
        return made

    def _importances(self, states: Tensor, places: Sequence[Tensor]) -> Tensor:
        """[B * S] importance of a layer's real tokens, 0 elsewhere."""
        real = torch.cat(list(places)).to(states.device)
        lengths = torch.tensor([0, *map(len, places)]).cumsum(0)
        rows = Rows.from_cu_seqlens(lengths, len(real)).to(states.device)
        values = token_importance(states[real], rows=rows, causal=self.store.contents.causal, backend=self._backend)
        return values.new_zeros(len(states)).index_copy(0, real, values)

    def _output(self, batch: Mapping[str, Any], rows: Sequence[TeacherRow], records: Sequence[Record]) -> TeacherOutput:
        contents, reads = self.store.contents, self._reads
        shape = batch[f"{side_of(batch)}input_ids"].shape
        place = torch.cat([row.tokens for row in rows]).to(self._device)

        def spread(values: Tensor, at: Tensor = place) -> Tensor:
            """[B, S, ...] of values at real tokens."""
            return (
                values.new_zeros(shape.numel(), *values.shape[1:])
                .index_copy(0, at, values)
                .view(*shape, *values.shape[1:])
            )

        whole = _joined(records, _names(contents, reads, self._importance), self._device)
        head = None
        if reads.logits:
            assert self._head is not None
            at = place
            if contents.shared is None:
                at = torch.cat([row.tokens[row.counted] for row in rows]).to(self._device)
            dtype = self._head.linear.weight.dtype
            head = HeadStates(self._head, reads.vocabulary, states=spread(whole[LAST].to(dtype), at))
        return TeacherOutput(
            None,
            {layer: spread(contents.states(whole, layer)) for layer in reads.layers},
            spread(whole[ENTROPY]) if reads.entropy else None,
            head,
            {layer: spread(whole[f"{layer}.importance"]) for layer in self._importance},
        )


def _names(contents: Contents, reads: TeacherReads, importance: Sequence[int]) -> list[str]:
    """The parts of a record that a run reads."""
    names = [LAST] if reads.logits or contents.shared in reads.layers else []
    for layer in reads.layers:
        if layer != contents.shared:
            names += [str(layer), *([f"{layer}.scale"] if contents.dtype == "int8" else [])]
    return [*names, *(f"{layer}.importance" for layer in importance), *([ENTROPY] if reads.entropy else [])]


def _joined(records: Sequence[Record], names: Sequence[str], device: torch.device) -> Record:
    return {name: torch.cat([record[name] for record in records]).to(device) for name in names}


class StoredTeacher(nn.Module):
    """What is left of a teacher whose states are on disk: its head, and what else is asked of a model without a pass.

    Attributes:
        config: depth and vocabulary.
        stored_head: its LM head; None where the cache has none.
        widths: {layer: width} of its hidden states in the cache; head_width: of the state before the LM head.
        weights: what a run's fingerprint says of the teacher that was stored.
    """

    def __init__(self, store: TeacherStore) -> None:
        super().__init__()
        model, tensors = store.description["model"], store.head()
        self.config = StoredConfig(model)
        self.widths, self.weights = dict(store.contents.layers), model["weights"]
        self.head_width = store.contents.last or 1
        self.stored_head: LMHead | None = None
        self.lm_head: nn.Linear | None = None
        self.project_out: nn.Linear | None = None
        if tensors:
            about = store.description["head"]
            self.lm_head = _linear(tensors, "head")
            self.stored_head = LMHead(self.lm_head, about["scale"], about["softcap"])
        if "project_out.weight" in tensors:
            self.project_out = _linear(tensors, "project_out")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> None:
        """Not there.

        Raises:
            InputError: always.
        """
        raise InputError("teacher: expected a model that runs, its states are on disk; give the model")

    def get_output_embeddings(self) -> nn.Linear | None:
        """The LM head."""
        return self.lm_head

    def get_input_embeddings(self) -> Any:
        """How many tokens it knew."""
        return SimpleNamespace(num_embeddings=self.config.embeddings)

    @property
    def base_model(self) -> Any:
        """Where OPT's project_out would be."""
        return SimpleNamespace(decoder=SimpleNamespace(project_out=self.project_out))


class StoredConfig:
    """The part of a model's config that is asked for."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.num_hidden_layers, self.vocab_size = model["depth"], model["vocabulary"]
        self.embeddings, self.model_type = model["embeddings"], model["type"]

    def get_text_config(self, decoder: bool = False) -> StoredConfig:
        """Itself."""
        return self


def head_tensors(head: LMHead | None, project_out: nn.Module | None = None) -> dict[str, Tensor]:
    """What ``StoredTeacher`` needs of a head."""
    tensors: dict[str, Tensor] = {}
    if head is not None:
        weight, bias = head.weight_and_bias()
        tensors |= {"head.weight": weight} | ({} if bias is None else {"head.bias": bias})
    if project_out is not None:
        tensors |= {f"project_out.{key}": value for key, value in project_out.named_parameters()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def _on(device: torch.device, head: LMHead | None) -> LMHead | None:
    """A head where the outputs go; a copy where the teacher is elsewhere."""
    if head is None or head.linear.weight.device == device:
        return head
    moved = {name: value.to(device) for name, value in head_tensors(head).items()}
    return LMHead(_linear(moved, "head"), head.scale, head.softcap)


def _linear(tensors: Mapping[str, Tensor], name: str) -> nn.Linear:
    return frozen_linear(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))
