"""A real PostgreSQL on this machine, from Debian's packages, for the tests that need one."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

USER = "eva"


@dataclass(frozen=True)
class Postgres:
    """A server on 127.0.0.1 that asks for a password, its programs, its folder, and whom it runs as."""

    programs: Path
    root: Path
    account: dict[str, Any]
    port: int
    password: str

    def url(self, password: str | None = None, port: int | None = None) -> str:
        """Returns the address of its database, with the right password unless another one is given."""
        return f"postgresql://{USER}:{password or self.password}@127.0.0.1:{port or self.port}/postgres"

    def make(self) -> None:
        """Makes an empty database."""
        secret = self.root / "password"
        secret.write_text(self.password)
        if self.account:
            for path in (self.root, secret):
                shutil.chown(path, "postgres", "postgres")
        options = f"-A scram-sha-256 --pwfile={secret} --no-sync --locale=C --encoding=UTF8"
        self._run("initdb", "-U", USER, *options.split())

    def start(self) -> None:
        """Starts the server; what it says goes to a file, as it would hold a pipe open."""
        options = f"-h 127.0.0.1 -p {self.port} -k {self.root} -F"
        self._run("pg_ctl", "start", "-w", "-l", str(self.root / "log"), "-o", options)

    def stop(self) -> None:
        """Stops it at once, whoever is connected."""
        self._run("pg_ctl", "stop", "-w", "-m", "immediate")

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self.programs / name), "-D", str(self.root / "data"), *arguments],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            **self.account,
        )
        assert done.returncode == 0, done.stdout


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server with an empty database; the test is skipped where there is none, or nobody who may run it."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # as which it refuses to run
        try:
            account = {"user": "postgres", "group": "postgres", "extra_groups": []}
            subprocess.run(["true"], check=True, **account)
        except (KeyError, ValueError, OSError) as error:
            pytest.skip(f"PostgreSQL refuses to run as root, and there is no user postgres: {error}")
    with tempfile.TemporaryDirectory(prefix="postgres-", dir="/tmp") as root:  # a socket's path must be short
        server = Postgres(found[-1].parent, Path(root), account, free_port(), secrets.token_hex(8))
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
