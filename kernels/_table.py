"""Launch parameters. No autotuning: lengths change every step, and every choice would be timed again.

Each row was chosen from what the compilers report (``mta-fast bench static``, bench/results/static.md): of the blocks
that were tried, large ones that spill no register and fit the shared memory of sm_80, sm_90, sm_100 and gfx942. Those
of ``pair_errors`` and ``pair_gradients`` on sm_90 are the fastest of a dozen measured on an H200: programs so small
that several share a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF, SINGLE, DOUBLE = "half", "single", "double"  # bf16 and fp16; float32 in tf32 or split precision; float64


@dataclass(frozen=True)
class Row:
    """Block sizes of a kernel, and how many warps and pipeline stages it gets."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int


def _row(num_warps: int, num_stages: int, **blocks: int) -> Row:
    return Row(blocks, num_warps, num_stages)


TABLE: dict[tuple[str, str], Row] = {}
_MEMORY_BOUND = {
    "token_scale": _row(4, 1, TOKENS=8, BLOCK_D=512),
    "merge_statistics": _row(4, 1, TOKENS=128),
    "merge_sums": _row(4, 1, TOKENS=128),
    "span_weights": _row(8, 1, BLOCK_C=1024, BLOCK_U=256, BLOCK_J=8),
    "pool": _row(4, 1, BLOCK_J=4, BLOCK_D=1024),
    "pool_gradient": _row(4, 1, BLOCK_D=1024),
    "unit_parts": _row(4, 1, BLOCK_D=1024),
    "row_totals": _row(4, 1, BLOCK_U=1024),
    "align": _row(8, 1, BLOCK_D=1024),
    "diverge": _row(8, 1, BLOCK_V=1024),
}
for _kind in (HALF, SINGLE, DOUBLE):
    TABLE.update({(name, _kind): row for name, row in _MEMORY_BOUND.items()})
