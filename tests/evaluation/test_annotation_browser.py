"""The annotation page in a real headless Chromium: judged by keyboard and by mouse, left, come back to, shared."""

import http.server
import re
import urllib.parse

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from mpo_jax import artifacts
from mpo_jax.evaluation import annotation, annotation_page
from mpo_jax.evaluation.annotation import Store
from tests import browser as browsers
from tests.evaluation import made
from tests.tools import loopback
from tests.tools.pages import served

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> & <b>bold</b> {{ 7*7 }}"
)
TOKEN = "f3b9c1d27a6e4580"


def hostile(name, number):
    return f"{HOSTILE} {name == 'mpo'} {number}"


@pytest.fixture
def judged_page(tmp_path, browser):
    """A page of 20 comparisons, its store, and the browser with nothing remembered."""
    lines = made.rows(20, text=lambda name, number: f"The {'careful' if name == 'mpo' else 'hasty'} reply to {number}. "
                      + "It goes on for a while, as replies do. " * (2 + number % 5))  # fmt: skip
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(lines, [("mpo", "sft")], seed=0)
        with served(annotation_page.create(items, store, 0, "Which reply is better?")) as address:
            browser.get(address)
            browser.execute_script("localStorage.clear()")
            browsers.resize(browser, browsers.WIDE)
            browsers.complaints(browser)
            yield browser, address, items, store


def text(browser, name):
    return browser.find_element(By.ID, name).text


def until(browser, condition):
    return WebDriverWait(browser, 20, 0.02).until(lambda _: condition())


def sign_in(browser, address, name):
    browser.get(address)
    field = browser.find_element(By.ID, "name")
    until(browser, field.is_displayed)
    field.send_keys(name, Keys.ENTER)
    until(browser, lambda: f"as {name}" in text(browser, "who"))


def judge(browser, act):
    """Does something that judges the item shown; waits for the next."""
    before = text(browser, "count")
    act()
    until(browser, lambda: text(browser, "count") != before)


def press(browser, key):
    ActionChains(browser).send_keys(key).perform()


def better_side(browser):
    return "first" if "careful" in text(browser, "reply-first") else "second"


def test_twenty_judgements_by_keyboard_and_mouse_with_a_reload(judged_page):
    """Always for the careful reply, wherever it stands: ten by keys, a reload, ten by mouse; two of them ties."""
    browser, address, items, store = judged_page
    sign_in(browser, address, "ada")
    keys = {"first": [Keys.ARROW_LEFT, "a"], "second": [Keys.ARROW_RIGHT, "B"]}
    for number in range(10):
        assert text(browser, "count") == f"{number} of 20 judged"
        key = "t" if number == 4 else keys[better_side(browser)][number % 2]
        judge(browser, lambda key=key: press(browser, key))
    browser.refresh()
    until(browser, lambda: text(browser, "count") == "10 of 20 judged")
    assert text(browser, "who") == "as ada"
    for number in range(10, 20):
        if number == 12:
            press(browser, "c")
            browser.switch_to.active_element.send_keys("a comment: left, t, u", Keys.ESCAPE)
            assert text(browser, "count") == "12 of 20 judged"  # letters of a comment judge nothing
        name = "tie" if number == 15 else better_side(browser)
        judge(browser, browser.find_element(By.ID, name).click)
    assert browser.find_element(By.ID, "finished").is_displayed()
    found = {judgement.item: judgement for judgement in store.all()}
    assert len(found) == 20
    ties = {items[4].key, items[15].key}
    for item in items:
        assert found[item.key].choice == ("tie" if item.key in ties else "mpo")
    assert {judgement.first for judgement in found.values()} == {"mpo", "sft"}  # the sides were mixed
    assert found[items[12].key].comment == "a comment: left, t, u"
    assert all(judgement.seconds > 0 for judgement in found.values())
    assert browsers.complaints(browser) == []


def test_back_changes_a_judgement(judged_page):
    browser, address, items, store = judged_page
    sign_in(browser, address, "ada")
    for _ in range(2):
        judge(browser, lambda: press(browser, Keys.ARROW_LEFT))
    shown = text(browser, "prompt")
    press(browser, "u")
    until(browser, lambda: items[1].prompt in text(browser, "prompt"))
    assert "chosen" in browser.find_element(By.ID, "first").get_attribute("class")
    browser.find_element(By.ID, "back").click()
    until(browser, lambda: items[0].prompt in text(browser, "prompt"))
    press(browser, Keys.ARROW_RIGHT)
    until(browser, lambda: text(browser, "prompt") == shown)
    choices = [store.get("ada", items[number].key) for number in (0, 1)]
    assert choices[0].choice != choices[0].first and choices[1].choice == choices[1].first
    assert text(browser, "count") == "2 of 20 judged"


