"""Builds the shipped image domains (icons, emoji, logos) from an unpacked npm package ``@iconify/json``.

    python tools/build_icons.py PACKAGE_FOLDER [--domain icons] [--out FOLDER] [--sheets FOLDER]

A class of ``icons`` is a concept ("calendar") drawn by many designers; of ``emoji`` an emoji; of ``logos`` a brand.
What the tool does, in order: take the sets with a permissive licence; turn every icon name into a concept (style words
go); render black on white at twice the size and box-filter; keep at most two drawings of a concept per set; drop blank
and near-identical drawings, and those that stand in two classes; rank classes by the number of sets that draw them;
shuffle them into splits by a fixed seed. The result is a function of the package alone: a second run writes the same
bytes. Needs ``resvg-py`` (the ``icons`` extra); tested with version 2.2.535 of the package.
"""

import argparse
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels = NDArray[np.uint8]
SIZE = 32
SEED = 2024
SPLITS = ("train", "val", "test")
OUT = Path(__file__).resolve().parents[1] / "src" / "metapool" / "realdata" / "data"


def words_of(text: str) -> tuple[str, ...]:
    """The words of a table below; what stands in brackets is a remark."""
    return tuple(re.sub(r"\([^)]*\)", "", text).split())


PERMISSIVE = words_of("MIT Apache-2.0 CC0-1.0 CC-BY-4.0 CC-BY-3.0 OFL-1.1 ISC BSD-3-Clause MPL-2.0 Unlicense")

# Animated sets: a still renderer shows their first frame, which is often empty.
ANIMATED = frozenset({"line-md", "svg-spinners", "meteocons"})

# Words of a name that say how something is drawn, not what.
SHAPES = frozenset(words_of("circle circled circular square squared rectangle oval"))
STYLE = SHAPES | set(
    words_of("""outline outlined outlines filled fill solid bold light thin line linear rounded round sharp duotone
    twotone two tone linetone regular alt alternate rtl ltr broken bulk baseline stroke stroked glyph dual color colored
    flat micro mini small large medium big xs sm md lg xl s l o r f 1 2 3 01 02 03 8 10 11 12 14 15 16 18 20 22 24 28 32
    36 40 48 64 96 icon icons remix streamline sketch variant""")
)

# ---------------------------------------------------------------------------------------------------------------------
# icons: names that mean the same drawing; the drawings of the left join the class on the right.
# ---------------------------------------------------------------------------------------------------------------------
ICON_SAME = {
    "email": "mail", "envelope": "mail", "bin": "trash", "trashcan": "trash", "cog": "gear", "magnifier": "search",
    "loupe": "search", "picture": "image", "add": "plus", "house": "home", "reload": "refresh", "information": "info",
    "mic": "microphone", "headphone": "headphones", "print": "printer", "plane": "airplane", "aeroplane": "airplane",
    "bike": "bicycle", "flame": "fire", "bolt": "lightning", "bulb": "lightbulb", "cut": "scissors",
    "scissor": "scissors", "attachment": "paperclip", "funnel": "filter", "chain": "link", "checkmark": "check",
    "tick": "check", "paintbrush": "brush",
}  # fmt: skip

