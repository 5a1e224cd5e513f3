"""The code that weights are published with: its public address and versions, for their card."""

from __future__ import annotations

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
SCP = re.compile(r"(?:[\w.-]+@)?(?P<host>[\w-]+(?:\.[\w-]+)+):(?P<path>(?!/)\S+)")  # git@host:owner/name.git
PRIVATE_HOST = re.compile(r"[\d.]+|.*\.(local|internal|lan|localdomain|home|test|invalid)|[^.]*")


def public_url(remote: str) -> str | None:
    """Address at which anybody may clone a remote of git, without credentials; None for places of this network.

    Args:
        remote: As `git remote get-url` prints it: http, https, ssh, or git@host:path.
    """
    remote = remote.strip()
    if "://" in remote:
        try:
            parts = urlsplit(remote)
            host, port, path = parts.hostname or "", parts.port, parts.path.strip("/")
        except ValueError:  # an impossible port
            return None
        if parts.scheme not in ("http", "https", "ssh"):
            return None
        at, scheme = f":{port}" if port and parts.scheme != "ssh" else "", parts.scheme.replace("ssh", "https")
    elif match := SCP.fullmatch(remote):
        host, path, at, scheme = match["host"], match["path"], "", "https"
    else:
        return None
    if not path or ":" in host or PRIVATE_HOST.fullmatch(host):
        return None
    return f"{scheme}://{host}{at}/{path}"


@cache
def checkout_url() -> str | None:
    """Public address of this checkout's remote "origin"; None if there is none."""
    if not (ROOT / ".git").exists():  # installed, perhaps inside a checkout of something else
        return None
    command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # no git
        return None
    return public_url(done.stdout) if done.returncode == 0 else None


@cache
def project_version() -> str:
    """Version of this project, as its source states it, or as it was installed."""
    file = ROOT / "pyproject.toml"
    if file.is_file():
        return str(tomllib.loads(file.read_text())["project"]["version"])
    from importlib.metadata import version

    return version("dit-family")
