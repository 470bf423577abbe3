"""`make bench`: every method on the same tiny model (board.py), or a benchmark by name with its arguments.

python -m benchmarks
python -m benchmarks ptqtp_quality MODEL_FOLDER TEXT_FILE
"""

import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent


def main(argv: list[str]) -> int:
    names = sorted(path.stem for path in HERE.glob("[a-z]*.py"))
    if argv and argv[0] not in names:
        print(f"There is no benchmark {argv[0]!r}; there are {', '.join(names)}.", file=sys.stderr)
        return 2
    name, *rest = argv or ["board"]
    return subprocess.run([sys.executable, HERE / f"{name}.py", *rest]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
