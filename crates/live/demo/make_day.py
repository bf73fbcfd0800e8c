#!/usr/bin/env python3
"""Makes day.jsonl from the hand-written texts in texts/.

It invents no text. It gives each text a time inside its section, an author and an id, and adds what real streams add:
retweets ("RT @author: text"), headlines pasted by other accounts, quotes, and the repetitions of spam bursts. Everything
follows from the texts and one constant seed, so the same texts give the same file.

    python3 crates/live/demo/make_day.py            # writes day.jsonl beside this script
    python3 crates/live/demo/make_day.py --check    # fails if day.jsonl is not what the texts give
"""

import datetime
import hashlib
import json
import math
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
DAY = datetime.datetime(2026, 11, 17, tzinfo=datetime.timezone.utc)
SEED = "cashtag demo day 1"
# X counts ids from this millisecond, 22 bits below the time.
SNOWFLAKE_EPOCH_MS = 1_288_834_974_657
MAX_TEXT = 280

WIRES = ["meridian_wire", "tape_headlines", "firstprint", "bellwether_desk", "street_brief"]
VOICES = """
slowmoney_ana lotsize_one basis_point_ben the_tape_reader gammagoblin oddlot_olga vwap_vera carry_on_kofi bagholder_bill
thetadecay_tess rangebound_raj latecycle_lu softlanding_sam marginofsafety_mo overnight_ola limit_down_lena bidask_bruno
kiosk_capital petrichor_pm tinyhedgefund dividend_dmitri the_quiet_quant spread_sheet_sue pennywise_pia fomo_farid
rollingcalls_ro cashgang_carl ten_k_reader footnote_fiona closing_auction_chi premarket_pete tickbytick_tova
value_trap_vic momentum_mia chartcat_77 plumber_of_markets nightshift_noor boglehead_bea breadth_watcher drawdown_dan
ergodic_erik convexity_cleo haircut_hana longonly_leo repo_rita swing_suki stoploss_stan curve_steepener tail_risk_tim
wheelhouse_wanda yolo_yusuf zerodte_zoe semi_cycle_simon fab_floor_fred biobeaker_bo trial_reader_tara labcoat_lars
grid_watt_greta crude_awakening_cy retail_therapist_ren branch_banker_abe car_guy_karim autobahn_aya soup_and_stocks
patient_capital_pat contrarian_coco index_hugger_ines skeptic_sven desk_plant_trader second_screen_sid rookie_rosa
grumpy_pm_gus dadtrader_dov tape_bomb_tuan coffee_and_calls sidelines_sofia half_kelly_hugo turnover_tax_tea
""".split()


