"""Folders compressed block by block: the same bytes as in memory, and after any kill."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import structlin
from structlin.checkpoint import CheckpointError
from structlin.compress import Compression, fit_layers, plan_compression

transformers = pytest.importorskip("transformers")

from structlin.cli import main  # noqa: E402
from structlin.integrations import folders, streaming  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}


def llama(**settings):
    config = transformers.LlamaConfig(
        vocab_size=40, intermediate_size=96, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **SIZES, **settings
    )
    return transformers.LlamaForCausalLM(config)


def bert(cls="BertModel"):
    config = transformers.BertConfig(vocab_size=40, intermediate_size=64, **SIZES)
    return getattr(transformers, cls)(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_positions=64, n_embd=32, n_layer=3, n_head=4)
    config.bos_token_id = config.eos_token_id = 1
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "llama": llama,
    "tied, bfloat16": lambda: llama(tie_word_embeddings=True, dtype="bfloat16").bfloat16(),
    "bert": bert,
    "maps after the blocks": lambda: bert("BertForMaskedLM"),
    "gpt2": gpt2,  # Conv1D, whose leaves are opened
}


def folder_of(model, folder):
    model.eval().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def batches():
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return [{"input_ids": torch.randint(3, 40, (2, 12)), "attention_mask": mask} for _ in range(3)]


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def check_same(folder, expected):
    ours, theirs = tensors(folder), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].nan_to_num(7), tensor.nan_to_num(7)), name
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).exists() == (expected / name).exists()
        if (folder / name).exists():
            assert json.loads((folder / name).read_text()) == json.loads((expected / name).read_text())


def in_memory(source, target, calibration=None, structure="lowrank", **settings):
    model = folders.load_model(str(source), dtype=None, device=None)
    settings = {"output_metric": False, "allocation": "uniform", "block_epochs": 0, **settings}
    given = {"calibration": calibration, "validation": []} if calibration else {}
    report = structlin.compress_model(model, structure, ratio=0.5, **given, **settings)
    folders.save_folder(report.model, str(source), target, report)
    return report


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_that_of_the_model_in_memory(name, calibrated, tmp_path):
    model = MODELS[name]()
    source = folder_of(model, tmp_path / "dense")
    given = batches() if calibrated else []
    expected = in_memory(source, tmp_path / "memory", given)
    report = streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5), batches=given)
    check_same(tmp_path / "small", tmp_path / "memory")
    assert report.coverage == expected.coverage
    assert [(r.name, r.structure, r.error) for r in report.layers] == [
        (r.name, r.structure, r.error) for r in expected.layers
    ]
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    for key, value in loaded.state_dict().items():
        assert not value.isnan().any(), key
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("option", [0, 1], ids=["structured", "dense"])
def test_hidden_units_are_those_of_the_model_in_memory(option, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_layers, "_best", lambda options, part, patched: options[option])
    source, config = folder_of(llama(), tmp_path / "dense"), Compression("auto", ratio=0.5, refine=2)
    expected = in_memory(source, tmp_path / "memory", batches(), "auto", refine=2)
    report = streaming.stream_folder(str(source), tmp_path / "small", config, batches=batches())
    check_same(tmp_path / "small", tmp_path / "memory")
    assert any(entry.sizes for entry in report.compression.entries)
    assert [row.output_error for row in report.layers] == [row.output_error for row in expected.layers]


@pytest.mark.parametrize("killed", [False, True])
def test_large_layers_race_once_as_in_memory(killed, tmp_path, monkeypatch):
    monkeypatch.setattr(fit_layers, "SMALL", 0)
    source = folder_of(llama(), tmp_path / "dense")
    config = Compression("auto", ratio=0.5, refine=40, hidden_units=False)
    in_memory(source, tmp_path / "memory", batches(), structure="auto", refine=40, hidden_units=False)
    raced, size = [], fit_layers.size_layer

    def size_layer(target, choice, *args):
        raced.append((target.name, isinstance(choice, str) or len(choice.structure)))
        if killed and len(raced) == 10:  # in the second block
            raise KilledError
        return size(target, choice, *args)

    monkeypatch.setattr(fit_layers, "size_layer", size_layer)
    for _ in range(1 + killed):
        with suppress(KilledError):
            streaming.stream_folder(str(source), tmp_path / "small", config, batches=batches())
    check_same(tmp_path / "small", tmp_path / "memory")
    assert {count for name, count in raced if "layers.1.self_attn.q_proj" in name} == {2}


def test_tied_weights_count_once(tmp_path):
    source = folder_of(llama(tie_word_embeddings=True), tmp_path / "dense")
    expected = in_memory(source, tmp_path / "memory", tied="replace")
    config = Compression("lowrank", ratio=0.5, tied="replace")
    assert streaming.stream_folder(str(source), tmp_path / "small", config).coverage == expected.coverage


def test_blocks_are_refined(tmp_path):
    source = folder_of(llama(), tmp_path / "dense")
    config = Compression("lowrank", ratio=0.5, block_epochs=2)
    report = streaming.stream_folder(str(source), tmp_path / "small", config, batches=batches())
    assert [block.name for block in report.blocks] == [f"model.layers.{k}" for k in range(3)]
    assert all(block.after < block.before for block in report.blocks)
    norm = tensors(tmp_path / "small")["model.layers.1.input_layernorm.weight"]
    assert not torch.equal(norm, torch.ones(32))


def test_blocks_of_half_precision_run_in_float32(tmp_path):
    model = llama(dtype="bfloat16").bfloat16()
    source = folder_of(model, tmp_path / "dense")
    config = Compression("lowrank", ratio=0.5)
    report = streaming.stream_folder(
        str(source), tmp_path / "small", config, batches=batches(), run_dtype=torch.float32
    )
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors(tmp_path / "small").values() if tensor.ndim > 1)
    loaded = type(model).from_pretrained(tmp_path / "small").eval()
    assert loaded.dtype == torch.bfloat16
    assert report.bytes_after == 2 * loaded.num_parameters()
    wide = llama()
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected = structlin.compress_model(
        wide, "lowrank", ratio=0.5, calibration=batches(), validation=[], output_metric=False, allocation="uniform",
        block_epochs=0,
    )  # fmt: skip
    for ours, theirs in zip(report.layers, expected.layers, strict=True):
        assert (ours.output_error or 0) == pytest.approx(theirs.output_error or 0, rel=0.02)


def test_an_encoder_and_a_decoder_are_two_chains(tmp_path):
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    source = folder_of(transformers.T5ForConditionalGeneration(config), tmp_path / "dense")
    given = [{**batch, "decoder_input_ids": batch["input_ids"][:, :5]} for batch in batches()]
    in_memory(source, tmp_path / "memory", given)
    streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5), batches=given)
    check_same(tmp_path / "small", tmp_path / "memory")


@pytest.mark.parametrize("calibrated", [False, True])
def test_blocks_are_freed(calibrated, tmp_path, monkeypatch):
    source = folder_of(llama(), tmp_path / "dense")
    before = {id(found) for found in gc.get_objects() if isinstance(found, torch.Tensor)}
    add, sizes, tables = streaming.Journal.add, [], []

    def measured(self, shard, *args):
        live = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta and id(t) not in before]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in live}
        sizes.append(sum(storages.values()))
        tables.append(any(t.shape == (40, 32) for t in live))  # of tokens and of the output layer
        add(self, shard, *args)

    monkeypatch.setattr(streaming.Journal, "add", measured)
    given = batches() if calibrated else []
    streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5), batches=given)
    assert tables == [calibrated] * 3 + [True]  # nothing runs without batches
    assert max(sizes[1:3]) < 1.1 * sizes[0]
    assert sizes[3] < 1.1 * sizes[0] or not calibrated


# Kills ---------------------------------------------------------------------------------------------------------------


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_killed_run_goes_on_and_does_no_layer_again(calibrated, tmp_path, monkeypatch):
    source = folder_of(llama(), tmp_path / "dense")
    given, config = batches() if calibrated else [], Compression("lowrank", ratio=0.5)
    streaming.stream_folder(str(source), tmp_path / "whole", config, batches=given)
    journal = tmp_path / ".small.structlin-unfinished" / "journal.jsonl"
    sync, fit = os.fsync, fit_layers.fit_layer
    left, fitted = [0], []

    def fsync(handle):
        left[0] -= 1
        if not left[0]:
            raise KilledError
        sync(handle)

    def fit_layer(entry, *args):
        fitted.append(entry.name)
        return fit(entry, *args)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(fit_layers, "fit_layer", fit_layer)
    for point in (1, 2, 3, 4, 5, 6, 7, 4, 5, 3, 9, 8, 12, 1, 2, 3, 0):
        done = []
        if journal.exists():
            with journal.open("a") as file:
                file.write('{"part": "torn')
            lines = [json.loads(line) for line in journal.read_text().splitlines()[1:-1]]
            done = [row["name"] for line in lines for row in line["rows"]]
        fitted.clear()
        left[0] = point
        try:
            streaming.stream_folder(str(source), tmp_path / "small", config, batches=given)
        except KilledError:
            assert not (tmp_path / "small").exists()
        else:
            break
        assert not set(fitted) & set(done)
    assert not set(fitted) & set(done)
    assert done
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "small").iterdir())
    for name in files:
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


KILL = """
import os, signal, sys
from structlin.checkpoint import journal
from structlin.cli import main
from structlin.compress import fit_layers
add, fit, left = journal.Journal._append, fit_layers.fit_layer, int(sys.argv[1])
def append(self, line):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, line)
def fit_layer(entry, *args):
    os.write(1, f"fits {entry.name}\\n".encode())  # at once, by one call: there are threads, and kills
    return fit(entry, *args)
