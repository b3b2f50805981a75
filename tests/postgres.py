"""Run a command against a real PostgreSQL 15 of its own: `python -m tests.postgres -- pytest tests`.

A private cluster is made in a temporary folder, listens on a free loopback port with a random password, is
named to the command by LUTHIER_TEST_POSTGRES, and is stopped and deleted afterwards. PostgreSQL refuses to
run as root, so root hands it to the user `postgres`. Missing binaries are installed from Debian's packages.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEBIAN = Path("/usr/lib/postgresql/15/bin")
START_TIMEOUT_S = 60
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "120",
    "fsync": "off",  # safe here: tests kill clients, never this server or its machine
}


def binaries() -> Path:
    """The folder of `initdb` and `postgres`; Debian's `postgresql-15` is installed if there is none."""
    if found := _find():
        return found
    print("postgres: installing Debian's postgresql-15", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    for command in (
        ["apt-get", "update"],
        ["apt-get", "install", "-y", "--no-install-recommends", "postgresql-15"],
    ):
        done = subprocess.run([*sudo, *command], env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode and command[1] == "install":
            raise SystemExit(
                "postgres: cannot install postgresql-15; install it, or put its bin folder on PATH"
            )
    if found := _find():
        return found
    raise SystemExit(f"postgres: installed, yet there is no initdb in {DEBIAN} or on PATH")


def _find() -> Path | None:
    if (DEBIAN / "initdb").exists():
        return DEBIAN
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _user() -> str | None:
    """Whom to run the server as: ourselves, unless we are root."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        subprocess.run(["useradd", "--system", "--no-create-home", "postgres"], check=True)
    return "postgres"


@contextmanager
def cluster() -> Iterator[str]:
    """A running server's SQLAlchemy URL; the server and its files are gone when the block ends."""
    programs, user = binaries(), _user()
    account: dict[str, Any] = (
        {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    )
    folder = Path(tempfile.mkdtemp(prefix="luthier-postgres-"))
    try:
        password, secret = secrets.token_hex(16), folder / "password"
        secret.write_text(password)
        if user:
            shutil.chown(folder, user)
            shutil.chown(secret, user)
        subprocess.run(
            [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "luthier", "-E", "UTF8",
             "--locale=C.UTF-8", "--auth=scram-sha-256", f"--pwfile={secret}"],
            cwd=folder, stdout=subprocess.DEVNULL, check=True, **account,
        )  # fmt: skip
        port = _free_port()
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen(
                [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port),
                 *(f"--{name}={value}" for name, value in SETTINGS.items())],
                cwd=folder, stdout=log, stderr=log, start_new_session=True, **account,
            )  # fmt: skip
        try:
            _wait(programs, port, server, folder / "log")
            yield f"postgresql+pg8000://luthier:{password}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # "fast" shutdown: open sessions are ended
            server.wait(timeout=60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(programs: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    deadline = time.monotonic() + START_TIMEOUT_S
    while subprocess.run(ready, check=False).returncode:
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"postgres: the server did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.1)


def main(arguments: list[str]) -> int:
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        raise SystemExit("usage: python -m tests.postgres -- pytest [ARGUMENT …]")
    if command[0] == "pytest":
        command = [sys.executable, "-m", *command]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is stopped on the way out
    with cluster() as url:
        return subprocess.run(
            command, env={**os.environ, "LUTHIER_TEST_POSTGRES": url}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
