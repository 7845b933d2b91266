"""The second executor: the same translated file compiled by NVRTC, and launched where an NVIDIA GPU is present.

Compiling needs only the nvidia-cuda-nvrtc package, no GPU. A GPU runs simdgroups as warps, really at the same time.
"""

import ctypes
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from metal_emulator import build, translate
from metal_emulator.build import EmulatorUnavailableError

HEADERS = ("integers.h", "scalars.h", "vectors.h", "math.h", "execution.h", "launch.h")


@cache
def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        # The compiler loads its built-ins by name; loaded before, they are found.
        for library in [*sorted(Path(root).rglob("libnvrtc-builtins.so*")), *sorted(Path(root).rglob("libnvrtc.so*"))]:
            loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            if library.name.startswith("libnvrtc.so"):
                return loaded
    raise EmulatorUnavailableError("NVRTC is not installed: pip install nvidia-cuda-nvrtc")


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EmulatorUnavailableError("no NVIDIA driver on this machine") from error
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise EmulatorUnavailableError("no NVIDIA GPU on this machine")
    return driver


def compile_cubin(
    source: str | Path,
    defines: Mapping[str, object] | None = None,
    architecture: str = "sm_90",
    include: Sequence[Path] = (),
    constants: Mapping[int, object] | None = None,
) -> tuple[translate.Metal, bytes]:
    """Compiles every kernel of a .metal file, or of its text, for one GPU architecture.

    Raises EmulatorUnavailableError without NVRTC, RuntimeError with the compiler's log where it rejects the file.
    """
    nvrtc = _nvrtc()
    path = build.source_file(source)
    metal = translate.parse(
        translate.preprocess(path, build.DIRECTORY / "metal_headers", include, defines or {}), constants or {}
    )
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    strings = ctypes.c_char_p * len(HEADERS)
    names = strings(*(name.encode() for name in HEADERS))
    texts = strings(*((build.RUNTIME / name).read_bytes() for name in HEADERS))
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), translate.to_cuda(metal).encode(), path.name.encode(), len(HEADERS), texts, names
    )
    options = [
        b"--gpu-architecture=" + architecture.encode(),
        b"-std=c++17",
        b"-default-device",
        b"--fmad=false",
        b"-w",
    ]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    what = ("ProgramLog", "ProgramLogSize") if failed else ("CUBIN", "CUBINSize")
    getattr(nvrtc, f"nvrtcGet{what[1]}")(program, ctypes.byref(size))
    result = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what[0]}")(program, result)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(f"{path}:\n{result.value.decode()[:4000]}")
    return metal, result.raw


class CudaProgram:
    """A .metal file on the first NVIDIA GPU. Raises EmulatorUnavailableError without one."""

    def __init__(self, source: str | Path, defines: Mapping[str, object] | None = None) -> None:
        self._cuda = _driver()
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxSetCurrent", self._context)
        version = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(version, (75, 76), strict=True):  # compute capability, major and minor
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        self._metal, cubin = compile_cubin(source, defines, f"sm_{version[0].value}{version[1].value}")
        self.kernels = tuple(self._metal.kernels)
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), cubin)

    def run(
        self, name: str, grid: tuple[int, int, int], threadgroup: tuple[int, int, int], buffers: Sequence[np.ndarray]
    ) -> None:
        """As metal_emulator.Program.run, without schedules and counters."""
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        with self._on_device(buffers) as addresses:
            argument = (ctypes.c_void_p * 31)(*addresses)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
            self._call("cuLaunchKernel", function, *grid, *threadgroup, 0, None, arguments, None)
            self._call("cuCtxSynchronize")

    @contextmanager
    def _on_device(self, buffers: Sequence[np.ndarray]) -> Iterator[list[int]]:
        addresses: list[int] = []
        try:
            for array in buffers:
                address = ctypes.c_uint64()
                self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, array.nbytes)))
                addresses.append(address.value)
                self._call(
                    "cuMemcpyHtoD_v2", address, ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
                )
            yield addresses
            for array, where in zip(buffers, addresses, strict=True):
                if array.flags.writeable:
                    self._call(
                        "cuMemcpyDtoH_v2",
                        ctypes.c_void_p(array.ctypes.data),
                        ctypes.c_uint64(where),
                        ctypes.c_size_t(array.nbytes),
                    )
        finally:
            for where in addresses:
                self._cuda.cuMemFree_v2(ctypes.c_uint64(where))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise RuntimeError(f"{name}: CUDA error {code}")
