"""`python -m tests.fuzz`: every decoder on inputs that nobody foresaw, and a table of what came of it.

First hypothesis, by the tests that decode arbitrary or mutated bytes; then atheris, which looks for new paths through a
decoder from real inputs on, each target in a process of its own.

A target that fails, hangs or cannot even begin stops no other one.

Exit code 0: none raised anything but its own error.  1: one did; its input is in the file that is named.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.fuzz import targets
from tests.fuzz.seeds import seeds

_TESTS = "arbitrary or mutated or mutilated or test_any_bytes or test_any_text or test_any_lines"
"""Those of tests/unit that are about decoders, as pytest's -k has it."""
_TEST = re.compile(r"^(tests/unit/\w+\.py)::.*:$", re.MULTILINE)
_EXAMPLES = re.compile(r"(\d+) passing, (\d+) failing, and (\d+) invalid test cases")
_SHORTEST = 4096
"""Bytes that an input may always have."""
_PULSE = re.compile(r"^#(\d+)\t", re.MULTILINE)
_PATIENCE = 180
"""Seconds for a target to start and to end, on a busy machine."""
_EXECUTED = re.compile(r"^stat::number_of_executed_units:\s*(\d+)", re.MULTILINE)


class Outcome(NamedTuple):
    """What came of one target."""

    target: str
    inputs: int
    seconds: float
    crashes: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one of {', '.join(targets.TARGETS)}; all")
    parser.add_argument("--seconds", type=int, default=60, help="of atheris for each target")
    parser.add_argument("--examples", type=int, default=1_000, help="of hypothesis for each test; 0: none")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time [1]")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where inputs that raise are kept")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.corpus:
        _fuzz(options.targets[0], options.corpus, options.seconds, options.found)
    chosen = options.targets or list(targets.TARGETS)
    if unknown := set(chosen) - targets.TARGETS.keys():
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    outcomes: list[Outcome] = []
    if options.examples and not options.targets:
        outcomes += _tests(options.examples)
    options.found.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:  # each waits for a process
        run = functools.partial(_run, seconds=options.seconds, found=options.found.resolve())
        outcomes += pool.map(run, chosen)
    print("\n".join(_table(outcomes)))  # noqa: T201  # a program for the terminal
    failed = [each.target for each in outcomes if each.crashes]
    if failed:
        print(f"raised what they must not: {', '.join(failed)}; inputs of targets are in {options.found}")  # noqa: T201
    return min(len(failed), 1)


def _table(outcomes: Iterable[Outcome]) -> Iterator[str]:
    rows = list(outcomes)
    rows.append(
        Outcome(
            "in all",
            sum(each.inputs for each in rows),
            sum(each.seconds for each in rows),
            sum(each.crashes for each in rows),
        )
    )
    width = max(len(each.target) for each in rows)
    yield f"{'TARGET':{width}}  {'INPUTS':>12}  {'SECONDS':>7}  CRASHES"
    for each in rows:
        yield f"{each.target:{width}}  {each.inputs:12,}  {each.seconds:7.0f}  {each.crashes:7}"


def _tests(examples: int) -> Iterator[Outcome]:
    """Hypothesis, by the files of its tests."""
    print("==> hypothesis", flush=True)  # noqa: T201  # as above
    started = time.monotonic()
    options = ["--hypothesis-profile=fuzz", "--hypothesis-show-statistics", "-q", "-k", _TESTS, "tests/unit"]
    environment = {**os.environ, "FUZZ_EXAMPLES": str(examples)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    said = ended.stdout
    if ended.returncode:
        print("\n".join(f"    {line}" for line in (said + ended.stderr).splitlines()[-80:]))  # noqa: T201  # as above
    inputs: dict[str, list[int]] = {}
    name = ""
    for line in said.splitlines():
        if (found := _TEST.match(line)) is not None:
            name = found[1]
        elif (counted := _EXAMPLES.search(line)) is not None:
            inputs.setdefault(name, [0, 0])[0] += sum(map(int, counted.groups()))
            inputs[name][1] += int(counted[2])
    seconds = time.monotonic() - started
    total = sum(each for each, _ in inputs.values()) or 1
    for file, (number, failing) in inputs.items():
        yield Outcome(file, number, seconds * number / total, min(failing, 1))
    if ended.returncode and not any(failing for _, failing in inputs.values()):
        yield Outcome("hypothesis", 0, 0, 1)


def _run(name: str, seconds: int, found: Path) -> Outcome:
    print(f"==> {name}", flush=True)  # noqa: T201  # as above
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sluice-fuzz-") as corpus:
        try:
            for number, seed in enumerate(seeds(name)):
                (Path(corpus) / f"seed-{number}").write_bytes(seed)
            command = [sys.executable, "-m", "tests.fuzz", name, "--seconds", str(seconds), "--corpus", corpus]
            ended = subprocess.run(
                [*command, "--found", str(found)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                env={**os.environ, "PYTHONHASHSEED": "0"},
                timeout=seconds + _PATIENCE,
            )
        except Exception as error:  # noqa: BLE001  # the others are to have their turn
            print(f"    {name}: {type(error).__name__}: {error}"[:1000], flush=True)  # noqa: T201  # as above
            return Outcome(name, 0, time.monotonic() - started, 1)
    if ended.returncode:
        said = [line for line in (ended.stdout + ended.stderr).splitlines() if not line.startswith("INFO")]
        print("\n".join([f"    {name}:", *(f"    {line}" for line in said[-60:])]), flush=True)  # noqa: T201  # as above
    # One that crashed has no statistics at its end, but tells how far it is as it goes.
    executed = [int(number) for pattern in (_EXECUTED, _PULSE) for number in pattern.findall(ended.stderr)]
    return Outcome(name, max(executed, default=0), time.monotonic() - started, int(ended.returncode != 0))


def _fuzz(name: str, corpus: Path, seconds: int, found: Path) -> None:
    import atheris  # noqa: PLC0415  # an extra that only this needs

    # Loaded anew, as only what is loaded now is followed; all of Python would take half a minute.
    for module in [
        each
        for each in sys.modules
        if each.partition(".")[0] in {"proxy", "rules"}
        or (each.startswith("tests.fuzz.") and each != "tests.fuzz.__main__")
    ]:
        del sys.modules[module]
    with atheris.instrument_imports(include=["proxy", "rules"]):
        again = importlib.import_module("tests.fuzz.targets")
    # Not much longer than what there is to begin with: a million short inputs find more than a thousand long ones.
    longest = max([_SHORTEST, *(2 * each.stat().st_size for each in corpus.iterdir())])
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=4096", "-timeout=30", f"-max_len={longest}"]
    options = [*limits, f"-artifact_prefix={found}/{name}-", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], str(corpus), *options], again.TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
