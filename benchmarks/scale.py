"""Compress folders of Llamas with random weights block by block: seconds, peak memory, kills; and plan 70 B on meta.

    python benchmarks/scale.py --models 1B
    python benchmarks/scale.py --models "1B, 2 blocks" kills plan

Models: "1B" has 16 blocks of width 2048, "3B" 26 of width 3072 (both bfloat16, 32,000 tokens). 1B is compressed by low
rank at .5 with calibration on 8 x 512 tokens (random letters), 3B without. "kills" is 16 blocks of width 256, killed
ten times by SIGKILL at random points, and compared with a run that was not. "plan" plans Llama 70 B on the
meta device. Each runs in a process of its own; peak is its largest resident set, and the bar 4 x the largest linear map
in float32 + 1.5 GiB. Folders are made in --work and deleted. Blocks run and are fitted in float32 (--run-dtype), since
bfloat16 is slow on CPUs without units for it. Stores results/scale.jsonl and .md; rows of other models stay.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from _weights import RESULTS, environment, say, store

from structlin.compress import plan_compression

NAME = "scale"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
VOCABULARY = 32_000
SIZES = {  # width, blocks, calibration samples
    "1B": (2048, 16, 8), "1B, 2 blocks": (2048, 2, 1), "3B": (3072, 26, 0),
    "3B, 2 blocks": (3072, 2, 0), "kills": (256, 16, 2),
}  # fmt: skip
KILLS = 10
SHARED = ("machine", "threads", "python", "torch", "structlin")
COLUMNS = {
    "model": ("model", ""), "parameters": ("parameters", ","), "calibration": ("calibration", ""),
    "seconds": ("seconds", ".0f"), "seconds/block, second": ("second_block", ".1f"),
    "last": ("last_block", ".1f"), "peak MiB": ("peak", ".0f"), "bar MiB": ("bar", ".0f"), "kills": ("kills", ""),
    "same bytes": ("same", ""), "threads": ("threads", ""), "commit": ("commit", ""), "command": ("command", ""),
}  # fmt: skip


def make(folder: Path, width: int, blocks: int) -> None:
    """Write a folder with random weights and a tokenizer of letters, block by block of transformers' own shards."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks,
        num_attention_heads=width // 64, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def command(source: Path, target: Path, samples: int) -> list[str]:
    """Return the command that compresses a folder."""
    extra = ["--calibration", str(source) + ".txt", "--max-length", "512", "--batch-size", "1"] if samples else []
    settings = ["--stream", "--structure", "lowrank", "--ratio", "0.5", "--run-dtype", "float32"]
    return [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "structlin.cli",
        "compress",
        str(source),
        str(target),
        *settings,
        *extra,
    ]


def hashes(folder: Path) -> dict[str, str]:
    """Hash every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def watched(arguments: Sequence[str], target: Path) -> tuple[list[float], float]:
    """Run a command; return when each part was finished (seconds), and the peak resident set in MiB."""
    journal = journal_of(target)
    start, times, peak = time.perf_counter(), [0.0], 0.0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.2)
        status = Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()
        peak = max(peak, int(status[0]) / 1024 if status else 0.0)
        while len(times) < lines_of(journal):
            times.append(time.perf_counter() - start)
    if process.returncode:
        raise SystemExit(f"{arguments} failed: exit code {process.returncode}")
    return [*times, time.perf_counter() - start], peak


def killed(arguments: Sequence[str], target: Path, seconds: float) -> int:
    """Run a command to its end, killed ten times on the way, up to so many seconds after a part; return the kills."""
    journal = journal_of(target)
    random.seed(0)
    count = 0
    while True:
        before = lines_of(journal)
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.02)
            if count < KILLS and lines_of(journal) > max(before, 1):
                time.sleep(random.uniform(0, 0.8 * seconds))
                process.send_signal(signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return count
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"{arguments} failed: exit code {process.returncode}")
        count += 1


def journal_of(target: Path) -> Path:
    """Return the journal of unfinished work."""
    return target.with_name(f".{target.name}.structlin-unfinished") / "journal.jsonl"


def lines_of(journal: Path) -> int:
    """Count lines; the work may end meanwhile."""
    try:
        return journal.read_text().count("\n")
    except OSError:
        return 0


def measure(name: str, work: Path) -> dict[str, Any]:
    """Make, compress and delete one folder."""
    width, blocks, samples = SIZES[name]
    source, target = work / "dense", work / "small"
    subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--make", str(source), str(width), str(blocks)], check=True
    )
    letters = random.Random(0)
    texts = [" ".join(letters.choice(WORDS[5:]) for _ in range(510)) for _ in range(samples)]
    Path(f"{source}.txt").write_text("\n".join(texts))
    times, peak = watched(command(source, target, samples), target)
    steps = [b - a for a, b in itertools.pairwise(times)]
    parameters = VOCABULARY * width * 2 + blocks * (16 * width**2 + 2 * width) + width
    row = {
        "model": name, "parameters": parameters, "seconds": times[-1],
        "calibration": f"{samples} x 512" if samples else "none",
        "second_block": steps[1], "last_block": steps[blocks - 1], "peak": peak, "steps": steps,
        "bar": 4 * max(VOCABULARY * width, 4 * width**2) * 4 / 2**20 + 1536,
    }  # fmt: skip
    if name == "kills":
        expected = hashes(target)
        shutil.rmtree(target)
        row["kills"] = killed(command(source, target, samples), target, steps[2])
        row["same"] = "yes" if hashes(target) == expected else "no"
    shutil.rmtree(source)
    shutil.rmtree(target)
    return row


def plan() -> None:
    """Plan Llama 70 B on the meta device."""
    start = time.perf_counter()
    config = transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    found = plan_compression(model, "lowrank", ratio=0.5)
    assert sum(entry.structure is not None for entry in found.entries) == 7 * 80
    row = {"model": "plan of 70 B on meta", "parameters": model.num_parameters(), "calibration": "none", "bar": 2048}
    row |= {"seconds": time.perf_counter() - start}
    row |= {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    print(json.dumps(row))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["1B", "3B", "kills", "plan"], choices=[*SIZES, "plan"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.make:
        make(Path(args.make[0]), int(args.make[1]), int(args.make[2]))
        return
    if os.environ.get("STRUCTLIN_SCALE_PLAN"):
        plan()
        return
    path = RESULTS / f"{NAME}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    for name in args.models:
        say(name)
        if name == "plan":
            call = [sys.executable, "-W", "ignore", __file__]
            env = {**os.environ, "STRUCTLIN_SCALE_PLAN": "1"}
            row = json.loads(subprocess.run(call, check=True, capture_output=True, text=True, env=env).stdout)
        else:
            with tempfile.TemporaryDirectory(dir=args.work) as work:
                row = measure(name, Path(work))
        rows = [known for known in rows if known["model"] != row["model"]] + [row | environment(argv)]
        about = {key: value for key, value in rows[0].items() if key in SHARED and all(value == r[key] for r in rows)}
        notes = __doc__.partition("\n\n    python")[0] + "\n\n" + __doc__.rpartition("plan\n\n")[2].strip()
        store(RESULTS, NAME, "Checkpoints larger than memory", notes, about, rows, COLUMNS)


if __name__ == "__main__":
    main(sys.argv[1:])