# icons: reason -> names that are no class. Seen on the contact sheets or known to draw what another class draws.
ICON_REJECTED_FOR = {
    "a brand": """facebook twitter instagram youtube android github linkedin google windows paypal telegram dribbble
        tiktok whatsapp pinterest slack behance dropbox figma reddit gitlab discord skype spotify tumblr chrome snapchat
        twitch bitcoin airplay bluetooth x""",
    # Fruit and firm, furniture and cells, handset and mobile, screen and pill, square and hand, gear and sliders,
    # jewel and rhombus, camera and player, red cross and "no", clapperboard and reel, bell and clock, lips and letter …
    "one name, several drawings": """apple table phone tablet stop settings diamond video cross movie alarm pin speaker
        forward message dashboard chart box delete like record bank flash note badge contrast photo block weight target
        hamburger command scale radio expand move monitor tools""",
    # No concept may stand in two classes: the class that stays is in brackets.
    "drawn like another class": """
        person people group users account profile male female (user) edit pen (pencil) document notebook (file, book)
        help (question) notification (bell) time timer watch history (clock) tv desktop computer mobile (laptop)
        headset (headphones) package (cube) brightness (sun) earth world planet (globe) duplicate paste (copy,
        clipboard) label tags (tag) chat comments reply (comment) remove (minus) close cancel times checkbox (plus,
        check) unlink (link) shop basket bag (store, cart) layout columns apps (grid) text (list) suitcase (briefcase)
        sync update repeat rotate undo redo (refresh) export import login logout (download, upload) triangle (play)
        send (airplane) alert exclamation error (warning) wheelchair (accessibility)""",
    "a shape, a direction or a word without a drawing of its own": """dot hexagon octagon pentagon shapes slash
        directions maximize minimize fullscreen compress next backward more enter exit up down left right top bottom
        off on new none default""",
    "letters and figures": """at underline italic strikethrough hash hashtag heading font
        a b c d e g h i j k m n p q t u v w y z 4 5 6 7 9 0""",
}
ICON_REJECTED = frozenset(word for words in ICON_REJECTED_FOR.values() for word in words_of(words))

# ---------------------------------------------------------------------------------------------------------------------
# emoji: sets (those under a share-alike licence, openmoji and emojione-v1, are left out) and names that are no class.
# ---------------------------------------------------------------------------------------------------------------------
EMOJI_SETS = words_of(
    """noto twemoji fluent-emoji-flat fluent-emoji-high-contrast fluent-emoji noto-v1 emojione emojione-monotone fxemoji
    streamline-emojis dinkie-icons"""
)
EMOJI_STYLE = words_of("small 1 2 3 4 5 (not filled: the pixel set's silhouettes are blots)")
EMOJI_REJECTED_WORDS = {
    "signs made of letters, figures or writing": "button keycap input o-clock oclock thirty mark numbers sign",
    "arrows and other directions": "arrow arrows left right up down pointing",
    "the same picture in other colours or numbers": "circle square diamond hearts heart flag suit tone hair",
    "the same person in other clothes": "man men woman women person people couple family kiss",
}
# The picture of another class over again; the class that stays is in brackets.
EMOJI_REJECTED = words_of(
    """cat dog cow horse monkey mouse pig rabbit tiger dragon (their faces) oncoming-taxi (taxi) oncoming-bus minibus
    trolleybus (bus) oncoming-automobile (automobile) clinking-beer-mugs (beer-mug) clinking-glasses (wine-glass)
    full-moon-face first-quarter-moon first-quarter-moon-face last-quarter-moon last-quarter-moon-face new-moon
    new-moon-face (full-moon, crescent-moon) waning-crescent-moon waxing-crescent-moon waning-gibbous-moon
    waxing-gibbous-moon hourglass-done (hourglass-not-done) green-book blue-book orange-book notebook books ledger
    notebook-with-decorative-cover (closed-book) open-file-folder card-index-dividers (file-folder) baby-angel (baby)
    hatching-chick front-facing-baby-chick chicken (baby-chick, rooster) metro light-rail tram tram-car station
    (high-speed-train, railway-car) locomotive train monorail round-pushpin (pushpin) no-bicycles no-mobile-phones
    no-pedestrians no-smoking no-littering non-potable-water (signs with another class in them) e-mail
    incoming-envelope envelope-with-arrow love-letter (envelope) eyes (eye) expressionless-face (neutral-face)
    umbrella-with-rain-drops umbrella-on-ground closed-umbrella (umbrella) musical-notes (musical-note) camel
    camera-with-flash (camera) bell-with-slash (bell) locked-with-key locked-with-pen unlocked (locked)
    mobile-phone-off vibration-mode mobile-phone-with-arrow (mobile-phone) glowing-star (star) video-camera
    (movie-camera) ticket (admission-tickets) speaker-low-volume speaker-medium-volume muted-speaker
    (speaker-high-volume) closed-mailbox-with-raised-flag open-mailbox-with-lowered-flag open-mailbox-with-raised-flag
    admission-tickets derelict-house house (house-with-garden) whale (spouting-whale) spiral-notepad spiral-calendar
    tear-off-calendar (calendar) dizzy-face fish-cake-with-swirl thermometer-face grinning-cat pouting-cat weary-cat
    crying-cat kissing-cat smiling-cat (cat-face) articulated-lorry (delivery-truck) aerial-tramway
    (suspension-railway) zzz aquarius aries cancer capricorn gemini leo libra pisces sagittarius scorpio taurus virgo
    ophiuchus (letters and signs)"""
)

