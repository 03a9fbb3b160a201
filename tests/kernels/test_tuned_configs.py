"""Configs of a GPU: found for the very bucket of a launch, in the file of the tensor's device, or
the default is used; whatever is found, it changes speed and nothing else.
"""

import json
import logging
import pathlib
import subprocess
import sys
import threading

import pytest
import torch

from tests.support import oracle
from tests.support.inputs import LAYOUTS, random
from tests.support.steps import kernel, run_steps
from triton_syncbn import reference

pytest.importorskip("triton")

from triton_syncbn.kernels import launch_config, tuned_configs
from triton_syncbn.kernels.indexing import Geometry, geometry
from triton_syncbn.kernels.launch_config import LaunchConfig, default_config
from triton_syncbn.kernels.tuned_configs import Bucket, bucket_of, config_source, lookup
from tuning.candidates import suits

ROOT = pathlib.Path(__file__).resolve().parents[2]
GPUS = ["NVIDIA H200", "NVIDIA L4"]
MULTIPROCESSORS = [132, 58]
SHAPE = Geometry(False, 32, 64, 12544, 8)
TUNED = LaunchConfig(1, 2048, 8, 8)


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    """Two GPUs that can be asked for their name and size, and nothing remembered."""

    class Properties:
        def __init__(self, device):
            self.multi_processor_count = MULTIPROCESSORS[device.index]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPUS[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    caches = (lookup, tuned_configs._find, launch_config.multiprocessors)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """The folder of shipped files, an empty one."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(tuned_configs, "SHIPPED", folder)
    return folder


@pytest.fixture
def chosen(monkeypatch, tmp_path):
    """The folder that the environment names, an empty one."""
    folder = tmp_path / "chosen"
    folder.mkdir()
    monkeypatch.setenv(tuned_configs.VARIABLE, str(folder))
    return folder


def entry(config=TUNED, **changes):
    measured = {"shape": "32x64x112x112", "microseconds": 8.0, "default_microseconds": 10.0}
    return {"config": config._asdict(), **measured, **changes}


def content(entries, device=GPUS[0], **changes):
    head = {"schema": 1, "device": device, "arch": "sm90", "triton": "3.7.1", "commit": "0" * 12}
    return {**head, "entries": {str(key): value for key, value in entries.items()}, **changes}


def write(folder, entries, device=GPUS[0], **changes):
    file = folder / tuned_configs.file_name(device)
    file.write_text(json.dumps(content(entries, device, **changes)))
    return file


def find(shape=SHAPE, name="moments", dtype=torch.bfloat16, index=0):
    return lookup(name, shape, dtype, torch.device("cuda", index))


KEY = bucket_of("moments", SHAPE, torch.bfloat16)


@pytest.mark.parametrize(
    "other",
    [
        SHAPE._replace(channels=33),
        SHAPE._replace(rows=17),
        SHAPE._replace(columns=8193 - 7),
        SHAPE._replace(columns=16384),
    ],
)
def test_sizes_up_to_a_power_of_two_share_a_bucket(other):
    assert bucket_of("moments", other, torch.float16) == KEY


@pytest.mark.parametrize(
    ("name", "other", "dtype"),
    [
        ("moments", SHAPE._replace(channels=65), torch.bfloat16),
        ("moments", SHAPE._replace(channels=32), torch.bfloat16),
        ("moments", SHAPE._replace(rows=33), torch.bfloat16),
        ("moments", SHAPE._replace(columns=8192), torch.bfloat16),
        # the aligned vectors that cover a row of this odd length are longer than 16384 elements
        ("moments", SHAPE._replace(columns=16383), torch.bfloat16),
        ("moments", SHAPE._replace(vector=4), torch.bfloat16),
        ("moments", SHAPE, torch.float32),
        ("moments", Geometry(True, 32, 64, 1, 8), torch.bfloat16),
        ("grad_moments", SHAPE, torch.bfloat16),
    ],
)
def test_no_neighbour_is_used(name, other, dtype, shipped):
    write(shipped, {KEY: entry()})
    assert find() == TUNED
    assert find(other, name, dtype) == default_config(name, other, MULTIPROCESSORS[0])


def test_an_empty_tensor_has_a_bucket(shipped):
    for shape in (SHAPE._replace(rows=0), SHAPE._replace(columns=0), Geometry(True, 0, 3, 1, 1)):
        assert find(shape) == default_config("moments", shape, MULTIPROCESSORS[0])


def test_the_environment_comes_before_what_is_shipped_and_that_before_the_default(
    shipped, tmp_path, monkeypatch
):
    device = torch.device("cuda", 0)
    answers = []
    for step in ("default", "shipped", "chosen, without this GPU", "chosen"):
        if step == "shipped":
            write(shipped, {KEY: entry()})
        elif step == "chosen, without this GPU":
            monkeypatch.setenv(tuned_configs.VARIABLE, str(tmp_path))
        elif step == "chosen":
            write(tmp_path, {KEY: entry(TUNED._replace(num_warps=2))})
        tuned_configs._find.cache_clear()
        lookup.cache_clear()
        answers.append((find(), config_source(device)))
    default = default_config("moments", SHAPE, MULTIPROCESSORS[0])
    assert answers == [
        (default, "default"),
        (TUNED, "NVIDIA_H200.json"),
        (TUNED, "NVIDIA_H200.json"),
        (TUNED._replace(num_warps=2), "NVIDIA_H200.json"),
    ]


def test_without_a_folder_of_shipped_files_defaults_are_used(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned_configs, "SHIPPED", tmp_path / "absent")
    assert find() == default_config("moments", SHAPE, MULTIPROCESSORS[0])


def test_a_chosen_folder_that_does_not_exist_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv(tuned_configs.VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"TRITON_SYNCBN_CONFIG_DIR: expected a folder, got '.*ab"):
        find()


def test_the_device_is_that_of_the_tensor(shipped):
    """Not the current one, which is the first."""
    write(shipped, {KEY: entry()}, GPUS[1])
    assert find(index=1) == TUNED
    assert find(index=0) == default_config("moments", SHAPE, MULTIPROCESSORS[0])
    assert config_source(torch.device("cuda", 1)) == "NVIDIA_L4.json"
    assert config_source(torch.device("cuda", 0)) == "default"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "NVIDIA_H200.json"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA_GeForce_RTX_4090.json"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB.json"),
        ("AMD Instinct MI300X", "AMD_Instinct_MI300X.json"),
        ("../x / y", ".._x_y.json"),
    ],
)
def test_the_file_is_named_after_the_device(name, file):
    assert tuned_configs.file_name(name) == file


def test_an_unknown_gpu_has_defaults_and_one_line_for_debugging(shipped, caplog):
    with caplog.at_level(logging.DEBUG, "triton_syncbn"):
        for channels in (64, 65, 66):
            shape = SHAPE._replace(channels=channels)
            assert find(shape) == default_config("moments", shape, MULTIPROCESSORS[0])
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "NVIDIA H200" in record.getMessage()


WRITER = Bucket("normalize", "channels_first", 2, 8, 6, 5, 14)
LAST = Bucket("moments", "channels_last", 2, 8, 6, 19, 0)
SHORT_ROWS = Bucket("moments", "channels_first", 2, 8, 11, 5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected what perf/tune.py writes: JSONDecodeError"),
        ("[]", "expected what perf/tune.py writes: TypeError"),
        (json.dumps({"schema": 1}), "expected what perf/tune.py writes: KeyError"),
        (json.dumps({**content({}), "entries": []}), "AttributeError: 'list'"),
        (json.dumps(content({"moments": []})), "expected what perf/tune.py writes"),
        (json.dumps(content({"moments": {"config": {"block_rows": 1}}})), "missing 3 required"),
        (json.dumps(content({}, schema=2)), r"expected schema and device \(1, .*, got \(2, "),
        (json.dumps(content({}, device="NVIDIA L4")), "'NVIDIA H200'.*got .*'NVIDIA L4'"),
        (
            json.dumps(content({"moments": entry(TUNED._replace(splits=0))})),
            "'moments': expected int",
        ),
        (json.dumps(content({"moments": entry(TUNED._replace(num_warps="4"))})), "integers"),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(text, message, shipped):
    (shipped / "NVIDIA_H200.json").write_text(text)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(ValueError, match=message) as error:
            find()
        assert "NVIDIA_H200.json" in str(error.value)


@pytest.mark.parametrize(
    ("bucket", "config"),
    [
        (KEY, TUNED._replace(block_columns=2000)),
        (KEY, TUNED._replace(num_warps=3)),
        (KEY, TUNED._replace(num_warps=64)),
        (KEY, TUNED._replace(splits=1 << 16)),
        (KEY, TUNED._replace(splits=0)),
        (KEY, TUNED._replace(block_columns=1 << 16)),
        (KEY, TUNED._replace(block_columns=4)),  # less than a vector
        (KEY, TUNED._replace(block_rows=2)),  # several rows, longer than it is wide
        (SHORT_ROWS, LaunchConfig(32, 32, 1, 4)),
        (WRITER, LaunchConfig(2, 2048, 1, 4)),  # it walks flat
        (LAST, LaunchConfig(1, 2048, 1, 4)),  # more channels than are added up at once
    ],
)
def test_a_config_that_does_not_suit_its_bucket_is_no_candidate(bucket, config):
    assert suits(KEY, TUNED)
    assert not suits(bucket, config)


def test_tiles_of_several_rows_hold_every_row_of_their_bucket(shipped):
    """An entry that is accepted is launched for any shape of its bucket: here the longest rows."""
    write(shipped, {SHORT_ROWS: entry(LaunchConfig(32, 64, 1, 4))})
    for columns in (57, 64):  # 57 is odd: with its neighbours it takes 64 elements
        shape = Geometry(False, 32, 2048, columns, 8)
        assert bucket_of("moments", shape, torch.bfloat16) == SHORT_ROWS
        assert launch_config.reduction_blocks(shape, find(shape)) == 2048


def test_splits_fit_the_shape(shipped):
    """None without a tile, and no chain of sums that is longer than accuracy allows."""
    write(
        shipped,
        {
            KEY: entry(LaunchConfig(1, 16, 1, 1)),
            KEY._replace(kernel="grad_moments"): entry(LaunchConfig(1, 16384, 1000, 4)),
            WRITER: entry(LaunchConfig(1, 2048, 2, 4)),
        },
    )
    tiles = launch_config.count_tiles(SHAPE, 1, 16)
    assert tiles / find().splits <= launch_config.LONGEST_CHAIN
    assert find(name="grad_moments").splits == SHAPE.rows
    assert find(name="normalize").splits == 1  # each flat block is a program


def test_threads_read_a_file_once(shipped, monkeypatch):
    write(shipped, {KEY: entry()})
    reads, read = [], tuned_configs.read_configs
    monkeypatch.setattr(
        tuned_configs, "read_configs", lambda *args: (reads.append(args), read(*args))[1]
    )
    start = threading.Barrier(16)
    found = []

    def look():
        start.wait()
        found.append(find())

    threads = [threading.Thread(target=look) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [TUNED] * 16
    assert len(reads) == 1


def test_importing_asks_no_device_and_reads_no_file():
    script = """
import os, torch, triton_syncbn
def refuse(*args, **named):
    raise AssertionError("asked at import")
for name in ("get_device_name", "get_device_properties", "current_device", "is_available",
             "get_device_capability", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, refuse)
os.environ["TRITON_SYNCBN_CONFIG_DIR"] = "/nonexistent"
from triton_syncbn.kernels import moments, normalize, grad_moments, grad_input, tuned_configs
try:
    tuned_configs.config_source(torch.device("cpu"))
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "TRITON_SYNCBN_CONFIG_DIR: expected a folder, got '/nonexistent'\n"


def bucket_named(key):
    kernel, layout, *sizes = key.split()
    bucket = Bucket(kernel, layout, *(int(size.split("=")[1].removeprefix("2^")) for size in sizes))
    assert str(bucket) == key
    return bucket


def test_shipped_files_suit_every_shape_of_their_buckets():
    assert bucket_named(str(KEY)) == KEY
    files = sorted(tuned_configs.SHIPPED.glob("*.json"))
    if not files:
        pytest.skip("no GPU has been tuned yet")
    for file in files:
        content = json.loads(file.read_text())
        assert file.name == tuned_configs.file_name(content["device"])
        configs = tuned_configs.read_configs(file, content["device"])
        assert configs
        for key, config in configs.items():
            assert bucket_named(key).kernel in launch_config.REDUCTIONS + launch_config.WRITERS
            assert suits(bucket_named(key), config), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sent_and_what_comes_out_never_depends_on_a_config(layout, chosen):
    """All four steps in the interpreter, with the defaults and with what a file says."""
    device = torch.device("cpu")
    shape = (5, 6, 9, 6)
    input = random(shape, torch.float32, device, layout, mean=3.0)
    grad_output = random(shape, torch.float32, device, layout, seed=1)
    weight, bias = (random(shape[1:2], torch.float32, device, seed=seed) for seed in (2, 3))
    seen = geometry(input)
    tile = LaunchConfig(2, 64, 3, 2) if layout == "channels_first" else LaunchConfig(16, 4, 5, 2)
    flat = tile if layout == "channels_last" else LaunchConfig(1, 32, 1, 2)
    configs = {
        name: tile if name in launch_config.REDUCTIONS else flat
        for name in launch_config.REDUCTIONS + launch_config.WRITERS
    }

    def run():
        lookup.cache_clear()
        tuned_configs._find.cache_clear()
        used = {name: lookup(name, seen, input.dtype, device) for name in configs}
        moments = kernel("moments", device)(input)
        sums, *_ = kernel("grad_moments", device)(
            grad_output, input, moments, weight.dtype, bias.dtype, 1e-5
        )
        result = run_steps(lambda name: kernel(name, device), input, grad_output, weight, bias)
        return used, (moments, sums), result

    defaults, sent, result = run()
    write(
        chosen,
        {bucket_of(name, seen, input.dtype): entry(config) for name, config in configs.items()},
        "Triton interpreter",
    )
    tuned, sent_tuned, result_tuned = run()
    assert config_source(device) == "Triton_interpreter.json"
    assert tuned == configs
    assert all(defaults[name] != tuned[name] for name in configs)
    for one, other in zip(sent, sent_tuned, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.dtype == torch.float64
        # the order of float32 sums differs, and nothing else
        assert oracle.relative_error(one, other) <= 1e-6
    assert sent[0].shape == reference.moments(input).shape
    for name, tensor in vars(result).items():
        assert oracle.relative_error(getattr(result_tuned, name), tensor) <= 2e-6, name
