import random
import re

import pytest

from llamagen_jax.text import caption
from llamagen_jax.text.caption import clean

TABLE = [
  ("A Red Fox", "a red fox"),
  ("a%20dog+runs", "a dog runs"),
  ("<person> on a bike", "person on a bike"),
  ("see https://a.b/c?d=1 now", "see now"),
  ("buy at www.shop.example/x", "buy at"),
  ("lamp from ikea.com/lamps", "lamp from"),
  ("<b>bold</b> sky", "bold sky"),
  ("cats &amp; dogs", "cats dogs"),
  ("photo by @someone in rome", "photo by in rome"),
  ("山水 mountain", "mountain"),
  ("old\u2014town \u2013 view", "old-town - view"),
  ("\u201cquoted\u201d word", '"quoted" word'),
  ("it\u2019s", "it's"),
  ("say &quot;hi&quot; now", 'say "hi" now'),
  ("server 192.168.0.1 room", "server room"),
  ("clip 1:23 ", "clip 1:23"),
  ("one\\ntwo", "one two"),
  ("print #12 of art", "print of art"),
  ("tag #1234567", "tag"),
  ("item 1234567 chair", "item chair"),
  ("see IMG_01.jpg here", "see here"),
  ("wait....what", "wait what"),
  ("it''s", 'it"s'),
  ("fun *** [sale] (new)", "fun sale new"),
  ("a-b-c-d-e", "a b c d e"),
  ("a-b-c", "a-b-c"),
  ("model jc6640 bag", "model bag"),
  ("code ab12cd dress", "code dress"),
  ("sofa 6640vc231", "sofa"),
  ("poster free shipping", "poster"),
  ("wallpaper free download", "wallpaper"),
  ("click for details", ""),
  ("sunset jpg images", "sunset"),
  ("book page 12", "book"),
  ("print 10x20 cm", "print cm"),
  ("title : subtitle", "title: subtitle"),
  ("red,green", "red, green"),
  ('"all of it"', "all of it"),
  ("- a dash first", "a dash first"),
  ("a dash last -", "a dash last"),
  ("\ufb01ne wine", "fine wine"),
  ("&lt;b&gt;sky", "sky"),
  ("", ""),
  ("   ", ""),
]

VARIED = [
  *(caption for caption, _ in TABLE[:40]),
  "The Eiffel Tower at night, Paris, France",
  "A photo of a 3-year-old girl in a YELLOW rain-coat",
  "Vintage 1960's Coca-Cola sign | Etsy",
  "Women's Nike Air Max 90 'Infrared' (2020) - Size US 8.5",
  'iPhone 12 Pro Max Case, Shockproof, 6.7" | Free Shipping Worldwide!',
  "Новогодняя ёлка в Москве",
  "Ein schöner Sonnenuntergang über dem Zürichsee",
  "Une crêpe à la confiture — recette facile",
  "東京タワー at night 🗼",
  "emoji 😀😀 party!!!",
  "50% off: buy now & save $$$",
  "e = mc^2 written on a blackboard",
  "a.b.c.d. initials of a man, e.g. J.R.R. Tolkien",
  "<p>Paragraph<br/>with <a href='http://x.y'>link</a></p>",
  "DSC_0042.JPG photo stock_by_user_1999_01",
  "Fresh apples,pears/plums and 1/2 cup of sugar",
  "'''triple''' \"\"\"quotes\"\"\"",
  "&amp;amp;lt;div&amp;amp;gt; twice escaped",
  "a lake\twith\ttabs\nand lines",
  "#nature #wildlife #2 fox in snow",
]


@pytest.mark.parametrize("given, expected", TABLE)
def test_table(given, expected):
  assert clean(given) == expected


def test_cleaning_its_own_output_changes_nothing():
  assert len(VARIED) == 60
  changed = {c: clean(clean(c)) for c in VARIED if clean(clean(c)) != clean(c)}
  assert not changed


def test_web_addresses_and_file_names_go_as_by_the_published_patterns():
  """The linear forms remove the text that the plain patterns remove."""
  domain = re.compile(
    r"\b(?:[\w-]+\.)+(?:com|co|ru|net|org|edu|gov|it)\b(?:/\S*)?", re.DOTALL
  )
  file_name = re.compile(rf"\S+\.(?:{caption.FILES})")
  parts = (
    "a", "b.", "-", ".com", ".co", "com", ".it", " ", "/", "x", "é", ".", "..", "_",
    "\n", "jpg", ".jpg", ".jpeg", ".mp4", "shop.", "1",
  )  # fmt: skip
  rng = random.Random(0)
  for _ in range(5000):
    text = "".join(rng.choices(parts, k=rng.randint(1, 14)))
    assert caption._without_domains(text) == domain.sub("", text)
    words = re.sub(r"\S++", lambda m: caption._without_file_name(m[0]), text)
    assert words == file_name.sub("", text)


@pytest.mark.parametrize(
  "text", ["a.", "<p a='", "a1b1", "1", "1.", " ", "a.com/", "&"]
)
def test_long_captions_are_cut_before_they_are_cleaned(text):
  """Their time is bounded: the quadratic patterns took half a minute for the first."""
  long = text * (caption.MAX_CHARACTERS // len(text))
  assert clean(long + "x" * 10**6) == clean((long + "xxxxxx")[: caption.MAX_CHARACTERS])
