"""A killed tokenization resumes to byte-identical shards; a changed job is refused; a full disk keeps what is done."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from data_prep import commit, plan
from data_prep.errors import DepthpipeError
from data_prep.job import merge_parts, tokenize_corpus
from data_prep.manifest import Manifest
from data_prep.plan import Options

OPTIONS = Options(validation_fraction=0.1, chunk_tokens=1024)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def many_small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_UNIT_BYTES", 40_000)
    # A cut of power needs it, a killed process does not; on a busy disk it takes most of these tests' time.
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def job(corpus: Path, tokenizer_path: Path):
    """Tokenizes a part of the corpus into `out`."""

    def run(out: Path, workers: int = 2, **arguments):
        inputs = [str(corpus / "asyncio"), str(corpus / "email"), str(corpus / "odd.py")]
        arguments.setdefault("options", OPTIONS)
        return tokenize_corpus(inputs, tokenizer_path, out, workers=workers, include=["*.py"], **arguments)

    return run


@pytest.fixture
def expected(job, tmp_path: Path) -> dict[str, str]:
    """Every file of the uninterrupted result."""
    job(tmp_path / "uninterrupted", workers=1)
    files = contents(tmp_path / "uninterrupted")
    assert len(files) > 15
    return files


def contents(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_20_random_moments_the_result_is_the_same(
    job, expected: dict[str, str], tmp_path: Path, rng: random.Random
) -> None:
    units_left_by_kills = []
    for moment in range(20):
        out = tmp_path / f"killed-{moment}"
        process = fork.Process(target=job, args=(out, rng.randrange(1, 4)))
        process.start()
        # Kills are spread over the job by its own progress, so that they fall inside it on any machine.
        units = rng.randrange(0, 18)
        wait_for(lambda units=units, out=out, process=process: not process.is_alive() or done_units(out) >= units)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        units_left_by_kills.append(done_units(out))
        job(out, workers=rng.randrange(1, 4))
        assert contents(out) == expected
    assert len(set(units_left_by_kills)) > 4


def done_units(out: Path) -> int:
    return len(list((out / commit.UNFINISHED).glob("unit_*.json")))


def test_workers_do_not_outlive_a_killed_job(job, tmp_path: Path) -> None:
    process = fork.Process(target=job, args=(tmp_path / "out", 2))
    process.start()
    wait_for(lambda: done_units(tmp_path / "out") > 0)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not [worker for worker in alive if worker.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_worker_ends_the_job_in_one_line_and_the_job_resumes(
    job, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def kill_a_worker(*_: object) -> None:
        for child in psutil.Process().children()[:1]:
            child.kill()

    with pytest.raises(DepthpipeError, match="a worker process was killed"):
        job(out, progress=kill_a_worker)
    assert psutil.Process().children() == []
    job(out)
    assert contents(out) == expected


def test_a_commit_killed_at_every_step_is_completed(
    job, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    real = os.replace
    steps_left = 0

    def replace(source: object, target: object) -> None:
        nonlocal steps_left
        if steps_left == 0:
            raise Killed
        steps_left -= 1
        real(source, target)

    for part in (1, 2):
        job(tmp_path / "done", part=(part, 2))
    monkeypatch.setattr(os, "replace", replace)
    for step in range(100):
        out = tmp_path / f"killed-{step}"
        shutil.copytree(tmp_path / "done", out)
        steps_left = step
        try:
            merge_parts(out)
            break
        except Killed:
            steps_left = 1000
            merge_parts(out)
            assert contents(out) == expected
    assert step == len(expected) > 15  # every file of the result appears by one rename
    assert contents(out) == expected


def test_parts_done_apart_merge_to_the_whole(job, expected: dict[str, str], tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert not job(here, part=(1, 3)).finished
    with pytest.raises(DepthpipeError, match=r"units are not done: run the missing --part 2/3, 3/3, or name"):
        merge_parts(here)
    job(there, part=(2, 3))
    job(here, part=(3, 3))
    with pytest.raises(DepthpipeError, match="not a dataset"):
        Manifest.load(here / "train")
    report = merge_parts(here, [there])
    assert report.datasets == (here / "train", here / "validation")
    assert contents(here) == expected
    assert merge_parts(here).reused


def test_parts_of_another_job_do_not_merge(job, tmp_path: Path) -> None:
    job(tmp_path / "a", part=(1, 2))
    job(tmp_path / "b", part=(2, 2), options=Options(validation_fraction=0.2, chunk_tokens=1024))
    with pytest.raises(DepthpipeError, match="a part of another job"):
        merge_parts(tmp_path / "a", [tmp_path / "b"])
    with pytest.raises(DepthpipeError, match="no tokenizing job is there"):
        merge_parts(tmp_path / "nowhere", [])


def test_an_input_changed_under_a_half_done_job_is_named(tokenizer_path: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for i in range(6):
        (source / f"{i}.txt").write_text(f"text number {i}\n" * 3000)
    run = lambda **arguments: tokenize_corpus(  # noqa: E731
        [str(source)], tokenizer_path, tmp_path / "out", workers=1, **arguments
    )
    run(part=(1, 2))
    text = (source / "3.txt").read_text()
    (source / "3.txt").write_text(text.replace("number", "NUMBER"))
    with pytest.raises(DepthpipeError, match=r"3\.txt: changed since"):
        run(part=(2, 2))
    (source / "3.txt").write_text(text)
    os.utime(source / "3.txt", ns=(1, 1))
    run(part=(2, 2))
    (source / "3.txt").unlink()
    with pytest.raises(DepthpipeError, match=r"3\.txt: gone since"):
        run(part=(2, 2))


def write_lines(path: Path, bad: int | None) -> None:
    lines = [json.dumps({"text": f"document {i} " + "words " * (i % 50)}) for i in range(3000)]
    if bad is not None:
        lines[bad] = "broken"
    path.write_text("\n".join(lines) + "\n")


def test_after_a_bad_line_skip_bad_goes_on_with_what_is_finished(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, bad=1500)
    run = lambda name, skip_bad, **arguments: tokenize_corpus(  # noqa: E731
        [str(path)], tokenizer_path, tmp_path / name, workers=1, options=Options(skip_bad=skip_bad), **arguments
    )
    whole = run("whole", True)
    expected = contents(tmp_path / "whole")
    out = tmp_path / "out"
    with pytest.raises(DepthpipeError, match=r"a\.jsonl:1501: not valid JSON: mend it, or .* with --skip-bad"):
        run("out", False)
    finished = {path: path.stat().st_mtime_ns for path in (out / "unfinished").glob("unit_*.json")}
    assert finished
    report = run("out", True, part=(1, 1))
    assert 0 < report.new_tokens < whole.new_tokens == whole.counters.tokens == report.counters.tokens
    assert contents(out) == expected
    with pytest.raises(DepthpipeError, match=r"was begun with --skip-bad, and has skipped something \(1\): add it"):
        run("out", False)


def test_skip_bad_that_has_skipped_nothing_is_no_other_job(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, bad=None)
    run = lambda name, skip_bad, **arguments: tokenize_corpus(  # noqa: E731
        [str(path)], tokenizer_path, tmp_path / name, workers=1, options=Options(skip_bad=skip_bad), **arguments
    )
    run("here", True, part=(1, 2))
    run("there", False, part=(2, 2))
    merge_parts(tmp_path / "here", [tmp_path / "there"])
    run("whole", True)
    assert contents(tmp_path / "here") == contents(tmp_path / "whole")
    for skip_bad in (False, True):
        assert run("here", skip_bad).reused
        assert contents(tmp_path / "here") == contents(tmp_path / "whole") or not skip_bad


def test_a_job_without_a_finished_unit_is_begun_anew(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, bad=0)
    run = lambda name="out", **options: tokenize_corpus(  # noqa: E731
        [str(path)], tokenizer_path, tmp_path / name, workers=1, options=Options(**options)
    )
    with pytest.raises(DepthpipeError, match=r"no key 'body'|not valid JSON"):
        run(text_key="body")
    assert not done_units(tmp_path / "out")
    write_lines(path, bad=None)
    run()
    run("whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_job_without_a_finished_unit_is_left_alone_while_a_part_of_it_runs(job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = fork.Process(target=job, args=(out, 1), kwargs={"part": (1, 2)})
    process.start()
    wait_for((out / commit.UNFINISHED / "job.json").exists)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        for record in (out / commit.UNFINISHED).glob("unit_*.json"):
            record.unlink()
        with pytest.raises(DepthpipeError, match=r"was begun with validation_fraction 0\.1, now it is 0\.2"):
            job(out, part=(2, 2), options=Options(validation_fraction=0.2, chunk_tokens=1024))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def test_a_damaged_record_of_a_unit_is_named(job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job(out, part=(1, 2))
    record = next((out / commit.UNFINISHED).glob("unit_*.json"))
    record.write_bytes(record.read_bytes().replace(b'"tokens": ', b'"tokens": 1'))
    with pytest.raises(DepthpipeError, match=f"^{record}: damaged or edited record: remove {record} and run again$"):
        job(out)
    record.unlink()
    job(out)


@pytest.mark.parametrize("finished", [False, True])
def test_a_job_of_another_version_is_left_alone(finished: bool, job, tmp_path: Path) -> None:
    """The first version read byte order marks and damaged archives otherwise."""
    out, part = tmp_path / "out", (1, 1) if finished else (1, 2)
    job(out, part=part)
    record = out / "job.json" if finished else out / commit.UNFINISHED / "job.json"
    old = json.loads(record.read_bytes()) | {"version": 1}
    del old["sha256"]
    record.write_text(json.dumps(old))
    before = contents(out)
    with pytest.raises(
        DepthpipeError, match=r"job\.json: made by another version of depthpipe: remove .* and run again"
    ):
        job(out, part=part)
    assert contents(out) == before


def test_an_input_changed_while_it_is_read_is_named(tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 50_000)

    def touch(*_: object) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(DepthpipeError, match=r"a\.txt: changed while it was read"):
        tokenize_corpus([str(path)], tokenizer_path, tmp_path / "out", workers=1, progress=touch)


def test_a_disk_that_is_full_ends_in_one_line_and_what_is_done_stays(
    job, expected: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job(out, part=(1, 2))
    before = done_units(out)

    def with_a_small_disk(messages) -> None:
        # The kernel refuses to let any file grow past the limit, as a full disk would.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        try:
            job(out)
        except DepthpipeError as error:
            messages.put(str(error))

    messages = fork.Queue()
    process = fork.Process(target=with_a_small_disk, args=(messages,))
    process.start()
    message = messages.get(timeout=30)
    process.join()
    assert "cannot write (File too large): finished shards are kept; make room" in message
    assert done_units(out) >= before > 0
    job(out)
    assert contents(out) == expected


def test_two_jobs_do_not_write_one_directory(job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = fork.Process(target=job, args=(out, 1))
    process.start()
    wait_for(lambda: done_units(out) > 0)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(DepthpipeError, match="another `depthpipe tokenize` is writing there"):
            job(out)
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join()
    assert (out / "job.json").exists()
