"""examples/app.py: the page's functions without a browser, the real page in Chromium, and the Space of publish.md."""

import base64
import html
import http.client
import importlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import publish
import pytest
import torch
import yaml
from finetune import LoraArguments, add_lora
from huggingface_hub.utils import httpx
from PIL import Image

from modeling_evlgen import EVLGenForConditionalGeneration, ExplainedWord, explain
from processing_evlgen import EVLGenProcessor
from processing_evlgen.videos import VideoFrames

from .helpers import ROOT, generate_new, noise_images, tiny_model, tiny_processor
from .training import save_captioner

gr = pytest.importorskip("gradio", reason="needs the app extra")
app = importlib.import_module("app")


@pytest.fixture(scope="module")
def captioner():
    model = tiny_model()
    model.generation_config.max_new_tokens = 50  # long enough to be seen while it is streamed
    return model, tiny_processor(model)


@pytest.fixture(scope="module")
def folder(captioner, tmp_path_factory):
    """A checkpoint, and files that a visitor may upload."""
    folder = save_captioner(tmp_path_factory.mktemp("captioner"), captioner[0])
    noise_images(1)[0].save(folder / "image.PNG")
    (folder / "broken.png").write_text("no image")
    return folder


def generated(model, processor, inputs, **settings):
    return processor.batch_decode(generate_new(model, inputs, **settings), skip_special_tokens=True)[0].strip()


def described(model, processor, media=None, settings=(1, 0, 1, 8), kind="images", **options):
    """The last text of the page, and what it shows beside it. `settings` are beams, temperature, top-p and length."""
    media = noise_images(1) if media is None else media
    *_, last = app.describe(model, processor, kind, media, "", app.generation_settings(*settings), **options)
    return last


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("kind", ["images", "videos"])
def test_the_text_and_the_merging_are_the_models(captioner, kind, num_beams):
    model, processor = captioner
    frames = noise_images(1 if kind == "images" else 4)
    settings = app.generation_settings(num_beams, 0, 1, 40)
    steps = list(app.describe(model, processor, kind, frames, "what?", settings))
    inputs = processor(**{kind: frames}, text="what?")
    expected = generated(model, processor, inputs, num_beams=num_beams, max_new_tokens=40)
    texts = [text for text, _ in steps]
    assert texts[0] == "" and texts[-1] == expected != ""
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert (len(set(texts)) > 2) == (num_beams == 1)  # streamed, or whole

    _, shown = steps[-1]
    merging = shown.merging
    pixels = inputs["pixel_values" if kind == "images" else "pixel_values_videos"]
    features = model.project_vision_features(model.get_vision_features(pixels))
    assert np.array_equal(merging.groups[-1], features.output_index[0, 1:].reshape(4, 4))
    assert len(np.unique(merging.groups[0])) == 16 and merging.counts == [17, 14, 11]
    assert len(shown.frames) == len(frames)
    assert list(merging.milliseconds) == ["tower", "connector", "language model"]
    assert min(merging.milliseconds.values()) > 0


def test_each_frame_of_a_merged_video_shows_a_merging_of_its_own(folder):
    model = EVLGenForConditionalGeneration.from_pretrained(folder, video_mode="merge")
    with torch.no_grad():
        model.time_embedding.weight.normal_()
    processor = EVLGenProcessor.from_pretrained(folder)
    frames = VideoFrames(noise_images(20), [index / 2 for index in range(20)])
    text, shown = described(model, processor, frames, (1, 0, 1, 20), "videos")
    inputs = processor(videos=[frames], do_sample_frames=False)
    assert text == generated(model, processor, inputs, max_new_tokens=20) != ""
    assert len(shown.frames) == app.SHOWN_FRAMES and shown.merging.counts == [17, 14, 11]
    assert shown.merging.groups[-1].shape == (16, 4, 4) and len(app.draw_layer(shown, 2)) == 16
    assert "20 frames x 17" in app.figures(shown)


