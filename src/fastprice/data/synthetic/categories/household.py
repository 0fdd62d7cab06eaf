"""Kitchen, home, furniture, garden."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, choice, number, number_range

__all__ = ["HOME"]

# One attribute a line reads better than one argument a line.
# fmt: off
_METALS = choice("material", plastic=0.6, aluminum=0.9, stainless_steel=1.2, cast_iron=1.4, copper=1.8)
_WOODS = choice("material", particle_board=0.55, metal=0.8, bamboo=0.95, solid_pine=1.1, solid_oak=1.7, walnut=2.2)

HOME: tuple[Category, ...] = (
    Category(
        "blender", ("blender", "countertop blender", "hand blender"), "home", 65,
        (
            number_range("power", "W", 0.7, 250, 1800, 50),
            number("capacity", "liters", 0.3, 0.5, 0.7, 1, 1.5, 1.8, 2),
            number("speeds", "", 0.15, 1, 2, 3, 5, 8, 10),
            choice("jar", plastic=0.8, glass=1.1, stainless_steel=1.4),
        ),
    ),
    Category(
        "coffee-maker", ("coffee maker", "espresso machine", "drip coffee machine"), "home", 110,
        (
            choice("type", drip=0.5, pod=0.8, french_press=0.35, espresso=1.8),
            number("cups", "cup", 0.25, 1, 2, 4, 8, 10, 12),
            number("pressure", "bar", 0.3, 3, 9, 15, 19, 20),
            choice("grinder", yes=1.8, no=0.85),
        ),
        interaction=0.4, extras={"with milk frother": 1.15},
    ),
    Category(
        "cookware", ("frying pan", "saucepan", "stock pot"), "home", 42,
        (
            number("diameter", "cm", 0.9, 16, 18, 20, 24, 26, 28, 30, 32),
            _METALS,
            choice("coating", none=1.0, non_stick=1.0, ceramic=1.15, enamel=1.3),
            choice("lid", yes=1.15, no=0.92),
        ),
        pack_sizes=(2, 3, 5), interaction=0.3,
    ),
    Category(
        "kitchen-knife", ("chef knife", "bread knife", "santoku knife"), "home", 45,
        (
            number("blade length", "inch", 0.6, 3.5, 5, 6, 7, 8, 10),
            choice("steel", stamped=0.4, forged_stainless=1.0, high_carbon=1.4, damascus=2.3),
            choice("handle", plastic=0.8, pakkawood=1.1, rosewood=1.3),
        ),
        pack_sizes=(2, 3, 6), extras={"with sheath": 1.1, "with knife block": 1.6},
    ),
    Category(
        "vacuum-cleaner", ("vacuum cleaner", "cordless vacuum", "robot vacuum"), "home", 170,
        (
            choice("type", handheld=0.4, upright=0.9, canister=1.0, cordless_stick=1.2, robot=1.6),
            number_range("power", "W", 0.3, 100, 2000, 50),
            number("dust capacity", "liters", 0.1, 0.4, 0.6, 1, 2, 3.5, 5),
            number("noise", "dB", -0.5, 58, 64, 70, 76, 82),
        ),
    ),
    Category(
        "lamp", ("table lamp", "floor lamp", "desk lamp"), "home", 45,
        (
            number("height", "cm", 0.6, 28, 35, 42, 50, 65, 120, 150, 170),
            choice("material", plastic=0.6, ceramic=1.0, brass=1.6, glass=1.2, wood=1.1),
            number("brightness", "lumens", 0.2, 200, 400, 600, 800, 1100, 1600),
            choice("dimmable", yes=1.12, no=0.95),
        ),
        pack_sizes=(2,),
    ),
    Category(
        "bedding", ("sheet set", "duvet cover", "comforter"), "home", 55,
        (
            choice("bed size", Twin=0.75, Full=0.9, Queen=1.05, King=1.25),
            choice("material", microfiber=0.55, cotton=1.0, bamboo=1.3, linen=2.0, silk=3.2),
            number("thread count", "", 0.3, 180, 200, 300, 400, 600, 800, 1000),
            number("pieces", "piece", 0.25, 1, 2, 3, 4, 6, 7),
        ),
        interaction=0.4,
    ),
    Category(
        "towel", ("bath towel", "hand towel", "beach towel"), "home", 14,
        (
            number("weight", "gsm", 0.6, 350, 400, 500, 600, 700, 800),
            choice("material", microfiber=0.7, cotton=0.95, egyptian_cotton=1.5, bamboo=1.3),
            number("length", "cm", 0.7, 50, 70, 100, 130, 140, 160),
        ),
        pack_sizes=(2, 4, 6, 8),
    ),
    Category(
        "desk", ("desk", "computer desk", "standing desk"), "furniture", 210,
        (
            number("width", "cm", 0.9, 80, 100, 120, 140, 160, 180),
            _WOODS,
            choice("height adjustable", no=0.8, manual=1.2, electric=1.9),
            number("drawers", "", 0.12, 1, 2, 3, 4),
        ),
        interaction=0.3,
    ),
    Category(
        "chair", ("office chair", "dining chair", "gaming chair"), "furniture", 130,
        (
            choice("upholstery", mesh=0.9, fabric=0.85, faux_leather=1.0, leather=2.4, velvet=1.2),
            number("load", "kg", 0.3, 90, 100, 110, 120, 136, 150, 180),
            choice("lumbar support", none=0.75, fixed=1.0, adjustable=1.5),
            choice("armrests", none=0.85, fixed=1.0, **{"4D": 1.35}),
        ),
        pack_sizes=(2, 4, 6),
    ),
    Category(
        "bookshelf", ("bookshelf", "bookcase", "storage shelf"), "furniture", 95,
        (
            number("shelves", "tier", 0.5, 2, 3, 4, 5, 6, 7),
            _WOODS,
            number("height", "cm", 0.5, 60, 80, 110, 150, 180, 200),
            number("width", "cm", 0.4, 40, 60, 80, 100, 120),
        ),
        interaction=0.3,
    ),
    Category(
        "mattress", ("mattress", "foam mattress", "hybrid mattress"), "furniture", 380,
        (
            choice("bed size", Twin=0.65, Full=0.85, Queen=1.05, King=1.35),
            number("thickness", "inch", 0.8, 4, 6, 8, 10, 12, 14),
            choice("filling", foam=0.7, memory_foam=0.95, pocket_springs=1.15, latex=1.9),
            choice("firmness", soft=1.0, medium=1.0, firm=1.0),
        ),
        interaction=0.3, colored=False,
    ),
    Category(
        "garden-hose", ("garden hose", "expandable hose", "soaker hose"), "garden", 32,
        (
            number("length", "feet", 0.7, 15, 25, 50, 75, 100, 150),
            choice("material", vinyl=0.65, rubber=1.25, latex=0.95, stainless_steel=1.7),
            number("diameter", "inch", 0.5, 0.5, 0.625, 0.75, 1),
        ),
        extras={"with spray nozzle": 1.2, "with reel": 1.7},
    ),
    Category(
        "lawn-mower", ("lawn mower", "push mower", "robotic mower"), "garden", 330,
        (
            choice("drive", manual=0.25, electric=0.7, gas=1.05, battery=1.25, robot=2.4),
            number("cutting width", "cm", 0.9, 30, 33, 38, 42, 46, 51, 56),
            number("bag", "liters", 0.1, 25, 35, 45, 55, 70),
        ),
        interaction=0.2,
    ),
    Category(
        "planter", ("planter", "flower pot", "raised bed"), "garden", 26,
        (
            number("diameter", "cm", 1.0, 10, 14, 18, 24, 30, 40, 50, 60),
            choice("material", plastic=0.6, terracotta=0.9, ceramic=1.3, concrete=1.6, corten_steel=2.4),
            choice("drainage", yes=1.05, no=0.97),
        ),
        pack_sizes=(2, 3, 4, 6), extras={"with saucer": 1.1},
    ),
)
