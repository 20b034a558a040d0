"""The teacher beside a training: where it runs, what is read of it, and its states on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from mta_fast.distill.heads import LMHead, take_apart
from mta_fast.distill.teacher.cached import CachedTeacher, StoredTeacher
from mta_fast.distill.teacher.live import LiveTeacher, TeacherOutput, TeacherReads
from mta_fast.distill.training.caching import CacheFilling, TeacherCache, cached_teacher
from mta_fast.distill.training.feeding import RowFeeding
from mta_fast.distill.training.packing import check_packing
from mta_fast.distill.training.placing import place_teacher
from mta_fast.errors import InputError


class TeacherPass(RowFeeding):
    """A Trainer with a teacher, which runs or whose states are on disk."""

    teacher: nn.Module | None
    _unaligned: Any  # what makes batches without spans

    def _prepare_teacher(self, cache: TeacherCache | None) -> None:
        """Place it, take the heads apart, and open its cache; called when accelerator and module are there."""
        device = self.args.device
        self._teacher_device = device if self.teacher is None else place_teacher(self.teacher, device)
        if self.args.padding_free:
            self._check_packing()
        self._teacher_head: LMHead | None = None
        if self.args.fused_head:
            self._take_heads_apart()
        self._teacher_pass, self._cached = self._make_teacher(cache)

    def _check_packing(self) -> None:
        """Refuse models that don't keep packed rows apart; with the training's autocast."""
        reads_teacher = self._module.layers("teacher") or self._module.base.reads_teacher
        with self.accelerator.autocast():
            check_packing(self._module.student, "student")
            if self.teacher is not None and reads_teacher and not isinstance(self.teacher, StoredTeacher):
                check_packing(self.teacher, "teacher")

    def _take_heads_apart(self) -> None:
        """Have the base loss made of the states before the LM heads, or say why it is made of logits."""
        module, near = self._module, self._teacher_device == self.args.device
        models: dict[str, nn.Module] = {"student": module.student}
        if self.teacher is not None and module.base.reads_teacher:
            models["teacher"] = self.teacher
        elif self.teacher is not None and near and module.layers("teacher"):  # nobody reads its logits
            found = take_apart(self.teacher)
            self._teacher_head = found if isinstance(found, LMHead) else None
        if not module.base.reads_heads:
            return
        heads, whys = {}, []
        for side, model in models.items():
            head = take_apart(model)
            if isinstance(head, LMHead):
                heads[side] = head
            else:
                whys.append(f"{side}: {head}")
        if "teacher" in models and not near:
            whys.append("teacher: it is on another device")
        if not whys:
            module.head = heads["student"]
            self._teacher_head = heads.get("teacher", self._teacher_head)
        elif self.args.process_index == 0:
            warnings.warn(f"fused_head: the base loss is made of logits, as {'; '.join(whys)}", stacklevel=3)

    def _make_teacher(
        self, cache: TeacherCache | None
    ) -> tuple[Callable[[Mapping[str, Any]], TeacherOutput], CachedTeacher | None]:
        """What is called on every batch, and the cache that it reads from."""
        module, teacher, live = self._module, self.teacher, None
        config = None if module.mta is None else module.mta.config
        by_entropy = config is not None and config.weighting == "entropy"
        ids = module.base.teacher_ids
        reads = TeacherReads(
            module.layers("teacher"),
            module.base.reads_teacher,
            by_entropy,
            module.vocabulary if ids is None else None,
            ids,
        )
        if teacher is not None and not isinstance(teacher, StoredTeacher):
            live = LiveTeacher(
                teacher,
                reads,
                device=self.args.device,
                own_device=self._teacher_device,
                autocast=self.accelerator.autocast,
                head=self._teacher_head,
            )
        if cache is not None and module.base.reads_teacher and not module.base.reads_heads:
            raise InputError(
                f"teacher.cache: expected a base loss that reads its teacher at counted positions, as those with "
                f"reads_heads = True do, got {module.base.name!r}; leave out the cache"
            )
        if teacher is None or cache is None:
            return (live or (lambda batch: TeacherOutput(None, {}))), None
        autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        cached = cached_teacher(cache, teacher, live, reads, config, self.args, autocast)
        return cached, cached

    def _teach(self, batch: Mapping[str, Any]) -> TeacherOutput:
        """What the teacher says about a batch."""
        return self._teacher_pass(batch)

    @contextmanager
    def _filling(self, *, alone: bool = False) -> Iterator[CacheFilling | None]:
        """Rows that the teacher runs on meanwhile are kept in its cache; ``alone``: only if no other process does."""
        if self._cached is None:
            yield None
            return
        rows = [self.train_dataset, self.eval_dataset]
        filling = CacheFilling(self._cached, rows, self._unaligned, self._module.base)
        try:
            filling.begin(rank=self.args.process_index, told=self._told, alone=alone)
            yield filling
            if self._cached.store.writable:
                self._cached.store.flush()
            self.accelerator.wait_for_everyone()  # the lock is that of all ranks
        finally:
            self._cached.store.close()

    def _told(self, own: bool) -> bool:
        """The first rank's word, on every rank."""
        return bool(broadcast_object_list([own])[0])

    def fill_teacher_cache(self) -> None:
        """Run the teacher on every row of the training and evaluation sets that its cache lacks; as ``mta-fast teach``.

        Raises:
            InputError: no cache, no teacher, no room, or another process that fills it.
        """
        if self._cached is None:
            raise InputError("teacher_cache: expected one to fill, got none")
        with self._filling(alone=True) as filling:
            assert filling is not None
            filling.fill(
                self.args.eval_batch_size,
                self.args.process_index,
                self.args.world_size,
                lambda batch: self._prepare_inputs(dict(batch)),
            )
