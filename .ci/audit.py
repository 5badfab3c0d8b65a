"""`make audit`: the licences of what is installed, as its metadata tell them, and its known vulnerabilities.

The licences need no network. The vulnerabilities are asked for by pip-audit, which has an environment of its own, so
that it neither looks at itself nor changes what it looks at. Ends with 1 if something is wrong or was not looked at.
"""

import configparser
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PIP_AUDIT = Path(sys.prefix, "audit")
OTHERS = "others"

# Licences that ask for no more than a notice, and the MPL, whose copyleft ends at its own files. As SPDX
# names them, and as classifiers and older metadata do.
ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "HPND", "ISC", "MIT", "MIT-CMU"),
    *("MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
    *("Apache 2.0", "Apache License, Version 2.0", "Apache Software License", "BSD", "BSD License"),
    *("3-Clause BSD License", "ISC License (ISCL)", "MIT License", "Mozilla Public License 2.0 (MPL 2.0)"),
    "Python Software Foundation License",
}
# What has another one and is used all the same: names as regular expressions, and why.
AGREED = {
    r"nvidia-.+|cuda-toolkit": "NVIDIA's own terms: what torch's CUDA builds run on; CPU builds come without",
    r"psycopg|psycopg-binary": "LGPL: for sweeps in PostgreSQL only, an extra that is imported, not copied",
}


def licences(distribution: Distribution) -> list[str]:
    """Returns what a distribution says that its licence is, each entry a choice or a part; none if it doesn't say."""
    metadata = distribution.metadata
    if "License-Expression" in metadata:
        return [metadata["License-Expression"]]
    classifiers = [
        line.split(" :: ")[-1] for line in metadata.get_all("Classifier", []) if line.startswith("License ::")
    ]
    named = [name for name in classifiers if name != "OSI Approved"]
    text = (metadata.get_all("License") or [""])[0]
    return named or ([text] if text and "\n" not in text and len(text) < 60 else [])


def is_allowed(said: Iterable[str]) -> bool:
    """Tells whether licences are allowed: all parts of one of the choices of each (SPDX's AND and OR)."""

    def allowed(expression: str) -> bool:
        if "(" in expression and expression not in ALLOWED:  # without a parser: all that is in it
            return all(map(allowed, re.split(r"\s+(?:AND|OR)\s+", re.sub(r"[()]", "", expression))))
        choices = [re.split(r"\s+AND\s+", choice) for choice in re.split(r"\s+OR\s+", expression)]
        return any(all(part.split(" WITH ")[0] in ALLOWED for part in choice) for choice in choices)

    said = list(said)
    return bool(said) and all(map(allowed, said))


def needed(requirements: Iterable[str], installed: dict[str, Distribution]) -> tuple[set[str], set[str]]:
    """Returns the names of what requirements need, as far as it is installed, and of what isn't."""
    left = [(Requirement(line), "") for line in requirements]
    seen, missing = set[tuple[str, str]](), set[str]()
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name not in installed:
            missing.add(name)
            continue
        for wanted in {"", *requirement.extras}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                left += [(Requirement(line), wanted) for line in installed[name].requires or ()]
    return {name for name, _ in seen}, missing


def groups(installed: dict[str, Distribution]) -> tuple[dict[str, str], set[str]]:
    """Returns who needs each installed distribution first (eva, an extra of it, nobody), and what eva lacks."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    wanted = {"eva": settings["options"]["install_requires"], **settings["options.extras_require"]}
    wanted["dev"] = wanted.pop("dev")  # last: what a user gets counts first
    found: dict[str, str] = {}
    lacks = set[str]()
    for group, lines in wanted.items():
        names, missing = needed(filter(None, lines.splitlines()), installed)
        found = {**dict.fromkeys(names, group), **found}
        lacks |= missing if group == "eva" else set()
    return {name: found.get(name, OTHERS) for name in installed}, lacks


def check_licences(installed: dict[str, Distribution]) -> bool:
    """Prints the licence of each distribution; returns whether all of them are allowed or agreed to."""
    of_group, lacks = groups(installed)
    refused = []
    for name in sorted(
        installed, key=lambda name: (of_group[name] != "eva", of_group[name] == OTHERS, of_group[name], name)
    ):
        said = licences(installed[name])
        agreed = next((why for pattern, why in AGREED.items() if re.fullmatch(pattern, name)), None)
        verdict = "" if is_allowed(said) else f" ({agreed})" if agreed else " (NOT ALLOWED)"
        if verdict == " (NOT ALLOWED)":
            refused.append(name)
        print(f"{of_group[name]:9} {name} {installed[name].version}: {'; '.join(said) or 'not said'}{verdict}")
    if lacks:
        print(f"licences: not looked at, as not installed: {', '.join(sorted(lacks))}; run make install")
    if refused:
        print(f"licences: of {len(installed)} distributions {len(refused)} not allowed: {', '.join(refused)}")
    else:
        print(f"licences: all of {len(installed)} distributions are allowed or agreed to")
    return not refused and not lacks


def check_vulnerabilities(versions: dict[str, str], *options: str) -> bool:
    """Prints the known vulnerabilities of these versions, by pip-audit; returns whether there are none, and all known.

    Args:
        versions: By name. A part such as +cu130, which only the builder knows, is left out.
        options: Further ones for pip-audit.
    """
    program = PIP_AUDIT / "bin" / "pip-audit"
    if not program.exists() and not _install_pip_audit():
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version.partition('+')[0]}\n" for name, version in versions.items())
        file.flush()
        command = [str(program), "--requirement", file.name, "--no-deps", "--disable-pip", "--format=json"]
        answer = subprocess.run(
            [*command, "--progress-spinner=off", *options], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    try:
        found = json.loads(answer.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"vulnerabilities: not looked at: {_last_line(answer.stderr)}")
        return False
    for one in found:
        for problem in one.get("vulns", []):
            mended = ", ".join(problem["fix_versions"]) or "no version yet"
            print(f"{one['name']} {one['version']}: {problem['id']} {' '.join(problem['aliases'])}, mended in {mended}")
    number = sum(len(one.get("vulns", [])) for one in found)
    unknown = [one["name"] for one in found if "skip_reason" in one]
    if unknown:
        examples = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        print(f"vulnerabilities: not looked at for {len(unknown)} of {len(found)}, unknown to the service: {examples}")
    if len(found) > len(unknown):
        print(f"vulnerabilities: {number or 'none'} known of {len(found) - len(unknown)} distributions")
    return not number and not unknown


def _install_pip_audit() -> bool:
    for command in (
        [sys.executable, "-m", "venv", str(PIP_AUDIT)],
        [str(PIP_AUDIT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries=1", "pip-audit>=2.10,<3"],
    ):
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            reason = _last_line(answer.stderr)
            print(f"vulnerabilities: not looked at: pip-audit can't be installed (is there a network?): {reason}")
            return False
    return True


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def main() -> int:
    """Returns the exit code."""
    everything = {str(canonicalize_name(found.name)): found for found in distributions()}
    installed = {name: found for name, found in everything.items() if name != "eva-sweeps"}
    fine = [
        check_licences(installed),
        check_vulnerabilities({name: found.version for name, found in installed.items()}),
    ]
    return int(not all(fine))


if __name__ == "__main__":
    sys.exit(main())
