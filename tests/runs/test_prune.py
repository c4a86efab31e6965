"""``pg.prune``: any task, any method, one call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunegraph as pg
from prunegraph.agent.method import AgentSearch, AppliedPolicy, Sampler
from prunegraph.agent.options import AgentOptions
from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError, ModelError
from prunegraph.core.masks import pack_bits
from prunegraph.core.task import Task
from prunegraph.data import load_dataset
from prunegraph.graph.costs.clock import Latency
from prunegraph.methods.context import make_problem
from prunegraph.methods.method import Method, Problem, Result
from prunegraph.models import build_model
from prunegraph.tasks.classification import evaluate
from prunegraph.tasks.custom import CustomTask
from prunegraph.tasks.image_classification import ImageClassification, training_task
from prunegraph.training.loop import FinetuneConfig, finetune
from support.tasks import language_task, segmentation_task

HALF = pg.Budget(keep_macs=0.5)
SHORT = AgentOptions(update_size=4, surrogate_steps=2, swaps=4)
FEW = 40
"""Networks that allow a few updates of four."""


def short(method: str) -> str | Method:
    return AgentSearch(options=SHORT) if method == "agent" else method


class Regressor(nn.Module):
    """Two inputs, two outputs, no classes and no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 16), nn.Linear(5, 16)
        self.hidden, self.norm = nn.Linear(32, 24), nn.LayerNorm(24)
        self.mean, self.spread = nn.Linear(24, 1), nn.Linear(24, 1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        both = torch.cat([self.left(left).relu(), self.right(right).relu()], dim=1)
        hidden = self.norm(self.hidden(both)).relu()
        return {"mean": self.mean(hidden), "spread": self.spread(hidden).exp()}


Rows = tuple[Tensor, Tensor, Tensor]


def regression_loss(network: nn.Module, batch: Rows) -> Tensor:
    left, right, target = batch
    return ((network(left, right)["mean"][:, 0] - target) ** 2).mean()


class Counted:
    """R^2, not below 0; counts the networks, and may stop at one of them."""

    def __init__(self, batch: Rows) -> None:
        self.batch, self.runs, self.stop_at = batch, 0, 0

    def __call__(self, network: nn.Module) -> float:
        self.runs += 1
        if self.runs == self.stop_at:
            raise KeyboardInterrupt
        with torch.no_grad():
            error = regression_loss(network, self.batch)
        return max(0.0, 1.0 - float(error / self.batch[2].var()))


@pytest.fixture(scope="module")
def trained() -> tuple[Regressor, list[Rows]]:
    torch.manual_seed(0)
    left, right = torch.randn(256, 3), torch.randn(256, 5)
    target = left[:, 0] * right[:, 1]
    model = Regressor()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        regression_loss(model, (left, right, target)).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    split = zip(left.split(64), right.split(64), target.split(64), strict=True)
    return model.eval(), list(split)


def regression(
    trained: tuple[Regressor, list[Rows]],
    score: Callable[[nn.Module], float] | None = None,
    **options: Any,
) -> CustomTask:
    model, batches = trained
    return pg.tasks.custom(
        model,
        (batches[0][0][:1], batches[0][1][:1]),
        score=score or Counted(batches[-1]),
        **{"train": batches, "higher_is_better": True, "loss": regression_loss, **options},
    )


def digits_task(batch_size: int = 128, **options: Any) -> ImageClassification:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).eval()
    images, labels = next(load_dataset("digits").train.batches(batch_size))
    return pg.tasks.image_classification(model, train=[(images, labels)], num_images=64, **options)


TASKS: dict[str, Callable[[], Task]] = {
    "language": language_task,
    "segmentation": segmentation_task,
    "digits": digits_task,
}


