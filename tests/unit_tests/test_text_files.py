"""Files as users have them: read, or refused with what to do, by one reader for all of them."""

import gzip
import json
from pathlib import Path

import pytest

from megatron_tropd.base.errors import ConfigError, InputError
from megatron_tropd.base.text_files import (
    lines_with_offsets,
    read_json_lines,
    read_json_object,
    read_toml,
)
from megatron_tropd.cluster.site import load_site
from megatron_tropd.config import load_config
from megatron_tropd.planning.hardware import load_hardware

LINES = '{"prompt": "é"}\n\n{"prompt": "b"}\n'
OBJECTS = [(1, {"prompt": "é"}), (3, {"prompt": "b"})]
TOML = 'like = "h100"\nname = "é"\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
FOREIGN = [
    (LINES.encode("utf-16"), "is UTF-16 text.*iconv -f UTF-16"),
    (LINES.encode("utf-16-be"), "begins with zero bytes.*UTF-16"),
    (LINES.encode("utf-32"), "is UTF-32 text.*iconv -f UTF-32"),
    (gzip.compress(LINES.encode(), mtime=0), "is compressed with gzip.*gunzip"),
    (b"\x28\xb5\x2f\xfd\x00", "is compressed with zstd.*unzstd"),
    (b"PK\x03\x04\x14\x00", "is a zip archive.*unzip"),
    (b"PAR1\x15\x04", r"is a Parquet file.*read_parquet\('.*\.to_json"),
    (POINTER, "is a Git LFS pointer.*git lfs pull"),
]


def _write(folder: Path, content: bytes, name: str = "file.txt") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [LINES.encode(), LINES.encode("utf-8-sig"), LINES.replace("\n", "\r\n").encode("utf-8-sig")],
    ids=["plain", "mark", "mark and CRLF"],
)
def test_a_mark_and_windows_line_ends_are_read(tmp_path: Path, content: bytes):
    path = _write(tmp_path, content)
    assert list(read_json_lines(path, "prompts file")) == OBJECTS
    for _, offset, line in lines_with_offsets(path, "file"):
        assert content[offset : offset + len(line)] == line
        assert json.loads(line) in [value for _, value in OBJECTS]
    toml = TOML.replace("\n", "\r\n").encode("utf-8-sig")
    assert read_toml(_write(tmp_path, toml), "Config file") == {"like": "h100", "name": "é"}


@pytest.mark.parametrize(("content", "message"), FOREIGN)
def test_other_formats_say_how_to_make_text_of_them(tmp_path: Path, content, message: str):
    path = _write(tmp_path, content)
    with pytest.raises(InputError, match=f"(?s)The prompts file {path} {message}"):
        list(read_json_lines(path, "prompts file"))
    for reader in (load_config, load_site, lambda path: load_hardware(str(path))):
        with pytest.raises(ConfigError, match=f"(?s)file {path} {message}"):
            reader(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"prompt": "a"}]\n', r"line 1: .*found list\. The file holds one array.*jq -c '\.\[\]'"),
        ('[\n  {"prompt": "a"},\n', r"line 1: .*The file holds one array"),
        ('{\n  "prompt": "a"\n}\n', "line 1: .*Each object must stand on one line: jq"),
        ('{"prompt": "a"}\n{"prompt": "b"},\n', "line 2: .*Remove the comma at the end"),
        ('{"prompt": "a",}\n', "line 1: .*No comma may stand before }"),
        ('{"prompt": "a"}\r{"prompt": "b"}\r', "line 1: .*carriage return alone"),
        ('{"prompt": "a"}{"prompt": "b"}\n', "line 1: .*Extra data"),
        ("<!DOCTYPE html>\n", "line 1: .*looks like a web page"),
        ("prompt,answer\n", "line 1: .*Write one on each line"),
        ('{"x": ' + "[" * 200_000 + "\n", "line 1: .*recursion"),
    ],
)
def test_json_that_is_no_json_lines_says_what_to_write(tmp_path: Path, content: str, message: str):
    path = _write(tmp_path, content.encode())
    with pytest.raises(InputError, match=message):
        list(read_json_lines(path, "prompts file"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\r\n", "is empty"),
        (b"a = { b = 1, }\n", "line 1.*No comma may follow the last"),
        (b"a = 1,\n", "line 1.*No comma may follow"),
        (b'{"model": {}}\n', "looks like JSON"),
        (b"a = '\xe9'\n", "is not UTF-8, as TOML is: byte 5 is 0xe9"),
    ],
)
def test_toml_that_is_none_says_what_to_write(tmp_path: Path, content: bytes, message: str):
    path = _write(tmp_path, content)
    for reader in (load_config, load_site, lambda path: load_hardware(str(path))):
        with pytest.raises(ConfigError, match=f"file {path} .*{message}"):
            reader(path)


def test_other_encodings_are_named_with_their_line(tmp_path: Path):
    path = _write(tmp_path, b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(InputError, match=r"line 2: .*utf-8.*iconv -f LATIN1"):
        list(read_json_lines(path, "prompts file"))


def test_bytes_that_are_no_text_are_not_taken_for_latin_1(tmp_path: Path):
    path = _write(tmp_path, b"\x80\x04\x95pickled\x00")
    with pytest.raises(InputError, match=r"line 1: .*It is no text"):
        list(read_json_lines(path, "prompts file"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *FOREIGN[:2],
        (POINTER, "is a Git LFS pointer: .* of 12345 bytes"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark.*sed -i"),
        (b'{"a": ' + b"[" * 200_000, "cannot be read as JSON: maximum recursion"),
        (b'{"a": 1,}', "cannot be read as JSON: "),
        (b"[]", "must hold a JSON object, found list"),
    ],
)
def test_json_of_a_model_folder_is_read_as_transformers_reads_it(
    tmp_path: Path, content: bytes, message: str
):
    path = _write(tmp_path, content, "config.json")
    with pytest.raises(InputError, match=f"(?s){path} {message}"):
        read_json_object(path)


def test_folders_and_absent_files(tmp_path: Path):
    for reader, advice in (
        (load_config, "Give the path of a TOML file"),
        (load_site, "Copy slurm/site.example.toml"),
    ):
        with pytest.raises(ConfigError, match=f"does not exist. {advice}"):
            reader(tmp_path / "absent.toml")
    for reader in (load_config, load_site, lambda path: load_hardware(str(path))):
        with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
            reader(tmp_path)
    with pytest.raises(InputError, match=r"The prompts file .* cannot be read: Is a directory"):
        list(read_json_lines(tmp_path, "prompts file"))
