"""Cleaning of captions from the web, as the released models were trained on them.

Training and sampling must agree, so there are no settings.
"""

import html
import re
from urllib.parse import unquote_plus
import warnings

from llamagen_jax.errors import UserError

try:
  import bs4
  import ftfy
except ImportError:  # said when the first caption is cleaned
  bs4 = ftfy = None

PASSES = 2  # what one pass joins or uncovers, the next one removes
FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
FILE_NAME = re.compile(rf"\.(?:{FILES})")
DASHES = (
  "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
  "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff"
# A caption's 120 tokens are about 600 characters. html.parser is quadratic: 4096 of
# unclosed tags take 0.1 s, 32 000 take 9 s.
MAX_CHARACTERS = 4096
MOST_JOINERS = 3  # more dashes and underscores than these are word separators

# Names joined by dots, as in web addresses; every one is matched once, whole. In all
# patterns, `++` and `*+` give nothing back, which keeps cleaning linear.
DOTTED = re.compile(r"[\w-]++(?:\.[\w-]++)*+")
DOMAIN = re.compile(r"(?<=\.)(?:com|co|ru|net|org|edu|gov|it)\b")
PATH = re.compile(r"(?:/\S*+)?")
WORD = re.compile(r"\w")
URLS = ((r"\b(?:https?://|www\.)\S+", ""),)

SYMBOLS = (
  (r"@\w+\b", ""),
  (f"[{CJK}\u4e00-\u9fff]+", ""),
  (f"[{DASHES}]+", "-"),
  ("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]", '"'),
  ("[\u2018\u2019]", "'"),
  (r"&quot;?", ""),
  (r"&amp", ""),
  (r"\d{1,3}(?:\.\d{1,3}){3}", " "),  # addresses of machines
  (r"\d:\d\d\s+$", ""),
  (r"\\n", " "),
  (r"#\d{1,3}\b", ""),
  (r"#\d{5,}\b", ""),
  (r"\b\d{6,}\b", ""),
  (r"\S++", lambda match: _without_file_name(match[0])),
  (r"[\"']{2,}", '"'),
  (r"\.{2,}", " "),
  (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
  (r"(?<!\s)\s++\.\s++", " "),
)

PHRASES = (
  (r"\b[a-z]{1,3}\d{3,15}\b", ""),  # numbers of articles
  (r"\b[a-z]+\d+[a-z]+\b", ""),
  (r"\b\d+[a-z]+\d+\b", ""),
  (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
  (r"(?:free\s)?download(?:\sfree)?", ""),
  (r"\bclick\b\s(?:for|on)\s\w+", ""),
  (rf"\b(?:{FILES})(?:\simages?)?", ""),
  (r"\bpage\s+\d+\b", ""),
  (r"\b\d*+[a-z]++\d++[a-z]++\d[a-z\d]*+\b", " "),
  ("\\b\\d++(?:\\.\\d*+)?[x\u0445\u00d7]\\d++(?:\\.\\d++\\b|\\.\\b|\\b)", ""),  # 10x20
  (r"\b\s+:\s+", ": "),
  (r"(\D[,./])\b", r"\1 "),
  (r"\s+", " "),
)

ENDS = (
  (r"^[\"'](.+)[\"']$", r"\1"),
  (r"^['_,\-:;]", ""),
  (r"['_,\-:+]$", ""),
  (r"^\.\S+$", ""),
)


def clean(caption: str) -> str:
  """Lower-cases a caption and removes text that describes no image.

  That is web addresses, markup, user names, Chinese and Japanese characters, numbers
  and sizes of articles, file names, phrases of shops; dashes and quotes become plain
  ones. The result may be empty. Only the first MAX_CHARACTERS are read.

  Raises:
    UserError: the extra `text` is not installed.
  """
  if ftfy is None:
    raise UserError("captions need ftfy and BeautifulSoup: pip install -e '.[text]'")
  caption = caption[:MAX_CHARACTERS]
  for _ in range(PASSES):
    caption = _clean_once(caption)
  return caption


def _clean_once(caption: str) -> str:
  caption = unquote_plus(caption).strip().lower().replace("<person>", "person")
  caption = _strip_markup(_without_domains(_replace(_URLS, caption)))
  caption = _replace(_SYMBOLS, caption)
  if len(re.findall("[-_]", caption)) > MOST_JOINERS:
    caption = re.sub("[-_]", " ", caption)
  caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
  caption = _replace(_PHRASES, caption).strip()
  return _replace(_ENDS, caption).strip()


def _without_domains(text: str) -> str:
  r"""Removes web addresses such as shop.example.com/path.

  Equals `\b(?:[\w-]+\.)+(?:com|..)\b(?:/\S*)?` replaced by nothing, which would try
  every name of a dotted chain as the beginning of an address.
  """
  kept, position = [], 0
  while chain := DOTTED.search(text, position):
    first = WORD.search(text, chain.start(), chain.end())
    ends = [
      domain.end()
      for domain in DOMAIN.finditer(text, chain.start(), chain.end())
      if first and domain.start() > first.start()
    ]
    if ends:
      kept.append(text[position : first.start()])
      position = PATH.match(text, ends[-1]).end()
    else:
      kept.append(text[position : chain.end()])
      position = chain.end()
  return "".join(kept) + text[position:]


def _without_file_name(word: str) -> str:
  """Removes the start of a word up to its last suffix of a file, such as .jpg."""
  ends = [suffix.end() for suffix in FILE_NAME.finditer(word, 1)]
  return word[ends[-1] :] if ends else word


def _strip_markup(caption: str) -> str:
  if not set("<&") & set(caption):
    return caption
  with warnings.catch_warnings():  # captions that look like a file or an address
    warnings.simplefilter("ignore")
    return bs4.BeautifulSoup(caption, "html.parser").get_text()


def _compile(rules):
  return tuple((re.compile(p, re.DOTALL), replacement) for p, replacement in rules)


_URLS, _SYMBOLS, _PHRASES, _ENDS = map(_compile, (URLS, SYMBOLS, PHRASES, ENDS))


def _replace(rules, caption: str) -> str:
  for pattern, replacement in rules:
    caption = pattern.sub(replacement, caption)
  return caption
