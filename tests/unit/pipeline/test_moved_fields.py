"""A field is still read under its former name, and a note says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cnn2gnn_dist import cli, field_names, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from tests.unit.pipeline.test_settings import from_file, here, value  # noqa: F401


def notes_of(overrides: list[str], source: str = "demo") -> tuple[Config, list[str]]:
    notes: list[str] = []
    return settings.load(source, overrides, notes.append), notes


MOVED = {  # and a value other than the preset's
    **{"graph.exact": "no", "graph.recall": "0.5", "graph.warm_start": "off", "graph.probes": "3"},
    **{"graph.parts": "3", "graph.partitioner": "ranges", "graph.repartition_cut": "2"},
    **{"graph.move_gain": "1e1", "graph.fanouts": "[11, 4]", "graph.second_hop": "cached"},
    **{"graph.sampler": "dgl", "graph.query": "table"},
}


@pytest.mark.parametrize(("old", "typed"), MOVED.items())
def test_a_field_is_read_by_the_name_that_it_had_once(here, old, typed):
    assert MOVED.keys() == field_names.moved().keys()
    new = field_names.current_name(old)
    by_new, none = notes_of([f"{new}={typed}"])
    assert none == []
    by_old, notes = notes_of([f"{old}={typed}"])
    assert by_old == by_new != settings.load("demo")
    assert notes == [f"{old} is now {new}; the old names are still accepted"]
    section, name = old.split(".")
    with open(f"{here}/old.yaml", "w") as file:
        file.write(f"{section}: {{{name}: {typed}}}")
    by_file, notes = notes_of([], f"{here}/old.yaml")
    assert value(by_file, new) == value(by_new, new)
    assert len(notes) == 1
    by_section, notes = notes_of([f"{section}={{{name}: {typed}}}"])
    assert by_section == by_new
    assert len(notes) == 1


def test_the_config_of_an_old_run_is_read_with_one_note(here, capsys):
    now = settings.load("demo", ["graph.search.exact=false", "graph.sampling.fanouts=[11, 4]"])
    tree = settings.as_tree(now)
    for old, new in field_names.moved().items():
        _, section, name = new.split(".")
        tree["graph"][old.split(".")[1]] = tree["graph"][section].pop(name)
    for section in ("search", "partition", "sampling"):
        assert tree["graph"].pop(section) == {}
    assert settings.check(tree) == now
    with open(f"{here}/config.yaml", "w") as file:
        yaml.safe_dump(tree, file)
    found, notes = notes_of([], f"{here}/config.yaml")
    assert found == now
    assert len(notes) == 1
    assert "9 more have moved" in notes[0]
    assert settings.of_run(Path(here)).graph == now.graph  # no note in a prediction
    assert cli.main(["config", "--config", f"{here}/config.yaml"]) == 0
    said = capsys.readouterr()
    assert said.err.count("note: ") == 1
    assert yaml.safe_load(said.out)["graph"] == settings.as_tree(now)["graph"]


def test_of_an_old_and_a_new_name_in_a_file_none_is_guessed(here):
    with pytest.raises(UserError, match=r"given twice: graph\.exact is its old name") as caught:
        from_file(here, "graph: {exact: true, search: {exact: false}}")
    assert caught.value.where == f"{here}/c.yaml: graph.search.exact"
    text = "graph: {exact: false}"
    with open(f"{here}/old.yaml", "w") as file:
        file.write(text)
    for name in ("graph.search.exact", "graph.exact"):  # an override counts under either name
        assert settings.load(f"{here}/old.yaml", [f"{name}=true"]).graph.search.exact
    later = settings.load("demo", ["graph.exact=true", "graph.search.exact=false"])
    assert not later.graph.search.exact
