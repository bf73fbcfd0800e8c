#!/usr/bin/env python3
"""How long a running `cashtag live` takes from a post to the signal that shows it, at a part of what the model can score.

    cashtag live --adapter runs/mine --data /tmp/load &
    python3 scripts/live_load.py --share 0.7 --seconds 60

First it finds the capacity: it posts a burst to /v1/ingest and takes the rate at which the posts are scored. Then it posts
one by one, at random moments (a Poisson process), and reads /v1/stream: a post's event comes behind the signals of the same
checkpoint, so the time between sending a post and reading its event is no less than the time to the visible signal.
`--rate` skips the first step. Python's standard library is all that it needs.
"""

import argparse
import http.client
import json
import random
import threading
import time
from datetime import datetime, timezone
from urllib.parse import urlsplit

SAID = ["beats on earnings and raises its outlook", "misses estimates and cuts its outlook", "will report on Tuesday",
        "is under investigation, says a newspaper", "opens a new plant next year, as planned", "gains after an upgrade"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--symbols", default="AAPL,MSFT,NVDA,AMZN,META,GOOGL,TSLA,JPM,XOM,PFE", help="tickers to write about")
    parser.add_argument("--share", type=float, default=0.7, help="part of the capacity that is used")
    parser.add_argument("--rate", type=float, help="posts a second, instead of a share")
    parser.add_argument("--burst", type=int, default=600, help="posts that the capacity is found with")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--max-p99", type=float, help="fail if the 99th percentile is above this many seconds")
    return parser.parse_args()


class Client:
    def __init__(self, args):
        self.host = urlsplit(args.url).netloc
        self.headers = {"authorization": f"Bearer {args.key}"} if args.key else {}
        self.connection = http.client.HTTPConnection(self.host, timeout=60)

    def ask(self, method, path, body=None):
        self.connection.request(method, path, body, self.headers)
        answer = self.connection.getresponse()
        text = answer.read().decode()
        if answer.status >= 400:
            raise SystemExit(f"{method} {path}: {answer.status} {text}")
        return text

    def scored(self):
        for line in self.ask("GET", "/metrics").splitlines():
            if line.startswith("cashtag_live_posts_scored_total "):
                return int(float(line.split()[1]))
        raise SystemExit("/metrics has no cashtag_live_posts_scored_total")


def post(run, number, symbols):
    text = f"${symbols[number % len(symbols)]} {SAID[number % len(SAID)]}, note {number} of this morning ({run})"
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"id": f"{run}-{number}", "author": f"a{number % 397}", "text": text, "created_at": now})


def find_capacity(client, run, count, symbols):
    """Posts a second while there is always one waiting."""
    before = client.scored()
    client.ask("POST", "/v1/ingest?source=load", "\n".join(post(run, n, symbols) for n in range(count)))
    # The first and the last batch are not counted: they are not full of work.
    marks = {}
    while len(marks) < 2:
        done = client.scored() - before
        for part in (0.15, 0.85):
            if done >= part * count and part not in marks:
                marks[part] = (time.monotonic(), done)
        time.sleep(0.02)
    while client.scored() - before < count:
        time.sleep(0.05)
    (t0, n0), (t1, n1) = marks[0.15], marks[0.85]
    return (n1 - n0) / (t1 - t0)


def listen(args, seen, ready, stop):
    """Notes when the event of each post comes."""
    client = Client(args)
    client.connection.request("GET", "/v1/stream?window=5m", headers=client.headers)
    answer = client.connection.getresponse()
    ready.set()
    kind = None
    while not stop.is_set():
        line = answer.readline().decode()
        if not line:
            raise SystemExit("the stream ended")
        if line.startswith("event: "):
            kind = line[7:].strip()
        elif line.startswith("data: ") and kind == "post":
            seen[json.loads(line[6:])["id"]] = time.monotonic()


def percentile(values, part):
    values = sorted(values)
    return values[min(len(values) - 1, int(part * len(values)))]


def main():
    args = arguments()
    client, symbols = Client(args), args.symbols.split(",")
    run = f"load{int(time.time())}"
    rate = args.rate
    if rate is None:
        capacity = find_capacity(client, run + "c", args.burst, symbols)
        rate = args.share * capacity
        print(f"capacity: {capacity:.1f} posts/s scored; {args.share:.0%} of it: {rate:.1f} posts/s")
    seen, sent, ready, stop = {}, {}, threading.Event(), threading.Event()
    threading.Thread(target=listen, args=(args, seen, ready, stop), daemon=True).start()
    ready.wait(30)
    chance = random.Random(7)
    began = due = time.monotonic()
    number = 0
    while due < began + args.seconds:
        time.sleep(max(0.0, due - time.monotonic()))
        # From when it should have gone out: a slow server must not slow down its own measure.
        sent[f"{run}-{number}"] = due
        client.ask("POST", "/v1/ingest?source=load", post(run, number, symbols))
        number += 1
        due += chance.expovariate(rate)
    deadline = time.monotonic() + 60
    while len(seen.keys() & sent.keys()) < len(sent) and time.monotonic() < deadline:
        time.sleep(0.1)
    stop.set()
    delays = [seen[key] - sent[key] for key in sent if key in seen]
    missing = len(sent) - len(delays)
    if not delays or missing:
        raise SystemExit(f"{missing} of {len(sent)} posts were never seen")
    p99 = percentile(delays, 0.99)
    print(f"{len(sent)} posts in {args.seconds:.0f} s ({len(sent) / args.seconds:.1f}/s): from sending to the visible signal "
          f"p50 {percentile(delays, 0.5):.2f} s, p99 {p99:.2f} s, longest {max(delays):.2f} s")
    print("the server says", json.dumps(json.loads(client.ask("GET", "/v1/overview"))["lag"]))
    if args.max_p99 and p99 > args.max_p99:
        raise SystemExit(f"p99 {p99:.2f} s is above {args.max_p99} s")


main()
