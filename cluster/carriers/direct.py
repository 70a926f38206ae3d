"""The direct carrier: frames over Unix sockets and TCP between nodes.

`framing` cuts streams into frames and `handshake` has the challenge; both are pure. `connection` is what both ends
share. The public names are these.
"""

from __future__ import annotations

from .connection import host_id
from .direct_client import DirectCarrier
from .direct_server import DirectServer

__all__ = ["DirectCarrier", "DirectServer", "host_id"]
