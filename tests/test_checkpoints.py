"""Files of weights and states: exact, whole or not at all, and never executed."""

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from eva.checkpoints import load_state, load_weights, save_state, save_weights
from eva.config import UserError
from eva.files import write_atomically, write_json


def make_model(channels: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels, 2))
    model(torch.randn(5, 3, 3, 3))  # statistics unlike those of a new layer
    return model


class Planted:
    """A pickle of it creates a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weights_come_back_to_the_bit_in_any_memory_format(tmp_path: Path, memory_format: torch.memory_format) -> None:
    saved = make_model().to(memory_format=memory_format)
    loaded = make_model(seed=1).to(memory_format=memory_format)
    save_weights(tmp_path / "w.safetensors", saved, {})
    load_weights(tmp_path / "w.safetensors", loaded)
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert saved[0].weight.is_contiguous(memory_format=memory_format)  # type: ignore[operator]


def test_metadata_holds_the_facts_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", make_model(), {"epoch": 3, "val/accuracy": 0.5, "loss": math.nan})
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["eva"]) == {"epoch": 3, "val/accuracy": 0.5, "loss": None}


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, make_model(), {})
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.safetensors' is not a readable checkpoint"):
            load_weights(path, make_model())


def test_a_pickle_in_disguise_is_refused_and_not_executed(tmp_path: Path) -> None:
    path, planted = tmp_path / "w.safetensors", tmp_path / "planted"
    path.write_bytes(pickle.dumps(Planted(planted)))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_weights(path, make_model())
    assert not planted.exists()


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", make_model(channels=4), {})
    with pytest.raises(UserError, match=r"holds another architecture: .*size mismatch"):
        load_weights(tmp_path / "w.safetensors", make_model(channels=5))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at '.*gone\.safetensors'"):
        load_weights(tmp_path / "gone.safetensors", make_model())
    with pytest.raises(UserError, match=r"no state to resume from at '.*state\.pt'"):
        load_state(tmp_path / "state.pt")


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"tensor": torch.randn(3, 2), "nested": {"list": [1, 2.5, None], "tuple": (1, (2, 3))}, "inf": math.inf}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt")
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))  # type: ignore[arg-type]
    assert loaded == {"format": 1, **state}


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"tensor": torch.zeros(1000)})
    whole = path.read_bytes()
    for length in (0, 1, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"state\.pt' is not a readable state: .+"):
            load_state(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_with_a_planted_pickle_is_refused_and_not_executed(tmp_path: Path, legacy: bool) -> None:
    path, planted = tmp_path / "state.pt", tmp_path / "planted"
    torch.save({"format": 1, "model": Planted(planted)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="not a readable state"):
        load_state(path)
    assert not planted.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert planted.exists()  # the trap does work


@pytest.mark.parametrize("content", [{"format": 0}, {"model": {}}, [1, 2]])
def test_a_state_of_another_format_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(UserError, match=r"no state of this version of eva \(format 1\)"):
        load_state(tmp_path / "state.pt")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_old_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(path.read_text())

    write_atomically(path, write)
    assert (seen, path.read_text(), list(tmp_path.iterdir())) == (["old"], "new", [path])


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    values = {"nan": math.nan, "list": [math.inf, -math.inf, 1.5, 2, None, "nan"], "inner": {"nan": math.nan}}
    write_json(tmp_path / "file.json", values)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    assert read == {"nan": None, "list": [None, None, 1.5, 2, None, "nan"], "inner": {"nan": None}}
