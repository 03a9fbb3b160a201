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
from layers.cases import Case
from layers.gather_syncbn import GatherSyncBN
from layers.implementations import Implementation, implementations
from machine.ranks import Place, run_on_ranks
from measuring import rows as measuring
from models import networks, training
from models.training import error_of_losses
from torch.nn.modules.batchnorm import _BatchNorm

import triton_syncbn
from triton_syncbn.conversion.convert import BatchNorm

CPU = torch.device("cpu")


def made_without_memory(name):
    with torch.device("meta"):
        return networks.NETWORKS[name]()


def batch_norms(model):
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]


@pytest.mark.parametrize(
    ("name", "parameters", "norms"),
    [
        ("resnet50", 25_557_032, 53),
        # torchvision's deeplabv3_resnet50 without its auxiliary head: a 3x3 convolution of 1024 to
        # 256 channels, a norm, and a 1x1 convolution to 21 classes with a bias
        ("deeplab", 42_004_074 - (9 * 1024 * 256 + 2 * 256 + 256 * 21 + 21), 60),
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
    ],
)
def test_models_have_an_output_for_every_label(name, shape, outputs):
    with torch.device("meta"):
        assert networks.NETWORKS[name]()(torch.empty(shape)).shape == outputs


def test_deeplab_has_an_output_stride_of_8():
    with torch.device("meta"):
        model = networks.NETWORKS["deeplab"]()
        assert model.backbone(torch.empty(2, 3, 769, 769)).shape == (2, 2048, 97, 97)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_batch_norm_is_converted(name):
    model = made_without_memory(name)
    before = batch_norms(model)
    triton_syncbn.convert_sync_batchnorm(model)
    assert all(isinstance(layer, triton_syncbn.SyncBN) for layer in before)
    assert batch_norms(model) == before


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
    rows = pd.read_csv(file).set_index("impl")
    assert list(rows.index) == list(implementations(CPU))
    assert set(rows["pass"]) == {"step"}
    assert (rows.world_size == 2).all()
    assert ((rows.us_p20 > 0) & (rows.us_p20 <= rows.us_p50) & (rows.us_p50 <= rows.us_p80)).all()
    assert (rows.drop("torch_batchnorm").error_over_tolerance <= 1).all()
    assert pd.isna(rows.error_over_tolerance["torch_batchnorm"])  # of a rank's own batch
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


WRONG = {"biased": Biased, "backward": BiasedBackward, "unsynchronized": BatchNorm}
RIGHT = {"gather_syncbn": GatherSyncBN, "triton_syncbn": triton_syncbn.SyncBN}


def errors_of_layers(rank, world_size):
    case = Case("resnet50", "resnet50", (2, 3, 32, 32), "fp32", "channels_first")
    network = training.Network(case, Place(rank, world_size, CPU))
    layers = {**RIGHT, **WRONG}
    return {name: network.enter(Implementation(layers[name], ""))[0] for name in layers}


@pytest.mark.slow
def test_a_wrong_layer_is_found(reference_ranks):
    for errors in reference_ranks.run(errors_of_layers, 2):
        assert {name for name, error in errors.items() if error > 1.0} == set(WRONG)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_wrong(loss):
    losses = torch.tensor([1.0, loss])
    assert error_of_losses(losses, torch.ones(2), "bf16") == float("inf")
    assert error_of_losses(losses, losses, "bf16") > 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_models_train_on_a_gpu(name):
    cases = training.network_cases([name], ["bf16"], ["channels_first"], on_cpu=True)
    device = torch.device("cuda")
    plan = measuring.Plan(list(implementations(device)), 3, passes=["step"])
    frame = pd.DataFrame(run_on_ranks(measuring.measure, cases, plan))
    assert set(frame.impl) == set(implementations(device))
    assert (frame.error_over_tolerance <= 1).all()
    assert (frame[["us_p50", "host_us"]] > 0).all(axis=None)
    assert (frame.peak_mb >= 0).all()  # a step of little may need no more than what it frees first
