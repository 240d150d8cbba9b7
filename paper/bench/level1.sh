#!/bin/sh
# How long level 1 takes a newcomer: clones this checkout, runs the README's two commands there (the tests with
# the GPU kernels, interpreted), and writes level1.json beside this file. Packages that uv has cached are not downloaded again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git clone --quiet "$(git -C "$here" rev-parse --show-toplevel)" "$folder/clone"
cd "$folder/clone"

seconds() { # seconds that a command takes; its output goes to standard error
    python3 -c 'import subprocess, sys, time
began = time.time()
subprocess.run(sys.argv[1:], check=True, stdout=sys.stderr)
print(f"{time.time() - began:.2f}")' "$@"
}

setup=$(seconds make .venv/ready-cpu TORCH=cpu)
figures=$(seconds make figures)
again=$(seconds make figures)
make kernels >&2
tests=$(seconds make test)
bytes=$(du -sb .venv | cut -f1)
git diff --stat -- paper >&2
python3 - > "$here/level1.json" <<END
import json, os, platform
print(json.dumps({
    "setup_seconds": $setup, "figures_seconds": $figures, "again_seconds": $again, "test_seconds": $tests,
    "environment_bytes": $bytes, "cores": os.cpu_count(), "python": platform.python_version(),
    "machine": platform.machine(),
}, indent=1))
END