def test_tiles_and_the_number_of_tokens_change_the_merging():
    model = tiny_model()
    model.config.image_token_range = [2, 17]
    processor = tiny_processor(model)
    processor.max_tiles = 4
    large = noise_images(1, size=64)
    text, shown = described(model, processor, large, num_image_tokens=6)
    batch = processor(images=large, num_image_tokens=6)
    assert text == generated(model, processor, batch)
    assert shown.merging.groups[-1].shape == (8, 8)
    assert shown.merging.counts[0] == 65 and shown.merging.counts[-1] == shown.merging.num_image_tokens == 6


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_words_light_up_their_places_and_doubtful_ones_are_underlined(captioner, kind, monkeypatch):
    model, processor = captioner
    frames = noise_images(1 if kind == "images" else 4)
    page = app.light_up(model, processor, kind, frames, "", "a <b>red</b> circle", processor.num_image_tokens)
    given = {"image": frames[0]} if kind == "images" else {"video": frames}
    given = {name: [value] for name, value in given.items()}
    (words,) = explain(model, processor, caption=["a <b>red</b> circle"], **given)
    assert page.count("<span") == page.count("class='place'") == len(words) == 3 and "<b>" not in page
    assert page.count("underline") == sum(word.confidence < 0.5 for word in words)
    with pytest.raises(ValueError, match="no text"):
        app.light_up(model, processor, kind, frames, "", " ", processor.num_image_tokens)
    monkeypatch.setattr(app, "MAX_NEW_TOKENS", 3)
    with pytest.raises(ValueError, match="more than 3 tokens"):  # as only a client without the page can send it
        app.light_up(model, processor, kind, frames, "", "a red circle and a cat", processor.num_image_tokens)


def test_a_place_is_bright_and_the_rest_is_dark():
    values = torch.zeros(2, 2)
    values[1, 0] = 3.0
    white = Image.new("RGB", (app.SIDE, app.SIDE), "white")
    page = app.words_page([white], [ExplainedWord("frog", 0.9, 0.9, 3.0, (values,))])
    lit = Image.open(BytesIO(base64.b64decode(page.split("base64,")[2].split("'")[0])))
    assert lit.getpixel((20, app.SIDE - 20))[0] > 240 and lit.getpixel((app.SIDE - 20, 20))[0] < 80
    assert "underline" not in page and "90%, evidence 3.0" in page


def test_sampling_draws_as_generate_does(captioner):
    model, processor = captioner
    torch.manual_seed(1)
    drawn, _ = described(model, processor, settings=(1, 2.0, 0.9, 12))
    torch.manual_seed(1)
    settings = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "max_new_tokens": 12}
    expected = generated(model, processor, processor(images=noise_images(1)), **settings)
    assert drawn == expected != described(model, processor, settings=(1, 0, 1, 12))[0]


def test_errors_are_shown_as_text_and_the_next_visitor_is_served(captioner):
    settings = app.generation_settings(1, 0, 1, 8)
    with pytest.raises(gr.Error, match="2 &lt;image&gt; placeholders"), app.shown_errors():
        list(app.describe(*captioner, "images", noise_images(1), "<image><image>", settings))
    with pytest.raises(ValueError, match="the language model has places for 128"):  # in the middle of a text
        described(*captioner, settings=(1, 0, 1, 300))
    assert described(*captioner)[0]
    with pytest.raises(gr.Error, match="RuntimeError: out of memory") as shown, app.shown_errors():
        raise RuntimeError("out of memory")
    assert shown.value.print_exception


def test_threads_that_are_left_behind_do_not_mix_mergings(captioner):
    def groups(image):
        _, shown = described(*captioner, [image], (1, 0, 1, 2))
        return [index.tolist() for index in shown.merging.groups]

    expected = [groups(image) for image in noise_images(4)]
    slow = captioner[0].connector.encoder.layer[0].register_forward_hook(lambda *_: time.sleep(0.05))
    explained = [*captioner, "images", noise_images(1), "", "a cat", captioner[1].num_image_tokens]
    with ThreadPoolExecutor(max_workers=4) as executor:
        explaining = executor.submit(app.light_up, *explained)
        assert list(executor.map(groups, noise_images(4))) == expected
        assert explaining.result()
    slow.remove()


