"""CLIP against transformers' CLIPModel, and the score in `llamagen evaluate`.

tests/golden/clip.json holds the embeddings that transformers 5.23 gave, for weights
made by the rule of tests/parity.py from the names and shapes in the file (without
logit_scale), for the ids in it, and for images `randint("clip/images", 256,
(3, 12, 12, 3))`, normalised as CLIP's are; also the ids that its CLIPTokenizer gave for
the texts and merges in the file, over OpenAI's vocabulary of bytes.
"""

import functools
import gzip
import json

import jax
import numpy as np
from PIL import Image
import pytest
from safetensors.numpy import save_file

from llamagen_jax.commands import cli
from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.clip_score import fit
from llamagen_jax.images import save_npz
from llamagen_jax.text.clip_tokens import ClipTokens
from llamagen_jax.vision.clip import Clip, abstract_clip, similarity
from llamagen_jax.weights.clip import load_clip, open_clip_config, transformers_config
from tests import parity

IMAGES = parity.randint("clip/images", 256, (3, 12, 12, 3)).astype(np.uint8)


@functools.cache
def golden():
  return json.loads((parity.FOLDER / "clip.json").read_text())


def config_json(activation="quick_gelu", vocab_size=60):
  config = json.loads(json.dumps(golden()["config"])) | {"model_type": "clip"}
  for tower in ("text_config", "vision_config"):
    config[tower]["hidden_act"] = activation
  config["text_config"]["vocab_size"] = vocab_size
  return config


def write_transformers(folder, activation="quick_gelu", vocab_size=60):
  folder.mkdir()
  config = config_json(activation, vocab_size)
  (folder / "config.json").write_text(json.dumps(config))
  shapes = dict(golden()["shapes"])
  shapes["text_model.embeddings.token_embedding.weight"] = [vocab_size, 16]
  weights = parity.synthesize(shapes)
  save_file(weights | {"logit_scale": np.float32([4.6])}, folder / "model.safetensors")
  return weights


def write_openai_merges(folder):
  lines = ['"bpe_simple_vocab', *(" ".join(pair) for pair in golden()["merges"])]
  text = "\n".join(lines).encode()
  (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(text))


def ids_and_ends():
  ids = np.array(golden()["ids"], np.int32)
  return ids, ids.argmax(axis=1)  # 59 ends a text


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_embeddings_equal_transformers(tmp_path, activation):
  write_transformers(tmp_path / "clip", activation)
  config, params = load_clip(tmp_path / "clip")
  assert config.activation == activation
  ids, ends = ids_and_ends()
  apply = jax.jit(Clip(config).apply)
  text, vision = apply({"params": params}, ids, ends, IMAGES)
  expected = {name: np.array(golden()[activation][name]) for name in ("text", "vision")}
  np.testing.assert_allclose(text, expected["text"], atol=2e-6)
  np.testing.assert_allclose(vision, expected["vision"], atol=2e-6)
  cosine = similarity(config, params, ids, ends, IMAGES)
  wanted = np.sum(expected["text"] * expected["vision"], axis=1)
  np.testing.assert_allclose(cosine, wanted, atol=2e-6)

  # What stands behind the end of a text changes nothing.
  ids[0, 3:] = 7
  again, _ = apply({"params": params}, ids, ends, IMAGES)
  np.testing.assert_array_equal(again, text)


