"""`llamagen VERB`: one table from verbs to the modules that do the work."""

import errno
import importlib
import sys
import traceback

import llamagen_jax
from llamagen_jax import logs, runtime
from llamagen_jax.errors import RunFailed, Stopped, StorageDown, UserError

# verb: (module with a `main(argv)`, one line for the help), in groups
GROUPS = {
  "try it": {
    "quickstart": ("quickstart", "the whole pipeline on handwritten digits"),
    "doctor": ("doctor", "what this machine has, and what is missing"),
  },
  "prepare data": {
    "extract-codes": ("extract_codes", "images to code shards"),
    "import-codes": ("import_codes", "codes that others extracted to code shards"),
    "prepare-captions": ("prepare_captions", "images with captions to caption shards"),
    "extract-text": ("extract_text", "caption shards to shards of T5 features"),
  },
  "train": {
    "train-tokenizer": ("train_tokenizer", "train a VQ tokenizer on images"),
    "train-gpt": ("train_gpt", "train a transformer on code shards"),
    "export-bundle": ("export_bundle", "the bundle of a run's checkpoint, at any time"),
    "compile-for-pod": (
      "compile_for_pod",
      "prove that a config fits a pod without one",
    ),
  },
  "generate": {
    "sample": ("sample", "generate images of classes or prompts"),
    "edit": ("edit", "draw parts of an image anew, or more around it"),
    "serve": ("serve", "generate images over HTTP, with a web demo"),
  },
  "measure": {
    "evaluate": ("evaluate", "FID and other scores of a set of images"),
    "reconstruct": ("reconstruct", "measure how well a tokenizer keeps images"),
    "compare-tokenizers": (
      "compare_tokenizers",
      "several tokenizers in one table and one grid",
    ),
  },
  "weights": {
    "import-weights": ("import_weights", "published weights to a bundle"),
    "export-weights": ("export_weights", "a bundle to published weights"),
    "push": ("push", "upload a bundle to the Hugging Face hub"),
  },
}
VERBS = {verb: entry for group in GROUPS.values() for verb, entry in group.items()}

FINISHED, FAILED, USER_ERROR, STOPPED = 0, 1, 2, 75
EXIT_CODES = """exit codes:
  0   finished
  1   failed
  2   a mistake in a flag, a config or a file; the message names it
  75  stopped, by a signal or Ctrl-C; the same command goes on"""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EROFS)

# Their images must not depend on which of them, or on how many devices, made them.
STEADY = ("sample", "edit", "serve", "evaluate")


def main() -> None:
  runtime.prepare(steady=sys.argv[1:2] != [] and sys.argv[1] in STEADY)
  logs.show()
  sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
  """Runs a verb; returns the exit code."""
  if not argv or argv[0] in ("-h", "--help", "help"):
    print(_usage())
    return FINISHED if argv else USER_ERROR
  if argv[0] == "--version":
    print(f"llamagen_jax {llamagen_jax.__version__}")
    return FINISHED
  verb, *rest = argv
  if verb not in VERBS:
    print(
      f"llamagen: no verb {verb!r}; expected one of {', '.join(VERBS)}", file=sys.stderr
    )
    return USER_ERROR
  try:
    importlib.import_module(f"llamagen_jax.commands.{VERBS[verb][0]}").main(rest)
  except Stopped as stopped:
    return _end(verb, stopped, STOPPED)
  except KeyboardInterrupt:
    return _end(verb, "stopped; the same command goes on or begins again", STOPPED)
  except Exception as error:
    code = _expected(error)
    if code is not None:
      _end_all_hosts(str(error), _end(verb, error, code))
      return code
    # A bug: with one host the traceback tells of it.
    _end_all_hosts(f"{type(error).__name__}: {error}", FAILED, traceback.format_exc())
    raise
  return FINISHED


def _expected(error: Exception) -> int | None:
  """Returns the exit code of an error that one line explains, None of a bug."""
  if isinstance(error, UserError):
    return USER_ERROR
  number = error.errno if isinstance(error, OSError) else None
  if number in NOT_ALLOWED:
    return USER_ERROR
  failed = number in DISK_FULL or isinstance(error, (RunFailed, StorageDown))
  return FAILED if failed else None


def _end(verb: str, message: object, code: int) -> int:
  print(f"llamagen {verb}: {message}", file=sys.stderr)
  return code


def _end_all_hosts(reason: str, code: int, details: str = "") -> None:
  if "jax" in sys.modules:  # without it no host was joined
    from llamagen_jax.parallel import hosts

    hosts.end_all_hosts(" ".join(reason.split())[:300], code, details)


def _usage() -> str:
  lines = ["usage: llamagen VERB [flags]", "       llamagen VERB --help", ""]
  for group, verbs in GROUPS.items():
    lines += [f"{group}:", *(f"  {v:18} {text}" for v, (_, text) in verbs.items())]
  return "\n".join([*lines, "", EXIT_CODES])
