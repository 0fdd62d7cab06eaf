"""Words of the synthetic catalog that belong to no single category: brands, colors, conditions, sentences.

The brands are invented. A brand's factor on the price is raised to the power of `Category.brand_exponent`.
"""

from __future__ import annotations

__all__ = [
    "BRAND_FACTORS",
    "COLOR_FACTORS",
    "CONDITION_FACTORS",
    "CONDITION_PHRASES",
    "FILLER_SENTENCES",
    "MODEL_WORDS",
    "SELLER_PHRASES",
    "SELLER_SPELLINGS",
]

_TIER_FACTORS = {"budget": 0.68, "low": 0.85, "middle": 1.0, "upper": 1.25, "premium": 1.6, "luxury": 2.3}
_BRAND_NAMES = {
    "computing": {
        "budget": "Zentivo Klypso Orbulex",
        "low": "Ferrowave Datrix Nubelo",
        "middle": "Velkora Havenix Trelloy Quadrel",
        "upper": "Stratagon Ioniqa",
        "premium": "Obsidyne Arkelion",
        "luxury": "Maravox",
    },
    "devices": {
        "budget": "Plinko Zuvio",
        "low": "Tamberly Ekolite",
        "middle": "Norquay Visanto Lumetra",
        "upper": "Kestora Auronix",
        "premium": "Halcyra Sonavelle",
        "luxury": "Orfeon",
    },
    "home": {
        "budget": "Cozily Brimstow",
        "low": "Hearthley Mundano",
        "middle": "Larkmere Ostwick Penhallow Dunmoor",
        "upper": "Calderine Vintro",
        "premium": "Maison Tervane",
        "luxury": "Atelier Osmond",
    },
    "work": {
        "budget": "Grabbit Torkel",
        "low": "Ironvale Bruno-Tec",
        "middle": "Stonegarth Rivetta Halden Works",
        "upper": "Kraftholm Duramont",
        "premium": "Meisterlin",
        "luxury": "Sigvald",
    },
    "wear": {
        "budget": "Basiq Threadly",
        "low": "Urbanello Coastline Co",
        "middle": "Fernwick Alderway Montclay Ridgeback",
        "upper": "Solveig Nine Elms",
        "premium": "Castellane Aurelio",
        "luxury": "Vauquelin",
    },
    "life": {
        "budget": "Jollybee Minikin",
        "low": "Pebblewood Tinkerly",
        "middle": "Brightleaf Harrowby Olivine Wrenfield",
        "upper": "Lindqvist Maplecroft",
        "premium": "Serafina",
        "luxury": "Belmarque",
    },
}
_TWO_WORD_NAMES = ("Maison Tervane", "Atelier Osmond", "Halden Works", "Coastline Co", "Nine Elms")


def _brand_factors(family: str) -> dict[str, float]:
    """Brand name to its factor on the price, for one family of departments."""
    found: dict[str, float] = {}
    for tier, names in _BRAND_NAMES[family].items():
        for pair in _TWO_WORD_NAMES:
            names = names.replace(pair, pair.replace(" ", "_"))
        for order, name in enumerate(names.split()):
            # The brands of one tier differ a little.
            found[name.replace("_", " ")] = _TIER_FACTORS[tier] * (1 + 0.05 * order)
    return found


_FAMILIES = {
    "computing": ("computing",),
    "devices": ("devices",),
    "home": ("home", "furniture", "garden"),
    "work": ("tools", "office", "auto"),
    "wear": ("fashion", "sport"),
    "life": ("toys", "books", "baby", "beauty", "pet", "music"),
}
BRAND_FACTORS: dict[str, dict[str, float]] = {
    department: _brand_factors(family) for family, departments in _FAMILIES.items() for department in departments
}

