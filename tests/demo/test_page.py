"""The page of `tinycnn demo` in a browser: Playwright with the system's Chromium or Chrome."""

import shutil

import numpy as np
import pytest
from random_nets import random_net

from tinycnn import Sequential, demo, digits, layers

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("needs Chromium or Chrome", allow_module_level=True)

SIZES = {"desktop": (1280, 900), "tablet": (820, 1180), "phone": (390, 844)}

# The ten digits as pen strokes on 280 x 280.
STROKES = {
    0: [[(140, 45), (95, 75), (80, 140), (95, 205), (140, 235), (185, 205), (200, 140), (185, 75), (140, 45)]],
    1: [[(150, 45), (138, 235)]],
    2: [[(85, 85), (110, 52), (160, 50), (190, 85), (175, 130), (85, 230), (205, 228)]],
    3: [[(90, 60), (150, 45), (190, 75), (175, 115), (135, 135), (185, 155), (195, 200), (150, 235), (85, 220)]],
    4: [[(110, 45), (80, 140), (200, 145)], [(175, 60), (160, 240)]],
    5: [[(195, 50), (105, 52), (98, 125), (145, 115), (190, 145), (190, 195), (145, 232), (88, 215)]],
    6: [[(165, 45), (115, 95), (88, 165), (100, 220), (145, 235), (185, 205), (175, 160), (130, 150), (95, 180)]],
    7: [[(80, 60), (200, 58), (150, 140), (125, 235)]],
    8: [[(180, 75), (140, 45), (100, 75), (120, 115), (170, 150), (190, 195), (145, 235), (95, 200), (110, 155),
         (165, 115), (182, 75)]],
    9: [[(185, 85), (140, 50), (95, 80), (105, 130), (155, 135), (187, 90), (180, 160), (160, 235)]],
}  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The page of the networks that ship."""
    path = tmp_path_factory.mktemp("page") / "demo.html"
    demo.write([demo.from_run(folder) for folder in sorted(demo.SHIPPED.iterdir())], path)
    return path


@pytest.fixture
def visit(chromium):
    """visit(path, ...) opens a page.  The test fails if the page printed anything, raised, or asked for anything."""
    contexts, problems = [], []

    def opened(path, size="desktop", **options):
        width, height = SIZES[size]
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
        page.add_init_script(
            "window.shift = 0; new PerformanceObserver((list) => list.getEntries().forEach((entry) => {"
            "window.shift += entry.value; })).observe({type: 'layout-shift', buffered: true});"
        )
        page.goto(path.as_uri())
        settle(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def settle(page):
    """Wait until nothing is left to compute."""
    while page.evaluate("requested"):
        page.wait_for_timeout(10)


def draw(page, strokes):
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    scale = box["width"] / page.evaluate("padSize(state.net.picture)[0]")
    for stroke in strokes:
        points = [(box["x"] + x * scale, box["y"] + y * scale) for x, y in stroke]
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point, steps=5)
        page.mouse.up()
    settle(page)


def verdict(page):
    return page.locator("#verdict strong").inner_text()


def numbers(page, expression):
    """A typed array of the page."""
    return np.array(page.evaluate(f"Array.from({expression})"))


@pytest.mark.parametrize("net", [0, 1])
def test_all_ten_digits_are_read(visit, shipped, net):
    page = visit(shipped)
    page.locator("#nets button").nth(net).click()
    answers = []
    for strokes in STROKES.values():
        page.locator("#clear").click()
        draw(page, strokes)
        answers.append(page.evaluate("state.best"))
    assert answers == list(range(10))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_and_theme(visit, shipped, size, scheme):
    page = visit(shipped, size, color_scheme=scheme, has_touch=size != "desktop")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    draw(page, STROKES[3])
    assert verdict(page) == "3"
    page.get_by_text("correlation").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("window.shift") < 1e-3
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 20, 22)") == (scheme == "dark")


def test_the_picture_is_prepared_as_predict_does(visit, shipped):
    page = visit(shipped)
    for strokes in (STROKES[2], STROKES[9], [[(30, 30), (60, 30), (40, 90)]]):
        page.locator("#clear").click()
        draw(page, strokes)
        grey = (255 - numbers(page, "readInk(56, 56)")).astype(np.uint8).reshape(56, 56)
        prepared = numbers(page, "state.pixels").reshape(28, 28)
        np.testing.assert_allclose(prepared, digits.prepare(grey), atol=1)
    page.locator("#prepare").uncheck()
    settle(page)
    unprepared = numbers(page, "state.pixels").reshape(28, 28)
    grey = 255 - numbers(page, "readInk(56, 56)").reshape(56, 56)
    assert unprepared[10:].max() == 0  # where it was drawn
    means = (255.0 - grey).reshape(28, 2, 28, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(unprepared, means, atol=0.5)


def test_the_layers_are_the_engines(visit, shipped):
    page = visit(shipped)
    for n, folder in enumerate(sorted(demo.SHIPPED.iterdir())):
        net = demo.from_run(folder)
        page.locator("#nets button").nth(n).click()
        draw(page, STROKES[8])
        pixels = numbers(page, "state.pixels").astype(np.float32).reshape(1, 1, 28, 28)
        pad = net.padding
        x = (np.pad(pixels, ((0, 0), (0, 0), (pad, pad), (pad, pad))) / 255 - net.mean) / net.std
        expected = net.model.outputs(x.astype(np.float32))[0]
        got = numbers(page, "state.activations[state.activations.length - 1].data")
        np.testing.assert_allclose(got, expected, atol=1e-4 * abs(expected).max())


def test_undo_clear_and_examples(visit, shipped):
    page = visit(shipped)
    draw(page, STROKES[4])
    assert verdict(page) == "4"
    page.locator("#undo").click()  # the second stroke
    settle(page)
    assert page.evaluate("state.strokes.length") == 1
    page.keyboard.press("Control+z")
    settle(page)
    assert page.locator("#verdict").inner_text() == "Draw a digit."
    page.locator("#examples .thumb").nth(6).click()
    settle(page)
    assert verdict(page) == "6"
    assert "right: it is 6" in page.locator("#verdict").inner_text()
    page.locator("#examples .thumbs").nth(1).locator("button").first.click()
    settle(page)
    assert "wrong: it is" in page.locator("#verdict").inner_text()
    page.locator("#clear").click()
    settle(page)
    assert page.evaluate("state.blank")
    page.locator("#undo").click()  # the example is back
    settle(page)
    assert "wrong: it is" in page.locator("#verdict").inner_text()


def test_undo_and_a_second_finger_during_a_stroke(visit, shipped):
    page = visit(shipped)
    box = page.locator("#pad").bounding_box()
    x, y = box["x"] + 60, box["y"] + 60
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50, y)
    page.keyboard.press("Control+z")
    page.mouse.move(x + 50, y + 50)  # the stroke has ended
    page.mouse.up()
    settle(page)
    assert page.evaluate("state.strokes.length") == 0
    page.evaluate(
        "for (const [id, x] of [[1, 40], [2, 200]]) find('pad').dispatchEvent(new PointerEvent('pointermove',"
        "{pointerId: id, clientX: x, clientY: 90}))"
    )
    assert page.evaluate("state.strokes.length") == 0  # no pointer is down


def test_small_drawings_are_enlarged(visit, shipped):
    page = visit(shipped)
    for digit in (0, 3, 5, 8):
        page.locator("#clear").click()
        draw(page, [[(200 + x / 6, 30 + y / 6) for x, y in stroke] for stroke in STROKES[digit]])
        assert verdict(page) == str(digit)


def test_a_chip_of_another_shape_drops_the_unit(visit, shipped):
    page = visit(shipped)
    draw(page, STROKES[0])
    page.locator(".stage > canvas").nth(3).click(position={"x": 9, "y": 9})
    page.locator(".chip").filter(has_text="Flatten").click()
    settle(page)
    assert "Point at a map" in page.locator("#unit").inner_text()
    page.locator(".stage > canvas").nth(3).click(position={"x": 9, "y": 9})
    assert "NaN" not in page.locator("#unit").inner_text()


@pytest.mark.parametrize("shape", [(1, 96, 64), (3, 100, 100), (2, 16, 40)])
def test_pictures_of_other_sizes(visit, tmp_path, shape):
    """A drawn bar is as long in the network's picture, and without gaps."""
    size = 2 * (shape[1] - 2) * (shape[2] - 2)
    chain = layers.Conv2d(shape[0], 2, 3), layers.Flatten(), layers.Linear(size, 3)
    model = Sequential(*chain, input_shape=shape, rng=0)
    demo.write([demo.from_model(model)], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    width, height = page.evaluate("padSize(state.net.picture)")
    assert width / height == pytest.approx(shape[2] / shape[1])
    draw(page, [[(width / 2, 0.1 * height), (width / 2, 0.9 * height)]])
    column = numbers(page, "state.pixels").reshape(shape)[0, :, shape[2] // 2]
    rows = np.flatnonzero(column > 127) / shape[1]
    assert rows[0] == pytest.approx(0.1, abs=0.12)
    assert rows[-1] == pytest.approx(0.9, abs=0.12)
    assert np.all(np.diff(np.flatnonzero(column > 127)) == 1)


def test_softmax_and_single_outputs(visit, tmp_path):
    nets = []
    for head in ((layers.Linear(64, 4), layers.Softmax()), (layers.Linear(64, 1),)):
        nets.append(demo.from_model(Sequential(layers.Flatten(), *head, input_shape=(1, 8, 8), rng=0)))
    demo.write(nets, tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    draw(page, STROKES[1])
    page.evaluate("window.probabilities = answer(state.net, state.activations[3]).probabilities")
    np.testing.assert_array_equal(numbers(page, "window.probabilities"), numbers(page, "state.activations[3].data"))
    page.locator("#nets button").nth(1).click()
    assert not page.locator("#answer").is_visible()


def test_drawing_with_the_keyboard(visit, shipped):
    page = visit(shipped)
    page.locator("#pad").focus()
    page.keyboard.press("Space")
    for _ in range(10):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")  # the pen is up
    settle(page)
    assert verdict(page) == "1"
    assert page.evaluate("state.strokes.length") == 1


@pytest.mark.parametrize("net", [0, 1])
def test_a_unit_is_explained_with_its_value(visit, shipped, net):
    page = visit(shipped)
    page.locator("#nets button").nth(net).click()
    draw(page, STROKES[5])
    for s in range(page.evaluate("state.stages.length")):
        page.locator(".stage > canvas").nth(s).click(position={"x": 12, "y": 6})
        value = page.evaluate("valueAt(state.activations[state.selected.stage.shown + 1], state.selected.unit)")
        shown = page.locator("#unit .equation strong").last.inner_text().replace("\u2212", "-")
        assert float(shown) == pytest.approx(value, rel=6e-3, abs=1e-9)
        assert "its gradient" in page.locator("#unit").inner_text()


def test_the_arithmetic_of_a_convolution_adds_up(visit, shipped):
    page = visit(shipped)
    draw(page, STROKES[5])
    page.locator(".stage > canvas").nth(2).click(position={"x": 95, "y": 30})
    text = page.locator("#unit .equation").first.inner_text().replace("\u2212", "-")
    sum_text, _, rest = text.partition(" (of 6 maps) + bias ")
    bias, _, result = rest.partition(" = ")
    assert float(sum_text) + float(bias) == pytest.approx(float(result), abs=0.02)
    sums = [float(t.replace("\u2212", "-")) for t in page.locator("#unit .thumb span").all_inner_texts()]
    assert sum(sums) == pytest.approx(float(sum_text), abs=0.03)
    page.locator("#unit .thumb").nth(2).click()
    assert "input, map 2" in page.locator("#unit").inner_text()


def test_units_move_with_the_keyboard(visit, shipped):
    page = visit(shipped)
    canvas = page.locator(".stage > canvas").first
    canvas.focus()
    page.keyboard.press("Enter")
    first = page.evaluate("state.selected.unit")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    assert page.evaluate("state.selected.unit") == [first[0] + 1, first[1] + 1, first[2]]
    page.keyboard.press("Escape")
    assert not page.evaluate("state.pinned")


def test_the_gradients_are_shown(visit, shipped):
    page = visit(shipped)
    draw(page, STROKES[7])
    before = page.locator(".stage .range").first.inner_text()
    page.locator("#show-gradients").click()
    settle(page)
    assert page.locator(".stage .range").first.inner_text() != before
    page.get_by_text("correlation").wait_for()
    note = page.locator("#saliency").inner_text()
    assert float(note.split("(correlation ")[1].split(")")[0]) > 0.99


def test_the_slider_changes_the_weights(visit, shipped):
    page = visit(shipped)
    draw(page, STROKES[2])
    trained = numbers(page, "state.layers[0].weight.data")
    slider = page.locator("#epoch")
    texts = []
    for _ in range(int(slider.get_attribute("max"))):
        slider.focus()
        page.keyboard.press("ArrowLeft")
        settle(page)
        texts.append(page.locator("#epoch-text").inner_text())
    assert texts[-1] == "before training"
    assert "after 0.1 epochs" in texts
    assert abs(numbers(page, "state.layers[0].weight.data") - trained).max() > 0.1
    page.keyboard.press("End")
    settle(page)
    np.testing.assert_array_equal(numbers(page, "state.layers[0].weight.data"), trained)


def test_the_page_cannot_connect(chromium, shipped):
    page = chromium.new_page()
    page.goto(shipped.as_uri())
    blocked = page.evaluate(
        "new Promise((resolve) => { document.addEventListener('securitypolicyviolation', (event) =>"
        "resolve(event.effectiveDirective)); fetch('http://127.0.0.1:9/').catch(() => 0); })"
    )
    page.close()
    assert blocked == "connect-src"


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(visit, tmp_path, seed):
    """Nets of all layers, of one channel or three, on the page: opened, drawn on, every unit's arithmetic asked for."""
    model = random_net(seed)
    path = tmp_path / "random.html"
    demo.write([demo.from_model(model, "</script><b>net</b>")], path)
    page = visit(path)
    draw(page, STROKES[0])
    page.wait_for_timeout(300)
    for s in range(page.evaluate("state.stages.length")):
        page.locator(".stage > canvas").nth(s).click(position={"x": 2, "y": 2})
        page.locator("#show-gradients").click()
        page.locator("#show-values").click()
    assert page.title() == "tinycnn: </script><b>net</b>"
    pixels = numbers(page, "state.pixels").reshape(1, *model.input_shape) / 255
    expected = model.outputs(pixels.astype(np.float32))[0]
    got = numbers(page, "state.activations[state.activations.length - 1].data")
    np.testing.assert_allclose(got, np.ravel(expected), atol=1e-4 * max(1, abs(expected).max()))


def test_outputs_that_are_maps(visit, tmp_path):
    model = Sequential(layers.Conv2d(1, 3, 3), layers.ReLU(), layers.MaxPool2d(2), input_shape=(1, 20, 24), rng=0)
    demo.write([demo.from_model(model)], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    draw(page, STROKES[0])
    assert not page.locator("#answer").is_visible()
    page.locator(".stage > canvas").nth(1).click(position={"x": 9, "y": 9})
    assert "the largest =" in page.locator("#unit").inner_text()


def test_class_names_are_text(visit, tmp_path):
    model = random_net(3)
    model.class_names = tuple(f"<img src=x>{k}</script>" for k in range(model.shapes[-1][0]))
    demo.write([demo.from_model(model)], tmp_path / "page.html")
    page = visit(tmp_path / "page.html")
    draw(page, STROKES[0])
    assert page.locator(".bar-row .class").first.inner_text() == "<img src=x>0</script>"
