"""Archives of packages from npm's registry: each is the one whose sha512 npm publishes, or none."""

import base64
import hashlib
import os
import urllib.error
import urllib.request

from packlight.errors import RuntimeMissing

_REGISTRY = "https://registry.npmjs.org"
_MOST = 64 * 2**20


def is_archive(content: bytes, sha512: str) -> bool:
    """Whether these bytes have the sha512, in base64, that npm publishes."""
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == sha512


def archive_name(package: str, version: str) -> str:
    """What npm calls the archive of a package."""
    return f"{package.rpartition('/')[2]}-{version}.tgz"


def download(package: str, version: str, sha512: str, advice: str) -> bytes:
    """The archive of a package from npm's registry, or from the one that `npm_config_registry` names.

    Args:
        package: its name, '@scope/name' or 'name'.
        version: of it.
        sha512: that npm publishes for it, in base64.
        advice: a sentence on how to have it otherwise, for errors.

    Raises:
        RuntimeMissing: it could not be had, or what came is something else.
    """
    named = (os.environ.get(name) for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"))
    registry = next(filter(None, named), _REGISTRY)
    address = f"{registry.rstrip('/')}/{package}/-/{archive_name(package, version)}"
    if not address.startswith(("https://", "http://")):
        raise RuntimeMissing(f"The npm registry {registry} is no web address. {advice}")
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:  # the sha512 below says what is taken
            content: bytes = answer.read(_MOST)
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        raise RuntimeMissing(f"{package} could not be downloaded from {address} ({reason}). {advice}") from None
    if not is_archive(content, sha512):
        raise RuntimeMissing(f"What came from {address} is not the archive that npm publishes. {advice}")
    return content
