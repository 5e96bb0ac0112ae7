"""Every fenced Python block in README and docs runs, in the order of its page; YAML goes through LightningCLI."""

import re

import pytest
from command_line import cli
from helpers import settings_of
from pages import PAGES, ROOT, blocks, what_a_reader_has

from lightning_ema import EMACallback, recipes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = what_a_reader_has()
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.name)
def test_yaml_blocks_run(page, tmp_path):
    for block in blocks(page, "yaml"):
        (tmp_path / "config.yaml").write_text(block)
        made = cli("fit", f"--config={tmp_path / 'config.yaml'}", f"--trainer.default_root_dir={tmp_path}")
        assert any(isinstance(callback, EMACallback) for callback in made.trainer.callbacks)


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_in_yaml_gives_the_arguments_of_the_recipe(tmp_path):
    page = ROOT / "docs" / "how-to" / "lightning-cli.md"
    (block,) = (block for block in blocks(page, "yaml") if "# recipes." in block)
    recipe = eval(re.search(r"# (recipes\..*)", block)[1], {"recipes": recipes})
    assert str(recipe) in page.read_text()  # as print shows it
    (tmp_path / "config.yaml").write_text(block)
    made = cli(f"--config={tmp_path / 'config.yaml'}", "--trainer.logger=false", run=False)
    (callback,) = (c for c in made.trainer.callbacks if isinstance(c, EMACallback))
    assert settings_of(callback) == settings_of(EMACallback(**recipe))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
