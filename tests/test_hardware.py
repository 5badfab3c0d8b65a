"""The choice of device and precision, random state, the check of the torch pair, and the description of a machine."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eva.config import Layer, RunConfig, UserError, resolve
from eva.hardware import (
    Hardware,
    check_torch_pair,
    choose_hardware,
    describe,
    preserved_random_state,
    random_state,
    seed_everything,
    set_random_state,
)


def config_of(**settings: Any) -> RunConfig:
    return resolve([Layer("test", settings)])[0]


@pytest.fixture(autouse=True)
def global_settings() -> Iterator[None]:
    """Gives torch's global settings back."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


# choice


@pytest.mark.parametrize(
    ("precision", "channels_last", "dtype", "memory_format"),
    [
        ("fp32", None, None, torch.channels_last),
        ("fp32", False, None, torch.contiguous_format),
        ("bf16", None, torch.bfloat16, torch.channels_last),
        ("bf16", False, torch.bfloat16, torch.contiguous_format),
    ],
)
def test_explicit_settings_are_taken_as_they_are(
    precision: str, channels_last: bool | None, dtype: torch.dtype | None, memory_format: torch.memory_format
) -> None:
    hardware = choose_hardware(config_of(device="cpu", precision=precision, channels_last=channels_last))
    assert hardware == Hardware(torch.device("cpu"), dtype, memory_format)
    assert hardware.precision == precision
    assert hardware.channels_last == (memory_format == torch.channels_last)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the flags are read from /proc/cpuinfo")
def test_auto_takes_bf16_where_the_processors_flags_name_it() -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    hardware = choose_hardware(config_of(device="cpu", precision="auto"))
    assert (hardware.precision == "bf16") == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    assert hardware.precision in ("bf16", "fp32")


def test_auto_takes_the_gpu_if_there_is_one() -> None:
    assert choose_hardware(config_of(device="auto")).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cpu", "precision": "fp16"}, "precision must be fp32, bf16 or auto on a CPU.*got precision='fp16'"),
        ({"device": "cuda:99"}, r"this machine has \d+ CUDA devices, but got device='cuda:99'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, but got device='gpu'"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda or cuda:N, but got device='cuda:x'"),
        ({"device": "cuda:-1"}, "device must be auto.*but got device='cuda:-1'"),
        ({"device": "meta"}, "device must be auto.*but got device='meta'"),
        ({"device": ""}, "device must be auto.*but got device=''"),
        ({"device": "cpu:3:4"}, "device must be auto.*but got device='cpu:3:4'"),
    ],
)
def test_what_this_machine_cannot_do_is_told_in_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        choose_hardware(config_of(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_a_missing_gpu_is_told_as_such() -> None:
    with pytest.raises(UserError, match="this machine has 0 CUDA devices, but got device='cuda'"):
        choose_hardware(config_of(device="cuda"))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_chosen_precision(precision: str, dtype: torch.dtype) -> None:
    hardware = choose_hardware(config_of(device="cpu", precision=precision))
    with hardware.autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype
    assert not hardware.scaler().is_enabled()


def test_batches_reach_the_device_in_the_chosen_memory_format() -> None:
    hardware = Hardware(torch.device("cpu"), None, torch.channels_last)
    images, labels = hardware.to_device(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))
    assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
    assert labels.tolist() == [0, 1]


# random state


def draw() -> tuple[list[float], list[float], list[float]]:
    """Some numbers from each generator; an odd count of normals, as numpy keeps the second of each pair."""
    return [random.random(), random.gauss(0, 1)], np.random.standard_normal(3).tolist(), torch.randn(3).tolist()


def test_random_state_round_trips_all_generators() -> None:
    draw()  # a normal is waiting in numpy's and in python's generator
    state = random_state()
    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


def test_random_state_survives_being_saved_as_plain_values(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "state.pt")
    first = draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


@pytest.mark.parametrize("fails", [False, True])
def test_preserved_random_state_gives_all_generators_back(fails: bool) -> None:
    seed_everything(3, deterministic=False)
    expected = draw()
    seed_everything(3, deterministic=False)
    if fails:
        with pytest.raises(OSError, match="halfway"), preserved_random_state():
            draw()
            raise OSError("halfway")
    else:
        with preserved_random_state():
            draw()
            seed_everything(8, deterministic=False)
    assert draw() == expected


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 7])
def test_a_seed_fixes_all_generators(seed: int) -> None:
    seed_everything(seed, deterministic=False)
    first = draw()
    seed_everything(seed, deterministic=False)
    assert draw() == first
    seed_everything(seed + 1, deterministic=False)
    assert all(one != other for one, other in zip(draw(), first, strict=True))


def test_deterministic_refuses_other_kernels_and_can_be_turned_off_again() -> None:
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    seed_everything(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


# torch and torchvision


def test_the_installed_pair_works() -> None:
    check_torch_pair()


def test_a_torchvision_that_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    stubs = {
        'raise RuntimeError("operator torchvision::nms does not exist\\nand more")': "nms does not exist)",
        'raise ImportError("libtorch_cuda.so: cannot open")': "(libtorch_cuda.so: cannot open)",
        'raise OSError("undefined symbol")': "(undefined symbol)",
        "raise RuntimeError": "(RuntimeError)",
    }
    folders = []
    for number, stub in enumerate(stubs):
        package = tmp_path / str(number) / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(stub + "\n", encoding="utf-8")
        folders.append(str(package.parent))
    # A process of its own, which has not imported the real one.
    program = (
        "import sys\n"
        "from eva.config import UserError\n"
        "from eva.hardware import check_torch_pair\n"
        f"for folder in {folders}:\n"
        "    sys.path.insert(0, folder)\n"
        "    try:\n        check_torch_pair()\n"
        "    except UserError as error:\n        print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert answer.stderr == "" and answer.returncode == 0
    for line, reason in zip(answer.stdout.splitlines(), stubs.values(), strict=True):
        assert f"torch {torch.__version__} and torchvision" in line and reason in line
        assert "pip install --force-reinstall torch torchvision" in line


# description


def test_description_holds_what_a_run_ran_on_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-very-secret-key")
    facts = describe(choose_hardware(config_of(device="cpu", precision="bf16")))
    assert json.loads(json.dumps(facts)) == facts
    assert "secret" not in json.dumps(facts)
    assert facts["device_type"] == "cpu" and facts["precision"] == "bf16" and facts["channels_last"] is True
    assert facts["cpu_count"] == os.cpu_count()
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["versions"]["numpy"] == np.__version__
    assert all(facts["versions"].values())
