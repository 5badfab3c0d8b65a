"""Files of weights and states: exact, whole or not at all, and never executed."""

import hashlib
import io
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from eva.checkpoints import Buffers, Saver, load_weights, newest_state, save_state, save_weights
from eva.config import UserError
from eva.files import write_atomically, write_json
from eva.run_folder import saved_states


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
    save_weights(tmp_path / "w.safetensors", saved.state_dict(), {})
    load_weights(tmp_path / "w.safetensors", loaded)
    assert saved.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert saved[0].weight.is_contiguous(memory_format=memory_format)  # type: ignore[operator]


def test_metadata_holds_the_facts_and_null_for_what_is_not_finite(tmp_path: Path) -> None:
    save_weights(
        tmp_path / "w.safetensors", make_model().state_dict(), {"epoch": 3, "val/accuracy": 0.5, "loss": math.nan}
    )
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["eva"]) == {"epoch": 3, "val/accuracy": 0.5, "loss": None}


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, make_model().state_dict(), {})
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
    save_weights(tmp_path / "w.safetensors", make_model(channels=4).state_dict(), {})
    with pytest.raises(UserError, match=r"holds another architecture: .*size mismatch"):
        load_weights(tmp_path / "w.safetensors", make_model(channels=5))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at '.*gone\.safetensors'"):
        load_weights(tmp_path / "gone.safetensors", make_model())
    assert newest_state(tmp_path) is None


# States


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = {"tensor": torch.randn(3, 2), "nested": {"list": [1, 2.5, None], "tuple": (1, (2, 3))}, "inf": math.inf}
    path = save_state(tmp_path, state)
    loaded, read = newest(tmp_path)
    assert read == path
    assert torch.equal(loaded.pop("tensor"), state.pop("tensor"))  # type: ignore[arg-type]
    assert loaded == {"format": 2, **state}


def test_the_last_two_states_stay_and_tell_their_digest(tmp_path: Path) -> None:
    for step in range(12):
        save_state(tmp_path, {"step": step})
    paths = sorted((tmp_path / "state").iterdir())
    assert [path.name[:7] for path in paths] == ["000011-", "000012-"]
    for path in paths:
        assert path.stem[7:] == hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    assert newest(tmp_path)[0]["step"] == 11


