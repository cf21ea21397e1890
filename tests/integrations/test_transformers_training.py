"""`structlin.hf` in training: Trainer's checkpoints, resumption and best model, gathered shards, state dicts."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file

import structlin

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import structlin.hf  # noqa: E402 (needs transformers)

IDS = torch.arange(3, 17).reshape(2, 7)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def compressed(**settings):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    structlin.compress_model(model, "lowrank", ratio=0.5, **settings)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trainer(model, folder, **settings):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", save_strategy="steps",
        per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-2, **settings,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.filterwarnings("ignore")  # of the Trainer itself, by the version
@pytest.mark.parametrize("tied", ["skip", "replace"])
def test_trainer_saves_resumes_and_takes_the_best_model(tied, tmp_path, caplog):
    model = compressed(tied=tied, skip_last=False)
    start = logits(model)
    first = trainer(copy.deepcopy(model), tmp_path, load_best_model_at_end=True)
    first.train()
    end = logits(first.model)
    assert not torch.equal(end, start)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(loaded), end)
    again = trainer(copy.deepcopy(model), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(again.model), end)
    assert "unexpected keys" not in caplog.text.lower()
    assert ".left" not in caplog.text  # of a dense tie transformers says that lm_head.weight is missing


def test_a_saved_file_is_a_state_dict(tmp_path):
    model = compressed(tied="replace", skip_last=False)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert state["model.embed_tokens.weight"].isnan().all()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))


def test_prepared_models_are_copied_and_pickled(tmp_path):
    model = compressed()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        structlin.to_dense_(other)
        assert getattr(other, "hf_quantizer", None) is None
        assert model.hf_quantizer.quantization_config.layers
    model.save_pretrained(tmp_path)
    assert "structlin" in (tmp_path / "config.json").read_text()


def test_the_state_dict_of_the_caller_is_saved(tmp_path):
    """Under FSDP, Trainer gathers the tensors and passes them; transformers drops them for a quantised model."""
    model = compressed()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_sharded_tensors_are_gathered(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = compressed(tied="replace", skip_last=False)
    expected = logits(model)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
        model.save_pretrained(tmp_path / "saved")
    finally:
        distributed.destroy_process_group()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded), expected)


def test_the_table_names_what_is_saved(tmp_path):
    """Layers swapped by hand are saved, too: the table is written from the model that is saved."""
    model = compressed()
    mlp = model.model.layers[0].mlp
    mlp.up_proj = structlin.KroneckerLinear.from_linear(mlp.up_proj.to_linear(), ratio=0.5)
    model.save_pretrained(tmp_path)
    table = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert table["layers"]["model.layers.0.mlp.up_proj"]["kind"] == "kronecker"
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
