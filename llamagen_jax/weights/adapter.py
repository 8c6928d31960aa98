"""Adapters on disk: what a finetuned model adds to the model it started from.

A folder as of a bundle, with the low-rank adapters and the parameters that were
trained in full. It names the weights that it belongs to.
"""

import dataclasses
import os
from typing import Any

import jax

from llamagen_jax.errors import UserError
from llamagen_jax.gpt.config import GPTConfig
from llamagen_jax.gpt.lora import LoRAConfig, add_adapters, init_adapters
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.weights import bundle

KIND = "adapter"
LORA = "lora"


def save_adapter(
  path: str | os.PathLike,
  config: LoRAConfig,
  gpt: bundle.Transformer,
  trained: dict[str, Any],
) -> None:
  """Writes an adapter.

  Args:
    path: its folder.
    config: of its low-rank matrices.
    gpt: the finetuned transformer; its parameters that are not in `trained` are those
      of the model that the adapter belongs to.
    trained: parameters by their first name, and the adapters as "lora".
  """
  kept = {name: leaf for name, leaf in gpt.params.items() if name not in trained}
  bundle.save_judge(
    path, KIND, trained,
    lora=dataclasses.asdict(config), model=dataclasses.asdict(gpt.config),
    base=bundle.fingerprint(kept), trained=sorted(trained),
    class_names=list(gpt.class_names),
  )  # fmt: skip


def apply_adapter(
  path: str | os.PathLike, gpt: bundle.Transformer
) -> bundle.Transformer:
  """Returns the transformer with an adapter merged into it.

  Raises:
    UserError: not an adapter, or one of another model.
  """
  fields, trained = bundle.load_judge(path, KIND, _abstract)
  kept = {n: leaf for n, leaf in gpt.params.items() if n not in fields["trained"]}
  if bundle.fingerprint(kept) != fields["base"]:
    raise UserError(f"{path}: an adapter of another model than the one it is used with")

  @jax.jit
  def merge(params, trained):
    rest = {name: leaf for name, leaf in trained.items() if name != LORA}
    return add_adapters(LoRAConfig(**fields["lora"]), params, trained[LORA]) | rest

  chosen = {name: getattr(gpt.config, name) for name in ("dtype", "kv_cache")}
  config = GPTConfig(**(fields["model"] | chosen))
  return dataclasses.replace(
    gpt, config=config, params=merge(gpt.params, trained),
    class_names=tuple(fields["class_names"]),
  )  # fmt: skip


def _abstract(fields: dict[str, Any]) -> Any:
  """Returns the shapes of an adapter's parameters from its config.json."""
  model = bundle.abstract_gpt(GPTConfig(**fields["model"]))
  lora = LoRAConfig(**fields["lora"])
  adapters = jax.eval_shape(lambda: init_adapters(lora, model, jax.random.key(0)))
  whole = unbox(model) | {LORA: unbox(adapters)}
  return {name: whole[name] for name in fields["trained"]}
