"""Imports point one way: from the Trainer down to pure mathematics."""

import ast
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import lightning_ema

ROOT = Path(lightning_ema.__file__).parent
LAYERS = [
    {"checks", "choice", "state", "ramps", "logits", "shards", "before_step"},
    {"schedules", "portions"},
    {
        "compositions",
        "advice",
        "selection",
        "kernels",
        "steps",
        "splits",
        "streams",
        "consistency",
        "loaders",
        "randomness",
    },
    {"shares", "offload", "fused_kernel", "side_stream"},
    {"pair"},
    {"storage_loan"},
    {"settings", "loan", "fused", "footprint", "recalibration", "aside", "metrics", "spelling", "views"},
    {"absorption", "scoring"},
    {"pairing", "history"},
    {"course", "profiles"},
    {"report"},
    {"average"},
    {
        "checkpoint",
        "sharded_checkpoint",
        "trainer_facts",
        "module_hook",
        "training_batches",
        "evaluation_loop",
        "teacher_config",
        "teacher_networks",
    },
    {
        "custody",
        "export",
        "second_pass",
        "snapshot_file",
        "coefficients",
        "plot_command",
        "teacher_callback",
        "distributed_checkpoint",
        "found",
    },
    {"passes", "snapshots", "recipe", "teacher", "naming", "readers_lightning", "readers_openmmlab", "readers_pytorch"},
    {"callback", "semi_supervised_data", "combination", "recipes_openmmlab", "recipes_pytorch", "recipes_yolo"},
    {"recipes", "synthesis", "interop"},
    {"recommendation", "synthesize_command", "import_command"},
    {"recommend_command"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
ALLOWED_OUTSIDE = {
    "checks": set(),
    "scoring": set(),
    "choice": set(),
    "state": {"torch"},
    "schedules": set(),
    "ramps": set(),
    "compositions": set(),
    "spelling": set(),
    "advice": set(),
    "report": set(),
    **{name: set() for name in ("recipe", "recipes_openmmlab", "recipes_pytorch", "recipes_yolo", "recipes")},
    "checkpoint": {"torch"},
    "import_command": set(),
    **{
        name: {"lightning", "torch"}
        for name in ("callback", "distributed_checkpoint", "passes", "evaluation_loop", "module_hook", "second_pass")
    },
    **{name: {"lightning", "torch"} for name in ("semi_supervised_data", "teacher_callback", "training_batches")},
    "teacher": {"lightning", "torch", "torchmetrics"},
    "teacher_config": set(),
    "trainer_facts": {"lightning", "pytorch_lightning", "torch"},
    **{name: {"torch", "torchmetrics"} for name in ("metrics", "selection")},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "lightning_ema" else [node.module]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_down(path):
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "lightning_ema":
            assert LEVEL[rest[0]] < LEVEL[path.stem], f"{path.stem} imports {rest[0]}"
        elif package in ("torch", "torchmetrics", "lightning", "pytorch_lightning"):
            assert package in ALLOWED_OUTSIDE.get(path.stem, {"torch"}), f"{path.stem} imports {package}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.stem)
def test_what_takes_long_to_import_waits_until_it_is_needed(path):
    for node in ast.parse(path.read_text()).body:  # torch.distributed.checkpoint brings servers and process pools
        named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [
            name for name in named if name.startswith(("torch.distributed.checkpoint", "matplotlib", "tabulate"))
        ]


def test_all_public_names_are_there_and_documented():
    for name in lightning_ema.__all__:
        assert getattr(lightning_ema, name).__doc__, name


def test_the_page_on_design_has_a_place_for_every_file():
    page = (ROOT.parent / "docs" / "explanation" / "design.md").read_text()
    names = page.split("## Layers")[1].split("A file imports")[0].split()
    left_out = [
        path.stem for path in sorted(ROOT.glob("*.py")) if not any(fnmatchcase(path.stem, name) for name in names)
    ]
    assert left_out == ["__init__"]
