"""Toys, books, baby, beauty, pets, music."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, choice, number, number_range

__all__ = ["LIFE"]

# One attribute a line reads better than one argument a line.
# fmt: off

LIFE: tuple[Category, ...] = (
    Category(
        "building-blocks", ("building blocks", "construction set", "model kit"), "toys", 38,
        (
            number("pieces", "piece", 0.75, 40, 80, 150, 250, 400, 650, 900, 1400, 2300),
            number("age", "years", 0.2, 2, 3, 4, 6, 8, 10, 12),
            choice("theme", city=0.95, space=1.1, castle=1.1, farm=0.85, racing=1.05),
        ),
        brand_exponent=0.9, colored=False,
    ),
    Category(
        "board-game", ("board game", "card game", "puzzle"), "toys", 28,
        (
            number("players", "player", 0.1, 1, 2, 4, 5, 6, 8),
            number("play time", "minutes", 0.35, 10, 15, 20, 30, 45, 60, 90, 120),
            choice("language", English=1.0, French=1.0, German=1.0),
        ),
        colored=False, extras={"with expansion": 1.6},
    ),
    Category(
        "book", ("novel", "cookbook", "textbook"), "books", 22,
        (
            choice("binding", paperback=0.65, hardcover=1.3, leather_bound=3.0, spiral=0.85),
            number("pages", "pages", 0.45, 48, 96, 160, 224, 320, 416, 560, 800),
            choice("subject", fiction=0.7, cooking=1.05, history=1.0, medicine=3.2, mathematics=2.3),
            number("edition", "", 0.1, 1, 2, 3, 4, 5),
        ),
        brand_exponent=0.4, colored=False, interaction=0.2,
    ),
    Category(
        "stroller", ("stroller", "pram", "jogging stroller"), "baby", 210,
        (
            choice("type", umbrella=0.4, compact=0.9, jogging=1.3, double=1.6, travel_system=1.7),
            number("weight", "kg", -0.3, 5.5, 6.8, 8, 9.5, 11, 13),
            number("load", "kg", 0.2, 15, 18, 20, 22, 25),
        ),
        brand_exponent=1.3, extras={"with rain cover": 1.05, "with car seat": 1.5},
    ),
    Category(
        "diapers", ("diapers", "training pants", "overnight diapers"), "baby", 24,
        (
            number("count", "count", 0.8, 18, 24, 36, 48, 72, 96, 124, 160),
            number("size", "", 0.12, 1, 2, 3, 4, 5, 6),
            choice("line", basic=0.75, sensitive=1.1, organic=1.5),
        ),
        colored=False, pack_sizes=(2, 3),
    ),
    Category(
        "perfume", ("eau de parfum", "eau de toilette", "cologne"), "beauty", 58,
        (
            number("volume", "ml", 0.6, 10, 15, 30, 50, 75, 100, 150, 200),
            choice("concentration", mist=0.35, toilette=0.85, parfum=1.3),
            choice("scent", citrus=0.9, floral=1.0, woody=1.1, oud=1.5),
        ),
        brand_exponent=1.9, colored=False, interaction=0.2, extras={"tester without cap": 0.75, "gift set": 1.25},
    ),
    Category(
        "skin-care", ("face cream", "serum", "sunscreen"), "beauty", 24,
        (
            number("volume", "ml", 0.45, 15, 20, 30, 50, 75, 100, 150, 200),
            choice("active", aloe=0.7, vitamin_C=1.1, hyaluronic_acid=1.15, retinol=1.4, peptides=1.7),
            choice("skin type", dry=1.0, oily=1.0, sensitive=1.05),
        ),
        brand_exponent=1.7, colored=False, pack_sizes=(2, 3),
    ),
    Category(
        "hair-tool", ("hair dryer", "hair straightener", "beard trimmer"), "beauty", 46,
        (
            number_range("power", "W", 0.3, 40, 2200, 60),
            choice("plates", plastic=0.6, ceramic=1.0, tourmaline=1.25, titanium=1.6),
            number("heat settings", "", 0.2, 1, 2, 3, 5, 6),
            choice("cordless", yes=1.3, no=0.92),
        ),
        brand_exponent=1.4,
    ),
    Category(
        "dog-food", ("dry dog food", "wet dog food", "dog treats"), "pet", 34,
        (
            number("weight", "kg", 0.75, 0.4, 1, 2, 3, 5, 7.5, 10, 12, 15),
            choice("flavor", chicken=0.9, beef=1.0, lamb=1.1, salmon=1.25, venison=1.7),
            choice("recipe", standard=0.8, grain_free=1.2, raw=1.7),
        ),
        colored=False, pack_sizes=(2, 6, 12),
    ),
    Category(
        "cat-tree", ("cat tree", "scratching post", "cat tower"), "pet", 68,
        (
            number("height", "cm", 1.0, 45, 60, 80, 110, 140, 170, 200),
            choice("cover", carpet=0.85, plush=1.0, sisal=1.15),
            number("platforms", "", 0.2, 1, 2, 3, 4, 5, 7),
        ),
    ),
    Category(
        "guitar", ("acoustic guitar", "electric guitar", "bass guitar"), "music", 290,
        (
            choice("body wood", basswood=0.55, mahogany=1.15, spruce=1.0, maple=1.4, rosewood=2.0),
            number("strings", "string", 0.3, 4, 5, 6, 7, 12),
            number("frets", "", 0.1, 19, 20, 21, 22, 24),
            choice("pickups", none=0.8, single_coil=1.0, humbucker=1.25),
        ),
        brand_exponent=1.3, interaction=0.4, extras={"with gig bag": 1.06, "with amplifier": 1.35},
    ),
    Category(
        "digital-piano", ("digital piano", "keyboard piano", "synthesizer"), "music", 360,
        (
            number("keys", "key", 1.2, 25, 37, 49, 61, 73, 76, 88),
            choice("action", unweighted=0.6, semi_weighted=1.0, hammer=1.7),
            number("polyphony", "voices", 0.3, 32, 48, 64, 128, 192, 256),
        ),
        interaction=0.3, extras={"with stand and bench": 1.15},
    ),
)