def chance(*key):
    """A number in [0, 1) that is a function of what it is for."""
    digest = hashlib.sha256("|".join([SEED, *map(str, key)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def author_for(key, avoid=()):
    """A few people post much, most little: ranks are drawn with a falling density, and suffixes make a long tail."""
    for attempt in range(50):
        u = chance("author", key, attempt)
        rank = int(len(VOICES) * 5 * u**1.6)
        name = VOICES[rank % len(VOICES)]
        generation = rank // len(VOICES)
        name = name if generation == 0 else f"{name}{['', '_', '_x', '_fm', '_irl'][generation]}"
        if name not in avoid:
            return name
    raise AssertionError("no author left")


def seconds(clock):
    hours, minutes = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes)


def sections():
    for path in sorted((HERE / "texts").glob("*.txt")):
        section = None
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line or line.startswith("# "):
                continue
            if line.startswith("## "):
                if section:
                    yield section
                start, peak, end, shape, name = line[3:].split()
                section = {"start": seconds(start), "peak": seconds(peak), "end": seconds(end), "shape": shape, "name": name,
                           "lines": []}
                continue
            found = re.fullmatch(r"([-=>]|!\d+) (.+)", line)
            if not found or section is None:
                sys.exit(f"{path.name}:{number}: expected '- text', '= text', '> text' or '!N text', found {line!r}")
            if len(found[2]) > MAX_TEXT:
                sys.exit(f"{path.name}:{number}: {len(found[2])} characters, at most {MAX_TEXT} allowed")
            section["lines"].append((found[1], found[2]))
        if section:
            yield section


def moment(section, index, count, text):
    """Order is kept. `even` spreads over the section; `decay` is quiet before the peak and thins out exponentially after."""
    u = (index + chance("jitter", section["name"], text)) / count
    start, peak, end = section["start"], section["peak"], section["end"]
    if section["shape"] == "even":
        return start + u * (end - start)
    before = 0.03
    if u < before:
        return start + (peak - start) * u / before
    v = (u - before) / (1 - before)
    rate = 3.2
    return peak + (end - peak) * -math.log(1 - v * (1 - math.exp(-rate))) / rate


def reach(kind, text):
    """How often a text is shared: most never, a few very often."""
    u = chance("reach", text)
    if kind == "=":
        return 3 + int(14 * u**2)
    if u < 0.52:
        return 0
    if u < 0.78:
        return 1 + int(2 * chance("reach2", text))
    if u < 0.94:
        return 3 + int(4 * chance("reach2", text))
    return 8 + int(14 * chance("reach2", text))


def delay(text, i):
    """Seconds from a post to its i-th retweet: half a minute for most, many minutes for some."""
    u = min(chance("delay", text, i), 0.995)
    return 6 - 95 * math.log(1 - u) * (1 + 3 * chance("late", text, i) ** 4)


def posts():
    for section in sections():
        lines = section["lines"]
        previous = None
        for index, (kind, text) in enumerate(lines):
            at = moment(section, index, len(lines), text)
            if kind.startswith("!"):
                spammer = author_for(("spam", text)) + "_vip"
                for i in range(int(kind[1:])):
                    yield at, spammer, text
                    at += 2 + 7 * chance("burst", text, i)
                continue
            if kind == ">":
                author = author_for(text, avoid={previous[1]})
                # As people quoted before there was a button for it.
                yield previous[0] + delay(text, 0), author, f"{text} RT @{previous[1]}: {previous[2]}"
                continue
            author = WIRES[int(len(WIRES) * chance("wire", text))] if kind == "=" else author_for(text)
            yield at, author, text
            previous = (at, author, text)
            used = {author}
            if kind == "=":
                # The other headline accounts carry the same line, word for word, within a minute.
                for i, wire in enumerate(w for w in WIRES if w != author and chance("carry", w, text) < 0.6):
                    yield at + 1 + 40 * chance("carry", text, i), wire, text
            elif chance("paste", text) < 0.03:
                yield at + delay(text, "paste"), author_for(("paste", text), avoid=used), text
            for i in range(reach(kind, text)):
                sharer = author_for((text, i), avoid=used)
                used.add(sharer)
                yield at + delay(text, i), sharer, f"RT @{author}: {text}"


def lines():
    day = sorted(posts(), key=lambda p: (round(p[0] * 1000), p[1], p[2]))
    last_id = 0
    for at, author, text in day:
        ms = round(at * 1000)
        created = DAY + datetime.timedelta(milliseconds=ms)
        snowflake = max((int(created.timestamp() * 1000) - SNOWFLAKE_EPOCH_MS) << 22, last_id + 1)
        last_id = snowflake
        post = {"id": str(snowflake), "author": author,
                "created_at": created.strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z", "text": text}
        yield json.dumps(post, ensure_ascii=False, separators=(",", ":")) + "\n"


def main():
    text = "".join(lines())
    target = HERE / "day.jsonl"
    if "--check" in sys.argv[1:]:
        if target.read_text(encoding="utf-8") != text:
            sys.exit(f"{target} is not what the texts give\nhint: python3 {sys.argv[0]}")
        return
    target.write_text(text, encoding="utf-8")
    distinct = sum(1 for s in sections() for _ in s["lines"])
    print(f"{text.count(chr(10))} posts from {distinct} written texts: {target}")


if __name__ == "__main__":
    main()
