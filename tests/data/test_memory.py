import torch

from prunegraph.data.memory import MemorySource, normalise, shift_and_flip


def source(**changes: object) -> MemorySource:
    images = torch.arange(4 * 3 * 6 * 5, dtype=torch.int64).remainder(251).to(torch.uint8)
    options: dict[str, object] = {
        "num_classes": 2,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.5, 0.6, 0.7),
        "padding": 1,
        "flip": True,
    }
    return MemorySource(
        images.view(4, 3, 6, 5), torch.tensor([0, 1, 0, 1]), **{**options, **changes}
    )


def test_load_normalises_the_images_asked_for() -> None:
    data = source()
    loaded = data.load(torch.tensor([2, 0]))[0]
    by_hand = (data.images[2, 1].double() / 255 - 0.2) / 0.6
    assert loaded.shape == (2, 3, 6, 5)
    assert loaded.dtype == torch.float32
    assert torch.allclose(loaded[0, 1].double(), by_hand, atol=1e-6)
    assert torch.equal(loaded[1], data.load(torch.tensor([0]))[0][0])


def test_loading_leaves_the_stored_pixels_alone() -> None:
    data = source()
    before = data.images.clone()
    data.load(torch.arange(4), torch.Generator().manual_seed(0))[0].zero_()
    assert torch.equal(before, data.images)


def test_every_augmented_image_is_a_shifted_and_flipped_original() -> None:
    images = source().images
    batch = images[:1].expand(200, -1, -1, -1)
    result = shift_and_flip(batch, 1, flip=True, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], (1, 1, 1, 1))
    candidates = [padded[:, y : y + 6, x : x + 5] for y in range(3) for x in range(3)]
    candidates += [candidate.flip(2) for candidate in candidates]
    hits = [sum(torch.equal(image, candidate) for image in result) for candidate in candidates]
    assert sum(hits) == 200
    assert min(hits) >= 2  # 18 cases, 11 expected each


def test_without_flip_no_image_is_flipped() -> None:
    images = source().images
    batch = images[:1].expand(64, -1, -1, -1)
    result = shift_and_flip(batch, 0, flip=False, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result, batch)
    flipped = shift_and_flip(batch, 0, flip=True, generator=torch.Generator().manual_seed(0))
    assert 10 < sum(not torch.equal(image, images[0]) for image in flipped) < 54


def test_augmentation_is_drawn_from_the_given_generator_only() -> None:
    data, index = source(), torch.arange(4).repeat(8)
    state = torch.get_rng_state()
    first = data.load(index, torch.Generator().manual_seed(1))[0]
    assert torch.equal(first, data.load(index, torch.Generator().manual_seed(1))[0])
    assert not torch.equal(first, data.load(index, torch.Generator().manual_seed(2))[0])
    assert torch.equal(state, torch.get_rng_state())


def test_fingerprint_names_pixels_labels_and_normalisation() -> None:
    first, pixel, label = source(), source(), source()
    assert first.fingerprint() == source().fingerprint()
    pixel.images[3, 2, 5, 4] += 1
    label.labels[0] = 1
    others = [pixel, label, source(mean=(0.1, 0.2, 0.4)), source(std=(0.5, 0.6, 0.8))]
    assert first.fingerprint() not in [other.fingerprint() for other in others]
    assert len(first.fingerprint()) == 16


def test_normalise_maps_mean_to_zero_and_one_std_to_one() -> None:
    images = torch.tensor([51, 102], dtype=torch.uint8).view(1, 1, 1, 2)
    assert torch.allclose(normalise(images, (0.2,), (0.2,)).flatten(), torch.tensor([0.0, 1.0]))
