"""The commands: doctor, demo, train, teach, schema, ablate, reproduce, generate, eval, export, cut, new, ..."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mta_fast.errors import InputError, MissingPackageError
from mta_fast.files import user_source

if TYPE_CHECKING:
    from mta_fast.distill.responses.evaluation import EvaluationSettings
    from mta_fast.distill.responses.generation import GenerationSettings

app = typer.Typer(
    help="Multi-Granular Trajectory Alignment: a span-level distillation loss.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
spans_app = typer.Typer(help="Words and phrases of a text: extract them once, and see what is cached.")
app.add_typer(spans_app, name="spans")

_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier run of this command left there, and nothing else.")
]
CHECKOUT = Path(__file__).resolve().parents[1]
_MODEL_HELP = "Folder, hub name, or package:NAME for model files inside an installed Python package."


def _listed(values: Sequence[str] | None) -> list[str]:
    """The items of an option that takes a comma list and may be repeated."""
    return [item.strip() for value in values or [] for item in value.split(",") if item.strip()]


def _sources(values: Sequence[str] | None) -> list[str]:
    """Likewise, of data; a file whose name has a comma is one item."""
    return [item for value in values or [] for item in ([value] if _is_file(value) else _listed([value]))]


def _is_file(name: str) -> bool:
    try:
        return Path(user_source(name)).exists()
    except OSError:  # longer than a name may be
        return False


def _seeds(values: str) -> list[int]:
    try:
        return [int(seed) for seed in _listed([values])]
    except ValueError:
        raise InputError(f"seeds: expected integers with commas between them, such as 10,20, got {values!r}") from None


@app.command()
def doctor() -> None:
    """Versions, devices, backends and packages, and why something is missing."""
    from mta_fast.doctor import report

    typer.echo(report())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("mta_demo"),
    teacher_steps: Annotated[int, typer.Option(min=1, help="Training steps of the teacher.")] = 250,
    steps: Annotated[int, typer.Option(min=1, help="Distillation steps of each student.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 42,
) -> None:
    """Train a small teacher on bundled text, then distil it without MTA, with it, and with a placebo of it."""
    from mta_fast.demo import DemoSettings, run_demo

    run_demo(DemoSettings(out=out, teacher_steps=teacher_steps, steps=steps, seed=seed))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; docs/configuration.md lists its keys.")],
    override: Annotated[list[str] | None, typer.Option(help="key=value with dotted keys; may be repeated.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in output_dir.")] = False,
    match_time: Annotated[
        Path | None, typer.Option(help="output_dir of a finished run: train as long as that one did.")
    ] = None,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on with other settings, data or models than at the start.")
    ] = False,
) -> None:
    """Distil a student as a YAML file says; also under torchrun and accelerate launch."""
    from mta_fast.distill.training.run import train as run
    from mta_fast.distill.training.settings import TrainSettings

    changes = [*(override or []), *(["data.skip_bad_rows=true"] if skip_bad_rows else [])]
    settings = TrainSettings.from_yaml(config, changes)
    raise typer.Exit(run(settings, resume=resume, match_time=match_time, allow_changes=allow_changes))


@app.command()
def teach(
    config: Annotated[Path, typer.Argument(help="YAML file of the training, with teacher.cache.")],
    override: Annotated[list[str] | None, typer.Option(help="key=value with dotted keys; may be repeated.")] = None,
) -> None:
    """Run the teacher once over all rows and keep its states, which train then reads; goes on where it was stopped."""
    from mta_fast.distill.training.settings import TrainSettings
    from mta_fast.distill.training.teach import teach as run

    run(TrainSettings.from_yaml(config, override or []))


@app.command()
def schema() -> None:
    """The JSON schema of a YAML file for train and ablate, by which editors complete and check it."""
    from mta_fast.distill.training.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="YAML file of the full method; docs/configuration.md lists its keys.")],
    rows: Annotated[str | None, typer.Option(help="Rows to run, such as base,full; else all.")] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(help="A row of your own, NAME=override[,override], of mta.* and training.*; may be repeated."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of training, such as 1,2,3.")] = "42",
    match_time: Annotated[
        bool, typer.Option("--match-time", help="Also the base row, trained as long as the full one took.")
    ] = False,
    eval_data: Annotated[list[str] | None, typer.Option(help="Data sets for ROUGE-L, as eval takes them.")] = None,
    eval_options: Annotated[str, typer.Option(help='Options of mta-fast eval, such as "--seeds 10,20 --greedy".')] = "",
    override: Annotated[list[str] | None, typer.Option(help="key=value with dotted keys; may be repeated.")] = None,
) -> None:
    """The paper's rows, each trained with each seed, into one table and picture; goes on where it was interrupted."""
    from mta_fast.distill.ablation import ablate as run
    from mta_fast.distill.training.settings import TrainSettings

    options = shlex.split(eval_options)
    _check_eval_options(options)
    code = run(
        TrainSettings.from_yaml(config, override or []),
        rows=None if rows is None else _listed([rows]),
        own_rows=row or [],
        seeds=_seeds(seeds),
        match_time=match_time,
        eval_data=_sources(eval_data),
        eval_options=options,
    )
    raise typer.Exit(code)


