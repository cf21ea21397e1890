"""The command line: structlin plan | compress | quantize | inspect | verify | merge | eval.

Exit codes: 0 done; 1 refused (a bad model, plan, text or folder; a checkpoint that is damaged), with the reason on
stderr; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from structlin.checkpoint import CheckpointError, bounded, verify
from structlin.compress import Compression, CompressionPlan, compress_model, plan_compression, quantize_, to_dense_
from structlin.compress.config import ALLOCATIONS, read_rule, with_settings
from structlin.compress.processes import ranks, shared

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
REFUSED = (ValueError, TypeError, OSError, RuntimeError, CheckpointError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: of the command line, None for those of the process.
    """
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except REFUSED as error:
        print(f"structlin {given.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# Commands ------------------------------------------------------------------------------------------------------------


def _plan(given: argparse.Namespace) -> None:
    if given.output:
        Path(given.output).parent.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    structure, settings = _settings(given)
    model = _folders().load_model(given.model, dtype=DTYPES.get(given.dtype), device=given.device)
    plan = plan_compression(model, structure, calibration=_calibration(given), **settings)
    if given.output:
        Path(given.output).write_text(plan.to_json() + "\n", "utf-8")
    print(plan.to_json() if given.json else plan)


def _compress(given: argparse.Namespace) -> None:
    with _process_group(given):
        _compress_here(given)


def _compress_here(given: argparse.Namespace) -> None:
    folders = _folders()
    target = Path(given.output)
    folders.check_free(target)  # before the work, not after it
    structure, settings = _settings(given)
    if given.stream or (given.device is None and shared(lambda: _is_large(given.model))):
        _stream(given, with_settings(structure, settings, "structlin compress"))
        return
    shared(lambda: folders.beside(given.model))
    model = folders.load_model(given.model, dtype=DTYPES.get(given.dtype), device=given.device)
    report = compress_model(model, structure, calibration=_calibration(given), **settings)
    shared(lambda: folders.save_folder(report.model, given.model, target, report))
    if ranks()[0] == 0:
        print(report.to_json() if given.json else f"{report}\nwritten to {target}")


@contextmanager
def _process_group(given: argparse.Namespace) -> Iterator[None]:
    """Join the processes that torchrun started, if it did: each has its own device, and the first one speaks."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    cuda = torch.device(given.device or "cpu").type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        given.device = "cuda"
    # The fits of one rank may take long; torchrun sees to it that none waits for one that has ended.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        if ranks()[0]:
            warnings.simplefilter("ignore")
        yield
    finally:
        dist.destroy_process_group()


def _stream(given: argparse.Namespace, config: Compression) -> None:
    streaming = importlib.import_module("structlin.integrations.streaming")
    report = streaming.stream_folder(
        given.model, Path(given.output), config, batches=_calibration(given) or (),
        dtype=DTYPES.get(given.dtype), device=given.device,
        run_dtype=DTYPES.get(given.run_dtype),
    )  # fmt: skip
    print(report.to_json() if given.json else f"{report}\nwritten to {given.output}")


def _is_large(source: str) -> bool:
    """Whether the weights of a local folder are larger than half of the free memory; says so on stderr."""
    size = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    except OSError:  # not on this system
        return False
    free = 1024 * int(next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), 0))
    if 2 * size <= free:
        return False
    print(
        f"{size / 2**30:.1f} GiB of weights are more than half of the free memory, {free / 2**30:.1f} GiB: going on as "
        "by --stream",
        file=sys.stderr,
    )
    return True


def _inspect(given: argparse.Namespace) -> None:
    summary = verify(given.folder)
    if given.json:
        print(json.dumps(asdict(summary), indent=2, default=dict))
        return
    for name, kind in summary.layers.items():
        print(f"{name or '(root)'}: {kind}")
    print(
        f"{len(summary.layers)} structured layers, {summary.parameters:,} entries, {summary.bytes / 2**20:.2f} MiB in "
        f"{len(summary.shards)} files, by structlin {summary.structlin_version}"
    )


def _verify(given: argparse.Namespace) -> None:
    summary = verify(given.folder, check_hashes=True)
    result = {"ok": True, "layers": len(summary.layers), "parameters": summary.parameters}
    print(json.dumps(result) if given.json else f"{given.folder}: {len(summary.layers)} structured layers, all right")


def _quantize(given: argparse.Namespace) -> None:
    folders = _folders()
    folders.check_free(Path(given.output))
    folders.beside(given.folder)
    model = folders.load_model(given.folder, dtype=DTYPES.get(given.dtype), device=None)
    report = quantize_(model, given.to, group=given.group, dense=given.dense)
    folders.save_folder(report.model, given.folder, Path(given.output), None)
    print(json.dumps([asdict(row) for row in report.layers]) if given.json else f"{report}\nwritten to {given.output}")


def _merge(given: argparse.Namespace) -> None:
    folders = _folders()
    folders.check_free(Path(given.output))
    folders.beside(given.folder)
    model = folders.load_model(given.folder, dtype=DTYPES.get(given.dtype), device=None)
    folders.save_folder(to_dense_(model), given.folder, Path(given.output), None)
    print(json.dumps({"output": given.output}) if given.json else f"written to {given.output}")


def _eval(given: argparse.Namespace) -> None:
    evaluation = _optional("evaluation", "lm-eval")
    results = evaluation.evaluate(
        given.folder, given.tasks, include=given.include, samples=given.samples, shots=given.shots,
        batch_size=given.batch_size, dtype=DTYPES.get(given.dtype), device=given.device,
    )  # fmt: skip
    print(json.dumps(results["results"], indent=2, default=str) if given.json else evaluation.shown(results))


# Arguments -----------------------------------------------------------------------------------------------------------


def _folders() -> Any:
    return _optional("folders", '"structlin[hf]"')


def _optional(module: str, package: str) -> Any:
    try:
        return importlib.import_module(f"structlin.integrations.{module}")
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; pip install {package}") from error


def _settings(given: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the structure, or a plan, and the settings that were given."""
    rules = bounded.parse(Path(given.rules).read_bytes()) if given.rules else {}
    if not isinstance(rules, dict):
        raise ValueError(f"{given.rules} holds no JSON object; give patterns with structures, settings or a plan")
    names = ("structure", "ratio", "exclude", "allocation", "tied", "block_epochs", "blocks")
    settings = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    if "layers" in rules:
        return CompressionPlan.from_record(rules).changed(**settings), {}
    if type(rules.get("version")) is int:  # no rule is one
        return Compression.from_record(rules).changed(**settings), {}
    rules = {pattern: read_rule(value) for pattern, value in rules.items()}
    return settings.pop("structure", "auto"), {"ratio": 0.5, "rules": rules, **settings}


def _calibration(given: argparse.Namespace) -> list[dict[str, Any]] | None:
    if not given.calibration:
        return None
    folders = _folders()
    texts = folders.read_texts(Path(given.calibration))[: given.samples]
    if not texts:
        raise ValueError(f"{given.calibration} holds no text")
    return folders.batches_of(given.model, texts, batch_size=given.batch_size, max_length=given.max_length)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("structlin", description="Compress models of transformers by structured layers.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="print JSON")
        added.set_defaults(run=run)
        return added

    for name, run, text in (
        ("plan", _plan, "Decide what each layer becomes, and change nothing."),
        (
            "compress",
            _compress,
            "Compress a model into a new folder, for transformers with structlin.hf.",
        ),
    ):
        added = command(name, run, text)
        added.add_argument("model", help="a local folder, or an id on the hub")
        if name == "plan":
            added.add_argument("output", nargs="?", help="write the plan here as JSON; compress takes it by --rules")
        else:
            added.add_argument("output", help="a new folder")
            added.add_argument(
                "--stream", action="store_true", help="open one block at a time; goes on where it stopped"
            )
            added.add_argument("--blocks", nargs="*", metavar="PATTERN", help="the model's blocks; default: found")
            added.add_argument("--run-dtype", choices=DTYPES, help="with --stream, of each block while it is at work")
            added.add_argument(
                "--block-epochs",
                type=int,
                help="of refinement, 0 for none; default 5 with calibration, 0 with --stream",
            )
        _add_settings(added)
    for name, run, text in (
        ("inspect", _inspect, "Show the structured layers of a compressed folder."),
        ("verify", _verify, "Check all names, sizes and (in folders of structlin.save) hashes of a compressed folder."),
        ("quantize", _quantize, "Store the factors of a compressed folder as integers, in a new folder."),
        ("merge", _merge, "Merge every structured layer back into a dense one, into a new folder."),
    ):
        added = command(name, run, text)
        added.add_argument("folder")
        if name == "quantize":
            added.add_argument("--to", choices=("int8", "int4"), default="int8")
            added.add_argument("--group", type=int, default=128, help="entries that share an int4 scale; default 128")
            added.add_argument("--dense", action="store_true", help="the dense layers too, but the output layer")
        if name in ("quantize", "merge"):
            added.add_argument("output", help="a new folder")
            added.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    added = command("eval", _eval, "Judge a language model, compressed or not, by tasks of lm-eval.")
    added.add_argument("folder", help="a local folder, or an id on the hub")
    added.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="of lm-eval, such as wikitext")
    added.add_argument("--include", metavar="FOLDER", help="further tasks as YAML")
    added.add_argument("--samples", type=_count, help="judge the first samples of each task only")
    added.add_argument("--shots", type=int, help="examples in front of each sample; default: each task's own number")
    added.add_argument("--batch-size", type=_count, default=8)
    added.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    added.add_argument("--device", help="such as cuda; default: the CPU")
    return parser


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--structure", help='a name, "a+b" for a sum, or auto (the default)')
    parser.add_argument("--ratio", type=float, help="parameters kept / dense; default 0.5")
    parser.add_argument("--rules", metavar="FILE", help="JSON: patterns with structures, settings or a plan")
    parser.add_argument("--exclude", nargs="*", metavar="PATTERN", help="layers that stay dense")
    parser.add_argument("--allocation", choices=ALLOCATIONS, help="default auto")
    parser.add_argument("--tied", choices=("skip", "replace"), help="default skip")
    parser.add_argument("--calibration", metavar="FILE", help='text lines, or JSON lines with "text"')
    parser.add_argument("--samples", type=_count, default=256, help="texts to take at most; default 256")
    parser.add_argument("--batch-size", type=_count, default=8)
    parser.add_argument("--max-length", type=_count, default=256, help="tokens of a text; default 256")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument("--device", help="such as cuda; default: the CPU")


if __name__ == "__main__":
    sys.exit(main())
