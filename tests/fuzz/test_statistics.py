"""Attacks on statistics: mutated files, and fits of all kinds of weights to all kinds of Grams."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from structlin import Statistics, collect_statistics
from structlin.fitting.fit import Fit, fit
from structlin.runtime.contract import to_dense
from structlin.structures import families, family

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
EXPECTED = re.compile(  # what a fit may answer, and nothing else
    "holds NaN or infinite|on its diagonal; give sum|is not Hermitian|has negative eigenvalues"
    "|no .* structure of a|approximates the weight by entries up to|the norm of the weight exceeds"
)
REFUSED = {"negative", "asymmetric", "antisymmetric", "nan", "inf", "hollow"}  # Grams, whatever the shape
SLACK = {torch.float16: 0.05, torch.bfloat16: 0.1}  # of a relative error of 1, by rounded factors


def weight_of(attack, rows: int, columns: int, dtype: torch.dtype) -> tuple[str, Tensor]:
    """A weight of one kind, its largest entry at any scale that the dtype has."""
    good = ["random", "low rank", "zero", "constant", "repeated", "one"]
    kind = attack.random.choice(good if attack.random.random() < 0.95 else ["nan", "inf"])
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weight = torch.randn(rows, columns, dtype=wide)
    if kind == "low rank":
        weight = weight[:, :1] @ torch.randn(1, columns, dtype=wide)
    elif kind == "zero":
        weight = torch.zeros_like(weight)
    elif kind == "constant":
        weight = torch.ones_like(weight)
    elif kind == "repeated":
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        weight = left @ right
    elif kind == "one":
        weight = torch.zeros_like(weight)
        weight[attack.random.randrange(rows), attack.random.randrange(columns)] = 1
    limits = torch.finfo(dtype)
    extremes = [limits.max, limits.max / 4, limits.tiny, limits.tiny * 16, math.sqrt(limits.max), 1.0, 1.0, 0.02]
    scale = attack.random.choice([*extremes, 10.0 ** attack.random.uniform(-300, 300)])
    scale = min(max(scale, limits.tiny), limits.max / (1.5 if dtype.is_complex else 1))
    weight = weight / weight.abs().max().clamp_min(1e-300) * scale
    weight = (weight.clamp(-limits.max, limits.max) if not dtype.is_complex else weight).to(dtype)
    if kind in ("nan", "inf"):
        weight[0, -1] = float(kind)
    return kind, weight


def gram_of(attack, size: int, dtype: torch.dtype) -> tuple[str, Tensor | None]:
    """A Gram of one kind, at any scale that float32 or float64 has."""
    good = ["none", "good", "singular", "zero", "diagonal"]
    kind = attack.random.choice(good if attack.random.random() < 0.8 else ["indefinite", *sorted(REFUSED)])
    if kind == "none":
        return kind, None
    x = torch.randn(3 * size if kind != "singular" else attack.random.randint(1, size), size, dtype=torch.float64)
    gram = x.T @ x
    if kind == "zero":
        gram = torch.zeros_like(gram)
    elif kind == "diagonal":
        gram = torch.diag(torch.rand(size, dtype=torch.float64))
    elif kind == "indefinite":
        gram = torch.ones_like(gram) + gram.diagonal().mean() * (torch.ones_like(gram) - torch.eye(size).double())
    elif kind == "negative":
        gram = -gram
    elif kind == "asymmetric":
        gram = gram + gram.abs().max() * torch.rand_like(gram).triu(1)
    elif kind == "antisymmetric":
        gram = gram.triu(1) - gram.triu(1).T
    elif kind == "hollow":
        gram = gram - torch.diag(gram.diagonal())
    narrow = attack.random.random() < 0.5
    most = 36 if narrow else 290
    gram = gram / gram.abs().max().clamp_min(1e-300) * 10.0 ** attack.random.uniform(-most, most)
    if kind in ("nan", "inf"):
        gram[-1, 0] = float(kind)
    gram = gram.to(torch.float32 if narrow else torch.float64)
    return kind, gram.to(gram.dtype.to_complex()) if dtype.is_complex else gram


def agrees(found: Fit, weight: Tensor) -> bool:
    """Whether `found.error` is the error of the matrix that the factors make."""
    wide = torch.complex128 if weight.is_complex() else torch.float64
    dense, weight = to_dense(found.spec, [factor.to(wide) for factor in found.factors]), weight.to(wide)
    largest = weight.abs().max().clamp_min(1e-323)
    scale = 2.0 ** -min(max(math.frexp(largest.item())[1], -1020), 1020)
    total = torch.linalg.vector_norm(weight * scale).item()
    error = torch.linalg.vector_norm((weight - dense) * scale).item()
    return found.error == pytest.approx(error / total if total else 0.0, rel=1e-3, abs=1e-6)


def test_fits_of_all_kinds_of_weights_and_grams(attack):
    names = sorted(families())
    for number in attack.rounds(80, 7000):
        name, dtype = names[number % len(names)], attack.random.choice(DTYPES)
        rows, columns = (attack.random.choice([4, 6, 8, 9, 12]) for _ in range(2))
        kind, weight = weight_of(attack, rows, columns, dtype)
        (left, gram), (right, metric) = gram_of(attack, columns, dtype), gram_of(attack, rows, dtype)
        if metric is not None and attack.random.random() < 0.3:
            metric, right = metric.diagonal().real.clone(), f"{right} diagonal"
        try:
            found = fit(weight, family(name), ratio=0.9, gram=gram, output_gram=metric, refine=3)
        except ValueError as error:
            reason = EXPECTED.search(str(error))
            if reason is None:
                raise
            attack.count(reason[0])
            continue
        assert kind not in ("nan", "inf")
        assert not {left, right} & REFUSED, (left, right)
        assert all(torch.isfinite(factor).all() for factor in found.factors), (name, kind, left, right)
        assert agrees(found, weight), (name, kind, left, right)
        judged = found.minimised
        assert 0 <= judged <= 1 + SLACK.get(dtype, 0.01), (name, kind, left, right, judged, weight.dtype)
        attack.count("fitted")


# Files ---------------------------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two layers with one input, one with another, and one that is never called."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.q, self.k, self.o, self.idle = (nn.Linear(3, 3, dtype=dtype) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x) * self.k(x))


def stored(attack, path: Path) -> tuple[Statistics, bytes]:
    """Statistics of one kind, and their file."""
    dtype = attack.random.choice([torch.float32, torch.complex64])
    loss = attack.random.choice([None, lambda y, batch: y.abs().square().sum()])
    output = attack.random.choice(["full", "diagonal"])
    x = torch.randn(5, 3, dtype=dtype)
    made = collect_statistics(Shared(dtype), [x], loss=loss, output=output, dtype=torch.float64)
    made.save(path)
    return made, path.read_bytes()


def mutated(attack, content: bytes) -> tuple[str, bytes]:
    """A file that is damaged by accident or edited by hand; the checksum stays as it was."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    record = json.loads(header["__metadata__"]["structlin_statistics"])
    random, kind = attack.random, attack.random.choice(["flip", "flip", "cut", "bytes", "swap", "nan", "shape", "edit"])
    if kind == "flip":
        place = random.randrange(len(content))
        return kind, content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
    if kind == "cut":
        place = random.randrange(len(content))
        return kind, content[:place] + (b"" if random.random() < 0.5 else bytes(len(content) - place))
    if kind == "bytes":
        place, count = random.randrange(len(content)), random.randint(1, 16)
        return kind, content[:place] + random.randbytes(count) + content[place + count :]
    keys = [key for key in header if key != "__metadata__"]
    if kind == "swap":
        names = random.choice([record["grams"], record["tokens"]])
        a, b = random.sample(sorted(names), 2)
        names[a], names[b] = names[b], names[a]
    elif kind == "nan":
        place = 8 * random.randrange(len(data) // 8)
        data = data[:place] + struct.pack("<d", random.choice([math.nan, math.inf, -1.0, 0.0])) + data[place + 8 :]
    elif kind == "shape":
        entry = header[random.choice(keys)]
        entry["shape"] = random.choice([entry["shape"][::-1], [math.prod(entry["shape"])], [1, *entry["shape"]]])
    else:
        field = random.choice(sorted(record))
        record[field] = random.choice([None, {}, [], 1, 2, 3, "", {"q": "0"}, {"q": 5}, ["0"], True])
        if random.random() < 0.3:
            del record[field]
    header["__metadata__"]["structlin_statistics"] = json.dumps(record)
    text = json.dumps(header).encode()
    return kind, struct.pack("<Q", len(text)) + text + data


def same(a: Statistics, b: Statistics) -> bool:
    fields = ((x.grams, x.output_grams, x.cross_grams) for x in (a, b))
    return dict(a.tokens) == dict(b.tokens) and all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
        for left, right in zip(*fields, strict=True)
    )


def test_mutated_statistics_files_load_equal_or_not_at_all(attack, tmp_path):
    path = tmp_path / "statistics"
    for _ in attack.rounds(80, 3000):
        made, content = stored(attack, path)
        kind, other = mutated(attack, content)
        path.write_bytes(other)
        try:
            found = Statistics.load(path)
        except ValueError as error:
            assert re.match(f"{path}: not a file of Statistics.save, or damaged: ", str(error))  # noqa: PT017
            attack.count(f"{kind} refused")
        else:
            assert same(found, made), kind
            assert kind != "flip", "a flip was overlooked"
            attack.count(f"{kind} equal")


def test_every_single_bit_of_a_file_counts(attack, tmp_path):
    path = tmp_path / "statistics"
    for _ in attack.rounds(1, 2):
        _, content = stored(attack, path)
        for place in range(0, 8 * len(content), 1 if attack.long else 101):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            with pytest.raises(ValueError, match=r"not a file of Statistics.save, or damaged"):
                Statistics.load(path)
            attack.count("refused")
