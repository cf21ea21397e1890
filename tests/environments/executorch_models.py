"""Structured layers in ExecuTorch, lowered to XNNPACK with a dynamic batch, and whole models by transformers.

    bash tests/environments/executorch_models.sh

Not in the default run: ExecuTorch is a package of its own.
"""

from __future__ import annotations

import pytest
import torch
from cases import ONE
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.exporters import ExecutorchConfig, ExecutorchExporter

import structlin
from structlin.layers.linear import build

TOLERANCE = 1e-4
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}


def run(buffer, *inputs):
    return Runtime.get().load_program(buffer).load_method("forward").execute(inputs)


@pytest.mark.parametrize("name", sorted(ONE))
def test_executorch(name):
    torch.manual_seed(0)
    model = nn.Sequential(build(ONE[name], 16, 20), nn.GELU(), build(ONE[name], 20, 16)).eval()
    rows = ({0: torch.export.Dim("rows", min=2, max=64)},)
    exported = torch.export.export(model, (torch.randn(17, 16),), dynamic_shapes=rows)
    # XNNPACK fails to load the transpositions of trains of three cores: those run by ExecuTorch's own kernels.
    partitioner = [] if name == "tt" else [XnnpackPartitioner()]
    program = to_edge_transform_and_lower(exported, partitioner=partitioner).to_executorch()
    x = torch.randn(5, 16)
    with torch.no_grad():
        torch.testing.assert_close(run(program.buffer, x)[0], model(x), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("structure", ["lowrank", "tt"])
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_whole_models(kind, structure):
    torch.manual_seed(0)
    config = BertConfig(**SIZES) if kind == "Bert" else LlamaConfig(**SIZES)
    model = (BertModel if kind == "Bert" else LlamaForCausalLM)(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    structlin.compress_model(model, structure, ratio=0.7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exported = ExecutorchExporter().export(model, inputs, ExecutorchConfig())
    with torch.no_grad():
        expected = model(**inputs)[0]
    found = run(exported.program.buffer, *inputs.values())
    torch.testing.assert_close(found[0], expected, atol=TOLERANCE, rtol=0)
