"""Masks in training: zeros hold, weights come back as they were, runs resume to the bit."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ArtefactError, ConfigError, MaskError
from prunegraph.core.splits import Dataset
from prunegraph.core.weight_mask import WeightMask
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.masked import MaskedWeights, MaskPlan, dense_mask, least_mask
from prunegraph.training.schedules import Cubic

OPTIMIZERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, weight_decay=0.1),
]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def random_mask(model: nn.Module, seed: int, share: float = 0.4) -> WeightMask:
    torch.manual_seed(seed)
    keep = dense_mask(model).keep
    return WeightMask({name: torch.rand(bits.shape) < share for name, bits in keep.items()})


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator), torch.randint(0, 3, (16,), generator=generator)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = batch_of(seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_zeros_hold_after_every_step_even_with_momentum_from_before(make) -> None:  # type: ignore[no-untyped-def]
    model = make_net()
    optimizer = make(model.parameters())
    for seed in range(3):
        step(model, optimizer, seed)  # dense: averages of all weights
    mask = random_mask(model, 1)
    plain, other = copy.deepcopy(model), make_net()
    other_optimizer = make(other.parameters())
    other.load_state_dict(plain.state_dict())
    other_optimizer.load_state_dict(optimizer.state_dict())
    masked = MaskedWeights(model, optimizer, mask)
    mask.put_zeros(other)
    before = model[0].weight.detach().clone()
    for seed in range(3, 8):
        step(model, optimizer, seed)
        step(other, other_optimizer, seed)
        mask.check_zeros(model)
    assert not torch.equal(before, model[0].weight)
    with pytest.raises(MaskError):  # without the mechanism the optimizer moves them
        mask.check_zeros(other)
    masked.finish()
    step(model, optimizer, 9)
    with pytest.raises(MaskError):
        mask.check_zeros(model)


def averages(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    """Return what an optimizer remembers of each weight."""
    return [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.dim() > 0]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_closure_trains_as_a_loop_does(make, decay: float | None, by_name: bool) -> None:  # type: ignore[no-untyped-def]
    def train(closures: bool) -> tuple[nn.Module, MaskedWeights]:
        model = make_net()
        optimizer = make(model.parameters())
        mask = random_mask(model, 1)
        masked = MaskedWeights(model, optimizer, mask, decay=decay)
        for seed in range(4):
            x, y = batch_of(seed)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            if not closures:
                closure()
                optimizer.step()
            elif by_name:
                optimizer.step(closure=closure)
            else:
                optimizer.step(closure)
        for name, keep in mask.keep.items():
            assert not any(v[~keep].any() for v in averages(optimizer, model.get_parameter(name)))
        return model, masked

    model, masked = train(closures=True)
    other, own = train(closures=False)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    if decay is not None:
        for name, rms in own.rms("").items():
            assert rms[~own.mask.keep[name]].any()
            assert torch.equal(rms, masked.rms("")[name])


def test_lbfgs_holds_zeros_in_all_its_trials() -> None:
    model = make_net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
    masked = MaskedWeights(model, optimizer, random_mask(model, 1))
    x, y = batch_of(0)

    def closure() -> Tensor:
        masked.mask.check_zeros(model)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure).detach()
    for _ in range(3):
        optimizer.step(closure)
    masked.mask.check_zeros(model)
    assert closure() < 0.8 * first


def test_gradients_of_removed_weights_are_no_part_of_a_norm() -> None:
    model = make_net()
    optimizer = OPTIMIZERS[0](model.parameters())
    masked = MaskedWeights(model, optimizer, random_mask(model, 1))
    x, y = batch_of(0)
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(model(x), y).backward()  # two batches whose gradients are added up
    for name, parameter in masked.mask.parameters_of(model).items():
        assert parameter.grad is not None
        assert not parameter.grad[~masked.mask.keep[name]].any()
        assert parameter.grad[masked.mask.keep[name]].any()
    masked.finish()
    F.cross_entropy(model(x), y).backward()
    assert model[2].weight.grad.all()


def test_sparse_gradients_are_cleared_too() -> None:
    model = nn.Embedding(6, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
    keep = torch.arange(24).reshape(6, 4) % 3 > 0
    masked = MaskedWeights(model, optimizer, WeightMask({"weight": keep}))
    before = model.weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([1, 2, 2])).sum().backward()
        optimizer.step()
    masked.mask.check_zeros(model)
    assert not optimizer.state[model.weight]["exp_avg"][~keep].any()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_weights_outside_a_groups_mask_keep_their_values(make) -> None:  # type: ignore[no-untyped-def]
    model = make_net()
    optimizer = make(model.parameters())
    masks = {"a": random_mask(model, 1), "b": random_mask(model, 2)}
    masked = MaskedWeights(model, optimizer, masks)
    for number in range(12):
        group = "ab"[number % 3 > 0]
        masked.use(group)
        before = masked.values()
        step(model, optimizer, number)
        masks[group].check_zeros(model)
        for name, value in masked.values().items():
            kept = masks[group].keep[name]
            assert torch.equal(value[~kept], before[name][~kept])
            assert not torch.equal(value[kept], before[name][kept])
    values = masked.values()
    masked.finish()
    for name, value in values.items():
        anywhere = masks["a"].keep[name] | masks["b"].keep[name]
        assert torch.equal(model.get_parameter(name), value * anywhere)
    with pytest.raises(MaskError, match="no mask for batches of 'c'"):
        masked.use("c")


def test_masks_shrink_unless_weights_may_come_back() -> None:
    model = make_net()
    optimizer = OPTIMIZERS[0](model.parameters())
    first = model[0].weight.detach().clone()
    nested = MaskedWeights(model, optimizer)
    masks = [nested.mask]
    for number, sparsity in enumerate((0.3, 0.6, 0.9)):
        nested.select(sparsity)
        step(model, optimizer, number)
        masks.append(nested.mask)
        assert masks[-1].nested(masks[-2])
        assert masks[-1].size - masks[-1].num_kept == round(sparsity * masks[-1].size)
    with pytest.raises(MaskError, match="returns=True"):
        nested.replace(masks[0])
    nested.finish()

    model = make_net()
    returning = MaskedWeights(model, OPTIMIZERS[0](model.parameters()), returns=True)
    returning.select(0.8)
    assert not torch.equal(model[0].weight, first)
    returning.select(0.0)
    assert torch.equal(model[0].weight, first)


def test_least_mask_is_exact_and_global() -> None:
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 9.0]]), "b": torch.tensor([8.0, 0.5])}
    mask = least_mask(scores, 0.5)
    assert mask.keep["a"].tolist() == [[True, False], [False, True]]
    assert mask.keep["b"].tolist() == [True, False]
    inside = WeightMask({"a": torch.ones(2, 2, dtype=torch.bool), "b": torch.tensor([False, True])})
    within = least_mask(scores, 0.5, inside)
    assert within.nested(inside)
    assert within.num_kept == 3


def test_scores_may_be_negative_and_weights_that_are_gone_stay_so() -> None:
    inside = WeightMask({"a": torch.tensor([True, True, True, False])})
    mask = least_mask({"a": torch.tensor([-9.0, -2.0, -3.0, 5.0])}, 0.5, inside)
    assert mask.keep["a"].tolist() == [False, True, True, False]


@pytest.mark.parametrize("returns", [False, True])
def test_a_choice_that_cannot_be_is_told_in_one_line(returns: bool) -> None:
    model = make_net()
    masked = MaskedWeights(model, OPTIMIZERS[0](model.parameters()), returns=returns)
    scores = {name: torch.rand(bits.shape) for name, bits in masked.mask.keep.items()}
    for sparsity in (1.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=rf"a sparsity of {sparsity} must lie in \[0, 1\)"):
            masked.select(sparsity)
    for wrong in (scores | {"0.weight": torch.rand(3, 3)}, {"0.weight": scores["0.weight"]}):
        with pytest.raises(MaskError, match="different networks"):
            masked.select(0.5, wrong)
    with pytest.raises(MaskError, match="different networks"):
        masked.replace(WeightMask({"0.weight": masked.mask.keep["0.weight"]}))
    unknown = "no mask for batches of 'de'; there are: one of all"
    with pytest.raises(MaskError, match=unknown):
        masked.select(0.5, group="de")
    with pytest.raises(MaskError, match=unknown):
        masked.replace(masked.mask, "de")
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(MaskError, match=r"weights or scores of 2\.weight hold NaN: lower"):
        masked.select(0.5)
    assert masked.mask.sparsity == 0.0


def group_of(batch: tuple[Tensor, Tensor]) -> str:
    return "odd" if int(batch[1][0]) % 2 else "even"


def plans(model: nn.Module) -> dict[str, MaskPlan]:
    pair = {"even": random_mask(model, 1), "odd": random_mask(model, 2)}
    return {
        "fixed": MaskPlan(masks=random_mask(model, 1)),
        "nested": MaskPlan(schedule=Cubic(0.8, end=12), every=2),
        "reselected": MaskPlan(schedule=Cubic(0.8, end=12), every=2, reselect=True, until=15),
        "groups": MaskPlan(masks=pair, group_of=group_of),
        "groups, reselected": MaskPlan(
            masks=pair, group_of=group_of, schedule=Cubic(0.7, initial=0.7), reselect=True
        ),
    }


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["fixed", "nested", "reselected", "groups", "groups, reselected"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_loop_resumes_to_the_bit(
    name: str, optimizer: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunegraph.training.loop.CHECKPOINT_SECONDS", 0.0)
    train = digits.train.take(torch.arange(320))
    config = FinetuneConfig(
        epochs=2, batch_size=32, peak_lr=0.01, optimizer=optimizer, autocast=False
    )

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def run(model: nn.Module, **given):  # type: ignore[no-untyped-def]
        plan = plans(fresh())[name]
        return finetune(model, training_task(model, train), config, seed=0, masks=plan, **given)

    whole = fresh()
    result = run(whole)
    if len(result.masks) == 1:
        result.masks[""].check_zeros(whole)
        assert 0.5 < result.masks[""].sparsity < 0.9

    def kill(done: float, loss: float) -> None:
        del loss
        if done >= 1.3:
            raise Stop

    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        run(fresh(), checkpoint=path, watch=kill)
    resumed = fresh()
    again = run(resumed, checkpoint=path)
    assert again.resumed_epochs == 1
    assert again.masks == result.masks
    for name_, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name_])
    other = MaskPlan(masks=random_mask(fresh(), 7))
    with pytest.raises(ArtefactError, match="masks"):
        finetune(
            fresh(), training_task(fresh(), train), config, seed=0, masks=other, checkpoint=path
        )


def test_damaged_masks_are_refused() -> None:
    model = make_net()
    masked = MaskedWeights(model, OPTIMIZERS[0](model.parameters()), returns=True)
    tensors = masked.tensors()
    for broken in (
        {n: t for n, t in tensors.items() if n != "0.0.weight"},
        tensors | {"group": torch.tensor(7)},
        tensors | {"0.2.weight": torch.zeros(1, dtype=torch.uint8)},
        tensors | {"values.0.weight": torch.zeros(3)},
    ):
        with pytest.raises(ArtefactError, match="is damaged: delete it"):
            masked.restore(broken)
    nested = MaskedWeights(model, OPTIMIZERS[0](model.parameters()))
    mask = nested.mask
    several = MaskedWeights(model, OPTIMIZERS[0](model.parameters()), {"a": mask, "b": mask})
    for one, other in ((nested, masked), (masked, nested), (masked, several)):
        with pytest.raises(ArtefactError, match="is damaged: delete it"):
            one.restore(other.tensors())


def test_plans_that_contradict_themselves_are_refused(digits: Dataset) -> None:
    model = make_net()
    mask = random_mask(model, 1)
    for make in (
        lambda: MaskPlan(masks={"a": mask, "b": mask}),
        lambda: MaskPlan(masks=mask, group_of=group_of),
        lambda: MaskPlan(masks=mask, every=0),
        lambda: MaskPlan(masks=mask, reselect=True),
    ):
        with pytest.raises(ConfigError):
            make()
    recipe = FinetuneConfig(epochs=1, peak_lr=0.1)
    for wrong in (mask, Cubic(0.5, end=3)):
        with pytest.raises(ConfigError, match=r"give MaskPlan\(masks=\.\.\.\)"):
            finetune(model, training_task(model, digits.train), recipe, seed=0, masks=wrong)  # type: ignore[arg-type]
    optimizer = OPTIMIZERS[0](make_net().parameters())
    with pytest.raises(ConfigError, match=r"0\.weight is masked, but no given optimizer trains it"):
        MaskedWeights(model, optimizer, mask)
    for odd, kind in (([mask], "list"), ({}, "dict"), ({"a": 1}, "dict")):
        with pytest.raises(MaskError, match=f"masks is a {kind}: give a WeightMask"):
            MaskedWeights(model, OPTIMIZERS[0](model.parameters()), odd)  # type: ignore[arg-type]
    other = WeightMask({"0.weight": mask.keep["0.weight"]})
    with pytest.raises(MaskError, match="different networks"):
        MaskedWeights(model, OPTIMIZERS[0](model.parameters()), {"a": mask, "b": other})
