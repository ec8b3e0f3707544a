"""A Hub of one's own: an HTTP server that answers huggingface_hub as the Hub does, and fails when it is told to.

It keeps model repositories in memory, with commits, branches, private ones and LFS objects. To try it by hand:

    python -m tests.hub_server --port 8899
"""

from tests.hub_server.calls import READ_TOKEN, WRITE_TOKEN, Account
from tests.hub_server.server import Hub

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "Account", "Hub"]
