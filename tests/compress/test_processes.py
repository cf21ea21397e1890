"""Two processes that share the work of a compression come to what one comes to."""

import socket
import sys
import warnings

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn

import structlin
from structlin import Compression, collect_statistics, compress_model, plan_compression
from structlin.compress import fit_layers, pipeline, speed
from structlin.compress.data import Data
from structlin.compress.processes import dealt, follow, gathered, ranks, shared, spread, together
from structlin.compress.quality import Quality

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo by TCP is tried on POSIX only")
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Block(nn.Module):
    """Attention without heads, whose key bias no output depends on, and an MLP."""

    def __init__(self, size):
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.q, self.k, self.v, self.o = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.o((self.q(y) @ self.k(y).mT).softmax(-1) @ self.v(y))
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Blocks, a head that comes before another layer in the list of modules but last in a run, and that layer."""

    def __init__(self, blocks=2, size=16):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(size) for _ in range(blocks))
        self.head = nn.Linear(size, 12)
        self.rare = nn.Linear(size, size)

    def forward(self, x, way="often"):
        for layer in self.layers:
            x = layer(x)
        if way == "rare, by numpy":
            x = torch.from_numpy(x.numpy())
        return self.head(x if way == "often" else self.rare(x))


def batches(count, seed=1):
    torch.manual_seed(seed)
    return [torch.randn(4, 6, 16) * torch.logspace(0, -1, 16) for _ in range(count)]


def parameters(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def rows(report):
    return [(row.name, row.structure, row.reason, row.error, row.output_error, row.speed) for row in report.layers]


# What is done by one process and by two ------------------------------------------------------------------------------


def statistics(data):
    config = Compression("lowrank", ratio=0.5)
    found = pipeline.observe(pipeline.find(Model(), config, Data.gather(data, [], None, 0.1), False)).data.statistics
    shared_grams = [[name for name in found.grams if found.grams[name] is gram] for gram in found.grams.values()]
    return found.grams, found.output_grams, found.tokens, shared_grams


def grams(folder):
    return statistics(batches(5))


def fewer_batches(folder):
    """One batch, for two ranks: the second has none."""
    model = Model()
    report = compress_model(model, "lowrank", ratio=0.5, calibration=batches(1), validation=batches(1), block_epochs=1)
    return parameters(model), rows(report), report.qualities, statistics(batches(1))


def all_stages(folder):
    model = Model()
    report = compress_model(model, "auto", ratio=0.5, refine=20, calibration=batches(12), block_epochs=2)
    if ranks()[0] == 0:
        structlin.save(model, folder / "checkpoint")
    return parameters(model), rows(report), [block.after for block in report.blocks], report.qualities


def side_by_side(folder):
    """All layers in one group, from statistics, as a plan and a dry run of it."""
    model = Model()
    known = collect_statistics(model, batches(5))
    plan = plan_compression(model, "auto", ratio=0.5, refine=5, calibration=known)
    dry = compress_model(model, plan, dry_run=True)
    unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), Model().parameters(), strict=True))
    report = compress_model(model, plan)
    return parameters(model), plan.to_json(), rows(dry), rows(report), unchanged


def speedup(folder):
    """Rank 0 finds layers with 32 inputs slow, rank 1 all others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "time_ratio", lambda new, old, n: 1 + (old.in_features == 32) - 0.5 - ranks()[0])
        report = compress_model(Model(), "lowrank", ratio=0.5, require_speedup=True)
    return [(row.name, row.structure, row.speed) for row in report.layers]


def no_gradients(folder):
    """Gradients do not pass in the second batch, which rank 1 gets."""
    data = [(x, "rare, by numpy" if number == 1 else "often") for number, x in enumerate(batches(4))]
    with pytest.warns(UserWarning, match="fitted without the metric"):
        return statistics(data)


def failing(change, **patches):
    """Compress a model, and return the error and whether the model is as it was."""
    model = Model()
    data = batches(4)
    change(data)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in patches.items():
            patch.setattr(fit_layers, name, value)
        with pytest.raises((ValueError, RuntimeError)) as caught:
            compress_model(model, "lowrank", ratio=0.5, calibration=data, block_epochs=1)
    unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), Model().parameters(), strict=True))
    return type(caught.value).__name__, str(caught.value), unchanged


def failing_fit(folder):
    fit = fit_layers.fit

    def fails(weight, *args, **options):
        if weight.shape == (16, 32):  # only the rank that fits it sees it
            raise ArithmeticError("no fit")
        return fit(weight, *args, **options)

    return failing(lambda data: None, fit=fails)


def failing_batch(folder):
    return failing(lambda data: data[1].fill_(torch.nan))  # of those that are not held back, rank 1 has it


SCENARIOS = [grams, fewer_batches, all_stages, side_by_side, speedup, no_gradients, failing_fit, failing_batch]


