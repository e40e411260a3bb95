"""Fetch a file whole or not at all."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from pathlib import Path

from lightning_compress.core.files import replacing

CHUNK = 1 << 20


def fetch(url: str, path: Path, *, md5: str) -> None:
    """Download `url` to `path` if its content has the checksum; nothing appears at `path` otherwise.

    Args:
        url: Where the file is.
        path: Where it goes; missing folders are made.
        md5: Expected checksum of the content, in hexadecimal.

    Raises:
        ConnectionError: The file could not be fetched; the message says from where and where to put it by hand.
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
                f"Could not download {url} ({error}). Where there is no network, put {path.name} into {path.parent}"
                " by hand."
            ) from error
        if digest.hexdigest() != md5:
            raise ValueError(
                f"{url} has the md5 checksum {digest.hexdigest()}, expected {md5}: the download is damaged or the file"
                " has changed. Nothing was kept."
            )
