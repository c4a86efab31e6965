"""What a command does with each of its networks, as data: the runner does it, ``verify`` checks it.

A command lets methods choose masks, some once for each seed, adds controls, fine-tunes some of the
masks and judges one column. Which, this module says and nobody else.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prunegraph.artefacts.masked import StoredMask
from prunegraph.artefacts.pruned import StoredChannels
from prunegraph.core.budget import Budget, short
from prunegraph.core.user_code import is_factory
from prunegraph.methods.controls import CONTROL_CRITERIA, WidthsControl
from prunegraph.methods.method import Role
from prunegraph.methods.registry import POLICY, WEIGHT_METHODS, make_method, method_groups
from prunegraph.runs.context import Mask, RunContext
from prunegraph.runs.folder import RunFolder, slug
from prunegraph.runs.options.compare import CompareConfig, RunConfig
from prunegraph.runs.options.config import ApplyConfig, PruneConfig, SearchOptions, TrainConfig
from prunegraph.runs.report.verdict import (
    AGENT,
    DENSE,
    PRIOR,
    SAMPLER,
    Metric,
    best_baseline,
    is_agent,
    is_baseline,
    is_control,
    ranked,
)
from prunegraph.runs.store import Candidate, choose
from prunegraph.runs.target import Target

USUAL_SEARCHES = ("cem", "random_search")
"""Of the baselines that search, what ``train`` compares with; ``compare`` takes all."""

USUAL_HEURISTICS = (
    *("random/uniform", "l1/uniform", "l1/global", "l2/uniform", "bn_scale/global"),
    *("fpgm/uniform", "lamp/global", "activation/uniform", "taylor/uniform", "taylor/global"),
    *("taylor/per_mac", "taylor/sensitivity", "taylor/skip_full"),
)
"""What ``train`` compares with; ``compare`` takes every criterion with every allocation."""

ALWAYS = ("l1/uniform", "taylor/per_mac")
"""Heuristics that an applied policy is shown beside, and that ``compare`` always fine-tunes."""

BEST_SEARCHES = 2
"""So many of the baselines that search are fine-tuned by ``compare``."""

CONTROLS = frozenset(WidthsControl(criterion, {}).name for criterion in CONTROL_CRITERIA)
"""The names of the rows that keep the agent's widths."""

POLICY_SCHEME = f"{POLICY}:"
"""Begins the name of a method that applies a trained policy, and of its row."""

RECALIBRATED: Metric = "test_accuracy_recalibrated"
FINETUNED: Metric = "test_accuracy_finetuned"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one command does with each of its networks.

    Attributes:
        command: its name.
        methods: names of the methods that choose masks.
        beginnings: what the agent's search begins with: rows that it must beat.
        seeds: of the methods; one that depends on neither images nor chance has the first.
        controls: rows that keep the agent's widths are added.
        optional: baselines that miss a latency, which is met by luck, are left out.
        finetunes: eight rows and the dense network are fine-tuned, not the chosen mask and it.
    """

    command: str
    methods: tuple[str, ...] = ()
    beginnings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    controls: bool = False
    optional: bool = False
    finetunes: bool = False

    @property
    def searched(self) -> bool:
        """Whether the agent searches."""
        return AGENT in self.methods

    @property
    def agent(self) -> str | None:
        """Name of the rows of the agent, or of a policy that is applied; None without them."""
        own = (name for name in self.methods if is_policy(name) or name == AGENT)
        return next(own, None)

    def choices(self) -> Iterator[tuple[str, int]]:
        """Yield name and seed of each mask that a method chooses."""
        for name in (*self.methods, *self.beginnings):
            several = is_factory(name) or make_method(name).per_seed
            yield from ((name, seed) for seed in (self.seeds if several else self.seeds[:1]))

    def rows(self) -> set[tuple[str, int]]:
        """Return name and seed of every row that a report must have, beside the dense network's."""
        kept = (self.agent, *self.beginnings)
        found = {(n, seed) for n, seed in self.choices() if n in kept or not self.optional}
        return found | {(name, seed) for name in CONTROLS if self.controls for seed in self.seeds}

    def part(self, name: str) -> tuple[Role, bool, bool] | None:
        """Return role, searches and beginning of a row; None of a user's method, which is not run.

        Raises:
            PruneGraphError: no method has that name.
        """
        if name in (DENSE, *CONTROLS, *self.beginnings):
            return "control", False, name in self.beginnings
        if is_factory(name) and not is_policy(name):
            return None
        method = make_method(name)
        return method.role, method.searches, False

    def metric(self, *, trained: bool) -> Metric:
        """Return which column the verdict is about."""
        return FINETUNED if self.finetunes and trained else RECALIBRATED


