"""How long a comparison takes, measured on a few networks before it begins."""

from dataclasses import dataclass, replace

import numpy as np

from prunegraph.agent.settings import DEFAULT_SUBSET
from prunegraph.core.console import Console, seconds_in_words
from prunegraph.graph import copy_network
from prunegraph.methods.registry import CONTROL_CRITERIA
from prunegraph.runs.context import RunContext, with_train
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.plan import ALWAYS, BEST_SEARCHES, finetune_seeds_of, make_plan, searches
from prunegraph.training.loop import finetune

PLAN_IMAGES = 1024
"""Training images by which the time of the fine-tunes is predicted."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """What the evaluations and fine-tunes of a comparison take, one job after the other.

    Attributes:
        searches: how many, the agent's and the baselines'.
        search_seconds: of all of them.
        finetunes: how many.
        finetune_seconds: of all of them.
    """

    searches: int
    search_seconds: float
    finetunes: int
    finetune_seconds: float

    @property
    def seconds(self) -> float:
        """Of both stages."""
        return self.search_seconds + self.finetune_seconds


def predict_duration(context: RunContext, config: CompareConfig) -> Duration:
    """Measure how fast networks are evaluated and trained, and predict what all will take."""
    seconds = 0.0
    if context.target.structure is not None:
        evaluator = context.evaluator()
        subset = evaluator.draw_subset(config.agent.subset or DEFAULT_SUBSET, config.seed)
        shape = (2, context.target.graph.num_units)
        for row in np.random.default_rng(0).random(shape, dtype=np.float32):
            # the first network measures, too, what all later ones need
            seconds = evaluator.evaluate(context.project(row, context.budget), subset).seconds
    num_images = len(context.finetune_task.train)
    per_image = 0.0
    if context.trains:
        recipe = replace(context.recipe(), epochs=1)
        train = context.finetune_task.train.sample(PLAN_IMAGES, context.seed)
        model = copy_network(context.target.model)
        task = with_train(context.target.task, train)
        trained = finetune(model, task, recipe, seed=context.seed, teacher=context.teacher)
        per_image = trained.seconds / len(train)
    names = {*make_plan(config).methods}
    searched = {*filter(searches, names)}
    chosen = names - searched
    num_searches = (len(searched) + (not config.no_agent)) * config.seeds
    others = len(chosen & {*ALWAYS}) + bool(chosen - {*ALWAYS})
    finetuned = 1 + min(len(searched), BEST_SEARCHES) + others
    if config.finetune_best:
        finetuned = 2
    finetuned += (not config.no_agent) * (1 if config.finetune_best else 1 + len(CONTROL_CRITERIA))
    finetunes = finetuned * len(finetune_seeds_of(config)) * context.trains
    return Duration(
        searches=num_searches,
        search_seconds=num_searches * config.networks * seconds,
        finetunes=finetunes,
        finetune_seconds=finetunes * context.recipe().epochs * num_images * per_image,
    )


def say_duration(
    context: RunContext, config: CompareConfig, workers: int, console: Console
) -> None:
    """Say how long all will take."""
    plan = predict_duration(context, config)
    console.say(
        f"plan: about {seconds_in_words(plan.search_seconds)} of evaluations for {plan.searches} "
        f"searches of {config.networks} networks, {seconds_in_words(plan.finetune_seconds)} for "
        f"{plan.finetunes} fine-tunes of {context.recipe().epochs} epochs: "
        f"{seconds_in_words(plan.seconds)} one after the other, {workers} at a time"
    )
