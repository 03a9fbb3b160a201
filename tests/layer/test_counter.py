"""num_batches_tracked, of any dtype that models come with."""

import pytest
import torch

from triton_syncbn import SyncBN

DTYPES = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batches_are_counted_in_its_dtype(dtype, momentum, everywhere):
    ours, theirs = SyncBN(2, momentum=momentum), torch.nn.BatchNorm1d(2, momentum=momentum)
    for layer in (ours, theirs):
        layer.num_batches_tracked = torch.tensor(5).to(dtype)
    for _ in range(2):
        input = torch.randn(6, 2)
        ours(input), theirs(input)
    assert ours.num_batches_tracked.dtype == dtype
    assert ours.num_batches_tracked == 7
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def cast(layer):
    return layer.type(torch.float32)


def loaded(layer):
    """An averaged checkpoint: what was an integer became a float."""
    state = {name: value.float() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    return layer


def averaged(layer):
    """As averages of models do: between two counts."""
    layer.num_batches_tracked = torch.tensor(2.5)
    return layer


@pytest.mark.parametrize("change", [cast, loaded, averaged])
def test_layers_as_people_have_them(change, everywhere):
    layer = change(SyncBN(3))
    before = float(layer.num_batches_tracked)
    layer(torch.randn(4, 3))
    assert float(layer.num_batches_tracked) == before + 1
    assert layer.num_batches_tracked.dtype == torch.float32


def test_an_empty_batch_of_a_group_does_not_count(reference_ranks, kernel_ranks):
    for ranks in (reference_ranks, kernel_ranks):
        assert ranks.run(counters_of_an_empty_batch, 2) == [[4.0, 5.0]] * 2


def counters_of_an_empty_batch(rank, world_size):
    layer, counts = SyncBN(3), []
    layer.num_batches_tracked = torch.tensor(4.0)
    for samples in (0, rank):
        layer(torch.randn(2 * samples, 3))
        counts.append(float(layer.num_batches_tracked))
    return counts


def test_large_counts_are_exact(everywhere):
    """Beyond the integers that a float32 holds."""
    layer = SyncBN(2)
    layer.num_batches_tracked.fill_(2**40 + 1)
    layer(torch.randn(4, 2))
    assert layer.num_batches_tracked == 2**40 + 2
