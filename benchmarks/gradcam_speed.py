"""Time of Grad-CAM maps from eva, torchcam and captum for one batch, in milliseconds; README.md says how to run it.

All variants run in one process and take turns, round by round, each time in another order, so that what else the
machine does meets all of them; they are compared within each round. Before that, their maps are compared. CPU time,
of all threads, stands beside the wall time, as other work on the machine moves it less.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eva.config import Layer, UserError, resolve
from eva.gradcam import GradCAM
from eva.hardware import Hardware, choose_hardware, describe
from eva.models import build_model

LAYERS = ("layer1", "layer2", "layer3", "layer4")
NUM_CLASSES = 10
MOST_TIME = 1.0  # of torchcam's
AIMED_TIME = 0.5
TOLERANCE = 1e-4  # of each layer's largest value

Maps = dict[str, Tensor]


# The variants: raw maps (N, h, w) of the predicted classes, by layer


def of_eva(model: nn.Module, images: Tensor) -> Maps:
    """One forward and one backward pass; also resizes the maps to the images and scales them."""
    return GradCAM(model, LAYERS)(images).raw


def of_torchcam(model: nn.Module, images: Tensor) -> Maps:
    """One forward and one backward pass, as its documentation has it."""
    from torchcam.methods import GradCAM as TorchCAM

    with TorchCAM(model, list(LAYERS)) as extract:
        logits = model(images)
        maps = extract(logits.argmax(1).tolist(), logits, normalized=False)
    return dict(zip(LAYERS, maps, strict=True))


def of_captum(model: nn.Module, images: Tensor) -> Maps:
    """A pass that predicts, then for each layer a forward and a backward pass, as its interface wants it."""
    from captum.attr import LayerGradCam

    with torch.no_grad():
        classes = model(images).argmax(1)
    return {
        name: LayerGradCam(model, model.get_submodule(name))
        .attribute(images, target=classes, relu_attributions=True)[:, 0]
        .detach()
        for name in LAYERS
    }


LIBRARIES: dict[str, Callable[[nn.Module, Tensor], Maps]] = {
    "eva": of_eva,
    "torchcam": of_torchcam,
    "captum": of_captum,
}


def check_maps(model: nn.Module, images: Tensor) -> None:
    """Checks that all libraries make the same maps in fp32, before anything is timed.

    Raises:
        UserError: They don't.
    """
    found = {name: maps_of(model, images) for name, maps_of in LIBRARIES.items()}
    for name, maps in found.items():
        for layer, expected in found["eva"].items():
            difference = float((maps[layer] - expected).abs().max() / expected.max())
            if not difference <= TOLERANCE:
                raise UserError(f"maps of {layer} must be the same, but {name}'s and eva's differ by {difference:.1e}")


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Returns the milliseconds that a call takes, by the wall and of CPU time; a GPU is waited for."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def measure(arguments: argparse.Namespace, hardware: Hardware) -> dict[str, list[tuple[float, float]]]:
    """Returns the times of each round, by variant: each library in fp32, then in the hardware's own precision.

    In fp32 weights and images lie as torch makes them; else as the hardware wants them, under autocast, which is how
    eva evaluates.
    """
    torch.manual_seed(0)
    model = build_model("resnet18", num_classes=NUM_CLASSES)
    images = torch.randn(arguments.images, 3, 32, 32)
    model(images)  # statistics of batch norm that belong to the images
    model = model.eval().to(hardware.device)
    images = images.to(hardware.device)
    check_maps(model, images)
    formatted = build_model("resnet18", num_classes=NUM_CLASSES).eval()
    formatted.load_state_dict(model.state_dict())
    formatted = formatted.to(hardware.device, memory_format=hardware.memory_format)  # type: ignore[call-overload]
    formatted_images = images.to(memory_format=hardware.memory_format)

    def as_evaluated(maps_of: Callable[[nn.Module, Tensor], Maps]) -> Maps:
        with hardware.autocast():
            return maps_of(formatted, formatted_images)

    calls: dict[str, Callable[[], Maps]] = {}
    for name, maps_of in LIBRARIES.items():
        calls[name] = lambda maps_of=maps_of: maps_of(model, images)  # type: ignore[misc]
        calls[own(name, hardware)] = lambda maps_of=maps_of: as_evaluated(maps_of)  # type: ignore[misc]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(arguments.warmup + arguments.rounds):
        names = list(calls)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = timed(calls[name], hardware.device)
            if number >= arguments.warmup:
                times[name].append(taken)
    return times


def own(name: str, hardware: Hardware) -> str:
    """Returns the name of a library's variant in the hardware's own precision and memory format."""
    return f"{name}, {hardware.precision}{', channels-last' if hardware.channels_last else ''}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarize(times: Mapping[str, Sequence[tuple[float, float]]], hardware: Hardware) -> dict[str, Any]:
    """Returns spreads of the times by variant, and of eva's ratios to the others within each round."""
    pairs = [
        ("eva", "torchcam"),
        ("eva", "captum"),
        (own("eva", hardware), own("torchcam", hardware)),
        (own("eva", hardware), "torchcam"),
    ]
    kinds = dict(enumerate(("wall", "CPU")))
    return {
        "milliseconds": {
            f"{name}, {kind} time": spread([each[index] for each in rounds])
            for name, rounds in times.items()
            for index, kind in kinds.items()
        },
        "ratios": {
            f"{first} / {second}, {kind} time": spread(
                [a[index] / b[index] for a, b in zip(times[first], times[second], strict=True)]
            )
            for first, second in pairs
            for index, kind in kinds.items()
        },
    }