def test_a_visitor_who_leaves_stops_the_model(captioner):
    model, processor = captioner
    calls = []
    hook = model.language_model.register_forward_hook(lambda *_: calls.append(time.sleep(0.02)))
    settings = app.generation_settings(1, 0, 1, 80)
    steps = app.describe(model, processor, "images", noise_images(1), "", settings)
    next(steps)
    assert calls == []
    while not next(steps)[0]:
        pass
    steps.close()
    at_close = len(calls)
    time.sleep(0.2)
    hook.remove()
    assert len(calls) == at_close < 40


def test_an_adapter_has_a_page(folder, tmp_path):
    """It shows the merging of the adapter's connector."""
    torch.manual_seed(0)
    adapted = add_lora(EVLGenForConditionalGeneration.from_pretrained(folder), LoraArguments(lora="text"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path)
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path)
    processor = EVLGenProcessor.from_pretrained(folder)
    app.build_page(model, processor, 1)
    _, shown = described(model, processor)
    expected = adapted.base_model.model.get_image_features(processor(images=noise_images(1))["pixel_values"])
    assert np.array_equal(shown.merging.groups[-1], expected.output_index[0, 1:].reshape(4, 4))
    assert len(shown.merging.groups) == 3


def test_a_qformer_that_chooses_has_a_page_and_an_mlp_has_none():
    """It shows what was chosen, and the length of the soft prompt is the number of queries."""
    model = tiny_model(model_type="evlgen_qformer", num_query_tokens=5, num_distinctive_tokens=3)
    processor = tiny_processor(model)
    app.build_page(model, processor, 1)
    _, shown = described(model, processor)
    tower, connector, _ = app.figures(shown).splitlines()[2:]
    assert shown.merging.counts == [17, 5] and "| tower | 17 |" in tower and "| connector | 5 |" in connector
    # Each chosen patch has a number of its own, and all others have the mean's. 0 is the class token.
    assert sorted(shown.merging.groups[1].flatten().tolist()) == [1] * 13 + [2, 3, 4]
    with pytest.raises(ValueError, match="`model_type` is 'evlgen_mlp'"):
        app.build_page(tiny_model(model_type="evlgen_mlp"), processor, 1)


def test_the_page_is_local_and_bounded_and_sends_no_data(folder, monkeypatch):
    launched = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda page, **settings: launched.update(settings, page=page))
    app.main(["--model", str(folder), "--max_mb", "2"])
    assert launched["share"] is False and launched["max_file_size"] == 2 * 2**20
    page = launched["page"]
    # Gradio has no public name for the queue that `page.queue(...)` makes.
    assert not page.analytics_enabled and page._queue.max_size == 16
    assert all(function.concurrency_limit in (1, "default") for function in page.fns.values())
    assert page._queue.default_concurrency_limit == 1
    with pytest.raises(SystemExit):
        app.main(["--model", str(folder), "--max_mb", "0"])
    with pytest.raises(ValueError, match=r"`model`='.*nowhere' cannot be loaded"):
        app.main(["--model", str(folder / "nowhere")])


TRY = 5  # the function of the images to try

CHROMIUM_FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run"
CHROMIUM_FLAGS += " --disable-background-networking --disable-component-update --disable-sync --window-size=1280,1000"