# ---------------------------------------------------------------------------------------------------------------------
# logos: where brands are drawn; other names of the same brand; names under which general sets draw something else.
# ---------------------------------------------------------------------------------------------------------------------
LOGO_SETS = words_of(
    """simple-icons logos devicon devicon-plain skill-icons cib fa-brands fa6-brands fa7-brands bxl file-icons
    vscode-icons material-icon-theme catppuccin nonicons streamline-logos thesvg thesvg-color selfhst"""
)
# General sets that draw brands under plain names.
LOGO_PLAIN_SETS = words_of(
    "ant-design bi fa jam uiw teenyicons akar-icons eva feather grommet-icons zmdi lineicons ci mage"
)
LOGO_STYLE = STYLE | set(words_of("logo logos brand dark plain original block tile monochrome file type text"))
LOGO_CATEGORY = re.compile(r"^(brands?( / logo| logos)?|logos?|social (media|network))$", re.IGNORECASE)
LOGO_SAME = {
    "vuejs": "vue", "facebookmessenger": "messenger", "css3": "css", "html": "html5", "node": "nodejs",
    "next": "nextjs", "nuxtjs": "nuxt", "js": "javascript", "ts": "typescript", "golang": "go",
    "postgres": "postgresql", "reactjs": "react", "amazonaws": "aws", "amazonwebservices": "aws",
    "tailwind": "tailwindcss", "vscode": "visualstudiocode", "googlechrome": "chrome", "firefoxbrowser": "firefox",
    "microsoftedge": "edge", "photoshop": "adobephotoshop", "lightroom": "adobelightroom",
    "illustrator": "adobeillustrator", "googleplaystore": "googleplay", "mongo": "mongodb",
    "raspberry": "raspberrypi", "applesafari": "safari", "weixin": "wechat", "sinaweibo": "weibo", "tencentqq": "qq",
    "vkontakte": "vk", "amazonalexa": "alexa", "googlegmail": "gmail", "nestjs": "nest", "gatsbyjs": "gatsby",
    "angularjs": "angular", "sveltejs": "svelte", "denojs": "deno", "astrojs": "astro", "babeljs": "babel",
    "solidjs": "solid", "preactjs": "preact", "threejs": "three", "d3js": "d3", "emberjs": "ember",
    "electronjs": "electron", "expressjs": "express", "jetbrainsintellij": "intellij", "intellijidea": "intellij",
    "md": "markdown", "py": "python", "rb": "ruby", "cplusplus": "cpp", "c++": "cpp", "c#": "csharp",
    "redhatopenshift": "openshift", "scss": "sass",
}  # fmt: skip
LOGO_REJECTED = words_of(
    # Things and file formats, which other sets draw in their own way; then what draws another class (Windows, Twitter).
    """image key moon rocket signal rss box flask json svg appstore cloud lock target test video font word excel xml
    config database binary audio pdf log zip shell terminal email text yaml home note api search data map bat assembly
    tree settings office access project tex cursor microsoft visualstudio x"""
)


@dataclass
class Drawing:
    """One rendered icon and where it comes from."""

    set_name: str
    name: str
    pixels: Pixels
    """uint8 [C, 32, 32]."""


