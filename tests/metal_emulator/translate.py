"""Turns a .metal file into C++ for the CPU, CUDA for NVRTC, or C++ with address spaces for the lint.

The file is preprocessed, then rewritten with regular expressions. Line markers stay, so that compilers and sanitizers name
lines of the .metal file. What cannot be translated raises `TranslationError`.
"""

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

METAL_HEADERS = tuple(
    f"metal_{name}"
    for name in (
        *(
            "atomic",
            "common",
            "compute",
            "geometric",
            "integer",
            "limits",
            "logging",
            "math",
            "numeric",
            "pack",
            "relational",
        ),
        *("simdgroup", "simdgroup_matrix", "stdlib", "tensor", "types", "uniform"),
    )
)

# A built-in parameter's value, from `emulator::Thread t` and `emulator::GridPositions g`.
BUILTINS = {
    "thread_position_in_grid": "g.position",
    "threads_per_grid": "g.size",
    "thread_position_in_threadgroup": "t.position_in_threadgroup",
    "threadgroup_position_in_grid": "t.threadgroup",
    "threads_per_threadgroup": "t.threadgroup_size",
    "dispatch_threads_per_threadgroup": "t.threadgroup_size",
    "threadgroups_per_grid": "t.threadgroups",
    "thread_index_in_threadgroup": "t.index",
    "thread_index_in_simdgroup": "t.lane",
    "simdgroup_index_in_threadgroup": "t.simdgroup",
    "simdgroups_per_threadgroup": "t.simdgroups",
    "threads_per_simdgroup": "32u",
    "quadgroup_index_in_threadgroup": "(t.index / 4)",
    "thread_index_in_quadgroup": "(t.lane % 4)",
}
VECTOR_BUILTINS = {
    "g.position",
    "g.size",
    "t.position_in_threadgroup",
    "t.threadgroup",
    "t.threadgroup_size",
    "t.threadgroups",
}


class TranslationError(Exception):
    """The file is outside the dialect the emulator understands."""


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: a buffer with its index, or a built-in position."""

    text: str
    builtin: str | None
    buffer: int | None

    @property
    def read_only(self) -> bool:
        return re.search(r"\b(const|constant)\b", self.text) is not None


@dataclass
class Metal:
    """A parsed file: its text without attributes, its kernels and the instantiations it gives host names to."""

    text: str = ""
    parameters: dict[str, list[Parameter]] = field(default_factory=dict)  # by function name
    kernels: dict[str, str] = field(default_factory=dict)  # host name -> function, with template arguments

    def parameters_of(self, host_name: str) -> list[Parameter]:
        return self.parameters[self.kernels[host_name].partition("<")[0].strip()]


def preprocess(path: Path, stubs: Path, include: Iterable[Path] = (), defines: Mapping[str, object] = {}) -> str:
    """Expands macros and includes; Metal's own headers are empty, the shim stands for them."""
    stubs.mkdir(parents=True, exist_ok=True)
    for name in METAL_HEADERS:
        (stubs / name).touch()
    command = [
        "g++",
        "-E",
        "-x",
        "c++",
        "-std=c++17",
        "-nostdinc",
        "-undef",
        "-D__METAL__",
        "-D__METAL_VERSION__=310",
        f"-I{stubs}",
    ]
    command += [f"-I{directory}" for directory in include] + [f"-D{name}={value}" for name, value in defines.items()]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise TranslationError(done.stderr[:4000])
    return done.stdout


def closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise TranslationError(f"unbalanced parenthesis: {text[start : start + 60]!r}")


