"""Frameworks that train a converted model in two processes give what one process gives with the
whole batch. Each is tested where it is installed.
"""

import importlib.util
import pathlib

import pytest
import torch

from tests.support import framework_training
from tests.support.torchrun import printed_on_two_ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("framework", ["lightning", "accelerate", "transformers"])
def test_two_ranks_train_as_one_process(framework, tmp_path):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    printed_on_two_ranks(pathlib.Path(framework_training.__file__), framework, str(tmp_path))
    expected = framework_training.one_process(str(tmp_path)).state_dict()
    assert expected["body.1.num_batches_tracked"] == 2
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    # float64; sums in another order
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9)
    for name in first:
        assert torch.equal(first[name], second[name]), name
