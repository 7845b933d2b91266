"""Reports what an Apple compiler would reject, as far as it is known without one.

Rules on the preprocessed text find what is a matter of words (a `double`, a threadgroup variable outside a kernel). The rest is
left to clang, which ziglang brings along: the file with real address spaces and strict overloads, each kernel instantiated.
"""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from metal_emulator import build, translate

# Words that have no place in a kernel file, with the reason.
FORBIDDEN = {
    r"\bdouble\b": "Metal has no double",
    r"\blong\s+long\b": "Metal has no long long",
    r"\b(?:std|simd)::": "the C++ standard library is not there",
    r"\b(?:new|delete|throw|try|catch|virtual|dynamic_cast|typeid|thread_local|goto|asm)\b": "not in Metal's C++",
    r"(?<![\w\]])\[[&=\w\s,]*\]\s*\([^()]*\)\s*(?:mutable\s*)?(?:->\s*\w+\s*)?\{": "no lambda before Metal 3.2",
    r"(?<![\w.])(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])": "write the f: elsewhere the literal is a double",
    r"\b(?:int|uint|float|half|bfloat|bool|auto)\s+(?:device|thread|threadgroup|constant|kernel|vertex|fragment)\s*[;=,)]": "a name that is a Metal keyword",
}
FILE_VARIABLE = re.compile(r"(?:(?:static|const|constexpr|inline)\s+)*[\w:<>]+\s+\w+\s*(?:\[[^\]]*\]\s*)*(?:=|$)")
NO_VARIABLE = re.compile(r"\b(?:constant|using|typedef|struct|template|enum|return|namespace|union)\b")
SCALAR_BUILTINS = {name for name, value in translate.BUILTINS.items() if value not in translate.VECTOR_BUILTINS}
LINE_MARKER = re.compile(r'^# (\d+) "([^"]*)"[^\n]*$', re.M)
CONSTRUCTOR = re.compile(r"\b((?:bool|u?char|u?short|u?int|u?long|half|bfloat|float)[234]|vec<[^<>()]*>)\s*\(")


def lint(source: str | Path, defines: Mapping[str, object] | None = None) -> list[str]:
    """The findings for a .metal file or its text, as `file:line: message`; empty for a clean one.

    Raises EmulatorUnavailableError where ziglang is not installed.
    """
    path = build.source_file(source)
    text = translate.preprocess(path, build.DIRECTORY / "metal_headers", (), defines or {})
    findings = list(_words(text))
    try:
        metal = translate.parse(text)
    except translate.TranslationError as error:
        return [*findings, f"{path}: {error}"]
    if not metal.kernels:
        findings.append(f"{path}: no kernel is instantiated, so no template was compiled")
    findings += [
        f"{path}: {finding}" for name in metal.parameters for finding in _parameters(name, metal.parameters[name])
    ]
    return findings + _clang(path, metal)


def _words(text: str) -> list[str]:
    code = LINE_MARKER.sub(lambda m: " " * len(m[0]), text)
    found = [
        (m.start(), f"{' '.join(m[0].split())}: {why}")
        for rule, why in FORBIDDEN.items()
        for m in re.finditer(rule, code)
    ]
    found += _scopes(code)
    return [f"{_location(text, at)}: {message}" for at, message in sorted(found)]


def _scopes(code: str) -> list[tuple[int, str]]:
    """Threadgroup variables outside kernels, and variables of the file that are not `constant`."""
    found = []
    kernels = [(m.end(), translate.closing(code, m.end() - 1)) for m in translate.KERNEL.finditer(code)]
    bodies = [(end, _block_end(code, code.find("{", end))) for _, end in kernels]
    for m in re.finditer(r"(?<=[;{}])\s*threadgroup\s+[\w:<>, ]+?\s+\w+\s*(?:\[[^\];]*\]\s*)*;", code):
        if not any(begin <= m.start() < end for begin, end in bodies):
            found.append((m.end(), f"{' '.join(m[0].split())}: threadgroup variables belong into kernels"))
    depth, statement = 0, 0
    for i, c in enumerate(code):
        words = " ".join(code[statement:i].split()) if depth == 0 and c in ";{" else ""
        if FILE_VARIABLE.match(words) and not NO_VARIABLE.search(words):
            found.append((i, f"{words[:60]}: variables of the file are in the constant address space"))
        if c == "{" and not re.search(r"\bnamespace\s*\w*$", words):
            depth += 1
        if c == "}":
            depth = max(0, depth - 1)
        if c in ";{}" and depth == 0:
            statement = i + 1
    return found


