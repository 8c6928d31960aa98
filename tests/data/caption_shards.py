"""Caption shards for tests: prepared from a source, and read back."""

from llamagen_jax.commands.prepare_captions import prepare
from llamagen_jax.data.caption_records import FieldNames
from llamagen_jax.data.captions import CaptionSource
from llamagen_jax.data.sources import CaptionImageSource
from tests import tiny

IMAGE = tiny.image_bytes(0)


def run(source, out, keys=FieldNames(), **changes):
  settings = {"images": "", "min_side": 16, "shard_count": 3, "workers": 1}
  return prepare(source, out, keys=keys, **(settings | changes))


def samples(folder):
  texts, images = CaptionSource(folder), CaptionImageSource(folder)
  assert len(texts) == len(images)
  found = [(texts[i], images[i]) for i in range(len(texts))]
  assert all(text.key == image.key for text, image in found)
  return [(text, image.image) for text, image in found]
