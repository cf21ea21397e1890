"""Adapters of peft on compressed models: every structure trains, merges, unmerges, is stored and is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ONE, naming
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import structlin
from structlin.layers.linear import build

peft = pytest.importorskip("peft")
import structlin.peft  # noqa: E402

LAYERS = {name: structure for name, structure in ONE.items() if name != "conv"}  # its layer is a convolution
SCALED = {"lowrank", "butterfly", "kmatrix", "monarch", "blast", "glt", "dense"}  # a factor holds all rows (columns)
TOLERANCE = 1e-5


def mlp(name):
    return nn.Sequential(build(LAYERS[name], 16, 20), nn.ReLU(), build(LAYERS[name], 20, 16)).eval()


def config_of(kind, **fields):
    if kind == "ia3":
        return peft.IA3Config(**{"target_modules": "all-linear", "feedforward_modules": ["2"], **fields})
    return peft.LoraConfig(r=4, target_modules="all-linear", use_dora=kind == "dora", **fields)


def trained(model):
    """Change the adapters as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_adapters_train_on_quantised_factors_and_merge_into_floats():
    x = torch.randn(5, 16)
    model = mlp("lowrank")
    structlin.quantize_(model, "int8")
    before = model(x)
    adapted = peft.get_peft_model(model, config_of("lora"))
    torch.testing.assert_close(adapted(x), before)
    assert all("lora" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    wanted = trained(adapted)(x)
    merged = adapted.merge_and_unload()
    assert not merged[0].formats
    torch.testing.assert_close(merged(x), wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
def test_every_structure_trains_and_merges_exactly(kind):
    x = torch.randn(5, 16)
    for name in LAYERS if kind == "lora" else SCALED:
        with naming(name):
            dense = mlp(name)
            model = peft.get_peft_model(copy.deepcopy(dense), config_of(kind))
            learned = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
            assert len(learned) == {"lora": 4, "dora": 6, "ia3": 2}[kind]
            assert all("lora_" in key or "ia3_" in key for key in learned)
            assert torch.allclose(model(x), dense(x), atol=TOLERANCE)  # adapters begin as nothing
            y = trained(model)(x)
            assert not torch.allclose(y, dense(x), atol=1e-3)
            with model.disable_adapter():
                assert torch.equal(model(x), dense(x))
            model.merge_adapter(safe_merge=True)
            assert torch.allclose(model(x), y, atol=TOLERANCE)
            model.unmerge_adapter()
            assert torch.equal(model(x), y)
            merged = model.merge_and_unload()
            assert torch.allclose(merged(x), y, atol=TOLERANCE)
            assert isinstance(merged[0], structlin.StructuredLinear)
            assert not any("lora" in key or "ia3" in key for key in merged.state_dict())
            structlin.to_dense_(merged)
            assert torch.allclose(merged(x), y, atol=TOLERANCE)


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - SCALED - {"sum"}))
def test_rows_that_cannot_be_scaled_are_refused(name):
    with pytest.raises(ValueError, match="has no factor with all modes o"):
        peft.get_peft_model(mlp(name), config_of("dora"))
    model = trained(peft.get_peft_model(mlp(name), config_of("ia3")))
    with pytest.raises(ValueError, match=r"keep the scale apart, or call to_linear\(\) first"):
        model.merge_and_unload()


def test_low_rank_keeps_its_form_up_to_the_full_rank():
    for rank, expected in ((2, 6), (14, 16)):
        model = nn.Sequential(structlin.LowRankLinear(16, 20, rank=rank))
        model = trained(peft.get_peft_model(model, config_of("lora")))
        x = torch.randn(3, 16)
        y = model(x)
        merged = model.merge_and_unload()
        assert merged[0].structure == structlin.LowRankLinear(16, 20, rank=expected).structure
        assert torch.allclose(merged(x), y, atol=TOLERANCE)


def test_biases_and_several_adapters():
    model = peft.get_peft_model(mlp("kronecker"), config_of("lora", lora_bias=True, bias="lora_only"))
    model.add_adapter("other", config_of("lora"))
    model.base_model.set_adapter(["default", "other"])
    x, y = torch.randn(3, 16), trained(model)(torch.zeros(3, 16))
    y = model(x)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(x), y, atol=TOLERANCE)
    assert [part.name for part in merged[0].structure.parts] == ["kronecker", "lowrank"]


def test_merging_back_before_or_after_gives_the_same():
    x, model = torch.randn(3, 16), trained(peft.get_peft_model(mlp("tt"), config_of("lora")))
    y = model(x)
    first = structlin.to_dense_(copy.deepcopy(model)).merge_and_unload()
    last = structlin.to_dense_(model.merge_and_unload())
    assert type(first[0]) is type(last[0]) is nn.Linear
    assert torch.allclose(first(x), y, atol=TOLERANCE)
    assert torch.allclose(last(x), y, atol=TOLERANCE)


