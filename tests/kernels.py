"""Triton's kernels, run in a process of their own."""

import json
import os
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
