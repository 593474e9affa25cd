"""Made-up clusters: what Sluice makes of them is what the clauses say, packet by packet (tests/reference.py)."""

from __future__ import annotations

from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.load import load
from proxy.config.settings import Settings
from tests.made_up import cases_of, situation
from tests.netns.agent import _standard_config
from tests.reference import SETTINGS, Reference, Setting
from tests.scenarios.explaining import wanted, wrong_answer
from tests.scenarios.schema import CLUSTER, manifests, merge

MODES = ("nftables", "iptables", "userspace")
ASKED = 15
"""Packets of each cluster."""


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Settings]:
    """Every setting in every mode."""
    directory = tmp_path_factory.mktemp("configurations")
    return {
        (mode, number): _load(directory / f"{mode}-{number}.yaml", mode, setting)
        for mode in MODES
        for number, setting in enumerate(SETTINGS)
    }


def _load(file: Path, mode: str, setting: Setting) -> Settings:
    file.write_bytes(msgspec.json.encode(merge(_standard_config(mode), setting.config) | {"mode": mode}))
    return load([("config", str(file))]).settings


@given(st.integers(0, 2**32 - 1), st.sampled_from(MODES), st.integers(0, len(SETTINGS) - 1))
def test_every_packet_meets_what_the_clauses_say(
    configured: dict[tuple[str, int], Settings], seed: int, mode: str, setting: int
) -> None:
    random = Random(seed)
    objects = [*manifests(CLUSTER), *situation(random)]
    every = list(cases_of(Reference(objects, mode, SETTINGS[setting])))
    wrong = [
        wrong_answer(case, wanted(case, objects, configured[mode, setting]))
        for case in random.sample(every, min(len(every), ASKED))
    ]
    assert not list(filter(None, wrong))
