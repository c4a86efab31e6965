import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, MaskError, ModelError
from prunegraph.core.pattern import Pattern
from prunegraph.core.weight_mask import WeightMask

SHAPES = {"0.weight": (5, 3), "2.weight": (2, 5)}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def draw(seed: int = 0, share: float = 0.5) -> WeightMask:
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(shape, generator=generator) < share for name, shape in SHAPES.items()}
    return WeightMask(keep)


def test_shares_are_counted() -> None:
    keep = {"b": torch.tensor([True, True, False, False]), "a": torch.ones(2, 3, dtype=torch.bool)}
    mask = WeightMask(keep)
    assert (mask.size, mask.num_kept) == (10, 8)
    assert (mask.density, mask.sparsity) == (0.8, 0.2)
    assert mask.densities == {"a": 1.0, "b": 0.5}
    assert list(mask.keep) == ["a", "b"]


def test_a_copy_gets_the_zeros_and_the_network_stays_bit_equal() -> None:
    model, mask = network(), draw()
    before = copy.deepcopy(model.state_dict())
    masked = mask.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in masked.state_dict().items():
        expected = before[name].clone()
        if name in mask.keep:
            expected[~mask.keep[name]] = 0.0
        assert torch.equal(value, expected), name
    mask.check_zeros(masked)
    with pytest.raises(MaskError, match=r"0\.weight holds \d+ weights that are not zero"):
        mask.check_zeros(model)
    mask.put_zeros(model)
    assert torch.equal(model[0].weight, masked[0].weight)


