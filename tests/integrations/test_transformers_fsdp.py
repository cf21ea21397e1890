"""`structlin.hf`: Trainer under FSDP2 in two processes trains, saves and resumes as in one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

import structlin

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import structlin.hf  # noqa: E402 (needs transformers)

# All rows are equal, so that the processes' batches in any order give the gradient of one. accelerate shards on
# accelerators only and would fall back to DDP here: it is told that FSDP is on, all else is its own.
TRAINING = """
import sys
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
import structlin
import structlin.hf

def sharding(trainer, sharded):
    class Sharding(trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            if sharded:
                state = self.accelerator.state
                state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
                state.fsdp_plugin = FullyShardedDataParallelPlugin(
                    fsdp_version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", state_dict_type="FULL_STATE_DICT",
                    transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                )
                self.is_fsdp_enabled = True

    return Sharding

def llama():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100,
        tie_word_embeddings=True, use_cache=False, initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)

def arguments(folder, **options):
    return transformers.TrainingArguments(
        folder, per_device_train_batch_size=1, report_to=[], use_cpu=True, disable_tqdm=True, **options
    )

ROW = torch.arange(3, 10)

def trained(folder, sharded, **options):
    model = llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    settings = arguments(folder, max_steps=4, save_steps=2, learning_rate=1e-2)
    make = sharding(transformers.Trainer, sharded)
    trainer = make(model, settings, train_dataset=[{"input_ids": ROW, "labels": ROW}] * 8)
    trainer.train(**options)
    return trainer

def healed(folder, sharded):
    teacher, model = llama(), llama()
    structlin.compress_model(model, "lowrank", ratio=0.5)
    settings = arguments(
        folder, max_steps=5, learning_rate=0.1, optim="sgd", save_strategy="no", eval_strategy="steps", eval_steps=5
    )
    make = sharding(structlin.hf.HealTrainer, sharded)
    data = [{"input_ids": ROW}] * 10
    trainer = make(model, settings, teacher=teacher, train_dataset=data, eval_dataset=data[:2])
    before = trainer.evaluate()["eval_loss"] if not sharded else None
    trainer.train()
    return trainer, before
"""
HEALING = """
import torch.distributed as dist

trainer, _ = healed(sys.argv[1], True)
for model in trainer.model, trainer.teacher:
    # After a forward pass alone, as of the teacher or in an evaluation, the root's own parameters stay gathered.
    assert all(type(p).__name__ == "DTensor" for p in model.model.layers.parameters())
trainer.save_model(sys.argv[1] + "/healed")
dist.barrier()
dist.destroy_process_group()
"""
PROCESS = """
import torch.distributed as dist

folder = sys.argv[1]
for options in {}, {"resume_from_checkpoint": folder + "/checkpoint-2"}:
    trainer = trained(folder, True, **options)
    assert {type(p).__name__ for p in trainer.model.parameters()} == {"DTensor"}
    trainer.save_model(folder + ("/resumed" if options else "/final"))
    dist.barrier()
dist.destroy_process_group()
"""


def in_two_processes(script, folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    facts = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING + script, str(folder)],
            env=os.environ | facts | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the Trainer itself, by the version
def test_trainer_under_fsdp_trains_saves_and_resumes(tmp_path):
    in_two_processes(PROCESS, tmp_path)
    scope = {}
    exec(TRAINING, scope)
    expected = scope["trained"](str(tmp_path / "one"), False).model.state_dict()
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    for folder in ("checkpoint-4", "final", "resumed"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert isinstance(model.model.layers[0].mlp.up_proj, structlin.LowRankLinear)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)
            assert tensor.ndim == 1 or not torch.allclose(tensor, start[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_heal_trainer_under_fsdp_does_what_one_process_does(tmp_path):
    in_two_processes(HEALING, tmp_path)
    scope = {}
    exec(TRAINING, scope)
    trainer, before = scope["healed"](str(tmp_path / "one"), False)
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())
    expected = trainer.model.state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "healed").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
