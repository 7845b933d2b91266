"""
Native kernels and decoder of specfast: NumPy arrays in and out, weights used in place.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Final

import numpy
from numpy.typing import NDArray


class SpecfastError(Exception):
    """Base of every error specfast raises."""

class NumericalError(SpecfastError):
    pass

class ContextFullError(SpecfastError):
    pass

class ShapeError(SpecfastError):
    pass

class Matrix:
    """
    One weight matrix (N, K), row major, used in place; keeps the arrays that own its memory alive.

    weight, scales and biases are C-contiguous uint8 views. q4 and q8 are MLX's affine layout: packed
    little-endian words, scales and biases (N, K / group) in scale_format. Q4_0, Q4_1, Q8_0, Q4_K, Q5_K and Q6_K are
    GGUF's blocks, row after row; format then says what they are unpacked to as they are read. Raises ShapeError.
    """

    def __init__(self, format: str, N: int, K: int, weight: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], *, group: int = 0, scales: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)] | None = None, biases: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)] | None = None, scale_format: str = 'f32') -> None: ...

    @property
    def N(self) -> int: ...

    @property
    def K(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def format(self) -> str: ...

    @property
    def blocks(self) -> str | None:
        """The type of GGUF's blocks; None for other matrices."""

    @property
    def nbytes(self) -> int:
        """Bytes streamed in one pass."""

class Law:
    """
    How logits become the law that is sampled: temperature, then top_k, top_p and min_p; 0 is greedy.

    temper_last truncates at temperature 1, top_p by the mass of all tokens, and then tempers (mlx-lm).
    """

    def __init__(self, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, vocab_limit: int = 0, temper_last: bool = False) -> None: ...

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...

    @property
    def vocab_limit(self) -> int: ...

    @property
    def temper_last(self) -> bool: ...

