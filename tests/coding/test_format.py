"""Files that were written once must be read for ever: what the bytes mean changes only with the version's number."""

from __future__ import annotations

import base64
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.coding import CorruptFileError, load_compressed, save_compressed

FILES = {  # of version 2, of the state below; never to be made anew
    "ans": (
        "iUxDApwFBcGBDcAgCATAn8idvpFao1gCJMZO37tP/I2iNCSvKWjeKx7OG86NSLGAMgbY2BdELc8PS2ECxhETUoZgLGbJTi0oAYox"
        "JuYwAfklTGkMYMDi4FfMmFTMWFHMWpValF+cgpyPmAE8AD3MzM0/AAAAQEAAAL+gAABAaAkAoAP8fw/AAD8H8P8gBAKAkBoDQEgF"
        "AB/j+H4AAfg/h/kAIBQEgMAkAD3MzM2tqqokC/RqMW6FnFYOOuSqQbC6gzcQleTra3FdoNVH+EiyIuIMioF+ASrpUV54GvSZCxtK"
        "cW6m4J1KQr1123ovrYSTT2JCcPY2sIIi5IqZRqGZdItZ0PYylkmlzpmnW9Mnhv6s7gmezSgpBhdX1LaFGMTjwWEeXGyr58kikd+2"
        "Sv9VbHJ5p+nHIpnsvZ+XM6lkLZK0tLSUtLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0"
        "tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0tLS0"
        "tLS0tLS0tLS0tLS0tLS0wpoLte7cGQO15CEz4TinbMCGKOKgSGOdVx6Q8jGUTHi6ju6gvt8GTxiXDZbrFJpWon2bLBJNTUDaED9q"
        "DMncepokooYQWhqKLA7+rUTL"
    ),
    "huffman": (
        "iUxDAr0PBcGBDcAgCATAn8idvpFao1gCJMZO37tP/I2iNCSvKWjeKx7OG86NSLGAMgbY2BdELc8PS2ECxhETUoZgLGbJTi0oAYox"
        "JuYwAfklTGkMYMDi4FfMmFTMWFHMWpValF+cgpyPmAEAADiYxjGMYxjGP6Av+ADh4eHh4eHh4eHh4T3MzM0/AAAAQEAAAL+gAAB4"
        "eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4"
        "eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHhA"
        "aAkAoAP8fw/AAD8H8P8gBAKAkBoDQEgFAB/j+H4AAfg/h/kAIBQEgMAAA5iqqwFVVgKqrAVVWAqqsBVVYCqqwFVVgKqrAVVWAqqs"
        "BVVYCqqwFVVgKqrAVVWAqqsBVVYCqqwFVVgKqrAVVWAqqsBVVYCqqwFVVgKqrAVVWAqqsBVVYCqqwFVVgKqrAVVWAqqsBVVYCqqw"
        "FVVgKqrAVVWAJAAAEIMQUYcgkosw049BFJNRVZdhlptx15+CGKOSWac9zMzNGCqqqqqAIpqIQNLKsvkiiyVjCTJJZJpSacC7M05p"
        "m1gAAEAAAgAABZEQWApKxJWkg4MyEQtQFHwOchSFQPESDYg="
    ),
    "none": (
        "iUxDAvIQBcGBDcAgCATAn8idvpFao1gCJMZO37tP/I2iNCSvKWjeKx7OG86NSLGAMgbY2BdELc8PS2ECxhETUoZgLGbJTi0oAYox"
        "JuYwAfklTGkMYMDi4FfMmFTMWFHMWpValF+cgpyPmAECqqUqqlKqpSqqUqqlKqpSqqUqqlKqpSqqUqqgP6Av+ADh4eHh4eHh4eHh"
        "4T3MzM0/AAAAQEAAAL+gAAB4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4"
        "eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4eHh4"
        "eHh4eHh4eHh4eHh4eHh4eHj+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+//3/+/"
        "/3/+//3/+//3/+//3/+//39AaAkAoAP8fw/AAD8H8P8gBAKAkBoDQEgFAB/j+H4AAfg/h/kAIBQEgMAB/AfwH8B/AfwH8B/AfwH8"
        "B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/AfwH8B/JAAAEIMQUYcgkosw049BFJNRVZdh"
        "lptx15+CGKOSWac9zMzNGCqqqqqAIpqIQNLKsvkiiyVjCTJJZJpSacC7M05pmrIiFgqREiQg4MyEhagUfA5yFIqAO+N8wg=="
    ),
}


def state() -> OrderedDict[str, Tensor]:
    """Every kind of content, by integers: no random numbers."""
    n = torch.arange(600)
    found: OrderedDict[str, Tensor] = OrderedDict()
    found["zeros.map"] = ((n * 7 % 11 == 0) * (n % 5 - 2)).float().view(20, 30)
    found["table"] = torch.tensor([0.5, -1.25, 3.0, 0.1])[n % 4]
    found["grid"] = ((n % 15 - 7).float() * 0.5).view(20, 30)
    found["half"] = (n[:40].float() / 64 + 0.5).half().float()
    found["raw"] = torch.tensor([0.1, 0.2, 0.3])
    found["steps"] = torch.tensor(12345)
    found["mask"] = n[:50] % 3 == 0
    found["again"] = found["raw"]
    found["empty"] = torch.empty(0, 3)
    root = {"version": 1, "kept": {"a": [1, (2.5, None)], "b": "x"}}
    found._metadata = OrderedDict({"": root, "zeros": {"version": 3}})  # type: ignore[attr-defined]
    return found


def check(path: Path) -> None:
    loaded, expected = load_compressed(path), state()
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    assert loaded["raw"] is loaded["again"]
    assert loaded._metadata == expected._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("coder", FILES)
def test_a_file_of_this_version_is_read(coder: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(base64.b64decode(FILES[coder]))
    check(tmp_path / "f")


@pytest.mark.parametrize("coder", FILES)
def test_what_is_written_now_has_this_versions_number_and_size(coder: Any, tmp_path: Path) -> None:
    save_compressed(state(), tmp_path / "f", coder=coder)
    check(tmp_path / "f")
    written, known = (tmp_path / "f").read_bytes(), base64.b64decode(FILES[coder])
    assert written[:4] == known[:4] == b"\x89LC\x02"
    assert abs(len(written) - len(known)) < 16  # another zlib may deflate the names otherwise


def sealed(content: bytes) -> bytes:
    return content + zlib.crc32(content).to_bytes(4, "little")


@pytest.mark.parametrize("coder", FILES)
def test_a_file_of_the_first_version_is_read_or_its_version_named(coder: str, tmp_path: Path) -> None:
    content = bytearray(base64.b64decode(FILES[coder])[:-4])
    content[3] = 1
    (tmp_path / "f").write_bytes(sealed(bytes(content)))
    check(tmp_path / "f")  # the last commits of that version
    content[-20] ^= 0x55  # an older one: it means something else
    (tmp_path / "f").write_bytes(sealed(bytes(content)))
    with pytest.raises(CorruptFileError, match=r"f is corrupt: it has version 1 of the format, whose layout changed"):
        load_compressed(tmp_path / "f")


@pytest.mark.parametrize("version", [0, 4, 200])
def test_other_versions_are_named(version: int, tmp_path: Path) -> None:
    content = bytearray(base64.b64decode(FILES["ans"])[:-4])
    content[3] = version
    (tmp_path / "f").write_bytes(sealed(bytes(content)))
    with pytest.raises(
        CorruptFileError, match=f"it has version {version} of the format, and only 1, 2 and 3 can be read"
    ):
        load_compressed(tmp_path / "f")
