"""The web demo, in Chromium, at the width of a desktop and of a phone."""

import shutil

from PIL import Image
import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio")

from llamagen_jax.serving.demo import USER, mount_demo  # noqa: E402
from tests.serving import live  # noqa: E402

CHROMIUM = shutil.which("chromium")
pytestmark = [
  pytest.mark.extra,
  pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt install chromium"),
]
CODES = 16
SECONDS = 20_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    # Chromium's own sandbox does not work for root.
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=["--no-sandbox"]
    )
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server():
  with live.serve(live.tiny_studio(), mount=mount_demo, tick=0.05) as server:
    yield server


@pytest.mark.parametrize("width", [1280, 390])
def test_draws_by_clicking(browser, server, width):
  page = browser.new_page(viewport={"width": width, "height": 844})
  page.set_default_timeout(SECONDS)
  elsewhere = []
  page.on("request", lambda r: None if server.url in r.url else elsewhere.append(r.url))
  page.goto(f"{server.url}/demo/")
  page.click("#subject input")
  page.click("text=tiger shark (3)")
  page.click("#draw")
  sync_api.expect(page.locator("#status")).to_contain_text(f"of {4 * CODES} codes")
  sync_api.expect(page.locator("#status")).to_contain_text("Done", timeout=SECONDS)
  assert page.locator("#images a[download] img").count() == 4
  widths = page.eval_on_selector_all(
    "#images img", "all => all.map(i => i.naturalWidth)"
  )
  assert widths == [8] * 4  # none is broken
  with page.expect_download() as saved:
    page.locator("#images a").first.click()
  assert Image.open(saved.value.path()).size == (8, 8)
  assert [r.condition for r in server.backend.requests[-4:]] == [3] * 4
  assert page.evaluate("document.documentElement.scrollWidth") <= width
  assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []
  page.close()


def test_stop_frees_the_slots(browser, server):
  page = browser.new_page()
  page.set_default_timeout(SECONDS)
  page.goto(f"{server.url}/demo/")
  server.backend.tick = 0.5
  page.click("#draw")
  live.wait_until(lambda: server.backend.busy_slots, 20)
  page.click("#stop")
  live.wait_until(
    lambda: not server.backend.busy_slots and not server.backend.queued, 20
  )
  server.backend.tick = 0.05
  page.close()


def test_leaving_the_page_frees_the_slots(browser, server):
  page = browser.new_page()
  page.set_default_timeout(SECONDS)
  page.goto(f"{server.url}/demo/")
  server.backend.tick = 0.5
  page.click("#draw")
  live.wait_until(lambda: server.backend.busy_slots, 20)
  page.close()
  live.wait_until(
    lambda: not server.backend.busy_slots and not server.backend.queued, 20
  )
  server.backend.tick = 0.05


def test_asks_for_the_key(browser):
  with live.serve(live.tiny_studio(), mount=mount_demo, key=live.KEY) as server:
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(f"{server.url}/demo/")
    page.wait_for_selector("input[type=password]")
    assert page.locator("#draw").count() == 0
    page.locator("input").first.fill(USER)
    page.fill("input[type=password]", live.KEY)
    page.click("button:has-text('Login')")
    page.wait_for_selector("#draw")
    page.close()
