"""inspect_models: what the command line does: load both models, measure a text, print it, write the files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mta_fast.config import MTAConfig, default_granularity
from mta_fast.errors import MissingPackageError
from mta_fast.files import PICTURE, check_target, user_path
from mta_fast.inspection.measure import Inspection, inspect_text
from mta_fast.inspection.page import PAGE, write_html
from mta_fast.inspection.picture import write_png
from mta_fast.inspection.terminal import render_terminal
from mta_fast.layers import LayerMap, num_layers
from mta_fast.spans.extract import SpanExtractor

if TYPE_CHECKING:
    from rich.console import Console


def inspect_models(
    text: str,
    teacher: str,
    student: str,
    *,
    config: Path | None = None,
    html: Path | None = None,
    png: Path | None = None,
    extractor: SpanExtractor | None = None,
    console: Console | None = None,
) -> Inspection:
    """Print what MTA sees in a text, and write the files that are asked for.

    Args:
        text: what to look at.
        teacher, student: names of models as ``mta_fast.distill.models.load_model`` takes them.
        config: a YAML file of MTAConfig; None: what a student that is a checkpoint was trained with (Hid is then
            measured with its projections), else proportional layers, words at the lowest, phrases above.
        html, png: files to write; missing folders are made.
        extractor: None: the default one.
        console: of rich; None: the terminal.

    Raises:
        InputError: a model that can't be loaded, a file that would be replaced and is no earlier page or picture, and
            what ``inspect_text`` raises.
        MissingPackageError: a package of the extras [train] or [spacy] is not installed.
    """
    for package in ("transformers", "rich", *(("matplotlib",) if png else ())):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"inspect: expected the package {package}, it is not installed; "
                f"pip install '.[train,spacy]' in the checkout"
            )
    from rich.console import Console

    from mta_fast.distill.models import load_model, load_tokenizer, model_places, same_vocabulary
    from mta_fast.distill.training.checkpoints import load_loss

    sources = [*model_places(teacher), *model_places(student), *([] if config is None else [config])]
    for target, kind in ((html, PAGE), (png, PICTURE)):
        if target is not None:
            check_target(target, kind, sources=sources)

    console = Console() if console is None else console
    extractor = SpanExtractor() if extractor is None else extractor
    models = load_model(teacher), load_model(student)
    tokenizers = load_tokenizer(teacher), load_tokenizer(student)
    loss = load_loss(user_path(student)) if config is None else None
    if config is not None:
        settings = MTAConfig.from_yaml(config)
    else:
        settings = _proportional(*models) if loss is None else loss.config
    inspection = inspect_text(
        text,
        *models,
        tokenizers[1],
        settings,
        extractor,
        projections=loss.projections if loss is not None and len(loss.projections) else None,
        teacher_tokenizer=None if same_vocabulary(*tokenizers) else tokenizers[0],
    )
    render_terminal(inspection, console)
    for path, write in ((html, write_html), (png, write_png)):
        if path is not None:
            write(inspection, path)
            console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return inspection


def _proportional(teacher: Any, student: Any) -> MTAConfig:
    pairs = LayerMap.proportional(num_layers(student), num_layers(teacher)).pairs
    return MTAConfig(layer_pairs=pairs, granularity=default_granularity(len(pairs)))
