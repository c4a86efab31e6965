"""Tasks for tests: images, a toy language model, a segmentation whose score is an error."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import prunegraph as pg
from prunegraph.core.splits import SearchSplit, TrainSplit
from prunegraph.tasks.custom import CustomTask
from prunegraph.tasks.image_classification import ImageClassification

VOCABULARY, LENGTH = 12, 10


def image_task(
    model: nn.Module, train: TrainSplit, search: SearchSplit | None = None
) -> ImageClassification:
    """Return the task of a classifier; without other images train images are searched on."""
    images, _ = next(iter(train.batches(1)))
    search = search or SearchSplit(train.source, train.index)
    return ImageClassification(model=model, example_inputs=images, train=train, search=search)


class ToyLanguageModel(nn.Module):
    """One block of a transformer over twelve tokens, causal, with tied-free embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16)
        self.places = nn.Embedding(LENGTH, 16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.out = nn.Linear(16, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        x = self.tokens(input_ids) + self.places.weight[: input_ids.shape[1]]
        y = self.norms[0](x)
        q, k, v = (
            layer(y).unflatten(2, (-1, 8)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return {"logits": self.head(self.norms[2](x))}


def texts(count: int, seed: int) -> Tensor:
    """Return ``[count, LENGTH]`` sequences in which each token follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (count,), generator=generator)]
    for _ in range(LENGTH - 1):
        noise = torch.rand(count, generator=generator) < 0.1
        drawn = torch.randint(VOCABULARY, (count,), generator=generator)
        tokens.append(torch.where(noise, drawn, (5 * tokens[-1] + 3) % VOCABULARY))
    return torch.stack(tokens, dim=1)


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the next tokens."""
    logits = model(batch["input_ids"])["logits"][:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def language_task() -> CustomTask:
    """Return a trained toy language model; its score is a perplexity."""
    torch.manual_seed(0)
    model, held_out = ToyLanguageModel(), {"input_ids": texts(64, seed=1)}
    batches = [{"input_ids": part} for part in texts(256, seed=0).split(64)]
    _learn(model, lambda step: next_token_loss(model, batches[step % 4]), steps=120)
    return pg.tasks.custom(
        model,
        {"input_ids": batches[0]["input_ids"][:1]},
        train=batches,
        score=lambda network: next_token_loss(network, held_out).exp().item(),
        higher_is_better=False,
        loss=next_token_loss,
        score_name="perplexity",
        name="toy language model",
    )


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images ``[count, 3, 8, 8]`` and which of their pixels belong to a bright box."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=generator)
    masks = torch.zeros(count, 8, 8, dtype=torch.int64)
    for mask, (top, left) in zip(
        masks, torch.randint(5, (count, 2), generator=generator).tolist(), strict=True
    ):
        mask[top : top + 4, left : left + 4] = 1
    return images + 2.0 * masks[:, None], masks


def segmentation_task() -> CustomTask:
    """Return a trained network that marks pixels; its score is the share of wrong ones."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 2, 1),
    )  # fmt: skip
    images, masks = scenes(256, seed=0)
    batches = list(zip(images.split(64), masks.split(64), strict=True))
    unseen, wanted = scenes(64, seed=1)

    def loss(step: int) -> Tensor:
        own, marks = batches[step % 4]
        return F.cross_entropy(model(own), marks)

    _learn(model, loss, steps=60)
    return pg.tasks.custom(
        model,
        images[:1],
        train=batches,
        score=lambda network: (network(unseen).argmax(1) != wanted).float().mean().item(),
        higher_is_better=False,
        score_name="error",
    )


def _learn(model: nn.Module, loss: Callable[[int], Tensor], steps: int) -> None:
    """Train a network for a while and leave it in eval mode."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    model.zero_grad()
    model.eval()
