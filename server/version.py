"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version


def package_version() -> str:
    """The version, or "unknown" if the package is not installed."""
    try:
        return version("cottention-server")
    except PackageNotFoundError:
        return "unknown"
