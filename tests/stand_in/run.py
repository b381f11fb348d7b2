"""Runs Python on stand_in.cpp in place of a GPU: python tests/stand_in/run.py [--device "RTX 4090"] -m pytest …

torch must be a CUDA build. Kernels are launched and compute nothing: memory keeps what it held, at first zeros. What a
device, a stream or a capture would refuse is refused as there, with the reason on record (``records``).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("stand_in.cpp")
FOLDER = SOURCE.parents[2] / "build" / "stand_in"
DEVICES = ("H100", "B200", "A100", "RTX 4090", "T4")


def headers() -> list[Path]:
    """Folders with cuda_runtime_api.h and what it includes: of the toolkit, of a package, of Triton."""
    from torch.utils.cpp_extension import CUDA_HOME

    packages = Path(sysconfig.get_path("purelib"))
    found = [packages / "nvidia" / "cu13" / "include", packages / "triton" / "backends" / "nvidia" / "include"]
    found = [Path(CUDA_HOME, "include"), *found] if CUDA_HOME else found
    return [folder for folder in found if (folder / "crt" / "host_defines.h").is_file()]


def library() -> Path:
    """Compiled if it is older than its source."""
    made = FOLDER / "libcuda.so.1"  # the name by which Triton links the driver
    if not made.exists() or made.stat().st_mtime < SOURCE.stat().st_mtime:
        FOLDER.mkdir(parents=True, exist_ok=True)
        new = FOLDER / f"new-{os.getpid()}.so"
        flags = "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -Wall -Wextra -Wno-unused-parameter"
        own = f"-Wl,-soname,{made.name}", f"-I{headers()[0]}", str(SOURCE), "-o", str(new)
        subprocess.run([os.environ.get("CXX", "g++"), *flags.split(), *own], check=True)
        new.replace(made)
    return made


def environment(device: str = DEVICES[0]) -> dict[str, str]:
    own = library()
    return {
        **os.environ,
        "LD_PRELOAD": str(own),
        "LD_LIBRARY_PATH": f"{own.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TRITON_LIBCUDA_PATH": str(own.parent),
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "TRITON_INTERPRET": "0",
        "STAND_IN_DEVICE": device,
    }


def records() -> list[dict[str, Any]]:
    """What has been called since the last time, in order."""
    take = ctypes.CDLL("libcuda.so.1").stand_in_take
    take.restype = ctypes.c_char_p
    return [json.loads(line) for line in take().decode().splitlines()]


def main(arguments: list[str]) -> None:
    device = DEVICES[0]
    if arguments[:1] == ["--device"]:
        device, arguments = arguments[1], arguments[2:]
    if not arguments or device not in DEVICES:
        sys.exit(f"{__doc__}Devices: {', '.join(DEVICES)}")
    os.execve(sys.executable, [sys.executable, *arguments], environment(device))


if __name__ == "__main__":
    main(sys.argv[1:])
