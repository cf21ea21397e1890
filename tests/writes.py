"""Kinds of writes to the parameters of a layer, most of which PyTorch does not count: a layer must see each."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import vector_to_parameters


def learned(layer):
    return [p for p in layer.parameters() if p is not layer.bias]


def first(layer):
    return learned(layer)[0]


def step(optimizer, **options):
    def write(layer):
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer(layer.parameters(), lr=0.1, **options).step()
        layer.zero_grad()

    return write


def there_and_back(layer):
    layer.double()
    first(layer).data.mul_(2)
    layer.float()


def ema(layer):
    for parameter in layer.parameters():
        parameter.data.lerp_(torch.randn_like(parameter), 0.5)


def in_inference_mode(layer):
    with torch.inference_mode():
        first(layer).mul_(2)


def exchanged(layer):
    torch.utils.swap_tensors(first(layer), nn.Parameter(torch.randn_like(first(layer))))


def drawn(layer):
    return {name: torch.randn_like(value) for name, value in layer.state_dict().items()}


def replaced(layer):
    name = next(iter(dict(layer.named_parameters())))
    layer.register_parameter(name, nn.Parameter(torch.randn_like(getattr(layer, name))))


def toggled(layer):
    layer.requires_grad_(False)
    first(layer).data.mul_(2)
    layer.requires_grad_(True)


def several_storages(layer):
    for _ in range(3):  # storages come and go, at the same addresses
        first(layer).data = torch.randn_like(first(layer))


def strided(layer):
    value = torch.randn_like(first(layer))
    first(layer).data = torch.stack([value, value], -1)[..., 0]


def flat_buffer(layer):
    flat = torch.randn(sum(parameter.numel() for parameter in layer.parameters()))
    start = 0
    for parameter in layer.parameters():
        parameter.data = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    layer(torch.randn(3, layer.in_features))
    flat.mul_(2)


def shared_memory(layer):
    layer.share_memory()
    layer(torch.randn(3, layer.in_features))
    first(layer).data.mul_(2)


def storage(layer):
    whole = first(layer).untyped_storage()  # others may lie in it, too
    whole.copy_(torch.randn(whole.nbytes() // 4).untyped_storage())


WRITES = {
    "mul_": lambda layer: first(layer).mul_(2),
    "copy_": lambda layer: first(layer).copy_(torch.randn_like(first(layer))),
    "index": lambda layer: first(layer).__setitem__(0, 3.0),
    "out=": lambda layer: torch.mul(first(layer), 2, out=first(layer)),
    "bias": lambda layer: layer.bias.add_(1),
    "data.mul_": lambda layer: first(layer).data.mul_(2),
    "detach().mul_": lambda layer: first(layer).detach().mul_(2),
    "data.copy_": lambda layer: first(layer).data.copy_(torch.randn_like(first(layer))),
    "data[0] =": lambda layer: first(layer).data.__setitem__(0, 3.0),
    "data.zero_": lambda layer: first(layer).data.zero_(),
    "foreach on data": lambda layer: torch._foreach_mul_([p.data for p in learned(layer)], 2.0),
    "flat buffer": flat_buffer,
    "shared memory": shared_memory,
    "data =": several_storages,
    "data = strided": strided,
    "EMA": ema,
    "foreach": lambda layer: torch._foreach_mul_(learned(layer), 2.0),
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD foreach": step(torch.optim.SGD, foreach=True),
    "SGD fused": step(torch.optim.SGD, fused=True),
    "Adam fused": step(torch.optim.Adam, fused=True),
    "AdamW fused": step(torch.optim.AdamW, fused=True),
    "AdamW foreach": step(torch.optim.AdamW, foreach=True),
    "numpy": lambda layer: first(layer).detach().numpy().__imul__(2),
    "dlpack": lambda layer: torch.from_dlpack(first(layer).detach()).mul_(2),
    "storage": storage,
    "set_": lambda layer: first(layer).set_(torch.randn_like(first(layer))),
    "swap_tensors": exchanged,
    "load_state_dict": lambda layer: layer.load_state_dict(drawn(layer)),
    "load_state_dict assign": lambda layer: layer.load_state_dict(drawn(layer), assign=True),
    "vector_to_parameters": lambda layer: vector_to_parameters(
        torch.randn(sum(parameter.numel() for parameter in layer.parameters())), layer.parameters()
    ),
    "inference mode": in_inference_mode,
    "register_parameter": replaced,
    "requires_grad": toggled,
    "init": lambda layer: nn.init.normal_(first(layer), std=2.0),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "double and back": there_and_back,
}
