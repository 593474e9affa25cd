"""`python -m tests.fuzz`: every decoder under atheris, each in a process of its own.

atheris looks for new paths through it, from real inputs on.

Exit code 0: none raised anything but its own error.  1: one did; its input is in the file that is named.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz import targets


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(targets.TARGETS)}; all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where inputs that raise are kept")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus:
        _fuzz(options.targets[0], options.corpus, options.seconds, options.found)
    failed = [name for name in options.targets or targets.TARGETS if not _run(name, options.seconds, options.found)]
    if failed:
        print(f"raised what they must not: {', '.join(failed)}; the inputs are in {options.found}")  # noqa: T201
    return min(len(failed), 1)


def _run(name: str, seconds: int, found: Path) -> bool:
    print(f"==> {name}", flush=True)  # noqa: T201  # a program for the terminal
    found.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sluice-fuzz-") as corpus:
        for number, seed in enumerate(targets.seeds(name)):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds), "--corpus", corpus]
        ended = subprocess.run([*command, "--found", str(found)], capture_output=True, text=True, check=False)
    lines = ended.stderr.splitlines()
    print("\n".join(f"    {line}" for line in (lines[-1:] if ended.returncode == 0 else lines[-40:])))  # noqa: T201
    return ended.returncode == 0


def _fuzz(name: str, corpus: Path, seconds: int, found: Path) -> None:
    import atheris  # noqa: PLC0415  # an extra that only this needs

    # Loaded anew, as only what is loaded now is followed; all of Python would take half a minute.
    for module in [
        each for each in sys.modules if each.partition(".")[0] in {"proxy", "rules"} or "fuzz.targets" in each
    ]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["proxy", "rules"]):
        targets = importlib.import_module("tests.fuzz.targets")
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={found}/{name}-", "-rss_limit_mb=4096", "-timeout=30"]
    atheris.Setup([sys.argv[0], str(corpus), *options, "-max_len=65536"], targets.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
