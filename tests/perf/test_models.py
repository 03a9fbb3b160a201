"""Whole models: the published architectures; training steps that are compared only where losses
agree.
"""

import os
import subprocess
import sys

import compare
import pandas as pd
import pytest
import torch
from layers.gather_syncbn import GatherSyncBN
from machine.ranks import Place, run_on_ranks
from models import measurement, networks
from models.table import COLUMNS, models_text
from models.training_step import error_of_losses
from torch.nn.modules.batchnorm import _BatchNorm

import triton_syncbn
from triton_syncbn.conversion.convert import BatchNorm


def made_without_memory(name):
    with torch.device("meta"):
        return networks.make_model(name)


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@pytest.mark.parametrize(
    ("name", "parameters", "norms"),
    [
        ("resnet50", 25_557_032, 53),
        # torchvision's deeplabv3_resnet50 without its auxiliary head: a 3x3 convolution of 1024 to
        # 256 channels, a norm, and a 1x1 convolution to 21 classes with a bias
        ("deeplab", 42_004_074 - (9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21), 60),
        # the paper's 19,069,955 leaves out weight and bias of norms over 2,336 channels
        ("unet3d", 19_069_955 + 2 * 2_336, 14),
    ],
)
def test_models_are_the_published_ones(name, parameters, norms):
    model = made_without_memory(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(batch_norms(model)) == norms


@pytest.mark.parametrize(
    ("name", "shape", "outputs"),
    [
        ("resnet50", (2, 3, 224, 224), (2, 1000)),
        ("deeplab", (2, 3, 769, 769), (2, 21, 769, 769)),
        ("unet3d", (2, 3, 128, 128, 128), (2, 3, 128, 128, 128)),
    ],
)
def test_models_have_an_output_for_every_label(name, shape, outputs):
    with torch.device("meta"):
        assert networks.make_model(name)(torch.empty(shape)).shape == outputs


def test_deeplab_has_an_output_stride_of_8():
    with torch.device("meta"):
        model = networks.make_model("deeplab")
        assert model.backbone(torch.empty(2, 3, 769, 769)).shape == (2, 2048, 97, 97)


@pytest.mark.parametrize("name", networks.CLASSES)
def test_every_batch_norm_is_converted(name):
    model = made_without_memory(name)
    before = batch_norms(model)
    triton_syncbn.convert_sync_batchnorm(model)
    assert all(isinstance(layer, triton_syncbn.SyncBN) for layer in before)
    assert batch_norms(model) == before


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="expected one of resnet50, deeplab, unet3d; got 'vgg'"):
        networks.make_model("vgg")


@pytest.mark.slow
def test_two_ranks_train_a_model(tmp_path):
    file = tmp_path / "results" / "rows.csv"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        *(sys.executable, compare.__file__, "--model", "resnet50"),
        *("--samples", "1", "--csv", str(file)),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(file)
    assert rows.columns.tolist()[: len(COLUMNS)] == COLUMNS
    assert rows.impl.tolist() == ["gather_syncbn", "torch_batchnorm", "triton_syncbn"]
    assert (rows.world_size == 2).all()
    assert ((rows.us_p20 > 0) & (rows.us_p20 <= rows.us_p50) & (rows.us_p50 <= rows.us_p80)).all()
    stock, alone, ours = rows.itertuples()
    assert ours.loss_first == pytest.approx(stock.loss_first, rel=1e-5)
    assert ours.loss_second == pytest.approx(stock.loss_second, rel=1e-5)
    assert stock.loss_second < stock.loss_first
    assert abs(alone.loss_second - stock.loss_second) > 1e-4 * stock.loss_second
    assert "FAIL" not in done.stdout


class Biased(triton_syncbn.SyncBN):
    """Wrong by 1%."""

    def forward(self, input):
        return super().forward(input) * 1.01


class BiasedBackward(triton_syncbn.SyncBN):
    """Right in forward, wrong by 1% in backward."""

    def forward(self, input):
        output = super().forward(input)
        return output * 1.01 - output.detach() * 0.01


WRONG = {"biased": Biased, "biased_backward": BiasedBackward, "unsynchronized": BatchNorm}
TINY = (2, 3, 8, 8, 8)


def rows_of_wrong_layers(rank, world_size):
    classes = {"gather_syncbn": GatherSyncBN, "triton_syncbn": triton_syncbn.SyncBN, **WRONG}
    place = Place(rank, world_size, torch.device("cpu"))
    same = "unet3d", "fp32", "channels_first", 1
    return measurement.measure_model(place, *same, shape=TINY, classes=classes)


@pytest.mark.slow
def test_a_wrong_layer_has_no_time(reference_ranks):
    for rows in reference_ranks.run(rows_of_wrong_layers, 2):
        frame = rows.set_index("impl")
        wrong = frame.loc[list(WRONG)]
        assert (wrong.error_over_tolerance > 1).all()
        assert wrong.us_p50.isna().all()
        right = frame.loc[["gather_syncbn", "triton_syncbn"]]
        assert (right.error_over_tolerance <= 1).all()
        assert (right.us_p50 > 0).all()
        seen = models_text(frame.reset_index())
        assert seen.count("FAIL:") == len(WRONG)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_wrong(loss):
    assert error_of_losses([1.0, loss], [1.0, 1.0], "bf16") == float("inf")
    assert error_of_losses([1.0, loss], [1.0, loss], "bf16") > 1


def small_model(place, name):
    shape = measurement.CPU_SHAPES[name]
    return measurement.measure_model(place, name, "bf16", "channels_first", 3, shape=shape)


@pytest.mark.gpu
@pytest.mark.parametrize("name", networks.CLASSES)
def test_models_train_on_a_gpu(name):
    frame = run_on_ranks(small_model, name)
    assert (frame.error_over_tolerance <= 1).all()
    assert (frame[["us_p50", "host_us", "peak_mb"]] > 0).all(axis=None)
    assert measurement.COMPILED in set(frame.impl)
