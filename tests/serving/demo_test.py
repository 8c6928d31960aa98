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
SECONDS = 120_000  # milliseconds


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    # Chromium's own sandbox does not work for root.
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
    )
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server():
  with live.serve(live.tiny_model(), mount=mount_demo, tick=0.05, slots=4) as server:
    yield server


@pytest.fixture
def page(browser, server, request):
  """The demo at a width, which asks nobody but the server for anything."""
  width = getattr(request, "param", 1280)
  page = browser.new_page(viewport={"width": width, "height": 844})
  page.set_default_timeout(SECONDS)
  elsewhere = []
  page.on("request", lambda r: None if server.url in r.url else elsewhere.append(r.url))
  page.goto(f"{server.url}/demo/")
  yield page
  assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []
  page.close()


sync_api.expect.set_options(timeout=SECONDS)


def status(page):
  return sync_api.expect(page.locator("#status"))


def boxes(page) -> list[tuple[float, ...]]:
  """Left, top, width and height of the frames of all images in the page."""
  return page.eval_on_selector_all(
    ".sheet .frame",
    """all => all.map(f => { const b = f.getBoundingClientRect();
    return [b.x, b.y + scrollY, b.width, b.height].map(Math.round); })""",
  )


def natural_sizes(page) -> list[list[int]]:
  """Returns width and height of the pixels of all images in the page."""
  return page.eval_on_selector_all(
    ".sheet img", "all => all.map(i => [i.naturalWidth, i.naturalHeight])"
  )


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_generates_by_clicking(page, server):
  page.click("#subject input")
  page.click("text=tiger shark (3)")
  before = boxes(page)
  server.engine.tick = 0.5  # so that the page has time to show what is not finished
  page.click("#generate")
  status(page).to_contain_text(f"of {4 * CODES} codes")
  server.engine.tick = 0.05
  page.wait_for_selector(".sheet img")
  assert boxes(page) == before  # nothing moves when the first image comes
  status(page).to_contain_text("Done in")
  assert boxes(page) == before  # nor when they are finished
  images = page.eval_on_selector_all(
    ".sheet img", "all => all.map(i => [i.naturalWidth, i.alt])"
  )
  assert images == [[8, f"tiger shark, image {i} of 4"] for i in (1, 2, 3, 4)]
  with page.expect_download() as saved:
    page.locator(".sheet a[download]").first.click()
  assert Image.open(saved.value.path()).size == (8, 8)
  assert [r.condition for r in server.engine.requests[-4:]] == [3] * 4
  width = page.viewport_size["width"]
  assert page.evaluate("document.documentElement.scrollWidth") <= width
  assert before[0][2] >= 160  # wide enough on a phone, too
  # The status stays in sight beside the last image.
  page.locator(".sheet figure").last.scroll_into_view_if_needed()
  sync_api.expect(page.locator("#status")).to_be_in_viewport()


def test_an_example_generates(page, server):
  done = len(server.engine.requests)
  page.click("#examples button >> nth=2")
  status(page).to_contain_text("Done in")
  assert [r.condition for r in server.engine.requests[done:]] == [2] * 4


def test_the_last_seed_can_be_used_again(page, server):
  keys = []
  for again in (False, True):
    if again:
      page.click("text=More settings")
      page.click("#reuse")
      sync_api.expect(page.locator("#seed input")).not_to_have_value("-1")
    page.click("#generate")
    status(page).to_contain_text("Done in")
    keys.append([r.key.tolist() for r in server.engine.requests[-4:]])
    page.wait_for_timeout(200)
  assert keys[0] == keys[1]


def paint_over_the_first_result(page) -> None:
  page.click("#take")
  canvas = page.locator("#editor canvas").first
  canvas.wait_for()
  sync_api.expect(page.locator("#editor")).not_to_contain_text("Upload an image")
  for _ in range(60):  # the editor does not say when an image can be drawn from
    page.click("#edit-draw")
    page.wait_for_timeout(500)
    if "Paint over" in page.locator("#status").inner_text():
      break
  status(page).to_contain_text("Paint over what to draw anew")
  canvas.scroll_into_view_if_needed()
  box = canvas.bounding_box()
  x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
  page.mouse.move(x, y)
  page.mouse.down()
  page.mouse.move(x + 3, y + 40, steps=5)
  page.mouse.up()


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_a_result_is_painted_over_and_drawn_anew(page, server):
  page.click("#generate")
  status(page).to_contain_text("Done in")
  page.click("role=tab[name='Edit']")
  page.click("#edit-draw")
  status(page).to_contain_text("Load an image")
  paint_over_the_first_result(page)
  page.click("#edit-draw")
  status(page).to_contain_text("Done in")
  known = server.engine.requests[-1].is_known
  assert known.any() and not known.all()
  assert page.locator(".sheet img").count() == 4
  width = page.viewport_size["width"]
  assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("page", [1280, 390], indirect=True)
def test_a_result_is_varied(page, server):
  page.click("#generate")
  status(page).to_contain_text("Done in")
  source = page.locator(".sheet img").nth(2).get_attribute("src")
  before, count = boxes(page), len(server.engine.requests)
  page.click("role=button[name='Vary image 3']")
  third = sync_api.expect(page.locator(".sheet img").nth(2))
  third.not_to_have_attribute("src", source)  # the status still speaks of the first
  status(page).to_contain_text("Done in")
  assert len(server.engine.requests) == count + 4
  for request in server.engine.requests[count:]:
    assert request.is_known.any() and not request.is_known.all()
  assert boxes(page) == before


