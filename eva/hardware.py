"""What a run computes on: device, precision and memory format, chosen by what the hardware is good at."""

import contextlib
import os
import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from eva.config import RunConfig, UserError
from eva.distributed import local_rank


def check_torch_pair() -> None:
    """Checks that the installed torchvision works with the installed torch.

    Raises:
        UserError: It does not: a CPU-only torch beside a CUDA torchvision, or releases that don't belong together.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        try:
            found = f"torchvision {metadata.version('torchvision')}"
        except metadata.PackageNotFoundError:
            found = "no torchvision"
        raise UserError(
            f"torch {torch.__version__} and {found} don't work together ({reason}); install both by one command "
            "from one place: pip install --force-reinstall torch torchvision"
        ) from None


@dataclass(frozen=True)
class Hardware:
    """Device, autocast dtype (None: plain fp32) and memory format of one run."""

    device: torch.device
    autocast_dtype: torch.dtype | None
    memory_format: torch.memory_format

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.autocast_dtype]

    @property
    def channels_last(self) -> bool:
        """Whether images and weights lie channels-last in memory."""
        return self.memory_format == torch.channels_last

    def autocast(self) -> torch.autocast:
        """Returns the autocast context of forward passes."""
        # A fixed dtype, so that the disabled context doesn't warn about a dtype that the device lacks.
        dtype = self.autocast_dtype or torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.autocast_dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Returns a gradient scaler, which does nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)

    def to_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns images (B, 3, H, W) float32 and labels (B,) int64 on the device, without waiting for the copy."""
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return images, labels.to(self.device, non_blocking=True)


def choose_hardware(config: RunConfig) -> Hardware:
    """Returns the hardware that `config` asks for, with every "auto" decided.

    bf16 where the hardware computes in it (avx512_bf16, AMX or Arm's bf16 on a CPU; Ampere and newer GPUs), fp16 on
    older GPUs with tensor cores, else fp32. Channels-last where convolutions run in half precision, and on CPUs. Of
    torchrun's processes each has a GPU of its own.

    Raises:
        UserError: The device doesn't exist here, or can't compute in the precision asked for.
    """
    device = _choose_device(config.device)
    name = _best_precision(device) if config.precision == "auto" else config.precision
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision must be fp32, bf16 or auto on a CPU, but got precision='fp16'")
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        raise UserError("this GPU doesn't compute in bf16: precision must be fp16, fp32 or auto, but got 'bf16'")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    channels_last = config.channels_last
    if channels_last is None:
        channels_last = dtype is not None or device.type == "cpu"
    return Hardware(device, dtype, torch.channels_last if channels_last else torch.contiguous_format)


def _choose_device(name: str) -> torch.device:
    if (rank := local_rank()) is not None and torch.cuda.is_available() and name != "cpu":
        return _device_of_process(name, rank, int(os.environ["LOCAL_WORLD_SIZE"]))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, but got device={name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} CUDA devices, but got device={name!r}")
    return device


def _device_of_process(name: str, rank: int, processes: int) -> torch.device:
    if name not in ("auto", "cuda"):
        raise UserError(f"under torchrun device must be auto, cuda or cpu, but got device={name!r}")
    if processes > (number := torch.cuda.device_count()):
        raise UserError(
            f"this machine has {number} CUDA devices, but torchrun started {processes} processes on it; "
            f"choose --nproc_per_node={number}, or device=cpu"
        )
    return torch.device("cuda", rank)


def _best_precision(device: torch.device) -> str:
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    return "bf16" if _cpu_computes_bf16() else "fp32"


def _cpu_computes_bf16() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an exception says that the memory of the device or of the host is used up."""
    # torch has an exception of its own for its GPU allocator only.
    words = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seeds python, numpy and torch; with `deterministic`, makes torch refuse kernels that are not."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


def random_state() -> dict[str, Any]:
    """Returns the state of python's, numpy's and torch's generators as plain values and tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "gauss": gauss,
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what `random_state` returned."""
    random.setstate(state["python"])
    of_numpy = state["numpy"]
    keys = of_numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, of_numpy["position"], of_numpy["has_gauss"], of_numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Gives python's, numpy's and torch's generators back as they were, also after an exception."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def describe(hardware: Hardware) -> dict[str, Any]:
    """Returns what a run ran on: device, precision, memory format, processor, threads, versions."""
    cuda = hardware.device.type == "cuda"
    libraries = (
        "torch",
        "torchvision",
        "albumentations",
        "opencv-python-headless",
        "numpy",
        "wandb",
        "torch-lr-finder",
    )
    return {
        "device": torch.cuda.get_device_name(hardware.device) if cuda else _processor_name(),
        "device_type": hardware.device.type,
        "precision": hardware.precision,
        "channels_last": hardware.channels_last,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("eva-sweeps", *libraries)},
        },
    }


def _processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
