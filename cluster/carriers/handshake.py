"""The challenge that both sides of a direct connection pass before the first frame. Pure: bytes in, bytes out.

    server -> client   magic (4) | version (1) | server nonce (32)
    client -> server   magic (4) | version (1) | client nonce (32) | target (32) | proof (32)
    server -> client   proof (32)

`target` is the SHA-256 of the node name that the client looks for: an address may be stale, and its port taken by
another node. A proof is HMAC-SHA256(secret, role | version | target | server nonce | client nonce). The role is in
it, so a proof that is sent back proves nothing; the server shows its own only to who has shown one. The challenge
tells who may talk; against an attacker who sits on the wire and alters bytes it takes TLS.
"""

from __future__ import annotations

import hashlib
import hmac

from ..errors import InvalidRequest
from .framing import FrameError

MAGIC = b"TTdc"
VERSION = 1
NONCE_BYTES = 32
MIN_SECRET_BYTES = 16

_PREFIX = MAGIC + bytes([VERSION])
_PROOF_BYTES = 32
_GREETING_BYTES = len(_PREFIX) + NONCE_BYTES
_ANSWER_BYTES = _GREETING_BYTES + 2 * _PROOF_BYTES


def check_secret(secret: bytes) -> bytes:
    """`secret` itself. Raises InvalidRequest when it is too short to be one."""
    if len(secret) < MIN_SECRET_BYTES:
        raise InvalidRequest(f"secret: {len(secret)} bytes; give at least {MIN_SECRET_BYTES} random bytes")
    return secret


class ServerHandshake:
    """The side that was connected to. It speaks first: send `greeting`. `name`: its node name, "" takes any.

    `nonce`: 32 random bytes, used for this connection only.
    """

    def __init__(self, secret: bytes, name: str, nonce: bytes) -> None:
        self.done = False
        self.greeting = _PREFIX + nonce
        self._secret = secret
        self._nonce = nonce
        self._target = _digest(name) if name else b""
        self._received = b""

    def receive(self, data: bytes) -> bytes:
        """Take a piece of the stream, give what is to be sent back. Raises FrameError to end the connection."""
        self._received = _collect(self._received, data, _ANSWER_BYTES)
        _check_prefix(self._received)
        if len(self._received) < _ANSWER_BYTES:
            return b""
        client_nonce = self._received[len(_PREFIX) : _GREETING_BYTES]
        target = self._received[_GREETING_BYTES:-_PROOF_BYTES]
        proof = _proof(self._secret, b"client", target, self._nonce, client_nonce)
        if not hmac.compare_digest(proof, self._received[-_PROOF_BYTES:]):
            raise _refusal("wrong secret")
        if self._target and target != self._target:
            raise _refusal("the peer looks for another node, its address list is old")
        self.done = True
        return _proof(self._secret, b"server", target, self._nonce, client_nonce)


class ClientHandshake:
    """The side that connects, to the node `name`. `nonce`: 32 random bytes, used for this connection only."""

    def __init__(self, secret: bytes, name: str, nonce: bytes) -> None:
        self.done = False
        self._secret = secret
        self._nonce = nonce
        self._target = _digest(name)
        self._received = b""
        self._expected_proof = b""  # known once the greeting is complete

    def receive(self, data: bytes) -> bytes:
        """Take a piece of the stream, give what is to be sent back. Raises FrameError to end the connection."""
        if self._expected_proof:
            self._received = _collect(self._received, data, _PROOF_BYTES)
            if len(self._received) < _PROOF_BYTES:
                return b""
            if not hmac.compare_digest(self._expected_proof, self._received):
                raise _refusal("the server does not know the secret")
            self.done = True
            return b""
        self._received = _collect(self._received, data, _GREETING_BYTES)
        _check_prefix(self._received)
        if len(self._received) < _GREETING_BYTES:
            return b""
        server_nonce, self._received = self._received[len(_PREFIX) :], b""
        self._expected_proof = _proof(self._secret, b"server", self._target, server_nonce, self._nonce)
        proof = _proof(self._secret, b"client", self._target, server_nonce, self._nonce)
        return _PREFIX + self._nonce + self._target + proof


def _proof(secret: bytes, role: bytes, target: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(secret, b"".join((role, bytes([VERSION]), target, server_nonce, client_nonce)), "sha256")


def _collect(received: bytes, data: bytes, expected_bytes: int) -> bytes:
    if len(received) + len(data) > expected_bytes:
        raise _refusal("bytes beyond the handshake")
    return received + data


def _check_prefix(received: bytes) -> None:
    if _PREFIX.startswith(received[: len(_PREFIX)]):
        return
    if received.startswith(MAGIC):
        raise _refusal(f"the peer speaks version {received[len(MAGIC)]} of the protocol, this side {VERSION}")
    raise _refusal("the peer does not speak this protocol")


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _refusal(reason: str) -> FrameError:
    return FrameError("refused_handshakes", f"handshake refused: {reason}")