class Adjustments:
    """
    Edits of logits before the law, with the text they depend on; for target and draft of one request.
    """

    def __init__(self, *, repetition_penalty: float = 1.0, presence_penalty: float = 0.0, frequency_penalty: float = 0.0, penalty_window: int = 0, prompt_length: int = 0, logit_bias: dict[int, float] = {}, mask: object | None = None, ends: Sequence[int] = []) -> None: ...

    @property
    def length(self) -> int:
        """Tokens of the text so far."""

    def follow(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Appends kept tokens (n,) int32, the prompt's first."""

    def edit_rows(self, logits: Annotated[NDArray[Any], dict(device='cpu', writable=False)], tokens: Annotated[NDArray[Any], dict(device='cpu', writable=False)]) -> tuple[NDArray[numpy.float32], list[int]]:
        """Edited logits (gamma + 1, V) float32, and the arg max of each row."""

class Proposal:
    """
    Drafted tokens and, where the drafter has them, their laws; the buffers are reused.
    """

    def __init__(self) -> None: ...

    @property
    def gamma(self) -> int: ...

    @property
    def tokens(self) -> NDArray[numpy.int32]: ...

    @property
    def q(self) -> object: ...

    def set_tokens(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Tokens of a drafter without a law (one-hot)."""

class Verdict:
    """tau drafted tokens are kept and next_token follows them."""

    def __init__(self, tau: int, next_token: int) -> None: ...

    @property
    def tau(self) -> int: ...

    @property
    def next_token(self) -> int: ...

def law_rows(logits: Annotated[NDArray[Any], dict(device='cpu', writable=False)], law: Law, isa: str | None = None) -> NDArray[numpy.float32]:
    """
    Probabilities (M, V) float32 of logits (M, V) float32; temperature 0 gives the arg max all mass.

    Raises ShapeError, or NumericalError on NaN, +infinity, or a row that allows no token.
    """

def verify_tokens(p: Annotated[NDArray[Any], dict(device='cpu', writable=False)], q: Annotated[NDArray[Any], dict(device='cpu', writable=False)] | None, tokens: Annotated[NDArray[Any], dict(device='cpu', writable=False)], u: Annotated[NDArray[Any], dict(device='cpu', writable=False)], lenience: float = 1.0, isa: str | None = None, rule: str = 'token') -> tuple[int, int]:
    """
    How many of tokens (gamma,) int32 are kept, and the token that follows them; see specfast.ops.

    p: (gamma + 1, V) float32; q: (gamma, Vq) float32, or None for a drafter that was certain; u: (gamma + 1,)
    float64 in [0, 1), the last for the residual or bonus. Raises ShapeError, or NumericalError where p has no mass.
    """

def verify_logits(logits: Annotated[NDArray[Any], dict(device='cpu', writable=False)], q: Annotated[NDArray[Any], dict(device='cpu', writable=False)] | None, tokens: Annotated[NDArray[Any], dict(device='cpu', writable=False)], u: Annotated[NDArray[Any], dict(device='cpu', writable=False)], law: Law, lenience: float = 1.0, isa: str | None = None, rule: str = 'token') -> tuple[int, int]:
    """
    verify_tokens on the laws of logits (gamma + 1, V) float32, the same to the bit, without writing the laws.

    Rows that cannot matter are not looked at (after the first rejection, or after a token without target mass),
    nor is q where the law keeps a list of ids (top_k, or temperature 0) that does not hold them. Raises ShapeError,
    or NumericalError like law_rows for a row that is looked at.
    """

def couple_tokens(p: Annotated[NDArray[Any], dict(device='cpu', writable=False)], tokens: Annotated[NDArray[Any], dict(device='cpu', writable=False)], seed: int, position: int, isa: str | None = None) -> tuple[int, int]:
    """
    The coupled rule on laws p (gamma + 1, V) float32, row i at position + i of the text; see specfast.ops.
    """

def couple_logits(logits: Annotated[NDArray[Any], dict(device='cpu', writable=False)], tokens: Annotated[NDArray[Any], dict(device='cpu', writable=False)], law: Law, seed: int, position: int, isa: str | None = None) -> tuple[int, int]:
    """
    couple_tokens on the laws of logits (gamma + 1, V) float32, without writing or normalising them.
    """

def noise(seed: int, position: int, token: int) -> float:
    """
    A token's noise under the coupled rule: an exponential number, the same on every machine. The token with the
    least noise / p is chosen.
    """

def noise_row(seed: int, position: int, count: int) -> NDArray[numpy.float32]:
    """
    noise of the tokens below count, (count,) float32: for drafts that a host draws in its own graph.
    """

def sample_token(p: Annotated[NDArray[Any], dict(device='cpu', writable=False)], u: float, isa: str | None = None) -> int:
    """
    Inverse CDF of p (V,) float32 at u in [0, 1), in token order; never a token without mass.
    """

def uniform(seed: int, round: int, position: int, purpose: int) -> float:
    """
    A draw in [0, 1) by Philox4x32-10, keyed by its arguments; purpose 0 drafts, 1 accepts, 2 draws residual or bonus.
    """

class Model:
    """
    A decoder's weights, used in place, bound to the kernels of one instruction set and one precision.

    pack gives quantised and bf16 matrices a second copy in the order the kernels stream, where they have one (AVX-512, at
    precision int8 and bf16);
    False reads all weights in place, slower. mapped says that all matrices lie in read-only mappings of files, whose
    memory is given back once packed; other arrays are let go. Results of a row are the same bits for any
    number of rows and threads, packed or not. A layer's "window" is how many positions up to its own a row attends to. kv_bits 8 keeps keys and values as int8 with a float32 scale for each vector; 16 keeps them as bf16, or as float32
    when the precision is f32. rope_pairs says that RoPE turns neighbours (2 i, 2 i + 1) of a head.

    A range of a model's layers has no embed where layers come before it, and neither norm nor head where layers follow; it
    runs by forward_range and verify_range. A head that is None with a norm is the embed.
    """

    def __init__(self, *, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, vocab: int, rms_eps: float, rope_inv_freq: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], max_context: int, embed: Matrix | None, head: Matrix | None, norm: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)] | None, layers: list[dict[str, object]], precision: str = 'int8', isa: str | None = None, pack: bool = True, mapped: bool = False, kv_bits: int = 16, rope_pairs: bool = False) -> None: ...

    def forward(self, cache: Cache, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], logits_rows: int = 1) -> NDArray[numpy.float32]:
        """
        Appends tokens (M,) int32 provisionally; returns the logits (logits_rows, vocab) float32 of the last rows.

        Raises ContextFullError or ShapeError with the cache unchanged.
        """

    def forward_into(self, cache: Cache, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> None:
        """
        Appends tokens (M,) int32 provisionally and writes the logits of the last rows to out (rows, vocab) float32.

        Raises ContextFullError or ShapeError with the cache unchanged.
        """

    def forward_range(self, cache: Cache, rows: NDArray[numpy.int32] | NDArray[numpy.float32]) -> NDArray[numpy.float32]:
        """
        Appends rows provisionally to a range of layers that is not the last: token ids (M,) int32 for the first, else what
        the range before returned. Returns (M, hidden) float32, what the next range takes; ranges give the bits of the whole.

        Raises ContextFullError or ShapeError with the cache unchanged.
        """

    def verify_range(self, cache: Cache, rows: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], proposal: Proposal, law: Law, seed: int, round: int, rule: str = 'token') -> Verdict:
        """
        verify, at lenience 1, by the last range of layers: rows (M, hidden) float32 of the pending and the drafted tokens, as
        the range before returned them. Raises what verify raises, with the cache unchanged.
        """

    def prefill(self, cache: Cache, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Appends and commits tokens (M,) int32 without logits."""

    def draft(self, cache: Cache, pending: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], gamma: int, law: Law, seed: int, round: int, proposal: Proposal, rule: str = 'token', adjustments: Adjustments | None = None) -> None:
        """
        Commits pending (n,) int32, then drafts gamma tokens into proposal; gamma - 1 of them stay provisional.

        rule "coupled" chooses them by the noise of their positions in the text; seed and round key other draws.
        """

    def draft_early(self, cache: Cache, pending: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], gamma: int, layers: int, law: Law, seed: int, round: int, proposal: Proposal, rule: str = 'token', adjustments: Adjustments | None = None) -> None:
        """
        Drafts gamma tokens after pending (n,) int32 with the first layers, the final norm and the head.

        Appends nothing; a verify of the same tokens that comes next goes on from these layers, with the bits of one that
        starts anew. Raises ShapeError where layers is not 1 to model.layers - 1, and ContextFullError where the cache has no
        room for pending and gamma more, with the cache unchanged.
        """

    def exit_acceptance(self, cache: Cache, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], exits: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], law: Law) -> NDArray[numpy.float64]:
        """
        Appends tokens (M,) int32 provisionally; returns, for each of exits (n,) int32 (numbers of layers, ascending), the
        mean over the rows of sum(min(p, q)), (n,) float64: the chance that a token drafted after so many layers is accepted.

        Raises what verify and draft_early raise, with the cache unchanged.
        """

    def verify(self, cache: Cache, pending: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], proposal: Proposal | None, law: Law, lenience: float, seed: int, round: int, rule: str = 'token', adjustments: Adjustments | None = None) -> Verdict:
        """
        Appends pending and the drafted tokens provisionally in one pass and applies a rule, or greedy.

        rule: token (with a lenience), block (which is token where the proposal has no laws), or coupled.
        Raises NumericalError on logits that are not finite, with the cache unchanged.
        """

    def graph_handle(self) -> object:
        """
        The model's regions for specfast._mlx. The weights' memory must be kept by whoever holds it.
        """

    @property
    def hidden(self) -> int: ...

    @property
    def heads(self) -> int: ...

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def intermediate(self) -> int: ...

    @property
    def vocab(self) -> int: ...

    @property
    def layers(self) -> int: ...

    @property
    def windows(self) -> list[int]:
        """
        For each layer, how many positions up to its own a row attends to; 0: all.
        """

    @property
    def max_context(self) -> int: ...

    @property
    def precision(self) -> str: ...

    @property
    def isa(self) -> str: ...

    @property
    def kv_bits(self) -> int:
        """Bits of an element of a key or value."""

    @property
    def kv_bytes_per_position(self) -> int:
        """
        Bytes of keys, values and scales that one position takes in all layers.
        """

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights one pass streams."""

    def early_bytes(self, layers: int) -> int:
        """Bytes of weights a pass over the first layers and the head streams."""

    @property
    def packed_bytes(self) -> int: ...

    @property
    def macs_per_row(self) -> float:
        """Multiply-adds of one row's matmuls."""