def _block_end(code: str, start: int) -> int:
    depth = 0
    for i in range(start, len(code)):
        depth += {"{": 1, "}": -1}.get(code[i], 0)
        if depth == 0:
            return i
    return len(code)


def _parameters(kernel: str, parameters: list[translate.Parameter]) -> list[str]:
    found = []
    buffers = [p.buffer for p in parameters if p.buffer is not None]
    if len(set(buffers)) != len(buffers):
        found.append(f"kernel {kernel}: a buffer index is given twice")
    if any(b > 30 for b in buffers):
        found.append(f"kernel {kernel}: buffer indices end at 30")
    sizes = set()
    for p in parameters:
        words = set(re.findall(r"\w+", p.text))
        if p.buffer is not None and not words & {"device", "constant", "threadgroup"}:
            found.append(f"kernel {kernel}: {p.text} has no address space")
        if p.builtin in SCALAR_BUILTINS and not words & {"uint", "ushort"}:
            found.append(f"kernel {kernel}: {p.text}, {p.builtin} is a uint or ushort")
        if p.builtin and p.builtin not in SCALAR_BUILTINS:
            sizes |= words & {"uint", "uint2", "uint3", "ushort", "ushort2", "ushort3"} or {p.text}
    if len(sizes) > 1:
        found.append(f"kernel {kernel}: positions of different types ({', '.join(sorted(sizes))})")
    return found


def _location(text: str, at: int) -> str:
    marker = None
    for m in LINE_MARKER.finditer(text, 0, at):
        marker = m
    if marker is None:
        return f"line {text.count(chr(10), 0, at) + 1}"
    return f"{marker[2]}:{int(marker[1]) + text.count(chr(10), marker.end(), at) - 1}"


def to_clang(metal: translate.Metal) -> str:
    """C++ for clang: address spaces stay, vectors are clang's own, each kernel's address is taken once."""
    body = translate.THREADGROUP_VARIABLE.sub(lambda m: f"{m[1]}static threadgroup {m[2]} {m[3]}{m[4]};", metal.text)
    body = re.sub(r"\.([xyzw]{2,4})\(\)", r".\1", body)
    body = CONSTRUCTOR.sub(r"make<\1>(", body)
    uses = "".join(f"(void)&{function};" for function in metal.kernels.values())
    return (
        f'#define EMULATOR_KERNEL\n#include "address_spaces.h"\nnamespace metal {{ namespace user {{\n{body}\n}}}}\n'
        f"namespace metal {{ namespace user {{ void instantiate() {{ {uses} }} }}}}\n"
    )


def _clang(path: Path, metal: translate.Metal) -> list[str]:
    source = build.DIRECTORY / f"{path.stem}.lint.cpp"
    source.write_text(to_clang(metal))
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "clang",
        "-std=c++17",
        "-fsyntax-only",
        "-nostdinc",
        "-ferror-limit=200",
    ]
    command += ["-Wno-everything", f"-I{build.RUNTIME}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No module named ziglang" in done.stderr:
        raise build.EmulatorUnavailableError("the lint needs ziglang from PyPI")
    found = []
    for line in done.stderr.splitlines():
        if re.search(r"\berror:", line):
            found.append(line)
        elif found and ".metal:" not in found[-1] and (place := re.match(r"(\S+\.metal:\d+):", line)):
            found[-1] = f"{place[1]}: {found[-1]}"  # from where the header's check was instantiated
    if done.returncode and not found:
        raise RuntimeError(done.stderr[:2000])
    return found