MODEL_WORDS = (
    "Pro", "Max", "Lite", "Plus", "Air", "Core", "Prime", "Elite", "Nova", "Edge", "Flex", "Ultra", "Classic",
    "Sport", "Studio", "Home", "Force", "Aero", "Vista", "Terra", "Pulse", "Origin", "Atlas", "Comet", "Breeze",
    "Summit", "Harbor", "Ember", "Drift", "Orbit", "Vector", "Onyx", "Ranger", "Silk", "Haven", "Storm", "Echo",
    "Pixel",
)  # fmt: skip

COLOR_FACTORS: dict[str, float] = {
    "Black": 1.0,
    "White": 1.01,
    "Silver": 1.02,
    "Gray": 1.0,
    "Blue": 1.0,
    "Red": 1.0,
    "Green": 0.98,
    "Navy": 1.0,
    "Beige": 0.98,
    "Pink": 0.99,
    "Orange": 0.97,
    "Rose Gold": 1.06,
    "Black / Red": 1.0,
    "White / Silver": 1.02,
    "Matte Black": 1.03,
}

# For each department: condition to (factor on the price, relative frequency).
_SECOND_HAND = {
    "new": (1.0, 62.0),
    "open box": (0.87, 6.0),
    "refurbished": (0.72, 9.0),
    "used": (0.58, 18.0),
    "for parts": (0.26, 5.0),
}
_WORN = {"new": (1.0, 72.0), "new without tags": (0.85, 8.0), "used": (0.5, 20.0)}
_FRESH = {"new": (1.0, 100.0)}
CONDITION_FACTORS = {
    "computing": _SECOND_HAND, "devices": _SECOND_HAND, "home": _SECOND_HAND, "tools": _SECOND_HAND,
    "auto": _SECOND_HAND, "music": _SECOND_HAND, "fashion": _WORN, "sport": _WORN, "furniture": _WORN, "garden": _WORN,
    "toys": _WORN, "books": _WORN, "baby": _WORN, "beauty": _FRESH, "pet": _FRESH, "office": _FRESH,
}  # fmt: skip

# Condition to the phrases that sellers use for it.
CONDITION_PHRASES: dict[str, tuple[str, ...]] = {
    "new": ("new", "brand new", "new in box", "sealed"),
    "new without tags": ("new without tags", "unworn, no tags", "never used, no packaging"),
    "open box": ("open box", "opened, never used", "open-box return"),
    "refurbished": ("refurbished", "factory refurbished", "certified renewed"),
    "used": ("used", "used, good condition", "pre-owned", "second hand, works fine"),
    "for parts": ("for parts or repair", "not working, for parts", "faulty, spares only"),
}

# Sentences and numbers that have nothing to do with the price.
FILLER_SENTENCES = (
    "Ships within {} business days.",
    "Returns accepted for {} days.",
    "Stock number {}.",
    "Rated {} stars by our customers.",
    "Please read the description before ordering.",
    "Colors may look different on your screen.",
    "Orders leave our warehouse in bay {}.",
    "Designed for everyday use.",
    "A great gift for friends and family.",
    "Packaging may vary.",
    "See all {} pictures.",
    "More than {} people looked at this today.",
    "Customer service answers in under {} hours.",
    "Recycle the packaging where facilities exist.",
)

# The same, as private sellers write.
SELLER_PHRASES = (
    "selling because we are moving",
    "smoke free home",
    "pick up only, near exit {}",
    "no trades please",
    "bought it {} months ago for a project",
    "my loss your gain",
    "call after {} pm",
    "works great!!",
    "first come first served",
    "message me with questions",
    "have {} other ads, take a look",
    "cleaning out the garage",
    "posted {} days ago and still available",
)

# Abbreviations and misspellings of private sellers.
SELLER_SPELLINGS = {
    "with ": "w/ ",
    "wireless": "wirless",
    "stainless": "stainlss",
    "quality": "qualty",
    "graphics": "graphix",
    "excellent": "excelent",
    "and ": "& ",
    "memory": "mem",
    "material": "mat.",
}
