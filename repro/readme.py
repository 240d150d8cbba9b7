"""The numbers in README.md, each read from a recorded file.

    python -m repro.readme     rewrites them; tests/test_readme.py checks that they are up to date

In the text a number stands as `<!--= FILE KEY FORMAT -->17.4<!--/-->`, where FILE is a JSON file below the
checkout, KEY the dotted way to a number in it, and FORMAT how Python formats it, optionally after a factor:
`0.001*.0f`. On that way a list is left by a position (-1 is the last one's), or by what an entry has:
`rows.sampler=Heun.evaluations=39.distance`, with _ for spaces.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from repro import files, provenance
from repro.files import ReproError

_number = re.compile(r"<!--= (?P<file>\S+) (?P<key>\S+) (?P<form>\S+) -->(?P<shown>.*?)<!--/-->")


def value(path: Path, key: str) -> object:
    """What lies at the dotted `key` of a JSON file; raises `ReproError` where there is nothing."""
    if not path.is_file():
        raise ReproError(f"README.md takes a number from {path}, which is missing; run make figures")
    found = json.loads(path.read_text())
    for step in key.split("."):
        try:
            found = _entry(found, step) if isinstance(found, list) else found[step]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise ReproError(f"README.md takes {key} from {path}, where there is no {step!r}") from error
    return found


def _entry(found: list, step: str) -> object:
    """That at a position; or those of which a key has the value told, one alone in its own right."""
    key, equals, told = step.partition("=")
    if not equals:
        return found[int(step)]
    those = [entry for entry in found if str(entry[key]).replace(" ", "_") == told]
    if not those:
        raise KeyError(step)
    return those[0] if len(those) == 1 else those


def refresh(text: str, root: Path = provenance.ROOT) -> str:
    """`text` with every marked number as the recorded files have it now."""

    def one(match: re.Match) -> str:
        factor, _, form = match["form"].rpartition("*")
        number = value(root / match["file"], match["key"])
        shown = format(number * float(factor) if factor else number, form)
        return f"<!--= {match['file']} {match['key']} {match['form']} -->{shown}<!--/-->"

    return _number.sub(one, text)


if __name__ == "__main__":
    readme = provenance.ROOT / "README.md"
    files.write_atomic(readme, refresh(readme.read_text()))
