"""`structlin.hf`: vocabularies of compressed models are resized, or nothing changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import structlin

transformers = pytest.importorskip("transformers")

import structlin.hf  # noqa: E402 (needs transformers)

IDS = torch.arange(3, 17).reshape(2, 7)
SIZES = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = SIZES | {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BART = SIZES | {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 0, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = SIZES | {"n_embd": 32, "n_layer": 1, "n_head": 2}
T5 = SIZES | {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
MODELS = {
    "tied Llama": ("LlamaForCausalLM", BERT | {"tie_word_embeddings": True}),
    "untied Llama": ("LlamaForCausalLM", BERT),
    "Gemma3": ("Gemma3ForCausalLM", BERT | {"head_dim": 16, "num_key_value_heads": 1}),
    "Bert": ("BertForMaskedLM", BERT),
    "GPT2": ("GPT2LMHeadModel", GPT2),
    "T5": ("T5ForConditionalGeneration", T5),
    "Bart": ("BartForConditionalGeneration", BART),
    "Marian": ("MarianMTModel", BART),
}


def compressed(name="tied Llama", structure="lowrank", **settings):
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**sizes)).eval()
    options = {"tied": "replace", "skip_last": False} | settings
    structlin.compress_model(model, structure, ratio=0.5, **options)
    return model


def logits(model):
    further = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **further).logits


def check_saved(model, folder):
    """Save, load and generate: all the same."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    loaded.tie_weights()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.num_parameters() == model.num_parameters()
    if model.can_generate():
        written = [m.generate(IDS, max_new_tokens=3, do_sample=False) for m in (model, loaded)]
        assert torch.equal(*written)


SOME_UNREACHED = "ignore:more than half of the parameters were not reached"  # positions, in so small a Bart


@pytest.mark.filterwarnings(SOME_UNREACHED)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [100, 110, 70])
def test_low_rank_is_resized_by_its_rows(name, rows, tmp_path):
    model = compressed(name)
    before = logits(model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    result = model.resize_token_embeddings(rows)
    assert result is model.get_input_embeddings()
    assert type(result) is type(table)
    assert type(model.get_output_embeddings()) is type(head) is structlin.LowRankLinear
    assert (model.config.vocab_size, model.get_output_embeddings().out_features) == (rows, rows)
    assert rows != 100 or model.get_output_embeddings() is head
    after = logits(model)
    assert after.shape[-1] == rows
    assert torch.equal(after[..., :100], before[..., :rows])
    check_saved(model, tmp_path)


@pytest.mark.filterwarnings(SOME_UNREACHED)
@pytest.mark.parametrize("name", MODELS)
def test_another_structure_is_merged_first_with_a_warning(name, tmp_path):
    model = compressed(name, "kronecker")
    before = logits(model)
    model.resize_token_embeddings(100)
    assert isinstance(model.get_output_embeddings(), structlin.KroneckerLinear)
    with pytest.warns(UserWarning, match="kronecker.* into dense weights: only low rank can be resized"):
        model.resize_token_embeddings(110)
    assert type(model.get_output_embeddings()) is nn.Linear
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "untied Llama")
    torch.testing.assert_close(logits(model)[..., :100], before)
    check_saved(model, tmp_path)


def test_new_rows_are_the_mean_or_drawn_within_the_factors():
    model = compressed()
    mean = model.lm_head.weight.mean(0)
    model.resize_token_embeddings(101)
    torch.testing.assert_close(model.lm_head.weight[100], mean, rtol=0, atol=1e-3)
    model.resize_token_embeddings(104, mean_resizing=False)
    assert model.lm_head.weight[101:].std() > 5 * mean.std()


def test_vocabularies_are_padded():
    model = compressed()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    model.resize_token_embeddings(pad_to_multiple_of=8)
    assert logits(model).shape[-1] == model.config.vocab_size == 104
    model.resize_token_embeddings(105, pad_to_multiple_of=8)
    assert logits(model).shape[-1] == 112


def test_fewer_rows_than_ranks_are_dense():
    model = compressed()
    with pytest.warns(UserWarning, match="'lm_head': 'lowrank'"):
        model.resize_token_embeddings(10)
    assert type(model.lm_head) is nn.Linear


def test_a_table_alone_is_resized():
    model = compressed("untied Llama", rules={"embed_tokens": {"ratio": 0.5}, "lm_head": None})
    model.resize_token_embeddings(110)
    assert isinstance(model.get_input_embeddings().linear, structlin.LowRankLinear)
    assert type(model.lm_head) is nn.Linear
    assert logits(model).shape[-1] == 110


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_resized_by_themselves(again):
    model = compressed()
    other = again(model)
    other.resize_token_embeddings(110)
    assert [logits(m).shape[-1] for m in (model, other)] == [100, 110]


def test_what_fails_changes_nothing(monkeypatch, tmp_path):
    model = compressed("Bert")
    before, modules = logits(model), dict(model.named_modules())

    def fails(*args, **kwargs):
        raise TypeError("an unknown head")

    monkeypatch.setattr(type(model), "_get_resized_lm_head", fails)
    with pytest.raises(TypeError, match="an unknown head"):
        model.resize_token_embeddings(110)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits(model), before)
    check_saved(model, tmp_path)


def test_offloaded_tables_are_refused():
    model = compressed().to("meta")
    with pytest.raises(ValueError, match=r"'model.embed_tokens' is offloaded .* without device_map"):
        model.resize_token_embeddings(110)
