"""The command line. Commands that need no torch do not import it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import data_prep.cli
import pipeline.monitor
import pipeline.report
from data_prep.errors import EXIT_WRONG_INPUT, DepthpipeError

_HELP = argparse.RawDescriptionHelpFormatter


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code: 2 after a wrong input, which is printed as one line."""
    args = _parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except DepthpipeError as error:
        line = str(error).replace("\n", "\\n")  # a file's name may hold one
        print(f"depthpipe: error: {line}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except BrokenPipeError:  # the reader of a pipe has left, as in `depthpipe monitor --once | head`
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="depthpipe",
        description="Pretrain language models whose layers attend over depth, cut into DeepSpeed pipeline stages.",
        epilog="from text to a trained model:\n"
        "  depthpipe tokenizer train corpus/ --out tokenizer.model --vocab-size 4096\n"
        "  depthpipe tokenize corpus/ --tokenizer tokenizer.model --out data --validation-fraction 0.02\n"
        "  depthpipe train configs/quickstart.yaml\n"
        "  depthpipe generate runs/quickstart --prompt 'def '",
        formatter_class=_HELP,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    data_prep.cli.add_commands(commands)
    _add_train(commands)
    _add_launch(commands)
    pipeline.monitor.add_commands(commands)
    pipeline.report.add_commands(commands)
    _add_depth(commands)
    _add_generate(commands)
    return parser


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train on this machine",
        description="Train on this machine: one process per device, parallel.pipeline x parallel.data of them. "
        "A run that was interrupted goes on from its latest checkpoint.",
        epilog="example:\n  depthpipe train configs/quickstart.yaml --set model.residual=full --set run.dir=runs/full",
        formatter_class=_HELP,
    )
    _add_config(parser)
    parser.add_argument(
        "--restart", action="store_true", help="start over; what the run directory holds is moved aside, not deleted"
    )
    parser.set_defaults(run=_train)


def _add_launch(commands: Any) -> None:
    parser = commands.add_parser(
        "launch",
        help="train on many machines, inside torchrun",
        description="Take a place in a run that torchrun starts on every machine. All machines see the same "
        "configuration, datasets and run directory.",
        epilog="example, on each of two machines with four devices (--node-rank 1 on the second):\n"
        "  torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --master-addr HOST --master-port 29500 \\\n"
        "      -m pipeline launch configs/quickstart.yaml --set parallel.pipeline=8",
        formatter_class=_HELP,
    )
    _add_config(parser)
    parser.set_defaults(run=_launch)


def _add_depth(commands: Any) -> None:
    parser = commands.add_parser(
        "depth",
        help="show where each sublayer of a trained model reads",
        description="The attention weights over depth of every sublayer, and the magnitude of every layer's output, "
        "averaged over a few sequences of the run's data.",
        epilog="example:\n  depthpipe depth runs/quickstart",
        formatter_class=_HELP,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run")
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="sequences to average over (default 8)")
    parser.set_defaults(run=_depth)


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="write text with a trained model",
        description="Continue a prompt with the newest checkpoint of a run, as it is written.",
        epilog="example:\n  depthpipe generate runs/quickstart --prompt 'def main(' --max-tokens 100",
        formatter_class=_HELP,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the directory of a run")
    parser.add_argument("--prompt", default="", help="text to continue (default: none, a new document)")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="tokens to write (default 200)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 always takes the likeliest (default 0.7)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="sample from this share of probability (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed writes the same text (default 0)")
    parser.set_defaults(run=_generate)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a YAML file; start from one in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override any key, repeatable"
    )


def _train(args: argparse.Namespace) -> int:
    from pipeline.run import train_here

    return train_here(args.config, args.overrides, restart=args.restart)


def _launch(args: argparse.Namespace) -> int:
    from pipeline.launch import in_torchrun

    if not in_torchrun():
        raise DepthpipeError(
            "launch: not inside torchrun; `depthpipe train` runs on this machine, "
            "`depthpipe launch --help` shows how to start torchrun on several"
        )
    from pipeline.train import run_worker

    run_worker(args.config, args.overrides)
    return 0


def _depth(args: argparse.Namespace) -> int:
    from pipeline.depth import show_depth

    return show_depth(args)


def _generate(args: argparse.Namespace) -> int:
    from pipeline.generate import Sampling, generate

    sampling = Sampling(args.max_tokens, args.temperature, args.top_p, args.seed)
    for piece in generate(args.run_dir, args.prompt, sampling):
        print(piece, end="", flush=True)
    print()
    return 0