@app.command()
def reproduce(
    folder: Annotated[Path, typer.Argument(help="The folder that the recipes were run in.")] = Path("."),
) -> None:
    """The paper's tables in Markdown, with what the recipes' runs have beside its figures."""
    from mta_fast.distill.reproduction import reproduction

    typer.echo(reproduction(folder), nl=False)


def _check_eval_options(options: list[str]) -> None:
    """Refuse what ``eval`` would, before the hours of training that come first.

    Raises:
        InputError: no options of it.
    """
    command = typer.main.get_command(app).get_command(None, "eval")  # type: ignore[attr-defined]  # a group
    try:
        context = command.make_context("eval", ["MODEL", "--data", "DATA", *options])
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        raise InputError(f"eval_options: {error.format_message()}; expected options of mta-fast eval") from None
    _evaluation(context)
    _columns(context.params["columns"])


_Data = Annotated[list[str], typer.Option(help="JSONL files, data sets, or sample: a comma list; may be repeated.")]
_Template = Annotated[str, typer.Option(help="paper, plain, chat, or a text with {instruction} and {input}.")]
_Temperature = Annotated[float, typer.Option(help="Divides the logits.")]
_TopP = Annotated[float, typer.Option(help="Draw among the likeliest tokens of this probability; 1: all.")]
_TopK = Annotated[int, typer.Option(help="Draw among so many likeliest tokens; 0: all.")]
_Greedy = Annotated[bool, typer.Option("--greedy", help="Take the likeliest token instead of drawing one.")]
_Stop = Annotated[str, typer.Option(help='A response ends before this text; "": only where the model ends it.')]
_BatchSize = Annotated[int, typer.Option(help="Prompts that a model is given at a time.")]
_MaxPrompt = Annotated[int, typer.Option(min=1, help="Tokens; rows with longer prompts are left out and counted.")]
_MaxLength = Annotated[int, typer.Option(help="Tokens; a response has what the longest prompt leaves of them.")]
_MaxRows = Annotated[int | None, typer.Option(min=1, help="Read at most so many rows of each data set.")]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
_Columns = Annotated[
    list[str] | None, typer.Option(help="The data's own names, such as input=context,output=response.")
]
_SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them.")]