def open_clip_weights(weights):
  """The same model by open_clip's names."""
  found = {
    "text_projection": weights["text_projection.weight"].T,
    "visual.proj": weights["visual_projection.weight"].T,
    "logit_scale": np.float32(4.6),
  }
  plain = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
  }  # fmt: skip
  for name, value in weights.items():
    new = name
    for theirs, ours in plain.items():
      new = new.replace(theirs, ours)
    if "q_proj" in name:
      parts = [weights[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
      found[new.replace("q_proj.", "in_proj_")] = np.concatenate(parts)
    elif "k_proj" not in name and "v_proj" not in name and "projection" not in name:
      found[new] = value
  return found


def test_open_clip_names_give_the_same_model(tmp_path):
  weights = write_transformers(tmp_path / "a")
  expected, params = load_clip(tmp_path / "a")
  (tmp_path / "b").mkdir()
  model = {
    "embed_dim": 20, "quick_gelu": True,
    "vision_cfg": {"image_size": 12, "layers": 3, "width": 24, "patch_size": 4,
                   "head_width": 8, "mlp_ratio": 56 / 24},
    "text_cfg": {"context_length": 9, "vocab_size": 60, "width": 16, "heads": 2,
                 "layers": 2, "mlp_ratio": 2.5},
  }  # fmt: skip
  file = tmp_path / "b" / "open_clip_config.json"
  file.write_text(json.dumps({"model_cfg": model}))
  found = {n: np.ascontiguousarray(v) for n, v in open_clip_weights(weights).items()}
  save_file(found, tmp_path / "b" / "open_clip_model.safetensors")
  config, same = load_clip(tmp_path / "b")
  assert config == expected
  jax.tree.map(np.testing.assert_array_equal, same, params)
  assert open_clip_config({"model_cfg": model | {"quick_gelu": False}}).activation == (
    "gelu"
  )
  model["text_cfg"]["hf_model_name"] = "roberta"
  with pytest.raises(UserError, match="own text tower"):
    open_clip_config({"model_cfg": model})


def test_import_is_strict(tmp_path):
  with pytest.raises(UserError, match="not a folder of CLIP"):
    load_clip(tmp_path)
  weights = write_transformers(tmp_path / "clip")
  name = "vision_model.post_layernorm.bias"
  weights["other"] = weights.pop(name)
  save_file(weights, tmp_path / "clip" / "model.safetensors")
  with pytest.raises(UserError, match=rf"missing {name}.*unexpected other"):
    load_clip(tmp_path / "clip")
  with pytest.raises(UserError, match="'siglip'"):
    transformers_config({"model_type": "siglip"})


def test_shapes_of_published_models():
  for vision, params in (
    ({}, 151_277_312),  # ViT-B/32; the published count has logit_scale, too
    ({"patch_size": 16}, 149_620_736),
  ):
    fields = {"model_type": "clip", "text_config": {}, "vision_config": vision}
    shapes = jax.tree.leaves(abstract_clip(transformers_config(fields)))
    assert sum(leaf.size for leaf in shapes) == params


def test_tokens_equal_transformers(tmp_path):
  write_openai_merges(tmp_path)
  tokens = ClipTokens.load(tmp_path)
  ids, ends = tokens.rows(golden()["texts"], 20)
  for row, end, expected in zip(ids, ends, golden()["tokens"], strict=True):
    assert row[: end + 1].tolist() == expected
  short, ends = tokens.rows(golden()["texts"], 5)
  longest = max(golden()["tokens"], key=len)
  row = golden()["tokens"].index(longest)
  assert short[row].tolist() == [*longest[:4], longest[-1]] and ends[row] == 4

  # The same tokenizer as one file of the tokenizers library.
  (tmp_path / "json").mkdir()
  tokens._tokenizer.save(str(tmp_path / "json" / "tokenizer.json"))
  again, _ = ClipTokens.load(tmp_path / "json").rows(golden()["texts"], 20)
  np.testing.assert_array_equal(again, ids)
  with pytest.raises(UserError, match="no tokenizer; expected one of"):
    ClipTokens.load(tmp_path / "nowhere")


def test_images_are_fitted():
  image = np.zeros((30, 60, 3), np.uint8)
  image[:, 15:45] = 255  # the middle square
  assert (fit(image, 10)[:, 1:-1] == 255).all() and fit(image, 10).shape == (10, 10, 3)
  image = parity.randint("clip/fit", 256, (12, 12, 3)).astype(np.uint8)
  np.testing.assert_array_equal(fit(image, 12), image)


@pytest.mark.slow
def test_score_in_the_verb(tmp_path, inception, cheap, capsys):
  clip, count = tmp_path / "clip", 5
  write_transformers(clip, vocab_size=526)
  write_openai_merges(clip)
  images = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)
  save_npz(tmp_path / "reference.npz", [images[::-1]], count, None)
  folder = tmp_path / "samples"
  folder.mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image).save(folder / f"{i:05d}.png")
  prompts = [f"the cat {i}" for i in range(count)]

  def evaluate(*flags):
    out = tmp_path / "x.json"
    code = cli.run([
      "evaluate", "--protocol=custom", f"--samples={folder}",
      f"--inception={inception}", f"--reference={tmp_path / 'reference.npz'}",
      f"--cache={tmp_path / 'cache'}",
      f"--out={out}", "--inception-batch=2",
      *flags,
    ])  # fmt: skip
    return code, json.loads(out.read_text()) if code == 0 else capsys.readouterr().err

  assert "CLIP score" not in evaluate()[1]["scores"]
  code, text = evaluate(f"--clip={clip}")
  assert code == 2 and "captions.txt; --prompt-file names it" in text
  (folder / "captions.txt").write_text("\n".join(prompts[:-1]) + "\n")
  code, text = evaluate(f"--clip={clip}")
  assert code == 2 and "4 prompts for 5 images" in text
  (folder / "captions.txt").write_text("\n".join(prompts) + "\n")
  code, result = evaluate(f"--clip={clip}")
  assert code == 0, result
  config, params = load_clip(clip)
  ids, ends = ClipTokens.load(clip).rows(prompts, config.context)
  expected = np.mean(similarity(config, params, ids, ends, images))
  found = result["scores"]["CLIP score"]["ours"]
  np.testing.assert_allclose(found, expected, rtol=1e-5)

  other = tmp_path / "other.txt"
  other.write_text("\n".join(["a dog", *prompts[1:]]))
  moved = evaluate(f"--clip={clip}", f"--prompt-file={other}")[1]["scores"][
    "CLIP score"
  ]
  assert moved["ours"] != found