class Cache:
    """
    Keys and values of one sequence, as a transaction: rows are appended provisionally, then committed or dropped.

    capacity 0 means the model's context. Memory is taken in pages of 256 positions when needed; layers with a
    window need no more of them than the window and the provisional rows.

    windows (layers,) replace the model's, 0 for none; a row then sees as many positions up to its own and the layer's
    sinks (layers,), which are first positions that never leave. The last undo committed positions can be dropped again.
    """

    def __init__(self, model: Model, capacity: int = 0, windows: Sequence[int] | None = None, sinks: Sequence[int] | None = None, undo: int = 0, kv_codes: tuple[int, int] | None = None) -> None: ...

    @property
    def length(self) -> int:
        """Committed positions."""

    @property
    def provisional(self) -> int:
        """Positions not yet committed."""

    @property
    def capacity(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def layer_rows(self) -> int:
        """Layers run so far, each counted once for every row."""

    def kv_bytes(self, layer: int) -> NDArray[numpy.uint8]:
        """
        A copy of a layer's keys and values as they lie in memory, (pages * kv heads, bytes) uint8: of the pages that a window has
        not given up. Positions after the last hold anything.
        """

    def commit(self, n: int) -> None:
        """Keeps the first n provisional rows and drops the rest."""

    def rollback(self) -> None:
        """Drops every provisional row."""

    def keys(self, layer: int, length: int | None = None) -> NDArray[numpy.float32] | NDArray[numpy.uint16]:
        """
        A copy of a layer's committed keys, rotated: (kv_heads, rows, head_dim), float32 or the bits of bf16.

        Rows are all positions or, of a layer with a window, its sinks and the last of the window's size. length reads as if
        the cache had been truncated to it.
        """

    def values(self, layer: int, length: int | None = None) -> NDArray[numpy.float32] | NDArray[numpy.uint16]:
        """
        A copy of a layer's committed values: (kv_heads, rows, head_dim), as for keys.
        """

    def assign(self, keys: list[NDArray[numpy.float32]], values: list[NDArray[numpy.float32]], length: int | None = None) -> None:
        """
        Replaces what the cache holds by length positions, committed: rotated keys and values (kv_heads, rows, head_dim)
        float32 per layer, rounded to bf16 unless the precision is f32. Rows are all positions or, of a layer with a window,
        its sinks and the last ones, down to what the next row sees. Raises ContextFullError, or ShapeError.
        """

    def codes(self, layer: int, keys: bool, length: int | None = None) -> tuple[NDArray[numpy.uint8], NDArray[numpy.float32], NDArray[numpy.float32]]:
        """
        A copy of a layer's committed keys, or values, of a cache with kv_codes: codes (kv_heads, rows, head_dim), scales
        and biases (kv_heads, rows, groups). Raises ShapeError for other caches.
        """

    def assign_codes(self, keys: list[tuple[NDArray[numpy.uint8], NDArray[numpy.float32], NDArray[numpy.float32]]], values: list[tuple[NDArray[numpy.uint8], NDArray[numpy.float32], NDArray[numpy.float32]]]) -> None:
        """
        Replaces what a cache with kv_codes holds by rows per layer, as codes gives them, committed. Raises ContextFullError,
        or ShapeError.
        """

    @property
    def least_length(self) -> int:
        """The least length, besides 0, that truncate allows."""

    def truncate(self, length: int) -> None:
        """Drops committed positions from the end, and everything provisional."""

def build_info() -> dict[str, object]:
    """
    Version, compiled and supported instruction sets, kernels by name, the selected ones, threads. Where SPECFAST_ISA names no usable table, `isa` is None and `isa_problem` says why.
    """

def set_num_threads(threads: int) -> None:
    """
    The most threads of a native call, 1 to 256; results do not depend on it. Those that other programs keep off their cores
    are left out. More than usable_cpus() makes calls slow.
    """

def num_threads() -> int:
    """Threads asked for: set, else one per core."""

def start_threads() -> int:
    """
    Starts the threads if they are not there yet; how many there are, which is fewer than num_threads() where the system
    starts no more. Calls run on those, with the same results.
    """

def usable_cpus() -> int:
    """
    Hardware threads this process may use: its affinity, cut by the cgroup's quota.
    """

def peak_dot(kind: str, isa: str | None = None, milliseconds: float = 50.0) -> float:
    """
    Multiply-adds per second, in GMAC/s over all threads, of the dot instruction of precision `kind`.
    """

def read_bandwidth(buffer: Annotated[NDArray[numpy.uint8], dict(order='C', device='cpu', writable=False)], passes: int = 1) -> float:
    """GB/s over all threads of reading a uint8 array from end to end."""

def matmul_rows(x: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], matrix: Matrix, precision: str = 'int8', isa: str | None = None) -> NDArray[numpy.float32]:
    """x (M, K) float32 times matrix (N, K) transposed: (M, N) float32."""

