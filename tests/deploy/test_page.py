"""The page in a real Chromium, over a backend in process."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_moe.cluster.messages.requests import GenerateRequest
from elastic_moe.cluster.messages.views import OperationKind
from elastic_moe.cluster.placement import Move, WorkerId
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.optimizer import PLANNERS
from tests.browser import Browser, Tab, chromium, find_chromium
from tests.deploy.moving_cluster import MovingCluster, SeveralGroups, served

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
]

SIZES = {"phone": (390, 844), "laptop": (1366, 768), "wall": (2560, 1440)}
HOSTILE = """# Title

<img src=x onerror="document.title='owned'"><script>document.title='owned'</script>

![remote](http://192.0.2.1/pixel.png) [js](javascript:document.title='owned') [web](https://example.com/a) **bold**

```html
<b onclick=alert(1)>code</b>
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with chromium(CHROMIUM) as running:
        yield running


@contextmanager
def page_of(browser: Browser, backend: MovingCluster, model_dir: Path, **settings: object) -> Iterator[Tab]:
    """The page, with its first snapshot."""
    with served(backend, model_dir, **settings) as url, browser.tab() as tab:
        tab.size(*SIZES["laptop"])
        tab.open(url)
        yield tab


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for what the backend is told."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it has not come"
        time.sleep(0.02)


def shown(tab: Tab) -> None:
    tab.wait("document.querySelector('#status').dataset.kind === 'ready'")
    tab.wait("document.querySelector('#map canvas').height > 50")


def says(text: str, model_dir: Path) -> MovingCluster:
    """A cluster whose answer is `text`."""
    tokens = Tokenizer.load(str(model_dir), None).encode(text, add_special_tokens=False)

    def script(_: GenerateRequest) -> list[int]:
        return tokens

    return MovingCluster(script=script, max_model_len=1024)


def ask(tab: Tab, text: str = "hello") -> None:
    tab.js("document.querySelector('#prompt').focus()")
    tab.type(text)
    tab.press("Enter", 13)


def finished(tab: Tab) -> None:
    tab.wait("document.querySelector('.message.assistant .foot')?.textContent.includes('token')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.timeout(120)
def test_it_fits_and_complains_of_nothing(browser: Browser, model_dir: Path, size: str, scheme: str) -> None:
    large = size == "wall"
    backend = MovingCluster(layers=58, experts=256, size=64, spare=1) if large else MovingCluster()
    with page_of(browser, backend, model_dir) as tab:
        tab.size(*SIZES[size])
        tab.scheme(scheme)
        for view in ("chat", "cluster"):
            tab.click(f"[data-show={view}]")
            assert tab.js("document.documentElement.scrollWidth <= innerWidth")
            # the first link leads past the bar, to what is shown
            links = "[...document.querySelectorAll('.skip')].filter(e => getComputedStyle(e).display !== 'none')"
            tab.js(f"{links}[0].focus()")
            tab.press("Enter", 13)
            assert tab.js("document.activeElement.closest('section').id") == view
        shown(tab)
        background = tab.js("getComputedStyle(document.documentElement).backgroundColor")
        assert (background == "rgb(18, 19, 21)") == (scheme == "dark")
        assert tab.js("document.querySelectorAll('#workers tbody tr').length") == backend.size
        assert tab.messages == []
        assert all(url.startswith(tab.js("location.origin")) for url in tab.requested)


@pytest.mark.timeout(120)
def test_talk_with_hostile_text(browser: Browser, model_dir: Path) -> None:
    with page_of(browser, says(HOSTILE, model_dir), model_dir) as tab:
        shown(tab)
        ask(tab)
        finished(tab)
        answer = ".message.assistant .text"
        assert tab.text(f"{answer} h3") == "Title"
        assert tab.text(f"{answer} strong") == "bold"
        assert "<b onclick" in tab.text(f"{answer} pre")
        assert "<img src=x" in tab.text(answer)
        assert tab.js(f"document.querySelectorAll('{answer} :is(img, script, iframe, [onclick])').length") == 0
        links = tab.js(f"[...document.querySelectorAll('{answer} a')].map(a => [a.href, a.rel])")
        assert links == [["https://example.com/a", "noopener noreferrer nofollow"]]
        assert "tokens/s" in tab.text(".message.assistant .foot")
        assert tab.js("document.title") != "owned"
        assert tab.messages == []
        assert not [url for url in tab.requested if "192.0.2.1" in url]
        # kept in the browser, and asked with what was said before
        tab.command("Page.reload")
        assert "hello" in tab.wait("document.querySelector('.message.user')?.innerText")


@pytest.mark.timeout(120)
def test_stop_and_probabilities(browser: Browser, model_dir: Path) -> None:
    backend = says("again and " * 60, model_dir)
    backend.delay_s = 0.02
    with page_of(browser, backend, model_dir) as tab:
        shown(tab)
        tab.click("[data-mode=completion]")
        tab.click("#set-logprobs")
        ask(tab)
        tab.wait("document.querySelectorAll('.token').length > 3")
        tab.js("document.querySelector('.token').focus()")
        assert "60.7" in tab.text("#tip")
        assert tab.text("#send") == "Stop"
        tab.click("#send")
        assert "you stopped it" in tab.wait("document.querySelector('.foot.foot:not(:empty)')?.innerText")
        tab.wait("document.querySelector('#send').innerText === 'Send'")
        assert backend.requests[0].params.logprobs == 5


COUNT_WORK = """
globalThis.work = 0;
const counted = (owner, name, cost) => {
  const plain = owner[name];
  owner[name] = function (...given) {
    const result = plain.apply(this, given);
    globalThis.work += cost(this, result, given);
    return result;
  };
};
for (const name of ["exec", "test"]) counted(RegExp.prototype, name, (self, result, [text]) => text.length);
for (const name of ["split", "replace", "replaceAll", "trim", "includes"])
  counted(String.prototype, name, (self) => self.length);
for (const name of ["slice", "at"]) counted(String.prototype, name, (self, result) => (result ?? "").length);
counted(String.prototype, "indexOf", (self, result, [, from = 0]) => (result < 0 ? self.length : result) - from + 1);
counted(String.prototype, "startsWith", (self, result, [mark]) => mark.length);
"""
WORK_PER_LETTER = 150


@pytest.mark.timeout(120)
def test_markdown_takes_work_in_proportion_to_its_length(browser: Browser, model_dir: Path) -> None:
    """Texts that make naive parsers take quadratic or exponential time, or nest without end. Letters that are looked
    at are counted, and no time is measured."""
    with page_of(browser, MovingCluster(), model_dir) as tab:
        texts = ["*" * 20_000, "[" * 20_000, "`" * 20_001, "> " * 5_000, "**a " * 5_000, "_a*" * 6_000, "```\n" * 2_001]
        texts += ["| a " * 5_000 + "\n|-|-|\n", "- a\n  " * 2_000, "a|\n" + "-|" * 5_000 + "x", "[" * 20_000 + "](x"]
        texts += ["*a" + " *" * 10_000, "[a](" * 5_000, "# " + "#" * 20_000 + "x", "- " * 10_000 + "x"]
        tab.js(f"(() => {{{COUNT_WORK}}})()")
        for text in texts:
            work = tab.js(
                "import('/page/markdown.js').then(({render}) => { globalThis.work = 0;"
                f" render(document.createElement('div'), {json.dumps(text)}); return globalThis.work; }})"
            )
            assert 0 < work < WORK_PER_LETTER * len(text), text[:10]


@pytest.mark.timeout(120)
def test_experts_move_and_a_worker_dies(browser: Browser, model_dir: Path) -> None:
    backend = MovingCluster()
    with page_of(browser, backend, model_dir) as tab:
        shown(tab)
        before = tab.js("document.querySelector('#map canvas').toDataURL()")
        backend.moves = (Move(layer=0, expert=0, source=WorkerId("w0"), target=WorkerId("w3")),)
        backend.begin(OperationKind.REBALANCE, "requested, by auto")
        assert "w0 → w3: 1" in tab.wait("document.querySelector('#moving').innerText")
        backend.moves = ()
        backend.end()
        backend.swap()
        tab.wait("document.querySelector('#moving').innerText.includes('arrived')")
        tab.wait(f"document.querySelector('#map canvas').toDataURL() !== {json.dumps(before)}")
        backend.dead.add("w1")
        backend.begin(OperationKind.RECOVER, "w1 is lost: its connection ended")
        tab.wait("document.querySelector('tr[data-worker=w1]').dataset.state === 'dead'")
        assert "w1 is lost" in tab.text("#operations li")
        tab.click("#map canvas")
        tab.js("document.querySelector('#map canvas').focus()")
        for key, code in (("ArrowDown", 40), ("ArrowDown", 40), ("Enter", 13)):
            tab.press(key, code)
        assert tab.text("#layer h3") == "Layer 1"
        assert tab.js("document.querySelectorAll('#layer .cell').length") == backend.experts
        assert tab.messages == []


@pytest.mark.timeout(120)
def test_dry_run_do_it_pin_and_scale(browser: Browser, model_dir: Path) -> None:
    backend = MovingCluster()
    wanted = backend.swapped()
    others = [name for name in PLANNERS if name != "auto"]
    with page_of(browser, backend, model_dir) as tab:
        shown(tab)
        assert tab.js("[...document.querySelector('#planner').options].map(o => o.value)") == ["auto", *others]
        tab.click("#dry-run")
        tab.wait("document.querySelectorAll('#outcome figure canvas').length === 2")
        assert "1.50× the mean" in tab.text("#outcome")
        tab.click("#do-it")
        tab.wait("document.querySelector('#outcome .operation')?.dataset.phase === 'completed'")
        assert backend.placed is not None
        assert backend.placed[0] == wanted
        tab.wait("!document.querySelector('#pin').disabled")
        tab.click("#pin")
        tab.wait("document.querySelector('#pin').innerText === 'Unpin'")
        assert backend.placed[1] is True
        tab.click("#pin")
        tab.wait("document.querySelector('#pin').innerText === 'Pin'")
        # another one's operation brings a placement that it pins at its end
        backend.pinned_by = "rebalance-7"
        tab.wait("document.querySelector('#pin').innerText === 'Do not pin'")
        assert "rebalance-7 brings a placement that will be pinned" in tab.text("#scale")
        tab.click("#pin")
        tab.wait("document.querySelector('#pin').innerText === 'Pin'")
        tab.js("document.querySelector('#retire-which').value = 'w2'")
        tab.click("#retire")
        tab.wait("document.querySelector('#outcome .operation b')?.innerText === 'scale'")
        assert backend.scaled == [(None, ("w2",))]
        # four are the most of this backend
        backend.size = 4
        tab.wait("!document.querySelector('#add').disabled")
        assert tab.text("#add") == "Add w2"
        tab.click("#add")
        # the page shows an operation of before, too, so only the backend tells when the request has come
        until(lambda: backend.scaled[-1] == (3, ()))
        tab.wait("!document.querySelector('#set-count').disabled")
        tab.js("document.querySelector('#how-many').value = 4; document.querySelector('#set-count').click()")
        until(lambda: backend.scaled[-1] == (4, ()))


@pytest.mark.timeout(120)
def test_another_group_is_shown_and_changed(browser: Browser, model_dir: Path) -> None:
    second = MovingCluster(layers=3, size=2)
    backend = SeveralGroups(others=(second,))
    workers = "document.querySelectorAll('#workers tbody tr').length"
    with page_of(browser, MovingCluster(), model_dir) as tab:
        shown(tab)
        assert tab.js("document.querySelector('#engines').hidden")
    with page_of(browser, backend, model_dir) as tab:
        shown(tab)
        names = "[...document.querySelector('#engine').options].map(o => o.textContent)"
        assert tab.js(names) == ["Group 0 of 2", "Group 1 of 2"]
        tab.js("document.querySelector('#engine').value = '1'")
        tab.js("document.querySelector('#engine').dispatchEvent(new Event('change'))")
        tab.wait(f"{workers} === 2")
        assert tab.text("#map-caption").startswith("3 layers of 16 experts on 2 workers")
        assert tab.js("document.querySelector('#moving').innerText") == ""
        tab.js("document.querySelector('#retire-which').value = 'w1'")
        tab.click("#retire")
        until(lambda: second.scaled == [(None, (WorkerId("w1"),))])
        assert backend.scaled == []
        # with the group that is shown the choice ends
        backend.others = ()
        tab.click("[data-show=cluster]")
        second.done = []
        tab.js("document.querySelector('#engine').dispatchEvent(new Event('change'))")
        tab.wait(f"{workers} === 4")
        assert tab.js("document.querySelector('#engines').hidden")


@pytest.mark.timeout(120)
def test_the_key_is_asked_for_and_kept_for_the_tab_alone(browser: Browser, model_dir: Path) -> None:
    keys = {"admin_api_key": "sesame", "admin_read_key": "sesame"}
    with page_of(browser, MovingCluster(), model_dir, **keys) as tab:
        tab.wait("document.querySelector('#ask').open")
        tab.js("document.querySelector('#ask-key').focus()")
        tab.type("sesame")
        tab.press("Enter", 13)
        shown(tab)
        assert tab.js("Object.values(sessionStorage)") == ["sesame"]
        assert "sesame" not in tab.js("JSON.stringify({...localStorage}) + location.href + document.cookie")
        assert not [url for url in tab.requested if "sesame" in url]


@pytest.mark.timeout(120)
def test_it_follows_again_after_the_server_was_gone(browser: Browser, model_dir: Path) -> None:
    with browser.tab() as tab:
        with served(MovingCluster(), model_dir) as url:
            port = int(url.rpartition(":")[2])
            tab.open(url)
            shown(tab)
        tab.wait("!document.querySelector('#stale').hidden")
        with served(replace(MovingCluster(), epoch=7), model_dir, at_port=port):
            tab.wait("document.querySelector('#status-text').innerText.includes('epoch 7')", 40)
            assert tab.js("document.querySelector('#stale').hidden")


@pytest.mark.skipif(importlib.util.find_spec("axe_core_python") is None, reason="axe-core-python is not installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.timeout(120)
def test_axe_finds_no_serious_fault(browser: Browser, model_dir: Path, scheme: str) -> None:
    spec = importlib.util.find_spec("axe_core_python")
    assert spec is not None
    assert spec.origin is not None
    axe = (Path(spec.origin).parent / "axe.min.js").read_text()
    with page_of(browser, says("Some **bold** words.", model_dir), model_dir) as tab:
        tab.scheme(scheme)
        shown(tab)
        tab.click("#settings-open")
        ask(tab)
        finished(tab)
        tab.click("#dry-run")
        tab.wait("document.querySelectorAll('#outcome figure canvas').length === 2")
        tab.click("#map canvas")
        tab.js(axe)
        found = tab.js("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
        assert [fault for fault in found if fault[0] in ("serious", "critical")] == []
