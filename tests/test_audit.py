"""The licence check of `make audit`: what it takes a licence to be, which ones it lets pass, and whom it asks."""

import importlib.util
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("audit", Path(__file__).parents[1] / ".ci" / "audit.py")
assert spec and spec.loader
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


def make(folder: Path, name: str, *lines: str) -> Distribution:
    """Makes the metadata of an installed distribution."""
    made = folder / f"{name}-1.0.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("\n".join(["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *lines, ""]))
    return Distribution.at(made)


@pytest.mark.parametrize(
    ("said", "allowed"),
    [
        (["MIT"], True),
        (["Apache Software License"], True),
        (["Mozilla Public License 2.0 (MPL 2.0)"], True),
        (["MIT AND Apache-2.0 WITH LLVM-exception"], True),
        (["GPL-3.0-only OR MIT"], True),
        (["MIT OR GPL-3.0-only AND ISC"], True),
        (["GPL-3.0-only"], False),
        (["MIT AND GPL-3.0-only"], False),
        (["MIT AND (ISC OR GPL-3.0-only)"], False),  # left to a person
        (["MIT AND (ISC OR Zlib)"], True),
        (["MIT License", "GNU General Public License v3 (GPLv3)"], False),
        (["AGPL-3.0-or-later"], False),
        (["LicenseRef-Own"], False),
        ([], False),
    ],
)
def test_a_licence_passes_if_all_of_one_choice_does(said: Sequence[str], allowed: bool) -> None:
    assert audit.is_allowed(said) == allowed


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["License-Expression: MIT", "License: something else"], ["MIT"]),
        (["Classifier: License :: OSI Approved :: BSD License", "License: Copyright of"], ["BSD License"]),
        (["Classifier: License :: OSI Approved", "License: ISC"], ["ISC"]),
        (["License: " + "All of a long text " * 9], []),
        (["Classifier: Topic :: Software Development"], []),
    ],
)
def test_a_licence_is_what_the_metadata_say_most_exactly(lines: list[str], said: list[str], tmp_path: Path) -> None:
    assert audit.licences(make(tmp_path, "one", *lines)) == said


def test_what_is_needed_is_followed_through_extras_and_markers(tmp_path: Path) -> None:
    installed = {
        "first": make(tmp_path, "first", "Requires-Dist: Se_cond[fast]>=1", "Requires-Dist: third; python_version<'3'"),
        "se-cond": make(tmp_path, "se-cond", "Requires-Dist: fourth; extra == 'fast'", "Requires-Dist: first"),
        **{name: make(tmp_path, name) for name in ("third", "fourth")},
    }
    assert audit.needed(["First", "absent>=2"], installed) == ({"first", "se-cond", "fourth"}, {"absent"})
    assert audit.needed(["se-cond"], {"se-cond": installed["se-cond"]}) == ({"se-cond"}, {"first"})


def test_a_licence_that_is_not_allowed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ones = {"fine": "MIT", "copyleft": "GPL-3.0-only", "nvidia-cublas": "LicenseRef-NVIDIA-Proprietary"}
    installed = {name: make(tmp_path, name, f"License-Expression: {said}") for name, said in ones.items()}
    assert not audit.check_licences(installed)
    told = capsys.readouterr().out.splitlines()
    assert "licences: of 3 distributions 1 not allowed: copyleft" in told
    assert "others    copyleft 1.0: GPL-3.0-only (NOT ALLOWED)" in told
    assert any(line.startswith("licences: not looked at, as not installed: albumentations, ") for line in told)


def test_all_that_eva_needs_has_a_licence_that_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    installed = {audit.canonicalize_name(found.name): found for found in distributions()}
    of_group, _ = audit.groups(installed)
    needed = {name: found for name, found in installed.items() if of_group[name] != audit.OTHERS}
    assert {"torch", "wandb", "numpy"} <= needed.keys() and "eva-sweeps" not in needed
    assert audit.check_licences(needed), capsys.readouterr().out
