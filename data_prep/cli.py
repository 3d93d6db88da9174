"""The data commands: `tokenizer train`, `tokenize`, `data verify`, `data inspect`, `data merge`."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.checks import statistics, verify
from data_prep.commit import what_to_remove
from data_prep.corpus import SUFFIXES
from data_prep.errors import DepthpipeError
from data_prep.job import Report, merge_parts, tokenize_corpus
from data_prep.plan import Options
from data_prep.tokenizer import Tokenizer
from data_prep.training import train_tokenizer

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

console = Console(highlight=False)


def add_commands(subparsers: Subparsers) -> None:
    """Register the data commands; each sets `run`, a function from the parsed arguments to an exit code."""
    _add_tokenizer(subparsers)
    _add_tokenize(subparsers)
    _add_data(subparsers)


def _add_tokenizer(subparsers: Subparsers) -> None:
    example = "depthpipe tokenizer train corpus/ --out tokenizer.model --vocab-size 16384"
    tokenizer = _command(subparsers, "tokenizer", "train a tokenizer", None, example)
    train = _command(
        tokenizer.add_subparsers(required=True, metavar="COMMAND"),
        "train",
        "train a sentencepiece model that gives every text back exactly",
        _run_tokenizer_train,
        example,
    )
    _add_input_arguments(train)
    train.add_argument("--out", required=True, metavar="FILE.model", help="the model file to write")
    train.add_argument("--vocab-size", type=_positive, required=True, metavar="N", help="number of pieces")
    train.add_argument(
        "--max-bytes",
        type=_positive,
        default=256 << 20,
        help="text to train on, from all over the corpus (%(default)s)",
    )


def _add_tokenize(subparsers: Subparsers) -> None:
    tokenize = _command(
        subparsers,
        "tokenize",
        "turn text into shards of tokens; killed, the same command goes on where it was",
        _run_tokenize,
        "depthpipe tokenize corpus/ --tokenizer tokenizer.model --out data --validation-fraction 0.01",
    )
    _add_input_arguments(tokenize)
    tokenize.add_argument("--tokenizer", required=True, metavar="FILE.model", help="a sentencepiece model")
    tokenize.add_argument("--out", required=True, metavar="DIR", help="the dataset directory to make")
    tokenize.add_argument("--workers", type=_positive, default=_usable_cores(), metavar="N", help="(all cores)")
    tokenize.add_argument(
        "--validation-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="share of documents for DIR/validation; the rest goes to DIR/train",
    )
    tokenize.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N", help="do one of N parts of the job; `data merge` ends it"
    )
    tokenize.add_argument(
        "--ray", action="store_true", help="use the Ray cluster at RAY_ADDRESS (unset: this machine); --workers actors"
    )


def _add_data(subparsers: Subparsers) -> None:
    data = _command(subparsers, "data", "check a dataset, or look into it", None, "depthpipe data verify data/train")
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    check = _command(
        commands,
        "verify",
        "check every checksum and count of a dataset",
        _run_verify,
        "depthpipe data verify data/train",
    )
    check.add_argument("dir", metavar="DIR", help="a dataset directory (the one with manifest.json)")
    merge = _command(
        commands,
        "merge",
        "make one dataset of the parts that `tokenize --part` did",
        _run_merge,
        "depthpipe data merge data",
    )
    merge.add_argument("dir", metavar="DIR", help="the --out of the parts (or of the first, with others following)")
    merge.add_argument("others", nargs="*", metavar="PART_DIR", help="copies of DIR from machines that did other parts")
    look = _command(
        commands,
        "inspect",
        "show totals, document lengths and samples",
        _run_inspect,
        "depthpipe data inspect data/train",
    )
    look.add_argument("dir", metavar="DIR", help="a dataset directory (the one with manifest.json)")
    look.add_argument("--samples", type=int, default=3, metavar="N", help="decoded samples to show (%(default)s)")


def _command(
    subparsers: Subparsers,
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int] | None,
    example: str | None = None,
) -> argparse.ArgumentParser:
    epilog = f"example: {example}" if example else None
    parser = subparsers.add_parser(name, help=summary, description=summary, epilog=epilog)
    if run:
        parser.set_defaults(run=run)
    return parser


def _add_input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help=f"files, globs, or directories, of which {', '.join(SUFFIXES)} files are read and links not followed",
    )
    parser.add_argument(
        "--include", action="append", default=[], metavar="GLOB", help="in directories, read these files"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="leave out files and directories of this name"
    )
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON key or parquet column (%(default)s)")
    parser.add_argument(
        "--documents",
        choices=("file", "line"),
        default="file",
        help="what a document of a plain text file is (%(default)s)",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count lines and rows that cannot be read, and go on")


def _run_tokenizer_train(args: argparse.Namespace) -> int:
    started = time.monotonic()
    with _progress("{task.description}") as bar:
        task = bar.add_task("reading text", total=None)

        bar.start()

        def show(read: int, wanted: int) -> None:
            done = read >= wanted
            bar.update(task, completed=read, total=wanted, description="training" if done else "reading text")

        trained = train_tokenizer(
            args.inputs,
            args.out,
            args.vocab_size,
            include=args.include,
            exclude=args.exclude,
            text_key=args.text_key,
            documents=args.documents,
            skip_bad=args.skip_bad,
            max_bytes=args.max_bytes,
            progress=show,
        )
    if trained:
        _print(f"{args.out}: {args.vocab_size:,} pieces in {time.monotonic() - started:.1f} s")
    else:
        _print(f"{args.out}: reused, made from the same text before")
    return 0


def _run_tokenize(args: argparse.Namespace) -> int:
    if not Tokenizer.load(args.tokenizer).is_lossless:
        _print(f"{args.tokenizer}: note: this model rewrites text (its normaliser or its unknown piece does)")
    options = Options(
        text_key=args.text_key,
        documents=args.documents,
        validation_fraction=args.validation_fraction,
        skip_bad=args.skip_bad,
    )
    started = time.monotonic()
    first: list[int] = []  # tokens that were there when this run began: they are no speed of ours
    try:
        with _progress(
            "{task.fields[documents]:,} documents", "{task.fields[tokens]:,} tokens", "{task.fields[speed]}"
        ) as bar:
            task = bar.add_task("tokenizing", total=1.0, documents=0, tokens=0, speed="")

            def show(documents: int, tokens: int, size: int, share: float) -> None:
                bar.start()  # its thread must not run before the workers are forked
                first[:] = first or [tokens]
                speed = (tokens - first[0]) / max(time.monotonic() - started, 1e-9)
                bar.update(task, completed=share, documents=documents, tokens=tokens, speed=f"{speed:,.0f} tokens/s")

            report = tokenize_corpus(
                args.inputs,
                args.tokenizer,
                args.out,
                workers=args.workers,
                options=options,
                include=args.include,
                exclude=args.exclude,
                part=args.part,
                on_ray=args.ray,
                progress=show,
            )
    except KeyboardInterrupt:
        _print(f"{args.out}: stopped; the same command goes on from here")
        return 130
    _print_report(report, args.out)
    if not report.finished:
        _print(f"  part {args.part[0]} of {args.part[1]}; after all parts: depthpipe data merge {args.out}")
    return 0


def _run_merge(args: argparse.Namespace) -> int:
    report = merge_parts(args.dir, args.others)
    _print(f"{args.dir}: {_totals(report)}, {'merged before' if report.reused else 'merged'}")
    _print_left_out(report)
    return 0


def _totals(report: Report) -> str:
    return f"{report.counters.documents:,} documents, {report.counters.tokens:,} tokens"


def _print_report(report: Report, out: str) -> None:
    totals = _totals(report)
    speed = f"{report.new_tokens / max(report.seconds, 1e-9):,.0f} tokens/s"
    if report.reused:
        _print(f"{out}: reused, {totals} made from the same text before")
    elif report.new_tokens == report.counters.tokens:
        _print(f"{out}: {totals} in {report.seconds:.1f} s ({speed})")
    elif report.new_tokens:
        _print(f"{out}: {totals}; {report.new_tokens:,} of them now, in {report.seconds:.1f} s ({speed})")
    else:
        _print(f"{out}: {totals}, all of them made before")
    _print_left_out(report)


def _print_left_out(report: Report) -> None:
    counters = report.counters
    for count, what in (
        (counters.empty_documents, "empty documents left out"),
        (counters.undecodable_bytes, "bytes that are not UTF-8 replaced by U+FFFD"),
        (counters.skipped, "lines, rows or damaged archives skipped"),
    ):
        if count:
            _print(f"  {count:,} {what}")
    for example in counters.skipped_examples:
        _print(f"    {example.what}")


def _run_verify(args: argparse.Namespace) -> int:
    started = time.monotonic()
    with _progress("reading shards", "{task.fields[speed]}") as bar:
        task = bar.add_task("", total=None, speed="")
        bar.start()

        def show(read: int, total: int) -> None:
            speed = f"{read / 1e6 / max(time.monotonic() - started, 1e-9):,.0f} MB/s"
            bar.update(task, completed=read, total=total, speed=speed)

        problems = verify(args.dir, show)
    for problem in problems:
        _print(problem)
    if problems:
        found = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} found"
        remove = what_to_remove(Path(args.dir))
        raise DepthpipeError(f"{args.dir}: {found}: restore the files, or {remove} and tokenize again")
    _print(f"{args.dir}: every shard is as it was written")
    return 0


def _run_inspect(args: argparse.Namespace) -> int:
    result = statistics(args.dir, args.samples)
    manifest = result.manifest
    _print(
        f"{Path(args.dir)}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {len(manifest.shards)} shards"
    )
    _print(
        f"{manifest.text_bytes:,} bytes of text, {result.bytes_per_token:.2f} bytes per token; "
        f"vocabulary {manifest.vocab_size:,}, {manifest.dtype}"
    )
    _print(f"tokens per document (longest {result.longest_document:,}):")
    most = max(result.length_histogram.values(), default=1)
    for limit, count in result.length_histogram.items():
        _print(f"  < {limit:>11,} {'█' * round(40 * count / most):<40} {count:,}")
    for number, sample in enumerate(result.samples, 1):
        _print(f"--- sample {number}")
        _print(sample)
    return 0


@contextmanager
def _progress(*columns: str) -> Iterator[Progress]:
    """A progress bar that its first `start` shows, and that is gone afterwards."""
    shown: list[Any] = [BarColumn(), *map(TextColumn, columns), TimeElapsedColumn(), TimeRemainingColumn()]
    # Where the output is no terminal, a bar is noise; the closing line says all.
    progress = Progress(*shown, console=console, transient=True, disable=not console.is_terminal)
    try:
        yield progress
    finally:
        progress.stop()


def _print(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text}: must be I/N with I from 1 to N")
    return int(match[1]), int(match[2])


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not in [0, 1)")
    return value


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0))
