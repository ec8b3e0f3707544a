"""Where a result comes from: versions, code and machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def versions_and_machine(device: str, threads: int, processes: int) -> dict[str, Any]:
    """Return what made a result, beside its arguments: `versions`, `git` and `machine`.

    Args:
        device: Name of the GPU, or "cpu".
        threads: Threads of torch in each process.
    """
    return {
        "versions": dict(versions_of_packages()),
        "git": _git_commit(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "threads": threads,
            "device": device,
            "processes": processes,
        },
    }


@functools.cache  # metadata of packages take long to parse
def versions_of_packages() -> dict[str, str]:
    packages = ("abr_trainer", "torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets")
    versions = {name: metadata.version(name) for name in packages if _is_installed(name)}
    return {"python": platform.python_version(), **versions}


@functools.cache  # of the code that this process has imported
def _git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" if it was changed; None without git or outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return git("describe", "--always", "--dirty", "--abbrev=40")
    except (OSError, subprocess.CalledProcessError):
        pass
    return None


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
