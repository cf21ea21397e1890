"""Which share of a model's parameters compression reaches: many architectures, at real size and run when tiny.

python benchmarks/coverage.py [--only NAME ...] [--output benchmarks/results/coverage]

Real size: the default configuration of each class of transformers, on the meta device, walked by `find_targets`.
Tiny: the same class with small sizes and random weights: compressed at ratio .5 by low rank, run forward and backward,
merged back, saved and loaded by transformers. Differences are relative to the norm of the output.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import structlin
import structlin.hf
from structlin.compress.output import last_target
from structlin.compress.report import Coverage
from structlin.compress.targets import Target, find_targets

CLASSES = [
    name
    for line in (
        "GPT2LMHeadModel GPTNeoForCausalLM GPTNeoXForCausalLM GPTJForCausalLM OPTForCausalLM BloomForCausalLM",
        "FalconForCausalLM LlamaForCausalLM LlamaModel MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM DeepseekV3ForCausalLM GptOssForCausalLM",
        "GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM OlmoForCausalLM",
        "Olmo2ForCausalLM OlmoeForCausalLM CohereForCausalLM StableLmForCausalLM Starcoder2ForCausalLM",
        "GraniteForCausalLM GraniteMoeForCausalLM MambaForCausalLM DbrxForCausalLM Llama4ForCausalLM",
        "Glm4MoeForCausalLM BertModel BertForMaskedLM RobertaForMaskedLM DistilBertModel AlbertModel ElectraModel",
        "DebertaV2Model XLMRobertaModel MPNetModel ModernBertModel T5ForConditionalGeneration T5EncoderModel",
        "BartForConditionalGeneration MarianMTModel PegasusForConditionalGeneration ViTModel",
        "ViTForImageClassification DeiTModel BeitModel Dinov2Model CLIPModel SiglipModel Wav2Vec2Model HubertModel",
        "WhisperForConditionalGeneration",
    )
    for name in line.split()
]
CONFIGS = {"Llama4ForCausalLM": "Llama4TextConfig", "Gemma3ForCausalLM": "Gemma3TextConfig"}
# Shares of compressed parameters at real size that must be reached.
WANTED = {
    "GPT2LMHeadModel": 68, "FalconForCausalLM": 95, "MixtralForCausalLM": 95, "Qwen3MoeForCausalLM": 93,
    "DeepseekV3ForCausalLM": 95, "GptOssForCausalLM": 95, "nn.Transformer": 90, "nn.TransformerEncoder": 95,
}  # fmt: skip
TINY = {
    64: "hidden_size n_embd d_model dim embedding_size",
    96: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner hidden_dim ffn_hidden_size "
    "shared_expert_intermediate_size intermediate_size_mlp",
    48: "moe_intermediate_size",
    16: "head_dim d_kv",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_key_value_heads num_experts_per_tok moe_top_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
    128: "vocab_size max_position_embeddings n_positions max_source_positions max_target_positions",
    32: "image_size kv_lora_rank q_lora_rank qk_nope_head_dim v_head_dim",
    8: "patch_size qk_rope_head_dim num_mel_bins n_group",
}


def config_of(name: str) -> Any:
    """Return the default configuration of a class, which is that of a real model."""
    cls = getattr(transformers, CONFIGS[name]) if name in CONFIGS else getattr(transformers, name).config_class
    if name == "DbrxForCausalLM":  # the defaults lack it, and are small: these are the sizes of dbrx-base
        ffn = {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4}
        attention = {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8}
        return cls(d_model=6144, n_heads=48, n_layers=40, attn_config=attention, ffn_config=ffn)
    if name == "BloomForCausalLM":  # the defaults are small: these are the sizes of bloom-560m
        return cls(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16)
    return cls()


def shrink(config: Any) -> Any:
    """Set the sizes of a configuration, and of those inside it, to small ones."""
    sizes = {name: size for size, names in TINY.items() for name in names.split()}
    data = config.to_dict()
    given = {name: sizes[name] for name in data if name in sizes and isinstance(data[name], (int, type(None)))}
    if "n_group" in given:
        given |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    given |= {name: 1 for name in ("pad_token_id", "bos_token_id", "eos_token_id") if name in data}
    if config.is_encoder_decoder:
        given["decoder_start_token_id"] = 1
    # Sizes that depend on others.
    given |= {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8} if "kv_n_heads" in data else {}
    given |= {"rotary_dim": 16} if hasattr(config, "rotary_dim") else {}
    given |= {"head_dim": 8} if "qk_rope_head_dim" in data else {}
    given |= {"attention_types": [[["global", "local"], 1]]} if hasattr(config, "attention_types") else {}
    if "layer_types" in data:
        given["layer_types"] = None
    for key, inner in vars(config).items():
        if isinstance(inner, transformers.PretrainedConfig):
            given[key] = shrink(inner).to_dict()
    return type(config)(**given)


def inputs_of(model: Any, config: Any) -> dict[str, Tensor]:
    """Return random inputs of the kinds that a model takes."""
    ids = torch.arange(2, 26).reshape(2, 12) % 100
    vision = getattr(config, "vision_config", config)
    pixels = torch.randn(2, 3, *(2 * [getattr(vision, "image_size", 32)]))
    main = model.main_input_name
    if main == "pixel_values":
        return {"pixel_values": pixels}
    if main == "input_values":
        return {"input_values": torch.randn(2, 4000)}
    if main == "input_features":
        return {"input_features": torch.randn(2, 8, 256), "decoder_input_ids": ids}
    given = {"input_ids": ids}
    if hasattr(config, "vision_config"):
        given["pixel_values"] = pixels
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    return given


def output_of(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    found = model(**given)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        if isinstance(getattr(found, key, None), Tensor):
            return getattr(found, key)
    return found[0]


def at_real_size(model: nn.Module) -> dict[str, Any]:
    """Count what the walker reaches, as if the weights were there."""
    targets = find_targets(model)
    last = last_target(model, targets)
    reasons = {target.name: _reason(target, target is last) for target in targets}
    covered = Coverage.of(model, targets, {name for name, reason in reasons.items() if reason is None})
    skipped: dict[str, int] = {}
    for reason in filter(None, reasons.values()):
        skipped[reason] = skipped.get(reason, 0) + 1
    return {
        "parameters": covered.total,
        "compressed": round(100 * covered.compressed / covered.total, 2),
        "skipped": round(100 * covered.skipped / covered.total, 2),
        "unreached": {kind: count for kind, count in covered.unreached.items() if count > covered.total / 1000},
        "reasons": skipped,
    }


def _reason(target: Target, is_last: bool) -> str | None:
    if target.reason and "meta device" not in target.reason:
        return target.reason.split(";")[0]
    return "embedding" if target.on_request else "output layer" if is_last else None


def when_tiny(model: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Compress, run, merge back, save and load a model; yield each result by its name."""
    given = inputs_of(model, config)
    structlin.compress_model(model, "lowrank", ratio=0.5)
    with torch.no_grad():
        y = output_of(model, given)
    yield "forward", bool(y.isfinite().all())
    output_of(model, given).square().mean().backward()
    factors = [p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("left", "right")]
    yield "backward", f"{sum(p.grad is not None for p in factors)} of {len(factors)}"
    model.zero_grad()
    if model.can_generate() and "input_ids" in given:
        first = {key: value for key, value in given.items() if key != "decoder_input_ids"}
        yield "generate", tuple(model.generate(**first, max_new_tokens=3, do_sample=False).shape)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
        yield "loaded", (output_of(loaded, given) - y).abs().max().item()
    with torch.no_grad():
        dense = output_of(structlin.to_dense_(model), given)
    yield "merged", ((dense - y).norm() / y.norm()).item()


