"""Traps that were thought of, one by one; the fuzzed files of ``test_readers.py`` find others."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor, nn

from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.policies import MAX_POLICY_BYTES, TrainedPolicy, load_policy, save_policy
from prunegraph.cli.main import main
from prunegraph.core.errors import ArtefactError, ConfigError, DataError, ModelError
from prunegraph.core.reading import MAX_IMAGE_SIZE, MAX_JSON_BYTES, checked, read_json, read_text
from prunegraph.core.tensors import MAX_TENSORS, read_safetensors
from prunegraph.data.decode import decode
from prunegraph.data.records import Record, scan
from prunegraph.models import build_model, load_weights
from prunegraph.models.weights import weights_info
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.yaml_file import read_yaml
from prunegraph.runs.report.report import read_report
from prunegraph.runs.report.tables import methods_table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: &a [x]\nb: *a\n", "no aliases and no tags"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "no aliases and no tags"),
        ("a: !!python/object/apply:os.system [echo]\n", "no aliases and no tags"),
        ("a: !!bool maybe\n", "no aliases and no tags"),
        ("a: 2001-99-99\n", "is not YAML: month must be"),
        ("[" * 5_000, "is not YAML"),
        ("1: a\n", "each option a name"),
        ("a: b\n" * 20_000, "larger than 65,536 bytes"),
    ],
)
def test_yaml_holds_plain_values_only(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


@pytest.mark.parametrize("value", [".nan", ".inf", "1e300", "0x" + "f" * 9000, "-" + "1" * 400])
def test_numbers_without_use_are_no_options(
    tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    for name in ("keep_macs", "seed", "learning_rate", "networks"):
        within = "agent:\n  " if name == "learning_rate" else ""
        path.write_text(f"{within}{name}: {value}\n")
        assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert f"{name}=" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "it is no JSON"),
        ("[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("[NaN]", "NaN is no number"),
        ("[1e999]", "1e999 is too large"),
        ("[" + "9" * 10_000 + "]", "is too large"),
        ("[9223372036854775808]", "is too large"),
        ("\udcff", "it is no text"),
    ],
)
def test_json_is_bounded(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ArtefactError, match=message):
        read_json(path)


def test_endless_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ArtefactError, match=r"pipe\.json is a pipe or a device"):
        read_json(tmp_path / "pipe.json")
    with (tmp_path / "large.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)  # a hole
    with pytest.raises(ArtefactError, match="is larger than"):
        read_text(tmp_path / "large.json")


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    save_policy(tmp_path / "policy", TrainedPolicy(PruningNetwork(NetworkConfig())))
    return tmp_path / "policy"


@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_a_policy_is_a_file_of_a_limited_size(policy_folder: Path, kind: str) -> None:
    path = policy_folder / "policy.safetensors"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as stream:
            stream.truncate(MAX_POLICY_BYTES + 1)  # a hole
    message = "is larger than" if kind == "large" else r"policy\.safetensors is a pipe or"
    with pytest.raises(ArtefactError, match=message):
        load_policy(policy_folder)


def header_of(entries: str) -> bytes:
    return struct.pack("<Q", len(entries)) + entries.encode()


def many_tensors(number: int) -> str:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ",".join(f'"{name}":{empty}' for name in range(number))


@pytest.mark.parametrize("escaped", [False, True])
def test_a_header_of_too_many_tensors_is_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, escaped: bool
) -> None:
    name = r'"\"{{":' if escaped else '"a":'
    first = name + '{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    content = header_of("{" + first + many_tensors(MAX_TENSORS) + "}")
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)

    def parse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("safetensors.safe_open", parse)
    with pytest.raises(ArtefactError, match="lists more than 100,000 tensors"):
        read_safetensors(path)


def test_braces_in_the_metadata_of_a_header_are_no_tensors(tmp_path: Path) -> None:
    state = json.dumps(json.dumps([{"a": "{"}] * MAX_TENSORS))
    path = tmp_path / "w.safetensors"
    path.write_bytes(header_of('{"__metadata__":{"state":' + state + "}," + many_tensors(2) + "}"))
    tensors, metadata = read_safetensors(path)
    assert len(tensors) == 2
    assert len(json.loads(metadata["state"])) == MAX_TENSORS


def test_a_header_that_is_one_text_without_an_end_takes_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(header_of('{"' + r"\"" * 10**6))  # two passes a quote would take hours
    with pytest.raises(ArtefactError, match="no safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("size", [0, -5, MAX_IMAGE_SIZE + 1, 10**9, "224"])
def test_weights_name_a_size_of_images_that_fits_memory(tmp_path: Path, size: object) -> None:
    path = tmp_path / "w.safetensors"
    content = {"arch": "resnet20", "dataset": "folder", "image_size": size}
    path.with_suffix(".json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="image_size is"):
        weights_info(path)
    path.with_suffix(".json").write_text(json.dumps(content | {"image_size": MAX_IMAGE_SIZE}))
    info = weights_info(path)
    assert info is not None
    assert info.extra["image_size"] == MAX_IMAGE_SIZE


@pytest.mark.parametrize("odd", [r"\0", r"\ud800"])
@pytest.mark.parametrize("name", ["weights", "data_dir", "out", "policy"])
def test_a_path_in_yaml_is_one_that_a_system_takes(
    tmp_path: Path, name: str, odd: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f'{name}: "a{odd}b"\n')
    assert main(["train", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{name}=" in err
    assert "holds what no path can hold" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": True, "b": []}, "f.json: a is True, where an integer belongs"),
        ({"a": 1.0, "b": []}, "f.json: a is 1.0, where an integer belongs"),
        ({"b": []}, "f.json: a is missing"),
        ({"a": 1, "b": ["\x1b[2J"]}, r"f.json: b\[0\] is '\\x1b\[2J', where a printable text"),
        ({"a": 1, "b": {}}, "f.json: b is an object, where a list belongs"),
        ([], "f.json is a list, where an object belongs"),
    ],
)
def test_a_shape_names_the_place_that_is_wrong(value: object, message: str) -> None:
    shape = {"a": int, "b": list[str]}
    assert checked({"a": 1, "b": ["x"], "c": 0}, shape, "f.json") == {"a": 1, "b": ["x"], "c": 0}
    with pytest.raises(ArtefactError, match=message):
        checked(value, shape, "f.json")


def small() -> nn.Module:
    return nn.Linear(2, 2)


ODD_STATES: dict[str, tuple[object, str]] = {
    "stride 0": ({"weight": torch.zeros(1).expand(2**40, 2), "bias": torch.zeros(2)}, "shape"),
    "meta": ({"weight": torch.empty(2, 2, device="meta"), "bias": torch.zeros(2)}, "on meta"),
    "sparse": ({"weight": torch.eye(2).to_sparse(), "bias": torch.zeros(2)}, "sparse"),
    "complex": ({"weight": torch.zeros(2, 2) * 1j, "bias": torch.zeros(2)}, "complex64"),
    "integers": ({"weight": torch.zeros(2, 2).int(), "bias": torch.zeros(2)}, "int32"),
    "float8": ({"weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "bias": torch.zeros(2)}, "fl"),
    "names": ({0: torch.zeros(2)}, "holds no state dict"),
    "nested": ({"state_dict": {"state_dict": {}}}, "holds no state dict"),
}


@pytest.mark.parametrize("kind", ODD_STATES)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_odd_tensors_are_refused_and_the_network_stays(tmp_path: Path, kind: str) -> None:
    state, message = ODD_STATES[kind]
    torch.save(state, tmp_path / "w.pth")
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtefactError, match=message):
        load_weights(model, tmp_path / "w.pth")
    after: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_packed_weights_file_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with pytest.raises(ArtefactError, match="is packed"):
        load_weights(small(), tmp_path / "bomb.pth")


def test_a_name_cannot_ask_for_a_network_that_fits_no_memory() -> None:
    with pytest.raises(ModelError, match="too many parameters"):
        build_model("digits_resnet9998_w9999", num_classes=10, image_shape=(1, 8, 8))
    assert build_model("digits_resnet14_w64", num_classes=10, image_shape=(1, 8, 8))


def test_only_image_formats_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        pytest.fail("Ghostscript was asked")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", start)
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path, format="EPS")
    with pytest.raises(DataError, match="not an image"):
        decode(Record("train", "cat", "a.png", str(path)), lambda image: image)


def test_an_image_bomb_is_not_unpacked(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("1", (8, 8)).save(stream, format="PNG")
    content = bytearray(stream.getvalue())
    content[16:24] = struct.pack(">II", 30_000, 30_000)  # what the header says
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"30000 x 30000 pixels|decompression bomb"):
        decode(Record("train", "cat", "a.png", str(tmp_path / "a.png")), lambda image: image)


def test_pipes_and_gigantic_files_are_no_images(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate(2**40)
    for name, message in (
        ("pipe.png", "no regular file"),
        ("large.png", "1,099,511,627,776 bytes"),
    ):
        with pytest.raises(DataError, match=message):
            decode(Record("train", "cat", name, str(tmp_path / name)), lambda image: image)


def test_a_tar_that_leads_back_to_itself_ends(tmp_path: Path) -> None:
    first = tarfile.TarInfo("train/cat/0.png").tobuf(tarfile.GNU_FORMAT)
    back = bytearray(tarfile.TarInfo("train/cat/1.png").tobuf(tarfile.GNU_FORMAT))
    back[124:136] = (-1024).to_bytes(12, "big", signed=True)
    back[148:156] = b" " * 8
    back[148:156] = b"%06o\0 " % sum(back)
    (tmp_path / "a.tar").write_bytes(first + bytes(back) + bytes(1024))
    # since Python 3.11.14 (CVE-2025-8194) tarfile itself stops there
    why = "'train/cat/1.png' has a negative size|its end is missing"
    with pytest.raises(DataError, match=rf"no plain tar \(({why})\)"):
        scan(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (slice(0, 100), bytes(1) * 100, "holds no train images"),  # a member without a name
        (slice(124, 136), b"\x80" + b"\x7f" * 11, "no plain tar"),  # longer than all disks
    ],
)
def test_headers_of_a_tar_may_lie(
    tmp_path: Path, place: slice, content: bytes, message: str
) -> None:
    member = tarfile.TarInfo("train/cat/0.png")
    if "plain" in message:
        member.type = tarfile.XHDTYPE
    header = bytearray(member.tobuf(tarfile.USTAR_FORMAT))
    header[place] = content
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(DataError, match=message):
        scan(tmp_path / "a.tar")


def test_names_in_a_report_are_no_markup_and_no_way_out(tmp_path: Path) -> None:
    row = {"name": "[/x]", "seed": 0, "macs": 1, "params": 1, "search_accuracy": 0.5}
    row |= {"test_accuracy_recalibrated": 0.5, "test_accuracy_finetuned": None}
    row |= {"networks_evaluated": 1, "digest": "d", "role": "baseline", "searches": False}
    dense = {"macs": 2, "params": 2, "test_accuracy": 0.5, "test_accuracy_finetuned": None}
    pruned = {"macs": 1, "params": 1, "widths": {}, "mask_digest": "d", "search_accuracy": 0.5}
    pruned |= {"seed": 0, "test_accuracy_recalibrated": 0.5, "test_accuracy_finetuned": None}
    content = {"schema": 1, "command": "train", "arch": "[/y]", "dataset": "digits", "budget": {}}
    content |= {"dense": dense, "pruned": pruned, "methods": [row], "verdict": None}
    content |= {"verdict_reason": "", "verdict_metric": "test_accuracy_recalibrated"}
    content |= {"task": "image_classification", "score_name": "accuracy", "higher_is_better": True}
    content |= {"repaired": None, "graph": "g", "machine": {"threads": 1}, "files": {}}
    splits = ("train", "search", "test")
    content |= {"data": {name: {"fingerprint": "", "samples": 1} for name in splits}}
    content |= {"search": None, "recipe": {}, "seed": 0, "precision": "float32", "versions": {}}
    content |= {"peak_memory": {"dense": 2, "pruned": 1}, "dense_widths": {}}
    content |= {"latency_ms": {"dense": 2.0, "pruned": 1.0, "on": "the CPU"}}
    folder = RunFolder(path=tmp_path)
    folder.file("report.json").write_text(json.dumps(content))
    assert methods_table(read_report(folder)).columns[0]._cells[1] == r"\[/x]"
    with pytest.raises(ArtefactError, match="lies outside the folder"):
        folder.check_digests({"../other": ""})
    with pytest.raises(ArtefactError, match="lies outside the folder"):
        folder.inside("/etc/passwd")
    dense["macs"] = 0
    folder.file("report.json").write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match="no network has 0 multiply-adds"):
        read_report(folder)