# What only several do ------------------------------------------------------------------------------------------------


class OddError(Exception):
    """Cannot be sent: it needs two arguments."""

    def __init__(self, one, two):
        super().__init__(one)


def other_batches(folder):
    """Each rank has batches of its own."""
    return failing(lambda data: data[0].mul_(1 + ranks()[0]))


def primitives(folder):
    rank, size = ranks()
    assert list(dealt(range(5))) == list(range(5))[rank::size]
    assert gathered(lambda: rank) == [0, 1]
    assert shared(lambda: f"from {rank}") == "from 0"
    assert together(lambda: rank) == rank
    shares = spread(lambda mine: [(rank, item) for item in mine], "abcde", [1, 9, 4, 4, 0])
    assert [item for _, item in shares] == list("abcde")
    assert [owner for owner, _ in shares] == [1, 0, 1, 1, 0]
    assert spread(list, [], []) == []
    halves = torch.full((2,), rank + 0.5, dtype=torch.bfloat16)
    follow([halves])
    assert halves.tolist() == [0.5, 0.5]

    def odd():
        if rank == 1:
            raise OddError("of rank 1", 2)

    for call in (gathered, together):
        with pytest.raises(RuntimeError, match="OddError: of rank 1"):
            call(odd)
    with pytest.raises(Exception, match="pickle"):
        gathered(lambda: odd if rank == 1 else None)
    with pytest.raises(KeyError, match="of rank 0"):
        shared(lambda: {}["of rank 0"])


def _rank(rank, port, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for scenario in [*SCENARIOS, other_batches, primitives]:
        torch.save(scenario(folder), folder / f"{scenario.__name__}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each of two ranks got."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (port, folder), nprocs=2)
    return folder


def found_by(rank, scenario, folder):
    return torch.load(folder / f"{scenario.__name__}.{rank}", weights_only=False)


def assert_same(one, other):
    """Compare numbers and tensors to 1e-6, all else exactly."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
    if isinstance(one, dict | list | tuple):
        assert len(one) == len(other)
        values = [list(x.values() if isinstance(x, dict) else x) for x in (one, other)]
        for ours, theirs in zip(*values, strict=True):
            assert_same(ours, theirs)
    elif isinstance(one, Quality):
        assert_same(vars(one), vars(other))
    elif isinstance(one, torch.Tensor | float):
        torch.testing.assert_close(other, one, **CLOSE)
    else:
        assert one == other


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_two_ranks_find_what_one_process_finds(scenario, folder, tmp_path):
    alone = scenario(tmp_path)
    for rank in (0, 1):
        assert_same(alone, found_by(rank, scenario, folder))
    if scenario is all_stages:
        one, two = (
            safetensors.torch.load_file(next((f / "checkpoint").glob("*.safetensors"))) for f in (tmp_path, folder)
        )
        assert_same(one, two)


def test_what_is_compared_has_all_stages(folder):
    _, found, blocks, qualities = found_by(0, all_stages, folder)
    assert len({structure for _, structure, *_ in found}) > 4
    assert len(blocks) == 3
    assert len(qualities) == 2
    grams, output_grams, tokens, sharing = found_by(1, fewer_batches, folder)[-1]
    assert sharing[1] == ["layers.0.q", "layers.0.k", "layers.0.v"]
    assert output_grams["layers.1.up"].any()
    assert (tokens["layers.1.up"], tokens["rare"]) == (24, 0)
    grams, output_grams, tokens, _ = found_by(1, no_gradients, folder)
    assert not output_grams
    assert (tokens["layers.1.up"], tokens["rare"]) == (96, 24)
    assert grams["rare"].any()
    assert all(found_by(1, side_by_side, folder)[-1:])


def test_an_error_of_one_rank_is_raised_on_all(folder):
    for rank in (0, 1):
        kind, text, unchanged = found_by(rank, failing_fit, folder)
        assert (kind, unchanged) == ("RuntimeError", True)
        assert text.startswith("layer 'layers.0.down': no fit")
        kind, text, unchanged = found_by(rank, failing_batch, folder)
        assert (kind, unchanged) == ("ValueError", True)
        assert "NaN or infinite inputs" in text


def test_every_rank_must_have_all_batches(folder):
    for rank in (0, 1):
        kind, text, unchanged = found_by(rank, other_batches, folder)
        assert (kind, unchanged) == ("ValueError", True)
        assert text.startswith("rank 1 has other batches than rank 0; give every rank the same model and all batches")


def test_rank_0_decides_what_is_faster(folder):
    assert {name for name, structure, _ in found_by(1, speedup, folder) if structure is None} == {
        "layers.0.down", "layers.1.down", "rare",
    }  # fmt: skip


def test_all_is_well_within_the_ranks(folder):
    assert found_by(1, primitives, folder) is None
