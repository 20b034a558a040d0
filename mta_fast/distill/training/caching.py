"""A trainer's teacher cache: what it holds, which rows are missing, and how they are filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mta_fast.choices import check_choice
from mta_fast.config import MTAConfig
from mta_fast.distill.heads import LMHead, take_apart
from mta_fast.distill.methods.base import BaseMethod, StepBatches
from mta_fast.distill.teacher.cached import CachedTeacher, StoredTeacher, head_tensors
from mta_fast.distill.teacher.contents import CACHE_DTYPES, Contents
from mta_fast.distill.teacher.live import LiveTeacher, TeacherReads
from mta_fast.distill.teacher.rows import teacher_rows
from mta_fast.distill.teacher.store import TeacherStore, in_words, open_store
from mta_fast.distill.training.feeding import is_stream
from mta_fast.distill.training.fingerprint import of_weights
from mta_fast.distill.training.identity import check_contents, check_same, identity_of, surroundings
from mta_fast.errors import InputError
from mta_fast.files import user_path
from mta_fast.layers import evaluating, hidden_widths, num_layers, unwrap
from mta_fast.loss import MTALoss
from mta_fast.spans.collate import SpanCollator

PLANNED_ROWS, PROBE_TOKENS = 256, 4
OVERHEAD = 1.01  # of a shard's header


@dataclass(frozen=True)
class TeacherCache:
    """Where a teacher's states are kept, and how.

    Attributes:
        folder: of one teacher with one set of layers; made where it is missing.
        dtype: of the chosen layers, "int8" (groups of 32 features), "bfloat16", "float16" or "float32".
        source: what tells the teacher without loading it (``identity.source_of``).
        sources: files and folders that are read, which the folder must be apart from.
    """

    folder: str | Path
    dtype: str = "int8"
    source: Mapping[str, Any] | None = None
    sources: Sequence[Path] = ()

    def __post_init__(self) -> None:
        check_choice("cache_dtype", self.dtype, CACHE_DTYPES)

    @property
    def path(self) -> Path:
        """The folder."""
        return user_path(self.folder)

    def stored_teacher(self, *, with_head: bool) -> StoredTeacher:
        """What stands in the teacher's place where it is not loaded.

        Raises:
            InputError: nothing is cached, or, with_head, no LM head.
        """
        made = StoredTeacher(TeacherStore(self.path))
        if with_head and made.stored_head is None:
            raise InputError(
                f"{self.path}: expected a cache with the LM head and the states that it reads, as the base loss reads "
                f"the teacher's distribution, it has none; give another folder as teacher.cache, or delete this one "
                f"to make it again"
            )
        return made


@dataclass(frozen=True)
class PlannedRow:
    """Where a row is, its keys (two of a pair), and how many tokens and counted positions each has."""

    rows: Any
    index: int
    sizes: Mapping[bytes, tuple[int, int]]

    @property
    def row(self) -> Any:
        """The row."""
        return self.rows[self.index]


def planned(rows: Any, collator: Callable[[Sequence[Any]], Mapping[str, Any]]) -> Iterator[PlannedRow]:
    """The rows of a data set, or of several by name, with the keys that their batches will have."""
    if isinstance(rows, Mapping):
        for part in rows.values():
            yield from planned(part, collator)
        return
    for first in range(0, len(rows), PLANNED_ROWS):
        chunk = [rows[i] for i in range(first, min(first + PLANNED_ROWS, len(rows)))]
        made = teacher_rows(collator(chunk))
        if len(made) % len(chunk):  # a collator of one's own, which may leave rows out
            of_rows = [teacher_rows(collator([row])) for row in chunk]
        else:  # of pairs: all the chosen, then all the rejected
            of_rows = [made[i :: len(chunk)] for i in range(len(chunk))]
        for i, parts in enumerate(of_rows, start=first):
            yield PlannedRow(rows, i, {part.key: (len(part.tokens), len(part.counted)) for part in parts})


def without_spans(collator: Any) -> Any:
    """A SpanCollator that reads no spans; another collator as it is."""
    return replace(collator, granularity=()) if isinstance(collator, SpanCollator) else collator


def _contents(
    reads: TeacherReads, config: MTAConfig | None, dtype: str, widths: Mapping[int, int], last: int,
    shared: int | None = None, ids: int = 0,
) -> Contents:  # fmt: skip
    if config is not None and config.count_padding:
        raise InputError(
            "teacher.cache: expected count_padding=False, got True (MTAConfig.public()): importance then depends on "
            "how a batch is padded, which no row knows; leave out the cache"
        )
    return Contents(
        dtype=dtype,
        layers={layer: widths.get(layer, 0) for layer in reads.layers},
        importance=tuple(config.teacher_layers) if config is not None else (),
        causal=config is not None and config.causal,
        last=last if reads.logits else 0,
        shared=shared,
        entropy=(reads.vocabulary or ids) if reads.entropy else 0,
    )


# --- a trainer's -------------------------------------------------------------------------------------------------


def cached_teacher(
    cache: TeacherCache,
    teacher: nn.Module,
    live: LiveTeacher | None,
    reads: TeacherReads,
    config: MTAConfig | None,
    args: Any,
    autocast: str | None,
) -> CachedTeacher:
    """A trainer's teacher, whose rows come from the cache where they are.

    Args:
        teacher: the model, or a StoredTeacher; live: the model's passes, None beside a StoredTeacher.
        reads, config: what the run reads of it.
        args: of the training. autocast: the dtype that the teacher runs in.

    Raises:
        InputError: a cache of another teacher or without a layer that is read; a folder with other files; a head that
            can't be taken apart.
    """
    if not (reads.layers or reads.logits or reads.entropy):
        raise InputError("teacher.cache: expected a run that reads its teacher, got none; leave out the cache")
    if isinstance(teacher, StoredTeacher):
        store = TeacherStore(cache.path)
        check_same(cache.path, store.description["identity"], surroundings(autocast))
        has = store.contents
        wanted = _contents(reads, config, cache.dtype, has.layers, teacher.head_width, ids=has.entropy or 1)
        head = teacher.stored_head
    else:
        assert live is not None
        head = _head(teacher) if reads.logits or reads.entropy else None
        wanted = _probed(live, reads, config, cache.dtype, head)
        identity = identity_of(teacher, autocast)
        with args.main_process_first(desc="opening the teacher's cache"):
            description = {
                "identity": identity,
                "contents": wanted.to_dict(),
                "source": cache.source,
                "head": None if head is None else {"scale": head.scale, "softcap": head.softcap},
                "model": _about(teacher),
            }
            narrow = getattr(getattr(unwrap(teacher).base_model, "decoder", None), "project_out", None)
            tensors = head_tensors(head, narrow if reads.logits else None)
            store = TeacherStore.create(cache.path, description, tensors, cache.sources)
        check_same(cache.path, store.description["identity"], identity)
        _check_head(store, tensors)
        if head is None and (store.contents.last or store.contents.entropy):  # more than this run reads is kept
            head = _head(teacher)
    check_contents(cache.path, store.contents, wanted)
    layers = config.teacher_layers if config is not None else ()
    backend = config.backend if config is not None else "auto"
    return CachedTeacher(store, reads, importance=layers, device=args.device, head=head, live=live, backend=backend)


def loss_for(student: nn.Module, teacher: nn.Module, config: MTAConfig) -> MTALoss:
    """``MTALoss.for_models``, with the widths of a cache where the teacher isn't loaded.

    Raises:
        InputError: a layer beyond a model's depth, or that the cache doesn't hold.
    """
    if not isinstance(teacher, StoredTeacher):
        return MTALoss.for_models(student, teacher, config)
    missing = sorted(set(config.teacher_layers) - set(teacher.widths))
    if missing:
        raise InputError(
            f"teacher_cache: expected layers {list(config.teacher_layers)}, it has {sorted(teacher.widths)}; run "
            f"mta-fast teach with these settings and another folder"
        )
    own, pairs = hidden_widths(student, config.student_layers), config.layer_pairs
    loss = MTALoss(config, [own[s] for s, _ in pairs], [teacher.widths[t] for _, t in pairs])
    return loss.to(next(student.parameters()).device)


def _head(teacher: nn.Module) -> LMHead:
    found = take_apart(teacher)
    if isinstance(found, str):
        raise InputError(
            f"teacher.cache: expected a teacher whose logits are its LM head's product with a state, {found}; leave "
            f"out the cache, or use a base loss that reads no logits"
        )
    return found


def _check_head(store: TeacherStore, tensors: Mapping[str, torch.Tensor]) -> None:
    stored = store.head() if tensors and store.description["head_file"] is not None else None
    if stored is None or (
        stored.keys() == tensors.keys() and all(stored[k].equal(v.cpu()) for k, v in tensors.items())
    ):
        return
    raise InputError(
        f"{store.folder}: expected the LM head of this teacher, it has another one; give another folder as "
        f"teacher.cache, or delete this one to make it again"
    )


def _probed(
    live: LiveTeacher, reads: TeacherReads, config: MTAConfig | None, dtype: str, head: LMHead | None
) -> Contents:
    """What a new cache holds: widths, and the layer that is the last state, are found with a pass over four tokens."""
    device = live.device
    tokens = torch.arange(PROBE_TOKENS, device=device)[None]
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with evaluating(live.model):
        states, read, logits = live.run(batch, list(reads.layers), head)
    widths = {layer: state.shape[-1] for layer, state in states.items()}
    depth, last, shared = num_layers(live.model), 0, None
    if read is not None and reads.logits:
        last = read.states.shape[-1]
        same = depth in states and torch.equal(states[depth].cpu(), read.states.cpu())
        shared = depth if same else None
    return _contents(reads, config, dtype, widths, last, shared, logits.shape[-1])


def _about(teacher: nn.Module) -> dict[str, Any]:
    inner: Any = unwrap(teacher)
    embeddings = inner.get_input_embeddings()
    return {
        "type": getattr(inner.config, "model_type", None),
        "depth": num_layers(teacher),
        "vocabulary": int(inner.config.get_text_config().vocab_size),
        "embeddings": int(getattr(embeddings, "num_embeddings", 0)) or None,
        "weights": of_weights(teacher),
    }


class CacheFilling:
    """Which rows of a trainer's data sets its cache lacks, and how they get there.

    Args:
        cached: the trainer's teacher.
        rows: its data sets; streams are kept as they come.
        collator: what makes its batches.
        method: the base method, which may train on rows that are not the data's.
    """

    def __init__(self, cached: CachedTeacher, rows: Sequence[Any], collator: Any, method: BaseMethod) -> None:
        self.cached, self.collator = cached, collator
        if cached.live is None and makes_rows(method, collator):
            raise InputError(
                f"teacher: expected a model that runs, as {method.name} trains on rows that are not the data's, got "
                f"its states on disk alone; give the model"
            )
        sets = [part for each in rows for part in (each.values() if isinstance(each, Mapping) else [each])]
        known = [each for each in sets if each is not None and not is_stream(each)]
        self.streams = len(known) < sum(each is not None for each in sets)
        self.rows: list[PlannedRow] = []
        sizes: dict[bytes, tuple[int, int]] = {}
        for each in known:
            for row in planned(each, collator):
                sizes |= row.sizes
                if any(key not in cached.store for key in row.sizes):
                    self.rows.append(row)
        cached.wanted = sizes if makes_rows(method, collator) or not self.streams else None
        self.total = len(sizes)
        self.missing = {key: size for key, size in sizes.items() if key not in cached.store}

    def begin(self, *, rank: int, told: Callable[[bool], bool], alone: bool = False) -> None:
        """Say what is there, see that the rest has room, and be the process that writes it, if none is.

        Args:
            rank: of this process; told: gives every rank the first one's word.
            alone: refuse to go on beside another process that writes.

        Raises:
            InputError: no room; rows that are missing, and no teacher to run; ``alone``, and another process writes.
        """
        store = self.cached.store
        if self.missing and self.cached.live is None:
            raise InputError(
                f"{store.folder}: expected the states of every row, {len(self.missing):,} of {self.total:,} are not "
                f"there, and the teacher isn't loaded; run mta-fast teach on these rows, or give the teacher"
            )
        tokens, counted = (sum(each) for each in zip(*self.missing.values(), strict=True)) if self.missing else (0, 0)
        needed = int(OVERHEAD * store.contents.size(tokens, counted))
        if rank == 0:
            print(f"teacher: {self.total - len(self.missing):,} of {self.total:,} rows in {store.folder}", end="")
            print(f"; the others take {in_words(needed)}" if self.missing else "", flush=True)
        if rank == 0 and self.cached.live is not None and (self.missing or self.streams):
            try:
                store.lock()
            except InputError as error:
                if alone:
                    raise
                print(f"teacher: its states are not kept: {error}", flush=True)
        store.writable = told(store.writable)
        if store.writable:
            store.check_room(needed)

    def batches(self, size: int, rank: int, ranks: int) -> Iterator[list[PlannedRow]]:
        """This rank's batches of rows that are missing, of similar length."""
        rows = sorted(self.rows, key=lambda row: max(tokens for tokens, _ in row.sizes.values()), reverse=True)
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        yield from chunks[rank::ranks]

    def fill(self, size: int, rank: int, ranks: int, to_device: Callable[[Any], Any]) -> None:
        """Run the teacher over what is missing; what was written stays where it is stopped."""
        from tqdm import tqdm

        store = self.cached.store
        with tqdm(total=self.total, initial=self.total - len(self.missing), unit="rows", disable=rank > 0) as bar:
            for rows in self.batches(size, rank, ranks):
                batch = to_device(self.collator([row.row for row in rows]))
                own = [row for row in teacher_rows(batch) if len(row.tokens) and row.key not in store]
                for key, record in self.cached.recorded(batch, own).items() if own else ():
                    store.add(key, record)
                    bar.update(ranks)


def makes_rows(method: BaseMethod, collator: Any) -> bool:
    """Whether a base method trains on rows that are not the data's."""
    return type(method.batches(collator, None)) is not StepBatches


def needs_teacher(cache: TeacherCache, rows: Sequence[Any], collator: Any, method: BaseMethod) -> bool:
    """Whether the teacher must be loaded: rows or its identity are not in the cache, or the method makes rows."""
    store = open_store(cache.path)
    if (
        store is None
        or makes_rows(method, collator)
        or cache.source is None
        or not store.has_head_file
        or store.description["source"] != cache.source
    ):
        return True
    return any(key not in store for each in rows for row in planned(each, collator) for key in row.sizes)
