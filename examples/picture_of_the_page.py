"""Record the picture of the page that README shows.

    emoe serve --workers 4 --rebalance-interval 0        # in another terminal
    python -m examples.picture_of_the_page [--out docs/page.png] [--scheme dark]

Needs Chromium. Clients keep the built-in model busy with Bible verses; the page is opened, a text is begun on it, and
after some seconds a re-placement is asked for there: the picture is taken when its experts have just arrived.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
import time
import urllib.request
from pathlib import Path

from elastic_moe.cluster.setting import DAY_S, number_flag, path_flag
from elastic_moe.deploy.calls.requests import URL
from examples.change_of_subject import PROMPTS, server_flag
from tests.browser import Tab, chromium, find_chromium

WIDTH, HEIGHT, SCALE = 1440, 900, 1.25
CLIENTS = 6
TEXT = "And it came to pass in those days, that"


def keep_busy(url: str, prompts: tuple[str, ...], until: threading.Event) -> None:
    """One client: answers of 96 tokens, one after another."""
    for prompt in itertools.cycle(prompts):
        if until.is_set():
            return
        body = {"prompt": prompt, "max_tokens": 96, "temperature": 0.8, "ignore_eos": True}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            response.read()


def play(tab: Tab, url: str, *, scheme: str, seconds: float) -> None:
    """Everything until the moment that is to be seen."""
    tab.size(WIDTH, HEIGHT, SCALE)
    tab.scheme(scheme)
    tab.open(url)
    tab.wait("document.querySelector('#status').dataset.kind === 'ready'", 60)
    tab.click("[data-mode=completion]")
    time.sleep(seconds)
    tab.js("document.querySelector('#prompt').focus()")
    tab.type(TEXT)
    tab.press("Enter", 13)
    tab.wait("document.querySelector('.message.assistant .foot')?.innerText.includes('token')", 120)
    tab.js("document.activeElement.blur()")
    tab.click("#rebalance")
    tab.wait("document.querySelector('#moving').innerText.includes('arrived')", 90)
    tab.js("document.querySelector('#cluster').scrollTop = 0")
    time.sleep(0.6)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the picture of the page that README shows.")
    parser.add_argument("--url", type=server_flag, default=URL, help=f"address of the server ({URL})")
    parser.add_argument(
        "--out", type=path_flag, default=Path("docs/page.png"), help="file for the picture (docs/page.png)"
    )
    parser.add_argument("--scheme", choices=("light", "dark"), default="light", help="the page's colours (light)")
    parser.add_argument(
        "--seconds", type=number_flag(float, 0, DAY_S), default=90.0,
        help="how long the page runs before the re-placement (90)",
    )  # fmt: skip
    args = parser.parse_args()
    path = find_chromium()
    if path is None:
        sys.exit("this needs Chromium on the path")
    until = threading.Event()
    prompts = PROMPTS["Bible"]
    clients = [
        threading.Thread(target=keep_busy, args=(args.url, prompts[n % len(prompts) :] + prompts, until))
        for n in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    try:
        with chromium(path) as browser, browser.tab() as tab:
            play(tab, args.url, scheme=args.scheme, seconds=args.seconds)
            tab.picture(args.out)
    finally:
        until.set()
        for client in clients:
            client.join()
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