@pytest.mark.parametrize("method", ["l1/uniform", "taylor/global", "cem", "agent"])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_pruned_by_every_kind_of_method(name: str, method: str) -> None:
    task = TASKS[name]()
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    result = pg.prune(task, short(method), HALF, networks=FEW)
    report = result.report
    assert report["method"] == method
    assert report["pruned"]["macs"] <= 0.5 * report["dense"]["macs"]
    assert report["networks_evaluated"] <= FEW
    assert (report["networks_evaluated"] > 0) == (method in ("cem", "agent"))
    assert report["pruned"]["score"] == task.score(result.model).value
    assert report["score_name"] == task.score_name
    assert report["higher_is_better"] == task.higher_is_better
    assert not result.model.training
    after = task.model.state_dict()
    assert all(torch.equal(before[key], value) for key, value in after.items())


@pytest.mark.parametrize("method", ["cem", "agent"])
@pytest.mark.parametrize("name", ["language", "segmentation"])
def test_an_error_is_never_maximised(name: str, method: str) -> None:
    task = TASKS[name]()
    searched = pg.prune(task, short(method), HALF, networks=FEW, reconstruct=False)
    at_random = pg.prune(task, "random/uniform", HALF, reconstruct=False)
    assert searched.report["pruned"]["score"] < at_random.report["pruned"]["score"]


def test_a_network_of_two_inputs_and_no_classes_is_searched(trained: Any) -> None:
    score = Counted(trained[1][-1])
    task, said = regression(trained, score), []
    result = pg.prune(
        task,
        AgentSearch(options=SHORT),
        HALF,
        networks=40,
        progress=lambda networks, words: said.append((networks, words)),
    )
    assert {"mean", "spread"} == result.model(*task.example_inputs).keys()
    assert result.report["dense"]["score"] == Counted(trained[1][-1])(task.model)
    assert said[-1][0] > said[0][0]
    assert "mean score" in said[0][1]
    again = pg.prune(task, AgentSearch(options=SHORT), HALF, networks=40)
    assert again.mask == result.mask
    assert again.report == result.report


@pytest.mark.parametrize("size", [64, 256])
def test_the_network_is_fitted_layer_by_layer_where_it_is_better_then(
    trained: Any, size: int
) -> None:
    _, batches = trained
    sizes: list[int] = []

    def loss(network: nn.Module, batch: Rows) -> Tensor:
        if len(batch[2]) > size:
            msg = "a forward of another size"
            raise RuntimeError(msg)
        sizes.append(len(batch[2]))
        return regression_loss(network, batch)

    task = regression(trained, loss=loss)
    result = pg.prune(task, "taylor/uniform", HALF)
    assert max(sizes) == size
    alone = pg.prune(task, "taylor/uniform", HALF, reconstruct=False)
    assert result.mask == alone.mask
    at_once = pg.Reconstruction.on_samples(task, result.graph, task.train)
    pruned = pg.apply_mask(task.model, result.graph, result.mask)
    at_once.apply(pruned, result.mask)
    score = Counted(batches[-1])
    assert result.report["pruned"]["score"] == score(result.model) >= score(pruned)
    assert result.report["pruned"]["score"] > alone.report["pruned"]["score"]


def test_a_search_survives_a_fit_that_fails_at_its_end(trained: Any) -> None:
    at_end: list[int] = []

    def loss(network: nn.Module, batch: Rows) -> Tensor:
        if at_end:
            msg = "out of memory"
            raise RuntimeError(msg)
        return regression_loss(network, batch)

    def last(_: int, words: str) -> None:
        if "finalists" in words:
            at_end.append(1)

    task = regression(trained, loss=loss)
    with pytest.warns(UserWarning, match="not reconstructed layer by layer: .*out of memory"):
        result = pg.prune(task, AgentSearch(options=SHORT), HALF, networks=FEW, progress=last)
    assert result.report["pruned"]["score"] == Counted(trained[1][-1])(result.model)


