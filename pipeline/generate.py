"""Text from a trained model: the newest checkpoint's layers in one plain module, one token after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.errors import DepthpipeError
from data_prep.manifest import TOKENIZER_FILE
from data_prep.tokenizer import Tokenizer
from model.language_model import LanguageModel
from pipeline.checkpoint_tensors import Part, read_parts
from pipeline.checkpoints import latest_checkpoint
from pipeline.config import load_run_model, run_data


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        max_tokens: tokens to write at most; a finished document ends earlier.
        temperature: 0 takes the likeliest token; above 1 evens the choice out.
        top_p: choose among the likeliest tokens that together have this probability.
        seed: of the random choices.
    """

    max_tokens: int = 200
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise DepthpipeError(f"--max-tokens: {self.max_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise DepthpipeError(f"--temperature: {self.temperature} must be a number from 0 up")
        if not 0 < self.top_p <= 1:
            raise DepthpipeError(f"--top-p: {self.top_p} must be above 0 and at most 1")


def generate(run_dir: str | Path, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Yield the prompt, then its continuation piece by piece, until the document ends or enough tokens are written."""
    model, device = load_model(run_dir)
    tokenizer = Tokenizer.load(Path(run_dir) / TOKENIZER_FILE)
    window = run_data(run_dir).sequence_length
    random = torch.Generator(device).manual_seed(sampling.seed)
    # A prompt starts a document, and a document starts after the end of another.
    ids = [tokenizer.end_of_document_id, *tokenizer.encode(prompt)]
    yield prompt
    written = len(ids)
    with torch.inference_mode():
        for _ in range(sampling.max_tokens):
            logits = model(torch.tensor([ids[-window:]], device=device))[0, -1].float()
            token = _choose(logits, sampling, random)
            if token == tokenizer.end_of_document_id:
                break
            ids.append(token)
            piece = tokenizer.decode(ids[written:])
            # A character can need several byte tokens: hold them back until they make one.
            if not piece.endswith("\ufffd") or len(ids) - written >= 4:
                yield piece
                written = len(ids)
    if written < len(ids):
        yield tokenizer.decode(ids[written:])


def load_model(run_dir: str | Path) -> tuple[LanguageModel, torch.device]:
    """The model of a run's newest checkpoint, on the accelerator if there is one.

    Raises:
        DepthpipeError: if the directory is not a run, or has no checkpoint yet or one that cannot be read.
    """
    config = load_run_model(run_dir)
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        raise DepthpipeError(f"{run_dir}: no checkpoint yet; train first, or wait for checkpoint.every steps")
    checkpoint.check_before_reading()
    model = LanguageModel(config, seed=0)
    weights = [Part.whole(name, parameter) for name, parameter in model.named_parameters()]
    read_parts(checkpoint.path, weights, alone=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), device


def _choose(logits: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token by temperature and nucleus sampling (Holtzman et al. 2019) from ``[vocab]`` logits."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / sampling.temperature, -1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities > sampling.top_p
    probabilities[outside] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=random)])
