"""Downloads a file, and leaves no partial file if that fails."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from lightning_compress.core.files import replacing

CHUNK = 1 << 20


def fetch(url: str, path: Path, *, md5: str) -> None:
    """Download a file, and keep it only if its content has the expected checksum.

    Args:
        url: The address of the file.
        path: The path to which the file is written; missing folders are created.
        md5: The expected MD5 checksum of the content, in hexadecimal.

    Raises:
        ConnectionError: The download failed; the message names the address, and the folder for a manual download.
        ValueError: The checksum differs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    with replacing(path) as partial, partial.open("wb") as file:
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                while chunk := response.read(CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise ConnectionError(
                f"Could not download {url} ({error}). Check the network, or put {path.name} into {path.parent} by hand."
            ) from error
        if digest.hexdigest() != md5:
            raise ValueError(
                f"{url} has the MD5 checksum {digest.hexdigest()}, expected {md5}: the download is damaged, or the file"
                f" has changed. Nothing was kept. Try again, or put {path.name} into {path.parent} by hand."
            )
