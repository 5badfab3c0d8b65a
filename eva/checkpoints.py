"""Files that hold a model or a whole run: safetensors for weights, a weights-only torch file for the state."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eva.config import UserError

STATE_FORMAT = 1


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, brings it to the disk and renames it to `path`.

    A reader sees the old file or the new one, never a part of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a mapping as JSON, atomically. Numbers that are not finite become null, as strict readers want."""
    text = json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """Returns plain values with NaN and infinities replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not (-float("inf") < value < float("inf")):
        return None
    return value


def save_weights(path: Path, model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Writes parameters and buffers as safetensors, with `facts` (plain values) as JSON in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "eva": json.dumps(finite(facts))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads what `save_weights` wrote into a model of the same architecture.

    Raises:
        UserError: The file is missing or damaged, or its tensors are not those of the model.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {str(path)!r}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(path)!r} is not a readable checkpoint: {error}") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{str(path)!r} holds another architecture: {reason}") from None


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state of plain values and tensors, so that `load_state` can read it without executing anything."""
    write_atomically(path, lambda temporary: torch.save({"format": STATE_FORMAT, **state}, temporary))


def load_state(path: Path) -> dict[str, Any]:
    """Returns what `save_state` wrote, tensors on the CPU.

    Raises:
        UserError: The file is missing, damaged, of another format, or holds more than plain values and tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no state to resume from at {str(path)!r}") from None
    except Exception as error:  # torch raises several kinds, depending on where the file is damaged
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{str(path)!r} is not a readable state: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise UserError(f"{str(path)!r} is no state of this version of eva (format {STATE_FORMAT})")
    return state
