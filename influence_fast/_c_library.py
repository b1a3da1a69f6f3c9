"""Where the C interface of the kernels lies: its header and its library, for compilers, linkers and ``ctypes``."""

from __future__ import annotations

import sys
from pathlib import Path

from influence_fast.errors import BackendError

_PACKAGE = Path(__file__).parent


def get_include() -> str:
    """The folder of ``influence_fast.h``, for a compiler's ``-I``."""
    return str(_PACKAGE / "include")


def get_library() -> str:
    """The file of the C library, for a linker or ``ctypes.CDLL``: C99 symbols ``influence_fast_*``, no Python, no torch.

    It is its own soname: link with the file itself and with ``-Wl,-rpath,FOLDER``, or load it first.

    Raises:
        BackendError: the package was installed without it.
    """
    library = _PACKAGE / f"libinfluence_fast.{'dylib' if sys.platform == 'darwin' else 'so'}"
    if not library.is_file():
        raise BackendError(
            f"the C library is not built: expected {library}; "
            "install the package again, or in a checkout run python setup.py build_ext --inplace"
        )
    return str(library)