@dataclass
class Package:
    """The unpacked package: metadata of all sets, icons of a set on demand."""

    folder: Path
    sets: dict[str, dict[str, Any]]
    loaded: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Package":
        """Reads the list of sets; keeps the permissive, still ones."""
        listed = json.loads((folder / "collections.json").read_text())
        allowed = {
            name: entry
            for name, entry in sorted(listed.items())
            if entry["license"].get("spdx") in PERMISSIVE and name not in ANIMATED
        }
        return cls(folder, allowed)

    def icons(self, set_name: str) -> dict[str, Any]:
        """The whole JSON of one set."""
        if set_name not in self.loaded:
            self.loaded[set_name] = json.loads((self.folder / "json" / f"{set_name}.json").read_text())
        return self.loaded[set_name]


# Names ----------------------------------------------------------------------------------------------------------------


def concept_of(name: str, style: frozenset[str] = STYLE) -> str | None:
    """The one word that is left of an icon's name when the style words go; None when none or several are left."""
    left = [word for word in name.split("-") if word not in style]
    return left[0] if len(left) == 1 else None


def plainness(name: str) -> tuple[int, int, str]:
    """Sort key: drawings without a frame around them first, then those with the fewest style words."""
    words = name.split("-")
    return sum(word in SHAPES for word in words), len(words), name


# Drawing --------------------------------------------------------------------------------------------------------------


def render(icons: dict[str, Any], name: str, channels: int) -> Pixels | None:
    """Renders one icon at 64×64 on white and box-filters it to 32×32.

    Returns:
        uint8 [C, 32, 32]; None when it cannot be drawn alone (text needs a font) or is all but blank.
    """
    import resvg_py

    icon = icons["icons"][name]
    if "<text" in icon["body"]:
        return None
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{2 * SIZE}" '
        f'height="{2 * SIZE}" viewBox="{left} {top} {width} {height}" color="#000">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB" if channels == 3 else "L")
    pixels = np.asarray(image, dtype=np.float64).reshape(SIZE, 2, SIZE, 2, channels).mean((1, 3))
    drawn: Pixels = np.rint(pixels).astype(np.uint8).transpose(2, 0, 1)
    ink = np.abs(255.0 - drawn).mean()
    return drawn if ink > 4 and drawn.std() > 12 else None


def signatures(images: Pixels) -> NDArray[np.float64]:
    """Each image box-filtered to 16×16: the coarse picture by which two drawings are compared.

    Args:
        images: uint8 [N, C, 32, 32].

    Returns:
        float64 [N, C·256], whole numbers, so that distances between them are exact.
    """
    count, channels = images.shape[:2]
    coarse = images.reshape(count, channels, SIZE // 2, 2, SIZE // 2, 2).astype(np.float64).mean((3, 5))
    whole: NDArray[np.float64] = np.rint(coarse).reshape(count, -1)
    return whole


def near_identical(images: Pixels, threshold: float) -> list[tuple[int, int]]:
    """Pairs of images whose coarse pictures differ by less than a threshold.

    Args:
        images: uint8 [N, C, 32, 32].
        threshold: root mean square difference of the 16×16 pictures, in grey levels.

    Returns:
        Pairs (i, j), i < j, sorted.
    """
    coarse = signatures(images)
    squares = (coarse**2).sum(1)
    limit = threshold**2 * coarse.shape[1]
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(coarse), 512):
        block = coarse[start : start + 512]
        distance = squares[start : start + 512, None] + squares[None] - 2 * block @ coarse.T
        for i, j in zip(*np.nonzero(distance < limit)):
            if start + int(i) < int(j):
                pairs.append((start + int(i), int(j)))
    return pairs


NEAR = 8.0  # grey levels; by eye: what lies below is one drawing exported twice, few pairs lie between 8 and 14


def distinct(drawings: list[Drawing]) -> list[Drawing]:
    """Drops every drawing that is near-identical to an earlier one that stays."""
    if not drawings:
        return []
    dropped: set[int] = set()
    for first, second in near_identical(np.stack([d.pixels for d in drawings]), NEAR):
        if first not in dropped:
            dropped.add(second)
    return [drawing for k, drawing in enumerate(drawings) if k not in dropped]