TABLE.update(
    {
        ("pool", DOUBLE): _row(4, 1, BLOCK_J=4, BLOCK_D=512),
        ("strips", HALF): _row(8, 3, STRIP=64, BLOCK_D=64),
        ("strips", SINGLE): _row(8, 3, STRIP=32, BLOCK_D=32),
        ("strips", DOUBLE): _row(8, 1, STRIP=16, BLOCK_D=16),
        ("statistics", HALF): _row(8, 3, TILE=128, BLOCK_D=64),
        ("statistics", SINGLE): _row(8, 3, TILE=64, BLOCK_D=32),
        ("statistics", DOUBLE): _row(8, 1, TILE=32, BLOCK_D=16),
        ("sums", HALF): _row(8, 3, TILE=128, BLOCK_D=64),
        ("sums", SINGLE): _row(8, 3, TILE=64, BLOCK_D=32),
        ("sums", DOUBLE): _row(8, 1, TILE=32, BLOCK_D=16),
        ("pair_errors", SINGLE): _row(4, 1, TILE=64, BLOCK_D=64),
        ("pair_errors", DOUBLE): _row(8, 1, TILE=32, BLOCK_D=16),
        ("pair_gradients", SINGLE): _row(4, 3, TILE=64, BLOCK_K=32, BLOCK_N=64),
        ("pair_gradients", DOUBLE): _row(8, 1, TILE=32, BLOCK_K=16, BLOCK_N=32),
        ("gram_products", SINGLE): _row(8, 2, TILE=64, BLOCK_U=32, BLOCK_V=16, BLOCK_D=256),
        ("gram_products", DOUBLE): _row(8, 1, TILE=32, BLOCK_U=16, BLOCK_V=16, BLOCK_D=256),
        ("gram_gradient", SINGLE): _row(8, 2, TILE=64, BLOCK_D=32),
        ("gram_gradient", DOUBLE): _row(8, 1, TILE=32, BLOCK_D=16),
    }
)
# Rows of one architecture, where the common row spills or does not fit
OVERRIDES: dict[tuple[str, str, str], Row] = {
    # a thread of sm_100 holds 64 columns of a 128 x 128 tile, and with them 64 values of each column vector: it spills
    ("statistics", HALF, "sm_100"): _row(4, 3, TILE=64, BLOCK_D=64),
    ("statistics", SINGLE, "sm_100"): _row(4, 3, TILE=64, BLOCK_D=32),
    ("sums", HALF, "sm_100"): _row(8, 3, TILE=64, BLOCK_D=64),
    ("sums", SINGLE, "sm_100"): _row(4, 3, TILE=64, BLOCK_D=32),
    ("align", SINGLE, "sm_100"): _row(8, 1, BLOCK_D=512),
    ("pair_errors", SINGLE, "sm_100"): _row(8, 2, TILE=64, BLOCK_D=32),
    ("statistics", HALF, "sm_80"): _row(8, 3, TILE=128, BLOCK_D=32),
    ("sums", HALF, "sm_80"): _row(8, 3, TILE=128, BLOCK_D=32),
    ("sums", DOUBLE, "sm_80"): _row(8, 1, TILE=16, BLOCK_D=16),
    # mma.sync takes both factors of a product from registers
    ("statistics", SINGLE, "sm_80"): _row(4, 2, TILE=64, BLOCK_D=16),
    ("sums", SINGLE, "sm_80"): _row(4, 1, TILE=64, BLOCK_D=16),
    ("pair_errors", SINGLE, "sm_80"): _row(8, 2, TILE=64, BLOCK_D=32),
    ("pair_gradients", SINGLE, "sm_80"): _row(8, 2, TILE=64, BLOCK_K=32, BLOCK_N=64),
    ("statistics", HALF, "gfx942"): _row(8, 3, TILE=64, BLOCK_D=64),
    ("sums", HALF, "gfx942"): _row(8, 3, TILE=64, BLOCK_D=64),
    # 64 KB of shared memory
    ("strips", HALF, "gfx942"): _row(8, 2, STRIP=64, BLOCK_D=64),
    ("strips", SINGLE, "gfx942"): _row(8, 2, STRIP=32, BLOCK_D=32),
}
# Rows of widths that are no multiple of 16, on every architecture: each element then has a pointer of its own
UNALIGNED: dict[tuple[str, str], Row] = {
    ("token_scale", HALF): _row(4, 1, TOKENS=8, BLOCK_D=256),
    ("strips", HALF): _row(8, 3, STRIP=64, BLOCK_D=32),
    ("strips", SINGLE): _row(8, 2, STRIP=32, BLOCK_D=16),
    ("statistics", HALF): _row(8, 3, TILE=64, BLOCK_D=32),
    ("statistics", SINGLE): _row(8, 2, TILE=64, BLOCK_D=16),
    ("sums", HALF): _row(8, 3, TILE=64, BLOCK_D=32),
    ("sums", SINGLE): _row(8, 2, TILE=64, BLOCK_D=16),
    ("gram_products", SINGLE): _row(8, 2, TILE=64, BLOCK_U=16, BLOCK_V=8, BLOCK_D=256),
    ("gram_gradient", SINGLE): _row(8, 2, TILE=64, BLOCK_D=16),
}


def table_row(name: str, kind: str, architecture: str, aligned: bool) -> tuple[str, Row]:
    """Where the row of a kernel stands, and the row.

    Args:
        kind: of number; architecture: such as "sm_90"; aligned: whether all widths are multiples of 16.
    """
    row = find_row(name, kind, architecture, aligned)
    if not aligned and row is UNALIGNED.get((name, kind)):
        return f"UNALIGNED[{name}, {kind}]", row
    if row is OVERRIDES.get((name, kind, architecture)):
        return f"OVERRIDES[{name}, {kind}, {architecture}]", row
    return f"TABLE[{name}, {kind}]", row


def find_row(name: str, kind: str, architecture: str, aligned: bool) -> Row:
    """The row alone, which every launch looks up."""
    row = None if aligned else UNALIGNED.get((name, kind))
    return row or OVERRIDES.get((name, kind, architecture)) or TABLE[name, kind]
