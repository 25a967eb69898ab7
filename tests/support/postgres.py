"""A PostgreSQL server for tests, on a Unix socket in a temporary folder, without a TCP port."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

PASSWORD, IN_URL = "s3cret/@:%", "s3cret%2F%40%3A%25"
FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
BIN = FOLDERS[-1] if FOLDERS else Path(shutil.which("pg_ctl") or "/nowhere/pg_ctl").parent
ROOT = os.getuid() == 0  # PostgreSQL refuses to run as root


def unavailable() -> str | None:
    """Why there is no server to be started here, or None."""
    if not (BIN / "initdb").exists():
        return "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    if ROOT and not any(user.pw_name == "postgres" for user in pwd.getpwall()):
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


class Server:
    """A server with one user, tinycnn, and a password.  url: of its database"""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the path of a socket has at most 107 bytes
        self.url = f"postgresql://tinycnn:{IN_URL}@/postgres?host={self.folder}"
        password = self.folder / "password"
        password.write_text(PASSWORD)
        if ROOT:
            for path in (self.folder, password):
                shutil.chown(path, "postgres", "postgres")
        self._call(
            "initdb", "--pgdata", self.folder / "data", "--username", "tinycnn", "--auth", "scram-sha-256",
            "--pwfile", password, "--no-sync", "--locale", "C", "--encoding", "UTF8",
        )  # fmt: skip
        self.start()

    def _call(self, program, *args):
        user = {"user": "postgres", "group": "postgres", "extra_groups": []} if ROOT else {}
        command = [BIN / program, *args]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=120, check=False, **user)
        assert done.returncode == 0, done.stdout + done.stderr

    def _control(self, action, *args):
        self._call("pg_ctl", action, "--pgdata", self.folder / "data", "--wait", *args)

    def start(self):
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off -c max_connections=30"
        self._control("start", "--options", options, "--log", self.folder / "log")

    def stop(self):
        """As if it was killed: what is being answered fails."""
        self._control("stop", "--mode", "immediate")

    def close(self):
        if (self.folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self.folder)