def test_zeros_are_written_over_nan_and_into_tied_weights() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    model["first"].weight.data[0, 0] = torch.nan
    mask = WeightMask({"second.weight": torch.tensor([[False, True], [True, True]])})
    masked = mask.apply(model)
    assert masked["first"].weight is masked["second"].weight
    assert masked["first"].weight[0, 0] == 0.0


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"1.bias": torch.ones(4, dtype=torch.bool)}, r"1\.bias has shape \(5,\), its mask \(4,\)"),
        ({"3.weight": torch.ones(5, 3, dtype=torch.bool)}, r"has no parameter 3\.weight"),
        ({"1.running_mean": torch.ones(5, dtype=torch.bool)}, "has no parameter 1.running_mean"),
    ],
)
def test_a_mask_of_another_network_is_refused(keep: dict[str, Tensor], message: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    mask = WeightMask({"0.weight": torch.zeros(5, 3, dtype=torch.bool), **keep})
    for use in (mask.apply, mask.put_zeros, mask.check_zeros):
        with pytest.raises(MaskError, match=message) as caught:
            use(model)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_that_cannot_be_copied_is_named() -> None:
    model = network()
    model.kept = model(torch.ones(4, 3))
    with pytest.raises(ModelError, match="Sequential cannot be copied"):
        draw().apply(model)


@pytest.mark.parametrize("keep", [{}, {"a": torch.ones(3)}, {"a": torch.ones(0).bool()}, {"a": 1}])
def test_what_is_no_mask_is_refused(keep: dict[str, Tensor]) -> None:
    with pytest.raises(MaskError):
        WeightMask(keep)


def test_the_digest_names_bits_names_shapes_and_pattern() -> None:
    mask = draw()
    again = WeightMask(dict(reversed(mask.keep.items())))
    assert mask == again
    assert hash(mask) == hash(again)
    assert mask.digest() == again.digest() == draw().digest()
    first, second = mask.keep["0.weight"], mask.keep["2.weight"]
    flipped = first.clone()
    flipped[4, 2] = ~flipped[4, 2]
    others = [
        WeightMask({"0.weight": flipped, "2.weight": second}),
        WeightMask({"1.weight": first, "2.weight": second}),
        WeightMask({"0.weight": first.reshape(3, 5), "2.weight": second}),
        WeightMask({"0.weight": first}),
        WeightMask(mask.keep, Pattern.parse("columns")),
    ]
    assert len({mask.digest(), *(other.digest() for other in others)}) == 6
    assert mask not in others


def test_the_digest_stays_the_same_for_ever() -> None:
    bits = torch.tensor([[True, False, True], [False, False, True]])
    assert WeightMask({"fc.weight": bits}, Pattern.parse("1:3")).digest() == "8972861d2fcacb30"


def test_masks_travel_to_other_processes() -> None:
    mask = draw()
    assert pickle.loads(pickle.dumps(mask)) == mask


@given(st.integers(0, 2**32), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_nesting_and_overlap_follow_the_sets(seed: int, share: float, part: float) -> None:
    outer, other = draw(seed, share), draw(seed + 1, share)
    rest = draw(seed + 2, part)
    inner = WeightMask({name: bits & rest.keep[name] for name, bits in outer.keep.items()})
    assert inner.nested(outer)
    assert inner.nested(inner)
    assert inner.overlap(outer) == outer.overlap(inner) == 1.0
    assert outer.nested(inner) == (inner == outer)
    shared = sum(int((bits & other.keep[name]).sum()) for name, bits in outer.keep.items())
    smaller = min(outer.num_kept, other.num_kept)
    assert outer.overlap(other) == other.overlap(outer)
    assert outer.overlap(other) * smaller == pytest.approx(shared)
    assert outer.nested(other) == (shared == outer.num_kept)


def test_masks_of_different_networks_are_not_compared() -> None:
    other = WeightMask({"0.weight": torch.ones(3, 5, dtype=torch.bool)})
    for compare in (draw().nested, draw().overlap):
        with pytest.raises(MaskError, match="belong to different networks"):
            compare(other)


@given(st.integers(0, 2**32), st.sampled_from(["unstructured", "columns", "1:3"]))
def test_a_saved_mask_comes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, pattern: str
) -> None:
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask = WeightMask(draw(seed).keep, Pattern.parse(pattern))
    mask.save(path)
    loaded = WeightMask.load(path)
    assert loaded == mask
    assert loaded.digest() == mask.digest()
    assert all(bits.shape == SHAPES[name] for name, bits in loaded.keep.items())


def test_a_file_holds_one_bit_a_weight(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mask.safetensors"
    WeightMask({"w": torch.ones(1000, 1000, dtype=torch.bool)}).save(path)
    assert 125_000 < path.stat().st_size < 126_000
    bfloat = torch.ones(3, 5).bool().t()  # not contiguous
    WeightMask({"w": bfloat}).save(path)
    assert WeightMask.load(path).keep["w"].shape == (5, 3)


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


def shaped(**shape: object) -> Change:
    """Give the first weight another shape."""
    return lambda _, record: record["shapes"].update({"0.weight": shape["as_"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bits, _: bits["0.weight"].bitwise_xor_(128), "give digest"),
        (lambda bits, _: bits["2.weight"].bitwise_or_(1), "behind the 10 bits"),
        (lambda bits, _: bits.pop("0.weight"), "lacks its shape or its bits"),
        (lambda bits, _: bits.update(x=torch.zeros(1)), "lacks its shape or its bits"),
        (lambda bits, _: bits.update({"0.weight": torch.zeros(2)}), "bits of type torch.float32"),
        (lambda bits, _: bits.update({"0.weight": bits["0.weight"][:1]}), "do not hold 15 bits"),
        (lambda _, record: record.update(digest="0" * 16), "give digest"),
        (lambda _, record: record.update(pattern="2:4"), "give digest"),
        (lambda _, record: record.update(pattern="4:2"), "holds no weight mask"),
        (lambda _, record: record.update(schema=2), "has schema 2"),
        (lambda _, record: record.pop("shapes"), "shapes is missing"),
        (lambda _, record: record.update(shapes=[]), "where an object belongs"),
        (shaped(as_=[0, 3]), "has shape"),
        (shaped(as_=[-5, -3]), "has shape"),
        (shaped(as_=[1] * 9), "has shape"),
        (shaped(as_=[2**62, 2**62]), "do not hold"),
    ],
)
def test_a_changed_file_is_told_in_one_line(tmp_path: Path, change: Change, message: str) -> None:
    path = tmp_path / "mask.safetensors"
    draw().save(path)
    bits = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["weight_mask"])
    change(bits, record)
    safetensors.torch.save_file(bits, path, {"weight_mask": json.dumps(record)})
    with pytest.raises(ArtefactError, match=message) as caught:
        WeightMask.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mask.safetensors"
    with pytest.raises(ArtefactError, match="no file"):
        WeightMask.load(path)
    draw().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match="truncated"):
        WeightMask.load(path)


def test_bits_are_packed_for_other_files() -> None:
    mask, other = draw(), draw(1)
    assert other.unpacked(mask.packed()) == mask
    short = {name: bits[:-1] for name, bits in mask.packed().items()}
    with pytest.raises(ValueError, match="do not hold"):
        mask.unpacked(short)
