"""The Kaleidoscope paper's experiments run at a tiny size, and what they store and draw is what they say."""

from __future__ import annotations

import importlib
import itertools
import random
from pathlib import Path

import pytest
import torch
from test_recipes import RECIPES, run, stored

pytest.importorskip("matplotlib")
pytest.importorskip("sacrebleu")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module


def finished(name: str, results: Path) -> str:
    """Run a recipe quickly and return what it printed; nothing is drawn."""
    done = run(name, "--quick", "--results", results, "--figures", results / "figures")
    assert done.returncode == 0, done.stderr
    assert not (results / "figures").exists()
    return done.stdout


def test_speech_frontend(tmp_path):
    said = finished("speech_frontend.py", tmp_path)
    rows = {row["front"]: row for row in stored(tmp_path, "speech_synthetic")}
    assert len(rows) == 10
    kmatrix = rows["K-matrix"]["parameters"]
    assert rows["dense"]["parameters"] == 256**2
    assert rows["low rank"]["parameters"] == rows["sparse"]["parameters"] == kmatrix < 256**2
    assert rows["MFSC, by hand"]["parameters"] == rows["FFT"]["parameters"] == 0
    assert said.count("confirmed") + said.count("refuted") == 3
    assert "no real speech" in (tmp_path / "speech_synthetic.md").read_text(encoding="utf-8")


def test_a_kmatrix_front_end_begins_as_the_fft(recipe):
    frontend = recipe("speech_frontend")
    frames = torch.randn(5, frontend.FRAME)
    fixed, learned = frontend.Fourier(learned=False), frontend.Fourier(learned=True)
    torch.testing.assert_close(learned(frames), fixed(frames), atol=1e-4, rtol=1e-4)
    assert not list(fixed.parameters())
    assert all(p.requires_grad for p in learned.parameters())


@pytest.mark.parametrize("name", ["MFSC, by hand", "SincNet-like", "FFT"])
def test_front_ends_tell_tones_apart(recipe, name):
    """The strongest channel rises with the frequency of a tone."""
    frontend = recipe("speech_frontend")
    tones = torch.sin(2 * torch.pi * torch.tensor([[500.0], [1500.0], [3000.0]]) / 8000 * torch.arange(frontend.FRAME))
    channels = frontend.fronts()[name].make()(tones).argmax(1).tolist()
    assert channels == sorted(set(channels))


def test_channel_shuffle(tmp_path):
    said = finished("channel_shuffle.py", tmp_path)
    rows = {row["mixing"]: row for row in stored(tmp_path, "shuffle_digits")}
    assert list(rows) == ["none", "shuffle", "Hadamard", "K-matrix", "dense"]
    assert rows["none"]["parameters"] == rows["shuffle"]["parameters"] == rows["Hadamard"]["parameters"]
    assert rows["K-matrix"]["parameters"] - rows["shuffle"]["parameters"] == rows["K-matrix"]["mixed"]
    assert rows["dense"]["mixed"] == 2 * 16 * 16
    assert "beats shuffle" in said


def test_only_a_mixing_lets_groups_meet(recipe):
    """The first channel reaches the last through two units, unless nothing mixes."""
    shuffle = recipe("channel_shuffle")
    x = torch.randn(1, 16, 4, 4)
    x.requires_grad_(True)
    reached = {}
    for name, make in shuffle.mixings(16).items():
        torch.manual_seed(0)
        units = torch.nn.Sequential(*(shuffle.Unit(16, make()) for _ in range(2))).eval()
        (slope,) = torch.autograd.grad(units(x)[:, -2:].sum(), x)
        reached[name] = bool(slope[:, :14].any())
    assert reached == {name: name != "none" for name in reached}


def test_permuted_images(tmp_path):
    said = finished("learn_permutation.py", tmp_path)
    names = {(row["network"], row["pixels"]) for row in stored(tmp_path, "permuted_digits")}
    assert {("RNN", "permuted"), ("K-matrix + CNN", "permuted"), ("CNN", "original")} < names
    assert said.count("recovers most of it") == 3


def test_the_learned_permutation_is_drawn(recipe, tmp_path):
    permuted = recipe("learn_permutation")
    row = {"network": "CNN", "pixels": "original", "accuracy": 0.9, "lowest": 0.8, "highest": 0.95}
    permuted.picture([row], torch.rand(64), torch.randperm(64), torch.randperm(64), "drawn", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"drawn.svg", "drawn.png"}


def test_translate(tmp_path):
    said = finished("translate.py", tmp_path)
    dense, *others = stored(tmp_path, "translate_invented")
    assert dense["decoder"] == "dense"
    assert dense["speed"] == 1
    assert dense["linear"] == 8 * 64**2 + 2 * 64 * 128
    for row in others:
        assert row["linear"] < dense["linear"]
        assert row["speed"] > 0
    assert "36 % faster" in said


def test_decoding_step_by_step_is_the_forward_pass(recipe):
    translator = recipe("_translator")
    torch.manual_seed(0)
    model = translator.Translator(40, 64, 128, 2, torch.nn.Linear).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # tokens depend on all that stands before them
    source = [5, 9, 7, translator.END]
    found = model.translate(source, 12)
    assert len(set(found)) > 3
    with torch.inference_mode():
        logits = model(torch.tensor([source]), torch.tensor([[translator.BEGIN, *found[:-1]]]))
        fewer = model(torch.tensor([source]), torch.tensor([[translator.BEGIN, *found[:5]]]))
    assert logits.argmax(-1)[0].tolist() == found
    torch.testing.assert_close(logits[:, :6], fewer)  # no token sees those after it


def test_the_invented_language_is_translated_word_by_word(recipe):
    """A source word stands for one target word, and no test sentence is seen in training."""
    languages = recipe("_languages")
    training, test = languages.invented(200, 50)
    assert not {source for source, _ in training} & {source for source, _ in test}
    clauses = [(s.split(), t.split()) for s, t in training if " und " not in s]
    verbs = dict(itertools.chain((source[-1], target[3]) for source, target in clauses))
    assert all(verbs[source[-1]] == target[3] for source, target in clauses)
    tokenizer = languages.subwords(training, 400)
    text = random.Random(0).choice(test)[1]
    assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text
