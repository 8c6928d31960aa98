"""CLIP score of a set of images: their mean similarity to their prompts.

Cosine similarity of CLIP's embeddings (arXiv 2104.08718, section 3), here without the
factor 2.5 and without the cut at 0 that CLIPScore adds.
"""

from collections.abc import Sequence
import concurrent.futures
import hashlib

import numpy as np
from PIL import Image

from llamagen_jax.errors import UserError
from llamagen_jax.evaluation.cached_features import CachedImageMap
from llamagen_jax.evaluation.image_sets import READERS, ImageSet
from llamagen_jax.parallel.mesh import replicated, shard_tree
from llamagen_jax.storage import read_text, text_lines, user_path
from llamagen_jax.text.clip_tokens import ClipTokens
from llamagen_jax.vision.clip import similarity
from llamagen_jax.weights import bundle
from llamagen_jax.weights.clip import load_clip

CAPTIONS = "captions.txt"


class ClipScorer:
  """A CLIP on all devices."""

  def __init__(self, folder: str, images_map: CachedImageMap):
    self._config, params = load_clip(folder)
    self._tokens = ClipTokens.load(folder)
    if self._tokens.size > self._config.vocab_size:
      raise UserError(
        f"--clip={folder}: the tokenizer has {self._tokens.size} tokens, the model"
        f" {self._config.vocab_size}"
      )
    self._map = images_map
    self._params = shard_tree(params, replicated(images_map.mesh))
    self.identity = bundle.fingerprint(self._params)

  def __call__(
    self, source: ImageSet, prompts: Sequence[str], prefix: str
  ) -> np.ndarray:
    """Returns the cosine similarity of every image and its prompt [N] on host 0.

    Other hosts get an empty array.
    """
    config, size = self._config, self._config.image_size
    ids, ends = self._tokens.rows([prefix + p for p in prompts], config.context)
    texts = hashlib.sha256(ids.tobytes()).hexdigest()

    def apply(images, ids_BT, end_B):
      return {"cosine": similarity(config, self._params, ids_BT, end_B, images)}

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:

      def prepare(images):
        resized = list(pool.map(lambda image: fit(image, size), images))
        return np.array(resized, np.uint8).reshape(-1, size, size, 3)

      identity = f"clip {self.identity} {config} {texts}"
      outputs = self._map(
        source, "CLIP", identity, apply, prepare=prepare, beside=(ids, ends)
      )
    return outputs.get("cosine", np.zeros(0, np.float32))


def fit(image: np.ndarray, side: int) -> np.ndarray:
  """Resizes the shorter side of uint8 [H, W, 3]; returns the centre [side, side, 3].

  PIL's bicubic resizing, with antialiasing, as CLIP's images were prepared.
  """
  height, width = image.shape[:2]
  scale = side / min(height, width)
  size = (max(side, int(width * scale)), max(side, int(height * scale)))
  resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
  left, top = (size[0] - side) // 2, (size[1] - side) // 2
  return np.asarray(resized.crop((left, top, left + side, top + side)))


def read_prompts(file: str | None, source: ImageSet) -> list[str]:
  """Reads a prompt a line and image, in the order of the images' names or the npz.

  Args:
    file: default is captions.txt in the folder of the images.

  Raises:
    UserError: no such file, or not as many lines as images.
  """
  path = user_path(file) if file else source.path / CAPTIONS
  if not path.is_file():
    raise UserError(
      f"CLIP score needs the images' prompts: no file {path}; --prompt-file names it"
    )
  prompts = text_lines(read_text(path))
  if not prompts[-1]:  # after the last line's end
    prompts.pop()
  if len(prompts) != source.count:
    raise UserError(f"{path}: {len(prompts)} prompts for {source.count} images")
  return prompts
