"""Phones, cameras, screens and sound."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, choice, number, number_range

__all__ = ["DEVICES"]

# One attribute a line reads better than one argument a line.
# fmt: off
_YEARS = number_range("model year", "", 150.0, 2012, 2025, 1)
_LINK = choice("connection type", Wired=0.85, Wireless=1.1, Bluetooth=1.15)

DEVICES: tuple[Category, ...] = (
    Category(
        "smartphone", ("smartphone", "phone", "unlocked phone"), "devices", 260,
        (
            number("storage", "GB", 0.35, 16, 32, 64, 128, 256, 512, 1024),
            number("memory", "GB", 0.4, 2, 3, 4, 6, 8, 12, 16),
            _YEARS,
            number("screen size", "inch", 0.6, 4.7, 5.5, 6.1, 6.4, 6.7, 6.9),
            number("battery", "mAh", 0.1, 2800, 3300, 4000, 4500, 5000),
            choice("network", **{"3G": 0.6, "4G": 0.85, "5G": 1.2}),
        ),
        brand_exponent=1.1, interaction=0.4, extras={"with case and charger": 1.04},
    ),
    Category(
        "tablet", ("tablet", "tablet computer"), "devices", 170,
        (
            number("storage", "GB", 0.35, 16, 32, 64, 128, 256, 512),
            number("screen size", "inch", 1.1, 7, 8, 8.4, 10.1, 11, 12.9),
            _YEARS,
            choice("network", **{"Wi-Fi": 0.92, "Wi-Fi + 4G": 1.2}),
        ),
        extras={"with stylus": 1.12},
    ),
    Category(
        "headphones", ("headphones", "headset", "over-ear headphones"), "devices", 75,
        (
            choice("type", **{"Earbud": 0.5, "In Ear": 0.7, "On Ear": 0.85, "Circumaural": 1.4}),
            choice("wireless", yes=1.3, no=0.8),
            choice("noise cancelling", yes=1.5, no=0.85),
            number("battery life", "hours", 0.15, 6, 10, 20, 30, 40, 60),
            choice("microphone", yes=1.05, no=0.95),
            choice("enclosure type", Closed=0.97, Open=1.25),
        ),
        interaction=0.5, brand_exponent=1.2,
    ),
    Category(
        "speakers", ("bookshelf speakers", "Bluetooth speaker", "computer speakers"), "devices", 85,
        (
            number("wattage", "W", 0.6, 5, 10, 20, 24, 42, 60, 100, 200, 400),
            choice("configuration", **{"1.0": 0.75, "2.0": 0.9, "2.1": 1.2, "5.1": 2.3}),
            _LINK,
            choice("water resistant", yes=1.1, no=0.97),
        ),
        brand_exponent=1.1,
    ),
    Category(
        "camera", ("digital camera", "mirrorless camera", "compact camera"), "devices", 420,
        (
            number("resolution", "megapixels", 0.7, 8, 10, 12, 16, 20, 24, 33, 45),
            choice("type", compact=0.4, bridge=0.8, mirrorless=1.6, DSLR=1.3),
            number("zoom", "x", 0.15, 3, 5, 8, 12, 24, 40, 60),
            _YEARS,
        ),
        interaction=0.4, extras={"body only": 0.85, "with two lenses and bag": 1.5, "with memory card": 1.04},
    ),
    Category(
        "smartwatch", ("smartwatch", "fitness watch", "GPS watch"), "devices", 130,
        (
            number("case size", "mm", 0.2, 38, 40, 42, 44, 46, 49),
            choice("gps", yes=1.3, no=0.7),
            choice("case material", plastic=0.7, aluminum=1.0, stainless_steel=1.5, titanium=2.3),
            number("battery life", "days", 0.2, 1, 2, 5, 7, 14, 21),
        ),
        extras={"with spare band": 1.06},
    ),
    Category(
        "television", ("smart TV", "LED TV", "television"), "devices", 420,
        (
            number("screen size", "inch", 1.5, 24, 32, 40, 43, 50, 55, 65, 75, 85),
            choice("panel type", LED=0.7, QLED=1.2, OLED=2.1),
            choice("resolution", **{"720p": 0.6, "1080p": 0.8, "4K": 1.15, "8K": 2.6}),
            number("refresh rate", "Hz", 0.3, 60, 100, 120, 144),
        ),
        interaction=0.3, colored=False, extras={"with wall mount": 1.08},
    ),
)