def is_policy(name: str) -> bool:
    """Return whether a method applies a trained policy."""
    return name.startswith(POLICY_SCHEME)


def is_family(name: str) -> bool:
    """Return whether a method searches on all networks of a run at once."""
    return name in (AGENT, SAMPLER)


def make_plan(config: RunConfig) -> Plan:
    """Return what a command does; no code of the user's is run for it."""
    if isinstance(config, TrainConfig):
        return _train_plan(config)
    if isinstance(config, CompareConfig):
        return _compare_plan(config)
    return _apply_plan(config) if isinstance(config, ApplyConfig) else _prune_plan(config)


def _train_plan(config: TrainConfig) -> Plan:
    methods = {
        "none": (),
        "heuristics": USUAL_HEURISTICS,
        "all": (*USUAL_HEURISTICS, *USUAL_SEARCHES, SAMPLER),
    }
    return Plan(
        command=config.command,
        methods=(AGENT, *methods[config.baselines]),
        beginnings=_beginnings(config),
        seeds=_seeds(config.seed, config.search_seeds),
        controls=config.baselines != "none",
    )


def _apply_plan(config: ApplyConfig) -> Plan:
    timed = config.max_latency is not None
    return Plan(
        command=config.command,
        methods=(policy_row(config.policy), *ALWAYS),
        beginnings=() if timed else (PRIOR,),
        seeds=(config.seed,),
        controls=not timed,
        optional=timed,
    )


def _prune_plan(config: PruneConfig) -> Plan:
    applied = applied_policy(config)
    return Plan(
        command=config.command,
        methods=(config.method if applied is None else policy_row(applied), *beside(config)),
        beginnings=_beginnings(config) if config.method == AGENT else (),
        seeds=(config.seed,),
    )


def beside(config: object) -> tuple[str, ...]:
    """Return the names of the rows that a method's own row is shown with."""
    if not isinstance(config, PruneConfig) or is_policy(config.method) or is_factory(config.method):
        return ()
    found: tuple[str, ...] = getattr(make_method(config.method), "beside", ())
    return found


def policy_row(policy: Path) -> str:
    """Return the name of the row of a policy, wherever it lies."""
    return f"{POLICY_SCHEME}{policy.name}"


def _beginnings(config: SearchOptions) -> tuple[str, ...]:
    """Return the names of what the agent's search begins with: its prior, and a policy."""
    return (PRIOR,) if config.policy is None else (PRIOR, policy_row(config.policy))


def applied_policy(config: object) -> Path | None:
    """Return the policy that a command applies without a search, or None."""
    if isinstance(config, ApplyConfig):
        return config.policy
    if isinstance(config, PruneConfig) and is_policy(config.method):
        return Path(config.method.removeprefix(POLICY_SCHEME))
    return None


def _compare_plan(config: CompareConfig) -> Plan:
    groups = method_groups()
    searches = not config.no_agent
    if config.budget().kind == "weights":  # of which the agent chooses none
        groups = {"all": tuple(WEIGHT_METHODS)}
        searches = False
    asked = [method for method in config.methods if method != AGENT]  # which --no-agent leaves out
    beginnings = _beginnings(config) if searches else ()
    names = [name for method in asked for name in groups.get(method, (method,))]
    rows = dict.fromkeys([*[AGENT] * searches, *names])
    return Plan(
        command=config.command,
        methods=tuple(name for name in rows if name not in beginnings),
        beginnings=beginnings,
        seeds=_seeds(config.seed, config.seeds),
        controls=searches,
        finetunes=True,
    )


