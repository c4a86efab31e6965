"""Pruning methods behind one protocol; those with options of their own, for ``pg.prune``."""

from prunegraph.methods.fedmap.method import FedAvg, FedMap
from prunegraph.methods.maskprune.method import MaskPrune
from prunegraph.methods.obs.apt import APT
from prunegraph.methods.obs.magnitude import Magnitude
from prunegraph.methods.obs.sparsegpt import SparseGPT
from prunegraph.methods.obs.thanos import Thanos
from prunegraph.methods.obs.wanda import Wanda
from prunegraph.methods.pathways import Pathways
from prunegraph.methods.randomized.method import Randomized, RandomizedShares
from prunegraph.methods.struprune.method import StruPrune

__all__ = [
    "APT",
    "FedAvg",
    "FedMap",
    "Magnitude",
    "MaskPrune",
    "Pathways",
    "Randomized",
    "RandomizedShares",
    "SparseGPT",
    "StruPrune",
    "Thanos",
    "Wanda",
]
