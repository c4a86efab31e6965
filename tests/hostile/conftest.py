"""Valid files, and what turns them into hostile ones."""

import copy
import hashlib
import io
import json
import math
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import settings

from prunegraph.artefacts.pruned import MASK_FILE, checksum
from prunegraph.cli.main import main

settings.register_profile("hostile", max_examples=100, derandomize=True, database=None)
settings.register_profile(
    "endurance", max_examples=int(os.environ.get("PRUNEGRAPH_FILES", "10000")), database=None
)

Mutate = Callable[[bytes, Random], bytes]

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 10**6, 2**31, 2**63, -(2**64), 10**400),
    *(0.0, -0.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "../../etc/passwd", "/dev/zero", "os:system", "\ud800", "\x1b[2J", "[/bold]", "ff"),
    *("0" * 300, "x" * 5000, "digits_resnet9998_w9999", "torchvision:vit_h_14", "nan", "1e999"),
    *([], {}, [[]], [1], [None], {"a": 1}, {"": {}}, [1] * 1000, [-1, 0, 10**9]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values inside a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:5]
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def change_json(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value with something in it replaced, removed, added or moved."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        *path, key = random.choice(places(value)[1:] or [(None,)])
        outer = value
        for step in path:
            outer = outer[step]
        if not isinstance(outer, dict | list) or not outer:
            return copy.deepcopy(random.choice(ODD_VALUES))
        kind = random.randrange(5)
        if kind == 0:
            del outer[key]
        elif kind == 1 and isinstance(outer, dict):
            outer[random.choice(("", "x", "\ud800", "__class__", str(key) * 2))] = outer[key]
        elif kind == 2:
            outer[key] = [outer[key]] if random.random() < 0.5 else {"a": outer[key]}
        elif kind == 3 and isinstance(outer[key], int | float) and not isinstance(outer[key], bool):
            outer[key] = outer[key] * random.choice((-1, 0, 1.5, 1000, 2**40))
        else:
            outer[key] = copy.deepcopy(random.choice(ODD_VALUES))
    return value


def change_bytes(content: bytes, random: Random) -> bytes:
    """Return bytes with some flipped, cut off, doubled, removed or put in."""
    data = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        start = random.randrange(len(data) + 1)
        stop = start + random.choice((1, 2, 8, 64))
        kind = random.randrange(6)
        if kind == 0 and start < len(data):
            data[start] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[start:]
        elif kind == 2:
            del data[start:stop]
        elif kind == 3:
            data[start:start] = random.randbytes(stop - start)
        elif kind == 4:
            data[start:stop] = random.choice((b"\0", b"\xff")) * (stop - start)
        else:
            data[start:start] = data[start:stop]
    return bytes(data)


def change_json_file(content: bytes, random: Random) -> bytes:
    """Return a JSON file with other values, other bytes, or nested beyond all measure."""
    kind = random.randrange(10)
    if kind == 0:
        return change_bytes(content, random)
    if kind == 1:
        depth = random.choice((60, 1000, 100_000))
        return random.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    return json.dumps(change_json(json.loads(content), random)).encode()


def change_safetensors(content: bytes, random: Random) -> bytes:
    """Return a safetensors file whose header, metadata, numbers or bytes are others."""
    kind = random.randrange(6)
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), content[8 + size :]
    if kind == 0:
        return change_bytes(content, random)
    if kind == 1:
        length = random.choice((0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + content[8:]
    if kind == 2 and body:
        start = 4 * random.randrange(max(len(body) // 4, 1))
        odd = struct.pack("<f", random.choice((math.nan, math.inf, -math.inf, 3e38)))
        body = body[:start] + odd + body[start + 4 :]
    elif kind == 3 and header.get("__metadata__"):
        name = random.choice(list(header["__metadata__"]))
        record = change_json_file(header["__metadata__"][name].encode(), random)
        header["__metadata__"][name] = record.decode(errors="replace")
    elif kind == 4:
        name = random.choice([name for name in header if name != "__metadata__"])
        dtypes = ("F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4")
        header[name]["dtype"] = random.choice(dtypes)
    else:
        header = change_json(header, random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


YAML_SNIPPETS = (
    *(
        b"a: &a [x]\n",
        b"b: *a\n",
        b"seed: !!int 3\n",
        b"seed: !!python/object/apply:os.system [x]\n",
    ),
    *(b"seed: 2001-99-99\n", b"seed: 0x" + b"f" * 5000 + b"\n", b"seed: " + b"9" * 5000 + b"\n"),
    *(b"? [a]\n: b\n", b"1: 2\n", b"<<: {seed: 1}\n", b"seed: .nan\n", b"seed: 1:99:99\n"),
    *(
        b"[" * 5000,
        b"{a: " * 5000,
        b"- " * 5000,
        b"\t",
        b"%TAG ! x:\n---\n",
        b"---\n---\n",
        b"\x00",
    ),
    *(b"seed: |\n  x\x1b\n", b"seed: !!binary x\n", b"seed: !!bool x\n", b"seed: =\n", b"\xff\xfe"),
)


def change_yaml(content: bytes, random: Random) -> bytes:
    """Return a YAML file with other values, bytes, or what YAML has beyond values."""
    kind = random.randrange(3)
    if kind == 0:
        return change_bytes(content, random)
    if kind == 1:
        lines = content.splitlines(keepends=True)
        lines.insert(random.randrange(len(lines) + 1), random.choice(YAML_SNIPPETS))
        return b"".join(lines)
    changed = change_json(yaml.safe_load(content), random)
    return yaml.safe_dump(changed, allow_unicode=random.random() < 0.5).encode(errors="replace")


def change_tar(content: bytes, random: Random) -> bytes:
    """Return a tar with other members: outside paths, links, devices, lies about sizes."""
    if random.random() < 0.4:
        return change_bytes(content, random)
    members, out = [], io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            members.append((member, b"" if stream is None else stream.read()))
    number = random.randrange(len(members))
    member, data = members[number]
    kind = random.randrange(6)
    if kind == 0:
        names = ("../x.png", "/etc/x.png", "train/../../x.png", "train/x.png", "", "train//a", "\n")
        member.name = random.choice((*names, "train/cat/" + "x" * 300 + ".png", "val/new/a.png"))
    elif kind == 1:
        types = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"Z")
        member.type, member.linkname = random.choice(types), "/etc/passwd"
    elif kind == 2:
        members.insert(number, (member, data))
    elif kind == 3:
        keys = ("size", "path", "GNU.sparse.map", "GNU.sparse.realsize", "mtime", "hdrcharset")
        member.pax_headers = {random.choice(keys): random.choice(("-1", "9" * 30, "x", "0,0"))}
    elif kind == 4:
        data = change_bytes(data, random)
        member.size = len(data)
    raw = []
    for each, body in members:
        header = each.tobuf(
            random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)), "utf-8", "replace"
        )
        raw.append(header + body + bytes(-len(body) % 512))
    if kind == 5:  # the first member says that it is as large as a disk
        head = bytearray(raw[number])
        head[124:136] = random.choice((b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12))
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head[:512])
        raw[number] = bytes(head)
    out.write(b"".join(raw) + bytes(1024))
    return out.getvalue()


@pytest.fixture(scope="session")
def mutators() -> dict[str, Mutate]:
    """Return what makes hostile files, by the kind of file."""
    return {
        "bytes": change_bytes,
        "json": change_json_file,
        "safetensors": change_safetensors,
        "tar": change_tar,
        "yaml": change_yaml,
    }


def _sign_recipe(folder: Path) -> None:
    """Make the recipe's checksums right: a forger, not an accident."""
    path = folder / MASK_FILE
    try:
        record = json.loads(path.read_text())
        content = (folder / "pruned.safetensors").read_bytes()
        if isinstance(record, dict) and isinstance(record.get("weights"), dict):
            record["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
            path.write_text(json.dumps({**record, "checksum": checksum(record)}))
    except (ValueError, RecursionError):
        pass


@pytest.fixture(scope="session")
def sign_recipe() -> Callable[[Path], None]:
    """Return a function that makes the checksums of a folder's recipe right."""
    return _sign_recipe


@pytest.fixture(scope="session")
def run_words() -> list[str]:
    """Return the command of a short run."""
    words = [
        "train",
        "--arch",
        "digits_resnet8_w4",
        "--pretrain-epochs",
        "1",
        "--search-seeds",
        "1",
    ]
    words += [
        "--networks",
        "24",
        "--agent.update-size",
        "4",
        "--agent.subset",
        "64",
        "--baselines",
        "none",
    ]
    words += ["--agent.surrogate-steps", "2", "--agent.distill-steps", "1"]
    return [*words, "--calibration-images", "64", "--finetune-epochs", "1"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, run_words: list[str]) -> Path:
    """Return the folder of a finished run."""
    path = tmp_path_factory.mktemp("hostile") / "run"
    assert main([*run_words, "--threads", "1", "--out", str(path)]) == 0
    return path
