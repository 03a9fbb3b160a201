"""The plugin of Lightning, with Lightning's own base class where it is installed; and what the
options of frameworks do to our layers.
"""

import abc
import importlib
import subprocess
import sys
import types

import pytest
import torch

from triton_syncbn import SyncBN, convert_sync_batchnorm
from triton_syncbn.lightning import _LAYER_SYNC_MODULES, SyncBNPlugin


@pytest.fixture(params=["stand-in", *_LAYER_SYNC_MODULES])
def layer_sync(request, monkeypatch):
    """The class that the Trainer asks a plugin to be an instance of."""
    if request.param in _LAYER_SYNC_MODULES:
        pytest.importorskip(request.param.split(".")[0])
        return importlib.import_module(request.param).LayerSync

    class LayerSync(abc.ABC):
        @abc.abstractmethod
        def apply(self, model): ...

        @abc.abstractmethod
        def revert(self, model): ...

    module = types.ModuleType(_LAYER_SYNC_MODULES[0])
    module.LayerSync = LayerSync
    monkeypatch.setitem(sys.modules, _LAYER_SYNC_MODULES[0], module)
    return LayerSync


def mixed_model():
    return torch.nn.Sequential(
        torch.nn.BatchNorm2d(4), SyncBN(4), torch.nn.SyncBatchNorm(4), torch.nn.ReLU()
    )


def test_lightning_takes_it_for_a_plugin(layer_sync):
    assert isinstance(SyncBNPlugin(), layer_sync)
    assert not getattr(SyncBNPlugin, "__abstractmethods__", None)
    assert all(callable(getattr(SyncBNPlugin, name)) for name in layer_sync.__abstractmethods__)


def test_a_model_is_converted_for_the_fit_and_then_what_it_was(layer_sync):
    plugin, model = SyncBNPlugin(), mixed_model()
    layers, classes = list(model), [type(layer) for layer in model]
    for _ in range(2):  # one plugin may serve several fits
        assert plugin.apply(model) is model
        assert [isinstance(layer, SyncBN) for layer in model] == [True, True, True, False]
        assert isinstance(model[0], torch.nn.BatchNorm2d)
        assert plugin.revert(model) is model
        assert [type(layer) for layer in model] == classes
    assert list(model) == layers


def test_a_revert_without_a_fit_changes_nothing(layer_sync):
    model = convert_sync_batchnorm(mixed_model())
    SyncBNPlugin().revert(model)
    assert [isinstance(layer, SyncBN) for layer in model] == [True, True, True, False]


def groups_of_one(rank, world_size):
    """The Trainer makes the default group between the making of the plugin and `apply`."""
    module = types.ModuleType(_LAYER_SYNC_MODULES[0])
    module.LayerSync = abc.ABC
    sys.modules[_LAYER_SYNC_MODULES[0]] = module
    try:
        plugin = SyncBNPlugin(group_size=1)
    finally:
        del sys.modules[_LAYER_SYNC_MODULES[0]]
    model = plugin.apply(mixed_model())
    torch.distributed.barrier()
    return [torch.distributed.get_process_group_ranks(layer.process_group) for layer in model[:3]]


def test_ranks_synchronize_in_groups(reference_ranks):
    assert reference_ranks.run(groups_of_one, 2) == [[[0]] * 3, [[1]] * 3]


def test_without_lightning_the_file_imports_and_the_plugin_says_what_is_missing():
    program = (
        "import sys\n"
        "from triton_syncbn.lightning import SyncBNPlugin\n"
        "assert not any('lightning' in name.split('.')[0] for name in sys.modules)\n"
        "try:\n    SyncBNPlugin()\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "expected lightning.pytorch or pytorch_lightning to be imported" in done.stdout


def test_an_option_of_a_framework_makes_our_layers_torchs_and_drops_their_group(one_rank):
    """What `sync_batchnorm=True` calls."""
    group = torch.distributed.new_group([0])
    model = convert_sync_batchnorm(mixed_model(), process_group=group)
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(layer) for layer in model[:3]] == [torch.nn.SyncBatchNorm] * 3
    assert [layer.process_group for layer in model[:3]] == [None] * 3
