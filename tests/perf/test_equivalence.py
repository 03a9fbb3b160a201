"""A training on several ranks with SyncBN is that of one process; with other layers it is not."""

import functools

import pytest
import torch
import torch.distributed as dist
from machine.ranks import Place
from segmentation.arms import ARMS, BATCH, REFERENCE, Arm, replaced_by, separate, synchronized
from segmentation.data import CLASSES, SIZE, Data, load_data
from segmentation.table import Key, losses_table, relative_difference, summary_table
from segmentation.training import Run, batches, mean_iou, train
from segmentation.wrong_layers import AveragedVariances, EquallyWeightedRanks

pytest.importorskip("sklearn", reason="needs scikit-learn, whose pictures are trained on")

STEPS = 6
SHORT_ARMS = {
    REFERENCE: Arm((BATCH,), separate),
    "SyncBN, 5 + 3": Arm((5, 3), synchronized, exact=True),
    "BatchNorm, 5 + 3": Arm((5, 3), separate),
    "equal ranks, 5 + 3": Arm((5, 3), replaced_by(EquallyWeightedRanks)),
    "equal ranks, 4 + 4": Arm((4, 4), replaced_by(EquallyWeightedRanks)),
    "averaged variances, 4 + 4": Arm((4, 4), replaced_by(AveragedVariances)),
}


@functools.cache
def few_images() -> Data:
    return load_data(train_count=48, held_out_count=8)


def train_short(rank: int, world_size: int, data: Data, dtype: torch.dtype) -> dict[str, Run]:
    groups = {size: dist.new_group(range(size)) for size in (1, world_size)}
    place = Place(rank, world_size, torch.device("cpu"))
    return {
        name: train(arm, place, groups[len(arm.shares)], data, 0, STEPS, dtype, lambda: None)
        for name, arm in SHORT_ARMS.items()
        if rank < len(arm.shares)
    }


@pytest.fixture(scope="module")
def runs(reference_ranks):
    """Of the first rank, in float64."""
    trained = reference_ranks.run(train_short, 2, few_images(), torch.float64)[0]
    return {Key("float64", 0, name): run for name, run in trained.items()}


def test_losses_of_uneven_ranks_are_those_of_one_process(runs):
    one, several = (runs["float64", 0, name] for name in (REFERENCE, "SyncBN, 5 + 3"))
    # 2**-53 a rounding, which the steps of a training amplify
    assert relative_difference(several, one).max() < 1e-12
    torch.testing.assert_close(several.statistics, one.statistics, rtol=1e-11, atol=1e-13)
    assert torch.equal(several.predictions, one.predictions)
    assert one.losses[-1] < 0.8 * one.losses[0]


@pytest.mark.parametrize(
    "name", ["BatchNorm, 5 + 3", "equal ranks, 5 + 3", "averaged variances, 4 + 4"]
)
def test_losses_of_other_layers_are_not(runs, name):
    one, several = (runs["float64", 0, arm] for arm in (REFERENCE, name))
    assert relative_difference(several, one).max() > 1e-3


def test_ranks_of_equal_weight_are_only_wrong_where_they_are_uneven(runs):
    one, several = (runs["float64", 0, name] for name in (REFERENCE, "equal ranks, 4 + 4"))
    # E[x^2] - E[x]^2 loses more digits than SyncBN does
    assert relative_difference(several, one).max() < 1e-11


def test_a_row_for_each_training_and_each_step(runs):
    summary, losses = summary_table(runs), losses_table(runs, 0)
    assert list(summary.arm) == list(SHORT_ARMS)
    assert summary.largest_loss_difference[0] == 0.0
    assert len(losses) == STEPS * len(SHORT_ARMS)


def test_shares_of_every_arm_are_the_batch():
    assert {sum(arm.shares) for arm in ARMS.values()} == {BATCH}


def test_every_image_comes_once_in_an_epoch():
    epoch = torch.cat(batches(48, 0, 6))
    assert sorted(epoch.tolist()) == list(range(48))
    assert [len(batch) for batch in batches(48, 0, 7)] == [BATCH] * 7


def test_images_are_photographs_with_digits():
    train_images, held_out = few_images()
    assert train_images.pixels.shape == (48, 3, SIZE, SIZE)
    assert train_images.pixels.min() >= 0.0 and train_images.pixels.max() <= 1.0
    shares = torch.bincount(held_out.labels.flatten(), minlength=CLASSES) / held_out.labels.numel()
    assert (shares > 0.02).all()


@pytest.mark.parametrize(("wrong", "score"), [(0, 1.0), (1, 0.5 * (2 / 3 + 1 / 2))])
def test_mean_iou_is_intersection_over_union(wrong, score):
    labels = torch.tensor([[0, 0, 0, 1, 2]])
    predictions = labels.clone()
    predictions[0, :wrong] = 1
    expected = (2 * score + 1.0) / 3
    assert mean_iou(predictions, labels) == pytest.approx(expected)
