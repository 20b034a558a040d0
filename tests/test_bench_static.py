"""The compiler report: every kernel is in it, it finds what must not stay, and the committed one is up to date."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mta_fast import backends
from mta_fast.__main__ import main
from mta_fast.errors import InputError, MissingPackageError

pytest.importorskip("triton")
pytest.importorskip("typer")

import triton

from bench.gpu_model import static
from bench.gpu_model.machine_code import Code, compile_all
from bench.gpu_model.static import faults
from bench.gpu_model.targets import TARGETS, occupancy
from bench.gpu_model.variants import Variant
from mta_fast.kernels._table import OVERRIDES, TABLE

CHECKOUT = Path(__file__).resolve().parents[1]
COMMITTED = json.loads((CHECKOUT / "bench" / "results" / "static.json").read_text())
COMPILED = ("sm_80", "sm_90")
Rows = list[dict[str, Any]]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """A Python process in which the kernels are not interpreted, as they are in this one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], cwd=CHECKOUT, env=environment, capture_output=True, text=True)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("static") / "made" / "report"


@pytest.fixture(scope="module")
def earlier(out: Path) -> Path:
    """The committed report without a row of each kernel, on one target or the other: those are compiled anew.

    The others are too where the kernel, what it calls, its options or Triton are not the report's.
    """
    left_out = {
        kernel: COMPILED[i % len(COMPILED)] for i, kernel in enumerate(dict.fromkeys(name for name, _ in TABLE))
    }
    kept = []
    for row in COMMITTED["rows"]:
        if left_out.get(row["kernel"]) == row["target"]:
            del left_out[row["kernel"]]
        else:
            kept.append(row)
    assert not left_out
    path = out.with_name("earlier.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(COMMITTED | {"rows": kept}))
    return path


@pytest.fixture(scope="module")
def ran(out: Path, earlier: Path) -> subprocess.CompletedProcess[str]:
    chosen = [word for target in COMPILED for word in ("--target", target)]
    return _run("-m", "mta_fast", "bench", "static", *chosen, "--json", str(out), "--reuse", str(earlier))


@pytest.fixture(scope="module")
def rows(ran: subprocess.CompletedProcess[str], out: Path) -> Rows:
    assert ran.returncode in (0, 1), ran.stderr
    return json.loads(out.with_suffix(".json").read_text())["rows"]


def _find(rows: Rows, target: str, kernel: str, dtype: str, options: str = "") -> dict[str, Any]:
    wanted = {"target": target, "kernel": kernel, "dtype": dtype, "options": options}
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    return row


def test_no_variant_has_a_fault(ran: subprocess.CompletedProcess[str], rows: Rows) -> None:
    # the table was chosen with the report's Triton: what another one spills says nothing of a change
    same = COMMITTED["versions"]["triton"] == triton.__version__
    found = [
        f"{row['target']} {static._name(row)}: {fault}"
        for row in rows
        for fault in row["faults"]
        if same or not fault.startswith("spills")
    ]
    assert not found, "\n".join(found)
    clean = not any(row["faults"] for row in rows)
    assert (ran.returncode, "## Faults: none" in ran.stdout) == ((0, True) if clean else (1, False))


def test_report_holds_every_row_of_the_table(ran: subprocess.CompletedProcess[str], rows: Rows, out: Path) -> None:
    for target in COMPILED:
        made = [row for row in rows if row["target"] == target]
        assert {row["kernel"] for row in made} == {name for name, _ in TABLE}
        places = {row["place"] for row in made}
        own = {f"OVERRIDES[{name}, {kind}, {on}]" for name, kind, on in OVERRIDES if on == target}
        assert own <= places
    assert len({static._name(row) + row["target"] for row in rows}) == len(rows)  # each is named apart
    text = out.with_suffix(".md").read_text()
    assert ran.stdout == text
    assert f"triton {triton.__version__}" in text
    for row in rows:
        assert f"| {row['kernel']} | {row['dtype']} | {row['options']} |" in text


def test_products_use_tensor_cores(rows: Rows) -> None:
    for kernel in ("strips", "statistics", "sums"):
        for dtype, factors in (("bfloat16", "bf16"), ("float16", "f16")):
            assert list(_find(rows, "sm_80", kernel, dtype)["matrix"]) == [f"mma.sync m16n8k16 {factors}"]
            (instruction,) = _find(rows, "sm_90", kernel, dtype)["matrix"]
            assert instruction.startswith("wgmma.mma_async m64")
            assert instruction.endswith(f"k16 {factors}")
    for target in COMPILED:
        split, single = (_find(rows, target, "strips", f"float32 {name}") for name in ("highest", "high"))
        assert (split["products"], single["products"]) == (["f32 tf32x3"], ["f32 tf32"])
        (name,) = single["matrix"]
        assert split["matrix"] == {name: 3 * single["matrix"][name]}
        for row in rows:
            assert bool(row["products"]) == (row["blocks"].keys() >= {"TILE"} or row["kernel"] == "strips")


def test_alignment_decides_the_width_of_loads(rows: Rows) -> None:
    for target in COMPILED:
        for kernel in ("token_scale", "strips", "statistics", "sums", "pool"):
            assert _find(rows, target, kernel, "bfloat16")["load"] == 16
            assert _find(rows, target, kernel, "bfloat16", "odd width")["load"] < 16


def test_options_are_variants(rows: Rows) -> None:
    options = {"", "causal", "count_padding", "causal, count_padding", "odd width"}
    for target in COMPILED:
        made = [row for row in rows if row["target"] == target]
        assert {r["options"] for r in made if (r["kernel"], r["dtype"]) == ("statistics", "bfloat16")} == options
        assert {row["options"] for row in made if (row["kernel"], row["dtype"]) == ("align", "float64")} >= {
            "",
            "gradient",
        }
        # of unit spans in parts, which are the same for all dtypes but float64
        of_pairs = {row["options"] for row in made if row["kernel"] == "pair_errors" and "float32" in row["dtype"]}
        whole = {f"{option}{parts} parts" for option in ("", "gradient, ") for parts in (2, 3)}
        assert of_pairs == whole | {"strip, 3 parts", "gradient, strip, 3 parts"}


def test_committed_report_is_up_to_date(rows: Rows) -> None:
    assert {row["target"] for row in COMMITTED["rows"]} == set(TARGETS)
    if COMMITTED["versions"]["triton"] != triton.__version__:
        pytest.skip(f"it is from triton {COMMITTED['versions']['triton']}")
    committed, made = (
        [row | {"digest": None} for row in found if row["target"] in COMPILED] for found in (COMMITTED["rows"], rows)
    )
    assert committed == made, "mta-fast bench static --json bench/results/static"


def test_what_has_changed_is_compiled_again() -> None:
    if COMMITTED["versions"]["triton"] != triton.__version__:
        pytest.skip(f"the report is from triton {COMMITTED['versions']['triton']}")
    code = """if True:
        import os, sys
        from pathlib import Path
        from bench.gpu_model import static
        from bench.gpu_model.machine_code import Code
        from mta_fast.kernels import _device
        def compile_all(found):
            print(*sorted({variant.kernel for variant in found}), file=sys.stderr, flush=True)
            return [Code()] * len(found)
        static.compile_all = compile_all
        for change in ("", "\\n    # changed"):
            if os.fork():
                os.wait()
                continue
            _device.load._unsafe_update_src(_device.load.src + change)
            static.measure(["sm_80"], Path("bench/results/static.json"))
            os._exit(0)
        """
    same, changed = _run("-c", code).stderr.splitlines()
    assert same == ""
    assert {"pool", "token_scale"} <= set(changed.split())  # they load by it


def test_a_file_that_is_no_report_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    (tmp_path / "other.json").write_text("[]")
    for name in ("other.json", "none.json"):
        with pytest.raises(InputError, match=f"--reuse: expected a report of bench static in .*{name}"):
            static.measure(["sm_80"], tmp_path / name)


# --- what is a fault ---------------------------------------------------------------------------------------------

FINE = Code(
    registers=255, shared=166_912, products=("bf16",), matrix={"mma.sync m16n8k16 bf16": 8}, load=16, programs=1
)


@pytest.mark.parametrize(
    ("change", "target", "found"),
    [
        ({}, "sm_80", []),
        ({"spilled": 16}, "sm_80", ["spills 16 bytes"]),
        ({"shared": 166_913}, "sm_80", ["needs 166913 bytes of shared memory where a program may have 166912"]),
        ({"shared": 232_448}, "sm_90", []),
        ({"shared": 232_449}, "sm_90", ["needs 232449"]),
        ({"shared": 65_537}, "gfx942", ["needs 65537"]),
        ({"matrix": {}}, "sm_90", ["bf16 products use no tensor cores"]),
        ({"products": ("bf16", "f32 tf32x3")}, "sm_90", ["f32 tf32x3 products use no tensor cores"]),
        ({"products": ("f16",)}, "sm_90", ["f16 products use no tensor cores"]),
        ({"matrix": {"tcgen05.mma kind::f16": 8}}, "sm_100", []),
        ({"products": ("f32 tf32",), "matrix": {"tcgen05.mma kind::f16": 8}}, "sm_100", ["f32 tf32 products"]),
        ({"products": ("f32 ieee", "f64"), "matrix": {}}, "sm_90", []),  # not every GPU has them
        ({"products": ("f32 ieee",), "matrix": {}, "shared": 0}, "gfx942", ["f32 ieee products"]),
        ({"products": ("f32 ieee",), "matrix": {"v_mfma_f32_32x32x2_f32": 8}, "shared": 0}, "gfx942", []),
        ({"error": "out of registers", "spilled": 16}, "sm_80", ["does not compile (out of registers)"]),
        ({"spilled": 8, "shared": 1 << 20, "matrix": {}}, "sm_80", ["spills 8", "needs 1048576", "bf16 products"]),
    ],
)
def test_faults(change: dict[str, Any], target: str, found: list[str]) -> None:
    made = faults(replace(FINE, **change), TARGETS[target])
    assert len(made) == len(found)
    assert all(expected in fault for expected, fault in zip(found, made, strict=True))


def test_a_row_that_asks_for_too_much_is_found(tmp_path: Path) -> None:
    # accumulators of 512 registers a thread, and 2 x 3 x 32 KB of shared memory
    code = """if True:
        import sys
        from pathlib import Path
        from unittest import mock
        from bench.gpu_model import static, variants as found_by
        from bench.report import publish
        from mta_fast.kernels._table import OVERRIDES, Row
        from bench.gpu_model.machine_code import compile_variant
        OVERRIDES["statistics", "half", "sm_80"] = Row({"TILE": 256, "BLOCK_D": 64}, 4, 3)
        call = ("bfloat16", "highest", lambda: found_by._importance(static.torch.bfloat16))
        variants = lambda target: [v for v in made(target) if v.kernel == "statistics"]
        made, static.compile_all = static.variants, lambda found: [compile_variant(v) for v in found]
        with mock.patch.object(found_by, "_calls", lambda: [call]), mock.patch.object(static, "variants", variants):
            sys.exit(publish(static.measure(["sm_80"]), Path(sys.argv[1])))
        """
    ran = _run("-c", code, str(tmp_path / "report"))
    assert ran.returncode == 1, ran.stderr
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert row["spilled"] > 1000
    assert row["shared"] == 2 * 2 * 256 * 64 * 2  # two of the three stages are in flight
    assert row["blocks"] == {"TILE": 256, "BLOCK_D": 64}
    assert row["faults"][0] == f"spills {row['spilled']} bytes a thread: take smaller blocks or more warps"
    assert f"- sm_80 statistics bfloat16: {row['faults'][0]}" in ran.stdout
    assert "(kernels/_table.py, OVERRIDES[statistics, half, sm_80])" in ran.stdout


def test_a_compiler_that_fails_or_dies_fails_its_own_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os; os._exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Variant(
        "sm_90", "pool", "TABLE[pool, half]", (("bfloat16", "highest"),), "", {}, 4, 1, ("", "", {}, {}, {}), {}
    )
    deadly, wrong = (replace(made, source=(module, "dumps", {}, {}, {})) for module in ("deadly", "json"))
    died, failed = compile_all([deadly, wrong])
    assert died.error == "the compiler's process died"
    assert failed.error.startswith("AttributeError: ")
    assert static._line(made, died)["faults"] == ["does not compile (the compiler's process died)"]


@pytest.mark.parametrize(
    ("target", "resources", "programs"),
    [
        ("sm_80", (8, 255, 0), 1),  # 512 // 256 warps a scheduler
        ("sm_80", (4, 64, 0), 8),
        ("sm_80", (4, 65, 0), 7),  # registers are given 8 at a time
        ("sm_80", (4, 16, 0), 16),  # 64 warps
        ("sm_80", (1, 16, 0), 32),
        ("sm_80", (4, 32, 81_920), 2),  # and 1 KB of each program's
        ("sm_90", (4, 32, 232_448), 1),
        ("sm_90", (4, 32, 232_449), 0),
        ("sm_100", (4, 32, 0, 256), 2),
        ("gfx942", (4, 64, 0), 8),  # 8 waves a SIMD
        ("gfx942", (8, 128, 32_769), 1),
        ("gfx942", (8, 129, 0), 1),
    ],
)
def test_occupancy_by_hand(target: str, resources: tuple[int, ...], programs: int) -> None:
    assert occupancy(TARGETS[target], *resources) == programs


# --- refusals ----------------------------------------------------------------------------------------------------


def test_unknown_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "static", "--target", "sm_80", "--target", "sm_75"]) == 2
    message = "mta-fast: --target: expected one of sm_80, sm_90, sm_100, gfx942, got 'sm_75'\n"
    assert capsys.readouterr().err == message


def test_interpreted_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "_interpreted", lambda: True)  # also where a GPU is present
    assert main(["bench", "static"]) == 2
    message = capsys.readouterr().err
    assert "got TRITON_INTERPRET=1" in message
    assert "unset it and start again" in message


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="expected the package triton, got none; pip install"):
        static.measure()
