"""What the Metal kernels should take on Apple's GPUs: predicted from bytes and instructions, not measured.

python benchmarks/metal_cost.py    # the tables of docs/metal.md
"""

from __future__ import annotations

from dataclasses import dataclass

ROWS = (1, 2, 4, 5, 6, 8, 9)
STREAMED = 0.85  # of the memory bandwidth, that a streaming kernel reaches
ISSUED = 0.75  # of the arithmetic rate, that a loop of independent multiply-adds reaches
LAUNCH_US = 2.0  # from the end of one kernel to the start of the next that needs it
REGISTERS = 208 * 1024  # bytes of a core, as reverse engineering of M1 and M2 has it
OUTPUTS = 4  # weight rows of a simdgroup


@dataclass(frozen=True)
class Gpu:
    name: str
    cores: int
    ghz: float
    gb_s: float

    @property
    def operations(self) -> float:
        """32-bit instructions a second; a multiply-add is one."""
        return self.cores * 128 * self.ghz * 1e9


GPUS = (
    Gpu("M1", 8, 1.28, 68),
    Gpu("M1 Pro", 16, 1.30, 200),
    Gpu("M1 Max", 32, 1.30, 400),
    Gpu("M2", 10, 1.40, 100),
    Gpu("M2 Max", 38, 1.40, 400),
    Gpu("M3", 10, 1.38, 100),
    Gpu("M3 Max", 40, 1.38, 400),
    Gpu("M4", 10, 1.47, 120),
    Gpu("M4 Pro", 20, 1.58, 273),
    Gpu("M4 Max", 40, 1.58, 546),
)


@dataclass(frozen=True)
class Weights:
    name: str
    bits: float  # of a weight, with its share of scale and bias
    unpack: float  # instructions that make a float of it

    def instructions(self, M: int) -> float:
        """Of one weight: unpacking, a multiply-add a row, and a row's inputs widened and loaded for OUTPUTS weights."""
        return self.unpack + 0.3 + M * (1 + (1 + 0.25) / OUTPUTS)


Q4 = Weights("q4 g64, bf16", 4.5, 3.0)
Q8 = Weights("q8 g64, bf16", 8.5, 3.0)
BF16 = Weights("bf16", 16, 1.0)


def seconds(gpu: Gpu, weights: Weights, M: int, count: float) -> float:
    """Of a product with `count` weights, without the launch."""
    streaming = count * weights.bits / 8 / (gpu.gb_s * 1e9 * STREAMED)
    return max(streaming, count * weights.instructions(M) / (gpu.operations * ISSUED))


def ratios(gpu: Gpu, weights: Weights) -> list[float]:
    """T(M) / T(1) of a whole pass of 8 billion weights in 32 layers of 8 launches."""
    launches = (32 * 8 + 4) * LAUNCH_US * 1e-6
    times = [launches + seconds(gpu, weights, M, 8e9) for M in ROWS]
    return [t / times[0] for t in times]


def registers(M: int) -> int:
    """32-bit registers of a thread of matmul_rows on 4-bit weights: sums, weights, inputs, packed words, addresses."""
    return OUTPUTS * M + 8 * OUTPUTS + 8 + 6 * OUTPUTS + 14


def simdgroups(M: int) -> int:
    """Of matmul_rows that a core's registers hold at once."""
    return REGISTERS // (registers(M) * 4 * 32)


@dataclass(frozen=True)
class Kernel:
    """One launch of a layer, a head or a verdict of Llama-3.1-8B at 4 bits, context 4096."""

    name: str
    weights: float  # read once
    bytes_of_rows: float  # read and written for each row
    shared_bytes: float  # read once beside the weights
    operations_of_rows: float  # instructions of a row beside those of the weights
    registers: int  # of a thread at M = 8

    def megabytes(self, M: int) -> float:
        return (self.weights * Q4.bits / 8 + self.shared_bytes + M * self.bytes_of_rows) / 1e6

    def mega_operations(self, M: int) -> float:
        unpacked = self.weights * Q4.instructions(M) if self.weights else 0.0
        return (unpacked + M * self.operations_of_rows) / 1e6

    def microseconds(self, gpu: Gpu, M: int) -> float:
        streaming = self.megabytes(M) * 1e6 / (gpu.gb_s * 1e9 * STREAMED)
        issuing = self.mega_operations(M) * 1e6 / (gpu.operations * ISSUED)
        return 1e6 * max(streaming, issuing) + LAUNCH_US