def two_of(drawings: list[Drawing]) -> list[Drawing]:
    """At most two of one set's drawings of a concept: the plainest, and the one that differs most from it."""
    kept = distinct(sorted(drawings, key=lambda d: plainness(d.name)))
    unframed = [d for d in kept if plainness(d.name)[0] == plainness(kept[0].name)[0]] if kept else []
    pool = unframed if len(unframed) >= 2 else kept
    if len(pool) <= 2:
        return pool
    coarse = signatures(np.stack([d.pixels for d in pool]))
    return [pool[0], pool[int(np.abs(coarse - coarse[0]).sum(1).argmax())]]


# Classes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """What to build: how names become classes, and how many of them."""

    channels: int
    counts: tuple[int, int, int]
    """Classes in train, val, test."""
    smallest: int
    """Fewest images of a class."""
    largest: int
    """Most images of a class."""
    names: Callable[[Package], dict[str, dict[str, list[str]]]]
    """class -> set -> names of its icons."""


def icon_names(package: Package) -> dict[str, dict[str, list[str]]]:
    """Concepts of the general-purpose sets."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for set_name, entry in package.sets.items():
        if entry.get("category") in {"Logos", "Emoji", "Programming"} and set_name != "codicon":
            continue
        for name, icon in package.icons(set_name)["icons"].items():
            concept = concept_of(name)
            if concept is not None and concept not in ICON_REJECTED and not icon.get("hidden"):
                found[ICON_SAME.get(concept, concept)][set_name].append(name)
    return found


def emoji_names(package: Package) -> dict[str, dict[str, list[str]]]:
    """Single code points, matched across sets by the names that any set gives them."""
    points: dict[str, set[str]] = defaultdict(set)  # name without hyphens -> code points
    title: dict[str, str] = {}  # code point -> name
    for set_name in EMOJI_SETS:
        listed = package.icons(set_name)
        named = {name: point for point, name in listed.get("chars", {}).items() if "-" not in point}
        for name, point in named.items():
            points[name.replace("-", "")].add(point)
            title.setdefault(point, name)
        for alias, entry in listed.get("aliases", {}).items():
            if entry["parent"] in named:
                points[alias.replace("-", "")].add(named[entry["parent"]])
    rejected = {word for words in EMOJI_REJECTED_WORDS.values() for word in words_of(words)}
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for set_name in EMOJI_SETS:
        for name in package.icons(set_name)["icons"]:
            plain = "".join(word for word in name.split("-") if word not in EMOJI_STYLE)
            candidates = points.get(name.replace("-", "")) or points.get(plain, set())
            if len(candidates) != 1:
                continue
            concept = title[next(iter(candidates))]
            if not rejected & set(concept.split("-")) and concept not in EMOJI_REJECTED:
                found[concept][set_name].append(name)
    return found


def logo_names(package: Package) -> dict[str, dict[str, list[str]]]:
    """Brands: names of the logo sets, and what general sets file under brands if a logo set knows the name."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def add(set_name: str, name: str, known: frozenset[str] | None) -> None:
        words = name.split("-")
        if words[0] == "folder" or "wordmark" in words or "horizontal" in words or "opened" in words:
            return
        key = "".join(word for word in words if word not in LOGO_STYLE)
        key = LOGO_SAME.get(key, key)
        if len(key) > 1 and key not in LOGO_REJECTED and (known is None or key in known):
            found[key][set_name].append(name)

    for set_name in LOGO_SETS:
        for name in package.icons(set_name)["icons"]:
            add(set_name, name, None)
    known = frozenset(key for key, sets in found.items() if len(sets) >= 3)
    for set_name in package.sets:
        if set_name in LOGO_SETS or set_name in EMOJI_SETS:
            continue
        listed = package.icons(set_name)
        filed = {
            name
            for title, names in listed.get("categories", {}).items()
            if LOGO_CATEGORY.match(title)
            for name in names
        }
        for name in listed["icons"]:
            marked = {"logo", "brand"} & set(name.split("-"))
            if name in filed or marked or set_name in LOGO_PLAIN_SETS:
                add(set_name, name, known)
    return found


