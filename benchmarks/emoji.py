"""What the emoji of a quickstart look like by guidance, or by the steps of training.

llamagen quickstart --emoji --workdir=quickstart_emoji
python -m benchmarks.emoji --quickstart=quickstart_emoji [--guidance 1 2 4]
    [--checkpoints] [--reconstructions]

Prints a table of the judge's figures. With --checkpoints a row for every checkpoint
that the transformer's run still has (`run.keep_every`), at its own guidance.
"""

import argparse
import pathlib
import tempfile

from etils import epath

from llamagen_jax.commands.quickstart_emoji import JUDGE_EPOCHS, Judge
from llamagen_jax.training.checkpoint_files import checkpoint_folder, saved_steps
from llamagen_jax.training.export import export_bundle
from llamagen_jax.weights import bundle

FIGURES = ("seen/top1", "seen/top5", "tones/top1", "tones/top5", "colours/top1",
           "colours/top5", "copies")  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--quickstart", default="quickstart_emoji", type=pathlib.Path)
  parser.add_argument("--guidance", nargs="*", type=float, default=[])
  parser.add_argument("--checkpoints", action="store_true")
  parser.add_argument("--reconstructions", action="store_true")
  args = parser.parse_args()
  judge = Judge(args.quickstart, JUDGE_EPOCHS)
  print(f"| | {' | '.join(FIGURES)} |\n|{'---|' * (1 + len(FIGURES))}")
  if args.reconstructions:
    found = {kind: judge.reconstruct(rows)[1] for kind, rows in judge.asked.items()}
    print_row("reconstructions", judge.scores(found))
  for scale in args.guidance:
    print_row(f"guidance {scale:g}", judge.scores(judge.draw(guidance_scale=scale)))
  if args.checkpoints:
    folder = args.quickstart / "gpt"
    for step in sorted(saved_steps(checkpoint_folder(epath.Path(folder)))):
      with tempfile.TemporaryDirectory() as out:
        path, _ = export_bundle(folder, pathlib.Path(out) / "bundle", step)
        judge.gpt = bundle.load_gpt(path)
      print_row(f"step {step}", judge.scores(judge.draw()))


def print_row(name: str, scores: dict[str, float]) -> None:
  cells = [f"{100 * scores[figure]:.0f} %" for figure in FIGURES]
  print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
  main()
