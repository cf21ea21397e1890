"""Compressed folders served by vLLM on the CPU, each in a process of its own: the same tokens as by transformers.

    bash tests/environments/vllm_serving.sh

Not in the default run: vLLM wants its own versions of many packages.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROMPT, NEW = 12, 24
TOLERANCE = 1e-4  # of log probabilities, in float32
SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def compressed(kind, rules, folder, dtype=torch.float32, quantized=None, structure="lowrank", **settings):
    """Compress and save a random model; return a prompt, what transformers makes of it, and log probabilities.

    `quantized`: the arguments of `structlin.quantize_`.
    """
    import transformers

    import structlin
    import structlin.hf

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    for name, parameter in model.named_parameters():  # biases start at 0
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    structlin.compress_model(model, structure, ratio=0.5, rules=rules, **settings)
    if quantized is not None:
        structlin.quantize_(model, **quantized)
    model.save_pretrained(folder)
    prompt = torch.randint(3, SIZES["vocab_size"], (1, PROMPT))
    with torch.no_grad():
        output = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        return prompt[0].tolist(), output[0, PROMPT:].tolist(), model(output).logits[0].float().log_softmax(-1)


def served(folder, prompt, *, eager=True, dtype="float32"):
    command = [sys.executable, __file__, str(folder), json.dumps(prompt), dtype, *(["eager"] if eager else [])]
    quiet = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "STRUCTLIN_KERNELS": "off"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def check(folder, prompt, tokens, logs, **settings):
    found = served(folder, prompt, **settings)
    assert [token for token, _ in found] == tokens
    for step, (_, chances) in enumerate(found):
        for token, log in chances.items():
            assert abs(log - logs[PROMPT - 1 + step, int(token)].item()) <= TOLERANCE


def cycled(names):
    """Give one of the structures to each linear layer of the model, in turn."""
    layers = [
        f"model.layers.{k}.{name}_proj"
        for k in range(SIZES["num_hidden_layers"])
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    return {layer: names[k % len(names)] for k, layer in enumerate(layers)}


def every():
    from structlin.structures import families

    return [*sorted({*families()} - {"sum", "dense"}), "lowrank+kmatrix", "lowrank+blast"]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_llama_of_all_structures_gives_the_same_tokens(tmp_path, eager):
    check(tmp_path, *compressed("Llama", cycled(every()), tmp_path), eager=eager)


def test_biases_and_dense_layers_beside_structured_ones(tmp_path):
    rules = {"*.q_proj": None, "*.up_proj": None, "re:.*layers\\.1\\..*": None, "*.v_proj": "kmatrix"}
    check(tmp_path, *compressed("Qwen2", rules, tmp_path))


def test_layers_that_are_stored_fused(tmp_path):
    check(tmp_path, *compressed("Phi3", {"*.qkv_proj": "monarch"}, tmp_path))


def test_mlps_with_fewer_hidden_units(tmp_path):
    batches = [{"input_ids": torch.randint(3, SIZES["vocab_size"], (2, 32))} for _ in range(3)]
    quick = {"refine": 3, "block_epochs": 0, "allocation": "uniform", "calibration": batches}
    found = compressed("Llama", {}, tmp_path, structure="auto", **quick)
    layers = json.loads((tmp_path / "config.json").read_text("utf-8"))["quantization_config"]["layers"]
    assert layers["model.layers.0.mlp.down_proj"]["in_features"] < SIZES["intermediate_size"]
    check(tmp_path, *found)


def test_integer_factors_of_all_structures_give_the_same_tokens(tmp_path):
    check(tmp_path, *compressed("Llama", cycled(every()), tmp_path, quantized={"to": "int8"}))


def test_integer_dense_layers_and_biases_beside_structured_ones(tmp_path):
    rules = {"*.q_proj": None, "*.up_proj": None, "*.v_proj": "kmatrix"}
    check(tmp_path, *compressed("Qwen2", rules, tmp_path, quantized={"to": "int4", "group": 32, "dense": True}))


def test_bfloat16_is_near(tmp_path):
    prompt, tokens, logs = compressed("Llama", {}, tmp_path, torch.bfloat16)
    token, chances = served(tmp_path, prompt, dtype="bfloat16")[0]
    assert token == tokens[0]
    assert max(abs(log - logs[PROMPT - 1, int(key)].item()) for key, log in chances.items()) < 0.1


def test_a_structured_output_layer_is_refused(tmp_path):
    prompt, *_ = compressed("Llama", {}, tmp_path, skip_last=False)
    with pytest.raises(RuntimeError, match="'lm_head' is structured, and vLLM runs it as ParallelLMHead; merge it"):
        served(tmp_path, prompt)


def test_a_missing_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    prompt, *_ = compressed("Llama", {}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("k_proj.left"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=f"{name!r} is missing in the checkpoint"):
        served(tmp_path, prompt)


def test_merged_folders_are_served_without_the_plug_in(tmp_path):
    prompt, tokens, _ = compressed("Llama", {}, tmp_path / "structured")
    done = subprocess.run(["structlin", "merge", tmp_path / "structured", tmp_path / "dense"], check=False)
    assert done.returncode == 0
    assert "structlin" not in (tmp_path / "dense/config.json").read_text("utf-8")
    assert [token for token, _ in served(tmp_path / "dense", prompt)] == tokens


def serve(folder, prompt, dtype, eager):
    from vllm import LLM, SamplingParams

    model = LLM(folder, skip_tokenizer_init=True, dtype=dtype, enforce_eager=eager, max_model_len=256)
    greedy = SamplingParams(temperature=0, max_tokens=NEW, logprobs=5, detokenize=False, ignore_eos=True)
    output = model.generate([{"prompt_token_ids": prompt}], greedy)[0].outputs[0]
    rows = [{token: chance.logprob for token, chance in row.items()} for row in output.logprobs]
    print(json.dumps(list(zip(output.token_ids, rows, strict=True))))


if __name__ == "__main__":
    serve(str(Path(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3], "eager" in sys.argv)
