"""What both recipes on handwritten digits share: the data, the network, an epoch of training, the test accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]

TEST = 450  # of 1797 images
BATCH = 64


def digits() -> tuple[Data, Data]:
    """Split scikit-learn's digits, 8 x 8 pixels in 0..1, into the same training and test images on every run."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    return (images[TEST:], labels[TEST:]), (images[:TEST], labels[:TEST])


def mlp(width: int) -> nn.Sequential:
    """Build the dense network: 64 - width - width - width - 10; layers 2 and 4 are the large ones."""
    return nn.Sequential(
        nn.Linear(64, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def train(model: nn.Module, data: Data, epochs: int, learning_rate: float) -> None:
    """Train with AdamW and a cosine schedule."""
    images, labels = data
    steps = epochs * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Compute the share of images that are classified right."""
    images, labels = data
    return (model.eval()(images).argmax(-1) == labels).double().mean().item()


def parameters(model: nn.Module) -> int:
    """Count the learned parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