def test_wide_images_keep_their_shape(browser):
  with live.serve(live.tiny_model(grid=(2, 8)), mount=mount_demo, slots=4) as server:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.set_default_timeout(SECONDS)
    page.goto(f"{server.url}/demo/")
    page.click("#generate")
    status(page).to_contain_text("Done in")
    images = page.eval_on_selector_all(
      ".sheet img",
      "all => all.map(i => [i.naturalWidth, i.naturalHeight, i.width / i.height])",
    )
    assert images == [[16, 4, pytest.approx(4, abs=0.1)]] * 4
    page.click("role=tab[name='Edit']")
    paint_over_the_first_result(page)
    page.click("#edit-draw")
    status(page).to_contain_text("Done in")
    known = server.engine.requests[-1].is_known
    assert known.any() and not known.all()
    page.close()


def test_a_size_is_chosen(browser):
  models = live.tiny_model("both"), live.tiny_model("both", grid=(2, 8))
  with live.serve(*models, mount=mount_demo, slots=4) as server:
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(f"{server.url}/demo/")
    page.click("#size input")
    page.click("text=16x4")
    page.click("#generate")
    status(page).to_contain_text("Done in")
    assert natural_sizes(page) == [[16, 4]] * 4
    first = page.locator(".sheet img").first
    source = first.get_attribute("src")
    page.click("role=button[name='Vary image 1']")
    sync_api.expect(first).not_to_have_attribute("src", source)
    status(page).to_contain_text("Done in")
    assert natural_sizes(page) == [[16, 4]] * 4
    page.close()


def test_stop_frees_the_slots_and_leaves_no_half_images(page, server):
  server.engine.last = 12
  page.click("#generate")
  page.wait_for_selector(".sheet img")
  page.click("#stop")
  status(page).to_contain_text("Stopped: 0 of 4 images are finished.")
  live.wait_until(server.is_idle)
  sync_api.expect(page.locator(".sheet img")).to_have_count(0)
  server.engine.last = CODES


def test_an_example_replaces_what_is_being_generated(page, server):
  server.engine.last = 12
  page.click("#generate")
  page.wait_for_selector(".sheet img")
  server.engine.last = CODES
  page.click("#examples button >> nth=2")
  status(page).to_contain_text("Done in")
  live.wait_until(server.is_idle)
  images = page.locator(".sheet img")
  sync_api.expect(images).to_have_count(4)
  assert {image.get_attribute("alt")[:11] for image in images.all()} == {"great white"}


def test_leaving_the_page_frees_the_slots(browser, server):
  page = browser.new_page()
  page.set_default_timeout(SECONDS)
  page.goto(f"{server.url}/demo/")
  server.engine.last = 12
  page.click("#generate")
  live.wait_until(lambda: server.worker.busy_slots)
  page.close()
  live.wait_until(server.is_idle)
  server.engine.last = CODES


def test_a_full_queue_is_one_line(page, server, capfd, monkeypatch):
  monkeypatch.setattr(type(server.worker), "free_places", 0)
  page.click("#generate")
  status(page).to_contain_text("The queue is full; try again in")
  assert "Traceback" not in capfd.readouterr().err


def test_code_to_copy(page, server):
  page.click("text=Use it from code")
  code = page.locator("#curl .cm-content")
  sync_api.expect(code).to_contain_text(f"{server.url}/v1/images/generations")
  page.click("#subject input")
  page.click("text=goldfish (1)")
  sync_api.expect(code).to_contain_text('"class_label": 1')


def test_behind_a_proxy_that_takes_a_prefix_away(browser, server):
  page = browser.new_page()
  page.set_default_timeout(SECONDS)
  host = server.url.partition("//")[2]
  outside = []

  def proxy(route):
    url = route.request.url
    if not url.startswith(f"{server.url}/art/"):
      outside.append(url)
      route.abort()
      return
    headers = {"x-forwarded-prefix": "/art", "x-forwarded-host": host}
    response = route.fetch(
      url=url.replace("/art/", "/", 1), headers=route.request.headers | headers
    )
    route.fulfill(response=response)

  page.route("**/*", proxy)
  page.goto(f"{server.url}/art/demo/")
  page.click("#generate")
  status(page).to_contain_text("Done in")
  assert [url for url in outside if not url.startswith(("data:", "blob:"))] == []
  page.unroute_all(behavior="ignoreErrors")  # its streams are still open
  page.close()


def test_docs_work_without_internet(browser, server):
  page = browser.new_page()
  page.set_default_timeout(SECONDS)
  page.route(lambda url: not url.startswith((server.url, "data:")), lambda r: r.abort())
  page.goto(f"{server.url}/docs")
  sync_api.expect(page.locator("#swagger-ui")).to_contain_text("/v1/images/generations")
  page.close()


def test_asks_for_the_key(browser):
  with live.serve(live.tiny_model(), mount=mount_demo, key=live.KEY) as server:
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(f"{server.url}/demo/")
    page.wait_for_selector("input[type=password]")
    assert page.locator("#generate").count() == 0
    page.locator("input").first.fill(USER)
    page.fill("input[type=password]", live.KEY)
    page.click("button:has-text('Login')")
    page.wait_for_selector("#generate")
    page.close()
