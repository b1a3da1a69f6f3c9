"""Builds the compiled modules ``influence_fast_cpu`` and, where CUDA is, ``influence_fast_cuda``; neither sees torch.

``INFLUENCE_FAST_CUDA``: ``1`` demands the CUDA module, ``0`` skips it, unset builds it where ``nvcc`` is found and says
so loudly where that fails. ``INFLUENCE_FAST_CUDA_ARCHS`` (default ``80;86;89;90``) lists its targets; the last one is
also kept as PTX for newer cards. ``INFLUENCE_FAST_ISAS`` names the instruction sets that the CPU module is built for beside
the baseline (all by default: ``avx2;avx512;avx512bf16``), ``INFLUENCE_FAST_SANITIZE`` sanitizers to build it with, such as
``address,undefined`` (csrc/tests/sanitize.sh).
"""

from __future__ import annotations

import copy
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
# The one place for flags. No -march=native: a unit per instruction set, chosen at run time.
CXX_FLAGS = ["-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-Wall", "-Wextra", "-pthread"]
# Left out where a compiler does not know them.
WANTED_FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized", "-mprefer-vector-width=512"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
# A unit is left out, and never chosen, where a compiler does not know its flags.
ISA_FLAGS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]} if X86 else {}
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
NVCC_FLAGS += ["-lineinfo", "-Werror", "all-warnings", "-cudart", "static"]

# A file among the package's modules that is linked against, not imported.
C_LIBRARY = "influence_fast.libinfluence_fast"

if sys.platform == "darwin":
    # A Python for both Mac architectures asks for both at once, but units are for one of them.
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")


def cpu_extension() -> Extension:
    sources = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
    sources += [f"csrc/cpu/isa/{isa}.cpp" for isa in ("baseline", *ISA_FLAGS)]
    headers = [str(path) for pattern in ("*.h", "cpu/*.h", "cpu/kernels/*.inc") for path in Path("csrc").glob(pattern)]
    return Extension("influence_fast_cpu", sources, depends=headers, language="c++")


def c_library() -> Extension:
    """The same kernels under the C interface, as a shared library (influence_fast.get_library)."""
    cpu = cpu_extension()
    sources = [source for source in cpu.sources if not source.endswith("bindings.cpp")]
    sources += sorted(str(path) for path in Path("csrc/c").glob("*.cpp"))
    depends = [*cpu.depends, "csrc/c/symbols.map", *(str(path) for path in Path("csrc/c").glob("*.h"))]
    return Extension(C_LIBRARY, sources, depends=depends, language="c++")


