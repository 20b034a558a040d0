"""The Spark and Ray examples, each run for real on this machine where its packages are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT

from mta_fast import SpanExtractor

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"prompt": f"Who is number {i}?", "output": f" The old dog has barked {i} times."} for i in range(20)]
SCRIPTS = {"spark": ("spark_spans.py", "pyspark"), "ray": ("ray_spans.py", "ray")}


def _skip_without(package: str) -> None:
    pytest.importorskip("spacy", reason="needs spaCy")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package == "pyspark" and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        pytest.skip("Spark needs Java: neither JAVA_HOME nor java on the PATH")


@pytest.mark.parametrize("name", SCRIPTS)
def test_spans_of_a_jsonl_file(tmp_path: Path, name: str) -> None:
    script, package = SCRIPTS[name]
    _skip_without(package)
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [row["prompt"] + row["output"] for row in ROWS]
    source, target = tmp_path / "texts.jsonl", tmp_path / "spans.parquet"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYSPARK_PYTHON": sys.executable}
    command = [sys.executable, str(ROOT / "examples" / script), str(source), str(target)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "20 texts in" in ran.stdout
    table = parquet.read_table(target)
    assert str(table.schema.field("word_spans").type).replace("item", "element").count("list<") == 2
    expected = SpanExtractor()(texts)
    made = {row["text"]: [row["word_spans"], row["phrase_spans"]] for row in table.to_pylist()}
    assert made == {
        text: [words, phrases]
        for text, words, phrases in zip(texts, expected["word_spans"], expected["phrase_spans"], strict=True)
    }