def rows(only: list[str]) -> Iterator[dict[str, Any]]:
    for name in CLASSES:
        if only and name not in only:
            continue
        row: dict[str, Any] = {"model": name}
        try:
            with torch.device("meta"):
                model = getattr(transformers, name)(config_of(name))
            row |= at_real_size(model)
            torch.manual_seed(0)
            config = shrink(config_of(name))
            tiny = getattr(transformers, name)(config).eval()
            for key, value in when_tiny(tiny, config):
                row[key] = value
        except Exception as error:  # the table says it
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        yield row
    for name, module in {
        "nn.Transformer": lambda: nn.Transformer(512, 8, batch_first=True),
        "nn.TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, batch_first=True), 6),
    }.items():
        if only and name not in only:
            continue
        with torch.device("meta"):
            row = {"model": name, **at_real_size(module())}
        torch.manual_seed(0)
        model = module().eval()
        structlin.compress_model(model, "lowrank", ratio=0.5)
        given = [torch.randn(2, 5, 512)] * (2 if name == "nn.Transformer" else 1)
        y = model(*given)
        y.square().mean().backward()
        merged = structlin.to_dense_(copy.deepcopy(model))
        row |= {"forward": bool(y.isfinite().all()), "merged": ((merged(*given) - y).norm() / y.norm()).item()}
        yield row


def table(found: list[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = [
        "| model | parameters | compressed | skipped | unreached | wanted | forward | backward | generate | loaded "
        "| merged |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if "parameters" not in row:
            lines.append(f"| {row['model']} | {row['error']} |||||||||||")
            continue
        rest = 100 - row["compressed"] - row["skipped"]
        tried = [row.get(key, "") for key in ("forward", "backward", "generate", "loaded", "merged")]
        cells = [f"{cell:.1e}" if isinstance(cell, float) and cell else str(cell) for cell in tried]
        wanted = WANTED.get(row["model"], "")
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['compressed']:.1f} % | {row['skipped']:.1f} % "
            f"| {max(rest, 0):.1f} % | {wanted} | {' | '.join(cells)} |"
            + (f" {row['error']}" if "error" in row else "")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = []
    for row in rows(args.only):
        print(json.dumps(row), flush=True)
        found.append(row)
    versions = f"structlin {structlin.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    text = f"{versions}; by `python benchmarks/coverage.py`.\n\n{table(found)}\n"
    if args.output:
        args.output.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
