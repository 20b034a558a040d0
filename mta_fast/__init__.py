"""mta_fast: Multi-Granular Trajectory Alignment (arXiv 2605.01374) as a loss for distilling language models."""

from mta_fast._version import __version__
from mta_fast.config import MTAConfig
from mta_fast.layers import LayerMap, capture_layers
from mta_fast.loss import MTALoss, MTAOutput
from mta_fast.ops.entropy import entropy_weights
from mta_fast.ops.hidden_alignment import hidden_alignment_loss
from mta_fast.ops.importance import token_importance
from mta_fast.ops.linear_divergence import linear_divergence_loss
from mta_fast.ops.pooling import normalize_weights, pool_spans
from mta_fast.ops.span_pairs import span_pair_loss
from mta_fast.ops.trajectory_divergence import trajectory_divergence
from mta_fast.spans.batch import Capacities, SpanBatch
from mta_fast.spans.collate import SpanCollator
from mta_fast.spans.extract import SpanExtractor

__all__ = [
    "Capacities",
    "LayerMap",
    "MTAConfig",
    "MTALoss",
    "MTAOutput",
    "SpanBatch",
    "SpanCollator",
    "SpanExtractor",
    "__version__",
    "capture_layers",
    "entropy_weights",
    "hidden_alignment_loss",
    "linear_divergence_loss",
    "normalize_weights",
    "pool_spans",
    "span_pair_loss",
    "token_importance",
    "trajectory_divergence",
]