def _seeds(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


def run_name(config: RunConfig, targets: Sequence[Target]) -> str:
    """Return the default name of a run's folder."""
    names = "+".join(slug(target.arch) for target in targets)
    name = f"{names}-{slug(targets[0].data_name)}-{budget_name(config.budget())}"
    if isinstance(config, PruneConfig):
        return f"{slug(config.method)}-{name}"
    return name if isinstance(config, TrainConfig) else f"{config.command}-{name}"


def budget_name(budget: Budget) -> str:
    """Return a budget's limits as part of a file's name."""
    named = {
        name: name if value is True else short(value) for name, value in budget.as_dict().items()
    }
    return slug("-".join(named.values()))


@dataclass(frozen=True, eq=False, kw_only=True)
class Finetune:
    """A fine-tune, whose network gets a folder of the run.

    Attributes:
        candidate: whose mask; None = the dense control.
        seed: of the fine-tune.
        folder: its path in the run folder; None = nothing is trained, and the network lies
            elsewhere as it is.
    """

    candidate: Candidate | None
    seed: int
    folder: str | None

    @property
    def mask(self) -> Mask | None:
        """What stays; None = everything."""
        return None if self.candidate is None else self.candidate.mask

    @property
    def name(self) -> str:
        """The method's name."""
        return DENSE if self.candidate is None else self.candidate.name


def plan_finetunes(context: RunContext, candidates: Sequence[Candidate]) -> list[Finetune]:
    """Return the fine-tunes of a run, chosen by search accuracy.

    ``compare`` fine-tunes several rows (``compared``), each in a cell. The others fine-tune the
    mask that the run ends with and the dense network.
    """
    if isinstance(context.options, CompareConfig):
        pairs = compared(candidates, context.options)
        return [
            Finetune(candidate=item, seed=seed, folder=_cell(context, item, seed))
            for item, seed in pairs
        ]
    chosen = choose(candidates)
    return [
        Finetune(
            candidate=None,
            seed=context.seed,
            folder=RunFolder.DENSE_FINETUNED if context.trains else None,
        ),
        Finetune(candidate=chosen, seed=context.seed, folder=RunFolder.PRUNED),
    ]


def compared(
    candidates: Sequence[Candidate], config: CompareConfig
) -> list[tuple[Candidate | None, int]]:
    """Return the rows that a comparison fine-tunes, each with the seed; None = the dense network.

    Eight rows and the dense control: the agent; L1 and random at its widths; the two searches
    among the baselines that are best on average; L1 uniform; Taylor per MAC; the best
    other heuristic. A method that was asked with several seeds is fine-tuned with the seed of each
    mask, one that depends on neither images nor chance with every seed. With ``finetune_best`` it
    is the agent and the best baseline alone. What the agent must beat is always among the rows:
    without an agent the best baseline; the policy that the search began with, where that is better
    than all of them. Methods of single weights, and others that change weights, are all fine-tuned.
    """
    seeds = _seeds(config.seed, config.seeds)
    best = best_baseline(candidates)
    if config.finetune_best:
        candidates = [item for item in candidates if is_agent(item) or item.name == best]
    names = _searched(candidates) | _chosen_heuristics(candidates)
    changed = StoredMask | StoredChannels
    chosen = [
        item for item in candidates if item.name in {*names, best} or isinstance(item.mask, changed)
    ]
    pairs: list[tuple[Candidate | None, int]] = []
    for item in chosen:
        own = seeds if _is_alone(item, candidates) else [item.seed]
        pairs += [(item, seed) for seed in own]
    return pairs + [(None, seed) for seed in seeds]


def searches(name: str) -> bool:
    """Return whether a method that is asked for runs as many networks as it may.

    The user's own is not made for that: ``verify`` runs no code that a report names.
    """
    policy = is_policy(name)
    return not policy and (is_factory(name) or make_method(name).searches)


def _chosen_heuristics(candidates: Sequence[Candidate]) -> set[str]:
    """Return the names of the heuristics to fine-tune."""
    names = {item.name for item in candidates if is_baseline(item) and not item.searches}
    order = ranked(candidates, names - {*ALWAYS})
    return {*order[:1]} | (names & {*ALWAYS})


def _is_alone(item: Candidate, candidates: Sequence[Candidate]) -> bool:
    """Return whether a mask is its method's only one, which every seed's fine-tune begins from."""
    if is_control(item) or item.searches:
        return False
    return sum(other.name == item.name for other in candidates) == 1


def _searched(candidates: Sequence[Candidate]) -> set[str]:
    """Return the names of the rows with a search of their own, or the agent's, to fine-tune."""
    agents = {item.name for item in candidates if is_agent(item)}
    found = {item.name for item in candidates if item.searches} - agents
    return agents | CONTROLS | {*ranked(candidates, found)[:BEST_SEARCHES]}


def _cell(context: RunContext, candidate: Candidate | None, seed: int) -> str | None:
    """Name the folder of a fine-tune by all that decides its result: mask, seed, recipe."""
    stored = candidate is None or isinstance(candidate.mask, StoredMask | StoredChannels)
    if stored and not context.trains:
        return None
    mask = context.target.whole if candidate is None else candidate.mask
    words = json.dumps([mask.digest(), seed, context.recipe_record()], sort_keys=True)
    return f"{RunFolder.CELLS}/{hashlib.sha256(words.encode()).hexdigest()[:16]}"
