"""Heal a compressed model with transformers.Trainer: its loop, logging, checkpoints and callbacks, our distance.

Compresses a copy of a model and trains it towards the original by `structlin.hf.HealTrainer`; no labels are needed.
By default the model is a small BERT of random weights, so that it runs anywhere in a few seconds.

    pip install "structlin[recipes]"
    python recipes/heal_with_trainer.py
    python recipes/heal_with_trainer.py --model path/to/an/encoder --steps 500
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, TrainingArguments

import structlin
import structlin.hf

SENTENCES, TOKENS, BATCH = 256, 24, 16  # of the random text that both models read


def batches_of(vocabulary: int) -> list[dict[str, Tensor]]:
    """Random sentences of different lengths, padded, one mapping each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (SENTENCES, TOKENS), generator=generator)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (SENTENCES, 1), generator=generator)
    mask = (torch.arange(TOKENS) < lengths).long()
    return [{"input_ids": row, "attention_mask": keep} for row, keep in zip(ids * mask, mask, strict=True)]


def stacked(sentences: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put sentences into one batch."""
    return {key: torch.stack([sentence[key] for sentence in sentences]) for key in sentences[0]}


def distance(student: nn.Module, teacher: nn.Module, sentences: Sequence[dict[str, Tensor]]) -> float:
    """Mean loss over sentences."""
    batch = stacked(sentences)
    with torch.no_grad():
        return structlin.distillation_loss(student.eval()(**batch), teacher(**batch), batch).item()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name of an encoder (default: a small BERT of random weights)")
    parser.add_argument("--structure", default="lowrank")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, help="default: torch's")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        initializer_range=0.2,  # large enough that the layers matter
    )  # fmt: skip
    teacher = (AutoModel.from_pretrained(args.model) if args.model else BertModel(config)).eval()
    sentences = batches_of(teacher.config.vocab_size)
    train, held_back = sentences[: -SENTENCES // 8], sentences[-SENTENCES // 8 :]
    student = copy.deepcopy(teacher)
    calibration = [stacked(train[k : k + BATCH]) for k in range(0, len(train), BATCH)]
    structlin.compress_model(  # the Trainer does what the refinement of blocks would
        student, args.structure, ratio=args.ratio, calibration=calibration, block_epochs=0, progress=False
    )
    before = distance(student, teacher, held_back)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=BATCH, learning_rate=args.lr,
            lr_scheduler_type="cosine", report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        structlin.hf.HealTrainer(student, settings, train_dataset=train, teacher=teacher).train()
    print(
        f"distance on held-back sentences: {before:.4f} compressed, {distance(student, teacher, held_back):.4f} healed"
    )


if __name__ == "__main__":
    main()
