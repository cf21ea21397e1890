"""Structured layers in other runtimes: exported with a dynamic batch, they compute what they compute here.

    bash tests/environments/exports.sh

Not in the default run: the runtimes (ONNX Runtime, OpenVINO) are packages of their own, and AOTInductor compiles half
a minute for each structure.
"""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import openvino
import pytest
import torch
from cases import ONE
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import structlin
from structlin.layers.linear import build

TOLERANCE = 1e-4
ROWS = ({0: torch.export.Dim("rows", min=1, max=4096)},)


def model_of(name):
    torch.manual_seed(0)
    return nn.Sequential(build(ONE[name], 16, 20), nn.GELU(), build(ONE[name], 20, 16)).eval()


@pytest.fixture(params=sorted(ONE))
def case(request):
    """A model, what it was exported with, an input with another number of rows, and the output."""
    model, x = model_of(request.param), torch.randn(17, 16)
    with torch.no_grad():
        return model, torch.randn(5, 16), x, model(x)


def exported(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=ROWS)


def test_export(case):
    model, example, x, y = case
    assert torch.allclose(exported(model, example).module()(x), y, atol=TOLERANCE)


def test_onnx_runtime(case, tmp_path):
    model, example, x, y = case
    torch.onnx.export(model, (example,), dynamic_shapes=ROWS, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(found - y.numpy()).max() <= TOLERANCE


def test_openvino(case):
    model, example, x, y = case
    converted = openvino.convert_model(exported(model, example), example_input=example)
    # By default it computes in bfloat16 where the processor has it.
    found = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]
    assert np.abs(found - y.numpy()).max() <= TOLERANCE


def test_aot_inductor(case, tmp_path):
    model, example, x, y = case
    package = torch._inductor.aoti_compile_and_package(
        exported(model, example), package_path=str(tmp_path / "model.pt2")
    )
    assert torch.allclose(torch._inductor.aoti_load_package(package)(x), y, atol=TOLERANCE)


# Whole models, by the exporters of transformers ----------------------------------------------------------------------


def bert():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertModel(config).eval()


def llama():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("structure", ["lowrank", "tt"])
@pytest.mark.parametrize("make", [bert, llama])
def test_whole_models_in_onnx_runtime(make, structure, tmp_path):
    from transformers.exporters import OnnxConfig, OnnxExporter

    model, ids = make(), torch.arange(12).reshape(2, 6)
    structlin.compress_model(model, structure, ratio=0.7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    onnx_ir.save(OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True)).program, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    longer = torch.arange(21).reshape(3, 7)
    given = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    found = session.run(None, {entry.name: given[entry.name].numpy() for entry in session.get_inputs()})
    with torch.no_grad():
        expected = model(**given)[0]
    assert np.abs(found[0] - expected.numpy()).max() <= TOLERANCE
