"""Early exit: after which of a target's layers to draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import _core
from .errors import ConfigurationError
from .stats import expected_tokens

MOST_ROWS, FEWEST_ROWS = 32, 16  # whose acceptance is measured
MOST_EXITS = 8
ROW_COST = 0.05  # of one more checked row, in passes of the target


class Exit(NamedTuple):
    """An exit, and what is expected of it.

    Attributes:
        layers: the first layers, which draft.
        gamma: tokens to draft a round; 0 is plain decoding.
        acceptance: chance that a drafted token is accepted.
        speedup: tokens per second over plain decoding.
    """

    layers: int
    gamma: int
    acceptance: float
    speedup: float


def require_exit(early_exit: int | str, layers: int, name: str) -> None:
    """Checks that a target has such an exit.

    Raises:
        ConfigurationError: it has not; names the layers there are.
    """
    if layers < 2:
        raise ConfigurationError(
            f"early_exit {early_exit}: {name} has 1 layer and no exit before it; give a draft model"
        )
    if early_exit != "auto" and not 1 <= int(early_exit) < layers:
        raise ConfigurationError(
            f"early_exit is {early_exit}, outside 1 to {layers - 1}: {name} has {layers} layers, and the last must verify; "
            "'auto' chooses by measuring"
        )


def candidate_exits(layers: int) -> tuple[int, ...]:
    """The exits that are measured: all, or MOST_EXITS of them, evenly spread."""
    return tuple(sorted({round(i) for i in np.linspace(1, layers - 1, min(MOST_EXITS, layers - 1))}))


def measure_acceptance(
    model: _core.Model, tokens: Sequence[int], law: _core.Law, exits: Sequence[int]
) -> dict[int, float]:
    """For each exit the mean of sum(min(p, q)) over the rows of the text's last MOST_ROWS tokens.

    A text of fewer than FEWEST_ROWS is continued by as many of the likeliest tokens. The same on every run: nothing is
    timed and nothing drawn. Penalties, biases and masks are left out.

    Args:
        tokens: a text of at least one token.
        law: what logits become; under a greedy one acceptance is the share of rows with the same likeliest token.
        exits: numbers of layers, ascending.

    Raises:
        NumericalError: logits that are not finite.
    """
    cache = _core.Cache(model, min(MOST_ROWS, model.max_context))
    text = list(tokens[-cache.capacity :])
    greedy = _core.Law(temperature=0.0, vocab_limit=law.vocab_limit)
    while len(text) < min(FEWEST_ROWS, cache.capacity):
        pending = np.asarray(text[cache.length :], dtype=np.int32)
        text.append(model.verify(cache, pending, None, greedy, 1.0, 0, 0).next_token)
        cache.commit(len(pending))
    cache.truncate(0)
    rows = np.asarray(text, dtype=np.int32)
    found = model.exit_acceptance(cache, rows, np.asarray(exits, dtype=np.int32), law)
    return dict(zip(exits, found.tolist(), strict=True))


def choose_exit(model: _core.Model, acceptance: Mapping[int, float], gammas: Sequence[int]) -> Exit:
    """The exit and gamma with the most expected tokens per second.

    S = E / (1 + gamma (c + v)) with E of Leviathan et al. 2022, Eq. 1 (arXiv:2211.17192), c the share of the target's bytes
    that drafting a token streams (first layers and head) and v ROW_COST: verifying goes on from the drafting layers, so
    that a round streams the target's weights once besides. The cache's keys and values are not counted.

    Args:
        acceptance: by number of layers.
        gammas: to choose from; 0 is plain decoding, and S is 1.
    """

    def expect(layers: int, gamma: int) -> Exit:
        chance = min(acceptance[layers], 1.0)
        cost = 1 + gamma * (model.early_bytes(layers) / model.weight_bytes + ROW_COST)
        return Exit(layers, gamma, chance, expected_tokens(chance, gamma) / cost)

    return max((expect(layers, gamma) for layers in acceptance for gamma in gammas), key=lambda found: found.speedup)
