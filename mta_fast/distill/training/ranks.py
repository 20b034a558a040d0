"""Which process of a run this is, before torch.distributed has started: by what the launchers set."""

from __future__ import annotations

import os

RANK_VARIABLES = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # those that accelerate reads


def is_first() -> bool:
    """Whether this process leads the run; also where there is one alone."""
    return next((os.environ[name] for name in RANK_VARIABLES if os.environ.get(name)), "0") == "0"


def is_first_of_node() -> bool:
    """Whether this process is the first one of the run on this machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"
