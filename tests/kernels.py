"""Triton's kernels, run in a process of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch


def of_kernels(script: str) -> dict:
    """What a script of cases beside this file prints of Triton's kernels: on a GPU, or interpreted.

    Triton reads TRITON_INTERPRET when it is imported, so this takes a process of its own.
    """
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    path = Path(__file__).with_name(script)
    process = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def compiles() -> bool:
    """Whether torch.compile has the C++ compiler that it needs to compile for a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def patch_once() -> None:
    """In a process of Triton's interpreter: give device functions the interpreted language once a launch.

    The interpreter puts it in the language's place at a launch, and again at each call of a device function,
    which takes a third of the time. But a module's own `tl` has it since the launch, and Triton's own modules
    of device functions, given it once, keep it.
    """
    from triton.runtime import interpreter

    given = set()

    def call(function, *arguments, **options):
        if id(names := function.fn.__globals__) not in given:
            interpreter._patch_lang(function.fn)
            given.add(id(names))
        return function.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call


def round_to_float8() -> None:
    """In a process of Triton's interpreter: round to float8 as GPUs do, to the nearest, of two the even one.

    Its own rounding loses what is carried into the exponent (125 becomes 64), and knows no NaN.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data, of, to, rounding_mode):
        if to != tl.float8e4nv:
            return convert(data, of, to, rounding_mode)
        assert of == tl.float32
        x = torch.from_numpy(np.asarray(data, np.float32)).clamp(-448, 448)  # of more, GPUs give the most too
        return x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = rounded
