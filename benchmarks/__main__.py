"""`make bench`: runs the benchmarks that need no input, or one by name with its arguments.

python -m benchmarks
python -m benchmarks ptqtp_quality MODEL_FOLDER TEXT_FILE
"""

import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent
WITHOUT_INPUT = ["kd_memory"]


def main(argv: list[str]) -> int:
    names = sorted(path.stem for path in HERE.glob("[a-z]*.py"))
    if argv and argv[0] not in names:
        print(f"There is no benchmark {argv[0]!r}; there are {', '.join(names)}.", file=sys.stderr)
        return 2
    runs = [argv] if argv else [[name] for name in WITHOUT_INPUT]
    return max(subprocess.run([sys.executable, HERE / f"{name}.py", *rest]).returncode for name, *rest in runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
