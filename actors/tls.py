"""TLS contexts of the direct carrier's TCP connections, as the configuration says."""

from __future__ import annotations

import ssl

from ..cluster.config import NetworkConfig
from ..cluster.errors import ConfigError


def server_tls(network: NetworkConfig) -> ssl.SSLContext | None:
    """Context of a listening node, or None without TLS. Raises ConfigError when a file can't be used."""
    if network.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(network.tls_cert, network.tls_key)
    except OSError as error:  # a bad certificate is one, too
        raise ConfigError(f"network.tls_cert={network.tls_cert}, network.tls_key={network.tls_key}: {error}") from None
    return context


def client_tls(network: NetworkConfig) -> ssl.SSLContext | None:
    """Context of whoever connects: the node's certificate must name `tcp_host` and be signed by `tls_ca`.

    None without TLS. Raises ConfigError when the file can't be used.
    """
    if network.tls_ca is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(network.tls_ca)
    except OSError as error:
        raise ConfigError(f"network.tls_ca={network.tls_ca}: {error}") from None
    return context
