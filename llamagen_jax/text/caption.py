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
DASHES = (
  "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
  "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff"
MOST_JOINERS = 3  # more dashes and underscores than these are word separators

URLS = (
  (r"\b(?:https?://|www\.)\S+", ""),
  (r"\b(?:[\w-]+\.)+(?:com|co|ru|net|org|edu|gov|it)\b(?:/\S*)?", ""),
)

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
  (rf"\S+\.(?:{FILES})", ""),
  (r"[\"']{2,}", '"'),
  (r"\.{2,}", " "),
  (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " "),
  (r"\s+\.\s+", " "),
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
  (r"\b\d*[a-z]+\d+[a-z]+\d+[a-z\d]*\b", " "),
  ("\\b\\d+\\.?\\d*[x\u0445\u00d7]\\d+\\.?\\d*\\b", ""),  # sizes, 10x20
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
  """Lower-cases a caption and takes out what describes no image.

  Web addresses, markup, user names, Chinese and Japanese characters, numbers and
  sizes of articles, file names, phrases of shops; dashes and quotes become plain
  ones. What is left may be empty.

  Raises:
    UserError: the extra `text` is not installed.
  """
  if ftfy is None:
    raise UserError("captions need ftfy and BeautifulSoup: pip install -e '.[text]'")
  for _ in range(PASSES):
    caption = _clean_once(caption)
  return caption


def _clean_once(caption: str) -> str:
  caption = unquote_plus(caption).strip().lower().replace("<person>", "person")
  caption = _strip_markup(_replace(_URLS, caption))
  caption = _replace(_SYMBOLS, caption)
  if len(re.findall("[-_]", caption)) > MOST_JOINERS:
    caption = re.sub("[-_]", " ", caption)
  caption = html.unescape(html.unescape(ftfy.fix_text(caption))).strip()
  caption = _replace(_PHRASES, caption).strip()
  return _replace(_ENDS, caption).strip()


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
