"""docs/tables.py: tables from figures, and pages that differ from them."""

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def tables(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  page, results = tmp_path / "page.md", tmp_path / "results.json"
  page.write_text("before\n<!-- table: train -->\n<!-- end of table -->\nafter\n")
  results.write_text(json.dumps([row(4.25), row(None), row(8.0, machine_code=False)]))
  monkeypatch.setattr(module, "PAGES", (page,))
  monkeypatch.setattr(module, "RESULTS", results)
  return module


def row(gib, machine_code=True):
  figures = gib and {
    "hbm": gib * 2**30, "machine_code": machine_code, "flops": 3.03, "model_flops": 3.0,
    "seconds": {"compute": 0.0261, "HBM": 0.03}, "chip_hours": 96.0, "chips": 8,
    "topology": "v5e:2x4", "jax": "1.2", "libtpu": "3.4",
  }  # fmt: skip
  return {"table": "train", "name": "B, 256", "flags": "", "figures": figures}


def run(module, monkeypatch, *flags):
  monkeypatch.setattr("sys.argv", ["tables.py", *flags])
  return module.main()


def test_a_page_is_written_and_checked(tables, monkeypatch, capsys):
  (page,) = tables.PAGES
  assert run(tables, monkeypatch, "--check") == 1
  assert "run docs/tables.py --write" in capsys.readouterr().out
  assert run(tables, monkeypatch, "--write") == 0
  assert run(tables, monkeypatch, "--check") == 0
  text = page.read_text()
  assert text.startswith("before\n") and text.endswith("after\n")
  rows = [line for line in text.splitlines() if line.startswith("| B, 256")]
  assert rows == [
    "| B, 256 | v5e:2x4 | 4.2 | 1.01 | 26, 30 | 12 h |",
    "| B, 256 | v5e:2x4 | 8.0 * | 1.01 | 26, 30 | 12 h |",
  ]
  assert "jax 1.2, libtpu 3.4" in text
  page.write_text(text.replace("12 h", "22 h"))
  assert run(tables, monkeypatch, "--check") == 1


def test_hours_of_a_recipe_are_checked(tables, monkeypatch, tmp_path):
  monkeypatch.setattr(tables, "CONFIGS", tmp_path)
  (tmp_path / "c.py").write_text('"""Doc\n\n    :B  v5e:2x4 13 h, v5p:2x2x2 7 h\n"""\n')
  rows = [row(4.0) | {"flags": "--config=configs/c.py:B --topology=v5e:2x4"}]
  (found,) = tables.wrong_hours(rows)
  assert found.endswith("c.py: :B v5e:2x4 13 h")
  rows[0]["figures"]["chip_hours"] = 104.0
  assert tables.wrong_hours(rows) == []


def test_the_documentation_agrees_with_the_results(monkeypatch):
  spec = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert run(module, monkeypatch, "--check") == 0
