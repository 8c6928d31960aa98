"""Bundles of a run's weights: at its end, and from its checkpoints at any time."""

from collections.abc import Mapping
import dataclasses
import functools
import os
from typing import Any

from absl import logging
from etils import epath
import jax

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import make_mesh
from llamagen_jax.tokenizer.config import TokenizerConfig
from llamagen_jax.tokenizer.model import init_tokenizer
from llamagen_jax.training.checkpoint import restore_items
from llamagen_jax.training.finetune import (
  FIRST,
  LORA,
  TrainableConfig,
  init_params,
  merge_once,
)
from llamagen_jax.training.recipe import build
from llamagen_jax.training.state import abstract_state
from llamagen_jax.weights import bundle
from llamagen_jax.weights.adapter import save_adapter

KINDS = ("gpt", "tokenizer")


def describe_gpt(
  tokenizer: str, class_names: tuple[str, ...], text_encoder: str
) -> dict[str, Any]:
  """Returns what a transformer's bundle says besides its config, as JSON."""
  return {
    "kind": "gpt",
    "tokenizer": tokenizer,
    "class_names": list(class_names),
    "text_encoder": text_encoder,
  }


def describe_tokenizer() -> dict[str, Any]:
  """Returns the same of a tokenizer."""
  return {"kind": "tokenizer"}


def write_bundle(
  path: os.PathLike,
  config: Mapping[str, Any],
  description: dict[str, Any],
  weights: Any,
) -> None:
  """Writes the bundle of a run's weights.

  Args:
    path: folder of the bundle.
    config: of the run, all sections.
    description: from `describe_gpt` or `describe_tokenizer`.
    weights: of the model.
  """
  if description["kind"] == "tokenizer":
    model = build(TokenizerConfig, config["model"], "config.model")
    bundle.save_tokenizer(path, model, weights)
  else:
    bundle.save_gpt(path, _transformer(config, description, weights))


def write_adapter(
  path: os.PathLike,
  config: Mapping[str, Any],
  description: dict[str, Any],
  weights: Any,
) -> None:
  """Writes what a run with adapters trained, for the model that it started from.

  Does nothing for a run without adapters. Arguments as of `write_bundle`.
  """
  if description["kind"] != "gpt" or LORA not in weights:
    return
  trainable = _trainable(config)
  first = {FIRST.get(trainable.only), LORA}
  trained = {name: leaf for name, leaf in weights.items() if name in first}
  model = {name: leaf for name, leaf in weights.items() if name != LORA}
  gpt = dataclasses.replace(_transformer(config, description, model), params=model)
  save_adapter(path, trainable.lora, gpt, trained)


def load_run(
  workdir: os.PathLike, step: int | None = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[int, bundle.Transformer]:
  """Reads a transformer from a run's checkpoint, while the run may go on.

  Args:
    workdir: of the run.
    step: of the checkpoint; None = the newest.
    mesh: to shard the parameters on; None = all devices.

  Returns:
    the step and the transformer, with the average of the weights where one is kept.

  Raises:
    UserError: no such checkpoint, or one of a tokenizer.
  """
  step, about, weights = _load(workdir, step, mesh)
  if about["model"]["kind"] != "gpt":
    raise UserError(f"{workdir}: a run of a tokenizer; expected one of a transformer")
  return step, _transformer(about["config"], about["model"], weights)


def export_bundle(
  workdir: os.PathLike, out: os.PathLike | None = None, step: int | None = None
) -> tuple[epath.Path, int]:
  """Writes a bundle of a run's checkpoint, while the run may go on.

  Args:
    workdir: of the run.
    out: folder of the bundle; None = `bundle` in the workdir.
    step: of the checkpoint; None = the newest.

  Returns:
    the folder and the step.
  """
  path = epath.Path(workdir) / "bundle" if out is None else epath.Path(out)
  step, about, weights = _load(workdir, step, None)
  write_bundle(path, about["config"], about["model"], weights)
  logging.info("%s has the weights of step %d", path, step)
  return path, step


def _load(
  workdir: os.PathLike, step: int | None, mesh: jax.sharding.Mesh | None
) -> tuple[int, dict[str, Any], Any]:
  mesh = mesh or make_mesh(data=1, fsdp=-1)

  def wanted(about: dict[str, Any]) -> dict[str, Any]:
    """The average of the weights where the optimizer keeps one."""
    config = about["config"]
    kind = about["model"].get("kind")
    if kind not in KINDS:
      raise UserError(f"{workdir}: its checkpoints do not say what they are of")
    if kind == "gpt":
      model = build(GPTConfig, config["model"])
      init = functools.partial(init_params, model, _trainable(config))
    else:
      init = functools.partial(init_tokenizer, build(TokenizerConfig, config["model"]))
    name = "ema" if config["optimizer"].get("ema") else "params"
    wanted = {name: abstract_state(init, mesh)}
    return wanted if kind == "gpt" else {"generator": wanted}

  step, about, state = restore_items(workdir, wanted, step)
  (weights,) = state.get("generator", state).values()
  return step, about, weights


def _transformer(
  config: Mapping[str, Any], description: dict[str, Any], weights: Any
) -> bundle.Transformer:
  return bundle.Transformer(
    build(GPTConfig, config["model"], "config.model"),
    merge_once(_trainable(config), weights),
    build(SamplingConfig, config["sampling"], "config.sampling"),
    description["tokenizer"],
    tuple(description["class_names"]),
    description["text_encoder"],
  )


def _trainable(config: Mapping[str, Any]) -> TrainableConfig:
  return build(TrainableConfig, config.get("train", {}), "config.train")
