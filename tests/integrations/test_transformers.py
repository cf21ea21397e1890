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


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_quantised_factors_are_saved_and_loaded_bit_for_bit(make, to, tmp_path):
    model = make()
    structlin.compress_model(model, "lowrank", ratio=0.5, exclude=["re:.*(query|q_proj)"])
    structlin.quantize_(model, to, group=16, dense=structlin.structures.LowRank(rank=2))
    model.save_pretrained(tmp_path)
    assert model.config.quantization_config.quant_method == "structlin"
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    stored = {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith(("codes", "scale"))}
    assert len(stored) > 40
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in stored.items())
    assert not any(name.endswith("scale") for name, _ in loaded.named_parameters())
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    codes = {tensor.dtype for name, tensor in half.state_dict().items() if name.endswith("codes")}
    assert codes <= {torch.int8, torch.uint8}
    assert torch.allclose(logits(half).float(), logits(model), atol=0.05)
    read = structlin.load(make(), tmp_path)
    assert torch.equal(logits(read), logits(model))
    dense = structlin.to_dense_(model)
    assert not hasattr(dense.config, "quantization_config")


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


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    ("make", "down"),
    [
        (bert, "bert.encoder.layer.1.output.dense"),
        (llama, "model.layers.1.mlp.down_proj"),
        (gpt2, "transformer.h.1.mlp.c_proj"),
    ],
)
def test_models_with_fewer_hidden_units(make, down, tmp_path):
    """They are stored as all others are, and merged to the sizes of their config, which stays."""
    model = make()
    units = make().get_submodule(down).weight.numel() // 32
    batches = [{"input_ids": torch.randint(3, 100, (2, 7))} for _ in range(6)]
    settings = {"refine": 2, "block_epochs": 1, "progress": False, "hidden_units": True, "allocation": "uniform"}
    structlin.compress_model(model, "auto", ratio=0.5, calibration=batches, **settings)
    assert model.get_submodule(down).in_features < units
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(model))
    expected = logits(model)
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert merged.get_submodule(down).weight.numel() == 32 * units
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


# Ties and other classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["skip", "replace"])
@pytest.mark.parametrize("make", [bert, lambda: llama(tie_word_embeddings=True)])
def test_tied_models_stay_tied(make, tied, tmp_path):
    model = make()
    structlin.compress_model(model, "lowrank", ratio=0.5, tied=tied, skip_last=False)
    model.save_pretrained(tmp_path)
    model.tie_weights()
    loaded = type(model).from_pretrained(tmp_path)
    loaded.tie_weights()
    assert torch.equal(logits(loaded), logits(model))
    head, table = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert isinstance(table, structlin.StructuredEmbedding) == (tied == "replace")
    assert table.linear is head if tied == "replace" else table.weight is head.weight
    assert loaded.num_parameters() == model.num_parameters()


def test_layers_that_share_factors_share_them_after_a_load(tmp_path):
    model = bert()
    first, second = (layer.intermediate for layer in model.bert.encoder.layer)
    second.dense.weight = first.dense.weight
    structlin.compress_model(model, "lowrank", ratio=0.5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    first, second = (layer.intermediate.dense for layer in loaded.bert.encoder.layer)
    assert first.left is second.left
    assert first.bias is not second.bias


def test_other_classes_load_the_base_model(tmp_path):
    model = bert()
    structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False, rules={"cls.*.dense": None})
    model.save_pretrained(tmp_path / "masked")
    base = transformers.AutoModel.from_pretrained(tmp_path / "masked", add_pooling_layer=False)
    hidden = model.bert(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    for folder in ("masked", "base"):
        other = transformers.BertForTokenClassification.from_pretrained(tmp_path / folder)
        assert torch.equal(other.bert(IDS).last_hidden_state, hidden)


def test_a_head_that_another_class_lacks_is_left_out(tmp_path):
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5, skip_last=False)
    model.save_pretrained(tmp_path)
    other = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(other.model(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


# Ways to load --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = llama()
    structlin.compress_model(model, "lowrank+kmatrix", ratio=0.5)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder, logits(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "auto"])
def test_dtype_is_that_asked_for(saved, dtype):
    folder, expected = saved
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32 if dtype == "auto" else dtype}
    torch.testing.assert_close(logits(loaded).float(), expected, atol=0.05, rtol=0.05)
    base = transformers.AutoModel.from_pretrained(folder, dtype=dtype)  # its tensors are renamed
    assert {p.dtype for p in base.parameters()} == {p.dtype for p in loaded.parameters()}
    assert {p.dtype for p in loaded.half().parameters()} == {torch.float16}


DISK = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu") | {
    "model.layers": "disk"
}


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, DISK])
def test_device_maps(saved, device_map, tmp_path):
    folder, expected = saved
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    for _ in range(2):  # memory that is aligned otherwise may round otherwise
        torch.testing.assert_close(logits(loaded).cpu(), expected, rtol=1e-5, atol=1e-6)


def test_a_model_offloaded_to_disk_is_saved_again(saved, tmp_path):
    folder, expected = saved
    device_map = {"model": "disk", "lm_head": "cpu"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    state = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(logits(again), expected)  # the last bits hang on how a file's tensors are aligned


def test_generation_and_pipelines(saved):
    folder, _ = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(IDS, max_new_tokens=5, do_sample=False)
    pipeline = transformers.pipeline("text-generation", model=str(folder), tokenizer=_tokenizer())
    assert torch.equal(pipeline.model.generate(IDS, max_new_tokens=5, do_sample=False), tokens)
    assert tokens.shape == (2, 12)


def _tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(k): k for k in range(100)}, unk_token="0")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), pad_token="0")


def test_dequantize_merges_back(saved, tmp_path):
    folder, expected = saved
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    dense = model.dequantize()
    assert not any(isinstance(module, structlin.StructuredLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense), expected)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path)), logits(dense))
    narrow = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}


def test_a_model_merged_back_is_ordinary_again(tmp_path):
    model = llama(tie_word_embeddings=True)
    structlin.compress_model(model, "lowrank", ratio=0.5, tied="replace", skip_last=False)
    structlin.to_dense_(model)
    model.save_pretrained(tmp_path)
    assert "structlin" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    assert getattr(model, "hf_quantizer", None) is None
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("tied", ["skip", "replace"])
def test_an_encoder_is_loaded_from_an_encoder_decoder(tied, tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=100)
    model = transformers.T5ForConditionalGeneration(config).eval()
    structlin.compress_model(model, "lowrank", ratio=0.5, tied=tied, skip_last=False)
    model.save_pretrained(tmp_path)
    whole = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(whole(IDS, decoder_input_ids=IDS).logits, model(IDS, decoder_input_ids=IDS).logits)
    assert whole.num_parameters() == model.num_parameters()
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path)
    assert torch.equal(encoder(IDS).last_hidden_state, model.encoder(IDS).last_hidden_state)