def cuda_extension() -> Extension | None:
    """The CUDA module, or None where it is not wanted or, without being demanded, cannot be built."""
    wanted = os.environ.get("INFLUENCE_FAST_CUDA", "")
    sources = sorted(str(path) for pattern in ("*.cu", "*.cpp") for path in Path("csrc/cuda").glob(pattern))
    if wanted == "0" or not sources:
        return None
    if nvcc() is None:
        if wanted == "1":
            raise SystemExit("INFLUENCE_FAST_CUDA=1, but no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        return None
    headers = [
        str(path)
        for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh", "cuda/simt/*.h")
        for path in Path("csrc").glob(pattern)
    ]
    return Extension("influence_fast_cuda", sources, depends=headers, optional=wanted != "1", language="c++")


def nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return next((found for home in homes if home and (found := shutil.which(f"{home}/bin/nvcc"))), shutil.which("nvcc"))


class BuildExt(build_ext):
    objects: dict[str, str]  # of C++ sources that are compiled already: both libraries share most

    def build_extensions(self) -> None:
        self.objects = {}
        if self.compiler.compiler_type != "unix":
            raise SystemExit(
                "influence_fast compiles with g++ or clang on Linux and macOS, not with "
                f"{self.compiler.compiler_type}: on Windows, install it within WSL 2"
            )
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        if extension.name == "influence_fast_cuda":
            self.build_cuda(extension)
        else:
            self.build_cpu(extension)

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        if name != C_LIBRARY.rpartition(".")[2]:
            return super().get_ext_filename(fullname)
        return os.path.join(*folders, f"{name}.{'dylib' if sys.platform == 'darwin' else 'so'}")

    def version_flag(self) -> str:
        return f'-DINFLUENCE_FAST_VERSION="{self.distribution.get_version()}"'

    def knows(self, *flags: str) -> bool:
        """Whether the C++ compiler takes these flags."""
        command = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.touch()
            line = [*command, "-Werror", *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
            try:
                return subprocess.run(line, capture_output=True).returncode == 0
            except FileNotFoundError:
                raise SystemExit(f"influence_fast: no {command[0]} found; install g++ or clang, or set CXX") from None

    def build_cpu(self, extension: Extension) -> None:
        sanitizers = os.environ.get("INFLUENCE_FAST_SANITIZE")
        checked = [f"-fsanitize={sanitizers}", "-O1", "-g", "-fno-omit-frame-pointer"] if sanitizers else []
        flags = [*CXX_FLAGS, *checked, *(flag for flag in WANTED_FLAGS if self.knows(flag)), self.version_flag()]
        asked_for = os.environ.get("INFLUENCE_FAST_ISAS", ";".join(ISA_FLAGS)).split(";")
        wanted = {isa: isa_flags for isa, isa_flags in ISA_FLAGS.items() if isa in asked_for}
        isas = {isa: isa_flags for isa, isa_flags in wanted.items() if self.knows(*isa_flags)}
        left_out = {f"csrc/cpu/isa/{isa}.cpp" for isa in ISA_FLAGS.keys() - isas}
        if unknown := wanted.keys() - isas:
            print(f"influence_fast: not built, the compiler lacks its flags: {', '.join(unknown)}", file=sys.stderr)
        macros = [(f"INFLUENCE_FAST_{isa.upper()}", "1") for isa in isas]

        def compiled(source: str) -> str:
            [target] = self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=[pybind11.get_include()],
                depends=extension.depends,
                extra_postargs=[*flags, *isas.get(Path(source).stem, [])],
            )
            return target

        sources = [source for source in extension.sources if source not in left_out]
        fresh = [source for source in sources if source not in self.objects]
        with ThreadPoolExecutor(CORES) as pool:
            self.objects.update(zip(fresh, pool.map(compiled, fresh), strict=True))
        compiler, libraries = self.compiler, [*checked[:1], "-pthread"]
        if sys.platform == "linux":
            libraries.append("-ldl")
        if extension.name == C_LIBRARY and sys.platform == "darwin":
            # A bundle, which is what Python loads, cannot be linked against.
            compiler = copy.copy(compiler)
            for name in ("linker_so", "linker_so_cxx"):
                command = getattr(compiler, name, None) or []
                setattr(compiler, name, ["-dynamiclib" if flag == "-bundle" else flag for flag in command])
            libraries.append("-Wl,-install_name,@rpath/libinfluence_fast.dylib")
        elif extension.name == C_LIBRARY:
            # A program that links with it asks for this name, in whatever folder. Symbols are seven eighths of the size.
            libraries += ["-Wl,-s,-soname,libinfluence_fast.so", "-Wl,--version-script=csrc/c/symbols.map"]
        objects, target = [self.objects[source] for source in sources], self.get_ext_fullpath(extension.name)
        compiler.link_shared_object(objects, target, extra_postargs=libraries, target_lang="c++")

    def build_cuda(self, extension: Extension) -> None:
        archs = os.environ.get("INFLUENCE_FAST_CUDA_ARCHS", "80;86;89;90").split(";")
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        temp = Path(self.build_temp, "csrc/cuda")
        temp.mkdir(parents=True, exist_ok=True)
        processes = min(CORES, len(extension.sources))
        flags = [*NVCC_FLAGS, "--threads", str(-(-CORES // processes))]

        def run(*arguments: str) -> None:
            print(" ".join(arguments))
            subprocess.run(arguments, check=True)

        def compiled(source: str) -> str:
            target = str(temp / Path(source).with_suffix(".o").name)
            run(str(nvcc()), *flags, *targets, *includes, self.version_flag(), "-c", source, "-o", target)
            return target

        try:
            with ThreadPoolExecutor(processes) as pool:
                objects = list(pool.map(compiled, extension.sources))
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            run(str(nvcc()), "-shared", "-cudart", "static", *targets, *objects, "-o", str(target))
        except (OSError, subprocess.CalledProcessError) as error:
            if not extension.optional:
                raise
            banner = "*" * 100
            print(
                f"{banner}\ninfluence_fast: the CUDA module was SKIPPED, its build failed: {error}\nThe package works "
                f"without it. INFLUENCE_FAST_CUDA=0 silences this, INFLUENCE_FAST_CUDA=1 makes it an error.\n{banner}",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        # A module whose optional build was skipped has nothing to copy.
        self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath_in_build(e.name)).exists()]
        super().copy_extensions_to_source()

    def get_ext_fullpath_in_build(self, name: str) -> str:
        return str(Path(self.build_lib, self.get_ext_filename(name)))


setup(
    ext_modules=[extension for extension in (cpu_extension(), c_library(), cuda_extension()) if extension],
    cmdclass={"build_ext": BuildExt},
)
