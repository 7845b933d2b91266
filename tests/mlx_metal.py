"""`mx.fast.metal_kernel` without a Mac: the signature that MLX writes is rebuilt, and its text is executed on the CPU."""

import functools
import hashlib
import re
from collections import Counter
from typing import ClassVar

import mlx.core as mx
import numpy as np
from specfast import metal

TYPES = {
    mx.float32: ("float", np.float32),
    mx.float16: ("float16_t", np.float16),
    mx.bfloat16: ("bfloat16_t", np.uint16),
    mx.int32: ("int32_t", np.int32),
    mx.uint32: ("uint32_t", np.uint32),
    mx.uint64: ("uint64_t", np.uint64),
}
TYPES |= {np.dtype(made): (name, made) for name, made in TYPES.values() if made is not np.uint16}
ATTRIBUTES = {  # those that our bodies use, as MLX declares them
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
}
# what MLX puts before the header that the emulator needs: its names of the types
UTILS = "".join(f"typedef {ours} {theirs};\n" for theirs, ours in (("float16_t", "half"), ("bfloat16_t", "bfloat")))


def generated_source(name, inputs, outputs, source, header):
    """(kernel's name, text) of mlx/backend/common/metal_kernel.cpp; inputs and outputs are (name, array or dtype)."""
    parameters, kinds, index = [], "", 0
    for key, array in inputs:
        space = "constant" if array.size < 8 else "device"
        mark = "&" if array.ndim == 0 else "*"
        parameters.append(f"  const {space} {TYPES[array.dtype][0]}{mark} {key} [[buffer({index})]]")
        kinds += "_" + TYPES[array.dtype][0] + ("c" if space == "constant" else "")
        index += 1
        for suffix in ("shape", "strides", "ndim"):
            assert f"{key}_{suffix}" not in source, f"MLX would add {key}_{suffix} to the signature"
    for key, dtype in outputs:
        parameters.append(f"  device {TYPES[dtype][0]}* {key} [[buffer({index})]]")
        kinds += "_" + TYPES[dtype][0]
        index += 1
    parameters += [f"  {kind} {key} [[{key}]]" for key, kind in ATTRIBUTES.items() if key in source]
    full = f"custom_kernel_{name}{kinds}"
    return full, f"{header}\n[[kernel]] void {full}(\n" + ",\n".join(parameters) + ") {\n" + source + "\n}\n"


def whole(text):
    """The text with what MLX puts before it."""
    return "#include <metal_stdlib>\nusing namespace metal;\n" + UTILS + text


@functools.cache
def compiled(text):
    import metal_emulator

    return metal_emulator.compile(whole(text))


def run_generated(launch, *buffers, schedule=0):
    """A launch on NumPy arrays, written in place, by the source that `mx.fast.metal_kernel` would compile."""
    made = metal.generated(launch.kernel)
    arrays = dict(
        zip(made.buffers, [*buffers, *([np.array(launch.dims, np.int32)] if launch.dims else [])], strict=True)
    )
    assert all(arrays[name].size >= 8 for name in made.inputs if name != "dims"), "MLX would hand it over as constant"
    inputs, outputs = ([(name, arrays[name]) for name in names] for names in (made.inputs, made.outputs))
    full, text = generated_source(
        made.name, inputs, [(name, array.dtype) for name, array in outputs], made.body, made.header
    )
    ordered = [array for _, array in (*inputs, *outputs)]
    compiled(text).run(full, launch.grid, launch.threadgroup, ordered, schedule=schedule)


class ExecutedLaunches:
    """Stands in for `specfast._mlx` on a machine without Metal: its launches run on the CPU."""

    launches: ClassVar[Counter] = Counter()

    @staticmethod
    def launch(library, source, function, grid, threadgroup, dims, inputs, shapes, dtypes, updated):
        assert source.isascii()
        assert hashlib.sha256(source.encode()).hexdigest()[:16] in library
        fresh = [np.full(shape, 113, TYPES[t][1]) for shape, t in zip(shapes, dtypes, strict=True)]
        outputs = [*fresh, *(to_numpy(x).copy() for x in updated)]
        compiled(source).run(
            function, grid, threadgroup, [*map(to_numpy, inputs), *outputs, np.array(dims, np.int32)], schedule=1
        )
        ExecutedLaunches.launches[re.sub(r"_(q\d|f\d|bf).*", "", function)] += 1
        types = [*dtypes, *(x.dtype for x in updated)]
        return [mx.array(x).view(t) if t == mx.bfloat16 else mx.array(x) for x, t in zip(outputs, types, strict=True)]


def to_numpy(array):
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


class ExecutedMetalKernel:
    """Stands in for `mx.fast.metal_kernel` on a machine without Metal."""

    launches: ClassVar[Counter] = Counter()
    texts: ClassVar[dict] = {}  # by kernel

    def __init__(self, name, input_names, output_names, source, header="", **options):
        assert not options, "only what the package uses"
        assert (header + source).isascii()
        self.name, self.inputs, self.outputs, self.source, self.header = name, input_names, output_names, source, header

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes):
        named = list(zip(self.inputs, inputs, strict=True))
        full, text = generated_source(
            self.name, named, list(zip(self.outputs, output_dtypes, strict=True)), self.source, self.header
        )
        ExecutedMetalKernel.texts[full] = text
        arrays = [to_numpy(x) for x in inputs]
        outputs = [np.full(shape, 113, TYPES[t][1]) for shape, t in zip(output_shapes, output_dtypes, strict=True)]
        groups = tuple(a // b for a, b in zip(grid, threadgroup, strict=True))
        assert all(a == b * c for a, b, c in zip(grid, groups, threadgroup, strict=True))
        ExecutedMetalKernel.launches[re.sub(r"_(q\d|f\d|bf).*", "", self.name)] += 1
        compiled(text).run(full, groups, threadgroup, [*arrays, *outputs], schedule=1)
        return [
            mx.array(x).view(mx.bfloat16) if t == mx.bfloat16 else mx.array(x)
            for x, t in zip(outputs, output_dtypes, strict=True)
        ]


class FaultyMetalKernel(ExecutedMetalKernel):
    """One whose compiler makes something else of a kernel: of its file's text, or of what is called."""

    kernel: ClassVar[str] = ""  # how the faulty ones' names begin
    text: ClassVar[tuple[str, str]] = ("", "")  # what is replaced by what
    error: ClassVar[str] = ""  # that a launch raises

    def __init__(self, name, input_names, output_names, source, header=""):
        self.faulty = name.startswith(self.kernel)
        if self.faulty:
            assert self.text[0] in header, "the fault would change nothing"
            header = header.replace(*self.text)
        super().__init__(name, input_names, output_names, source, header)

    def __call__(self, **arguments):
        if self.faulty and self.error:
            raise RuntimeError(self.error)
        return super().__call__(**arguments)
