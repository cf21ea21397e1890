"""Pairs of sentences for the translation recipe: Multi30k by path, or a language that is invented here."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Pairs = list[tuple[str, str]]  # source, target

PAD, BEGIN, END = range(3)
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstwz" for vowel in "aeiou"]
ENDINGS = {"er": "der", "es": "das", "e": "die"}  # of adjectives, and the article, by gender


def multi30k(folder: Path) -> tuple[Pairs, Pairs]:
    """Read the German and English captions for training, and those of the validation set."""

    def part(name: str) -> Pairs:
        german, english = (
            gzip.decompress((folder / f"{name}.{language}.gz").read_bytes()).decode("utf-8").splitlines()
            for language in ("de", "en")
        )
        return list(zip(german, english, strict=True))

    return part("train"), part("val")


def invented(train: int, test: int) -> tuple[Pairs, Pairs]:
    """Invent a language and its translation, and say so many sentences in both; a sentence determines the other.

    The source puts verbs last; its articles and adjectives follow the gender of the noun, and every clause after the
    first stands in front of the one before. Training and test sentences are disjoint.
    """
    chance = random.Random(0)
    words: dict[str, None] = {}
    while len(words) < 480:
        words["".join(chance.choices(SYLLABLES, k=chance.randint(2, 3)))] = None
    names = list(words)
    both = list(zip(names[:240], names[240:], strict=True))
    nouns = [(*pair, chance.choice(list(ENDINGS))) for pair in both[:120]]
    adjectives, verbs = both[120:180], both[180:]

    def phrase() -> tuple[str, str]:
        source, target, ending = chance.choice(nouns)
        adjective = chance.choice(adjectives)
        return f"{ENDINGS[ending]} {adjective[0]}{ending} {source}", f"the {adjective[1]} {target}"

    def clause() -> tuple[str, str]:
        subject, verb, thing = phrase(), chance.choice(verbs), phrase()
        return f"{subject[0]} {thing[0]} {verb[0]}", f"{subject[1]} {verb[1]} {thing[1]}"

    said: dict[tuple[str, str], None] = {}
    while len(said) < train + test:
        clauses = [clause() for _ in range(chance.randint(1, 2))]
        said[" und ".join(c[0] for c in reversed(clauses)), " and ".join(c[1] for c in clauses)] = None
    pairs = list(said)
    return pairs[test:], pairs[:test]


def subwords(pairs: Pairs, size: int) -> Tokenizer:
    """Learn byte-pair subwords of both languages together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return tokenizer