def test_a_damaged_state_is_named_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = save_state(tmp_path, {"tensor": torch.zeros(1000)})
    path = save_state(tmp_path, {"tensor": torch.ones(1000)})
    whole = path.read_bytes()
    flipped = bytes([*whole[:700], whole[700] ^ 1, *whole[701:]])  # in the tensor: torch itself would not notice
    for content in (flipped, *(whole[:length] for length in (0, 1, 60, len(whole) // 2, len(whole) - 1))):
        path.write_bytes(content)
        state, read = newest(tmp_path)
        assert read == before and not state["tensor"].any()
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and f"warning: the state {str(path)!r} is damaged" in told and str(before) in told
    kept = save_state(tmp_path, {"step": 3})  # what is damaged doesn't count among the two that stay
    assert saved_states(tmp_path) == [kept, before]
    for whole_one in (kept, before):
        whole_one.write_bytes(b"")
    assert newest_state(tmp_path) is None
    assert "there is none before it: beginning again" in capsys.readouterr().err


def newest(folder: Path) -> tuple[dict[str, Any], Path]:
    found = newest_state(folder)
    assert found is not None
    return found


def test_weights_whose_bytes_changed_are_refused(tmp_path: Path) -> None:
    """safetensors itself does not notice."""
    path = tmp_path / "w.safetensors"
    save_weights(path, make_model().state_dict(), {})
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors' is damaged: its tensors have not the digest in its header"):
        load_weights(path, make_model())


def put_state(folder: Path, content: bytes) -> None:
    """Lays a file in the place of a state, its digest right."""
    (folder / "state").mkdir()
    (folder / "state" / f"000001-{hashlib.sha256(content).hexdigest()[:32]}.pt").write_bytes(content)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_with_a_planted_pickle_is_refused_and_not_executed(tmp_path: Path, legacy: bool) -> None:
    planted, file = tmp_path / "planted", io.BytesIO()
    torch.save({"format": 2, "model": Planted(planted)}, file, _use_new_zipfile_serialization=not legacy)
    put_state(tmp_path, file.getvalue())
    with pytest.raises(UserError, match="not a readable state"):
        newest_state(tmp_path)
    assert not planted.exists()
    torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert planted.exists()  # the trap does work


@pytest.mark.parametrize("content", [{"format": 1}, {"model": {}}, [1, 2]])
def test_a_state_of_another_format_is_refused(tmp_path: Path, content: object) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    put_state(tmp_path, file.getvalue())
    with pytest.raises(UserError, match=r"no state of this version of eva \(format 2\)"):
        newest_state(tmp_path)


def test_a_full_disk_is_said_and_costs_no_earlier_state(small_disk: Callable[..., Path]) -> None:
    folder = small_disk("1m")
    first = save_state(folder, {"tensor": torch.ones(1 << 16)})
    with pytest.raises(OSError, match="No space left on device"):
        save_state(folder, {"tensor": torch.ones(1 << 18)})
    assert list((folder / "state").iterdir()) == [first]
    assert newest(folder)[0]["tensor"].all()
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(folder / "w.safetensors", {"tensor": torch.ones(1 << 18)}, {})
    assert {path.name for path in folder.iterdir()} == {"state"}


# Saving beside the training


def test_copies_are_equal_independent_and_made_in_the_same_memory_again() -> None:
    model = make_model().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(5, 3, 3, 3)).sum().backward()
    optimizer.step()
    live: dict[str, Any] = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "plain": [1, (2, None)]}
    buffers = Buffers(model.state_dict().values())
    places = []
    for _ in range(3):
        with torch.no_grad():
            next(model.parameters()).add_(1)
        copied = buffers.copy(live)
        assert copied["plain"] == live["plain"]
        for name, tensor in live["model"].items():
            assert torch.equal(copied["model"][name], tensor) and copied["model"][name].stride() == tensor.stride()
            assert copied["model"][name].data_ptr() != tensor.data_ptr()
        momenta = [one["momentum_buffer"] for one in copied["optimizer"]["state"].values()]
        assert torch.equal(momenta[0], optimizer.state_dict()["state"][0]["momentum_buffer"])
        places.append({tensor.data_ptr() for tensor in (*copied["model"].values(), *momenta)})
        buffers.give_back(copied)
    assert places[1] == places[2]


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path: Path) -> None:
    tensor = torch.zeros(1 << 20)
    with Saver(tmp_path, (), [tensor], None) as saver:
        for number in range(4):
            tensor.fill_(number)
            if number == 2:
                saver.keep_best({"weight": tensor}, {"epoch": number})
            saver.save({"tensor": tensor})
            tensor.fill_(-1)
    state, _ = newest(tmp_path)
    assert state["tensor"].eq(3).all()
    assert state["best"]["weights"]["weight"].eq(2).all() and state["best"]["facts"] == {"epoch": 2}
    assert load_file(tmp_path / "best.safetensors")["weight"].eq(2).all()


def test_what_a_thread_could_not_write_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(FileExistsError, match="state"), Saver(tmp_path, (), [], None) as saver:
        saver.save({"step": 1})


STOPPED = """
import sys, torch
from pathlib import Path
from eva.checkpoints import Saver
state = {str(number): torch.zeros(1 << 22) for number in range(16)}  # 268 MB
try:
    with Saver(Path(sys.argv[1]), (), [], None) as saver:
        saver.save(state)
        raise KeyboardInterrupt
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_who_stops_in_the_middle_of_a_save_ends_in_order(tmp_path: Path) -> None:
    """Not by SIGABRT, as Python's end in the middle of torch's native code would."""
    done = subprocess.run([sys.executable, "-c", STOPPED, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "")
    assert list((tmp_path / "state").iterdir()) == []


# Files


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
