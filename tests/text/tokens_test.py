"""Token ids equal those of the libraries that the vocabularies belong to."""

import io

import numpy as np
import pytest
import sentencepiece
import tokenizers

from llamagen_jax.errors import UserError
from llamagen_jax.text.tokens import CaptionTokens
from tests import tiny

LENGTH = 120
CAPTIONS = [
  "", "a", "two blue birds", "ein blauer vogel über dem meer", "  spaced   out  ",
  "un renard rouge, là-bas", "красная лиса на зелёном холме", "赤い狐", "🦊 fox",
  "a fox " * 100, "x" * 500, "a red fox on a green hill",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tiny.write_vocabulary(tmp_path_factory.mktemp("t5"))


@pytest.mark.parametrize("caption", CAPTIONS)
def test_sentencepiece(folder, caption):
  library = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "spiece.model")
  )
  expected = library.encode(caption, add_eos=True)
  if len(expected) > LENGTH:
    expected = [*expected[: LENGTH - 1], library.eos_id()]
  found = CaptionTokens.load(folder).ids(caption, LENGTH)
  assert found == expected
  assert found[-1] == 1


def test_padding_and_empty_captions(folder):
  tokens = CaptionTokens.load(folder)
  ids, mask = tokens.rows(["Two BLUE birds!", "http://nothing.left", "a fox " * 99], 20)
  assert ids.shape == mask.shape == (3, 20)
  length = mask[0].sum()
  assert ids[0, :length].tolist() == tokens.ids("two blue birds!", 20)
  assert not ids[0, length:].any()
  assert mask.sum(axis=1).tolist() == [length, 0, 20]
  assert ids[2, -1] == 1


def test_tokenizer_json(tmp_path, folder):
  """The form that comes with newer models, made from the same pieces."""
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
  ids = range(pieces.get_piece_size())
  scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids]
  fast = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=2))
  fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.WhitespaceSplit(),
      tokenizers.pre_tokenizers.Metaspace("▁", "always"),
  ])  # fmt: skip
  fast.post_processor = tokenizers.processors.TemplateProcessing(
    single="$A </s>", special_tokens=[("</s>", 1)]
  )
  fast.enable_truncation(5)  # what the file was last used with is not ours
  fast.save(str(tmp_path / "tokenizer.json"))
  ours = CaptionTokens.load(tmp_path)
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  theirs.enable_truncation(LENGTH)
  theirs.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")
  for caption in CAPTIONS:
    expected = theirs.encode(caption)
    found = ours.ids(caption, LENGTH)
    length = sum(expected.attention_mask)
    assert found == expected.ids[:length]
  same = [c for c in CAPTIONS if c.isascii()]
  plain = CaptionTokens.load(folder)
  assert [ours.ids(c, 20) for c in same] == [plain.ids(c, 20) for c in same]
  assert ours.size == plain.size


def test_bad_vocabularies(tmp_path):
  with pytest.raises(UserError, match=r"expected spiece.model or tokenizer.json"):
    CaptionTokens.load(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer"):
    CaptionTokens.load(tmp_path)
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(tiny.CAPTIONS * 5), model_writer=model, vocab_size=60,
    hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  (tmp_path / "spiece.model").write_bytes(model.getvalue())
  with pytest.raises(UserError, match="no <pad>"):
    CaptionTokens.load(tmp_path)


@pytest.mark.extra
def test_transformers(tmp_path, folder):
  """Cutting, padding and </s> are those of transformers."""
  transformers = pytest.importorskip("transformers")
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
  ids = range(pieces.get_piece_size())
  scores = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in ids]
  theirs = transformers.T5Tokenizer(vocab=scores, extra_ids=0)
  theirs.save_pretrained(tmp_path)
  ours = CaptionTokens.load(tmp_path)
  expected = theirs(
    CAPTIONS, max_length=LENGTH, padding="max_length", truncation=True,
    return_tensors="np",
  )  # fmt: skip
  for i, caption in enumerate(CAPTIONS):
    found = ours.ids(caption, LENGTH)
    padded = np.pad(found, (0, LENGTH - len(found)))
    np.testing.assert_array_equal(padded, expected["input_ids"][i])
    assert len(found) == expected["attention_mask"][i].sum()
