"""Train steps against updates that are written out in numpy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamagen_jax import GPT
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.gpt.sampling_config import SamplingConfig
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.training import gpt_step
from llamagen_jax.training.optimizer import OptimizerConfig
from llamagen_jax.training.recipe import MeshConfig, RunConfig
from tests import tiny

MODEL = dataclasses.replace(
  tiny.GPT, embedding_dropout=0.0, residual_dropout=0.0, drop_path=0.0,
  condition_dropout=0.0,
)  # fmt: skip
# Four steps: warm-up, top of the cosine, down.
OPTIMIZER = OptimizerConfig(
  0.01, "cosine", warmup_steps=1, final_lr=0.001, weight_decay=0.1, clip=0.5, ema=0.9
)
STEPS = 4
# Scales, and the last row of nothing: what weight decay must leave alone.
UNDECAYED = ("attention_norm", "ffn_norm", "norm")


def recipe(model=MODEL):
  return gpt_step.GPTRecipe(
    model=model,
    data=gpt_step.CodeData("", "", 4),
    optimizer=OPTIMIZER,
    sampling=SamplingConfig(),
    mesh=MeshConfig(),
    run=RunConfig(STEPS, 0, 1, 0, 100, 1, 0),
  )


def batch(step=0):
  rng = np.random.default_rng(step)
  codes = rng.integers(0, MODEL.vocab_size, (4, MODEL.image_tokens))
  return {
    "codes": jnp.asarray(codes), "label": jnp.asarray(rng.integers(0, 4, 4)),
  }  # fmt: skip


def params_with_head(seed=0):
  """The head starts at zero, which would leave the layers without a gradient."""
  params = unbox(init_gpt(MODEL, jax.random.key(seed)))
  head = 0.1 * jax.random.normal(jax.random.key(1), params["head"].shape)
  return params | {"head": head}


def mean_loss(config, params, data):
  logits = GPT(config, training=True).apply(
    {"params": params}, data["codes"], data["label"],
    rngs={"dropout": jax.random.key(0)},
  )  # fmt: skip
  chosen = jnp.take_along_axis(
    jax.nn.log_softmax(logits), data["codes"][..., None], axis=-1
  )
  return -jnp.mean(chosen)


def test_four_steps_equal_adamw_in_numpy():
  """Clip, bias-corrected moments, decoupled decay by mask, schedule, average."""
  o, r = OPTIMIZER, recipe()
  state = unbox(gpt_step.init_state(r, jax.random.key(0)))
  state = state.replace(params=params_with_head(), ema=params_with_head())
  step = jax.jit(functools.partial(gpt_step.train_step, r))
  grad = jax.jit(jax.grad(functools.partial(mean_loss, MODEL)))

  leaves = jax.tree.leaves_with_path(state.params)
  names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
  w = {
    n: np.array(leaf, np.float64) for n, (_, leaf) in zip(names, leaves, strict=True)
  }
  ema = dict(w)
  mu, nu = ({n: np.zeros_like(x) for n, x in w.items()} for _ in range(2))
  tree = jax.tree.structure(state.params)
  for t in range(STEPS):
    rate = o.final_lr + (o.lr - o.final_lr) * (1 + math.cos(math.pi * (t - 1) / 3)) / 2
    rate = 0.0 if t == 0 else rate
    now = jax.tree.unflatten(tree, [jnp.asarray(w[n], jnp.float32) for n in names])
    g = dict(
      zip(names, map(np.array, jax.tree.leaves(grad(now, batch(t)))), strict=True)
    )
    norm = math.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in g.values()))
    assert norm > o.clip  # so that clipping is tested
    total = 0.0
    for n in names:
      clipped = g[n] * (o.clip / norm)
      mu[n] = o.b1 * mu[n] + (1 - o.b1) * clipped
      nu[n] = o.b2 * nu[n] + (1 - o.b2) * clipped**2
      direction = mu[n] / (1 - o.b1 ** (t + 1))
      direction = direction / (np.sqrt(nu[n] / (1 - o.b2 ** (t + 1))) + o.eps)
      if not n.endswith(UNDECAYED):
        direction = direction + o.weight_decay * w[n]
      w[n] = w[n] - rate * direction
      ema[n] = ema[n] + (1 - o.ema) * (w[n] - ema[n])
      total += float(((rate * direction) ** 2).sum())
    state, metrics = step(state, batch(t))
    np.testing.assert_allclose(metrics["lr"], rate, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["update_norm"], math.sqrt(total), rtol=1e-3)
  for tree, expected in ((state.params, w), (state.ema, ema)):
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
      np.testing.assert_allclose(leaf, expected[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialised_gradients_are_those_of_none(remat):
  params, data = params_with_head(), batch()
  config = dataclasses.replace(tiny.GPT, remat=remat)  # dropout and drop path, too
  found, expected = (
    jax.jit(jax.grad(functools.partial(mean_loss, c)))(params, data)
    for c in (config, tiny.GPT)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    found, expected,
  )  # fmt: skip


def test_bfloat16_gradients_point_where_float32_does():
  params, data = params_with_head(), batch()
  config = dataclasses.replace(MODEL, dtype="bfloat16")
  half, full = (
    jax.jit(jax.grad(functools.partial(mean_loss, c)))(params, data)
    for c in (config, MODEL)
  )

  def close(path, a, b):
    assert a.dtype == jnp.float32
    a, b = np.ravel(a), np.ravel(b)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    assert cosine > 0.998, (path, cosine)
    assert np.linalg.norm(a) == pytest.approx(np.linalg.norm(b), rel=0.03), path

  jax.tree.map_with_path(close, half, full)
