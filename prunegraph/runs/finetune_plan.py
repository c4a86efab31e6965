"""Which masks a comparison fine-tunes, chosen by search accuracy."""

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from prunegraph.runs.baselines import CONTROLS, TORCH_PRUNING, heuristics
from prunegraph.runs.bench import Bench
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.options.config import PruningOptions
from prunegraph.runs.report.verdict import CONTROL_SUFFIX, DENSE, is_agent, is_control, searches
from prunegraph.runs.store import Candidate, best_rival, choose, ranked

ALWAYS = ("l1/uniform", "taylor/per_mac")
"""Heuristics that are fine-tuned whatever their search accuracy."""

BEST_SEARCHES = 2
"""So many of the baselines that search are fine-tuned."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """A fine-tune of stage 2.

    Attributes:
        candidate: the row; None = the dense control.
        seed: of the fine-tune.
        digest: name of its folder.
    """

    candidate: Candidate | None
    seed: int
    digest: str

    @property
    def name(self) -> str:
        """The method's name."""
        return DENSE if self.candidate is None else self.candidate.name

    @property
    def folder(self) -> str:
        """The folder's path in the run folder."""
        return f"{RunFolder.CELLS}/{self.digest}"


def finetune_seeds_of(config: CompareConfig) -> list[int]:
    """Return the seeds of the fine-tunes of a mask that needed no search."""
    return [config.seed + number for number in range(config.finetune_seeds or config.seeds)]


def plan_cells(bench: Bench, candidates: Sequence[Candidate], config: CompareConfig) -> list[Cell]:
    """Return the fine-tunes of stage 2, chosen by search accuracy.

    Eight rows and the dense control: the agent; L1 and random at its widths; the two searches
    among the baselines that are best on average; L1 uniform; Taylor per MAC; the best
    other heuristic. A method that was asked with several seeds is fine-tuned with the seed of each
    mask, one that depends on neither images nor chance with every seed. With ``finetune_seeds`` the
    best mask of each is, with every one; L1 and random at the widths of the agent's best. With
    ``finetune_best`` it is the agent and the best baseline alone. What the agent must beat is
    always among the rows: without an agent the best baseline; the policy that the search began
    with, where that is better than all of them.

    Args:
        bench: the network.
        candidates: of all methods.
        config: which of them.
    """
    seeds, rank = finetune_seeds_of(config), rank_of(config)
    best = best_rival(candidates, rank)
    if config.finetune_best:
        candidates = [item for item in candidates if is_agent(item.name) or item.name == best]
    names = _searched(candidates, rank) | _chosen_heuristics(candidates, rank)
    if best is not None and (searches(best) or is_control(best)):
        names.add(best)
    chosen = [item for item in candidates if item.name in names]
    if config.finetune_seeds is not None:
        chosen = _best_masks(chosen)
    pairs: list[tuple[Candidate | None, int]] = []
    for item in chosen:
        once = config.finetune_seeds is not None or _is_alone(item, candidates)
        pairs += [(item, seed) for seed in (seeds if once else [item.seed])]
    pairs += [(None, seed) for seed in seeds]
    return [
        Cell(candidate=item, seed=seed, digest=_cell_digest(bench, item, seed))
        for item, seed in pairs
    ]


def rank_of(options: PruningOptions) -> Callable[[Sequence[float]], float]:
    """Return what ranks a method by the search accuracies of its masks.

    Their mean; where the best mask of each method is fine-tuned, that mask's.
    """
    best = isinstance(options, CompareConfig) and options.finetune_seeds is not None
    return max if best else statistics.mean


def _chosen_heuristics(
    candidates: Sequence[Candidate], rank: Callable[[Sequence[float]], float]
) -> set[str]:
    """Return the names of the heuristics to fine-tune."""
    names = {item.name for item in candidates} & {*heuristics(), *TORCH_PRUNING}
    order = ranked(candidates, names - {*ALWAYS}, rank)
    return {*order[:1]} | (names & {*ALWAYS})


def _is_alone(item: Candidate, candidates: Sequence[Candidate]) -> bool:
    """Return whether a mask is its method's only one, which every seed's fine-tune begins from."""
    if searches(item.name) or is_agent(item.name) or is_control(item.name):
        return False
    return sum(other.name == item.name for other in candidates) == 1


def _best_masks(searched: Sequence[Candidate]) -> list[Candidate]:
    """Return a mask of each method that searched: its best one; controls go with the agent's."""
    agents = [item for item in searched if is_agent(item.name)]
    chosen = choose(agents).seed if agents else None
    best: dict[str, Candidate] = {}
    for item in searched:
        of_agent = is_agent(item.name) or item.name.endswith(CONTROL_SUFFIX)
        seed = chosen if of_agent else item.seed
        rank, known = (item.search_accuracy, -item.seed), best.get(item.name)
        if item.seed == seed and (known is None or rank > (known.search_accuracy, -known.seed)):
            best[item.name] = item
    return list(best.values())


def _searched(
    candidates: Sequence[Candidate], rank: Callable[[Sequence[float]], float] = statistics.mean
) -> set[str]:
    """Return the names of the rows with a search of their own, or the agent's, to fine-tune.

    Args:
        candidates: of all methods.
        rank: by which the search baselines are ordered, of the search accuracies of their masks.
    """
    found = {item.name for item in candidates if searches(item.name)}
    best = {*ranked(candidates, found, rank)[:BEST_SEARCHES]}
    return {item.name for item in candidates if is_agent(item.name)} | CONTROLS | best


def _cell_digest(bench: Bench, candidate: Candidate | None, seed: int) -> str:
    """Name a fine-tune by all that decides its result: mask, seed, recipe."""
    mask = bench.target.graph.dense_mask() if candidate is None else candidate.mask
    words = json.dumps([mask.digest(), seed, bench.recipe_record()], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:16]
