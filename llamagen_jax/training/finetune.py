"""Training a part of the weights: a table, the head, or low-rank adapters.

The adapters stand beside the model's parameters as params["lora"]; a bundle has them
merged, so that sampling and serving need nothing new.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from absl import logging
import flax
import jax
import jax.numpy as jnp
import numpy as np

from llamagen_jax.data.classes import imagenet_classes
from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.lora import LoRAConfig, add_adapters, init_adapters
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.weights.adapter import LORA

ONLY = ("all", "table", "head", "none")
FIRST = {"table": "condition", "head": "head"}  # first name of their parameters
TABLE = "condition/table"
# Parameters that a model may get when it is loaded from one without them.
ADDED = (LORA, "guidance", "target_embedding")


@dataclasses.dataclass(frozen=True)
class TrainableConfig:
  """Which weights a run trains; the others stay as they were loaded."""

  only: str = "all"  # all | table (of the condition) | head | none (adapters alone)
  lora: LoRAConfig = LoRAConfig()

  def __post_init__(self):
    if self.only not in ONLY:
      raise UserError(f"train.only={self.only!r}: expected one of {', '.join(ONLY)}")
    if self.only == "none" and not self.lora.rank:
      raise UserError("train.lora.rank=0: expected a rank > 0 with train.only='none'")
    if self.lora.rank and self.only == "all":
      raise UserError(
        "train.lora.rank: expected train.only=table, head or none, found 'all'"
      )


def init_params(model: GPTConfig, config: TrainableConfig, key: jax.Array) -> Any:
  """Returns fresh boxed parameters, with adapters where the config has some."""
  params = init_gpt(model, key)
  if config.lora.rank:
    params = params | {LORA: init_adapters(config.lora, params, key)}
  return params


def merged(config: TrainableConfig, params: Any) -> Any:
  """Returns the model's parameters with the adapters added to their matrices."""
  if LORA not in params:
    return params
  model = {name: value for name, value in params.items() if name != LORA}
  return add_adapters(config.lora, model, params[LORA])


def merge_once(config: TrainableConfig, params: Any) -> Any:
  """Returns `merged` outside a compiled program; without adapters no copy is made."""
  if LORA not in params:
    return params
  return jax.jit(functools.partial(merged, config))(params)


def trainable(config: TrainableConfig, params: Any) -> Any:
  """Returns True for every leaf that the run trains."""
  first = FIRST.get(config.only)

  def trains(path, _):
    name = path[0].key
    return config.only == "all" or name in (first, LORA)

  return jax.tree_util.tree_map_with_path(trains, params)


def frozen_stopped(config: TrainableConfig, params: Any) -> Any:
  """Returns the parameters, without a gradient into those that are not trained."""
  if config.only == "all":
    return params
  return jax.tree.map(
    lambda trains, leaf: leaf if trains else jax.lax.stop_gradient(leaf),
    trainable(config, params),
    params,
  )


def table_rows(old_names: Sequence[str], new_names: Sequence[str]) -> list[int]:
  """Returns the old row of every new class, that of the same name; -1 = none.

  A WordNet id, which ImageNet's folders have, is the name of its class.
  """

  def usual(name: str) -> str:
    return imagenet_classes().get(name, (name,))[0]

  rows: dict[str, int] = {}
  for row, name in enumerate(old_names):
    rows.setdefault(usual(name), row)
  return [rows.get(usual(name), -1) for name in new_names]


def adapted(name: str, loaded: Any, fresh: Any, rows: Sequence[int]) -> Any:
  """Returns loaded parameters in the shapes of fresh ones.

  Weights that the loaded model lacks (adapters, embeddings of guidance and targets)
  stay fresh, and a class table of another size, or of other classes, is filled by
  `rows`; where no class has a known name, rows of the same size stay as they are.

  Args:
    name: of the loaded model, for messages.
    loaded: its parameters.
    fresh: those of the run, with shardings.
    rows: old row of every new class; -1 = the mean row.

  Raises:
    UserError: another weight has another shape, or there is one too many.
  """
  old, new = (
    flax.traverse_util.flatten_dict(tree, sep="/") for tree in (loaded, fresh)
  )
  if unknown := sorted(old.keys() - new.keys()):
    raise UserError(f"{name} has {unknown[0]}, which this config's model has not")
  others = max(rows, default=-1) >= 0 and list(rows) != [*range(len(rows))]
  for key, leaf in new.items():
    value = old.get(key)
    if value is None and key.split("/")[0] in ADDED:
      continue
    if value is not None and key == TABLE and (value.shape != leaf.shape or others):
      value = _filled_table(value, leaf, rows)
    if value is None or value.shape != leaf.shape:
      shape = "missing" if value is None else value.shape
      raise UserError(f"{name}: {key} is {shape}, this config expects {leaf.shape}")
    new[key] = value
  return flax.traverse_util.unflatten_dict(new, sep="/")


def _filled_table(
  table_CD: jax.Array, fresh_CD: jax.Array, rows: Sequence[int]
) -> jax.Array:
  """Returns a class table by rows of another; its last one, "no class", is kept."""
  size = fresh_CD.shape[0] - 1
  rows_C = np.full(size, -1)
  rows_C[: len(rows)] = rows[:size]
  logging.info(
    "class table of %d rows for one of %d: %d rows by name, the others start as the"
    " mean row", size, table_CD.shape[0] - 1, np.sum(rows_C >= 0),
  )  # fmt: skip

  @functools.partial(jax.jit, out_shardings=fresh_CD.sharding)
  def fill(table_CD):
    mean_D = jnp.mean(table_CD[:-1], axis=0)
    new_CD = jnp.where(rows_C[:, None] < 0, mean_D, table_CD[rows_C])
    return jnp.concatenate([new_CD, table_CD[-1:]])

  return fill(table_CD)
