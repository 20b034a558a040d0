"""Words and phrases of a data set as character spans, with Spark.

    python examples/spark_spans.py texts.jsonl spans.parquet

Runs on this machine unless spark-submit names a cluster, whose Python needs mta_fast, spaCy and the model.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, IntegerType, StructType

from mta_fast import SpanExtractor


@functools.cache
def extractor(model: str) -> SpanExtractor:
    """One per Python worker: Spark keeps workers, and this module in them, from task to task."""
    return SpanExtractor(model)


def add_spans(model: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches with word_spans and phrase_spans."""
    return map(extractor(model), batches)


def read(spark: SparkSession, path: str) -> DataFrame:
    """JSON lines or parquet; without a text column, prompt + output is the text."""
    rows = spark.read.parquet(path) if path.rstrip("/").endswith(".parquet") else spark.read.json(path)
    return rows if "text" in rows.columns else rows.withColumn("text", F.concat("prompt", "output"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="JSON lines or .parquet, with a text column, or prompt and output")
    parser.add_argument("target", help="parquet folder to write")
    parser.add_argument("--model", default="en_core_web_sm", help="spaCy pipeline")
    parser.add_argument("--partitions", type=int, help="tasks to cut the data into; default: one per core")
    parser.add_argument("--master", help="of Spark; default: spark-submit's, or all cores of this machine")
    options = parser.parse_args()
    builder = SparkSession.builder.appName("spans")
    if options.master:
        builder = builder.master(options.master)
    spark = builder.getOrCreate()
    spark.sparkContext.addPyFile(__file__)
    import spark_spans  # by its name, so that workers import this file instead of unpickling a copy for each task

    rows = read(spark, options.source).repartition(options.partitions or spark.sparkContext.defaultParallelism)
    spans = ArrayType(ArrayType(IntegerType()))
    schema = StructType([*rows.schema.fields]).add("word_spans", spans).add("phrase_spans", spans)
    work = functools.partial(spark_spans.add_spans, options.model)
    rows.mapInArrow(work, schema).write.mode("overwrite").parquet(options.target)
    print(f"{spark.read.parquet(options.target).count()} texts in {options.target}")
    spark.stop()


if __name__ == "__main__":
    main()