def attend_rows(q: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], k: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], v: Annotated[NDArray[numpy.float32], dict(order='C', device='cpu', writable=False)], kv_bits: int = 16, isa: str | None = None, window: int = 0, sinks: int = 0, group: int = 0) -> NDArray[numpy.float32]:
    """
    Causal attention of the last M positions: q (M, heads, head_dim), k and v (S, kv_heads, head_dim), all float32.

    kv_bits: keys and values are stored as int8 with a scale for each vector (8), bf16 (16) or float32 (32). A row sees itself and the window - 1 positions before it, and the first of all, sinks many; window 0 is all. With a group they are MLX's affine codes of 4 or 8 bits, a scale and a bias for each group.
    """

class SuffixAutomaton:
    """
    The longest suffix of a growing text that occurred before, at its last known earlier end. Amortised constant time a token, at most 216 bytes a token.
    """

    def __init__(self) -> None: ...

    def append(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Appends tokens (n,) int32, which are copied."""

    def push(self, token: int) -> int:
        """Appends one token; returns match_length."""

    def propose(self, max_tokens: int, min_match: int, proposal: Proposal) -> int:
        """
        Puts what followed the match into proposal, without laws (each token is certain), and returns how many tokens: max_tokens (at most 64), or 0 if fewer than min_match tokens match. A match that reaches the end goes on periodically.
        """

    @property
    def match_length(self) -> int:
        """Tokens at the end that occurred before."""

    @property
    def match_end(self) -> int:
        """Where the earlier occurrence ends; -1 without a match."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

class PromptLookup:
    """
    The last 3 tokens of a growing text, else 2, else 1, at their latest earlier occurrence. Constant time and at most 104 bytes a token.
    """

    def __init__(self) -> None: ...

    def append(self, tokens: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """Appends tokens (n,) int32, which are copied."""

    def push(self, token: int) -> int:
        """Appends one token; returns match_length."""

    def propose(self, max_tokens: int, min_match: int, proposal: Proposal) -> int:
        """
        Puts what followed the match into proposal, without laws (each token is certain), and returns how many tokens: max_tokens (at most 64), or 0 if fewer than min_match tokens match. A match that reaches the end goes on periodically.
        """

    @property
    def match_length(self) -> int:
        """Tokens at the end that occurred before."""

    @property
    def match_end(self) -> int:
        """Where the earlier occurrence ends; -1 without a match."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

class GraphForward:
    """
    A model's forward pass on a cache as a C function that a host's compiled graph calls.

    void f(float* logits, const void* before, const int32* tokens, const int64* call, int64 a, int64 b): truncates the cache
    to `start`, appends the tokens (M,), commits them, and writes the logits (rows, vocab) of the last rows. call is
    (number, vocab, rows or 0 for all, M, start, pass), where -1 for M or start means the next of the last arguments, and
    pass is the next number after `built`, or 0 for one without an order. It raises nothing: logits are NaN then, and
    `problem` tells why; so are those of one that is gone, and of a pass that runs again while passes of higher numbers
    wait.
    """

    def __init__(self, model: Model, cache: Cache) -> None: ...

    @property
    def number(self) -> int: ...

    function: Final[int] = ...
    """(arg: object, /) -> int"""

    probe: Final[int] = ...
    """
    void f(int32* out, const int32* in, int64 by): out[0] = in[0] + by, and out[1] counts the calls.
    """

    @property
    def problem(self) -> str:
        """What went wrong in the last call; empty if nothing did."""

    @property
    def calls(self) -> int:
        """Calls so far."""

    @property
    def last_call(self) -> int:
        """The last one's number among the calls of all; 0 before the first."""

    @property
    def built(self) -> int:
        """The newest pass that the host has in a graph."""

    @built.setter
    def built(self, arg: int, /) -> None: ...
