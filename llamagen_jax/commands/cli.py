"""`llamagen <verb>`: one table from verbs to the modules that do the work."""

import importlib
import sys
import traceback

from llamagen_jax.errors import RunFailed, Stopped, UserError
from llamagen_jax.runtime import ask_for_large_pages

# verb: (module with a `main(argv)`, what it does)
VERBS = {
  "quickstart": ("quickstart", "the whole pipeline on real handwritten digits"),
  "train-tokenizer": ("train_tokenizer", "train a VQ tokenizer on images"),
  "reconstruct": ("reconstruct", "measure what a tokenizer keeps"),
  "extract-codes": ("extract_codes", "images to code shards"),
  "prepare-captions": ("prepare_captions", "images with captions to caption shards"),
  "extract-text": ("extract_text", "caption shards to shards of T5 features"),
  "train-gpt": ("train_gpt", "train a transformer on code shards"),
  "export-bundle": ("export_bundle", "a bundle of a run's checkpoint, at any time"),
  "compile-for-pod": ("compile_for_pod", "prove that a config fits a pod, without one"),
  "sample": ("sample", "draw images"),
  "serve": ("serve", "draw images over HTTP, with a web demo"),
  "evaluate": ("evaluate", "FID and its kin of two sets of images"),
  "import-weights": ("import_weights", "published weights to a bundle"),
  "export-weights": ("export_weights", "a bundle to published weights"),
}


def main() -> None:
  ask_for_large_pages()
  sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
  """Runs a verb; returns the exit code."""
  if not argv or argv[0] in ("-h", "--help"):
    print(_usage())
    return 0 if argv else 2
  verb, *rest = argv
  if verb not in VERBS:
    print(
      f"llamagen: no verb {verb!r}; expected one of {', '.join(VERBS)}", file=sys.stderr
    )
    return 2
  try:
    importlib.import_module(f"llamagen_jax.commands.{VERBS[verb][0]}").main(rest)
  except Stopped as stopped:
    print(f"llamagen {verb}: {stopped}", file=sys.stderr)
    return 75  # EX_TEMPFAIL: the same command goes on
  except (UserError, RunFailed) as error:
    print(f"llamagen {verb}: {error}", file=sys.stderr)
    code = 2 if isinstance(error, UserError) else 1
    _end_all_hosts(str(error), code)
    return code
  except Exception as error:  # a bug: with one host the traceback tells of it
    _end_all_hosts(f"{type(error).__name__}: {error}", 1, traceback.format_exc())
    raise
  return 0


def _end_all_hosts(reason: str, code: int, details: str = "") -> None:
  if "jax" in sys.modules:  # without it no host was joined
    from llamagen_jax.parallel import hosts

    hosts.end_all_hosts(" ".join(reason.split())[:300], code, details)


def _usage() -> str:
  rows = [f"  {verb:16} {what}" for verb, (_, what) in VERBS.items()]
  return "\n".join(["usage: llamagen VERB ..., with --help for its flags", "", *rows])
