"""Every benchmark that runs on a CPU, at tiny sizes: its files, its gate, and the cases that engineers run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import commands, docs, heads, loss, memory, padding, peak, public_step, side, step, training
from bench import workload as workload_module
from bench.ops import run as ops
from mta_fast.__main__ import main
from mta_fast.errors import InputError

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny sizes: a second thread only waits."""
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def _run(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The JSON of a quick run; its other files are there."""
    out = folder / name
    assert main(["bench", name, "--quick", "--out", str(out), *options]) in (0, 1)
    text, report = out.with_suffix(".md").read_text(), json.loads(out.with_suffix(".json").read_text())
    lines = out.with_suffix(".csv").read_text().splitlines()
    rows = [row for section in report["sections"] for row in section["rows"]]
    assert len(lines) == len(rows) + 1
    assert all(f"## {section['title']}" in text for section in report["sections"] if section["rows"])
    assert {"processor", "threads", "python", "torch", "numpy", "mta_fast"} <= set(report["machine"])
    return report


def _rows(report: dict[str, Any]) -> list[str]:
    return [row["what"] for section in report["sections"] for row in section["rows"]]


def _is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "why_not", lambda: "not here")
    report = _run("loss", tmp_path, "--backend", "reference", "--rounds", "2")
    rows = _rows(report)
    assert "B=2 S=12: public algorithm / reference, public preset (the same numbers)" in rows
    assert "B=2 S=12: reference / floor, GEMM rate of the same round" in rows
    assert "B=1 S=16, without Hid: public algorithm / reference, paper preset" in rows
    assert all(row["note"] == "skipped: not here" for row in report["sections"][3]["rows"])
    assert _is_png(tmp_path / "loss.png")
    assert set(report["samples"]["B=2 S=12"]["seconds"]) == {"reference"}


def test_the_targets_are_those_of_shapes_that_are_measured() -> None:
    shapes = {shape.name for shape in loss.FULL.shapes}
    assert {shape for _, shape in loss.TARGETS} == shapes
    assert {loss.SMALL, loss.LARGE} <= shapes


@pytest.mark.parametrize("name", ["loss", "memory"])
def test_nothing_is_timed_without_parity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public, module = workload_module.public_loss, {"loss": loss, "memory": memory}[name]
    monkeypatch.setattr(workload_module, "public_loss", lambda *args: 1.1 * public(*args))
    alternate = module.alternate
    monkeypatch.setattr(module, "alternate", lambda *args: alternate(*args) and pytest.fail("timed"))
    with pytest.raises(SystemExit, match="against the public algorithm: expected parity below"):
        main(["bench", name, "--quick", "--backend", "reference"])


def test_ops(tmp_path: Path) -> None:
    rows = _rows(_run("ops", tmp_path, "--backend", "reference", "--rounds", "1"))
    for op in ops.OPS:
        for mode in op.modes:
            assert {f"{op.name}, {mode}: {peer} / reference" for peer in op.peers} <= set(rows)
    assert _is_png(tmp_path / "ops.png")


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pooling = ops.OPS[1]
    alternate = ops.alternate
    monkeypatch.setattr(ops, "alternate", lambda *args: alternate(*args) and pytest.fail("timed"))
    monkeypatch.setitem(pooling.peers, "wrong", lambda inputs, mode: [inputs.arriving])  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="wrong against the reference: expected parity below"):
        ops._measure(pooling, ops.QUICK.shapes[0], "forward", ["reference"], [], ops.QUICK, 1)


def test_every_op_has_its_benchmark_under_its_own_name() -> None:
    names = {path.stem for path in (ROOT / "mta_fast" / "ops").glob("[a-z]*.py")}
    names -= {"entropy", "trajectory_divergence"}  # of one implementation
    names -= {"layer_pairs"}  # the others, of all layer pairs at once: bench loss
    assert {op.name for op in ops.OPS} == names
    assert all((ROOT / "bench" / "ops" / f"{name}.py").exists() for name in names)


def test_single_ops_under_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "-q", "bench/test_ops.py", "-k", "pooling-forward-16x256 and embedding"]
    # a worker of pytest-xdist passes itself on, which switches benchmarks off
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command.append(f"--benchmark-json={tmp_path / 'made.json'}")
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (made,) = json.loads((tmp_path / "made.json").read_text())["benchmarks"]
    assert made["group"] == "pooling, forward, B=16 S=256"
    assert made["extra_info"]["megabytes"] > 0


def test_heads(tmp_path: Path) -> None:
    report = _run("heads", tmp_path, "--backend", "reference", "--rounds", "2")
    rows = _rows(report)
    assert "reference: time / logits of all positions" in rows
    assert "reference: time / floor, GEMM rate of the same round" in rows
    assert {"reference", heads.BEFORE, heads.COUNTED} <= set(report["samples"]["seconds"])


def test_heads_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_counted", lambda inputs: [1.1 * tensor for tensor in heads._before(inputs)])
    alternate = heads.alternate
    monkeypatch.setattr(heads, "alternate", lambda *args: alternate(*args) and pytest.fail("timed"))
    with pytest.raises(SystemExit, match="heads, logits of counted positions against logits of all positions: exp"):
        main(["bench", "heads", "--quick", "--backend", "reference"])


def test_memory(tmp_path: Path) -> None:
    report = _run("memory", tmp_path, "--backend", "reference", "--rounds", "1")
    rows = _rows(report)
    assert "time ~ B^x, B = 1 to 4: public algorithm" in rows
    assert any("from which the Gram form is faster" in row for row in rows)
    assert set(report["samples"]) == {"B", "S", "N", "d"}
    assert all(_is_png(tmp_path / f"memory{ending}.png") for ending in ("", "_crossover"))


def test_spans(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    rows = _rows(_run("spans", tmp_path, "--rounds", "1"))
    assert any(row.startswith("alignment in the collator") for row in rows)
    assert any("from the cache" in row for row in rows)


class _Here:
    """Stands for a side's process: the same, in this one."""

    peak, own_parameters = 0.0, 0.0

    def __init__(self, name: str, folder: Path, kind: side.Kind, quick: bool) -> None:
        self._kind, self._folder = kind, tempfile.TemporaryDirectory()

    def load(self) -> None:
        self._side = side.Side(side.small_setting(), self._kind, self._folder.name)
        self.own_parameters = self._side.own_parameters

    def step(self, rows: side.Rows) -> dict[str, Any]:
        return self._side.checked_step(rows)

    def close(self) -> None:
        self._folder.cleanup()


def test_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("transformers")
    monkeypatch.setattr(step, "Process", _Here)
    monkeypatch.setattr(step, "checkout", lambda base: nullcontext(tmp_path))
    monkeypatch.setattr(peak, "why_not", lambda: "not here")
    report = _run("step", tmp_path, "--backend", "reference", "--rounds", "3")
    samples = report["samples"]
    cached = step.CACHED.format("reference")
    assert set(samples) == {step.BEFORE, step.WITHOUT, "reference", cached, step.PUBLIC}
    assert all(len(taken["whole"]) == 3 for taken in samples.values())
    assert min(samples["reference"][side.MTA]) > 0 == max(samples[step.WITHOUT][side.MTA])
    assert all(min(taken[side.HEADS]) > 0 for taken in samples.values())
    assert all(
        sum(taken[part][i] for part in step.PARTS) < taken["whole"][i] for taken in samples.values() for i in range(3)
    )
    parse = samples[step.PUBLIC]["parse"]
    assert all(0 < a < b for a, b in zip(parse, samples[step.PUBLIC][side.MTA], strict=True))
    text = (tmp_path / "step.md").read_text()
    assert "reference: step / before, without MTA (too few for an interval of the median" in text
    assert re.search(r"^\| of which: parse (\| - )+\| [\d.]+ \|$", text, re.MULTILINE)


def test_a_side_runs_in_the_folder_of_its_commit() -> None:
    pytest.importorskip("transformers")
    process = step.Process("one", ROOT, side.Kind(), quick=True)
    try:
        process.load()
        rows = [{"prompt": "One two three. " * 40, "output": "Four five."}] * 2
        made = process.step(rows)
        with pytest.raises(SystemExit, match=r"bench: step, one: expected a batch of \(2, 48\)"):
            process.step(rows[:1])
    finally:
        process.close()
    assert made["whole"] > sum(made["parts"].values()) > 0
    assert peak.why_not() or process._start > 0


def test_the_commit_before_must_be_there() -> None:
    with pytest.raises(InputError, match="--base: expected a commit of .*, got 'nowhere'"), step.checkout("nowhere"):
        pass


def test_sides_of_other_losses_are_not_timed() -> None:
    kinds = {step.BEFORE: side.Kind(), "a": side.Kind("a"), "b": side.Kind("b"), "c": side.Kind("a", cache="x")}
    losses = {step.BEFORE: [2.0, 0.0, 0.0], "a": [2.0, 1.0, 1.0], "b": [2.0001, 1.0, 1.00005], "c": [2.01, 1.005, 1.0]}
    step.check_losses(losses, kinds)
    for wrong, message in ((("a", [2.1, 1.0, 1.0]), "a: base loss: expected 2,"), (("b", [2.0, 1.1, 1.0]), "b: DSA: ")):
        with pytest.raises(SystemExit, match=message):
            step.check_losses(losses | dict([wrong]), kinds)


def test_padding(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("transformers")
    report = _run("padding", tmp_path, "--rounds", "1")
    assert _rows(report) == [f"{padding.PADDED} / {side}" for side in (padding.GROUPED, padding.PACKED)]
    assert set(report["samples"]["seconds"]) == {padding.PADDED, padding.GROUPED, padding.PACKED}


def test_runs_before_and_now_differ_in_what_is_new() -> None:
    before, *others = (training.settings("student", False, *changes) for changes in training.CHANGES.values())
    assert before["training"]["num_train_epochs"] == training.EPOCHS
    assert "max_steps" not in before["training"]
    assert [other["teacher"] for other in others] == [before["teacher"] | {"cache": "states"}] * 2
    assert others[0] | {"teacher": before["teacher"]} == before
    assert others[1]["training"].items() - before["training"].items() == {
        ("train_sampling_strategy", "group_by_length")
    }


def test_on_policy(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("transformers")
    report = _run("on-policy", tmp_path, "--rounds", "2")
    rows = _rows(report)
    assert any("a pool of 1" in row for row in rows)
    assert all(len(values) == 2 for taken in report["samples"].values() for values in taken["whole"].values())
    assert _is_png(tmp_path / "on-policy.png")


def test_recipes_are_modelled_as_their_files_say(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    main(["bench", "recipes", "--out", str(tmp_path / "recipes")])
    text = (tmp_path / "recipes.md").read_text()
    lines = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if "," in line}
    assert lines["gpt2"][1] == f"{14_000 // 16 * 5:,}"
    assert lines["opt-distillm2"][1] == f"{14_000 // 8 * 3:,}"
    flops = 4096 * (2 * 1_557_611_200 + 6 * 124_439_808)  # the published sizes of GPT-2 XL and GPT-2
    assert lines["gpt2"][2] == f"{4375 * flops / (0.4 * 312e12) / 60:.0f}"


def test_a_step_with_other_numbers_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("transformers")
    layer_loss = public_step.layer_loss
    monkeypatch.setattr(public_step, "layer_loss", lambda *args: [1.1 * term for term in layer_loss(*args)])
    made = side.small_setting()
    taken = side.Side(made, side.Kind(public=True), str(tmp_path))
    with pytest.raises(SystemExit, match="public=True.*: DSA and Hid: expected parity below"):
        taken.checked_step(step.full_rows(made, None)[: made.batch])


def test_own_part_by_hand() -> None:
    without, taken = step.Steps(0.0), step.Steps(0.25)
    without.add(10.0, {side.COLLATE: 1.0, side.MTA: 0.0, side.OPTIMISE: 1.0})
    taken.add(11.0, {side.COLLATE: 1.1, side.MTA: 0.4, side.OPTIMISE: 2.0})
    steps = {step.WITHOUT: without, "cpp": taken}
    assert step.own_part(steps, "cpp") == pytest.approx([0.1 + 0.4 + 0.5])
    shares, pairs = step.overheads(steps, "cpp", "<= 4")
    assert (shares.median, pairs.median) == pytest.approx((10, 10))
    assert shares.reached is False


@pytest.mark.parametrize(
    ("pairs", "reached", "note"),
    [
        ([1.0, 2.0] * 4, True, "95 % interval of the median: 1.00 to 2.00"),
        ([5.0, 6.0] * 4, False, "95 % interval of the median: 5.00 to 6.00"),
        ([-20.0, 9.0] * 4, None, "95 % interval of the median: -20.00 to 9.00, undecided"),
        ([1.0, 2.0], None, "too few for an interval of the median; all lie from 1.00 to 2.00, undecided"),
    ],
)
def test_noisy_pairs_are_judged_by_their_interval(pairs: list[float], reached: bool | None, note: str) -> None:
    row = step.judged_by_interval("pairs", pairs, "%", "<= 4")
    assert (row.target, row.reached, row.note) == ("<= 4", reached, note)


def test_all_runs_every_benchmark_in_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []

    def record(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert "TRITON_INTERPRET" not in options["env"]
        started.append(command[4:])
        return subprocess.CompletedProcess(command, 1 if command[4] == "ops" else 0)

    monkeypatch.setattr(commands.subprocess, "run", record)
    assert main(["bench", "all", "--out", str(tmp_path), "--texts", "rows.jsonl"]) == 1
    assert [command[0] for command in started] == list(commands.ALL)
    assert started[4] == ["spans", "--out", str(tmp_path / "spans"), "--texts", "rows.jsonl"]
    assert "a target was missed, or it failed: ops" in capsys.readouterr().out


def test_tables_are_put_into_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/made.md").write_text(
        "about\n\n## One\n\ntext\n\n| a |\n| - |\n\n| b |\n\n## Two\n\nno\n"
    )
    page = "Before.\n\n<!-- bench/results/made.md: One{} -->\n\n{}\nAfter.\n"
    assert docs.rewrite(page.format("", "| old |\n| table |\n")) == page.format("", "| a |\n| - |\n")
    assert docs.rewrite(page.format(", table 2", "")) == page.format(", table 2", "| b |\n")
    for wrong in (page.format(", table 3", ""), page.replace("One", "Two").format("", "")):
        with pytest.raises(SystemExit, match=r"expected table \d under '## (One|Two)' in bench/results/made.md"):
            docs.rewrite(wrong)


def test_ridge_starts_nearest_on_held_out_text(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("transformers")
    started, sized = _run("projections", tmp_path)["sections"]
    found = {row["what"]: row["median"] for row in started["rows"]}
    pairs = {what.rpartition(", ")[0] for what in found}
    assert len(pairs) == 8  # of three students, one of which is too shallow for a third layer pair
    for pair in pairs:
        assert found[f"{pair}, default"] == pytest.approx(1, abs=0.25)
        assert found[f"{pair}, ridge 0.3"] < found[f"{pair}, default"]
    assert len(sized["rows"]) == 3 * 2 * 6  # students, numbers of rows, strengths


def test_stored_states_change_gradients_little(tmp_path: Path) -> None:
    pytest.importorskip("spacy")
    pytest.importorskip("transformers")
    sections = _run("cache", tmp_path)["sections"]
    found = {row["what"]: row["median"] for section in sections for row in section["rows"]}
    assert found["SRKL, float32, student at its start"] <= 1e-5
    assert 0 < found["DSA, int8, student at its start"] < 0.1
