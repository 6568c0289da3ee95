"""Seconds until the tool answers: `import ratoon` and `ratoon --help`, each in a fresh process, by turns.

    python benchmarks/start_time.py

Beside them Python's own start, which is part of both. Says whether torch was loaded, which it must not be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HELP = "import sys; sys.argv = ['ratoon', '--help']; from ratoon.cli.main import main"


def loads_torch(code: str) -> bool:
    """Whether torch is there after `code`, whatever the code prints and however it ends."""
    asked = (
        f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nsys.exit(7 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    if done.returncode not in (0, 7):
        raise SystemExit(done.stderr)
    return done.returncode == 7


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=15)
    options.add_argument("--json", default=None)
    chosen = options.parse_args()
    script = Path(sys.executable).parent / "ratoon"
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        'python -c "import ratoon"': [sys.executable, "-c", "import ratoon"],
        "ratoon --help": [str(script), "--help"],
    }
    torch = {
        'python -c "import ratoon"': loads_torch("import ratoon"),
        "ratoon --help": loads_torch(f"{HELP}; main()"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(2 + chosen.runs):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number >= 2:  # two warm-ups
                seconds[name].append(time.perf_counter() - began)
    print(f"{chosen.runs} runs after 2 warm-ups\n")
    print("| | seconds (median) | smallest–largest | torch loaded |")
    print("|---|---:|---:|---|")
    for name, found in seconds.items():
        loaded = {None: "", False: "no", True: "yes"}[torch.get(name)]
        print(f"| `{name}` | {statistics.median(found):.3f} | {min(found):.3f}–{max(found):.3f} | {loaded} |")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps({"seconds": seconds, "torch": torch}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