def test_a_latency_is_searched_within_by_layer_times_that_are_kept(
    trained: Any, tmp_path: Path, parameter_clock: Callable[..., Latency]
) -> None:
    task = regression(trained)
    dense = parameter_clock(task.model).least
    method, budget = AgentSearch(options=SHORT), pg.Budget(max_latency=0.6 * dense)
    result = pg.prune(task, method, budget, networks=FEW, checkpoint=tmp_path)
    found = result.report["latency_ms"]
    assert found["dense"] == pytest.approx(dense, abs=1e-3)
    assert found["pruned"] <= 0.65 * dense
    assert result.graph is not None
    assert isinstance(result.mask, pg.ChannelMask)
    table = result.graph.latency_model
    assert table is not None
    prediction = table.expected(result.mask.keep[None].astype(float))
    assert float(prediction[0]) <= 0.6 * dense
    (tmp_path / "latency.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"latency\.json"):
        pg.prune(task, method, budget, networks=FEW, checkpoint=tmp_path)
    with pytest.raises(BudgetError, match="which meets max_latency=1000: give fewer"):
        pg.prune(task, method, pg.Budget(max_latency=1000.0), networks=FEW)


def test_a_method_that_does_not_search_meets_a_latency_on_the_clock(
    trained: Any, parameter_clock: Callable[..., Latency]
) -> None:
    task = regression(trained)
    dense = parameter_clock(task.model).least
    result = pg.prune(task, "policy:resnet-cifar", pg.Budget(max_latency=0.8 * dense))
    assert result.report["latency_ms"]["pruned"] <= 0.8 * dense


@pytest.mark.parametrize("method", ["cem", "agent"])
@pytest.mark.parametrize(
    "share",
    [
        pytest.param(0.05, marks=pytest.mark.slow),
        0.5,
        pytest.param(0.9, marks=pytest.mark.slow),
    ],
)
def test_a_search_that_is_killed_between_two_networks_runs_none_again(
    trained: Any, tmp_path: Path, share: float, method: str
) -> None:
    score = Counted(trained[1][-1])
    task = regression(trained, score)
    whole = pg.prune(task, short(method), HALF, networks=FEW)
    total, score.runs = score.runs, 0
    score.stop_at = max(2, int(share * total))
    with pytest.raises(KeyboardInterrupt):
        pg.prune(task, short(method), HALF, networks=FEW, checkpoint=tmp_path)
    again = pg.prune(task, short(method), HALF, networks=FEW, checkpoint=tmp_path)
    assert {**again.report, "seconds": 0} == {**whole.report, "seconds": 0}
    assert again.mask == whole.mask
    assert score.runs <= total + 1  # the one that was cut off


def test_a_checkpoint_of_another_search_is_refused(trained: Any, tmp_path: Path) -> None:
    model, batches = trained
    task, method = regression(trained), AgentSearch(options=SHORT)
    pg.prune(task, method, HALF, networks=FEW, checkpoint=tmp_path)

    def again(task: Task = task, method: Any = method, budget: pg.Budget = HALF, **other: Any):
        pg.prune(task, method, budget, networks=FEW, checkpoint=tmp_path, **other)

    with pytest.raises(ArtefactError, match="of a search with reconstruct True, not False"):
        again(reconstruct=False)
    with pytest.raises(ArtefactError, match="of a search with train"):
        again(regression((model, batches[::-1])))
    with pytest.raises(ArtefactError, match="of a search with method agent, not cem"):
        again(method="cem")
    with pytest.raises(ArtefactError, match="of a search with policy None"):
        again(method=AgentSearch(options=SHORT, policy="resnet-cifar"))
    with pytest.raises(ArtefactError, match="of a search with budget"):
        again(budget=pg.Budget(keep_macs=0.6))
    with pytest.raises(ArtefactError, match="of a search with seed 0, not 1"):
        again(seed=1)
    other = Regressor().eval()
    with pytest.raises(ArtefactError, match="of a search with network"):
        again(regression((other, batches)))


@pytest.mark.slow
def test_a_search_ends_where_there_are_no_more_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).eval()
    images = torch.randn(60, 6)
    task = pg.tasks.custom(
        model,
        images[:1],
        train=[images],
        score=lambda network: network(images).square().mean().item(),
        higher_is_better=False,
        loss=lambda network, batch: network(batch).square().mean(),
    )
    result = pg.prune(task, "agent", HALF, networks=80)
    assert result.report["networks_evaluated"] < 60


