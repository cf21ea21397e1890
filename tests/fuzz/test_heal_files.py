"""Attacks on the file from which a healing resumes: damaged by accident, or forged with a checksum that is right."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structlin import LowRankLinear
from structlin.heal import heal

MARK = b"structlin heal sha256 "  # before the 64 digits at the end of a file


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(LowRankLinear(4, 4, rank=1), nn.Tanh(), nn.Linear(4, 2)), nn.Linear(4, 2)


class StopHereError(Exception):
    """The interruption."""


class Healing:
    """One kind of healing: the file of its first half, and the weights that it comes to without interruption."""

    def __init__(self, folder: Path, make: Callable[[Any], torch.optim.Optimizer], validated: bool) -> None:
        self.path, self.make, self.validated = folder / "heal", make, validated
        torch.manual_seed(1)
        with pytest.raises(StopHereError):
            self.run(stop=5)
        self.content = self.path.read_bytes()
        self.path.unlink()
        torch.manual_seed(1)
        self.run()
        self.end = state(self.student)

    def run(self, stop: int = 0) -> None:
        """Heal in 8 steps, or until the call of the loss that is to stop it."""
        self.student, teacher = models()
        self.before, self.generator = state(self.student), torch.get_rng_state()
        noise, calls = torch.Generator().manual_seed(7), []
        batches = [torch.randn(3, 4, generator=noise) for _ in range(3)]

        def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            self.optimizer = self.make(parameters)
            return self.optimizer

        def loss(ours: Tensor, theirs: Tensor, batch: Any) -> Tensor:
            calls.extend([0] * torch.is_grad_enabled())
            if stop and len(calls) == stop:
                raise StopHereError
            return (ours - theirs + 0.1 * torch.randn_like(theirs)).square().mean()  # generators count

        heal(
            self.student, teacher, batches, steps=8, every=2, optimizer=optimizer, loss=loss, checkpoint=self.path,
            validation=batches[:1] if self.validated else None, held_back=0, progress=False,
        )  # fmt: skip


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def healings(tmp_path):
    makes = [lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=1.0)]
    found = []
    for number, make in enumerate(makes):
        (tmp_path / str(number)).mkdir()
        found.append(Healing(tmp_path / str(number), make, validated=number == 1))
    return found


def forged(attack: Any, content: bytes) -> tuple[str, bytes]:
    """The file with another structure, and the checksum that belongs to it."""
    record = torch.load(io.BytesIO(content), weights_only=True)
    record["position"] = list(record["position"])
    places = [(record, key) for key in record if key not in ("about", "loss_before")]
    places += [(record[part], key) for part in ("student", "kept") for key in record[part]]
    places += [(record["position"], key) for key in range(5)]
    holder, key = attack.random.choice(places)
    empty = [None, "text", -1, torch.zeros(0), torch.zeros(5, dtype=torch.uint8), [torch.zeros(2)]]
    holder[key] = attack.random.choice(empty)
    if isinstance(holder, dict) and attack.random.random() < 0.3:
        del holder[key]
    record["position"] = tuple(record["position"]) if isinstance(record.get("position"), list) else None
    buffer = io.BytesIO()
    torch.save(record, buffer)
    body = buffer.getvalue()
    return "forged", body + MARK + hashlib.sha256(body).hexdigest().encode()


def damaged(attack: Any, content: bytes) -> tuple[str, bytes]:
    random, kind = attack.random, attack.random.choice(["flip", "flip", "cut", "zeros", "bytes", "joined", "end"])
    if random.random() < 0.2:
        return forged(attack, content)
    if random.random() < 0.05:
        return "whole", content
    place = random.randrange(len(content))
    if kind == "flip":
        return kind, content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
    if kind == "cut":
        return kind, content[:place]
    if kind == "zeros":
        return kind, content[:place] + bytes(len(content) - place)
    if kind == "bytes":
        new = random.randbytes(random.randint(1, 64))
        return kind, (content[:place] + new + content[place + len(new) :])[: len(content)]
    if kind == "joined":
        return kind, content[:place] + content[place // 2 :]
    return kind, content[: -random.randint(1, 85)]


def test_damaged_files_resume_exactly_or_change_nothing(attack, healings):
    for _ in attack.rounds(25, 1000):
        healing = attack.random.choice(healings)
        kind, content = damaged(attack, healing.content)
        healing.path.write_bytes(content)
        try:
            healing.run()
        except ValueError as error:
            assert "damaged, or not a checkpoint of this version of heal" in str(error)  # noqa: PT017
            assert content != healing.content
            assert equal(state(healing.student), healing.before), kind
            assert not healing.optimizer.state, kind
            assert torch.equal(torch.get_rng_state(), healing.generator), kind
            assert healing.path.read_bytes() == content
            attack.count(f"{kind} refused")
        else:
            assert equal(state(healing.student), healing.end), kind
            assert content == healing.content, f"{kind} was overlooked"
            attack.count(f"{kind} resumed")