HIDDEN, HEADS, KV_HEADS, DIM, WIDE, V, CONTEXT = 4096, 32, 8, 128, 14336, 128256, 4096
SPANS = CONTEXT // 256
KERNELS = (
    Kernel("`norm_rows`", 0, 4 * HIDDEN, 2 * HIDDEN, 4 * HIDDEN, 20),
    Kernel("`qkv_rope_append`", (HEADS + 2 * KV_HEADS) * DIM * HIDDEN, 2 * HIDDEN, 0, 0, registers(8)),
    Kernel(
        "`attend_rows`", 0, 4 * SPANS * HEADS * (DIM + 2), 4 * CONTEXT * KV_HEADS * DIM, 2.6 * CONTEXT * HEADS * DIM, 80
    ),
    Kernel("`attend_spans`", 0, 4 * SPANS * HEADS * (DIM + 2), 0, 2 * SPANS * HEADS * DIM, 24),
    Kernel("`matmul_rows` (o)", HIDDEN * HIDDEN, 6 * HIDDEN, 0, 0, registers(8)),
    Kernel("`swiglu_rows`", 2 * WIDE * HIDDEN, 2 * HIDDEN + 2 * WIDE, 0, 0, registers(8) - 4),
    Kernel("`matmul_rows` (down)", WIDE * HIDDEN, 2 * WIDE + 4 * HIDDEN, 0, 0, registers(8)),
    Kernel("`logits_rows`", V * HIDDEN, 2 * HIDDEN + 4 * V, 0, 0, registers(8) + 8),
    Kernel("`law_weights`", 0, 8 * V, 0, 90 * V, 40),
    Kernel("`law_rows`", 0, 8 * V, 0, 70 * V, 30),
    Kernel("`verify_masses`", 0, 8 * V, 0, 220 * V, 48),
)


def kernels() -> str:
    """Bytes from device memory, instructions and predicted times of each kernel."""
    shown = (GPUS[0], GPUS[8])
    head = "| kernel | MB read and written, M = 1, 8 | million instructions, M = 1, 8 | registers, M = 8 |"
    head += "".join(f" us on {gpu.name}, M = 1, 8 |" for gpu in shown)
    lines = [head + "\n" + "|---|---|---|---|" + "---|" * len(shown) + "\n"]
    for kernel in KERNELS:
        amounts = [f"{f(1):.3g}, {f(8):.3g}" for f in (kernel.megabytes, kernel.mega_operations)]
        times = [f"{kernel.microseconds(gpu, 1):.0f}, {kernel.microseconds(gpu, 8):.0f}" for gpu in shown]
        lines.append(f"| {' | '.join((kernel.name, *amounts, str(kernel.registers), *times))} |\n")
    return "".join(lines)


def table() -> str:
    head = "| GPU | weights | " + " | ".join(f"M = {M}" for M in ROWS) + " |\n"
    lines = [head, "|---|---|" + "---|" * len(ROWS) + "\n"]
    for gpu in GPUS:
        for weights in (Q4, Q8, BF16):
            numbers = " | ".join(f"{r:.2f}" for r in ratios(gpu, weights))
            lines.append(f"| {gpu.name} | {weights.name} | {numbers} |\n")
    return "".join(lines)


def occupancy() -> str:
    head = "| M | registers a thread | simdgroups a core (M1, M2) |\n|---|---|---|\n"
    return head + "".join(f"| {M} | {registers(M)} | {simdgroups(M)} |\n" for M in ROWS)


if __name__ == "__main__":
    print(table())
    print(occupancy())
    print(kernels())
