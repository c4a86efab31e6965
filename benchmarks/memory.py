"""How much memory ``pg.prune`` takes, and that it does not grow with the number of images.

A child process for each number of images prunes an EfficientNet-Lite0 (``timm``, random weights) at
224 x 224 by the policy that comes with the package. A loader makes the images, batch by batch. The
child prints its peak of resident memory; the command fails above the limit.

    python benchmarks/memory.py [--images 125 500] [--limit 2.5]
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import timm
import torch
from torch import Tensor

import prunegraph as pg

SIDE, BATCH_SIZE, CLASSES = 224, 50, 1000


def loader(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Make images and labels as a data loader reads them: none is held here."""
    generator = torch.Generator().manual_seed(0)
    for first in range(0, count, BATCH_SIZE):
        size = min(BATCH_SIZE, count - first)
        images = torch.randn(size, 3, SIDE, SIDE, generator=generator)
        yield images, torch.randint(CLASSES, (size,), generator=generator)


def prune(num_images: int) -> None:
    """Prune, and print the peak in GB and the seconds."""
    torch.manual_seed(0)
    network = timm.create_model("efficientnet_lite0", pretrained=False).eval()
    start = time.perf_counter()
    task = pg.tasks.image_classification(
        network,
        train=loader(2 * num_images),
        example_inputs=torch.randn(1, 3, SIDE, SIDE),
        num_images=num_images,
    )
    pg.prune(task, "policy:resnet-cifar", pg.Budget(keep_macs=0.5))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(f"{peak:.2f} {time.perf_counter() - start:.0f}")


def main() -> None:
    """Measure, and print a line for each number of images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[125, 500])
    parser.add_argument("--limit", type=float, default=2.5, help="GB that no child may exceed")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        prune(options.child)
        return
    peaks = []
    for num_images in options.images:
        command = [sys.executable, __file__, "--child", str(num_images)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peak, seconds = answer.split()
        peaks.append(float(peak))
        print(f"2 x {num_images} images: {peak} GB at most, {seconds} s", flush=True)
    if max(peaks) > options.limit:
        sys.exit(f"more than {options.limit} GB")


if __name__ == "__main__":
    main()
