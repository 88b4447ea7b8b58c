"""`python -m tests.lowest FOLDER [TESTS]`: the fast tests with the lowest versions of requirements.txt.

Makes a virtual environment in FOLDER, or takes the one that is there, and runs pytest in it: on Python 3.11,
as the lowest NumPy has no wheel for later ones. Peers are not installed, and what compares with them is
skipped. The oldest torch brings 7 GB. CI runs it where that fits.
"""

import re
import subprocess
import sys
import venv
from pathlib import Path

from tests.course import ROOT


def lowest() -> list[str]:
    """The requirements with each lower bound in place of its range; of torch the last patch of it."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    pairs = [re.fullmatch(r"([\w-]+)>=([\d.]+)(,<[\d.]+)?", line).groups()[:2] for line in lines]
    return [f"{name}=={version}" + (".*" if name == "torch" else "") for name, version in pairs]


def main(folder: str, *tests: str) -> int:
    python = Path(folder).absolute() / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *lowest()], check=True)
    return subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