journal.Journal._append, fit_layers.fit_layer = append, fit_layer
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_kill_9(tmp_path):
    source = folder_of(llama(), tmp_path / "dense")
    arguments = ["compress", str(source), str(tmp_path / "small"), "--stream", "--structure", "lowrank"]
    names = []
    for point in (3, 2, 0):
        command = [sys.executable, "-c", KILL, str(point), *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == (-signal.SIGKILL if point else 0), run.stderr
        names += [line for line in run.stdout.splitlines() if line.startswith("fits model.layers.")]
    assert len(names) == 3 * 7 + 2 * 7  # each kill loses the block whose line was not written
    in_memory(source, tmp_path / "memory")
    check_same(tmp_path / "small", tmp_path / "memory")


def test_unfinished_work_of_other_settings_is_refused(tmp_path, monkeypatch):
    source = folder_of(llama(), tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setattr(streaming.Journal, "finish", lambda self: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5))
    with pytest.raises(CheckpointError, match="unfinished work of another model, text or setting"):
        streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.25))
    dense = next(source.glob("*.safetensors"))
    times = dense.stat().st_atime_ns, dense.stat().st_mtime_ns
    os.utime(dense, ns=(times[0], times[1] + 1_000_000))  # trained further, in as many bytes
    with pytest.raises(CheckpointError, match="unfinished work of another model, text or setting"):
        streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5))
    os.utime(dense, ns=times)
    shard = tmp_path / ".small.structlin-unfinished" / "model" / "model-00002-of-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5))


