"""What the Makefile installs and no constraints file pins is named, in words."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "check_pins.py"
SPEC = importlib.util.spec_from_file_location("check_pins", SCRIPT)
check_pins = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_pins)


def install(folder, **versions):
    """Packages as pip leaves them: of each, the folder with its metadata."""
    for name, version in versions.items():
        metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def unpinned(folder, constraints, **versions):
    install(folder / "packages", **versions)
    (folder / "constraints.txt").write_text(constraints)
    return list(check_pins.unpinned([folder / "packages"], folder / "constraints.txt"))


@pytest.mark.parametrize(
    ("constraints", "line"),
    [
        ("numpy==2.4.6\n", None),
        ("# an array\nnumpy==2.4.6  # no other\n\nunused==1", None),
        ("", "numpy 2.4.6 is not pinned; write numpy==2.4.6 into constraints.txt"),
        ("numpy>=2.4.6", "numpy 2.4.6 is not pinned; write numpy==2.4.6 into constraints.txt"),
        ("numpy==2.4.*", "numpy 2.4.6 is not pinned; write numpy==2.4.6 into constraints.txt"),
        ("numpy==2.4.5", "numpy is 2.4.6, but constraints.txt says 2.4.5"),
        ("numpy==2.4.5\nnumpy==2.4.6", "numpy is 2.4.6, but constraints.txt says 2.4.5 and 2.4.6"),
    ],
)
def test_each_package_needs_its_exact_version(tmp_path, constraints, line):
    assert unpinned(tmp_path, constraints, numpy="2.4.6") == ([line] if line else [])


def test_several_lines_come_in_the_order_of_the_names(tmp_path):
    lines = unpinned(tmp_path, "b==1", c="3", a="1", b="2")
    assert [line.split()[0] for line in lines] == ["a", "b", "c"]


def test_a_local_suffix_is_another_build_of_the_same_version(tmp_path):
    assert unpinned(tmp_path, "torch==2.13.0\ntriton==3.9.0+git1", torch="2.13.0+cpu", triton="3.9.0") == []


def test_a_package_without_a_pin_is_to_be_pinned_without_its_local_suffix(tmp_path):
    lines = unpinned(tmp_path, "", torch="2.13.0+cpu")
    assert lines == ["torch 2.13.0 is not pinned; write torch==2.13.0 into constraints.txt"]


def test_pip_and_this_project_need_no_pin(tmp_path):
    assert unpinned(tmp_path, "", pip="23.2.1", lightning_ema="0.1.0") == []


def test_a_name_is_the_same_with_dashes_underscores_dots_and_capitals(tmp_path):
    constraints = "ruamel_yaml==1\nmkdocs-get-deps==2\nPyYAML==3"
    assert unpinned(tmp_path, constraints, **{"ruamel.yaml": "1", "mkdocs_get_deps": "2", "pyyaml": "3"}) == []


def test_a_package_that_is_there_twice_is_named_with_the_version_that_is_not_pinned(tmp_path):
    install(tmp_path / "packages", numpy="2.4.5")
    assert unpinned(tmp_path, "numpy==2.4.6", numpy="2.4.6") == ["numpy is 2.4.5, but constraints.txt says 2.4.6"]


def test_a_line_for_other_pythons_pins_nothing(tmp_path):
    constraints = 'numpy==2.4.6; python_version >= "3"\nscipy==1; python_version < "3"\npandas==1; python_version < "3"'
    lines = unpinned(tmp_path, constraints + "\npandas==3", numpy="2.4.6", scipy="1", pandas="3")
    assert lines == ["scipy 1 is not pinned; write scipy==1 into constraints.txt"]


def test_a_folder_without_packages_or_without_its_file_is_named(tmp_path):
    lines = list(check_pins.unpinned([tmp_path], tmp_path / "constraints-new.txt"))
    assert lines == [
        "no package was found in it; `make clean` and set it up again",
        "constraints-new.txt, which is to pin what is in it, is missing",
    ]


def test_environments_and_target_folders_are_found_each_with_its_file(tmp_path, capsys):
    assert check_pins.main(tmp_path) == 1
    assert capsys.readouterr().out == f"{tmp_path}: there is no environment .venv*; `make setup` makes one\n"

    for name in (".venv", ".venv-oldest"):
        install(tmp_path / name / "lib" / "python3.11" / "site-packages", pip="23.2.1", numpy="2.4.6")
    install(tmp_path / ".venv" / "mmdet2", mmdet="2.28.2")
    (tmp_path / "constraints.txt").write_text("numpy==2.4.6\nmmdet==3.3.0")
    (tmp_path / "constraints-oldest.txt").write_text("numpy==2.0.0")
    assert check_pins.main(tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        ".venv/mmdet2: constraints-mmdet2.txt, which is to pin what is in it, is missing",
        ".venv-oldest: numpy is 2.4.6, but constraints-oldest.txt says 2.0.0",
    ]

    (tmp_path / "constraints-mmdet2.txt").write_text("mmdet==2.28.2")
    (tmp_path / "constraints-oldest.txt").write_text("numpy==2.4.6")
    assert check_pins.main(tmp_path) == 0
    assert capsys.readouterr().out == "everything is pinned in .venv, .venv/mmdet2, .venv-oldest\n"
