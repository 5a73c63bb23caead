"""tools/chat.html in a browser, against a live server in this process: turns, stopping, answering again, a phone."""
import pytest

pytest.importorskip("fastapi", reason="the server needs fastapi")
pytest.importorskip("uvicorn", reason="the server needs uvicorn")
from page_hosts import Chromium, chromium  # noqa: E402
from test_serve import CPU, Tap, make_model, one_thread, served, stops, tok  # noqa: E402, F401
from tools.engine import Engine  # noqa: E402


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def live(tok):  # noqa: F811
    """(port, tap) of a server whose model sees 160 tokens."""
    tap = Tap(make_model(tok, max_seq_len=160))
    with served(Engine(tap, stops(tok), 4, 8, CPU), tok) as port:
        yield port, tap


def open_chat(browser, port, **context):
    return Chromium(browser, offline=False, **context).open(f"http://127.0.0.1:{port}/", wait_for="#question")


@pytest.fixture
def chat(browser, live):
    """An open page; an answer is at most 20 tokens."""
    port, tap = live
    host = open_chat(browser, port)
    host.page.click("#gear")
    host.page.fill("#max_tokens", "20")
    host.page.click("#gear")
    yield host
    tap.let(None)
    # a 400 is how it learns that a conversation is too long for the model
    said = [line for line in host.said if "400 (Bad Request)" not in line]
    assert not said, "nothing else is to be said on the console"
    assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in host.asked), "it asks its server alone"
    host.close()


def say(page, text):
    page.fill("#question", text)
    page.press("#question", "Enter")


def answers(page):
    return page.locator("article.assistant .text").all_inner_texts()


def wait_until_done(page, n):
    """Wait until n answers stand there, and the last one is whole: it can be asked for again."""
    page.wait_for_selector(f"article.assistant >> nth={n - 1} >> .retry")
    assert page.inner_text("#send") == "发送" and page.locator("article.assistant").count() == n


def test_three_turns(chat):
    """Each question goes out with the turns before it; where the model has no room for all, the oldest go, and it is
    said."""
    page = chat.page
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    questions = ["春夜", "<b>月</b>", "山水明月好 hello world"]
    for n, question in enumerate(questions, 1):
        say(page, question)
        wait_until_done(page, n)
    assert page.locator("article.user .text").all_inner_texts() == questions  # typed HTML is text
    assert [turn["content"] for turn in sent[1]["messages"]][0::2] == questions[:2]
    assert [turn["role"] for turn in sent[2]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    for n in range(4, 12):
        say(page, "春夜月好坏明天地人山水" * 3)
        wait_until_done(page, n)
    assert "已忘记最早的" in page.locator("article.assistant .foot").last.inner_text()
    # they last: another visit shows them, and a new conversation forgets them
    page.reload()
    wait_until_done(page, 11)
    page.click("#new")
    assert page.locator("article").count() == 0
    # an empty field is no 0: the server takes its own number
    page.click("#gear")
    page.fill("#temperature", "")
    say(page, "春")
    wait_until_done(page, 1)
    assert "temperature" not in sent[-1] and sent[-1]["max_tokens"] == 20


def test_stop_and_answer_again(chat, live):
    page = chat.page
    _, tap = live
    tap.let(4)  # the model makes four steps and then waits
    say(page, "春夜")
    page.wait_for_selector("article.assistant.waiting .text")
    assert page.inner_text("#send") == "停止"
    page.click("#send")
    wait_until_done(page, 1)
    assert page.locator(".foot").last.inner_text().startswith("已停止")
    tap.let(None)
    page.click(".retry")
    wait_until_done(page, 1)  # instead of the answer that was stopped
    assert "已停止" not in page.locator(".foot").last.inner_text()
    first = answers(page)
    page.click(".retry")
    wait_until_done(page, 1)
    assert answers(page) != first and page.locator("article.user").count() == 1  # drawn anew: the temperature is 0.8


def test_a_phone(browser, live):
    port, _ = live
    host = open_chat(browser, port, viewport={"width": 390, "height": 844}, has_touch=True)
    page = host.page
    page.fill("#question", "春夜" * 40)
    page.click("#send")
    wait_until_done(page, 1)
    for opened in range(2):
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("#send", "#question", "#new", "#gear"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844, (opened, name)
        page.click("#gear")
    assert not host.said
    host.close()
