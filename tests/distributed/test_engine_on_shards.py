"""The engine on sharded weights without a Trainer: FSDP2, tensor parallel and both, with gloo on a CPU."""

import json

import pytest
from engine_on_shards import CHECKS
from two_processes import run


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """How each check ended, in each process."""
    folder = tmp_path_factory.mktemp("engine")
    ran = run("engine_on_shards.py", folder)
    files = {(n, rank): folder / f"{n}-{rank}.json" for n in CHECKS for rank in range(n)}
    assert all(path.exists() for path in files.values()), ran.stderr
    return {place: json.loads(path.read_text()) for place, path in files.items()}


@pytest.mark.parametrize(
    ("processes", "name"), [(n, name) for n, checks in CHECKS.items() for name in checks], ids=lambda value: str(value)
)
def test_engine(seen, processes, name):
    assert {rank: seen[processes, rank][name] for rank in range(processes)} == dict.fromkeys(range(processes), "")