# A process with this file on its path logs every other machine that it contacts.
_LOG_CONTACTS = """
import sys
from pathlib import Path

log = Path(__file__).with_name("contacts.txt")
log.touch()

def log_contact(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and not arguments[1][0].startswith("127."):
        log.write_text(log.read_text() + str(arguments[1]))
    if event == "socket.getaddrinfo" and arguments[0] not in ("localhost", "127.0.0.1"):
        log.write_text(log.read_text() + str(arguments))

sys.addaudithook(log_contact)
"""


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """Runs the real script as a process; returns its address and the log of the machines that it contacts."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(_LOG_CONTACTS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "examples/app.py", "--model", str(folder), "--port", str(port), "--max_mb", "0.1"]
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    log = site / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while not _answers("127.0.0.1", port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"The page does not come up:\n{log.read_text()}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", site / "contacts.txt"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(host, port):
    try:
        connection = http.client.HTTPConnection(host, port, timeout=5)
        connection.request("GET", "/config")
        return connection.getresponse().status == 200
    except OSError:
        return False


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="needs the test extra")
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = paths[0]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in CHROMIUM_FLAGS.split():
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        driver = selenium.Chrome(options=options, service=selenium.ChromeService(paths[1]))
        try:
            yield driver
        finally:
            driver.quit()


# Records each text that the page shows.
_WATCH = """
    window.seen = [];
    setInterval(() => {
        const {value} = document.querySelector("#text textarea, #text input");
        if (value && value !== window.seen.at(-1)) window.seen.push(value);
    }, 1);
"""


def test_the_page_in_a_browser(server, browser, folder):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    address, contacts = server

    def find(selector):
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def wait(condition):
        return WebDriverWait(browser, 60).until(lambda _: condition())

    browser.get(address)
    wait(lambda: find("#file input[type=file]"))[0].send_keys(str(folder / "image.PNG"))
    wait(lambda: len(find("#picture img")) == 1)  # at once, and the sliders of sampling are folded
    assert find("#sampling") and not any(slider.is_displayed() for slider in find("#sampling input"))
    assert "`" not in find("body")[0].text and "images. Its training data is not named" in find("body")[0].text
    browser.execute_script(_WATCH)
    find("#start")[0].click()
    model, processor = (kind.from_pretrained(folder) for kind in (EVLGenForConditionalGeneration, EVLGenProcessor))
    text, merged = described(model, processor, settings=(1, 0, 1, 50))
    wait(lambda: find("#text textarea, #text input")[0].get_attribute("value") == text != "")
    seen = browser.execute_script("return window.seen")
    # As it was streamed. A slow browser draws several pieces at once.
    assert len(seen) > 1 and all(text.startswith(piece) for piece in seen)
    figures = r"tower 17 [\d.]+\nconnector 11 [\d.]+\nlanguage model [\d.]+"
    wait(lambda: re.search(figures, find("#figures")[0].text))

    def drawn_layer(layer):
        """Whether a screenshot shows the overlay, whose lower edge the page's own caption covers."""
        if len(find("#gallery img")) != 1:
            return False
        shown = Image.open(BytesIO(find("#gallery img")[0].screenshot_as_png)).convert("RGB")
        drawn = [image.resize(shown.size) for image, _ in (app.draw_layer(merged, each)[0] for each in range(3))]
        rows = slice(int(0.8 * shown.height))
        off = [np.abs(np.asarray(shown, float) - np.asarray(image, float))[rows].mean() for image in drawn]
        return 4 * off[layer] < min(off[:layer] + off[layer + 1 :])

    wait(lambda: drawn_layer(2))
    number = find("#layer input[type=number]")[0]
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("1", Keys.TAB)
    wait(lambda: drawn_layer(1))
    find("#explain")[0].click()
    wait(lambda: find("#words .place"))

    def opacities():
        """Read at once, since the page may draw the words anew."""
        code = "return [...document.querySelectorAll('#words .place')].map((place) => getComputedStyle(place).opacity)"
        return browser.execute_script(code)

    wait(lambda: set(opacities()) == {"0"} and len(opacities()) == len(find("#words p span")))
    wait(lambda: not find(".generating"))  # the page no longer changes
    ActionChains(browser).move_to_element(find("#words p span")[0]).perform()
    wait(lambda: opacities() == ["1"] + ["0"] * (len(opacities()) - 1))
    find("#start")[0].click()
    wait(lambda: not find("#words .place"))  # they are of the text before
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)  # a telephone
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    table = find("#figures table")[0]
    assert table.rect["x"] + table.rect["width"] <= 390 and table.rect["height"] < 300
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    Image.effect_noise((400, 400), 100).save(folder / "large.png")  # noise cannot be compressed
    for name, message in (("broken.png", "cannot be read"), ("large.png", "exceed the maximum allowed size")):
        for button in find("#file button[aria-label=Clear]"):
            button.click()
        wait(lambda: find("#file input[type=file]"))[0].send_keys(str(folder / name))
        wait(lambda message=message: any(message in toast.text for toast in find(".toast-body")))
    assert not any("Traceback" in toast.text or str(folder) in toast.text for toast in find(".toast-body"))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if url.startswith(("http:", "https:")) and not url.startswith(address)] == []
    assert contacts.read_text() == ""


