"""Target and draft over an mlx-lm model's own forward pass: any architecture, specfast's law. The bits are the host's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .. import _core
from ..context import Context
from ..drafters import PRIOR_OF_MODELS, Drafter, Offer
from ..errors import NumericalError
from ..stats import SpeculationStats
from ..targets import Progress, judge
from .samplers import Processor, Sampler, processed, rows_law, sampled
from .sequence import UNBOUNDED, CacheSequence

MOST_UNREAD = 16  # rows a pass checks beside the drafted ones; more are read in a pass of their own


class Draws(NamedTuple):
    """How tokens are drawn from logits, by target and draft alike.

    Attributes:
        law: what logits become; None where only samples of it are known.
        sampler: draws from log-probabilities (1, V) in MLX's graph; where the law is None.
        processors: mlx-lm's logits processors, applied at every position to what comes before it.
        seed: of the random streams.
        rule: "token", "block" or "coupled".
        lenience: of acceptance under the token rule.
    """

    law: _core.Law | None
    sampler: Sampler | None
    processors: Sequence[Processor]
    seed: int
    rule: str
    lenience: float = 1.0


class HostProposal:
    """Tokens drafted in MLX's graph, which need not be evaluated yet.

    Args:
        rows: the tokens (gamma,) int32.
        q: their laws (gamma, Vq) float32; None where the rule does not need them.
    """

    def __init__(self, rows: mx.array, q: mx.array | None) -> None:
        self.rows, self.laws = rows, q

    @property
    def gamma(self) -> int:
        """How many."""
        return int(self.rows.shape[0])

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """The tokens (gamma,) int32."""
        return np.asarray(self.rows)

    @property
    def q(self) -> npt.NDArray[np.float32] | None:
        """Their laws (gamma, Vq) float32."""
        return None if self.laws is None else np.asarray(self.laws)


class HostTarget:
    """An mlx-lm model run by its own call, one pass a round; logits go to the native rules.

    Pass, drafting and log-probabilities are one graph, evaluated once a round. Caches follow as CacheSequence says: where
    rows were undone that are part of the text, the next pass has them again, or one of their own before it once they are
    more than MOST_UNREAD.

    Args:
        sequence: the model with its caches, which may hold an earlier text.
        draws: how logits become tokens.
        step: tokens of the prompt in one pass.
    """

    def __init__(self, sequence: CacheSequence, draws: Draws, step: int) -> None:
        self._sequence, self._draws, self._step = sequence, draws, step
        self.stats = SpeculationStats()  # of the request; told of passes that are not a round's
        self.logits: mx.array | None = None  # of the last round, after the processors: (gamma + 1, V)
        self._unread = 0

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        total = len(tokens)
        self._sequence.read(tokens, self._step, (lambda done: progress(done, total)) if progress else None)

    def verify(self, context: Context, proposal: Any) -> Any:
        sequence, tokens = self._sequence, context.tokens
        gamma = proposal.gamma if proposal else 0
        self.logits = None
        if len(tokens) - sequence.length > min(MOST_UNREAD, sequence.longest - gamma):
            self._reread(tokens[sequence.length : -1])
        sequence.begin(undoable=gamma > 0)
        pending = tokens[sequence.length :]
        self._unread = len(pending)
        self.stats.reread_tokens += len(pending) - 1
        try:
            return self._decide(context, pending, proposal, gamma)
        except BaseException:
            sequence.undo()
            raise

    def _decide(self, context: Context, pending: list[int], proposal: Any, gamma: int) -> _core.Verdict:
        drafted = _drafted(proposal)
        rows = mx.array(pending, mx.uint32)
        rows = rows if drafted is None else mx.concatenate([rows, drafted.astype(mx.uint32)])
        logits = self._sequence.run(rows)[-(gamma + 1) :]
        logits = processed(self._draws.processors, context.tokens, drafted, logits).astype(mx.float32)
        laws = proposal.laws if isinstance(proposal, HostProposal) else None
        samples = None if self._draws.law else _samples(self._draws, logits)
        mx.eval(logits, [one for one in (drafted, laws, samples) if one is not None], self._sequence.state)
        self.logits = logits
        tokens = proposal.tokens if proposal else np.empty(0, np.int32)
        if samples is not None:
            return _first_difference(np.asarray(samples), tokens)
        q = proposal.q if proposal else None
        assert self._draws.law
        return judge(
            np.asarray(logits),
            tokens,
            q,
            len(context.tokens),
            context.round,
            self._draws.law,
            self._draws.seed,
            self._draws.rule,
            self._draws.lenience,
        )

    def commit(self, kept: int) -> None:
        self._sequence.keep(self._unread + kept - 1)

    def end(self, tokens: Sequence[int]) -> None:
        """Leaves the caches with exactly these tokens of the text: all that a caller has seen."""
        _end(self._sequence, tokens)
        self._reread(tokens[self._sequence.length :])
        self._sequence.begin(undoable=False)

    def _reread(self, tokens: Sequence[int]) -> None:
        if tokens:
            self.stats.target_passes += 1
            self.stats.reread_tokens += len(tokens)
            self._sequence.read(tokens, self._step, exact=True)


class HostDrafter:
    """An mlx-lm model that drafts with its own call; its tokens are drawn in MLX's graph and evaluated with the target's pass.

    Args:
        sequence: the model with its caches.
        draws: the target's: the same law, processors, seed and rule.
        step: tokens of the prompt in one pass.
        vocab: of the target: no token beyond it is drafted.
    """

    def __init__(self, sequence: CacheSequence, draws: Draws, step: int, vocab: int) -> None:
        self._sequence, self._draws, self._step, self._vocab = sequence, draws, step, vocab
        self._unread, self._drafted = 0, False
        self._broken: mx.array | None = None  # whether the last proposal came of NaN; evaluated when the next is made

    def prefill(self, tokens: Sequence[int], progress: Progress | None) -> None:
        del progress  # the target's is shown
        self._sequence.read(tokens, self._step)

    def offers(self, context: Context) -> Sequence[Offer]:
        unread = len(context.tokens) - self._sequence.length
        return (Offer("model", "model", PRIOR_OF_MODELS, UNBOUNDED, unread),)

    def propose(self, context: Context, offer: Offer, gamma: int) -> Any:
        del offer  # there is one kind
        sequence, tokens = self._sequence, context.tokens
        if self._broken is not None and self._broken.item():
            raise NumericalError("the draft's logits hold NaN; check its weights, or give another draft model")
        if len(tokens) - sequence.length > min(MOST_UNREAD, sequence.longest):
            sequence.read(tokens[sequence.length : -1], self._step, exact=True)
        sequence.begin()
        rows = mx.array(tokens[sequence.length :], mx.uint32)
        self._unread, self._drafted = int(rows.shape[0]), True
        drafted: list[mx.array] = []
        laws: list[mx.array] = []
        try:
            for at in range(gamma):
                logits = sequence.run(rows)[-1:, : self._vocab]
                before = mx.concatenate(drafted) if drafted else None
                logits = processed(self._draws.processors, tokens, before, logits, at)
                self._broken = mx.any(mx.isnan(logits))
                rows = self._draw(logits, context, at, laws)
                drafted.append(rows)
                mx.async_eval(rows)
        except BaseException:
            sequence.undo()
            raise
        return HostProposal(mx.concatenate(drafted).astype(mx.int32), mx.concatenate(laws) if laws else None)

    def _draw(self, logits: mx.array, context: Context, at: int, laws: list[mx.array]) -> mx.array:
        """One token (1,) after logits (1, V), by the law, the shared noise or the sampler; its law is added to `laws`."""
        draws, law = self._draws, self._draws.law
        logits = logits.astype(mx.float32)
        if law is None:
            return _samples(draws, logits)
        if law.temperature == 0:
            return mx.argmax(logits, axis=-1)
        scores = rows_law(logits, law)
        if draws.rule == "coupled":
            noise = _core.noise_row(draws.seed, len(context.tokens) + at, int(logits.shape[-1]))
            return mx.argmax(scores - mx.log(mx.array(noise)), axis=-1)
        laws.append(mx.softmax(scores, axis=-1))
        key = int(_core.uniform(draws.seed, context.round, at, 0) * 2.0**53)
        return mx.random.categorical(scores, key=mx.random.key(key))

    def commit(self, kept: int) -> None:
        if self._drafted:  # and not another one, beside it
            self._sequence.keep(min(self._unread + kept - 1, self._sequence.rows_since_begin))
        self._drafted = False

    def end(self, tokens: Sequence[int]) -> None:
        """Leaves the caches with exactly these tokens of the text."""
        sequence = self._sequence
        _end(sequence, tokens)
        sequence.read(tokens[sequence.length :], self._step, exact=True)
        sequence.begin(undoable=False)


class BoundedDrafter:
    """Another drafter, never drafting more than the target's caches can check exactly in one pass.

    Args:
        drafter: the one that drafts.
        sequence: the target's.
    """

    def __init__(self, drafter: Drafter, sequence: CacheSequence) -> None:
        self._drafter, self._sequence = drafter, sequence
        self.prefill, self.propose, self.commit = drafter.prefill, drafter.propose, drafter.commit

    def offers(self, context: Context) -> Sequence[Offer]:
        longest = self._sequence.longest
        if longest == UNBOUNDED:
            return self._drafter.offers(context)
        most = longest - (len(context.tokens) - self._sequence.length)
        if most < 1:
            return ()
        return [offer._replace(longest=min(offer.longest, most)) for offer in self._drafter.offers(context)]


def _drafted(proposal: Any) -> mx.array | None:
    """The drafted tokens of any proposal (gamma,) in MLX's graph."""
    if not proposal:
        return None
    return proposal.rows if isinstance(proposal, HostProposal) else mx.array(proposal.tokens)


def _samples(draws: Draws, logits: mx.array) -> mx.array:
    """The sampler's token for every row of logits (M, V), one row at a time as in plain decoding: (M,) int32."""
    assert draws.sampler
    scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tokens = [sampled(draws.sampler, scores[at : at + 1]) for at in range(int(logits.shape[0]))]
    return mx.concatenate(tokens).astype(mx.int32)


def _end(sequence: CacheSequence, tokens: Sequence[int]) -> None:
    """Undoes rows of the last round beyond these tokens of the text."""
    beyond = sequence.length - len(tokens)
    if beyond > 0:
        sequence.keep(sequence.rows_since_begin - beyond)


def _first_difference(sampled: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> _core.Verdict:
    """Drafted tokens are kept while they are the samples, as mlx-lm does: the samples alone make the text."""
    tau = 0
    while tau < len(tokens) and tokens[tau] == sampled[tau]:
        tau += 1
    return _core.Verdict(tau, int(sampled[tau]))