# Refusals ------------------------------------------------------------------------------------------------------------


def refused(source, tmp_path, match, *, kind=ValueError, given=(), **settings):
    config = settings.pop("config", None) or Compression("lowrank", ratio=0.5, **settings)
    with pytest.raises(kind, match=match):
        streaming.stream_folder(str(source), tmp_path / "out", config, batches=given)


def test_a_target_with_files_is_refused_before_the_work(tmp_path):
    source = folder_of(llama(), tmp_path / "dense")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(source, tmp_path, "is not empty; give a new folder", kind=FileExistsError)
    assert not list(tmp_path.glob(".out*"))


def test_models_without_blocks_or_with_converted_names_are_refused(tmp_path):
    one = bert()
    one.encoder.layer = one.encoder.layer[:1]
    one.config.num_hidden_layers = 1
    one.save_pretrained(tmp_path / "one")
    refused(tmp_path / "one", tmp_path, "no list of two or more blocks .* blocks=")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=40, num_local_experts=2, num_key_value_heads=2, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    refused(tmp_path / "mixtral", tmp_path, "converts or renames tensors of this Mixtral", kind=CheckpointError)
    albert = transformers.AlbertConfig(vocab_size=40, embedding_size=16, intermediate_size=32, **SIZES)
    transformers.AlbertModel(albert).save_pretrained(tmp_path / "albert")
    refused(tmp_path / "albert", tmp_path, "no list of two or more blocks")


