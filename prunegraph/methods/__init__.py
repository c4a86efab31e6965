"""Pruning methods behind one protocol; those with options of their own, for ``pg.prune``."""

from prunegraph.methods.fedmap.method import FedAvg, FedMap
from prunegraph.methods.obs.apt import APT
from prunegraph.methods.obs.magnitude import Magnitude
from prunegraph.methods.obs.sparsegpt import SparseGPT
from prunegraph.methods.obs.thanos import Thanos
from prunegraph.methods.obs.wanda import Wanda
from prunegraph.methods.pathways import Pathways

__all__ = ["APT", "FedAvg", "FedMap", "Magnitude", "Pathways", "SparseGPT", "Thanos", "Wanda"]
