"""The page on a real server: talk, a re-placement, and a worker that dies meanwhile."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.browser import Tab, chromium, find_chromium
from tests.e2e.conftest import READY_S, Server

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path"),
    pytest.mark.timeout(READY_S + 200),
]


def test_talk_move_and_kill(server: Server) -> None:
    assert CHROMIUM is not None
    with chromium(CHROMIUM) as browser, browser.tab() as tab:
        tab.size(1500, 950)
        tab.open(server.url)
        tab.wait("document.querySelector('#status').dataset.kind === 'ready'", 60)
        tab.wait("document.querySelector('#map canvas').height > 50")
        _talk(tab, tokens=64)
        tab.wait("document.querySelector('.message.assistant .foot')?.innerText.includes('64 tokens')", 60)
        # the loads that were counted are seen
        tab.wait("!document.querySelector('#map-caption').innerText.includes(' 0 tokens')", 30)
        _re_place(tab)
        _kill_under_an_answer(server, tab)
        assert tab.messages == []


def _talk(tab: Tab, tokens: int) -> None:
    tab.click("[data-mode=completion]")
    for name, value in (("max_tokens", tokens), ("temperature", 0)):
        tab.js(f"document.querySelector('#set-{name}').value = {value}")
        tab.js(f"document.querySelector('#set-{name}').dispatchEvent(new Event('change'))")
    tab.js("document.querySelector('#set-ignore_eos').checked || document.querySelector('#set-ignore_eos').click()")
    tab.js("document.querySelector('#prompt').focus()")
    tab.type("And it came to pass in those days, that")
    tab.press("Enter", 13)


def _re_place(tab: Tab) -> None:
    """By a planner that deals the experts anew, whatever is gained: cells are outlined where experts have arrived."""
    before = tab.text("#status-text")
    tab.js("document.querySelector('#planner').value = 'round_robin'")
    tab.click("#rebalance")
    tab.wait("document.querySelector('#outcome .operation')?.dataset.phase === 'completed'", 60)
    tab.wait(f"document.querySelector('#status-text').innerText !== {json.dumps(before)}", 30)
    tab.wait("document.querySelector('#operations li b').innerText === 'rebalance'")


def _kill_under_an_answer(server: Server, tab: Tab) -> None:
    _talk(tab, tokens=700)
    answer = "[...document.querySelectorAll('.message.assistant .text')].at(-1).innerText"
    tab.wait(f"{answer}.length > 40", 60)
    victim = next(worker for worker in server.get("/admin/workers") if worker["state"] == "serving")
    os.kill(victim["pid"], signal.SIGKILL)
    row = f"document.querySelector('tr[data-worker={victim['id']}]')"
    tab.wait(f"!{row} || {row}.dataset.state === 'dead'", 60)
    tab.wait("document.querySelector('#operations').innerText.includes('recover')", 60)
    served = "[...document.querySelectorAll('#workers tr[data-state=serving]')].length"
    tab.wait(f"{served} === 3", 120)
    # the answer has gone on to its end, which is where it was asked to stop
    last = "[...document.querySelectorAll('.message.assistant .foot')].at(-1).innerText"
    tab.wait(f"{last}.includes('700 tokens')", 120)
