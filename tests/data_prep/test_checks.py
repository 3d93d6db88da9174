"""`data verify` finds every corruption; the commands say what is wrong in one line."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from rich.progress import Progress

from data_prep import cli, plan
from data_prep.checks import statistics, verify
from data_prep.errors import DepthpipeError
from data_prep.manifest import Manifest, write_sealed


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers(required=True))
    args = parser.parse_args(arguments)
    return args.run(args)


def test_any_flipped_byte_is_found(copy: Path, rng: random.Random) -> None:
    shards = sorted((copy / "shards").iterdir())
    for _ in range(25):
        path = rng.choice(shards)
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        sound = path.read_bytes()
        path.write_bytes(data)
        assert verify(copy) == [f"{path}: SHA-256 differs from the manifest's"]
        path.write_bytes(sound)
    assert verify(copy) == []


def test_missing_extra_short_and_exchanged_shards_are_found(copy: Path) -> None:
    first, second = sorted((copy / "shards").iterdir())[:2]
    sound = first.read_bytes()
    first.unlink()
    assert verify(copy) == [f"{first}: missing"]
    first.write_bytes(sound[:-1])
    assert verify(copy) == [f"{first}: {len(sound) - 1} bytes, the manifest says {len(sound)}"]
    first.write_bytes(second.read_bytes())
    assert len(verify(copy)) == 1 and verify(copy)[0].startswith(str(first))
    first.write_bytes(sound)
    extra = copy / "shards" / "000099.tar"
    extra.write_bytes(sound)
    assert verify(copy) == [f"{extra}: not in the manifest"]


FALSE_FACTS = {"vocab_size": 2049, "dtype": "uint32", "end_of_document_id": 7, "tokens": 5, "documents": 6}


@pytest.mark.parametrize("name", FALSE_FACTS)
def test_a_fact_in_the_manifest_that_is_not_so_is_found(name: str, copy: Path) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    right = content[name]
    content[name] = FALSE_FACTS[name]
    write_sealed(path, content)
    assert f"{path}: {name} is {FALSE_FACTS[name]!r}, but should be {right!r}" in verify(copy)


def test_a_wrong_count_of_one_shard_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    for name in ("tokens", "documents"):
        content = json.loads(path.read_text())
        content[name] += 1
        content["shards"][0][name] += 1  # consistent in itself, but not with the shard
        write_sealed(path, content)
        assert len(verify(copy)) == 1
        content[name] -= 1
        content["shards"][0][name] -= 1
        write_sealed(path, content)


def test_any_byte_of_the_manifest_that_differs_is_found(copy: Path, rng: random.Random) -> None:
    path = copy / "manifest.json"
    sound = path.read_bytes()
    places = [sound.index(b'"text_bytes": ') + 14, sound.rindex(b"\n"), *rng.sample(range(len(sound)), 300)]
    for place in places:
        for byte in {ord("1"), ord("7"), ord(" "), sound[place] ^ 1 << rng.randrange(8)} - {sound[place]}:
            data = bytearray(sound)
            data[place] = byte
            path.write_bytes(data)
            with pytest.raises(DepthpipeError, match=r"manifest\.json: (damaged or edited manifest|format version)"):
                verify(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged or edited manifest: restore it from a copy, or tokenize to another --out"),
        ('{"format_version": 99}', "format version 99, this depthpipe reads 2"),
        ("[]", "format version None"),
        ('{"format_version": 2, "shards": [{}]}', "damaged or edited manifest"),
    ],
)
def test_a_damaged_manifest_is_named(content: str, message: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(content)
    with pytest.raises(DepthpipeError, match=message):
        Manifest.load(copy)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"\x12\x00"), "not the tokenizer that made the shards"),
        (lambda path: path.write_bytes(b"x"), r"damaged \(no tokenizer\)"),
        (lambda path: path.unlink(), "missing"),
    ],
    ids=["replaced", "damaged", "missing"],
)
def test_a_wrong_tokenizer_beside_the_shards_is_found(damage, message: str, copy: Path) -> None:
    path = copy / "tokenizer.model"
    damage(path)
    message = f"^{re.escape(str(path))}: {message}: restore it: any copy of the tokenizer that made the shards will do$"
    (problem,) = verify(copy)
    assert re.search(message, problem)
    with pytest.raises(DepthpipeError, match=message):
        statistics(copy)


def test_the_commands_make_check_and_show_a_dataset(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = str(tmp_path / "t.model"), str(tmp_path / "data")
    source = [str(corpus / "json"), "--include", "*.py", "--exclude", "tool.py"]
    assert run("tokenizer", "train", *source, "--out", model, "--vocab-size", "600") == 0
    tokenize = ("tokenize", *source, "--tokenizer", model, "--out", out, "--workers", "2")
    for part in ("1/2", "2/2"):
        assert run(*tokenize, "--part", part) == 0
        assert f"part {part[0]} of 2; after all parts: depthpipe data merge {out}" in capsys.readouterr().out
    with pytest.raises(DepthpipeError, match=rf"all its parts are done: run `depthpipe data merge {out}`$"):
        run("data", "verify", out)
    assert run(*tokenize, "--part", "1/2") == 0
    assert re.search(r"tokens, all of them made before\n", capsys.readouterr().out)
    for what in ("merged", "merged before"):
        assert run("data", "merge", out) == 0
        assert re.search(rf"^{out}: 4 documents, [\d,]+ tokens, {what}\n", capsys.readouterr().out)
    assert run(*tokenize) == 0
    assert "reused" in capsys.readouterr().out
    assert run("data", "verify", out) == 0
    assert run("data", "inspect", out, "--samples", "1") == 0
    shown = capsys.readouterr().out
    assert "every shard is as it was written" in shown
    assert "4 documents" in shown and "bytes per token" in shown and "--- sample 1" in shown
    (tmp_path / "data" / "shards" / "000000.tar").write_bytes(b"x")
    with pytest.raises(
        DepthpipeError, match=f"1 problem found: restore the files, or remove {out} and tokenize again$"
    ):
        run("data", "verify", out)
    with pytest.raises(DepthpipeError, match=rf"000000\.tar: damaged shard \(1 bytes.*\): remove {out} and run again$"):
        run(*tokenize)
    shutil.rmtree(out)
    assert run(*tokenize) == 0


def test_a_terminal_shows_documents_tokens_and_speed_while_it_works(
    corpus: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=screen, force_terminal=True, width=150, color_system=None))
    inputs = (str(corpus), "--include", "*.py")
    assert run("tokenize", *inputs, "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "data")) == 0
    shown = screen.getvalue()
    assert re.search(r"━ .*[1-9][\d,]* documents [\d,]+ tokens [\d,]+ tokens/s", shown)


def test_the_speed_of_a_resumed_run_counts_its_own_tokens(
    corpus: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 40_000)
    inputs = (str(corpus / "email"), "--include", "*.py", "--tokenizer", str(tokenizer_path))
    arguments = ("tokenize", *inputs, "--out", str(tmp_path / "data"))
    numbers = []
    for part in (("--part", "1/2"), ()):
        assert run(*arguments, *part) == 0
        numbers.append(
            [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:tokens|of)", capsys.readouterr().out)]
        )
    (before, *_), (total, new, *_) = numbers
    assert 0 < new == total - before


def test_verifying_shows_its_speed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=screen, force_terminal=True, width=150, color_system=None))
    assert run("data", "verify", str(copy)) == 0
    assert re.search(r"reading shards [\d,]+ MB/s", screen.getvalue())


@pytest.mark.parametrize("command", ["data", "tokenizer", "tokenize"])
def test_the_help_of_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert f"example: depthpipe {command} " in capsys.readouterr().out


def test_ctrl_c_ends_in_a_word_and_the_same_command_goes_on(
    corpus: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("tokenize", str(corpus), "--include", "*.py", "--tokenizer", str(tokenizer_path))
    out = str(tmp_path / "data")

    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupt)
        assert run(*arguments, "--out", out) == 130
    assert f"{out}: stopped; the same command goes on from here" in capsys.readouterr().out
    assert psutil.Process().children() == []
    assert run(*arguments, "--out", out) == 0


def test_counts_of_what_was_left_out_are_printed(
    tokenizer_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": ""}\nbroken\n{"text": "\xff"}\n')
    arguments = ("tokenize", str(tmp_path), "--tokenizer", str(tokenizer_path), "--out", str(tmp_path / "out"))
    with pytest.raises(DepthpipeError, match=r"a\.jsonl:3: not valid JSON: mend it, or go on without it"):
        run(*arguments)
    assert run(*arguments, "--skip-bad") == 0
    shown = capsys.readouterr().out
    assert "2 documents" in shown
    assert "1 empty documents left out" in shown
    assert "1 bytes that are not UTF-8" in shown
    assert "1 lines, rows or damaged archives skipped" in shown and "a.jsonl:3: not valid JSON" in shown


@pytest.mark.parametrize("arguments", [("--workers", "0"), ("--part", "3/2"), ("--validation-fraction", "1")])
def test_arguments_out_of_range_are_refused(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("tokenize", "x", "--tokenizer", "t", "--out", "o", *arguments)
    assert exit_info.value.code == 2
    assert arguments[0] in capsys.readouterr().err
