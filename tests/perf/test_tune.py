"""perf/tune.py: what it tries, when it believes a time, and that a run can be stopped and go on."""

import json
import os

import pandas as pd
import pytest
import torch

pytest.importorskip("triton")

import tune
from layers.cases import Case, read_cases, suites
from layers.steps import KERNELS
from measuring.times import Samples
from triton_syncbn.kernels import launch_config, tuned_configs
from triton_syncbn.kernels.launch_config import LaunchConfig, default_config
from triton_syncbn.kernels.tuned_configs import lookup, read_configs
from tuning import candidates, config_file, trial
from tuning.trial import KernelOfLayer, Outcome, finalists, winner

LAYOUTS = ["channels_first", "channels_last"]
CPU = torch.device("cpu")
GPU_NAME = "Triton interpreter"
TINY = [
    Case("tiny", layer, shape, "fp32", layout)
    for layer, shape in (("maps", (4, 6, 5, 8)), ("large maps", (2, 3, 12, 16)))
    for layout in LAYOUTS
]


def forget():
    """What was read from files."""
    lookup.cache_clear()
    tuned_configs._find.cache_clear()


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where files are written; nothing is remembered from other tests."""
    monkeypatch.setattr(config_file, "FOLDER", tmp_path)
    forget()
    yield tmp_path
    forget()


def make_file():
    return config_file.ConfigFile(GPU_NAME, "none")


def test_candidates_are_the_default_and_others_that_fit_every_shape_of_the_bucket():
    jobs = candidates.jobs_of(read_cases(suites(), ["bf16", "fp32"], LAYOUTS), KERNELS)
    assert len(jobs) > 300
    alone = 0
    for job in jobs:
        default, *others = candidates.candidates(job, 132)
        assert default == default_config(job.bucket.kernel, job.shape, 132)
        assert len({default, *others}) == 1 + len(others) <= 150
        alone += not others  # a channel that a single warp holds
        for config in others:
            assert candidates.suits(job.bucket, config)
    assert alone < 0.05 * len(jobs)


def test_a_bucket_is_tuned_once_on_its_largest_layer():
    small, large = (Case("s", str(n), (32, n, 56, 56), "bf16", "channels_first") for n in (40, 64))
    other = small._replace(shape=(32, 65, 56, 56))
    jobs = candidates.jobs_of([small, large, other], ["moments", "normalize"])
    assert [(job.bucket.kernel, job.case) for job in jobs] == [
        ("moments", large),
        ("normalize", large),
        ("moments", other),
        ("normalize", other),
    ]


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([{"d": 100, "a": 97}] * 3, "a"),
        ([{"d": 100, "a": 97.1}] * 3, None),
        ([{"d": 100, "a": 50}] * 2, None),
        ([{"d": 100, "a": 50}] * 2 + [{"d": 100, "a": 98}], None),
        ([{"d": 100, "a": 90, "b": 80}] * 3, "b"),
        # b is fast in two rounds, but not in all
        ([{"d": 100, "a": 90, "b": 10}] * 2 + [{"d": 100, "a": 90, "b": 99}], "a"),
        # it is the default of the same round that counts
        ([{"d": 200, "a": 190}, {"d": 100, "a": 95}, {"d": 50, "a": 47}], "a"),
        ([{"d": 100}] * 3, None),
    ],
)
def test_a_config_is_kept_if_it_beats_the_default_by_3_percent_in_three_rounds(rounds, expected):
    assert (trial.GAIN, trial.ROUNDS) == (0.03, 3)
    assert winner(rounds, "d") == expected


def test_the_fastest_of_the_first_round_meet_the_default_again():
    first = {"default": 7.0, "e": 6.0, "b": 3.0, "c": 4.0, "slower": 8.0, "a": 2.0, "d": 5.0}
    assert finalists(first, "default") == ["default", "a", "b", "c", "d"]
    assert finalists({"default": 1.0, "a": 1.0, "b": 2.0}, "default") == ["default"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_makes_is_checked_against_float64(name, layout, monkeypatch):
    case = Case("tiny", "maps", (3, 5, 4, 8), "bf16", layout)
    layer = KernelOfLayer(name, case, CPU)
    (job,) = candidates.jobs_of([case], [name])
    config = default_config(name, job.shape, 4)
    assert layer.error_of(config) <= 1.0
    launch = KernelOfLayer.launch
    for wrong in (lambda result: result * 1.01, lambda result: result * torch.nan):
        monkeypatch.setattr(
            KernelOfLayer, "launch", lambda self, config, wrong=wrong: wrong(launch(self, config))
        )
        assert layer.error_of(config) > 1.0


class Stopwatch:
    """Stands in for the timer: runs every function, and says the times that a test wants."""

    def __init__(self, monkeypatch, microseconds):
        self.microseconds = microseconds
        self.calls = []
        monkeypatch.setattr(trial, "time_calls", self)

    def __call__(self, functions, device, samples, *, before, **settings):
        before()
        self.calls.append(list(functions))
        for function in functions.values():
            assert isinstance(function(), torch.Tensor)
        seconds = {name: [self.microseconds(name) * 1e-6] * samples for name in functions}
        return {name: Samples(seconds[name], []) for name in functions}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KERNELS)
def test_tuned_from_end_to_end(name, layout, monkeypatch, folder):
    """Candidates run, are checked, timed in turns, chosen, written, and found by a lookup."""
    (job,) = candidates.jobs_of([case for case in TINY if case.layout == layout][:1], [name])
    default = default_config(name, job.shape, 4)
    good, faster, wrong, broken = (
        default._replace(num_warps=warps)
        for warps in (1, 2, 4, 8, 16)
        if warps != default.num_warps
    )
    monkeypatch.setattr(trial, "candidates", lambda *_: [default, good, faster, wrong, broken])
    launch = KernelOfLayer.launch

    def launch_some(self, config):
        if config == broken:
            raise RuntimeError("out of resource: shared memory")
        return launch(self, config) + (config == wrong)

    monkeypatch.setattr(KernelOfLayer, "launch", launch_some)
    watch = Stopwatch(monkeypatch, {default: 10.0, good: 9.0, faster: 8.0}.__getitem__)
    file = make_file()
    csv = folder / "candidates.csv"
    assert tune.tune([job], CPU, file, csv=csv) == 1
    assert pd.read_csv(csv).us.tolist() == [10.0, 9.0, 8.0]
    assert watch.calls == [[default, good, faster]] + [[default, faster, good]] * 3

    entry = json.loads((folder / "Triton_interpreter.json").read_text())["entries"]
    assert entry == {
        str(job.bucket): {
            "config": faster._asdict(),
            "shape": "4x6x5x8 fp32",
            "microseconds": 8.0,
            "default_microseconds": 10.0,
        }
    }
    monkeypatch.setenv(tuned_configs.VARIABLE, str(folder))
    forget()
    assert lookup(name, job.shape, torch.float32, CPU) == faster


def test_no_faster_config_leaves_the_default_and_a_note_of_it(monkeypatch):
    Stopwatch(monkeypatch, lambda _: 5.0)
    (job,) = candidates.jobs_of(TINY[:1], ["moments"])
    file = make_file()
    tune.tune([job], CPU, file)
    content = json.loads(file.path.read_text())
    assert content["entries"] == {}
    assert content["defaults"] == {
        str(job.bucket): {"shape": "4x6x5x8 fp32", "default_microseconds": 5.0}
    }
    assert read_configs(file.path, GPU_NAME) == {}


def test_a_wrong_default_decides_nothing(monkeypatch):
    (job,) = candidates.jobs_of(TINY[:1], ["moments"])
    monkeypatch.setattr(KernelOfLayer, "error_of", lambda self, config: 2.0)
    file = make_file()
    count = len(candidates.candidates(job, launch_config.multiprocessors(CPU)))
    assert tune.tune([job], CPU, file) == count
    assert not file.knows(job)


@pytest.fixture
def minutes(monkeypatch):
    """A clock on which a bucket takes a minute; the buckets, and those that were tuned."""
    jobs = candidates.jobs_of(TINY, KERNELS)
    assert len(jobs) == 16
    tuned = []

    def try_candidates(job, device):
        tuned.append(job)
        config = LaunchConfig(1, 64, 1, 4) if len(tuned) % 2 else None
        return Outcome(config, 8.0 if config else 10.0, 10.0, 0, 0)

    monkeypatch.setattr(tune, "try_candidates", try_candidates)
    monkeypatch.setattr(tune.time, "monotonic", lambda: 60.0 * len(tuned))
    return jobs, tuned


def test_a_budget_begins_no_bucket_after_it(minutes):
    jobs, tuned = minutes
    tune.tune(jobs, CPU, make_file(), budget=2.5)
    assert tuned == jobs[:3]


def test_a_run_that_was_stopped_goes_on(minutes):
    jobs, tuned = minutes
    tune.tune(jobs, CPU, make_file(), budget=3)
    file = make_file()
    file.resume()
    assert [file.knows(job) for job in jobs] == [True] * 3 + [False] * 13
    tune.tune(jobs, CPU, file)
    assert tuned == jobs
    content = json.loads(file.path.read_text())
    assert (len(content["entries"]), len(content["defaults"])) == (8, 8)
    assert set(read_configs(file.path, GPU_NAME)) == {str(job.bucket) for job in jobs[::2]}
    assert os.listdir(file.path.parent) == [file.path.name]


def test_without_resume_a_run_starts_anew(minutes):
    jobs, tuned = minutes
    for _ in range(2):
        tune.tune(jobs[:2], CPU, make_file())
    assert tuned == jobs[:2] * 2


@pytest.mark.parametrize("key", ["schema", "device", "arch", "triton", "commit"])
def test_a_run_does_not_go_on_with_a_file_of_something_else(key):
    file = make_file()
    file.made_by[key] = "another"
    file.write()
    with pytest.raises(ValueError, match=r"to go on, got .*'another'.*run without --resume"):
        make_file().resume()


def test_without_a_gpu_it_refuses_and_lists(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    assert "expected a GPU to measure on" in capsys.readouterr().err
    choice = ["--suite", "heads", "--dtype", "bf16", "--kernel", "moments"]
    assert tune.main(["--dry-run", *choice]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("moments channels_last bytes=2 vector=8 channels=2^11 rows=2^8 ")
    assert lines[-1].startswith("3 buckets, ")