@app.command()
def cut(
    teacher: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="Folder of the student.")],
    layers: Annotated[str | None, typer.Option(help="How many blocks; the loss on --text chooses them.")] = None,
    keep: Annotated[str | None, typer.Option(help="Which blocks, such as 0,1,4,9, in place of --layers.")] = None,
    even: Annotated[bool, typer.Option("--even", help="Spread --layers evenly, with both ends.")] = False,
    text: Annotated[
        str | None, typer.Option(help="JSONL file or data set that the loss is taken on; else the bundled sample.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that choose; the next ones judge.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    template: _Template = "paper",
    columns: _Columns = None,
    skip_bad_rows: _SkipBadRows = False,
    dtype: _Dtype = "float32",
    device: _Device = "auto",
    overwrite: _Overwrite = False,
) -> None:
    """Make a student from some of a teacher's blocks: those without which the loss rises most."""
    from mta_fast.distill.data import data_places
    from mta_fast.distill.models import choose_device, load_config, load_model, load_tokenizer, model_places
    from mta_fast.distill.students.choice import cut_student, parse_blocks, read_text
    from mta_fast.distill.students.cut import check_layers
    from mta_fast.distill.training.checkpoints import CUT, check_export, export_student
    from mta_fast.distill.training.fit import check_room
    from mta_fast.layers import depth_of

    wanted = parse_blocks(layers, keep, even=even)
    sources = [*model_places(teacher), *data_places([text] if text else [])]
    check_export(out, kind=CUT, sources=sources, overwrite=overwrite)
    config, tokenizer, place = load_config(teacher), load_tokenizer(teacher), choose_device(device)
    check_layers(wanted, depth_of(config))
    check_room("teacher", config, tokenizer, max_length)
    source = "sample" if text is None else text
    options = {"split": split, "template": template, "columns": _columns(columns), "skip_bad_rows": skip_bad_rows}
    found = read_text(source, tokenizer, rows=rows, length=max_length, **options)
    made = cut_student(
        load_model(teacher, dtype=dtype).to(place),
        tokenizer,
        wanted,
        found,
        rows=rows,
        length=max_length,
        even=even,
        report=lambda block, loss: typer.echo(f"without block {block}: {loss:.3f}", err=True),
    )
    facts = {"teacher": teacher, **made.facts(), "text": source}
    export_student(made.student, tokenizer, out, kind=CUT, sources=sources, overwrite=overwrite, facts=facts)
    if text is None:
        by_loss = ", --even spreads blocks evenly as before" if isinstance(wanted, int) and not even else ""
        typer.echo(f"text: the bundled sample; --text FILE takes your own{by_loss}")
    for line in made.lines():
        typer.echo(line)
    size = sum(parameter.numel() for parameter in made.student.parameters()) / 1e6
    typer.echo(f"{out}: {len(made.blocks)} blocks, {size:.1f} million parameters")


@app.command()
def new(
    teacher: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    out: Annotated[Path, typer.Argument(help="Folder of the student.")],
    layers: Annotated[int, typer.Option(help="Blocks, at most the teacher's.")],
    width: Annotated[
        int | None, typer.Option(help="Of its hidden states; else as wide for its depth as the teacher.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads; else so many that one is about as wide as the teacher's.")
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Heads of keys and values; else the teacher's share.")] = None,
    intermediate: Annotated[int | None, typer.Option(help="Width inside an MLP; else the teacher's share.")] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(help="Data whose tokens are kept: JSONL files, data sets, or sample; else all are."),
    ] = None,
    vocabulary_size: Annotated[
        int | None, typer.Option(min=1, help="Keep at most so many tokens: the rarest are dropped.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    template: _Template = "paper",
    columns: _Columns = None,
    skip_bad_rows: _SkipBadRows = False,
    seed: Annotated[int, typer.Option(help="Seed of its random weights.")] = 42,
    overwrite: _Overwrite = False,
) -> None:
    """Make a small student of a teacher's architecture with random weights, and its tokenizer with fewer tokens."""
    from mta_fast.distill.data import data_places
    from mta_fast.distill.models import model_places
    from mta_fast.distill.students.fresh import Sizes, make_fresh
    from mta_fast.distill.training.checkpoints import NEW, check_export, export_student

    data = _sources(vocabulary)
    sources = [*model_places(teacher), *data_places(data)]
    check_export(out, kind=NEW, sources=sources, overwrite=overwrite)
    options = {"split": split, "template": template, "columns": _columns(columns), "skip_bad_rows": skip_bad_rows}
    sizes = Sizes(layers, width, heads, kv_heads, intermediate)
    made = make_fresh(teacher, sizes, data, vocabulary_size=vocabulary_size, seed=seed, **options)
    export_student(made.student, made.tokenizer, out, kind=NEW, sources=sources, overwrite=overwrite)
    for line in made.lines:
        typer.echo(f"{out}: {line}")


@app.command()
def generate(
    student: Annotated[str, typer.Option(help=_MODEL_HELP)],
    data: _Data,
    out: Annotated[Path, typer.Option(help="JSONL file of prompt, chosen and rejected.")],
    teacher: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    chosen: Annotated[str, typer.Option(help="teacher: its response; data: the data set's, without a teacher.")] = (
        "teacher"
    ),
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 42,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    template: _Template = "paper",
    temperature: _Temperature = 1.0,
    top_p: _TopP = 1.0,
    top_k: _TopK = 0,
    greedy: _Greedy = False,
    stop: _Stop = "###",
    batch_size: _BatchSize = 16,
    max_prompt_length: _MaxPrompt = 128,
    max_length: _MaxLength = 256,
    max_rows: _MaxRows = None,
    columns: _Columns = None,
    dtype: _Dtype = "float32",
    device: _Device = "auto",
    skip_bad_rows: _SkipBadRows = False,
) -> None:
    """Pairs of a teacher's and a student's response, for DistiLLM-2; goes on where it was interrupted."""
    from mta_fast.distill.responses.pairs import generate_pairs

    counts = generate_pairs(
        _sources(data),
        out,
        _generation(max_prompt_length, max_length, temperature, top_p, top_k, greedy, stop, batch_size),
        student=student,
        teacher=teacher,
        chosen=chosen,
        seed=seed,
        max_prompt_length=max_prompt_length,
        dtype=dtype,
        device=device,
        split=split,
        template=template,
        limit=max_rows,
        columns=_columns(columns),
        skip_bad_rows=skip_bad_rows,
    )
    left_out = "; ".join(f"{count} x {reason}" for reason, count in counts.items() if reason != "pairs")
    typer.echo(f"{counts['pairs']} pairs in {out}" + (f", left out: {left_out}" if left_out else ""))


@app.command("eval")
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    data: _Data,
    preset: Annotated[
        str | None, typer.Option(help="paper: as the authors' script evaluates; options given beside it win.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="One run for each.")] = "10,20,30,40,50",
    out: Annotated[Path | None, typer.Option(help="Folder of results and responses; else eval/MODEL here.")] = None,
    references: Annotated[str, typer.Option(help="Of several: best or first.")] = "best",
    skip_empty_references: Annotated[
        bool, typer.Option(help="Leave out and count rows without a first reference, in place of refusing them.")
    ] = False,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "test",
    template: _Template = "paper",
    temperature: _Temperature = 1.0,
    top_p: _TopP = 1.0,
    top_k: _TopK = 0,
    greedy: _Greedy = False,
    stop: _Stop = "###",
    stop_rows: Annotated[
        str, typer.Option(help="each ends at its own stop text; first: all when the batch's first row writes it.")
    ] = "each",
    strip: Annotated[bool, typer.Option(help="Responses without white space around them.")] = False,
    batch_size: _BatchSize = 16,
    max_prompt_length: _MaxPrompt = 256,
    cut_prompts: Annotated[bool, typer.Option(help="Cut longer prompts to that many tokens, leave none out.")] = False,
    max_length: _MaxLength = 512,
    max_rows: _MaxRows = None,
    columns: _Columns = None,
    dtype: _Dtype = "float32",
    device: _Device = "auto",
    skip_bad_rows: _SkipBadRows = False,
) -> None:
    """ROUGE-L of a model's responses, mean and deviation over seeds; goes on where it was interrupted."""
    from mta_fast.distill.responses.evaluation import run_evaluation

    settings, longest = _evaluation(context)
    code = run_evaluation(
        model,
        _sources(data),
        settings,
        out=out,
        max_prompt_length=longest,
        dtype=dtype,
        device=device,
        split=split,
        template=template,
        limit=max_rows,
        columns=_columns(columns),
        skip_bad_rows=skip_bad_rows,
    )
    raise typer.Exit(code)


def _evaluation(context: Any) -> tuple[EvaluationSettings, int | None]:
    """What the options of ``eval`` mean, and how long the prompts of rows that are kept may be.

    Raises:
        InputError: an unknown preset, or a value that is refused.
    """
    from mta_fast.choices import check_choice
    from mta_fast.distill.responses.evaluation import PRESETS, EvaluationSettings

    options: dict[str, Any] = dict(context.params)
    if options["preset"] is not None:
        check_choice("preset", options["preset"], PRESETS)
        preset = _options_of(PRESETS[options["preset"]])
        new_tokens = preset.pop("max_new_tokens")
        given = {name for name in options if context.get_parameter_source(name).name == "COMMANDLINE"}
        options |= {name: value for name, value in preset.items() if name not in given}
        if "max_length" not in given:
            options["max_length"] = options["max_prompt_length"] + new_tokens
    longest, cut = options["max_prompt_length"], options["cut_prompts"]
    names = ("max_length", "temperature", "top_p", "top_k", "greedy", "stop", "batch_size")
    further = {"prompt_length": longest if cut else None, "stop_rows": options["stop_rows"], "strip": options["strip"]}
    generation = _generation(longest, *(options[name] for name in names), **further)
    settings = EvaluationSettings(
        generation, tuple(_seeds(options["seeds"])), options["references"], options["skip_empty_references"]
    )
    return settings, None if cut else longest


def _options_of(settings: EvaluationSettings) -> dict[str, Any]:
    """Settings whose prompts are cut, as options of ``eval``; max_new_tokens is none."""
    generation = settings.generation
    names = ("temperature", "top_p", "top_k", "stop_rows", "strip", "max_new_tokens")
    return {name: getattr(generation, name) for name in names} | {
        "greedy": not generation.do_sample,
        "stop": generation.stop or "",
        "cut_prompts": True,
        "max_prompt_length": generation.prompt_length,
        "seeds": ",".join(map(str, settings.seeds)),
        "references": settings.references,
        "skip_empty_references": settings.skip_empty_references,
    }


def _columns(pairs: list[str] | None) -> dict[str, str]:
    named = _listed(pairs)
    for pair in named:
        if not all(pair.partition("=")):
            raise InputError(f"columns: expected name=own name, such as output=response, got {pair!r}")
    return dict(pair.split("=", 1) for pair in named)


def _generation(
    max_prompt_length: int,
    max_length: int,
    temperature: float,
    top_p: float,
    top_k: int,
    greedy: bool,
    stop: str,
    batch_size: int,
    **further: Any,
) -> GenerationSettings:
    from mta_fast.distill.responses.generation import GenerationSettings

    if max_length <= max_prompt_length:
        raise InputError(f"max_length: expected more than max_prompt_length = {max_prompt_length}, got {max_length}")
    return GenerationSettings(
        max_new_tokens=max_length - max_prompt_length,
        do_sample=not greedy,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop or None,
        batch_size=batch_size,
        **further,
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint-N folder of a run.")],
    out: Annotated[Path, typer.Argument(help="Folder of the plain student.")],
    overwrite: _Overwrite = False,
) -> None:
    """The plain student of a checkpoint, adapters merged, without anything of MTA."""
    from mta_fast.distill.training.checkpoints import export_checkpoint

    export_checkpoint(checkpoint, out, overwrite=overwrite)
    typer.echo(f"student in {out}")


@app.command()
def inspect(
    teacher: Annotated[str, typer.Option(help=_MODEL_HELP)],
    student: Annotated[str, typer.Option(help=_MODEL_HELP)],
    text: Annotated[str, typer.Option(help="The text to look at.")],
    config: Annotated[Path | None, typer.Option(help="YAML of MTAConfig; else layers are proportional.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write this page.")] = None,
    png: Annotated[Path | None, typer.Option(help="Also write this picture.")] = None,
) -> None:
    """What MTA sees in a text: important tokens, words, phrases, and both models' span distances."""
    from mta_fast.inspection.run import inspect_models

    inspect_models(text, teacher, student, config=config, html=html, png=png)


@spans_app.command("make")
def spans_make(
    data: Annotated[list[str], typer.Argument(help="JSONL files, data sets, or sample.")],
    model: Annotated[str, typer.Option(help="A spaCy pipeline.")] = "en_core_web_sm",
    cache: Annotated[Path | None, typer.Option(help="Folder; else $MTA_FAST_CACHE or ~/.cache/mta_fast/spans.")] = None,
    n_process: Annotated[int, typer.Option(min=1, help="Processes that parse.")] = 1,
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    template: Annotated[str, typer.Option(help="paper, plain, or a text with {instruction} and {input}.")] = "paper",
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out and count them.")] = False,
    skip_unparsable: Annotated[
        bool, typer.Option("--skip-unparsable", help="Leave out and name texts over which parsers die.")
    ] = False,
) -> None:
    """Extract the spans of all rows into the cache; a run that was interrupted goes on where it was."""
    from mta_fast.distill.data import describe_rows, load_rows, texts_of
    from mta_fast.spans.cache import SpanCache
    from mta_fast.spans.extract import SpanExtractor

    cached = SpanCache(SpanExtractor(model, n_process=n_process, skip_unparsable=skip_unparsable), cache)
    for source in data:
        loaded = load_rows(source, split=split, template=template, skip_bad_rows=skip_bad_rows)
        typer.echo(f"{source}: {describe_rows(loaded)}")
        cached.fill(texts_of(loaded.rows), progress=True)
    typer.echo(f"{len(cached)} texts in {cached.path}")


@spans_app.command("show")
def spans_show(
    cache: Annotated[Path, typer.Argument(help="A cache file.")],
    text: Annotated[str | None, typer.Option(help="Also show the spans of this text.")] = None,
) -> None:
    """What a span cache holds."""
    from mta_fast.spans.cache import describe_cache, look_up

    typer.echo(describe_cache(cache))
    if text is None:
        return
    found = look_up(cache, text)
    typer.echo("this text is not in it" if found is None else "")
    for name, spans in (found or {}).items():
        typer.echo(f"{name.replace('_', ' ')}: " + " | ".join(text[start:end] for start, end in spans))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """What the package costs, from a checkout: python -m bench, from anywhere; --help lists its commands."""
    load_bench()
    commands = importlib.import_module("bench.commands")
    raise typer.Exit(commands.app(context.args, prog_name="mta-fast bench", standalone_mode=False))


def load_bench() -> None:
    """Let the checkout's bench/, which is no part of the installed package, be imported, and nothing else from there.

    Also the initializer of the benchmarks' own processes.

    Raises:
        MissingPackageError: there is no checkout.
    """
    file = CHECKOUT / "bench" / "__init__.py"
    if not file.is_file():
        raise MissingPackageError(
            f"bench: expected the bench/ folder of a checkout beside the package, got {CHECKOUT}; the benchmarks are "
            f"not installed: run them from a clone with `pip install -e .`"
        )
    loaded = getattr(sys.modules.get("bench"), "__file__", None)
    if loaded is None or Path(loaded).resolve() != file:
        spec = importlib.util.spec_from_file_location("bench", file, submodule_search_locations=[str(file.parent)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules["bench"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["bench"])
