"""From a mask to a network: surgery, recalibration, evaluation, fine-tuning, files."""

from prunegraph.pruning.artefacts import (
    PrunedInfo,
    PrunedNetwork,
    load_pruned,
    read_info,
    save_pruned,
)
from prunegraph.pruning.clock import Latency, measure_latency
from prunegraph.pruning.compensation import Compensation
from prunegraph.pruning.evaluation import Scores, compute_logits, evaluate
from prunegraph.pruning.evaluator import Evaluator
from prunegraph.pruning.export import export, export_recipe
from prunegraph.pruning.finetune import FinetuneConfig, FinetuneResult, finetune
from prunegraph.pruning.latency import LatencyProjection, project_latency
from prunegraph.pruning.latency_table import LatencyTable, measure_latency_table
from prunegraph.pruning.problem import Pruner, PrunerResult, PruningProblem
from prunegraph.pruning.recalibration import recalibrate_bn
from prunegraph.pruning.sequential import SequentialCompensation
from prunegraph.pruning.subnets import Subnet, Subnets
from prunegraph.pruning.surgery import apply_mask, check_forward, zero_mask

__all__ = [
    "Compensation",
    "Evaluator",
    "FinetuneConfig",
    "FinetuneResult",
    "Latency",
    "LatencyProjection",
    "LatencyTable",
    "PrunedInfo",
    "PrunedNetwork",
    "Pruner",
    "PrunerResult",
    "PruningProblem",
    "Scores",
    "SequentialCompensation",
    "Subnet",
    "Subnets",
    "apply_mask",
    "check_forward",
    "compute_logits",
    "evaluate",
    "export",
    "export_recipe",
    "finetune",
    "load_pruned",
    "measure_latency",
    "measure_latency_table",
    "project_latency",
    "read_info",
    "recalibrate_bn",
    "save_pruned",
    "zero_mask",
]
