"""`structlin.hf`: transformers saves, loads, trains and pushes compressed models by its own functions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import structlin

transformers = pytest.importorskip("transformers")

import structlin.hf  # noqa: E402 (needs transformers)

IDS = torch.arange(3, 17).reshape(2, 7)
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
LLAMA = BERT | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert():
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()


def llama(**fields):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | fields)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("structure", ["lowrank", "kronecker"])
def test_a_saved_model_is_loaded_bit_for_bit(make, structure, tmp_path):
    model = make()
    structlin.compress_model(model, structure, ratio=0.5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    kinds = [type(module) for module in model.modules()]
    assert [type(module) for module in loaded.modules()] == kinds


def test_a_process_without_the_plug_in_fails_and_one_with_it_does_not(tmp_path):
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    model.save_pretrained(tmp_path)
    load = f"from transformers import AutoModelForCausalLM as Auto; model = Auto.from_pretrained({str(tmp_path)!r})"

    def run(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    without = run(load)
    assert without.returncode == 1
    assert "ignore_mismatched_sizes" in without.stderr
    show = "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    assert run(f"import structlin.hf; {load}; {show}").stdout.strip() == "LowRankLinear"
