"""Uploads a bundle to the Hugging Face hub, with a card.

Every verb then takes hub:USER/NAME, or hub:USER/NAME@REVISION, in place of the folder.
The token is that of `hf auth login`, or HF_TOKEN.

llamagen push --bundle=quickstart/tokenizer/bundle --repo=me/digits-tokenizer
llamagen push --bundle=quickstart/gpt/bundle --repo=me/digits --licence=mit \\
    --tokenizer=hub:me/digits-tokenizer --scores=scores.json
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from llamagen_jax.commands import arguments
from llamagen_jax.errors import UserError
from llamagen_jax.options import option
from llamagen_jax.parallel import hosts
from llamagen_jax.storage import read_json, user_path
from llamagen_jax.weights import bundle, hub


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of push."""

  bundle: str = option("of a transformer or a tokenizer", unit="FOLDER")
  repo: str = option("of the hub; it is made if it does not exist", unit="USER/NAME")
  private: bool = option("make a repository that others do not see", False)
  licence: str | None = option(
    "of the weights, by the hub's name of it, such as mit or apache-2.0; default: the"
    " card names none", None,
  )  # fmt: skip
  tokenizer: str | None = option(
    "where a transformer's tokenizer is, such as hub:USER/NAME; for the card", None
  )
  scores: str | None = option(
    "what `llamagen evaluate` wrote; for the card", None, unit="FILE"
  )


def main(argv: Sequence[str]) -> None:
  args = arguments.parse(Options, "push", argv, __doc__)
  hub.parse(f"{hub.PREFIX}{args.repo}")
  if hub.is_spec(args.bundle):
    raise UserError(f"--bundle={args.bundle} is on the hub already")
  scores = read_json(user_path(args.scores)) if args.scores else {}
  with hosts.cpu_only(), tempfile.TemporaryDirectory() as folder:
    fields, params = _read(args.bundle)
    card = make_card(args, fields, scores)
    hub.write_folder(pathlib.Path(folder), fields, params, card)
    size = sum(file.stat().st_size for file in pathlib.Path(folder).iterdir())
    url = hub.upload(pathlib.Path(folder), args.repo, private=args.private)
  print(f"{url}: {size / 1e6:.1f} MB; llamagen takes it as {hub.PREFIX}{args.repo}")


def _read(path: str) -> tuple[dict[str, Any], Any]:
  """Returns config.json and parameters, as numpy arrays."""
  fields = bundle.read_config(path)
  if fields["kind"] not in ("gpt", "tokenizer"):
    raise UserError(
      f"--bundle={path} is a bundle of kind {fields['kind']!r}, expected 'gpt' or"
      " 'tokenizer'"
    )
  load = bundle.load_gpt if fields["kind"] == "gpt" else bundle.load_tokenizer
  return fields, jax.tree.map(np.asarray, load(path).params)


def make_card(
  args: Options, fields: Mapping[str, Any], scores: Mapping[str, Any]
) -> str:
  """Returns the text of README.md: what the model is, its settings, how to use it."""
  is_gpt = fields["kind"] == "gpt"
  licence = [f"license: {args.licence}"] if args.licence else []
  what = "transformer over VQ codes" if is_gpt else "tokenizer of images"
  lines = [
    "---", "library_name: llamagen_jax", *licence, "tags: [llamagen, jax]", "---",
    f"# {args.repo.partition('/')[2]}", "", f"A {what} for llamagen_jax.", "",
    "```bash", *_usage(args, is_gpt), "```", "",
  ]  # fmt: skip
  tables = {"Configuration": fields["config"]}
  if is_gpt:
    tables["Sampling"] = fields["sampling"]
    lines += [f"Its tokenizer has the identity `{fields['tokenizer']}`.", ""]
  else:
    lines += [f"Its identity is `{fields['identity']}`.", ""]
  tables |= {"Scores": scores} if scores else {}
  for title, values in tables.items():
    rows = [f"| {name} | {_shown(value)} |" for name, value in values.items()]
    lines += [f"## {title}", "", "| | |", "|---|---|", *rows, ""]
  return "\n".join(lines)


def _shown(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def _usage(args: Options, is_gpt: bool) -> list[str]:
  here = f"{hub.PREFIX}{args.repo}"
  if not is_gpt:
    return [
      f"llamagen reconstruct --tokenizer={here} --source=folder:images"
      " --image-size=256 --out=reconstructions"
    ]
  tokenizer = args.tokenizer or "TOKENIZER"
  return [f"llamagen sample --gpt={here} --tokenizer={tokenizer} --out=samples.png ..."]