def test_by_keyboard_a_judgement_is_taken_back_also_after_a_reload(judged_page):
    browser, address, items, store = judged_page
    sign_in(browser, address, "ada")
    for _ in range(3):
        judge(browser, lambda: press(browser, Keys.ARROW_LEFT))
    bar = browser.find_element(By.ID, "progress")
    assert (bar.get_attribute("aria-valuenow"), bar.get_attribute("aria-valuemax")) == ("3", "20")
    assert not browser.find_element(By.ID, "withdraw").is_enabled(), "nothing was chosen here yet"
    browser.refresh()
    until(browser, lambda: text(browser, "count") == "3 of 20 judged")
    for number in (2, 1):
        press(browser, "u")
        until(browser, lambda number=number: items[number].prompt in text(browser, "prompt"))
    judge(browser, lambda: press(browser, "z"))
    assert text(browser, "count") == "2 of 20 judged" and items[1].prompt in text(browser, "prompt")
    assert not browser.find_elements(By.CSS_SELECTOR, ".choice.chosen")
    assert [each.item for each in store.all()] == [items[0].key, items[2].key]
    judge(browser, lambda: press(browser, "t"))
    assert store.get("ada", items[1].key).choice == "tie" and items[3].prompt in text(browser, "prompt")
    for number in (1, 2, 0):
        press(browser, "u")
        until(browser, lambda number=number: items[number].prompt in text(browser, "prompt"))
    assert not browser.find_element(By.ID, "back").is_enabled()
    assert browsers.complaints(browser) == []


def test_everything_is_reached_by_the_tab_key_alone(judged_page):
    browser, address, _, store = judged_page
    sign_in(browser, address, "ada")
    reached = []
    for _ in range(12):
        press(browser, Keys.TAB)
        reached.append(browser.switch_to.active_element.get_attribute("id"))
        if reached[-1] == "second":
            break
    found = [name for name in reached if name]
    assert found[-6:] == ["prompt", "reply-first", "reply-second", "first", "tie", "second"]
    judge(browser, lambda: press(browser, Keys.ENTER))
    assert len(store.all()) == 1


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_axe_finds_nothing_serious(tmp_path, browser, mode):
    """Signing in, judging, looking back and having judged all, at a desk and on a phone."""
    browsers.dark(browser, mode == "dark")
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(made.rows(2), [("mpo", "sft")], seed=0)
        with served(annotation_page.create(items, store, 0, "Which reply is better?")) as address:
            for size in (browsers.WIDE, browsers.PHONE):
                browsers.resize(browser, size)
                browser.get(address)
                browser.execute_script("localStorage.clear()")
                browser.get(address)
                assert browsers.axe(browser) == [], (mode, size, "sign in")
                sign_in(browser, address, f"ada {size[0]}")
                assert browsers.axe(browser) == [], (mode, size, "judging")
                judge(browser, lambda: press(browser, "t"))
                press(browser, "u")
                until(browser, lambda: items[0].prompt in text(browser, "prompt"))
                assert browsers.axe(browser) == [] and browsers.overflow(browser) <= 0, (mode, size, "looking back")
                browsers.screenshot(browser, tmp_path / f"{mode}_{size[0]}.png")
                press(browser, "n")
                until(browser, lambda: items[1].prompt in text(browser, "prompt"))
                judge(browser, lambda: press(browser, "t"))
                assert browser.find_element(By.ID, "finished").is_displayed()
                assert browsers.axe(browser) == [], (mode, size, "all judged")
    browsers.dark(browser, False)


def test_two_annotators_at_once(judged_page):
    browser, address, items, store = judged_page
    with browsers.chromium() as other:
        sign_in(browser, address, "ada")
        sign_in(other, address, "Björn <b>")
        for _ in range(3):
            judge(browser, lambda: press(browser, Keys.ARROW_LEFT))
            judge(other, lambda: press(other, "t"))
        judge(other, lambda: press(other, "t"))
        assert text(browser, "count") == "3 of 20 judged" and text(other, "count") == "4 of 20 judged"
        assert text(other, "who") == "as Björn <b>"
    assert store.judged("ada") == [item.key for item in items[:3]]
    assert store.judged("Björn <b>") == [item.key for item in items[:4]]


def test_replies_of_html_and_script_are_text(tmp_path, browser):
    lines = made.rows(3, text=hostile)
    for line in lines:
        line["prompt"] = f"{HOSTILE}\n\n  prompt {line['prompt_id']}"
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(lines, [("mpo", "sft")], seed=0)
        with served(annotation_page.create(items, store, 0, "<i>Which?</i>")) as address:
            browser.get(address)
            browser.execute_script("localStorage.clear()")
            sign_in(browser, address, "<img src=x onerror=alert(1)>")
            assert HOSTILE in text(browser, "reply-first") and HOSTILE in text(browser, "prompt")
            assert text(browser, "question") == "<i>Which?</i>"
            assert browser.title == "Which reply is better?"
            assert not browser.find_elements(By.CSS_SELECTOR, "main img, main b, main i, header img, pre *")
            for _ in range(3):
                judge(browser, lambda: press(browser, "t"))
    assert len(store_choices(tmp_path)) == 3


