"""README's script for a cluster, to be run without one."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def write_job(folder: Path, **commands: str) -> None:
    """The script, as job.sh in `folder`, and beside it what stands in for commands of the scheduler."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", README.read_text(), re.DOTALL)
    (folder / "job.sh").write_text(script)
    for name, content in commands.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