def test_what_needs_the_whole_model_or_batches_is_refused(tmp_path):
    source = folder_of(llama(), tmp_path / "dense")
    refused(source, tmp_path, "allocation='global' runs the whole model", allocation="global")
    for setting in ({"block_epochs": 3}, {"sequential": True}):
        refused(source, tmp_path, "sequential=True and block or model epochs run the model: pass calib", **setting)
    plan = plan_compression(llama(), "lowrank", ratio=0.5, calibration=batches(), validation=[])
    refused(source, tmp_path, "made with statistics of the whole model", config=plan)
    in_memory(source, tmp_path / "compressed")
    refused(tmp_path / "compressed", tmp_path, "compressed already", kind=CheckpointError)
    other = {name: tensor for name, tensor in llama().state_dict().items() if "layers.1" not in name}
    llama().save_pretrained(tmp_path / "partial", state_dict=other)
    refused(tmp_path / "partial", tmp_path, "'model.layers.1.* is not in the folder", kind=CheckpointError)


def test_a_plan_is_carried_out(tmp_path):
    source = folder_of(llama(), tmp_path / "dense")
    with torch.device("meta"):
        skeleton = llama()
    plan = plan_compression(skeleton, "lowrank", ratio=0.5, exclude=["*.1.*"])
    report = streaming.stream_folder(str(source), tmp_path / "small", plan)
    assert {row.name for row in report.layers if row.structure} == {e.name for e in plan.entries if e.structure}
    assert report.compression.entries == plan.entries


def test_several_processes_are_refused(tmp_path, monkeypatch):
    source = folder_of(llama(), tmp_path / "dense")
    monkeypatch.setattr(streaming, "ranks", lambda: (1, 2))
    with pytest.raises(ValueError, match=r"2 processes cannot stream a model together; run one, without torchrun, or"):
        streaming.stream_folder(str(source), tmp_path / "small", Compression("lowrank", ratio=0.5))


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_streams_large_models_by_itself(tmp_path, capsys, monkeypatch):
    source = folder_of(llama(), tmp_path / "dense")
    read_text = Path.read_text

    def read(path, *args, **kwargs):
        return "MemTotal: 9 kB\nMemAvailable: 200 kB\n" if path.name == "meminfo" else read_text(path, *args, **kwargs)

    def stop(*args, **kwargs):
        raise ValueError("streamed")

    monkeypatch.setattr(streaming, "compress_stream", stop)
    monkeypatch.setattr(Path, "read_text", read)
    assert main(["compress", str(source), str(tmp_path / "out"), "--structure", "lowrank"]) == 1
    error = capsys.readouterr().err
    assert "more than half of the free memory" in error
    assert "streamed" in error
