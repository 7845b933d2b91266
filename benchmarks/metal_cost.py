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