def test_a_network_in_double_precision_is_searched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4)).double().eval()
    images = torch.randn(60, 6).double()
    answers = model(images).detach()
    task = pg.tasks.custom(
        model,
        images[:1],
        train=[(images, answers)],
        score=lambda network: 1.0 - (network(images) - answers).square().mean().item(),
        higher_is_better=True,
        loss=lambda network, batch: (network(batch[0]) - batch[1]).square().mean(),
    )
    result = pg.prune(task, AgentSearch(options=SHORT), HALF, networks=FEW)
    assert result.report["pruned"]["score"] > 0.9
    assert next(result.model.parameters()).dtype == torch.float64


def test_a_search_from_a_policy_ends_no_worse_than_the_policy_alone() -> None:
    """The policy's own mask is a finalist: by what the search compares, it cannot end below it."""
    digits = load_dataset("digits")
    torch.manual_seed(0)
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))
    finetune(
        model, training_task(model, digits.train), FinetuneConfig(epochs=4, peak_lr=0.1), seed=0
    )
    task = pg.tasks.image_classification(model.eval(), train=digits.train, search=digits.search)
    alone = pg.prune(task, "policy:resnet-cifar", HALF)
    found = pg.prune(task, AgentSearch(policy="resnet-cifar"), HALF, networks=42)
    _, bits = found.report["policy_masks"][0]
    assert bits == pack_bits(alone.mask.keep)
    metric = AgentOptions().metric
    judge = make_problem(task, alone.graph, HALF, layer_by_layer=False, metric=metric).evaluator
    first, best = judge.evaluate_all([alone.mask, found.mask])
    assert best.rank >= first.rank
    assert best.accuracy == found.report["score"]
    assert alone.report["pruned"]["score"] == evaluate(alone.model, digits.search).accuracy
    assert alone.report["strength"] in (0.0, 0.5, 1.0)
    assert {"0.0", "0.5", "1.0"} == alone.report["divergence"].keys()


def test_the_sampler_learns_nothing(trained: Any) -> None:
    task = regression(trained)
    result = pg.prune(task, Sampler(options=SHORT), HALF, networks=FEW)
    assert result.report["method"] == "sampler"
    masks = [bits for _, bits in result.report["policy_masks"]]
    assert len(masks) > 1
    assert len(set(masks)) == 1
    learned = pg.prune(task, AgentSearch(options=SHORT), HALF, networks=FEW)
    assert len({bits for _, bits in learned.report["policy_masks"]}) > 1


def test_the_agents_methods_say_what_they_are() -> None:
    agent, sampler, applied = AgentSearch(), Sampler(), AppliedPolicy("resnet-cifar")
    assert [method.name for method in (agent, sampler, applied)] == [
        *("agent", "sampler", "policy:resnet-cifar")
    ]
    assert [method.role for method in (agent, sampler, applied)] == ["agent", "baseline", "agent"]
    assert [method.searches for method in (agent, sampler, applied)] == [True, True, False]
    assert all(method.per_seed for method in (agent, sampler, applied))


