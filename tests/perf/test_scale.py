"""The table of scale: bytes and models by formula; measured times beside them, not among them."""

import itertools

import collectives
import pandas as pd
import plot_scale
import pytest
import scale
import torch
from collectives import Network

KINDS = {"wire": "bytes", "model": "us", "measured": "us"}


@pytest.mark.parametrize(
    ("world_size", "channels", "gathered", "reduced"),
    [
        # 129 numbers: 1 other rank x 129 x 4 bytes; 2 x 1/2 x 129 x 8 bytes
        (2, 64, 516, 1032),
        # 4097 numbers: 255 other ranks x 4097 x 4 bytes; 2 x 255/256 x 4097 x 8 bytes
        (256, 2048, 4_178_940, 65_295.9375),
    ],
)
def test_bytes_are_those_worked_out_by_hand(world_size, channels, gathered, reduced):
    assert collectives.gather_bytes(world_size, channels) == gathered
    assert collectives.all_reduce_bytes(world_size, channels) == reduced


@pytest.mark.parametrize(
    ("world_size", "channels", "expected"),
    [
        # one node: 1 hop of 0.6 us; 516 and 1032 bytes at 225 bytes a nanosecond
        (2, 64, (7.202293, 7.202293, 7.804587, 7.809173)),
        # 32 nodes of 8: a ring has 31 hops of 2.7 us and 224 of 0.6 us, a tree 5 levels of 5 us
        # above 3 of 0.6 us; 4,178,940 and 65,295.9375 bytes at 25 bytes a nanosecond
        (256, 2048, (391.8576, 200.5576, 445.411838, 74.184427)),
    ],
)
def test_latencies_are_those_worked_out_by_hand(world_size, channels, expected):
    latencies = [getattr(collectives, name)(world_size, channels, Network()) for name in MODELS]
    assert latencies == pytest.approx(expected, abs=1e-6)


MODELS = ("gather_us", "gather_doubling_us", "all_reduce_ring_us", "all_reduce_tree_us")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [1, 64, 2048])
def test_latency_grows_with_the_ranks(name, channels):
    latencies = [getattr(collectives, name)(W, channels, Network()) for W in scale.WORLD_SIZES]
    assert latencies == sorted(set(latencies))


