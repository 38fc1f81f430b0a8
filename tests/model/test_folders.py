"""What makes a folder a complete model, and how two of them are told apart."""

import json

import pytest

from tests.support.hub_server import INDEX, SHARDS
from tuner.model import folders
from tuner.model.folders import missing_files
from tuner.system.errors import UserError


def make(folder, *names):
    for name in names:
        (folder / name).write_text("{}")


def test_missing_files(tmp_path):
    assert missing_files(tmp_path / "nowhere") == ["config.json", "tokenizer.json", "model.safetensors"]
    make(tmp_path, "config.json", "tokenizer.json")
    assert missing_files(str(tmp_path)) == ["model.safetensors"]
    make(tmp_path, "model.safetensors")
    assert missing_files(tmp_path) == []
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    assert missing_files(tmp_path) == SHARDS
    make(tmp_path, SHARDS[0])
    assert missing_files(tmp_path) == SHARDS[1:]
    make(tmp_path, SHARDS[1])
    assert missing_files(tmp_path) == []
    (tmp_path / "tokenizer.json").unlink()
    assert missing_files(tmp_path) == ["tokenizer.json"]


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\udcff"]
    + [
        json.dumps({"weight_map": {"a": name}}) for name in ("../x.safetensors", "/etc/hostname", "a/b", "..")
    ],
)
def test_damaged_index_is_missing(tmp_path, index):
    make(tmp_path, "config.json", "tokenizer.json", "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(index.encode("utf-8", "surrogateescape"))
    assert missing_files(tmp_path) == ["model.safetensors.index.json"]


def test_a_folder_that_is_there_and_not_complete_is_in_the_way(tmp_path):
    assert not folders.is_complete(tmp_path / "nowhere")
    make(tmp_path, "config.json")
    with pytest.raises(UserError, match=r"\(tokenizer.json, model.safetensors missing\); rename it"):
        folders.is_complete(tmp_path)
    make(tmp_path, "tokenizer.json", "model.safetensors")
    assert folders.is_complete(tmp_path)


def test_the_weights_of_an_index_are_each_shard_once(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert folders.weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert folders.weight_bytes(tmp_path) == 5
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    for name, content in zip(SHARDS, (b"123", b"4567"), strict=True):
        (tmp_path / name).write_bytes(content)
    assert folders.weight_files(tmp_path) == [tmp_path / name for name in SHARDS]
    assert folders.weight_bytes(tmp_path) == 7


def test_the_revision_is_the_hubs_or_the_one_written_down(tmp_path):
    cached = tmp_path / "models--google--gemma-3--it" / "snapshots" / "0123"
    assert (folders.revision(cached), folders.hub_name(cached)) == ("0123", "google/gemma-3--it")
    assert (folders.revision(tmp_path), folders.hub_name(tmp_path)) == (None, None)
    folders.write_origin(tmp_path, "abc", "google/gemma-3-4b-it")
    assert (folders.revision(tmp_path), folders.hub_name(tmp_path)) == ("abc", "google/gemma-3-4b-it")
    for text, revision in {b"abc\n": "abc", b"": None, b"abc ../..": "abc", b"\xff\n<b>/x": "\ufffd"}.items():
        (tmp_path / "REVISION").write_bytes(text)
        assert (folders.revision(tmp_path), folders.hub_name(tmp_path)) == (revision, None)


@pytest.mark.parametrize("size", [0, 1, 5000, 3_000_000])
def test_the_fingerprint_tells_weights_apart_by_any_sampled_byte_and_by_size(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    prints = {folders.weights_fingerprint(tmp_path)}
    path.write_bytes(bytes(size + 1))
    prints.add(folders.weights_fingerprint(tmp_path))
    changes = {0, size // 2, size - 1} if 0 < size < 256 * 4096 else {0, size - 1} if size else set()
    for position in changes:  # in a small file every byte is sampled, in a large one its ends
        changed = bytearray(size)
        changed[position] = 1
        path.write_bytes(changed)
        prints.add(folders.weights_fingerprint(tmp_path))
    assert len(prints) == 2 + len(changes)
    path.write_bytes(bytes(size))
    assert folders.weights_fingerprint(tmp_path) in prints


def test_too_little_disk_is_reported_for_a_folder_that_is_not_there_yet(tmp_path):
    folders.check_free_disk(tmp_path / "a" / "b", 1)
    with pytest.raises(UserError, match=r"b needs 1000000.0 GB of free disk, .* GB are free; free some"):
        folders.check_free_disk(tmp_path / "a" / "b", 10**15)
