"""tools/page.html: what its views show and its buttons do, in Chromium."""
import pytest
import torch

from common.generate import generate
from page_hosts import Chromium
from page_runs import browser, logits_of, made, make, one_thread, opened_in, quantised_models, tok_file  # noqa: F401
from tokenizer import render_chat


@pytest.fixture
def opened(made, request, tmp_path):
    with opened_in("chromium", made.page, request, tmp_path) as host:
        yield host


def chips(page, box="#chips"):
    return page.locator(f"{box} .chip")


def shown_ids(host):
    return host.page.evaluate("state.ids")


def wait(page, expression):
    """Wait until a JavaScript expression is true. playwright's wait_for_function needs eval, which the page forbids."""
    for _ in range(1500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"after 30 seconds still not: {expression}")


def wait_until_read(host):
    wait(host.page, "state.logits !== null && state.stats.length === state.ids.length")


def test_typing_shows_tokens(opened, made):
    tok = made.tok
    page = opened.page
    for text in ("床前明月光", "<img src=x onerror=alert(1)><|im_end|>", "😀𠮷é", "", "▁ \t\n\nsystem user", "床" * 3000):
        page.fill("#text", text)
        wait_until_read(opened)
        room = page.evaluate("roomOf(state.run)")
        expected = ([tok.eot_id] + tok.encode(text))[:room]
        assert shown_ids(opened) == expected
        assert chips(page).count() == len(expected)
        assert ("太长" in page.inner_text("#summary")) == (len(expected) == room)
    assert page.locator("img").count() == 0
    # an emoji in bytes stands together, and is named in words
    page.fill("#text", "😀")
    wait_until_read(opened)
    chips(page).last.click()
    if len(tok.encode("😀")) > 1:
        assert chips(page).last.get_attribute("class").split().count("joined") == 1
        assert "😀" in page.inner_text("#detail")
    # the mode puts the template around it
    page.click("[data-mode=chat]")
    page.fill("#text", "月")
    wait_until_read(opened)
    asked = [{"role": "user", "content": "月"}]
    assert shown_ids(opened) == render_chat(tok, asked, add_generation_prompt=True)[0]


def test_the_next_token(opened, made):
    """Bars append, sliders change what is drawn from, playing greedily says what torch says."""
    path, _, _, tok = made
    models, _ = quantised_models(path)
    page = opened.page
    page.fill("#text", "床前明月光")
    prompt = [tok.eot_id] + tok.encode("床前明月光")
    page.click("[data-view=next]")
    wait_until_read(opened)
    best = logits_of(models[0], prompt)[-1].detach().topk(10).indices.tolist()
    assert page.locator("#bars .bar").count() == 10
    page.locator("#bars .bar").nth(2).click()
    wait_until_read(opened)
    assert shown_ids(opened) == prompt + best[2:3]
    page.click("#clear")
    wait_until_read(opened)
    assert shown_ids(opened) == prompt and page.is_disabled("#clear")
    slide(page, "top_k", 3)
    assert page.locator("#bars .bar.out").count() == 7
    slide(page, "temperature", 0)
    page.keyboard.press("Escape")
    page.locator("body").press(" ")  # the space bar plays
    wait(page, "!playing && state.added.length > 0")
    said = shown_ids(opened)[len(prompt):]
    n = models[0].config.max_seq_len - len(prompt)
    expected, = generate(models[0], [prompt], n, temperature=0, stop_ids=[tok.eot_id, tok.im_end_id])
    assert said == expected


def slide(page, name, value):
    page.evaluate("""([name, value]) => {
        $(name).value = value;
        $(name).dispatchEvent(new Event("input"));
    }""", [name, value])


def test_attention_and_layers(opened, made):
    path, _, _, tok = made
    models, _ = quantised_models(path)
    config = models[0].config
    page = opened.page
    page.fill("#text", "床前明月光，疑是地上霜")
    page.click("[data-view=inside]")
    page.wait_for_selector("#maps button")
    heads = page.locator("#maps button")
    assert heads.count() == config.n_layers * config.n_heads
    chips(page).nth(3).click()
    wait(page, "state.looked && state.looked.at === 3")
    page.locator("#maps button[data-head='1']").click()
    ids = shown_ids(opened)
    seen = {}
    with torch.no_grad():
        logits_of(models[0], ids[:4], seen)
    for at in range(4):
        share = float(chips(page).nth(at).locator("i").inner_text().strip("<%"))
        assert share == pytest.approx(100 * seen["attention"][1, at].item(), abs=0.11)
    assert page.locator("#lens .guess").count() == 5 * (config.n_layers + 1)
    # the frame marks what the last layer says
    assert page.locator("#lens .guess").nth(5 * config.n_layers).get_attribute("class") == "guess final"


