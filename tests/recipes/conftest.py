"""A tiny encoder, on which recipes run in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

WORDS = """[PAD] [UNK] [CLS] [SEP] [MASK]
the a an of to and is in for it return if be this that with object value name file list not . , " ##s ##ed
"""


@pytest.fixture
def tiny_bert(tmp_path) -> Path:
    """A BERT of two layers with random weights, and a WordPiece tokenizer of a few words and all letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "tiny_bert"
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = dict.fromkeys([*WORDS.split(), *letters, *(f"##{letter}" for letter in letters)])
    tokenizer = transformers.BertTokenizer(vocab={word: k for k, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder
