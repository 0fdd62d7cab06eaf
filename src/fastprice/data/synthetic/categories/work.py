"""Tools, office supplies, car parts."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, choice, number, number_range

__all__ = ["WORK"]

# One attribute a line reads better than one argument a line.
# fmt: off

WORK: tuple[Category, ...] = (
    Category(
        "drill", ("cordless drill", "impact driver", "hammer drill"), "tools", 105,
        (
            number("voltage", "V", 0.9, 3.6, 8, 10.8, 12, 14.4, 18, 20, 24),
            number("torque", "Nm", 0.4, 10, 25, 35, 45, 60, 80, 110),
            number("batteries", "", 0.3, 1, 2, 3),
            choice("motor", brushed=0.8, brushless=1.35),
        ),
        interaction=0.3, extras={"bare tool": 0.7, "with charger and case": 1.15, "with 40-piece bit set": 1.12},
    ),
    Category(
        "saw", ("circular saw", "jigsaw", "miter saw"), "tools", 125,
        (
            number_range("power", "W", 0.7, 400, 2200, 100),
            number("blade diameter", "mm", 0.7, 85, 115, 140, 165, 185, 190, 216, 254),
            choice("cord", corded=0.9, cordless=1.25),
            choice("laser guide", yes=1.1, no=0.95),
        ),
        extras={"with spare blade": 1.06},
    ),
    Category(
        "tool-set", ("tool set", "socket set", "screwdriver set"), "tools", 60,
        (
            number("pieces", "piece", 0.55, 6, 12, 24, 40, 56, 82, 120, 168, 216),
            choice("steel", carbon=0.65, chrome_vanadium=1.1, S2=1.3),
            choice("case", none=0.85, soft_bag=0.95, hard_case=1.12),
        ),
        interaction=0.3,
    ),
    Category(
        "pen", ("ballpoint pens", "gel pens", "fineliner"), "office", 9,
        (
            choice("type", ballpoint=0.7, gel=1.0, fineliner=1.1, fountain=4.0),
            number("tip", "mm", 0.0, 0.3, 0.4, 0.5, 0.7, 1),
            choice("barrel", plastic=0.9, rubber_grip=1.0, metal=1.9),
        ),
        pack_sizes=(4, 10, 12, 24, 50),
    ),
    Category(
        "paper", ("copy paper", "notebook", "photo paper"), "office", 11,
        (
            number("sheets", "sheet", 0.65, 50, 80, 100, 160, 200, 250, 500),
            number("weight", "gsm", 0.9, 70, 80, 90, 100, 120, 160, 200),
            choice("size", A6=0.5, A5=0.7, A4=1.0, A3=1.9, Letter=1.0),
        ),
        pack_sizes=(2, 3, 5, 10), colored=False,
    ),
    Category(
        "car-tire", ("all-season tire", "winter tire", "summer tire"), "auto", 105,
        (
            number("rim", "inch", 1.6, 13, 14, 15, 16, 17, 18, 19, 20, 22),
            number("width", "mm", 0.6, 155, 175, 185, 195, 205, 225, 245, 265, 295),
            choice("season", summer=1.0, winter=1.08, all_season=1.03),
            choice("run flat", yes=1.3, no=0.96),
        ),
        pack_sizes=(2, 4), colored=False,
    ),
    Category(
        "car-battery", ("car battery", "AGM battery", "deep cycle battery"), "auto", 130,
        (
            number("capacity", "Ah", 0.8, 35, 44, 52, 60, 70, 80, 95, 105),
            number("cold cranking amps", "A", 0.3, 300, 420, 540, 640, 720, 800, 900),
            choice("type", flooded=0.75, EFB=1.0, AGM=1.45, lithium=3.0),
        ),
        colored=False,
    ),
    Category(
        "brake-pads", ("brake pads", "brake pad set", "brake discs and pads"), "auto", 48,
        (
            choice("compound", organic=0.65, semi_metallic=0.95, ceramic=1.35),
            choice("axle", front=1.1, rear=0.95),
            number("thickness", "mm", 0.3, 10, 12, 14, 16, 18, 20),
        ),
        extras={"with wear sensor": 1.12, "with two rotors": 2.4}, colored=False,
    ),
)
