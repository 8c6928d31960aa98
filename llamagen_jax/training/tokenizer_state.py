"""The state of a tokenizer's training, and starting it from another run's weights."""

import dataclasses
from typing import Any

from absl import logging
from etils import epath
import flax.struct
import jax
import jax.numpy as jnp
import optax

from llamagen_jax.errors import UserError
from llamagen_jax.parallel.mesh import abstract_tree, shard_tree
from llamagen_jax.storage import user_path
from llamagen_jax.training.checkpoint import restore_items
from llamagen_jax.training.state import Params, TrainState, shardings_of
from llamagen_jax.weights import bundle, hub


@flax.struct.dataclass
class TokenizerState:
  """Generator, discriminator, and the arrays that a step needs besides."""

  generator: TrainState
  discriminator: TrainState | None  # None where the loss has no adversarial term
  lpips: Params | None  # frozen; None where the loss has no perceptual term
  window: jax.Array  # int32, the newest codes; see `codebook.push`
  resnet: Params | None = None  # frozen; None where no term compares its logits
  lecam: Params | None = None  # averages of the logits; None without LeCAM's term

  @property
  def step(self) -> jax.Array:
    return self.generator.step

  @property
  def params(self) -> Params:
    return self.generator.params

  @property
  def ema(self) -> Params | None:
    return self.generator.ema

  @property
  def weights(self) -> Params:
    return self.generator.weights


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Where a fresh run takes its weights from; its step is 0 in any case."""

  source: str = ""  # workdir of a run, or a bundle (generator only); "" = none
  discriminator: bool = True  # from a workdir: the discriminator too
  optimizers: bool = True  # from a workdir: the optimisers' moments too


def load_weights(config: InitConfig, state: TokenizerState) -> TokenizerState:
  """Returns a fresh state with weights (and moments) of `config.source`, at step 0.

  Raises:
    UserError: it is neither a workdir nor a bundle, or its shapes are others.
  """
  path = user_path(config.source)
  if (path / "checkpoints").is_dir():
    return _from_run(config, path, state)
  if not hub.is_spec(config.source) and not (path / bundle.CONFIG).is_file():
    raise UserError(
      f"--init-from={path}: expected a workdir (with checkpoints/) or a bundle"
    )
  params = bundle.load_tokenizer(config.source).params
  _check_shapes(path, params, state.params)
  params = shard_tree(params, shardings_of(state.params))
  generator = state.generator.replace(params=params, ema=_copy_if(state.ema, params))
  return state.replace(generator=generator)


def _from_run(
  config: InitConfig, path: epath.Path, state: TokenizerState
) -> TokenizerState:
  """Reads only what is asked for, so the other run may lack the rest."""

  def items(fresh: TrainState) -> dict[str, Any]:
    wanted = {"params": fresh.params}
    return wanted | ({"opt_state": fresh.opt_state} if config.optimizers else {})

  wanted = {"generator": items(state.generator)}
  if config.discriminator and state.discriminator is not None:
    wanted["discriminator"] = items(state.discriminator)
  step, _, stored = restore_items(
    path, lambda _: abstract_tree(wanted, shardings_of(wanted))
  )
  logging.info("starts from the weights of step %d in %s", step, path)

  def filled(name: str) -> TrainState:
    fresh = getattr(state, name)
    if name not in stored:
      return fresh
    params, opt_state = stored[name]["params"], fresh.opt_state
    if config.optimizers:  # what the guard counts starts over, too
      inner = _restart_schedule(stored[name]["opt_state"].inner)
      opt_state = opt_state._replace(inner=inner)
    ema = _copy_if(fresh.ema, params)
    return fresh.replace(params=params, opt_state=opt_state, ema=ema)

  return state.replace(
    generator=filled("generator"), discriminator=filled("discriminator")
  )


def _copy_if(wanted: Any, params: Params) -> Params | None:
  return None if wanted is None else jax.tree.map(jnp.copy, params)


def _restart_schedule(opt_state: Any) -> Any:
  """The learning rate starts over; Adam's bias correction does not."""

  def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)

  return jax.tree.map(
    lambda node: (
      node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node
    ),
    opt_state,
    is_leaf=is_schedule,
  )


def _check_shapes(path: epath.Path, loaded: Params, expected: Params) -> None:
  shapes = (
    {jax.tree_util.keystr(k, simple=True, separator="/"): v.shape
     for k, v in jax.tree.leaves_with_path(tree)}
    for tree in (loaded, expected)
  )  # fmt: skip
  loaded, expected = shapes
  for name in sorted(loaded.keys() | expected.keys()):
    if loaded.get(name) != expected.get(name):
      raise UserError(
        f"--init-from={path}: {name} is {loaded.get(name)}, this model expects"
        f" {expected.get(name)}"
      )
