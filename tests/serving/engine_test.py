"""Slots: equal to `sample`, whatever else is in the batch; no row is ever lost."""

import dataclasses

import jax
import numpy as np
import pytest

from llamagen_jax import GPTConfig, SamplingConfig, generate
from llamagen_jax.gpt.cache import cache_length
from llamagen_jax.gpt.cached import decoding_params
from llamagen_jax.gpt.model import init_gpt
from llamagen_jax.parallel.mesh import unbox
from llamagen_jax.sampling.decode import DecodeInputs
from llamagen_jax.sampling.known_codes import KnownCodes, complete_codes
from llamagen_jax.serving.engine import Engine, num_banks
from llamagen_jax.serving.request import Request
from llamagen_jax.weights import bundle
from tests.gpt.ragged_attention_test import interpreted

pytestmark = pytest.mark.exact

CLASSES = GPTConfig(2, 4, 32, grid=4, vocab_size=50, num_classes=4, ffn_multiple=16)
CAPTIONS = dataclasses.replace(
  CLASSES, condition="caption", caption_tokens=5, caption_dim=8, kv_heads=2, grid=(2, 8)
)
MODELS = {"class": CLASSES, "caption": CAPTIONS}
SETTINGS = (
  SamplingConfig(),
  SamplingConfig(guidance_scale=3.0),
  SamplingConfig(guidance_scale=7.5, guidance_schedule="power-cosine", top_k=9),
  SamplingConfig(guidance_scale=2.0, guidance_stop=5, top_p=0.7, temperature=1.3),
  SamplingConfig(temperature=0.8, top_k=5),
  SamplingConfig(guidance_scale=4.0, guidance_schedule="linear", greedy=True),
)


def transformer(config: GPTConfig) -> bundle.Transformer:
  params = unbox(init_gpt(config, jax.random.key(0)))
  head = jax.random.normal(jax.random.key(1), params["head"].shape)  # not zero
  return bundle.Transformer(config, params | {"head": head}, SamplingConfig(), "tiny")


def with_cache(gpt: bundle.Transformer, cache: str) -> bundle.Transformer:
  config = dataclasses.replace(gpt.config, kv_cache=cache)
  return dataclasses.replace(gpt, config=config)


@pytest.fixture(
  scope="module", params=[pytest.param("class", marks=pytest.mark.slow), "caption"]
)
def gpt(request):
  return transformer(MODELS[request.param])


def request(gpt, number: int) -> Request:
  """Its condition and settings depend on the number alone."""
  c, rng = gpt.config, np.random.default_rng(number)
  condition, mask = int(rng.integers(c.num_classes)), None
  if c.condition == "caption":
    condition = rng.standard_normal((c.caption_tokens, c.caption_dim), np.float32)
    mask = np.arange(c.caption_tokens) >= rng.integers(c.caption_tokens)
    condition, mask = condition * mask[:, None], mask.astype(np.int32)
  key = jax.random.key_data(jax.random.fold_in(jax.random.key(3), number))
  return Request(condition, np.asarray(key), SETTINGS[number % len(SETTINGS)], mask)


def generated_alone(gpt, r: Request) -> list[int]:
  """Returns the codes of a request by the loop of `sample`."""
  mask = None if r.condition_mask is None else r.condition_mask[None]
  condition = np.asarray(r.condition)[None]
  if r.negative is not None:
    condition = np.stack([condition, r.negative[None]], axis=1)
    mask = np.stack([mask, r.negative_mask[None]], axis=1)
  keys = jax.random.wrap_key_data(r.key[None])
  codes = generate(gpt.config, gpt.params, condition, keys, mask, r.sampling)
  return codes[0].tolist()


@pytest.mark.parametrize(
  "condition, chunk, window, cache, banks",
  [
    ("caption", 4, 1, "float", 1),
    ("caption", 3, 4, "float", 7),
    pytest.param("class", 5, 1, "float", 7, marks=pytest.mark.slow),
    pytest.param("class", 3, 4, "int8", 1, marks=pytest.mark.slow),
  ],
)
def test_a_full_mixed_batch_has_the_codes_of_sample(
  condition, chunk, window, cache, banks
):
  gpt = with_cache(transformer(MODELS[condition]), cache)
  engine = Engine(gpt, slots=7, chunk=chunk, window=window, banks=banks)
  requests = [request(gpt, number) for number in range(8)]
  assert all(engine.join(r) for r in requests)
  assert not engine.join(request(gpt, 9))  # the two without guidance share a slot
  while not engine.idle:
    engine.advance()
  for r in requests:
    assert r.codes == generated_alone(gpt, r)
  assert engine.codes_sampled == 8 * gpt.config.image_tokens


