"""The recipes that compress with calibration and heal run at a tiny size, and their pure functions do what they say."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
DATA = Path(os.environ.get("STRUCTLIN_DATA", "no folder given"))

np = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    """Scripts find the modules beside them."""
    monkeypatch.syspath_prepend(str(RECIPES))


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(RECIPES / name), "--threads", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def stored(results: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (results / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    table = (results / f"{name}.md").read_text(encoding="utf-8")
    assert sum(line.startswith("|") for line in table.splitlines()) == len(rows) + 2
    assert all("/tmp" not in row["command"] and str(results.parent) not in row["command"] for row in rows)
    return rows


# Sentence encoder ------------------------------------------------------------------------------------------------


def pairs_file(path: Path, *pairs: tuple[str, str, str]) -> Path:
    lines = ("\t".join(["main", "test", "2026", str(k), *pair]) for k, pair in enumerate(pairs))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_heal_minilm(tmp_path, tiny_bert):
    text = tmp_path / "text.gz"
    with gzip.open(text, "wt", encoding="utf-8") as file:
        file.write("".join(f"The value of name {k} is not in the list. It is in the file.\n" for k in range(40)))
    stsb = pairs_file(
        tmp_path / "dev.csv",
        ("5.0", 'the "list is a list', "the list is this list"),
        ("2.5", "return the value of the file", "return the name of the file"),
        ("0.0", "it is an object", "and that with this not in"),
    )
    done = run(
        "heal_minilm.py", "--model", tiny_bert, "--structure", "lowrank", "--calibration", "40", "--sentences", "30",
        "--text", text, "--pairs", pairs_file(tmp_path / "train.csv", ("1.0", "an object", "a file is a list")),
        "--stsb", stsb, "--minutes", "0.03", "--validation", "40", "--every", "10", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "compressed 12 layers" in done.stderr  # the pooler stays
    dense, compressed, healed = stored(tmp_path / "results", "heal_minilm")
    assert [row["row"] for row in (dense, compressed, healed)] == ["dense", "compressed", "healed"]
    assert dense["cosine"] == pytest.approx(1, abs=1e-5)
    assert compressed["kept"] == healed["kept"] == compressed["parameters"] / dense["parameters"] <= 0.4
    before, after = map(float, healed["validation loss"].split(" -> "))
    assert after < before
    assert healed["cosine"] != compressed["cosine"]
    assert healed["closed"] == pytest.approx((healed["cosine"] - compressed["cosine"]) / (1 - compressed["cosine"]))
    for row in (dense, compressed, healed):
        assert -1 <= row["stsb_spearman"] <= 1
        assert row["stsb_cosine"] <= 1 + 1e-5
        assert row["encoder"] == "tiny_bert"
        assert row["healing steps"] > 0


def test_sentences_of_files(tmp_path):
    import heal_minilm

    text = (
        " = Title of the page = \nIt has two sentences here. They stand on one line.\nToo short.\n\nno end of a line\n"
    )
    expected = ["It has two sentences here.", "They stand on one line.", "no end of a line"]
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode()))
    assert list(heal_minilm.read_sentences(tmp_path / "plain.txt")) == expected
    assert list(heal_minilm.read_sentences(tmp_path / "packed.gz")) == expected


def test_training_text_leaves_out_what_is_measured(tmp_path):
    import heal_minilm

    file = tmp_path / "text.txt"
    file.write_text("One two three four.\nFive six seven eight.\n", encoding="utf-8")
    pairs = pairs_file(tmp_path / "pairs.csv", ("4.0", "One two three four.", "a secret"), ("1.0", "short", "too"))
    texts = list(heal_minilm.file_sentences(argparse.Namespace(text=[file], pairs=[pairs])))
    assert sorted(texts) == sorted(
        ["One two three four.", "Five six seven eight.", "One two three four.", "short", "a secret", "too"]
    )
    found = heal_minilm.shuffled(texts, {"a secret", "Five six seven eight."})
    assert sorted(found) == ["One two three four.", "short", "too"]
    assert found == heal_minilm.shuffled(texts, {"a secret", "Five six seven eight."})


def test_kinds_of_text_take_turns():
    import heal_minilm

    assert heal_minilm.interleaved([1, 2, 3], ["a"]) == [1, "a", 2, "a", 3, "a"]
    assert heal_minilm.interleaved([1, 2], []) == [1, 2]
    assert heal_minilm.interleaved([], ["a"]) == ["a"]


def test_sentences_of_the_whole_library():
    import _minilm

    whole, some = _minilm.library_sentences(), _minilm.docstring_sentences(sys.maxsize)
    assert len(whole) == len(set(whole))
    assert len(whole) > len(some)
    assert set(some) <= set(whole)


def test_distance_of_embeddings():
    import heal_minilm

    state, mask = torch.randn(4, 3, 8), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    output = SimpleNamespace(last_hidden_state=state)
    changed = state.masked_fill(mask.unsqueeze(-1) == 0, 7.0) * 2  # what is masked, and the scale, do not count
    same = heal_minilm.distance(SimpleNamespace(last_hidden_state=changed), output, {"attention_mask": mask})
    assert same.item() == pytest.approx(0, abs=1e-5)
    other = heal_minilm.distance(SimpleNamespace(last_hidden_state=-state), output, {"attention_mask": mask})
    assert other.item() == pytest.approx(2, abs=1e-5)  # opposite embeddings


def test_share_of_the_gap():
    import heal_minilm

    assert heal_minilm.closed(0.8, 0.9) == pytest.approx(0.5)
    assert heal_minilm.closed(0.8, 0.7) == pytest.approx(-0.5)
    assert heal_minilm.closed(1.0, 1.0) is None


# Language model --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_llama(tmp_path) -> Path:
    """A Llama of one layer with random weights, whose output head is tied to the embedding."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny_llama")
    return tmp_path / "tiny_llama"


