"""The READMEs: every command in them parses, and names files, configs and keys that exist.

Nothing is trained: each script runs up to the point where its arguments are parsed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dn_detr.engine.config import load_config
from dn_detr.engine.overrides import ConfigError
from dn_detr.requirements import DETECTRON2_SOURCE

ROOT = Path(__file__).resolve().parent.parent
READMES = (
    "README.md",
    "MODEL_ZOO.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("projects/*/README.md")),
)
CONFIG = "projects/dn_detr/configs/dn_detr_r50_50ep.py"
PLACEHOLDERS = {"CONFIG": CONFIG, "IMAGE_OR_FOLDER...": "image.jpg"}
KEY_AND_VALUE = r"`((?:model|dataset|dataloader|optimizer|train)\.[\w.]+=[^`]+)`"


class Parsed(Exception):
    """Ends a script as soon as its command line is read."""


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def commands_of(readme: str) -> list[list[str]]:
    """The words of every command in a README's ```bash blocks, placeholders filled in."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(readme), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [[PLACEHOLDERS.get(word, word) for word in command] for command in commands if command]


DOCUMENTS = (*READMES, "RELIABILITY.md")  # which names keys that do not exist
COMMANDS = [command for document in DOCUMENTS for command in commands_of(document)]
SCRIPTS = [command[1:] for command in COMMANDS if command[0] == "python"]


def script_and_arguments(words: list[str]) -> tuple[Path, list[str]]:
    if words[0] != "-m":
        return ROOT / words[0], words[1:]
    return Path(importlib.util.find_spec(words[1]).origin), words[2:]


@pytest.fixture
def arguments_only(monkeypatch: pytest.MonkeyPatch):
    """Runs a script until it has its arguments, and returns them."""
    for name in ("parse_args", "parse_intermixed_args"):

        def parse(self, *args, _original=getattr(argparse.ArgumentParser, name)):
            raise Parsed(_original(self, *args))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)

    def run(script: Path, arguments: list[str]) -> argparse.Namespace:
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(Parsed) as info:
            runpy.run_path(str(script), run_name="__main__")
        return info.value.args[0]

    return run


def test_commands_are_found() -> None:
    assert {command[0] for command in COMMANDS} == {"make", "pip", "export", "python"}
    scripts = {script_and_arguments(words)[0].name for words in SCRIPTS}
    tools = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert scripts >= tools | {"shapes.py", "train.py"}


@pytest.mark.fault(15)
@pytest.mark.parametrize("words", SCRIPTS, ids=" ".join)
def test_a_command_parses(words, arguments_only, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    script, arguments = script_and_arguments(words)
    assert script.is_file()
    args = arguments_only(script, arguments)
    if getattr(args, "config_file", ""):
        variants = (
            [overrides for _, overrides in args.variant] if "variant" in args else [args.opts]
        )
        for overrides in variants:
            load_config(args.config_file, list(overrides))


@pytest.mark.fault(15)
@pytest.mark.parametrize("readme", READMES)
def test_keys_and_values_in_the_text_exist(readme) -> None:
    """In some config of the README's family; in the README of all, in the first family's."""
    configs = sorted((ROOT / readme).parent.glob("configs/*.py")) or [ROOT / CONFIG]
    for overrides in re.findall(KEY_AND_VALUE, text_of(readme)):
        unknown = []
        for config in configs:
            try:
                load_config(str(config), overrides.split())
                break
            except ConfigError as error:
                unknown.append(error)
        assert len(unknown) < len(configs), unknown[0]


@pytest.mark.parametrize("readme", DOCUMENTS)
def test_links_lead_to_files(readme) -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", text_of(readme))
    missing = [name for name in targets if not (ROOT / readme).parent.joinpath(name).exists()]
    assert not missing


def test_make_knows_its_targets() -> None:
    targets = [command[1] for command in COMMANDS if command[0] == "make"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets
    assert not [name for name in targets if f"\n{name}:" not in makefile]


def test_detectron2_is_the_pinned_one() -> None:
    named = re.findall(r"git\+https://\S+?detectron2\.git@\w+", text_of("README.md"))
    assert named and set(named) == {DETECTRON2_SOURCE}
