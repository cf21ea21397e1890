"""`structlin.hf`: what its folders hold, how damaged ones are refused, and who else reads them."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import structlin

transformers = pytest.importorskip("transformers")

import structlin.hf  # noqa: E402 (needs transformers)

IDS = torch.arange(3, 17).reshape(2, 7)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def llama(**fields):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | fields)).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# Damage --------------------------------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"


def edited(change):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def without(name):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def narrow(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.left"] = tensors[f"{UP}.left"][:, 1:].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGES = {
    "another version": (edited(lambda t: t.update(format_version=2)), "format_version 2"),
    "an unknown kind": (edited(lambda t: t["layers"][UP].update(kind="os.system")), "not registered"),
    "another size": (edited(lambda t: t["layers"][UP].update(in_features=48)), "weight is|expected"),
    "a huge size": (edited(lambda t: t["layers"][UP].update(in_features=2**30)), "axis|expected"),
    "a huge rank": (edited(lambda t: t["layers"][UP]["hyperparameters"].update(rank=2**30)), "exceeds"),
    "a bad name": (edited(lambda t: t["layers"].update({"model.__class__": t["layers"][UP]})), "name"),
    "an unknown name": (
        edited(lambda t: t["layers"].update({"model.other": t["layers"][UP]})),
        "no such module|missing",
    ),
    "a bad alias": (edited(lambda t: t["aliases"].update({"model.norm.weight": f"{UP}.left"})), "another name"),
    "a missing factor": (without(f"{UP}.left"), "missing"),
}


READERS = {
    "from_pretrained": transformers.LlamaForCausalLM.from_pretrained,
    "load": lambda folder: structlin.load(llama(), folder),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("read", READERS)
def test_damaged_folders_are_refused(damage, read, tmp_path):
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    model.save_pretrained(tmp_path)
    damaging, message = DAMAGES[damage]
    damaging(tmp_path)
    with pytest.raises(structlin.CheckpointError, match=message):
        READERS[read](tmp_path)


@pytest.mark.parametrize("structure", sorted(structlin.structures.families()))
def test_every_structure_is_read(structure, tmp_path):
    model = llama(hidden_size=48, intermediate_size=80)
    structlin.compress_model(model, structure, ratio=0.7, refine=1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_factor_of_another_shape_is_refused(tmp_path):
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    model.save_pretrained(tmp_path)
    narrow(tmp_path)
    with pytest.raises((RuntimeError, structlin.CheckpointError), match=r"ignore_mismatched_sizes|expected"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_quantised_model_is_left_alone():
    model = llama()
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    with pytest.warns(UserWarning, match="quantised by bitsandbytes"):
        structlin.compress_model(model, "lowrank", ratio=0.5)
    assert not hasattr(model.config, "quantization_config")


# structlin reads them, too -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", ["skip", "replace"])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_structlin_reads_the_folder(tied, size, tmp_path):
    model = llama(tie_word_embeddings=True)
    structlin.compress_model(model, "lowrank", ratio=0.5, tied=tied, skip_last=False)
    model.save_pretrained(tmp_path, max_shard_size=size)
    loaded = structlin.load(llama(tie_word_embeddings=True), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    summary = structlin.verify(tmp_path, check_hashes=True)
    assert set(summary.layers.values()) == {"lowrank"}
    assert summary.parameters == model.num_parameters()
    assert len(summary.shards) == len(list(tmp_path.glob("*.safetensors")))


def test_tied_biases_are_read(tmp_path):
    def bert():
        torch.manual_seed(0)
        return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()

    model = bert()
    structlin.compress_model(model, "lowrank", ratio=0.5, tied="replace", skip_last=False)
    structlin.hf.save_pretrained(model, tmp_path)
    assert torch.equal(logits(structlin.load(bert(), tmp_path)), logits(model))


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(tmp_path):
    model = llama()
    report = structlin.compress_model(model, "lowrank", ratio=0.5, evaluate=lambda m: float(logits(m)[0, 0, 0]))
    structlin.hf.save_pretrained(model, tmp_path, report, base_model="some/llama")
    card = (tmp_path / "README.md").read_text()
    for part in (
        'base_model: "some/llama"\nbase_model_relation: quantized\nlibrary_name: transformers\ntags:\n- structlin\n',
        "import structlin.hf",
        "LlamaForCausalLM.from_pretrained",
        f"{model.num_parameters():,} parameters of {report.parameters_before:,}",
        "| 4 | 32 x 32 | `LowRank(rank=8)` | 0.500 |",
        "- dense: size 1.000",
        "- compressed: size",
    ):
        assert part in card, part
    from huggingface_hub import ModelCard

    assert ModelCard(card).data.base_model == "some/llama"
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    with pytest.raises(ValueError, match="no structured layers"):
        structlin.hf.model_card(llama())


def test_the_card_counts_experts():
    sizes = {"num_local_experts": 4, "num_key_value_heads": 2, **SIZES}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    report = structlin.compress_model(model, "lowrank", ratio=0.5, exclude=["self_attn.*"])
    rows = [row for row in report.layers if row.structure]
    before, after = (sum(getattr(row, name) for row in rows) for name in ("parameters_before", "parameters_after"))
    card = structlin.hf.model_card(model, report)
    assert f"; {len(rows)} layers keep {after:,} of {before:,} parameters" in card
    assert f"| 1 | 4 x 32 x {SIZES['intermediate_size']} | `LowRank(rank=" in card


def test_the_model_is_pushed_with_its_card(tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, **settings):
            assert settings == {"private": True, "exist_ok": True}
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    monkeypatch.setattr("structlin.integrations.model_card.HfApi", Hub)
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    assert structlin.hf.push_to_hub(model, "me/small", private=True, token="secret") == "https://hub/me/small"
    assert 'from_pretrained("me/small")' in (tmp_path / "me/small/README.md").read_text()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "me/small")), logits(model))


# Others --------------------------------------------------------------------------------------------------------------


def test_importing_structlin_leaves_transformers_alone():
    code = "import sys, structlin; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.filterwarnings("ignore")  # of sentence_transformers itself, by the version
def test_sentence_transformers_save_and_load(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "small": 3, "model": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    transformer = Transformer(str(tmp_path / "dense"))
    model = sentence_transformers.SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    structlin.compress_model(model, "lowrank", ratio=0.5)
    expected = model.encode(["a small model", "a model"])
    model.save(str(tmp_path / "small"))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "small"), device="cpu")
    assert any(isinstance(module, structlin.StructuredLinear) for module in loaded.modules())
    assert (loaded.encode(["a small model", "a model"]) == expected).all()
    assert copy.deepcopy(loaded).encode(["a"]).shape == (1, 32)