@pytest.fixture
def stories(tmp_path) -> Path:
    """Stories of 5 to 40 random tokens, each behind a start token."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 30), ("valid", 10)):
        lengths = torch.randint(4, 40, (count,), generator=generator).tolist()
        ids = torch.cat([torch.cat([torch.ones(1), torch.randint(2, 40, (n,), generator=generator)]) for n in lengths])
        np.save(tmp_path / f"{split}.tok512.npy", ids.numpy().astype(np.uint16))
    return tmp_path


def test_compress_stories(tmp_path, tiny_llama, stories):
    done = run(
        "compress_stories.py", "--model", tiny_llama, "--data", stories, "--structures", "svd", "lowrank", "monarch",
        "phm", "--ratio", "0.1", "--calibration", "10", "--held", "6", "--steps", "3", "--every", "10",
        "--refine", "5", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = stored(tmp_path / "results", "stories260k")
    dense, *others = rows
    assert "stay dense" in done.stderr  # some layers are too small, and say why
    named = [row["structure"] for row in others]
    assert named[:2] == ["svd", "lowrank"]
    for name in {"monarch", "phm"} - set(named):
        assert name in dense["no layer can be made that small by"]
    assert dense["perplexity"] > 1
    for row in others:
        assert 1 <= row["layers"] <= 7  # the tied head stays
        assert row["parameters"] == round(row["kept"] * dense["parameters"])
        assert row["kept"] < 0.5
        assert row["perplexity"] > 1
        assert row["healed"] > 1
        assert row["steps"] > 0
    assert others[0]["parameters"] == others[1]["parameters"]


def test_lora_stories(tmp_path, tiny_llama, stories):
    done = run(
        "lora_stories.py", "--model", tiny_llama, "--data", stories, "--structures", "dense", "monarch",
        "--steps", "2", "--rank", "2", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, monarch = stored(tmp_path / "results", "lora_stories")
    assert dense["adapters"] == monarch["adapters"] > 0
    assert dense["kept"] == dense["kept_merged"] == 1
    assert monarch["kept"] < monarch["kept_merged"] < 1
    assert monarch["merged"] == pytest.approx(monarch["adapted"], rel=1e-4)
    assert monarch["adapted"] != monarch["perplexity"]
    assert monarch["difference"] <= 1e-5


def test_lora_minilm(tmp_path, tiny_bert):
    pytest.importorskip("peft")
    done = run(
        "lora_minilm.py", "--model", tiny_bert, "--structures", "dense", "kronecker", "lowrank+blast",
        "--steps", "20", "--sentences", "60", "--rank", "4", "--results", tmp_path / "results",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dense, *others = stored(tmp_path / "results", "lora_minilm")
    assert dense["before"] == pytest.approx(1, abs=1e-5)
    assert dense["kept"] == dense["kept_merged"] == 1
    for row in others:
        assert row["adapters"] == dense["adapters"]
        assert row["kept"] < row["kept_merged"]
        assert row["before"] < row["adapted"] < 1
        assert row["merged"] == pytest.approx(row["adapted"], abs=1e-5)
        assert row["difference"] <= 1e-5


def test_stories_are_split_and_cut(tmp_path):
    import compress_stories

    path = tmp_path / "ids.npy"
    np.save(path, np.array([1, 5, 6, 1, 7, 1, 8, 9, 10, 300], dtype=np.uint16))
    found = [story.tolist() for story in compress_stories.read_stories(path, 4)]
    assert found == [[1, 5, 6], [1, 7], [1, 8, 9, 10]]
    np.save(path, np.array([5, 1, 7], dtype=np.uint16))
    with pytest.raises(ValueError, match="does not begin with the start token"):
        compress_stories.read_stories(path, 4)


def test_stories_are_padded():
    import compress_stories

    batch = compress_stories.padded([torch.tensor([1, 5, 6]), torch.tensor([1, 0])])
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_perplexity_counts_every_predicted_token_once(tiny_llama):
    import compress_stories

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    found = [torch.tensor([1, *range(2, 2 + n)]) for n in (3, 9, 5)]
    total, count = 0.0, 0
    with torch.inference_mode():
        for story in found:
            total += model(input_ids=story[None], labels=story[None]).loss.item() * (len(story) - 1)
            count += len(story) - 1
    expected = math.exp(total / count)
    assert compress_stories.perplexity(model, compress_stories.batches(found, 2)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not (DATA / "stories260k").is_dir(), reason="$STRUCTLIN_DATA names no folder with stories260k")
def test_perplexity_of_the_real_model():
    import compress_stories

    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / "stories260k").eval()
    stories = compress_stories.read_stories(DATA / "tinystories" / "valid.tok512.npy", 512)
    assert len(stories) == 300
    assert 3 < compress_stories.perplexity(model, compress_stories.batches(stories[:16], 16)) < 4.5


@pytest.mark.slow
def test_heal_with_trainer():
    pytest.importorskip("accelerate")
    done = run("heal_with_trainer.py", "--steps", "400")
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.findall(r"(\d\.\d+) (?:compressed|healed)", done.stdout))
    assert after < 0.9 * before  # on sentences that were held back