def test_single_weights_become_zero_in_place(trained: Any) -> None:
    task = regression(trained)
    result = pg.prune(task, "magnitude", pg.Budget(sparsity=0.5))
    weights = [module.weight for module in result.model.modules() if isinstance(module, nn.Linear)]
    assert sum(int((weight == 0).sum()) for weight in weights) > 0
    assert result.graph is None
    assert len(repr(result)) < 200  # neither networks nor data
    assert len(repr(task.train)) < 200
    assert result.report["pruned"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert result.report["pruned"]["score"] == Counted(trained[1][-1])(result.model)


@pytest.mark.parametrize(
    ("method", "budget", "networks", "error", "message"),
    [
        ("agent", HALF, 33, ConfigError, "networks=33 allows no update .*: give at least 34"),
        (
            AgentSearch(policy="resnet-cifar"),
            *(HALF, 41, ConfigError, "networks=41 .* give at least 42"),
        ),
        ("agent", pg.Budget(keep_macs=0.001), 400, BudgetError, "keep_macs=0.001"),
        ("agent", pg.Budget(max_memory=10**9), 400, BudgetError, "nothing is to be pruned"),
        ("agent", pg.Budget(sparsity=0.5), 400, BudgetError, "single weights"),
        ("policy:resnet-cifar", pg.Budget(keep_macs=0.001), 400, BudgetError, "keep_macs=0.001"),
        ("policy:resnet-imagenet", HALF, 400, ArtefactError, "comes with the package: resnet-"),
        ("l1/unifrom", HALF, 400, ConfigError, "did you mean .*l1/uniform"),
        ("cem", HALF, 0, ConfigError, "networks=0 is too few for cem"),
        ("l1/uniform", 0.5, 400, ConfigError, r"budget=0.5 is no Budget: .*pg\.Budget\(keep_macs"),
        (AgentSearch, HALF, 400, ConfigError, r"the class AgentSearch: give .* AgentSearch\(\)"),
    ],
)
def test_what_cannot_be_is_one_line_before_any_work(
    method: Any,
    budget: Any,
    networks: int,
    error: type[Exception],
    message: str,
    trained: Any,
) -> None:
    score = Counted(trained[1][-1])
    with pytest.raises(error, match=message) as caught:
        pg.prune(regression(trained, score), method, budget, networks=networks)
    assert "\n" not in str(caught.value)
    assert score.runs == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": lambda _: float("nan")}, "nan"),
        ({"score": lambda _: None}, "None"),
        ({"loss": lambda n, b: n(b[0], b[1])["mean"]}, r"returns shape \[64, 1\]"),
        ({"loss": lambda n, b: regression_loss(n, b).detach()}, "leave detach"),
    ],
)
def test_a_task_that_gives_no_numbers_is_one_line(
    options: dict[str, Any], message: str, trained: Any
) -> None:
    with pytest.raises(ModelError, match=message):
        pg.prune(regression(trained, **options), AgentSearch(options=SHORT), HALF, networks=FEW)


def test_half_precision_on_a_cpu_is_one_line() -> None:
    model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8)).half().eval()
    images = (torch.rand(8, 1, 8, 8).half(), torch.zeros(8, dtype=torch.int64))
    task = ImageClassification(
        model=model,
        example_inputs=images[0][:1],
        train=(split := load_dataset("digits").train),
        search=load_dataset("digits").search,
    )
    assert len(split) > 0
    with pytest.raises(ModelError, match=r"give model\.float"):
        pg.prune(task, "l1/uniform", HALF)


def test_pruning_leaves_the_modes_of_the_network_s_parts_alone() -> None:
    task = digits_task()
    task.model.train()
    task.model.bn1.eval()  # frozen by its owner
    modes = [module.training for module in task.model.modules()]
    result = pg.prune(task, "policy:resnet-cifar", HALF)
    assert [module.training for module in task.model.modules()] == modes
    assert not result.model.training


def test_a_method_of_the_users_own_needs_only_prune() -> None:
    class Taylor:
        name = "mine"

        def prune(self, problem: Problem) -> Result:
            return Result(mask=problem.project(problem.statistics["taylor"]))

    task = digits_task()
    assert pg.prune(task, Taylor(), HALF).report["method"] == "mine"

    class Greedy(Taylor):
        def prune(self, problem: Problem) -> Result:
            return Result(mask=problem.graph.dense_mask())

    with pytest.raises(ConfigError, match=r"mine.*over the budget"):
        pg.prune(task, Greedy(), HALF)
