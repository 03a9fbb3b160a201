"""The table of scale: bytes by formula, and measured times of what follows a collective."""

import pytest
import torch
from measuring import scale
from report.plots import draw_scale

CPU = torch.device("cpu")


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
    assert scale.gather_bytes(world_size, channels) == gathered
    assert scale.all_reduce_bytes(world_size, channels) == reduced


def test_every_pair_of_channels_and_ranks_is_a_row():
    table = scale.scale_table(CPU, 2, channels=[3, 5], world_sizes=[2, 4, 32])
    assert list(zip(table.channels, table.world_size, strict=True)) == [
        *((3, 2), (3, 4), (3, 32)),
        *((5, 2), (5, 4), (5, 32)),
    ]
    assert (table.filter(like="_us") > 0).all(axis=None)
    assert (table.measured_on == "CPU").all()
    assert (table.groupby("channels").all_reduce_finish_us.nunique() == 1).all()


def statistics_of_the_batch(device):
    """Of ranks with equal counts: the mean of means; the mean variance plus that of means."""
    gathered = scale._gathered_statistics(16, 7, device).double()
    means, rstds = gathered[:, :7], gathered[:, 7:14]
    variances = 1 / rstds**2 - scale.EPS
    return means.mean(0), variances.mean(0) + means.var(0, correction=0)


def test_what_is_timed_makes_the_statistics_of_the_global_batch():
    mean, variance, count = scale.gather_merge(16, 7, CPU)()
    assert count == 16_000
    torch.testing.assert_close((mean, variance), statistics_of_the_batch(CPU))


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
    table = scale.scale_table(device, 20, channels=[64], world_sizes=[2, 4096])
    assert (table.filter(like="_us") > 0).all(axis=None)
    assert (table.measured_on == torch.cuda.get_device_name()).all()


def test_the_picture_has_every_number_of_the_table():
    table = scale.scale_table(CPU, 1, channels=[3, 5], world_sizes=[2, 8])
    drawn = [line.get_ydata().tolist() for axes in draw_scale(table).axes for line in axes.lines]
    numbers = table.filter(regex="_(bytes|us)$")
    assert sorted(drawn) == sorted(
        numbers[column][table.channels == channels].tolist()
        for column in numbers
        for channels in (3, 5)
    )


def test_the_table_goes_to_4096_ranks(monkeypatch):
    monkeypatch.setattr(scale, "computed_us", lambda C, W, *rest: dict.fromkeys([None, *W], 1.0))
    table = scale.scale_table(CPU, 1)
    assert sorted(set(table.world_size)) == [2**power for power in range(1, 13)]
    assert table.gather_bytes.iloc[-1] == 4095 * (2 * 2048 + 1) * 4