def test_from_an_answer_to_its_tokens(opened, made):
    path, paths, judge, tok = made
    page = opened.page
    page.click("[data-view=compare]")
    page.fill("#question", "床前")
    page.click("#ask")
    cards = page.locator("#answers .card")
    wait(page, "document.querySelector('#answers .card:last-child .note').textContent.includes('ln')")
    assert cards.count() == len(paths)
    if judge and page.locator("#answers .score .number").count():  # an answer that fills the model is not scored
        assert page.locator("#answers .score.best").count() >= 1
    card = cards.nth(len(paths) - 1)
    texts = card.locator(".text span")
    texts.first.hover()
    assert "SFT" in card.locator(".note").inner_text()
    n = texts.count()
    texts.nth(n - 1).click()
    wait_until_read(opened)
    prompt = render_chat(tok, [{"role": "user", "content": "床前"}], add_generation_prompt=True)[0]
    ids = shown_ids(opened)
    assert page.evaluate("state.view") == "tokens" and ids[:len(prompt)] == prompt
    room = page.evaluate("roomOf(state.run)")
    assert len(ids) == min(len(prompt) + n, room) and page.evaluate("focus()") == len(ids) - 1
    assert page.evaluate("state.run") == len(paths) - 1 and page.input_value("#run") == str(len(paths) - 1)


def test_the_template_shows_the_mask(opened, made):
    tok = made.tok
    page = opened.page
    page.click("[data-view=template]")
    page.locator("#turns textarea").nth(1).fill("月。")
    page.click("#fewer")
    page.click("#system")
    turns = page.evaluate("turns")
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"] and turns[2]["content"] == "月。"
    for counts in (1, 0):
        ids, mask = render_chat(tok, [*turns[:2], {**turns[2], "weight": counts}])
        room = page.evaluate("roomOf(state.run)")
        wait(page, f"document.querySelectorAll('#row .chip').length === {min(len(ids), room)}")
        classes = [chip.get_attribute("class").split() for chip in chips(page, "#row").all()]
        assert [int("counted" in names) for names in classes] == mask[:room]
        page.locator("#turns input").uncheck()


def test_keys(opened):
    page = opened.page
    wait_until_read(opened)
    page.locator("body").press("3")
    assert page.evaluate("state.view") == "inside"
    page.locator("body").press("1")
    page.locator("body").press("ArrowLeft")
    before = page.evaluate("focus()")
    page.locator("body").press("ArrowRight")
    assert page.evaluate("focus()") == before + 1
    page.locator("body").press("]")
    assert page.evaluate("state.run") == page.evaluate("writers[1]")
    page.locator("#text").press("4")  # in the text it is a character
    assert page.evaluate("state.view") == "tokens" and "4" in page.input_value("#text")
    page.locator("#views [aria-selected=true]").press("ArrowRight")
    assert page.evaluate("state.view") == "next"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits(browser, made, width, theme):
    """Nothing is wider than a phone, and the theme is the system's until its button is pressed."""
    host = Chromium(browser, viewport={"width": width, "height": 844}, color_scheme=theme)
    page = host.open(made.page).page
    for view in ("tokens", "next", "inside", "compare", "template"):
        page.click(f"[data-view={view}]")
        if view == "compare":
            wait(page, "!document.querySelector('#answers .writing')")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != theme
    assert not host.said
    host.close()


def test_old_browsers_are_told(browser, made):
    for missing in ("DecompressionStream", "Worker"):
        host = Chromium(browser)
        host.context.add_init_script(f"delete window.{missing}")
        page = host.open(made.page, wait_for="#old:not([hidden])").page
        assert "太旧" in page.inner_text("#old") and page.is_hidden("#app") and not host.said
        host.close()