def test_a_tree_takes_as_much_longer_for_every_doubling_of_nodes():
    latencies = [collectives.all_reduce_tree_us(8 * 2**n, 512, Network()) for n in range(10)]
    steps = [after - before for before, after in itertools.pairwise(latencies)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize(("name", "passes"), [("gather_us", 1), ("all_reduce_ring_us", 2)])
def test_a_ring_takes_time_in_proportion_to_its_ranks(name, passes):
    """Once around for a gather, twice for an all_reduce, where hops are all that costs."""
    network = Network(
        ranks_per_node=1, start_us=0, infiniband_ring_hop_us=3, infiniband_gbytes_per_s=1e9
    )
    for world_size in (2, 64, 4096):
        latency = getattr(collectives, name)(world_size, 64, network)
        assert latency == pytest.approx(passes * 3 * (world_size - 1), rel=1e-6)


@pytest.mark.parametrize("name", ["gather_us", "gather_doubling_us"])
def test_a_gather_whose_hops_are_free_takes_its_bytes_over_the_bandwidth(name):
    network = Network(
        start_us=0, nvlink_hop_us=0, infiniband_ring_hop_us=0, infiniband_tree_hop_us=0
    )
    latency = getattr(collectives, name)(256, 2048, network)
    assert latency == pytest.approx(4_178_940 / 25e9 * 1e6)


def test_modelled_and_measured_numbers_are_in_columns_of_their_own(monkeypatch):
    """Other constants change the modelled columns and no other; other times the measured ones."""
    tables = []
    for network, time_us in ((Network(), 1.0), (Network(start_us=1000), 1.0), (Network(), 2.0)):
        monkeypatch.setattr(
            scale, "computed_us", lambda C, W, *rest, t=time_us: dict.fromkeys([None, *W], t)
        )
        tables.append(scale.scale_table([8], [2, 16], network=network).drop(columns="measured_on"))
    first, other_model, other_time = tables
    changed = [
        {column for column in first if not first[column].equals(other[column])}
        for other in (other_model, other_time)
    ]
    numbers = first.columns.drop(["channels", "world_size"])
    assert changed == [{c for c in numbers if c.startswith(kind)} for kind in ("model", "measured")]
    for column in numbers:
        kind = column.partition("_")[0]
        assert column.endswith(KINDS[kind])


def test_every_pair_of_channels_and_ranks_is_a_row():
    table = scale.scale_table([3, 5], [2, 4, 32], samples=2)
    assert list(zip(table.channels, table.world_size, strict=True)) == [
        *((3, 2), (3, 4), (3, 32)),
        *((5, 2), (5, 4), (5, 32)),
    ]
    assert (table.filter(like="measured_").select_dtypes("number") > 0).all(axis=None)
    assert (table.measured_on == "CPU").all()
    assert (table.groupby("channels").measured_all_reduce_finish_us.nunique() == 1).all()


def statistics_of_the_batch(device):
    """Of ranks with equal counts: the mean of means; the mean variance plus that of means."""
    gathered = scale._gathered_statistics(16, 7, device).double()
    means, rstds = gathered[:, :7], gathered[:, 7:14]
    variances = 1 / rstds**2 - scale.EPS
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def test_what_is_timed_makes_the_statistics_of_the_global_batch():
    device = torch.device("cpu")
    mean, variance, count = scale.gather_merge(16, 7, device)()
    assert count == 16_000
    torch.testing.assert_close((mean, variance), statistics_of_the_batch(device))


@pytest.mark.parametrize("world_size", [2, 16])
def test_operators_of_a_gpu_are_given_what_their_schemas_say(monkeypatch, world_size):
    """Shapes alone, on tensors without memory: the stock operator runs nowhere but on a GPU."""
    device, seen = torch.device("meta"), []
    monkeypatch.setattr(torch, "batch_norm_gather_stats_with_counts", lambda *a: seen.append(a))
    monkeypatch.setattr(
        scale, "_gathered_statistics", lambda W, C, device: torch.empty(W, 2 * C + 1, device=device)
    )
    scale.gather_merge(world_size, 7, device)()
    schema = torch.ops.aten.batch_norm_gather_stats_with_counts.default._schema
    given = dict(zip([argument.name for argument in schema.arguments], *seen, strict=True))
    assert given.pop("momentum") == scale.MOMENTUM
    assert given.pop("eps") == scale.EPS
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == {
        "input": (1, 7),
        "mean": (world_size, 7),
        "invstd": (world_size, 7),
        "running_mean": (7,),
        "running_var": (7,),
        "counts": (world_size,),
    }
    assert scale.all_reduce_finish(7, device)().shape == (1, 7)


@pytest.mark.gpu
def test_what_is_timed_on_a_gpu_makes_the_statistics_of_the_global_batch():
    device = torch.device("cuda")
    mean, rstd = scale.gather_merge(16, 7, device)()
    expected, variance = statistics_of_the_batch(device)
    # the operator adds up in float32
    torch.testing.assert_close(mean.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rstd.double(), (variance + scale.EPS).rsqrt(), atol=0, rtol=1e-5)
    table = scale.scale_table([64], [2, 4096], device)
    assert (table.filter(like="measured_").select_dtypes("number") > 0).all(axis=None)
    assert (table.measured_on == torch.cuda.get_device_name()).all()


def test_the_command_prints_the_constants_and_writes_what_it_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scale, "SAMPLES", 2)
    csv, plot = tmp_path / "results" / "scale.csv", tmp_path / "plots" / "scale.png"
    assert scale.main(["--channels", "8", "--csv", str(csv), "--plot", str(plot)]) == 0
    seen = capsys.readouterr().out
    for constant in ("ranks_per_node 8", "infiniband_gbytes_per_s 25", "nvlink_hop_us 0.6"):
        assert constant in seen
    rows = pd.read_csv(csv)
    assert rows.world_size.tolist() == [2**power for power in range(1, 13)]
    assert rows.wire_gather_bytes.iloc[-1] == 4095 * 17 * 4
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_every_number_of_the_table():
    columns = scale.scale_table([3], [2], samples=1).columns
    assert set(plot_scale.LINES) == set(columns) - {"channels", "world_size", "measured_on"}
