"""The server as a process of its own."""

from __future__ import annotations

import argparse
import tempfile
import threading
from pathlib import Path

from tests.hub_server.server import Hub


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tests.hub_server", description="Serve an empty Hub until interrupted.")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    port = parser.parse_args(argv).port
    with tempfile.TemporaryDirectory() as home, Hub(Path(home), port) as hub:
        print(hub.url)
        print("\n".join(f"export {name}={value}" for name, value in hub.environment.items()), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print(f"{len(hub.requests)} requests, {len(hub.repositories)} repositories")


if __name__ == "__main__":
    main()