def store_choices(folder):
    with Store(folder / artifacts.ANNOTATIONS) as store:
        return [judgement.choice for judgement in store.all()]


def test_a_failed_save_is_told_and_loses_nothing(judged_page):
    browser, address, _, store = judged_page
    sign_in(browser, address, "ada")
    press(browser, "c")
    browser.switch_to.active_element.send_keys("mine", Keys.ESCAPE)
    browser.execute_script("window.kept = window.fetch; window.fetch = () => Promise.reject(new Error('no network'))")
    press(browser, Keys.ARROW_LEFT)
    until(browser, lambda: "no network" in text(browser, "problem"))
    assert text(browser, "count") == "0 of 20 judged" and store.all() == []
    browser.execute_script("window.fetch = window.kept")
    judge(browser, lambda: press(browser, Keys.ARROW_LEFT))
    assert not browser.find_element(By.ID, "problem").is_displayed()
    assert store.all()[0].comment == "mine"


def test_page_with_a_token(tmp_path, browser):
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(made.rows(3), [("mpo", "sft")], seed=0)
        with served(annotation_page.create(items, store, 0, "Which?", TOKEN), "0.0.0.0") as address:
            browser.get(address)
            browser.delete_all_cookies()
            browser.get(address)
            assert "a token is needed" in browser.page_source and "Question" not in browser.page_source
            browser.get(f"{address}/?token={TOKEN}")
            assert TOKEN not in browser.current_url
            browser.execute_script("localStorage.clear()")
            sign_in(browser, address, "ada")
            judge(browser, lambda: press(browser, "t"))
            assert TOKEN not in browser.execute_script("return document.cookie")
    assert store_choices(tmp_path) == ["tie"]


MAIL = "<!doctype html><title>mail</title><p>You are invited: <a id='link' href='{}'>judge replies</a></p>"


@pytest.fixture
def mail():
    """A page of another site: `localhost`, where the judging page is at `127.0.0.1`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            link = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query).get("to", [""])[0]
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(MAIL.format(link).encode())

        def log_message(self, *_):
            pass

    with loopback.Loopback(Handler) as server:
        yield server.address.replace("127.0.0.1", "localhost")


def test_an_invitation_opens_from_a_mail(tmp_path, browser, mail):
    """A link on a page of another site; the browser keeps a Strict cookie back behind it."""
    with Store(tmp_path / artifacts.ANNOTATIONS) as store:
        items = annotation.items(made.rows(3), [("mpo", "sft")], seed=0)
        with served(annotation_page.create(items, store, 0, "Which?", TOKEN), "0.0.0.0") as address:
            browser.get(address)
            browser.delete_all_cookies()
            browser.get(f"{mail}/?{urllib.parse.urlencode({'to': f'{address}/?token={TOKEN}'})}")
            browser.find_element(By.ID, "link").click()
            until(browser, lambda: browser.title == "Which reply is better?")
            assert TOKEN not in browser.current_url
            browser.execute_script("localStorage.clear()")
            sign_in(browser, address, "ada")
            judge(browser, lambda: press(browser, "t"))
            browser.get(f"{mail}/?{urllib.parse.urlencode({'to': address})}")
            browser.find_element(By.ID, "link").click()  # and again without the token
            until(browser, lambda: browser.title == "Which reply is better?")
            browser.get(mail)
            answer = browser.execute_async_script(POST, f"{address}/api/judgement")
            assert answer != "kept" and len(store.all()) == 1, "a page elsewhere writes nothing with the cookie"


POST = """
const done = arguments[1], body = JSON.stringify({ annotator: "eve", number: 1, choice: "first" });
fetch(arguments[0], { method: "POST", mode: "no-cors", credentials: "include", body })
  .then((answer) => done(answer.ok ? "kept" : `refused ${answer.type}`), (error) => done(`failed ${error}`));
"""


def test_fits_a_desk_and_a_phone(judged_page, tmp_path):
    """Nothing is cut off sideways; on the phone the replies stand one above the other and the buttons stay in reach."""
    browser, address, _, _ = judged_page
    sign_in(browser, address, "ada")
    places = {}
    for name, size in (("wide", browsers.WIDE), ("phone", browsers.PHONE)):
        browsers.resize(browser, size)
        browser.refresh()
        until(browser, lambda: "judged" in text(browser, "count"))
        assert browsers.overflow(browser) <= 0
        places[name] = [browser.find_element(By.ID, part).rect for part in ("reply-first", "reply-second", "tie")]
        assert browsers.screenshot(browser, tmp_path / f"{name}.png").stat().st_size > 10_000
    first, second, _ = places["wide"]
    assert first["y"] == second["y"] and first["x"] < second["x"]
    first, second, tie = places["phone"]
    assert first["x"] == second["x"] and first["y"] < second["y"]
    assert tie["height"] >= 44  # a thumb's width
    judge(browser, browser.find_element(By.ID, "tie").click)
    assert re.fullmatch(r"1 of 20 judged", text(browser, "count"))
