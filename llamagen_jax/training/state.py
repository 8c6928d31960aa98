"""The state that a step updates, and its first values on the mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from llamagen_jax.parallel.mesh import abstract_tree, shardings, unbox

Params = Any
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
  """A trainable network; leaves are float32 and sharded by the mesh's table."""

  step: jax.Array  # int32, updates done
  params: Params
  opt_state: optax.OptState
  ema: Params | None  # moving average of params, if one is kept
  reference: Params | None = None  # frozen weights that a loss compares with

  @classmethod
  def create(
    cls, params: Params, optimizer: optax.GradientTransformation, ema: bool
  ) -> "TrainState":
    """Returns a state at step 0; boxes around the parameters are kept everywhere."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

  def update(
    self,
    grads: Params,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    **extra_args,
  ) -> tuple["TrainState", jax.Array]:
    """Returns the state after one update, and the update's global norm.

    Args:
      grads: tree of gradients, like `params`.
      optimizer: the one that `create` was given.
      ema_decay: of the average of the weights.
      **extra_args: what the optimizer needs besides, such as `loss` for `guard`.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(
      grads, self.opt_state, self.params, **extra_args
    )
    params = optax.apply_updates(self.params, updates)
    ema = self.ema
    if ema is not None:
      # In this form a constant (the unconditional embedding) stays one, bit for bit.
      ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), ema, params)
    new = TrainState(self.step + 1, params, opt_state, ema, self.reference)
    return new, optax.global_norm(updates)

  @property
  def weights(self) -> Params:
    """Returns the weights to evaluate and export: the average where one is kept."""
    return self.params if self.ema is None else self.ema


def abstract_state(init: Callable[[jax.Array], Any], mesh: Mesh) -> Any:
  """Returns shapes, dtypes and shardings of `init(key)`, whose parameters are boxed."""
  boxed = jax.eval_shape(lambda: init(jax.random.key(0)))
  return abstract_tree(unbox(boxed), shardings(mesh, boxed))


def init_state(init: Callable[[jax.Array], Any], key: jax.Array, abstract: Any) -> Any:
  """Returns `init(key)` unboxed, every array made where `abstract` has its shards."""
  # XLA compiles a random generator for every parameter, and they run once: without
  # optimisation a step starts sooner.
  quick = {"xla_backend_optimization_level": 0}
  init_unboxed = jax.jit(
    lambda key: unbox(init(key)),
    out_shardings=shardings_of(abstract),
    compiler_options=quick,
  )
  return init_unboxed(key)


def shardings_of(tree: Any) -> Any:
  """Returns the tree of the leaves' shardings."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)