DOMAINS = {
    "icons": Domain(1, (64, 16, 20), 60, 120, icon_names),
    "emoji": Domain(3, (192, 48, 60), 9, 20, emoji_names),
    "logos": Domain(3, (128, 32, 40), 10, 24, logo_names),
}


def draw_class(package: Package, sets: dict[str, list[str]], domain: Domain) -> list[Drawing]:
    """Renders one class: at most two drawings per set, near-identical ones dropped, at most ``largest`` in all."""
    by_set: list[list[Drawing]] = []
    for set_name in sorted(sets):
        icons = package.icons(set_name)
        drawn = []
        for name in sorted(sets[set_name], key=plainness)[:8]:
            pixels = render(icons, name, domain.channels)
            if pixels is not None:
                drawn.append(Drawing(set_name, name, pixels))
        by_set.append(two_of(drawn))
    # First drawings of every set stand before second ones, so that the cap costs no set its only drawing.
    ordered = [d[0] for d in by_set if d] + [d[1] for d in by_set if len(d) > 1]
    return distinct(ordered)


def drop_shared(classes: dict[str, list[Drawing]]) -> dict[str, list[Drawing]]:
    """Drops every drawing that (nearly) stands in two classes, from both."""
    flat = [(name, drawing) for name in sorted(classes) for drawing in classes[name]]
    shared: set[int] = set()
    pairs: Counter[tuple[str, str]] = Counter()
    for first, second in near_identical(np.stack([d.pixels for _, d in flat]), NEAR):
        if flat[first][0] != flat[second][0]:
            shared |= {first, second}
            pairs[flat[first][0], flat[second][0]] += 1
    for (one, other), count in pairs.most_common():
        print(f"  {one} and {other} share {count} drawings: one concept?")
    kept: dict[str, list[Drawing]] = {name: [] for name in classes}
    for k, (name, drawing) in enumerate(flat):
        if k not in shared:
            kept[name].append(drawing)
    return kept


def choose(package: Package, domain: Domain) -> dict[str, list[Drawing]]:
    """The classes of a domain: most widely drawn first, each with enough drawings, until the wanted number."""
    named = domain.names(package)
    ranked = sorted(named, key=lambda concept: (-len(named[concept]), concept))
    wanted = sum(domain.counts)
    chosen: dict[str, list[Drawing]] = {}
    ahead = iter(ranked)
    while len(chosen) < wanted:
        before = len(chosen)
        for concept in ahead:
            if len(named[concept]) * 2 < domain.smallest:
                break
            drawings = draw_class(package, named[concept], domain)
            if len(drawings) >= domain.smallest:
                chosen[concept] = drawings
            if len(chosen) == wanted:
                break
        chosen = {name: d for name, d in drop_shared(chosen).items() if len(d) >= domain.smallest}
        if len(chosen) == before:
            break
    return {
        name: sorted(drawings[: domain.largest], key=lambda d: (d.set_name, d.name))
        for name, drawings in chosen.items()
    }


def split_classes(classes: Iterable[str], counts: tuple[int, int, int]) -> dict[str, list[str]]:
    """Shuffles class names by the fixed seed into train, val and test.

    Returns:
        Split -> sorted class names. With fewer classes than wanted, train is the one that is short.
    """
    names = sorted(classes)
    random.Random(SEED).shuffle(names)
    test, val = counts[2], counts[1]
    parts = {"test": names[:test], "val": names[test : test + val], "train": names[test + val :][: counts[0]]}
    return {split: sorted(parts[split]) for split in SPLITS}


# Output ---------------------------------------------------------------------------------------------------------------


def write_split(path: Path, classes: dict[str, list[Drawing]], names: list[str]) -> None:
    """Writes one split as a compressed archive of ``images``, ``labels`` and ``classes``."""
    images = np.stack([d.pixels for name in names for d in classes[name]])
    labels = np.array([k for k, name in enumerate(names) for _ in classes[name]], dtype=np.int64)
    np.savez_compressed(path, images=images, labels=labels, classes=np.array(names))


