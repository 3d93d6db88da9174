"""``depthpipe depth RUN_DIR``: where each sublayer of a trained model reads, and how large its outputs are.

The paper's figures 8 and 5 for any run, from its newest checkpoint and a few sequences of its data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.errors import DepthpipeError
from data_prep.stream import DatasetSource, SequenceStream
from model.diagnostics import DepthObserver
from model.layers import forward_layers
from pipeline.config import run_data
from pipeline.generate import load_model

_SHADES = " ░▒▓█"
_MOST_NUMBERS = 11  # sources whose weights fit in a line as numbers


def show_depth(args: argparse.Namespace) -> int:
    """Print the tables. Raises DepthpipeError if the directory is not a run, or has no checkpoint yet."""
    observer = observe(args.run_dir, args.sequences)
    console = Console(highlight=False)
    if observer.weights:
        console.print(_weights_table(observer))
    table = Table("layer", "RMS of its output", title="magnitude over depth")
    largest = max(observer.magnitudes.values())
    for layer, magnitude in observer.magnitudes.items():
        table.add_row(str(layer), f"{magnitude:8.3f} {'█' * round(30 * magnitude / largest)}")
    console.print(table)
    return 0


def observe(run_dir: str | Path, sequences: int) -> DepthObserver:
    """Run the newest checkpoint on the first `sequences` of the run's validation data (or training data)."""
    if sequences < 1:
        raise DepthpipeError(f"--sequences: {sequences} must be at least 1")
    model, device = load_model(run_dir)
    data = run_data(run_dir)
    path = data.validation or data.train_datasets()[0].path
    stream = SequenceStream([DatasetSource(path)], data.sequence_length, seed=0, cache_dir=data.cache_dir)
    tokens = torch.from_numpy(stream.read(np.arange(sequences)).astype(np.int64))
    observer = DepthObserver()
    with torch.inference_mode():
        for sequence in tokens.split(1):
            forward_layers(list(model.layers), sequence[:, :-1].to(device), observer=observer)
    return observer


def _weights_table(observer: DepthObserver) -> Table:
    """One line per read: the weight of every source in depth order, the embedding first, the partial last."""
    table = Table("read", "weight of each source, embedding first", title="where each sublayer reads")
    most = max(len(weights) for weights in observer.weights.values())
    for name, weights in observer.weights.items():
        line = Text()
        for weight in weights.tolist():
            shade = _SHADES[min(len(_SHADES) - 1, round(weight * (len(_SHADES) - 1)))]
            line.append(f"{shade}{weight:.2f} " if most <= _MOST_NUMBERS else shade)
        table.add_row(name, line)
    return table
