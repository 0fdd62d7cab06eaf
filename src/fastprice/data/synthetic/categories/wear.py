"""Clothes, shoes, bags, sport."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, choice, number

__all__ = ["WEAR"]

# One attribute a line reads better than one argument a line.
# fmt: off
_CLOTH = choice("material", polyester=0.7, cotton=0.9, denim=1.0, linen=1.15, merino_wool=1.8, leather=2.6)
_SIZES = choice("size", XS=1.0, S=1.0, M=1.0, L=1.0, XL=1.02, XXL=1.05)

WEAR: tuple[Category, ...] = (
    Category(
        "jacket", ("jacket", "rain jacket", "winter parka"), "fashion", 85,
        (
            _CLOTH,
            choice("insulation", none=0.75, synthetic=1.1, down=1.9),
            _SIZES,
            choice("waterproof", yes=1.25, no=0.9),
        ),
        brand_exponent=1.4, interaction=0.3,
    ),
    Category(
        "jeans", ("jeans", "chinos", "work trousers"), "fashion", 48,
        (
            choice("fit", slim=1.0, regular=0.95, relaxed=0.95, tapered=1.08),
            number("waist", "inch", 0.05, 26, 28, 30, 32, 34, 36, 38, 40),
            choice("fabric", stretch_cotton=0.85, denim=1.0, selvedge_denim=2.2),
        ),
        brand_exponent=1.5, pack_sizes=(2,),
    ),
    Category(
        "t-shirt", ("t-shirt", "polo shirt", "long sleeve top"), "fashion", 18,
        (
            choice("material", polyester=0.75, cotton=0.95, organic_cotton=1.3, merino_wool=3.0),
            _SIZES,
            number("fabric weight", "gsm", 0.4, 120, 140, 160, 180, 200, 240),
        ),
        brand_exponent=1.5, pack_sizes=(2, 3, 5, 6),
    ),
    Category(
        "shoes", ("running shoes", "hiking boots", "sneakers"), "fashion", 78,
        (
            choice("upper", mesh=0.85, synthetic=0.75, suede=1.2, leather=1.6),
            number("size", "", 0.05, 6, 6.5, 7, 8, 8.5, 9, 10, 11, 12, 13),
            choice("waterproof", yes=1.25, no=0.94),
            choice("sole", foam=0.9, rubber=1.0, carbon_plate=2.2),
        ),
        brand_exponent=1.4,
    ),
    Category(
        "handbag", ("handbag", "tote bag", "crossbody bag"), "fashion", 95,
        (
            choice("material", canvas=0.45, nylon=0.55, faux_leather=0.7, leather=1.9, suede=1.7),
            number("width", "cm", 0.3, 18, 22, 26, 30, 36, 42),
            choice("lining", none=0.85, cotton=1.0, satin=1.15),
        ),
        brand_exponent=2.2,
    ),
    Category(
        "watch", ("wrist watch", "automatic watch", "chronograph"), "fashion", 160,
        (
            choice("movement", quartz=0.5, solar=0.9, automatic=2.2, hand_wound=1.9),
            choice("case material", plastic=0.35, stainless_steel=1.0, titanium=1.6, gold_plated=1.5),
            number("case size", "mm", 0.1, 34, 36, 38, 40, 42, 44),
            number("water resistance", "m", 0.2, 30, 50, 100, 200, 300),
        ),
        brand_exponent=1.9, interaction=0.4, extras={"with box and papers": 1.15},
    ),
    Category(
        "backpack", ("backpack", "laptop backpack", "hiking pack"), "sport", 62,
        (
            number("volume", "liters", 0.5, 10, 15, 20, 25, 30, 40, 55, 65, 80),
            choice("material", polyester=0.7, nylon=1.0, ripstop_nylon=1.35, canvas=0.9),
            choice("waterproof", yes=1.3, no=0.93),
        ),
        extras={"with rain cover": 1.08},
    ),
    Category(
        "bicycle", ("mountain bike", "road bike", "city bike"), "sport", 430,
        (
            choice("frame", steel=0.55, aluminum=0.95, carbon=2.8, titanium=3.4),
            number("gears", "speed", 0.3, 1, 3, 7, 8, 18, 21, 24, 27),
            number("wheel size", "inch", 0.5, 16, 20, 24, 26, 27.5, 29),
            choice("brakes", rim=0.8, mechanical_disc=1.05, hydraulic_disc=1.4),
            choice("suspension", none=0.9, front=1.1, full=1.7),
        ),
        interaction=0.3, extras={"with lights and lock": 1.05},
    ),
    Category(
        "tent", ("tent", "camping tent", "backpacking tent"), "sport", 135,
        (
            number("persons", "person", 0.55, 1, 2, 3, 4, 6, 8),
            number("weight", "kg", -0.3, 1.2, 1.8, 2.4, 3.5, 5, 7.5),
            number("water column", "mm", 0.25, 1000, 1500, 2000, 3000, 5000),
            choice("season", **{"3": 0.9, "4": 1.6}),
        ),
    ),
    Category(
        "dumbbell", ("dumbbell", "kettlebell", "weight plate"), "sport", 34,
        (
            number("weight", "kg", 0.85, 1, 2, 3, 5, 8, 10, 12, 16, 20, 24, 32),
            choice("material", vinyl=0.8, cast_iron=0.95, rubber=1.15, chrome=1.4),
        ),
        pack_sizes=(2, 3, 4), extras={"with stand": 1.4},
    ),
)