def write_sheet(path: Path, classes: dict[str, list[Drawing]], names: list[str], across: int = 36) -> None:
    """Draws a contact sheet: a row per class, evenly chosen drawings, its name in front."""
    sheet = Image.new("RGB", (130 + across * 33, 33 * len(names)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        drawings = classes[name]
        pen.text((2, 33 * row + 10), f"{name[:16]} {len(drawings)}", fill="red")
        for column in range(min(across, len(drawings))):
            drawing = drawings[column * len(drawings) // min(across, len(drawings))]
            pixels = drawing.pixels[0] if len(drawing.pixels) == 1 else drawing.pixels.transpose(1, 2, 0)
            sheet.paste(Image.fromarray(pixels), (130 + 33 * column, 33 * row))
    sheet.save(path)


def write_attribution(path: Path, package: Package, used: dict[str, dict[str, int]]) -> None:
    """Writes the table of sets, with the words of their own metadata.

    Args:
        path: the Markdown file.
        package: where the metadata is.
        used: set -> domain -> number of images.
    """
    lines = [
        "# Attribution of the shipped images",
        "",
        "The arrays `icons-*.npz`, `emoji-*.npz` and `logos-*.npz` hold small renderings (32×32 pixels) of drawings",
        "from the open icon sets below, all under permissive licences, as packaged in `@iconify/json`. Changes made:",
        "rendered, reduced, single-coloured drawings set to black on white. Logos are trademarks of their owners; they",
        "stand here as images to recognise and imply no endorsement.",
        "",
        "| set | title | author | licence (SPDX) | link | images |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(used):
        entry = package.sets[name]
        link = entry["author"].get("url") or entry["license"].get("url", "")
        licence = entry["license"]["spdx"]
        if entry["license"].get("url"):
            licence = f"[{licence}]({entry['license']['url']})"
        counts = ", ".join(f"{domain} {count}" for domain, count in sorted(used[name].items()))
        lines.append(f"| {name} | {entry['name']} | {entry['author']['name']} | {licence} | {link} | {counts} |")
    totals: Counter[str] = Counter()
    for by_domain in used.values():
        totals.update(by_domain)
    lines += ["", "Together: " + ", ".join(f"{domain} {totals[domain]}" for domain in sorted(totals)) + " images."]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Builds the wanted domains and writes arrays, attributions and, where asked, contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package, the folder that holds collections.json")
    parser.add_argument("--domain", choices=list(DOMAINS), action="append", help="build this one only (repeatable)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the arrays")
    parser.add_argument("--sheets", type=Path, help="also write a contact sheet per domain into this folder")
    wanted = parser.parse_args()
    package = Package.open(wanted.package)
    wanted.out.mkdir(parents=True, exist_ok=True)
    used: dict[str, dict[str, int]] = defaultdict(dict)
    for name in wanted.domain or list(DOMAINS):
        domain = DOMAINS[name]
        classes = choose(package, domain)
        splits = split_classes(classes, domain.counts)
        for split, members in splits.items():
            write_split(wanted.out / f"{name}-{split}.npz", classes, members)
        sizes = [len(drawings) for drawings in classes.values()]
        print(f"{name}: {len(classes)} classes, {sum(sizes)} images, {min(sizes)} to {max(sizes)} a class")
        for set_name, count in Counter(d.set_name for drawings in classes.values() for d in drawings).items():
            used[set_name][name] = count
        if wanted.sheets:
            wanted.sheets.mkdir(parents=True, exist_ok=True)
            ranked = list(classes)
            for start in range(0, len(ranked), 50):
                write_sheet(wanted.sheets / f"{name}-{start:03d}.png", classes, ranked[start : start + 50])
    if not wanted.domain:
        write_attribution(wanted.out / "ATTRIBUTION.md", package, used)


if __name__ == "__main__":
    main()