def call(address, function, data):
    """Calls one of the page's functions as any client may; returns the events of the answer."""
    session = uuid.uuid4().hex
    body = {"data": data, "fn_index": function, "session_hash": session}
    httpx.post(f"{address}/gradio_api/queue/join", json=body).raise_for_status()
    events = httpx.get(f"{address}/gradio_api/queue/data?session_hash={session}", timeout=60)
    return html.unescape(events.text)


def upload(address, path):
    """Uploads a file; returns it as an argument of the page's functions."""
    (stored,) = httpx.post(f"{address}/gradio_api/upload", files={"files": path.open("rb")}).json()
    return {"path": stored, "meta": {"_type": "gradio.FileData"}}


def test_a_client_without_the_page_gets_named_errors(server, folder, tmp_path):
    address, _ = server
    shutil.copy(folder / "broken.png", tmp_path / "refused.png")
    refused = upload(address, tmp_path / "refused.png")
    assert Path(refused["path"]).exists()
    assert "The file 'refused.png' cannot be read" in call(address, 0, [refused])
    assert not Path(refused["path"]).exists()
    assert "The file 'refused.png' is no longer on the server" in call(address, 0, [refused])
    image = upload(address, folder / "image.PNG")
    for prompt, options, message in (
        ("", [11, 0, 1, 8], "'Beams' must be a number from 1 to 10, but is '11'"),
        ("", ["abc", 0, 1, 8], "'Beams' must be a number from 1 to 10, but is 'abc'"),
        ("", [1, True, 1, 8], "'Temperature' must be a number from 0 to 2, but is 'True'"),
        ("", [1, 0, None, 8], "'Top-p' must be a number from 0.05 to 1, but is 'None'"),
        ("", [1, 0, 1, ["<b>"]], "'Max new tokens' must be a number from 1 to 256, but is"),
        ("", [1, 0, 1, 8], "`num_image_tokens` must be from 11 to 11"),
        ("a" * 10_001, [1, 0, 1, 8], "The prompt has 10001 characters"),
        (None, [1, 0, 1, 8], "language model"),
    ):
        budget = 12 if "num_image_tokens" in message else 11  # a slider of one value has another end
        assert message in call(address, 2, [image, prompt, 2, budget, *options])


@pytest.mark.attack
def test_an_image_to_try_is_one_of_the_folder(server):
    address, contacts = server
    (tried,) = completed(call(address, TRY, [1]))
    _, picture, *_ = completed(call(address, 0, [tried]))
    shown = Image.open(BytesIO(httpx.get(picture["value"][0]["image"]["url"]).content)).convert("RGB")
    assert shown == Image.open(sorted((ROOT / "examples" / "images" / "try").iterdir())[1]).convert("RGB")
    for index in (99, "a", None, {"path": "/etc/passwd"}):
        assert '"success":false' in call(address, TRY, [index])
    assert contacts.read_text() == ""


def test_the_page_says_what_the_model_knows(captioner):
    model = tiny_model()
    assert "Its training data is not named." in app.describe_model(model, "mine")
    model.config.training_data = ["my_images", "jxie/coco_captions"]
    title, known = app.describe_model(model, "you/captioner").splitlines()
    assert title.startswith("# ") and "trained on `my_images`, `jxie/coco_captions`." in known
    assert known.startswith("`you/captioner` captions images.") and "17 tokens of an image become 11." in known


