"""Models whose linear maps are not nn.Linear, compressed, saved and loaded by transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import structlin

transformers = pytest.importorskip("transformers")

import structlin.hf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers")
# Of a process without the plug-in; 5.0 raises the second where it converts weights.
REFUSALS = ("ignore_mismatched_sizes", "issues during automatic conversion of the weights")
IDS = torch.arange(1, 9)[None]
WITHOUT = """
import sys, torch, transformers
kind = getattr(transformers, sys.argv[1])
torch.save(kind.from_pretrained("dense").eval()(torch.arange(1, 9)[None]).logits, "logits")
print("loaded densely")
kind.from_pretrained("out")
"""


def gpt2():
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 1}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **special)).eval()


def mixtral():
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100, "num_local_experts": 4,
    }  # fmt: skip
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()


def generated(model):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)


CASES = [
    (gpt2, {}, 0.85),
    (gpt2, {"tied": "replace", "rules": {"transformer.wte": {"ratio": 0.5}}}, 0.95),
    (mixtral, {}, 0.9),
    (mixtral, {"exclude": ["self_attn.*"]}, 0.75),
    (mixtral, {"exclude": ["self_attn.*", "experts.down_proj"]}, 0.5),
]


@pytest.mark.parametrize(("make", "settings", "share"), CASES)
def test_a_model_is_the_same_after_a_save_and_load_and_fails_without_the_plug_in(make, settings, share, tmp_path):
    model = make()
    report = structlin.compress_model(model, "lowrank", ratio=0.5, **settings)
    assert report.coverage.compressed > share * report.coverage.total
    logits, tokens = model(IDS).logits, generated(model)
    model.save_pretrained(tmp_path / "out")
    for source in ("out", "again"):  # what was loaded can be saved again
        loaded = type(model).from_pretrained(tmp_path / source).eval()
        assert torch.equal(loaded(IDS).logits, logits)
        assert torch.equal(generated(loaded), tokens)
        loaded.save_pretrained(tmp_path / "again")
    dense = loaded.dequantize()
    torch.testing.assert_close(dense(IDS).logits, logits, atol=1e-5, rtol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    command = [sys.executable, "-c", WITHOUT, type(model).__name__]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "loaded densely" in found.stdout, found.stderr
    assert found.returncode == 1
    assert any(text in found.stderr for text in REFUSALS)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits, atol=1e-5, rtol=1e-4)


def test_structlin_reads_a_folder_where_names_are_converted(tmp_path, monkeypatch):
    for make in (gpt2, mixtral):
        model = make()
        report = structlin.compress_model(model, "lowrank", ratio=0.5)
        model.save_pretrained(tmp_path / make.__name__)
        loaded = structlin.load(make(), tmp_path / make.__name__)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        layers = structlin.verify(tmp_path / make.__name__).layers
        assert len(layers) == sum(row.structure is not None for row in report.layers)
    assert "model.layers.0.block_sparse_moe.gate.weight" in load_file(tmp_path / "mixtral" / "model.safetensors")
    monkeypatch.setattr("structlin.checkpoint.table.name_readers", [])
    with pytest.raises(structlin.CheckpointError, match=r"import structlin.hf|of the skeleton are not in"):
        structlin.load(mixtral(), tmp_path / "mixtral")


def test_structlin_says_where_tensors_are_converted(tmp_path):
    model = mixtral()
    structlin.compress_model(model, "lowrank", ratio=0.5, exclude=["experts.*"])
    model.save_pretrained(tmp_path)  # each expert by itself
    with pytest.raises(structlin.CheckpointError, match=r"mlp.experts.gate_up_proj.* of the skeleton are not in the"):
        structlin.load(mixtral(), tmp_path)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_equal_their_dense_twin_in_every_implementation(implementation, dtype):
    model = mixtral().to(dtype)
    structlin.compress_model(model, "lowrank", ratio=0.5, exclude=["self_attn.*"])
    found = model(IDS).logits
    twin = structlin.to_dense_(model)
    twin.set_experts_implementation(implementation)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    assert (twin(IDS).logits - found).norm() <= tolerance * found.norm()


@pytest.mark.parametrize("settings", [{}, {"allocation": "global"}, {"sequential": True}])
def test_experts_are_fitted_to_the_tokens_routed_to_them(settings):
    model = mixtral()
    data = [{"input_ids": torch.randint(0, 100, (4, 16))} for _ in range(6)]
    statistics = structlin.collect_statistics(model, data)
    counts = [statistics.tokens[f"model.layers.0.mlp.experts.gate_up[{k}]"] for k in range(4)]
    assert sum(counts) == 6 * 4 * 16 * 2  # two experts for each token
    report = structlin.compress_model(model, "lowrank", ratio=0.5, calibration=data, **settings)
    experts = [row for row in report.layers if "experts" in row.name]
    assert [row.count for row in experts] == [4] * 4
    assert all(row.output_error < 0.9 * row.error for row in experts)
    assert all(row.called for row in experts)


def test_an_expert_that_saw_no_token_is_fitted_to_the_inputs_of_all():
    from structlin.compress.data import Data
    from structlin.compress.statistics import Statistics

    seen = torch.diag(torch.tensor([4.0, 1.0]))
    data = Data(Statistics({"a[0]": seen, "a[1]": torch.zeros(2, 2)}, {"a[0]": 8, "a[1]": 0}), shrinkage=0.0)
    (busy, _), (starved, _) = data.expert_grams(["a[0]", "a[1]"])
    for found in (busy, starved):
        torch.testing.assert_close(found.matrix / found.matrix[1, 1], seen)


def test_routers_stay_dense():
    experts = mixtral().model.layers[0].mlp.experts
    block = torch.nn.ModuleDict({"gate": torch.nn.Linear(64, 4), "experts": experts, "other": torch.nn.Linear(64, 64)})
    report = structlin.compress_model(block, "lowrank", ratio=0.9, skip_last=False)
    reasons = {row.name: row.reason for row in report.layers}
    assert "it routes tokens to experts" in reasons.pop("gate")
    assert reasons == {"experts.gate_up": None, "experts.down": None, "other": None}


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_a_folder_of_structlin_save_has_its_config_and_loads_either_way(make, tmp_path):
    model, out = make(), tmp_path / "out"
    dense = structlin.save(model, out)
    logits = model(IDS).logits
    assert torch.equal(type(model).from_pretrained(dense).eval()(IDS).logits, logits)
    structlin.compress_model(model, "lowrank", ratio=0.5)
    logits = model(IDS).logits
    structlin.save(model, out)
    assert torch.equal(structlin.load(make(), out)(IDS).logits, logits)
    assert torch.equal(type(model).from_pretrained(out).eval()(IDS).logits, logits)
    name = type(model).__name__
    code = f"from transformers import {name}; {name}.from_pretrained({str(out)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert any(text in found.stderr for text in REFUSALS)


def test_the_config_has_the_table_where_the_plug_in_was_not_imported(tmp_path):
    code = (
        "import structlin, transformers\n"
        "sizes = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=100, n_positions=64)\n"
        "model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))\n"
        "structlin.compress_model(model, 'lowrank', ratio=0.5)\n"
        f"structlin.save(model, {str(tmp_path / 'out')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.transformer.h[0].mlp.c_fc).__name__ == "LowRankLinear"


def test_sentinels_that_are_not_stored_are_refused(tmp_path):
    model, out = gpt2(), tmp_path / "out"
    structlin.compress_model(model, "lowrank", ratio=0.5)
    structlin.save(model, out)
    file = out / "structlin.json"
    for name in ("nothing", "transformer.wte.weight"):
        record = json.loads(file.read_text())
        file.write_text(json.dumps(record | {"sentinels": [name]}))
        with pytest.raises(structlin.CheckpointError, match=f"sentinel '{name}': expected a stored tensor"):
            structlin.verify(out)
        file.write_text(json.dumps(record))
