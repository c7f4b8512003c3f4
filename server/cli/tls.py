"""The certificate of --tls-cert and --tls-key."""

import ssl

from cottention.engine.errors import ConfigurationError
from cottention.server.config import ServerConfig


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """What connections are encrypted with; None for plain HTTP.

    TLS 1.2 or later, with Python's choice of ciphers. ConfigurationError: a file cannot be read, or
    they are no certificate and its key.
    """
    cert = config.tls_cert
    if cert is None:
        return None
    key = config.tls_key or cert
    for flag, path in (("--tls-cert", cert), ("--tls-key", key)):
        try:
            with open(path, "rb"):
                pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigurationError(
                f"{flag} {path} cannot be read: {reason}; give it a file in PEM that this process"
                " may read"
            ) from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_refuse_encrypted)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            f"--tls-cert {cert} and --tls-key {key} are not a certificate and its key in PEM:"
            f" {getattr(error, 'reason', None) or error}"
        ) from None
    return context


def _refuse_encrypted() -> str:
    """Without it OpenSSL asks on the terminal, which a service does not have."""
    raise ConfigurationError(
        "the private key of --tls-key is encrypted; write it without a passphrase, readable by the"
        " server alone (openssl pkey -in KEY -out PLAIN)"
    )