def split_commas(text: str) -> list[str]:
    """Splits at the commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += {"(": 1, "<": 1, "[": 1, "{": 1, ")": -1, ">": -1, "]": -1, "}": -1}.get(c, 0)
        if c == "," and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]] if text[begin:].strip() else parts


ATTRIBUTE = re.compile(r"\[\[\s*(\w+)\s*(?:\(\s*([^()]*?)\s*\))?[^\[\]]*\]\]")
INSTANTIATION = re.compile(r"\btemplate\s*\[\[\s*host_name\(((?:\s*\"[^\"]*\")+)\s*\)\s*\]\]([^;{]*);")
FUNCTION_CONSTANT = re.compile(r"\bconstant\s+([\w:]+)\s+(\w+)\s*\[\[\s*function_constant\((\d+)\)\s*\]\]\s*;")
KERNEL = re.compile(r"(?:\[\[\s*kernel\b[^\[\]]*\]\]|\bkernel\b)((?:\s*\[\[[^\[\]]*\]\])*)\s+void\s+(\w+)\s*\(")
THREADGROUP_VARIABLE = re.compile(
    r"(?<=[;{})])((?:\s|^#[^\n]*$)*)threadgroup\s+([\w:<>,\s]+?)\s+(\w+)\s*((?:\[[^\];]*\]\s*)*);", re.M
)
SWIZZLE = re.compile(r"\.([xyzw]{2,4})\b(?!\s*\()")


def parse(text: str, constants: Mapping[int, object] = {}) -> Metal:
    """Collects kernels and instantiations from preprocessed text; `constants` are the values of function constants."""
    metal = Metal()

    def instantiate(match: re.Match[str]) -> str:
        name = "".join(re.findall(r'"([^"]*)"', match[1]))
        rest = re.sub(r"^(\[\[\s*kernel\s*\]\]|kernel\b)", "", match[2].strip()).strip()
        function = rest[closing(rest, rest.index("(")) + 1 :] if rest.startswith("decltype") else rest.split(None, 1)[1]
        metal.kernels[name] = re.sub(r"\s+", " ", function.split("(")[0]).strip()
        return "\n" * match[0].count("\n")

    def specialise(match: re.Match[str]) -> str:
        if int(match[3]) not in constants:
            raise TranslationError(
                f"function constant {match[2]} ({match[3]}) has no value; give it in constants={{...}}"
            )
        value = constants[int(match[3])]
        return f"static constexpr const {match[1]} {match[2]} = {str(value).lower() if isinstance(value, bool) else value};"

    text = FUNCTION_CONSTANT.sub(specialise, INSTANTIATION.sub(instantiate, text))
    pieces, position = [], 0
    for match in KERNEL.finditer(text):
        end = closing(text, match.end() - 1)
        name = match[2]
        metal.parameters[name] = kernel_parameters(name, text[match.end() : end])
        if not text[: match.start()].rstrip().endswith(">"):  # not a template
            metal.kernels[name] = name
        pieces += [text[position : match.start()], f"EMULATOR_KERNEL void {name}("]
        position = match.end()
    text = "".join([*pieces, text[position:]])
    for function in metal.kernels.values():
        if function.partition("<")[0].strip() not in metal.parameters:
            raise TranslationError(f"{function} is instantiated but is no kernel of this file")
    metal.text = SWIZZLE.sub(r".\1()", ATTRIBUTE.sub("", text))
    return metal


def kernel_parameters(kernel: str, text: str) -> list[Parameter]:
    """Reads the attributes; buffers without one are numbered in order."""
    parameters: list[Parameter] = []
    for part in split_commas(text):
        attributes = [a for a in ATTRIBUTE.findall(part) if a[0] in BUILTINS or a[0] in ("buffer", "threadgroup")]
        if not attributes and re.search(r"[*&]", part):
            attributes = [("buffer", str(sum(p.buffer is not None for p in parameters)))]
        if len(attributes) != 1 or attributes[0][0] == "threadgroup":
            raise TranslationError(
                f"kernel {kernel}: parameter {' '.join(part.split())!r} needs one buffer or built-in attribute"
            )
        name, argument = attributes[0]
        declared = " ".join(ATTRIBUTE.sub("", part).split())
        parameters.append(
            Parameter(declared, None if name == "buffer" else name, int(argument) if name == "buffer" else None)
        )
    return parameters


def without_address_spaces(text: str) -> str:
    """`constant` means const; the other address spaces are one on the CPU."""
    text = re.sub(r"\bconstant\b", "const", text)
    text = re.sub(r"\bconst\s+constexpr\s+const\b", "constexpr const", text)
    text = re.sub(r"\bconst(\s+const\b)+", "const", text)
    return re.sub(r"\b(device|thread|threadgroup)\b(?!\s*[;(=)])", "", text)


def wrapper(metal: Metal, function: str, buffers: str) -> str:
    """The call of one kernel, its parameters bound."""
    arguments = []
    for i, parameter in enumerate(metal.parameters[function.partition("<")[0].strip()]):
        kind = f"S::argument<{i}>"
        if parameter.builtin is None:
            arguments.append(f"emulator::buffer_argument<{kind}>::bind({buffers}[{parameter.buffer}])")
            continue
        value = BUILTINS[parameter.builtin]
        bound = (
            f"emulator::position<metal::remove_cv_t<{kind}>>::bind({value})"
            if value in VECTOR_BUILTINS
            else f"({kind}){value}"
        )
        arguments.append(bound)
    return (
        "using namespace metal; using namespace metal::user; "
        f"using S = emulator::signature<decltype(&metal::user::{function})>; "
        f"const emulator::GridPositions g(t); (void)g;\n  metal::user::{function}({', '.join(arguments)});"
    )


def to_cpu(metal: Metal) -> str:
    """C++ with a table `emulator_kernels`, for runtime.cpp."""
    site = iter(range(1 << 30))
    body = THREADGROUP_VARIABLE.sub(
        lambda m: (
            f"{m[1]}auto& {m[3]} = emulator::threadgroup_variable<{' '.join(m[2].split())}{m[4].strip()}>({next(site)});"
        ),
        metal.text,
    )
    parts = [
        '#define EMULATOR_KERNEL\n#include "launch.h"\nnamespace metal { namespace user {\n',
        without_address_spaces(body),
        "\n}}\n",
    ]
    parts.append(
        '#line 1 "wrappers"\n#define EMULATOR_WRAPPERS\nnamespace emulator { struct Kernel { const char* name; void (*entry)(const Thread&, void**); }; }\n'
    )
    for i, function in enumerate(metal.kernels.values()):
        parts.append(
            f"static void kernel_{i}(const emulator::Thread& t, void** b) {{ {wrapper(metal, function, 'b')} }}\n"
        )
    table = "".join(f'{{"{name}", kernel_{i}}}, ' for i, name in enumerate(metal.kernels))
    parts.append(f'extern "C" const emulator::Kernel emulator_kernels[] = {{{table}{{0, 0}}}};\n')
    return "".join(parts)


def to_cuda(metal: Metal) -> str:
    """CUDA C++ for NVRTC with `-default-device`: `extern "C"` kernels that take the buffers' addresses by value."""
    body = THREADGROUP_VARIABLE.sub(lambda m: f"{m[1]}__shared__ {m[2]} {m[3]}{m[4]};", metal.text)
    parts = [
        '#define EMULATOR_KERNEL __device__\n#include "launch.h"\nnamespace metal { namespace user {\n',
        without_address_spaces(body),
    ]
    parts.append("\n}}\nstruct Buffers { void* address[31]; };\n")
    for name, function in metal.kernels.items():
        parts.append(
            f'extern "C" __global__ void {name}(Buffers b) {{\n'
            "  emulator::Thread t = {{threadIdx.x, threadIdx.y, threadIdx.z}, {blockIdx.x, blockIdx.y, blockIdx.z},\n"
            "    {blockDim.x, blockDim.y, blockDim.z}, {gridDim.x, gridDim.y, gridDim.z}};\n"
            "  t.index = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); t.lane = t.index % 32;\n"
            "  t.simdgroup = t.index / 32; t.simdgroups = blockDim.x * blockDim.y * blockDim.z / 32;\n"
            f"  {wrapper(metal, function, 'b.address')}\n}}\n"
        )
    return "".join(parts)