def test_a_dora_adapter_merges_alone():
    model = peft.get_peft_model(mlp("lowrank"), config_of("dora"))
    model.add_adapter("other", config_of("dora"))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="'other' is DoRA of the layer before"):
        model.merge_adapter()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_all_layers_are_merged_or_none(merge):
    x = torch.randn(5, 16)
    model = nn.Sequential(build(LAYERS["lowrank"], 16, 16), build(LAYERS["kronecker"], 16, 16)).eval()
    model = trained(peft.get_peft_model(model, config_of("ia3", feedforward_modules=[])))
    y, shown = model(x), str(model)
    with pytest.raises(ValueError, match=r"Kronecker.* has no factor with all modes o"):
        getattr(model, merge)()
    assert str(model) == shown
    assert not any(module.merged for module in model.modules() if hasattr(module, "merged_adapters"))
    assert torch.equal(model(x), y)
    assert not torch.equal(model.unload()(x), y)


def test_a_broken_adapter_is_refused():
    model = trained(peft.get_peft_model(mlp("tt"), config_of("lora")))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="adapter 'default' makes the merged factors infinite or NaN"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "lora_ga"])
def test_starts_that_change_the_base_weight_are_refused(start):
    model, x = mlp("monarch"), torch.randn(5, 16)
    expected = model(x)
    if start not in structlin.integrations.peft.STARTS:
        with pytest.raises(ValueError, match=f"init_lora_weights='{start}' changes the base weight"):
            peft.get_peft_model(model, config_of("lora", init_lora_weights=start))
        return
    adapted = peft.get_peft_model(model, config_of("lora", init_lora_weights=start))
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(x), expected)
    if start:
        torch.testing.assert_close(adapted(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "layer '1': init_lora_weights='pissa' changes the base weight"),
        ({"use_dora": True}, r"layer '1': Kronecker.* has no factor with all modes o"),
        (
            {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"},
            "layer '1': Invalid or unsupported variant combination",
        ),
        ({"target_modules": ["0", "1", "2"]}, "Target module LayerNorm.* is not supported"),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_refusal_leaves_no_half_of_an_adapter(adapted, fields, message):
    model = nn.Sequential(nn.Linear(16, 16), build(LAYERS["kronecker"], 16, 16), nn.LayerNorm(16))
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["0", "1"], **fields})
    if adapted:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    names, before = [*model.named_modules()], copy.deepcopy(model.state_dict())
    shown, trained = str(model), [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", config) if adapted else peft.get_peft_model(model, config)
    assert [*model.named_modules()] == names
    assert str(model) == shown
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    again = peft.LoraConfig(r=4, target_modules=["0", "1"])
    model.add_adapter("other", again) if adapted else peft.get_peft_model(model, again)


def test_factors_are_no_targets():
    with pytest.raises(ValueError, match="target_parameters='left' is a factor of '0'; name it in target_modules"):
        peft.get_peft_model(mlp("lowrank"), peft.LoraConfig(target_parameters=["left"], target_modules=[]))


def test_models_with_adapters_are_not_compressed():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 16)), config_of("lora"))
    with pytest.raises(ValueError, match=r"module 'base_model' holds adapters of peft; call merge_and_unload\(\)"):
        structlin.compress_model(model, "lowrank", ratio=0.5)


# Models of transformers ----------------------------------------------------------------------------------------------


def bert():
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    return BertModel(config).eval()


def llama():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=50,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_all_linear_means_structured_layers_and_not_the_output_layer():
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5, tied="replace", rules={"v_proj": None})
    reached = peft.get_peft_model(model, config_of("lora")).base_model.targeted_module_names
    assert len(reached) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in reached)


def test_adapters_are_stored_and_loaded(tmp_path):
    dense, ids = bert(), torch.arange(12).reshape(2, 6)
    structlin.compress_model(dense, "monarch", ratio=0.5)
    structlin.save(dense, tmp_path / "base")
    names = ["query", "value", "dense"]
    model = trained(peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=names)))
    model.save_pretrained(tmp_path / "adapter")
    y = model(ids).last_hidden_state
    base = structlin.load(bert(), tmp_path / "base").eval()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(ids).last_hidden_state, y)
    merged = again.merge_and_unload()
    structlin.save(merged, tmp_path / "merged")
    last = structlin.load(bert(), tmp_path / "merged").eval()
    assert torch.allclose(last(ids).last_hidden_state, y, atol=TOLERANCE)


def test_a_merged_model_is_saved_as_transformers_does(tmp_path):
    import structlin.hf

    model, ids = bert(), torch.arange(12).reshape(2, 6)
    structlin.compress_model(model, "tt", ratio=0.5)
    model = trained(peft.get_peft_model(model, config_of("lora")))
    y = model(ids).last_hidden_state
    model.merge_and_unload().save_pretrained(tmp_path)
    again = BertModel.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(ids).last_hidden_state, y, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_trains_the_adapters_alone(tmp_path):
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    model = peft.get_peft_model(model, config_of("lora", task_type="CAUSAL_LM"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    data = [{"input_ids": row, "labels": row} for row in torch.randint(50, (8, 6))]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=data).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
