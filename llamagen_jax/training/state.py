"""What a step updates, and how it comes to lie on the mesh."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from llamagen_jax.parallel.mesh import abstract_tree, shardings, unbox

Params = Any


@flax.struct.dataclass
class TrainState:
  """A trainable network; leaves are float32 and sharded by the mesh's table."""

  step: jax.Array  # int32, updates done
  params: Params
  opt_state: optax.OptState
  ema: Params | None  # moving average of params, if one is kept

  @classmethod
  def create(
    cls, params: Params, optimizer: optax.GradientTransformation, ema: bool
  ) -> "TrainState":
    """A state at step 0; boxes around the parameters are kept everywhere."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

  def update(
    self,
    grads: Params,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    **known,
  ) -> "TrainState":
    """One update; `known` is what the optimizer may look at besides, the loss say."""
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, self.opt_state, self.params, **known)
    params = optax.apply_updates(self.params, updates)
    ema = self.ema
    if ema is not None:
      # In this form a constant (the unconditional embedding) stays one, bit for bit.
      ema = jax.tree.map(lambda e, p: e + (1 - ema_decay) * (p - e), ema, params)
    return TrainState(self.step + 1, params, opt_state, ema)

  @property
  def weights(self) -> Params:
    """The weights to evaluate and export: the average where one is kept."""
    return self.params if self.ema is None else self.ema


def abstract_state(init: Callable[[jax.Array], Any], mesh: Mesh) -> Any:
  """Shapes, dtypes and shardings of `init(key)`, whose parameters are boxed."""
  boxed = jax.eval_shape(lambda: init(jax.random.key(0)))
  return abstract_tree(unbox(boxed), shardings(mesh, boxed))


def init_state(init: Callable[[jax.Array], Any], key: jax.Array, abstract: Any) -> Any:
  """Runs `init` with every array born where it belongs."""
  places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  # It runs once: the time goes into compiling a random generator a parameter.
  quick = {"xla_backend_optimization_level": 0}
  init_unboxed = jax.jit(
    lambda key: unbox(init(key)), out_shardings=places, compiler_options=quick
  )
  return init_unboxed(key)