@pytest.mark.parametrize(
  "config, window, cache",
  [
    pytest.param(CAPTIONS, 1, "float", id="one-by-one"),
    pytest.param(CAPTIONS, 3, "int8", id="windows-int8"),
    pytest.param(
      dataclasses.replace(CLASSES, layers=1, grid=(2, 68)),
      4,
      "float",
      id="two-blocks",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_kernel_of_a_tpu_gives_the_codes_of_sample(
  config, window, cache, monkeypatch
):
  """Interpreted; in float32 no code of these models is near a tie."""
  gpt = with_cache(transformer(config), cache)
  requests = [request(gpt, number) for number in (1, 0, 4)]
  expected = [generated_alone(gpt, r) for r in requests]
  engine = Engine(gpt, slots=3, chunk=4, window=window)  # one slot stays idle

  passed_over = []

  def as_on_a_tpu(*arguments, tpu, default):
    passed_over.append(default.__name__)
    return tpu(*arguments)

  monkeypatch.setattr(jax.lax, "platform_dependent", as_on_a_tpu)
  with interpreted():
    assert engine.join(requests[0])
    engine.advance()
    assert all(engine.join(r) for r in requests[1:])
    while not engine.idle:
      engine.advance()
  assert [r.codes for r in requests] == expected
  assert "by_xla" in passed_over


def test_a_negative_prompt():
  gpt = transformer(CAPTIONS)
  engine = Engine(gpt, slots=2, chunk=4)
  # Numbers 1 and 2 have guidance; 7 has, too, and no negative prompt.
  other = request(gpt, 20)
  requests = [
    dataclasses.replace(
      request(gpt, number), negative=other.condition, negative_mask=other.condition_mask
    )
    for number in (1, 2)
  ]
  for r in [*requests, request(gpt, 7)]:
    while not engine.join(r):
      engine.advance()
  plain = generated_alone(gpt, request(gpt, 1))
  while not engine.idle:
    engine.advance()
  assert all(r.codes == generated_alone(gpt, r) for r in requests)
  assert requests[0].codes != plain


@pytest.mark.parametrize(
  "condition, cache",
  [("caption", "float"), pytest.param("class", "int8", marks=pytest.mark.slow)],
)
def test_edits_beside_slots_have_the_codes_of_complete_codes(condition, cache):
  """One after the other, with guidance and without; the slots' codes stay theirs."""
  gpt = with_cache(transformer(MODELS[condition]), cache)
  c = gpt.config
  engine, known = Engine(gpt, slots=2, chunk=4, candidates=3), np.arange(c.image_tokens)
  edits = [
    dataclasses.replace(
      request(gpt, number),
      known=known,
      is_known=np.arange(len(known)) % 3 == number % 3,
    )
    for number in (1, 4, 3)
  ]
  gone, plain = edits.pop(), request(gpt, 7)
  assert engine.join(plain) and engine.join(gone) and not engine.join(edits[0])
  engine.advance()
  engine.leave(gone)
  seen = []
  for r in edits:
    assert engine.join(r)
    while r in (moved := engine.advance()):
      seen.append((len(r.codes), len(moved)))
  assert engine.idle and plain.codes == generated_alone(gpt, plain)
  rows = np.arange(c.image_tokens).reshape(c.grid_hw)[:, -1] + 1
  assert [count for count, _ in seen] == [*rows, *rows]
  for r in edits:
    keys = jax.random.wrap_key_data(r.key[None])
    mask = None if r.condition_mask is None else r.condition_mask[None]
    params = decoding_params(c, gpt.params)
    inputs = DecodeInputs(params, keys, mask, r.sampling.for_batch(1))
    given = KnownCodes(known[None], r.is_known[None], candidates=3)
    condition = np.asarray(r.condition)[None]
    codes, _ = complete_codes(c, r.sampling, inputs, condition, given)
    assert r.codes == codes[0].tolist()
    assert (np.array(r.codes) == known)[r.is_known].all()


def test_requests_that_join_together_start_together(gpt, monkeypatch):
  """Four by four, filled up; not one that has left before."""
  engine, sizes = Engine(gpt, slots=7, chunk=4), []
  [bank] = engine._banks
  prefill = bank._programs.prefill

  def counted(params, state, rows, conditions):
    sizes.append(len(rows) // 2)
    return prefill(params, state, rows, conditions)

  monkeypatch.setattr(bank, "_programs", bank._programs._replace(prefill=counted))
  gone, *requests = [request(gpt, number) for number in range(7)]
  assert engine.join(gone) and all(engine.join(r) for r in requests[:-1])
  engine.leave(gone)
  assert engine.join(requests[-1])  # maybe in the rows of the one that left
  engine.advance()
  assert sizes == [4, 4]
  assert engine.join(late := request(gpt, 9))
  while not engine.idle:
    engine.advance()
  assert sizes == [4, 4, 1] and gone.codes == []
  assert all(r.codes == generated_alone(gpt, r) for r in [*requests, late])


def test_the_device_runs_one_chunk_ahead(gpt):
  engine = Engine(gpt, slots=1, chunk=8)
  r = request(gpt, 1)
  assert engine.join(r)
  assert engine.advance() == [] and r.codes == []  # started, and not waited for
  assert engine.advance() == [r] and len(r.codes) == 8
  # All codes are on their way: the slot is free before they are read.
  assert engine.busy_rows == 0 and not engine.idle
  assert engine.join(request(gpt, 2))
  assert engine.advance() == [r] and r.codes == generated_alone(gpt, r)


def test_slots_that_advance_at_their_own_pace_are_taken_again(gpt):
  engine = Engine(gpt, slots=3, chunk=2, window=4)
  waiting = [request(gpt, number) for number in range(18)]
  requests = list(waiting)
  while waiting or not engine.idle:
    while waiting and engine.join(waiting[0]):
      waiting.pop(0)
    engine.advance()
  codes = gpt.config.image_tokens
  for r in requests:
    assert r.codes == generated_alone(gpt, r)
    assert codes / 4 <= r.forwards <= codes
  assert len({r.forwards for r in requests}) > 1
  assert engine.codes_sampled == len(requests) * codes and engine.busy_rows == 0


def test_200_requests_that_come_and_go(gpt):
  """Who joins when, and who gives up, is random; results equal solo runs."""
  engine, solo = (Engine(gpt, slots=4, chunk=3, banks=banks) for banks in (2, 1))
  rng = np.random.default_rng(0)
  waiting = [request(gpt, number) for number in range(200)]
  expected, here, done = {}, [], []
  for r in waiting:
    assert solo.join(twin := dataclasses.replace(r, codes=[]))
    while not solo.idle:
      solo.advance()
    expected[r] = twin.codes
  while waiting or here:
    while waiting and rng.random() < 0.7 and engine.join(waiting[0]):
      here.append(waiting.pop(0))
    if here and rng.random() < 0.1:
      quitter = here.pop(rng.integers(len(here)))
      engine.leave(quitter)
      assert quitter.codes == expected[quitter][: len(quitter.codes)]
    for r in engine.advance():
      if len(r.codes) == gpt.config.image_tokens:
        here.remove(r)
        done.append(r)
  assert engine.busy_rows == 0 and len(done) > 150
  assert all(r.codes == expected[r] for r in done)
  for number in range(4):  # every slot still takes a guided image
    assert engine.join(request(gpt, len(SETTINGS) * number + 1))


@pytest.mark.parametrize("window", [1, 4])
def test_a_cache_is_as_long_as_its_images_need(window):
  gpt = transformer(dataclasses.replace(CLASSES, layers=1, grid=(4, 32)))
  engine, lengths = Engine(gpt, slots=2, chunk=4, window=window), []
  engine.warm_up()
  requests = [request(gpt, number) for number in (1, 3)]
  assert engine.join(requests[0])
  while not engine.idle:
    if len(requests[0].codes) >= 50 and not requests[1].codes:
      engine.join(requests[1])  # refused the second time
    engine.advance()
    lengths.append(cache_length(engine._banks[0]._state.cache))
  known = [32 + 4 * window, 64 + 4 * window, 96 + 4 * window, 128 + 4 * window]
  assert lengths[0] == known[0] and max(lengths) == known[-1]
  assert set(lengths) <= set(known)
  ended = lengths.index(known[-1])
  assert min(lengths[ended:]) < known[-1]  # the second one alone needs less
  assert all(r.codes == generated_alone(gpt, r) for r in requests)


def test_few_banks_are_busy(gpt):
  engine = Engine(gpt, slots=6, chunk=4, banks=3)
  plain, guided = (0, 4, 6, 10), (1, 2, 3)
  requests = {number: request(gpt, number) for number in plain + guided}

  def busy(*numbers: int) -> list[int]:
    assert all(engine.join(requests[number]) for number in numbers)
    return [bank.busy_rows for bank in engine._banks]

  assert busy(0) == [1, 0, 0]
  assert busy(1) == [3, 0, 0]
  assert busy(2) == [3, 2, 0]
  assert busy(4) == [4, 2, 0]  # beside the other without guidance
  engine.leave(requests[0])
  assert busy(3) == [3, 4, 0]
  assert busy(6) == [4, 4, 0]
  assert busy(10) == [4, 4, 1]
  while not engine.idle:
    engine.advance()
  assert all(r.codes == generated_alone(gpt, r) for n, r in requests.items() if n)


@pytest.mark.parametrize(
  "slots, banks", [(1, 1), (7, 1), (8, 2), (12, 3), (16, 4), (21, 3), (23, 1), (64, 8)]
)
def test_slots_of_a_cpu_make_banks_of_one_size(slots, banks):
  assert num_banks(slots) == banks


def test_nothing_compiles_after_the_warm_up(gpt):
  engine = Engine(gpt, slots=2, chunk=4, banks=2)
  engine.warm_up()
  compiled = []
  requests = [request(gpt, number) for number in range(12)]

  def listen(event: str, seconds: float, **_):
    compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    while requests or not engine.idle:
      while requests and engine.join(requests[0]):
        requests.pop(0)
      engine.advance()
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert [event for event in compiled if "compile" in event] == []


def test_requests_without_guidance_share_a_slot(gpt):
  engine = Engine(gpt, slots=1, chunk=4)
  alone, beside, guided = (request(gpt, number) for number in (0, 4, 1))
  assert engine.join(alone) and not engine.join(guided) and engine.join(beside)
  engine.leave(alone)
  assert not engine.join(guided)
  engine.leave(beside)
  assert engine.join(guided) and engine.busy_rows == 2