def completed(events):
    """What a call of the page's functions returned."""
    (line,) = [line for line in events.splitlines() if '"process_completed"' in line]
    return json.loads(line.removeprefix("data: "))["output"]["data"]


@pytest.mark.attack
def test_visitors_at_the_same_time_get_what_each_gets_alone(server, folder, tmp_path):
    """One of them sends a broken file."""
    address, _ = server
    model, processor = (kind.from_pretrained(folder) for kind in (EVLGenForConditionalGeneration, EVLGenProcessor))
    images = noise_images(5)
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    files = [upload(address, tmp_path / f"{index}.png") for index in range(5)]
    shutil.copy(folder / "broken.png", tmp_path / "refused.png")
    refused = upload(address, tmp_path / "refused.png")
    with ThreadPoolExecutor(max_workers=11) as visitors:
        answers = [visitors.submit(call, address, 2, [file, "", 2, 11, 1, 0, 1, 20]) for file in files]
        error = visitors.submit(call, address, 2, [refused, "", 2, 11, 1, 0, 1, 20])
        previews = [visitors.submit(call, address, 0, [file]) for file in files]
    texts = [completed(answer.result())[0] for answer in answers]
    assert texts == [described(model, processor, [image], (1, 0, 1, 20))[0] for image in images]
    assert len(set(texts)) == 5 and "The file 'refused.png' cannot be read" in error.result()
    for image, shown in zip(images, previews, strict=True):
        (drawn,) = completed(shown.result())[1]["value"]
        assert np.array_equal(Image.open(BytesIO(httpx.get(drawn["image"]["url"]).content)).convert("RGB"), image)


def test_a_request_cannot_make_the_server_fetch_or_read(server):
    address, contacts = server
    for path, message in (("https://example.com/a.png", "URLs are not fetched"), ("/etc/passwd", "not uploaded by")):
        assert message in call(address, 0, [{"path": path, "meta": {"_type": "gradio.FileData"}}])
    assert contacts.read_text() == ""
    assert not _answers("127.0.0.2", int(address.rpartition(":")[2]))  # it listens at one address


def test_the_documented_commands_make_a_space(folder, tmp_path, monkeypatch):
    """The folder has what the Hub asks for and no checkpoint, and the script finds there all that it imports."""
    for name in ("examples", "configuration_evlgen", "modeling_evlgen", "processing_evlgen"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(folder, tmp_path / "outputs" / "demo")
    (tmp_path / "outputs" / "demo" / "checkpoint-2").mkdir()
    text = (ROOT / "docs" / "publish.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(mkdir .*?)```", text, re.DOTALL)
    *commands, publishing, upload = block.splitlines()
    subprocess.run("\n".join(["set -e", *commands]), shell=True, check=True, cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    publish.main(publishing.removeprefix("python examples/publish.py ").split())
    space = tmp_path / "my-space"
    assert upload.split()[:4] == ["hf", "upload", "you/my-space", "my-space"]
    names = {path.name for path in (space / "outputs" / "demo").iterdir()}
    assert "model.safetensors" in names and "checkpoint-2" not in names
    assert len(list((space / "images" / "try").iterdir())) == 3
    _, header, _ = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings, declared = yaml.safe_load(header), (ROOT / "setup.py").read_text()
    assert settings["sdk"] == "gradio" and (space / settings["app_file"]).is_file()
    assert f'"gradio>={settings["sdk_version"].rpartition(".")[0]}"' in declared
    assert all(f'"{needed}"' in declared for needed in (space / "requirements.txt").read_text().split())
    others = ["datasets", "evaluate", "matplotlib", "pycocoevalcap", "tensorboard"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); "
    code += "import app, modeling_evlgen as m; print(m.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True)
    assert Path(result.stdout.strip()).parent == space / "modeling_evlgen", result.stderr