def markdown(summary: Mapping[str, Any], facts: Mapping[str, Any], settings: str) -> str:
    """Returns the tables."""

    def rows(spreads: Mapping[str, Mapping[str, float]], form: str) -> list[str]:
        return [
            f"| {name} | " + " | ".join(format(values[part], form) for part in ("median", "min", "max")) + " |"
            for name, values in spreads.items()
        ]

    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [f"{facts['device']}; {settings}  ", versions, ""]
    lines += ["| ms | median | min | max |", "|---|---|---|---|", *rows(summary["milliseconds"], ".1f"), ""]
    lines += ["| within each round | median | min | max |", "|---|---|---|---|", *rows(summary["ratios"], ".3f")]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=25, help="images in the batch")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--warmup", type=int, default=3, help="rounds left out at first")
    parser.add_argument("--rounds", type=int, default=20, help="rounds timed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path("runs/gradcam_speed.json"), help="JSON file of the results")
    arguments = parser.parse_args(argv)
    for name in ("images", "threads", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, but got {getattr(arguments, name)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints tables and the target, and returns 0, or 1 if the target is missed.

    Raises:
        UserError: A library is not installed, or the libraries' maps differ.
    """
    arguments = parse(argv)
    for name in ("torchcam", "captum"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"{name} is not installed; pip install -e '.[dev]'") from None
    torch.set_num_threads(arguments.threads)
    config, _ = resolve([Layer("benchmark", {"device": arguments.device})])
    hardware = choose_hardware(config)
    times = measure(arguments, hardware)
    summary = summarize(times, hardware)
    ratio = summary["ratios"]["eva / torchcam, wall time"]["median"]
    settings = {name: getattr(arguments, name) for name in ("images", "threads", "rounds")}
    facts = describe(hardware)
    facts["versions"] |= {name: metadata.version(name) for name in ("torchcam", "captum")}
    results = {"settings": settings, "platform": platform.platform(), "summary": summary, "rounds": times}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=1))
    print(markdown(summary, facts, ", ".join(f"{name} {value}" for name, value in settings.items())))
    met = ratio <= MOST_TIME
    print(f"\n- {'met' if met else 'MISSED'}: eva / torchcam <= {MOST_TIME}: {ratio:.3f} (aimed at: {AIMED_TIME})")
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"gradcam_speed: error: {error}", file=sys.stderr)
        sys.exit(2)
