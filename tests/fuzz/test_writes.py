"""Writes to parameters in any order, and threads that serve while weights change: outputs are those of the factors."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from cases import ONE, switch_on
from torch import nn
from writes import WRITES

from structlin.layers.linear import build
from structlin.testing import assert_close


@pytest.fixture(params=["off", "on"], autouse=True)
def kernel(request, monkeypatch):
    if request.param == "on":
        switch_on(monkeypatch)


def assert_right(layer, x):
    assert_close(layer(x), F.linear(x, layer.to_dense(), layer.bias), "forward", 1e-4)


def test_writes_in_any_order(attack):
    """Each round writes a few times, in any way, between calls of any kind."""
    for _ in attack.rounds(40, 2000):
        random = attack.random
        name = random.choice([*ONE])
        layer = build(ONE[name], 16, 20).train(random.random() < 0.5)
        print(name, layer.training)
        for write in random.choices([*WRITES], k=random.randint(1, 4)):
            x = torch.randn(random.choice((1, 2, 32, 300)), 16)
            with torch.inference_mode() if random.random() < 0.2 else torch.set_grad_enabled(random.random() < 0.5):
                layer(x)
            print(write)
            with torch.no_grad():
                WRITES[write](layer)
                for parameter in layer.parameters():  # many writes in a row may leave the range
                    parameter.data.clamp_(-3, 3)
                assert_right(layer, x)
            attack.count("writes")


def test_threads_that_serve_while_weights_change(attack):
    """Once all is quiet a layer computes by the weights as they are; no thread ever fails."""
    for _ in attack.rounds(3, 500):
        name = attack.random.choice([*ONE])
        layer, stop, calls, errors = build(ONE[name], 16, 20).eval(), threading.Event(), [], []

        def serve(layer=layer, stop=stop, calls=calls, errors=errors):
            try:
                with torch.no_grad():
                    while not stop.is_set():
                        calls.append(layer(torch.randn(8, 16)).shape)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=serve) for _ in range(3)]
        for thread in threads:
            thread.start()
        with torch.no_grad():
            while len(calls) < 100 and not errors:
                for parameter in layer.parameters():
                    parameter.mul_(1.001)
        stop.set()
        for thread in threads:
            thread.join()
        assert not errors
        with torch.no_grad():
            assert_right(layer, torch.randn(8, 16))
        attack.count("races")


def test_many_threads_compute_what_one_does(attack):
    """Threads through one model, of all structures, at several numbers of rows."""
    for _ in attack.rounds(1, 50):
        model = nn.Sequential(*(build(structure, 16, 16) for structure in ONE.values())).eval()
        inputs = [torch.randn(rows, 16) for rows in (1, 5, 40)]
        with torch.no_grad():
            expected = [model(x) for x in inputs]
        wrong = []

        def call(model=model, inputs=inputs, expected=expected, wrong=wrong):
            with torch.no_grad():
                for _ in range(3):
                    wrong.extend(not torch.equal(model(x), y) for x, y in zip(inputs, expected, strict=True))

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wrong) == 6 * 3 * len(inputs)
        assert not any(wrong)
        attack.count("threads", 6)
