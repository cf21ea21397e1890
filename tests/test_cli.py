"""The command line, on a tiny model with a tokenizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")

import huggingface_hub  # noqa: E402

from structlin.cli import main  # noqa: E402
from structlin.compress import Compression  # noqa: E402
from structlin.integrations import folders  # noqa: E402
from structlin.structures import Monarch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    (folder / "modules.json").write_text("[]")
    (tmp_path / "texts.txt").write_text("\n".join(["a b c d", "", "e f g", "h i j k l m", "n o p"] * 4))
    return folder


def texts(source):
    return ["--calibration", str(source.parent / "texts.txt"), "--batch-size", "4"]


def test_compress_inspect_verify_merge(source, tmp_path, capsys):
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert main(["compress", str(source), str(out), "--structure", "lowrank", "--ratio", "0.5", *texts(source)]) == 0
    printed = capsys.readouterr().out
    assert "compressed weights keep" in printed
    assert "cosine" in printed
    assert (out / "modules.json").exists()
    assert (out / "tokenizer_config.json").exists()
    model = transformers.BertModel.from_pretrained(out).eval()
    assert main(["inspect", str(out)]) == 0
    assert "12 structured layers" in capsys.readouterr().out
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "layers": 12, "parameters": model.num_parameters()}
    assert main(["merge", str(out), str(merged)]) == 0
    dense = transformers.BertModel.from_pretrained(merged).eval()
    assert type(dense.encoder.layer[0].attention.self.query) is torch.nn.Linear
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(dense(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["out", "made/here/out"])
def test_a_target_inside_the_source_is_no_part_of_it(name, source):
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    assert main(["compress", str(source), str(source / name), "--structure", "lowrank"]) == 0
    found = {str(path.relative_to(source / name)) for path in (source / name).rglob("*")}
    assert "1_Pooling/config.json" in found
    assert not any(part in path.split("/") for path in found for part in ("made", "out"))


def test_quantize_writes_integers(source, tmp_path, capsys):
    out, small = tmp_path / "out", tmp_path / "small"
    assert main(["compress", str(source), str(out), "--structure", "lowrank", "--ratio", "0.5"]) == 0
    card = (out / "README.md").read_text()  # as of a model of the hub
    (out / "README.md").write_text(card.replace("library_name", 'base_model: "me/tiny"\nlibrary_name'))
    assert main(["quantize", str(out), str(small), "--to", "int4", "--group", "16", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["format"] for row in rows} == {"int4"}
    assert sum(row["bytes_after"] for row in rows) < 0.3 * sum(row["bytes_before"] for row in rows)
    stored = load_file(small / "model.safetensors")
    assert {t.dtype for name, t in stored.items() if name.endswith("codes")} == {torch.uint8}
    assert main(["verify", str(small)]) == 0
    assert 'base_model: "me/tiny"' in (small / "README.md").read_text()
    assert "int4" in (small / "README.md").read_text()
    assert main(["merge", str(out), str(tmp_path / "merged")]) == 0
    assert not (tmp_path / "merged" / "README.md").exists()  # it has no structures


def test_a_plan_is_written_edited_and_carried_out(source, tmp_path, capsys):
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    assert main(["plan", str(source), str(plan), "--structure", "lowrank", "--exclude", "value"]) == 0
    record = json.loads(plan.read_text())
    next(layer for layer in record["layers"] if layer["name"].endswith("0.attention.self.query"))["structure"] = None
    plan.write_text(json.dumps(record))
    for option, value in (("exclude", "query"), ("ratio", "0.3"), ("structure", "monarch"), ("tied", "replace")):
        assert main(["compress", str(source), str(out), "--rules", str(plan), f"--{option}", value]) == 1
        assert f"a plan holds its {option} layer by layer; edit the plan" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["compress", str(source), str(out), "--rules", str(plan), "--json"]) == 0
    layers = {layer["name"]: layer for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert layers["encoder.layer.0.attention.self.query"]["structure"] is None
    assert layers["encoder.layer.1.attention.self.query"]["structure"].startswith("lowrank")
    assert layers["encoder.layer.1.attention.self.value"]["structure"] is None


def test_rules_are_read_as_settings_write_them(source, tmp_path, capsys):
    settings = Compression("lowrank", ratio=0.5, rules={"query": Monarch(blocks=4), "value": None})
    rules = tmp_path / "rules.json"
    for text, kept in ((json.dumps(settings.to_record()["rules"]), 0.3), (settings.changed(ratio=0.3).to_json(), 0.3)):
        rules.write_text(text)
        ratio = ["--ratio", "0.3", "--structure", "lowrank"] if "version" not in json.loads(text) else []
        assert main(["plan", str(source), "--rules", str(rules), "--json", *ratio]) == 0
        layers = {row["name"].split(".", 3)[-1]: row for row in json.loads(capsys.readouterr().out)["layers"]}
        assert layers["attention.self.query"]["structure"]["kind"] == "monarch"
        assert layers["attention.self.value"]["structure"] is None
        key = layers["attention.self.key"]
        assert key["structure"] == {"kind": "lowrank", "rank": int(kept * 64 * 64 / 128)}
    rules.write_text('{"query": null, "query": "lowrank"}')
    assert main(["plan", str(source), "--rules", str(rules)]) == 1
    assert "duplicate key 'query'" in capsys.readouterr().err


def test_json_lines_are_read(source, tmp_path, capsys):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text}) for text in ("a b c", "d e f", "g h")))
    arguments = ["--structure", "lowrank", "--calibration", str(lines), "--batch-size", "1"]
    assert main(["plan", str(source), *arguments]) == 0
    assert "fitted with statistics" in capsys.readouterr().out
    lines.write_text('{"txt": "a"}')
    assert main(["plan", str(source), *arguments]) == 1
    assert 'line 1: expected a string or an object with the string "text"' in capsys.readouterr().err


def test_what_belongs_to_a_folder_is_copied_and_nothing_else(source, tmp_path):
    (source / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    files = {
        "2_Dense/model.safetensors": True, "2_Dense/config.json": True, "1_Pooling/config.json": True,
        "vocabulary/more.txt": True, "onnx/model.onnx": False, "onnx/model.onnx_data": False, ".git/lfs/ab": False,
    }  # fmt: skip
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    assert main(["compress", str(source), str(tmp_path / "out"), "--structure", "lowrank"]) == 0
    assert {name: (tmp_path / "out" / name).exists() for name in files} == files
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card  # the path of a local folder is none, and nobody else's business
    assert str(tmp_path) not in card


def test_a_model_of_the_hub_needs_no_tokenizer(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(folders, "load_model", lambda name, **_: transformers.BertModel.from_pretrained(source))
    assert main(["compress", "me/tiny", str(tmp_path / "out"), "--structure", "lowrank"]) == 1  # before the work
    assert not (tmp_path / "out").exists()
    (tmp_path / "hub/models--me--tiny/refs").mkdir(parents=True)
    (tmp_path / "hub/models--me--tiny/refs/main").write_text("abc")
    snapshot = shutil.copytree(source, tmp_path / "hub/models--me--tiny/snapshots/abc")
    for path in snapshot.glob("*token*"):
        path.unlink()
    (snapshot / "preprocessor_config.json").write_text("{}")
    for command in ("compress", "merge", "quantize"):
        arguments = ["--structure", "lowrank"] if command == "compress" else []
        assert main([command, "me/tiny", str(tmp_path / command), *arguments]) == (command == "quantize")
    assert "the model has no structured layer to quantise" in capsys.readouterr().err
    assert (tmp_path / "compress" / "preprocessor_config.json").exists()
    assert (tmp_path / "merge" / "modules.json").exists()
    assert 'base_model: "me/tiny"' in (tmp_path / "compress" / "README.md").read_text()


def test_a_plan_makes_its_folder_before_the_work(source, tmp_path):
    assert main(["plan", str(source), str(tmp_path / "new" / "plan.json"), "--structure", "lowrank"]) == 0
    assert json.loads((tmp_path / "new" / "plan.json").read_text())["layers"]


@pytest.mark.parametrize("option", ["--samples", "--batch-size", "--max-length"])
@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_counts_are_from_1(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "model", option, value])
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "{source}", "{source}"], "is not empty; give a new folder"),
        (["compress", "{source}", "{tmp}/out", "--structure", "lowrnak"], "did you mean 'lowrank'"),
        (["compress", "{tmp}/nothing", "{tmp}/out"], "nothing"),
        (["verify", "{source}"], "structlin.json: missing"),
        (["plan", "{source}", "--rules", "{source}/modules.json"], "holds no JSON object"),
    ],
)
def test_refusals_exit_with_1_and_say_why(arguments, message, source, tmp_path, capsys):
    assert main([part.format(source=source, tmp=tmp_path) for part in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_evaluation_says_what_it_needs(source, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it was not installed
    assert main(["eval", str(source), "--tasks", "wikitext"]) == 1
    assert "lm_eval" in (said := capsys.readouterr().err)
    assert "pip install lm-eval" in said


def test_wrong_usage_exits_with_2():
    found = subprocess.run([sys.executable, "-m", "structlin.cli", "compress"], capture_output=True, check=False)
    assert found.returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo is tried on POSIX only")
def test_torchrun_writes_the_folder_of_one_process(source, tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["--structure", "lowrank", "--ratio", "0.5", "--block-epochs", "1", *texts(source)]
    assert main(["compress", str(source), str(one), *settings]) == 0
    alone = capsys.readouterr().out
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "structlin.cli"]
    command = [sys.executable, *launch, "compress", str(source), str(two), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    together = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert together.returncode == 0, together.stderr
    seconds = re.compile(r"\d+\.\d+( s)?$", re.MULTILINE)
    printed = [seconds.sub("", text.replace(str(to), "")) for text, to in ((alone, one), (together.stdout, two))]
    assert printed[0] == printed[1]
    assert "cosine" in printed[0]
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-6, equal_nan=True)
