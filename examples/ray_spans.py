"""Words and phrases of a data set as character spans, with Ray Data.

    python examples/ray_spans.py texts.jsonl spans.parquet

Runs on this machine unless RAY_ADDRESS names a cluster, whose Python needs mta_fast, spaCy and the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa
import ray

from mta_fast import SpanExtractor


class AddSpans:
    """An actor with one SpanExtractor; without a text column, prompt + output is the text."""

    def __init__(self, model: str) -> None:
        self.extract = SpanExtractor(model)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with word_spans and phrase_spans."""
        if "text" not in batch.column_names:
            pairs = zip(batch["prompt"].to_pylist(), batch["output"].to_pylist(), strict=True)
            batch = batch.append_column("text", pa.array([prompt + output for prompt, output in pairs]))
        return self.extract(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="JSON lines or .parquet, with a text column, or prompt and output")
    parser.add_argument("target", type=Path, help="parquet folder to write")
    parser.add_argument("--model", default="en_core_web_sm", help="spaCy pipeline")
    parser.add_argument("--actors", type=int, help="extractors at work; default: one per core but one")
    parser.add_argument("--batch-size", type=int, default=256, help="texts an actor takes at a time")
    options = parser.parse_args()
    ray.init()
    cores = int(ray.cluster_resources()["CPU"])
    actors = options.actors or max(1, cores - 1)
    if actors >= cores:  # Ray would wait for ever
        parser.error(f"--actors: expected fewer than the {cores} cores, for one reads and writes; got {actors}")
    source = str(Path(options.source).absolute()) if Path(options.source).exists() else options.source
    rows = ray.data.read_parquet(source) if source.endswith(".parquet") else ray.data.read_json(source, lines=True)
    made = rows.repartition(4 * actors).map_batches(
        AddSpans,
        fn_constructor_args=(options.model,),
        batch_format="pyarrow",
        batch_size=options.batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    made.write_parquet(str(options.target.absolute()), mode=ray.data.SaveMode.OVERWRITE)
    print(f"{ray.data.read_parquet(str(options.target.absolute())).count()} texts in {options.target}")
    ray.shutdown()


if __name__ == "__main__":
    main()
