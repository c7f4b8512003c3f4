"""The distribution's version."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """As installed, or "unknown" in a tree that is not."""
    try:
        return version("cottention-server")
    except PackageNotFoundError:
        return "unknown"
