"""Tensors of released checkpoints, as their files list them."""

import json
from pathlib import Path


def listed(key: str) -> dict:
    """`parameters`, their number, and `state_dict`, the shape of each tensor by name, of one file."""
    return json.loads((Path(__file__).parent / "released-checkpoints.json").read_text())[key]
