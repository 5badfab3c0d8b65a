"""Files that hold a model or a whole run: safetensors for weights, a weights-only torch file for the state."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eva.config import UserError
from eva.files import finite, write_atomically

STATE_FORMAT = 1


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


def read_facts(path: Path) -> dict[str, Any]:
    """Returns the facts that `save_weights` wrote beside the weights, without reading these.

    Raises:
        UserError: The file is missing or damaged, or it has no facts: eva did not write it.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata.get("eva", "null"))
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {str(path)!r}") from None
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(path)!r} is not a readable checkpoint: {' '.join(str(error).split())}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{str(path)!r} is no checkpoint of eva: its metadata have no facts about a run")
    return facts
