"""The goods of the synthetic catalogue: categories, their attributes, and what each does to the hidden price.

Every brand and product line here is invented; the specification vocabulary (GB, DDR4, stainless steel) is ordinary.
A category has a base price in dollars: what a mid-tier product with middling attributes costs new. An attribute is

* a `Number`, whose value raises the price as `(value / middle value) ** power`; `power` 0 means that it is only talk;
* a `Choice`, whose value multiplies the price by a factor.

The first attributes of a category are the ones that a seller mentions when there is little room.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CATEGORIES", "Category", "Choice", "Number"]


@dataclass(frozen=True, slots=True)
class Number:
    """A measured attribute: its possible values in ascending order, its unit, and its weight on the price."""

    name: str
    unit: str
    power: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """A named attribute: each possible value with its factor on the price."""

    name: str
    factors: dict[str, float]


Attribute = Number | Choice


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of product.

    `brand_pull` scales the logarithm of the brand's tier (how much a name is worth here); `joint` is the interaction:
    it multiplies the product of the log-contributions of the first two attributes, so that good with good is dearer
    than either alone suggests. `extras` are things sold with the product, with their factor on the price.
    """

    slug: str
    nouns: tuple[str, ...]
    department: str
    base: float
    attributes: tuple[Attribute, ...]
    brand_pull: float = 1.0
    joint: float = 0.0
    coloured: bool = True
    extras: dict[str, float] = field(default_factory=dict)
    packs: tuple[int, ...] = ()


def _n(name: str, unit: str, power: float, *values: float) -> Number:
    return Number(name, unit, power, values)


def _span(name: str, unit: str, power: float, low: int, high: int, step: int) -> Number:
    return Number(name, unit, power, tuple(range(low, high + 1, step)))


def _c(name: str, **factors: float) -> Choice:
    """A choice whose values are the keyword names, underscores read as spaces."""
    return Choice(name, {key.replace("_", " "): factor for key, factor in factors.items()})


_CHIPSETS = {
    f"{line} {generation}{tier}{suffix}": worth * step * extra
    for line, generation, worth in (
        ("Arcon GT", "9", 0.4),
        ("Arcon GTX", "16", 0.75),
        ("Arcon RTX", "30", 1.2),
        ("Arcon RTX", "40", 1.7),
        ("Vulpen RX", "5", 0.6),
        ("Vulpen RX", "67", 1.3),
    )
    for tier, step in (("50", 0.6), ("60", 1.0), ("70", 1.5), ("80", 2.3))
    for suffix, extra in (("", 1.0), (" Ti", 1.18), (" Super", 1.1))
}
_MEMORY_SPEEDS = {
    f"{kind}-{speed}": worth * (speed / 3200) ** 0.25
    for kind, worth, speeds in (
        ("DDR3", 0.65, (1333, 1600, 1866)),
        ("DDR4", 1.0, (2400, 2666, 3000, 3200, 3600, 4000)),
        ("DDR5", 1.4, (4800, 5200, 5600, 6000, 6400, 7200)),
    )
    for speed in speeds
}
_MODULES = {f"{count} x {size} GB": (count * size / 16) ** 0.8 for count in (1, 2, 4) for size in (4, 8, 16, 32)}
_RESOLUTIONS = {"1366 x 768": 0.6, "1920 x 1080": 0.85, "2560 x 1440": 1.3, "3440 x 1440": 1.6, "3840 x 2160": 1.75}
_LINK = _c("connection type", Wired=0.85, Wireless=1.1, Bluetooth=1.15)
_METALS = _c("material", plastic=0.6, aluminum=0.9, stainless_steel=1.2, cast_iron=1.4, copper=1.8)
_WOODS = _c("material", particle_board=0.55, metal=0.8, bamboo=0.95, solid_pine=1.1, solid_oak=1.7, walnut=2.2)
_CLOTH = _c("material", polyester=0.7, cotton=0.9, denim=1.0, linen=1.15, merino_wool=1.8, leather=2.6)
_SIZES = _c("size", XS=1.0, S=1.0, M=1.0, L=1.0, XL=1.02, XXL=1.05)
_YEARS = _span("model year", "", 25.0, 2012, 2025, 1)

_COMPUTING = (
    Category(
        "video-card", ("graphics card", "video card", "GPU"), "computing", 260,
        (Choice("chipset", _CHIPSETS), _n("memory", "GB", 0.45, 2, 4, 6, 8, 10, 12, 16, 24),
         _span("core clock", "MHz", 0.2, 1000, 1750, 5), _span("boost clock", "MHz", 0.3, 1760, 2650, 5),
         _span("length", "mm", 0.1, 150, 340, 1), _n("fans", "", 0.1, 1, 2, 3)),
        brand_pull=0.5, joint=0.3, extras={"with backplate and support bracket": 1.05},
    ),
    Category(
        "cpu", ("processor", "desktop CPU", "CPU"), "computing", 190,
        (_n("core count", "cores", 0.75, 2, 4, 6, 8, 10, 12, 16, 24), _n("boost clock", "GHz", 0.9, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8),
         _n("core clock", "GHz", 0.3, 2, 2.4, 2.8, 3, 3.2), _n("tdp", "W", 0.1, 35, 65, 95, 105, 125, 170),
         _c("graphics", none=0.92, integrated=1.05), _c("smt", yes=1.08, no=0.92)),
        brand_pull=0.3, joint=0.2, coloured=False, extras={"with boxed cooler": 1.07, "tray version": 0.95},
    ),
    Category(
        "motherboard", ("motherboard", "mainboard"), "computing", 150,
        (_c("socket", LGA1151=0.7, LGA1200=0.85, LGA1700=1.25, AM4=0.85, AM5=1.4, TR4=2.4),
         _c("form factor", Mini_ITX=1.15, Micro_ATX=0.8, ATX=1.0, EATX=1.9), _n("max memory", "GB", 0.2, 32, 64, 128, 192, 256),
         _n("memory slots", "", 0.15, 2, 4, 8), _c("wifi", yes=1.15, no=0.95)),
        joint=0.3,
    ),
    Category(
        "memory", ("RAM kit", "desktop memory", "memory kit"), "computing", 70,
        (Choice("modules", _MODULES), Choice("speed", _MEMORY_SPEEDS), _n("cas latency", "", -0.2, 9, 14, 16, 18, 30, 32, 36, 40),
         _n("first word latency", "ns", -0.2, 8.9, 10, 11.25, 12, 13.5, 15), _c("lighting", none=0.95, RGB=1.15)),
        brand_pull=0.6, joint=0.2, extras={"with heat spreader": 1.04},
    ),
    Category(
        "internal-hard-drive", ("hard drive", "internal hard drive", "HDD"), "computing", 85,
        (_n("capacity", "GB", 0.6, 250, 500, 1000, 2000, 4000, 6000, 8000, 12000, 16000), _n("rpm", "RPM", 0.6, 5400, 5900, 7200, 10000),
         _n("cache", "MB", 0.1, 16, 32, 64, 128, 256, 512), _n("form factor", "inch", 0.0, 2.5, 3.5),
         _c("interface", **{"SATA_3.0_Gb/s": 0.85, "SATA_6.0_Gb/s": 1.0, "SAS_12.0_Gb/s": 1.5})),
        brand_pull=0.4, coloured=False,
    ),
    Category(
        "ssd", ("solid state drive", "SSD", "NVMe drive"), "computing", 90,
        (_n("capacity", "GB", 0.8, 120, 240, 256, 480, 500, 512, 960, 1000, 2000, 4000, 8000),
         _c("interface", **{"SATA_6.0_Gb/s": 0.85, "PCIe_3.0_X4": 0.95, "PCIe_4.0_X4": 1.25, "PCIe_5.0_X4": 1.9}),
         _c("form factor", **{"2.5": 0.95, "M.2-2280": 1.0, "mSATA": 0.8}), _n("cache", "MB", 0.05, 128, 256, 512, 1024, 2048)),
        brand_pull=0.5, joint=0.2, coloured=False, extras={"with heatsink": 1.1},
    ),
    Category(
        "power-supply", ("power supply", "PSU"), "computing", 95,
        (_span("wattage", "W", 0.9, 300, 1600, 50), _c("efficiency", white=0.7, bronze=0.85, gold=1.15, platinum=1.6, titanium=2.1),
         _c("modular", no=0.8, Semi=1.0, Full=1.2), _c("type", ATX=1.0, SFX=1.25, Flex_ATX=1.1)),
        brand_pull=0.6, joint=0.5,
    ),
    Category(
        "case", ("PC case", "computer case", "tower case"), "computing", 95,
        (_c("type", ATX_Mid_Tower=1.0, ATX_Full_Tower=1.7, MicroATX_Mini_Tower=0.75, Mini_ITX_Desktop=1.2),
         _c("side panel", none=0.8, Acrylic=0.85, Tempered_Glass=1.15, Mesh=1.05), _n("external volume", "L", 0.25, 12, 18, 25, 32, 40, 48, 56, 65),
         _n("internal 35 bays", "", 0.1, 1, 2, 3, 4, 6, 8), _n("fans", "", 0.15, 1, 2, 3, 4, 6)),
    ),
    Category(
        "cpu-cooler", ("CPU cooler", "liquid cooler", "tower cooler"), "computing", 65,
        (_n("size", "mm", 0.9, 92, 120, 140, 240, 280, 360, 420), _c("cooling", air=0.75, liquid=1.4),
         _span("rpm", "RPM", 0.1, 1200, 3000, 50), _n("noise level", "dB", -0.4, 19.2, 22.4, 24.6, 27.8, 30.5, 33, 36.9), _c("lighting", none=0.93, RGB=1.12)),
        joint=0.2,
    ),
    Category(
        "case-fan", ("case fan", "PWM fan", "cooling fan"), "computing", 17,
        (_n("size", "mm", 0.5, 40, 60, 80, 92, 120, 140, 200), _span("rpm", "RPM", 0.2, 800, 3000, 50),
         _span("airflow", "CFM", 0.2, 28, 120, 1), _n("noise level", "dB", -0.3, 16.8, 20.1, 23.4, 26, 29.6, 34.5), _c("pwm", yes=1.15, no=0.85)),
        packs=(2, 3, 5), extras={"with fan hub": 1.3},
    ),
    Category(
        "monitor", ("monitor", "gaming monitor", "LED display"), "computing", 240,
        (_n("screen size", "inch", 1.3, 19, 21.5, 22, 23.8, 24, 27, 28, 32, 34, 43, 49), Choice("resolution", _RESOLUTIONS),
         _n("refresh rate", "Hz", 0.5, 60, 75, 100, 120, 144, 165, 240, 360), _n("response time", "ms", -0.1, 0.5, 1, 2, 4, 5, 8, 14),
         _c("panel type", TN=0.8, VA=0.95, IPS=1.1, OLED=2.2), _c("aspect ratio", **{"16:9": 1.0, "16:10": 1.05, "21:9": 1.2})),
        joint=0.4,
    ),
    Category(
        "keyboard", ("mechanical keyboard", "keyboard", "gaming keyboard"), "computing", 70,
        (_c("switches", membrane=0.45, linear=1.1, tactile=1.15, clicky=1.05, optical=1.4), _LINK, _c("backlit", none=0.8, White=0.95, RGB=1.15),
         _c("tenkeyless", yes=0.95, no=1.0), _c("style", Standard=0.9, Gaming=1.15, Ergonomic=1.35, Slim=1.0)),
        extras={"with wrist rest": 1.1, "with spare keycaps": 1.08},
    ),
    Category(
        "mouse", ("mouse", "gaming mouse", "wireless mouse"), "computing", 38,
        (_n("max dpi", "DPI", 0.4, 800, 1200, 1600, 3200, 6400, 12000, 16000, 26000), _LINK, _c("tracking method", Optical=1.0, Laser=1.1, Trackball=1.3),
         _n("buttons", "", 0.25, 3, 5, 6, 7, 8, 11, 12), _c("hand orientation", Right=1.02, Left=1.1, Both=0.95)),
        extras={"with mouse pad": 1.15},
    ),
    Category(
        "webcam", ("webcam", "HD webcam", "streaming camera"), "computing", 60,
        (_c("resolutions", **{"720p": 0.5, "1080p": 0.95, "1440p": 1.4, "2160p": 2.1}), _n("fov", "degrees", 0.2, 60, 68, 78, 84, 90, 103),
         _c("focus type", Fixed=0.85, Auto=1.2), _n("frame rate", "fps", 0.3, 15, 24, 30, 60), _c("microphone", yes=1.05, no=0.9)),
    ),
    Category(
        "external-hard-drive", ("portable drive", "external hard drive", "desktop backup drive"), "computing", 105,
        (_n("capacity", "GB", 0.55, 500, 1000, 2000, 4000, 5000, 8000, 12000, 18000), _c("type", Portable_HDD=0.85, Desktop_HDD=1.0, Portable_SSD=1.8),
         _c("interface", **{"USB_2.0": 0.7, "USB_Type-A_3.2_Gen_1": 0.95, "USB_Type-C_3.2_Gen_2": 1.15, "Thunderbolt_3": 1.9})),
        brand_pull=0.6, joint=0.3, extras={"with carrying case": 1.07},
    ),
    Category(
        "network-card", ("network adapter", "Wi-Fi card", "Ethernet card"), "computing", 42,
        (_c("protocol", **{"Gigabit_Ethernet": 0.7, "10_Gigabit_Ethernet": 3.0, "Wi-Fi_4": 0.5, "Wi-Fi_5": 0.85, "Wi-Fi_6": 1.15, "Wi-Fi_6E": 1.35}),
         _c("interface", PCI=0.75, PCIe_x1=1.0, PCIe_x4=1.3, PCIe_x8=1.9, USB=0.8), _n("ports", "", 0.4, 1, 2, 4), _n("antennas", "", 0.1, 1, 2, 3, 4)),
        coloured=False,
    ),
    Category(
        "ups", ("UPS", "battery backup", "uninterruptible power supply"), "computing", 170,
        (_n("capacity w", "W", 0.9, 180, 255, 330, 450, 600, 900, 1000, 1350, 1980), _n("capacity va", "VA", 0.1, 350, 550, 650, 850, 1500, 2200, 3000),
         _n("outlets", "", 0.1, 4, 6, 8, 10, 12), _c("output", simulated_sine=0.85, pure_sine=1.3)),
        coloured=False,
    ),
    Category(
        "printer", ("printer", "all-in-one printer"), "computing", 150,
        (_c("type", inkjet=0.65, laser=1.25, photo=1.1, label=0.8), _n("speed", "ppm", 0.6, 8, 12, 15, 20, 28, 36, 42),
         _c("functions", print_only=0.7, print_and_scan=1.0, print_scan_copy_fax=1.3), _c("wifi", yes=1.1, no=0.85)),
        brand_pull=0.7,
    ),
    Category(
        "laptop", ("laptop", "notebook", "ultrabook"), "computing", 480,
        (_n("memory", "GB", 0.5, 4, 8, 12, 16, 32, 64), _n("storage", "GB", 0.25, 128, 256, 512, 1000, 2000),
         _n("screen size", "inch", 0.3, 11.6, 13.3, 14, 15.6, 16, 17.3), _c("processor", dual_core=0.55, quad_core=0.85, six_core=1.15, eight_core=1.5),
         _c("graphics", integrated=0.85, dedicated=1.5), _YEARS),
        brand_pull=0.8, joint=0.4, extras={"with charger and sleeve": 1.05},
    ),
)

_DEVICES = (
    Category(
        "smartphone", ("smartphone", "phone", "unlocked phone"), "devices", 260,
        (_n("storage", "GB", 0.35, 16, 32, 64, 128, 256, 512, 1024), _n("memory", "GB", 0.4, 2, 3, 4, 6, 8, 12, 16), _YEARS,
         _n("screen size", "inch", 0.6, 4.7, 5.5, 6.1, 6.4, 6.7, 6.9), _n("battery", "mAh", 0.1, 2800, 3300, 4000, 4500, 5000), _c("network", **{"3G": 0.6, "4G": 0.85, "5G": 1.2})),
        brand_pull=1.1, joint=0.4, extras={"with case and charger": 1.04},
    ),
    Category(
        "tablet", ("tablet", "Android tablet"), "devices", 170,
        (_n("storage", "GB", 0.35, 16, 32, 64, 128, 256, 512), _n("screen size", "inch", 1.1, 7, 8, 8.4, 10.1, 11, 12.9), _YEARS, _c("network", **{"Wi-Fi": 0.92, "Wi-Fi + 4G": 1.2})),
        extras={"with stylus": 1.12},
    ),
    Category(
        "headphones", ("headphones", "headset", "over-ear headphones"), "devices", 75,
        (_c("type", **{"Earbud": 0.5, "In Ear": 0.7, "On Ear": 0.85, "Circumaural": 1.4}), _c("wireless", yes=1.3, no=0.8),
         _c("noise cancelling", yes=1.5, no=0.85), _n("battery life", "hours", 0.15, 6, 10, 20, 30, 40, 60), _c("microphone", yes=1.05, no=0.95), _c("enclosure type", Closed=0.97, Open=1.25)),
        joint=0.5, brand_pull=1.2,
    ),
    Category(
        "speakers", ("bookshelf speakers", "Bluetooth speaker", "computer speakers"), "devices", 85,
        (_n("wattage", "W", 0.6, 5, 10, 20, 24, 42, 60, 100, 200, 400), _c("configuration", **{"1.0": 0.75, "2.0": 0.9, "2.1": 1.2, "5.1": 2.3}), _LINK, _c("water resistant", yes=1.1, no=0.97)),
        brand_pull=1.1,
    ),
    Category(
        "camera", ("digital camera", "mirrorless camera", "compact camera"), "devices", 420,
        (_n("resolution", "megapixels", 0.7, 8, 10, 12, 16, 20, 24, 33, 45), _c("type", compact=0.4, bridge=0.8, mirrorless=1.6, DSLR=1.3), _n("zoom", "x", 0.15, 3, 5, 8, 12, 24, 40, 60), _YEARS),
        joint=0.4, extras={"body only": 0.85, "with two lenses and bag": 1.5, "with memory card": 1.04},
    ),
    Category(
        "smartwatch", ("smartwatch", "fitness watch", "GPS watch"), "devices", 130,
        (_n("case size", "mm", 0.2, 38, 40, 42, 44, 46, 49), _c("gps", yes=1.3, no=0.7), _c("case material", plastic=0.7, aluminum=1.0, stainless_steel=1.5, titanium=2.3), _n("battery life", "days", 0.2, 1, 2, 5, 7, 14, 21)),
        extras={"with spare band": 1.06},
    ),
    Category(
        "television", ("smart TV", "LED TV", "television"), "devices", 420,
        (_n("screen size", "inch", 1.5, 24, 32, 40, 43, 50, 55, 65, 75, 85), _c("panel type", LED=0.7, QLED=1.2, OLED=2.1), _c("resolution", **{"720p": 0.6, "1080p": 0.8, "4K": 1.15, "8K": 2.6}), _n("refresh rate", "Hz", 0.3, 60, 100, 120, 144)),
        joint=0.3, coloured=False, extras={"with wall mount": 1.08},
    ),
)

_HOME = (
    Category(
        "blender", ("blender", "countertop blender", "hand blender"), "home", 65,
        (_span("power", "W", 0.7, 250, 1800, 50), _n("capacity", "liters", 0.3, 0.5, 0.7, 1, 1.5, 1.8, 2), _n("speeds", "", 0.15, 1, 2, 3, 5, 8, 10), _c("jar", plastic=0.8, glass=1.1, stainless_steel=1.4)),
    ),
    Category(
        "coffee-maker", ("coffee maker", "espresso machine", "drip coffee machine"), "home", 110,
        (_c("type", drip=0.5, pod=0.8, french_press=0.35, espresso=1.8), _n("cups", "cup", 0.25, 1, 2, 4, 8, 10, 12), _n("pressure", "bar", 0.3, 3, 9, 15, 19, 20), _c("grinder", yes=1.8, no=0.85)),
        joint=0.4, extras={"with milk frother": 1.15},
    ),
    Category(
        "cookware", ("frying pan", "saucepan", "stock pot"), "home", 42,
        (_n("diameter", "cm", 0.9, 16, 18, 20, 24, 26, 28, 30, 32), _METALS, _c("coating", none=1.0, non_stick=1.0, ceramic=1.15, enamel=1.3), _c("lid", yes=1.15, no=0.92)),
        packs=(2, 3, 5), joint=0.3,
    ),
    Category(
        "kitchen-knife", ("chef knife", "bread knife", "santoku knife"), "home", 45,
        (_n("blade length", "inch", 0.6, 3.5, 5, 6, 7, 8, 10), _c("steel", stamped=0.4, forged_stainless=1.0, high_carbon=1.4, damascus=2.3), _c("handle", plastic=0.8, pakkawood=1.1, rosewood=1.3)),
        packs=(2, 3, 6), extras={"with sheath": 1.1, "with knife block": 1.6},
    ),
    Category(
        "vacuum-cleaner", ("vacuum cleaner", "cordless vacuum", "robot vacuum"), "home", 170,
        (_c("type", handheld=0.4, upright=0.9, canister=1.0, cordless_stick=1.2, robot=1.6), _span("power", "W", 0.3, 100, 2000, 50), _n("dust capacity", "liters", 0.1, 0.4, 0.6, 1, 2, 3.5, 5), _n("noise", "dB", -0.5, 58, 64, 70, 76, 82)),
    ),
    Category(
        "lamp", ("table lamp", "floor lamp", "desk lamp"), "home", 45,
        (_n("height", "cm", 0.6, 28, 35, 42, 50, 65, 120, 150, 170), _c("material", plastic=0.6, ceramic=1.0, brass=1.6, glass=1.2, wood=1.1), _n("brightness", "lumens", 0.2, 200, 400, 600, 800, 1100, 1600), _c("dimmable", yes=1.12, no=0.95)),
        packs=(2,),
    ),
    Category(
        "bedding", ("sheet set", "duvet cover", "comforter"), "home", 55,
        (_c("bed size", Twin=0.75, Full=0.9, Queen=1.05, King=1.25), _c("material", microfiber=0.55, cotton=1.0, bamboo=1.3, linen=2.0, silk=3.2), _n("thread count", "", 0.3, 180, 200, 300, 400, 600, 800, 1000), _n("pieces", "piece", 0.25, 1, 2, 3, 4, 6, 7)),
        joint=0.4,
    ),
    Category(
        "towel", ("bath towel", "hand towel", "beach towel"), "home", 14,
        (_n("weight", "gsm", 0.6, 350, 400, 500, 600, 700, 800), _c("material", microfiber=0.7, cotton=0.95, egyptian_cotton=1.5, bamboo=1.3), _n("length", "cm", 0.7, 50, 70, 100, 130, 140, 160)),
        packs=(2, 4, 6, 8),
    ),
    Category(
        "desk", ("desk", "computer desk", "standing desk"), "furniture", 210,
        (_n("width", "cm", 0.9, 80, 100, 120, 140, 160, 180), _WOODS, _c("height adjustable", no=0.8, manual=1.2, electric=1.9), _n("drawers", "", 0.12, 1, 2, 3, 4)),
        joint=0.3,
    ),
    Category(
        "chair", ("office chair", "dining chair", "gaming chair"), "furniture", 130,
        (_c("upholstery", mesh=0.9, fabric=0.85, faux_leather=1.0, leather=2.4, velvet=1.2), _n("load", "kg", 0.3, 90, 100, 110, 120, 136, 150, 180), _c("lumbar support", none=0.75, fixed=1.0, adjustable=1.5), _c("armrests", none=0.85, fixed=1.0, **{"4D": 1.35})),
        packs=(2, 4, 6),
    ),
    Category(
        "bookshelf", ("bookshelf", "bookcase", "storage shelf"), "furniture", 95,
        (_n("shelves", "tier", 0.5, 2, 3, 4, 5, 6, 7), _WOODS, _n("height", "cm", 0.5, 60, 80, 110, 150, 180, 200), _n("width", "cm", 0.4, 40, 60, 80, 100, 120)),
        joint=0.3,
    ),
    Category(
        "mattress", ("mattress", "foam mattress", "hybrid mattress"), "furniture", 380,
        (_c("bed size", Twin=0.65, Full=0.85, Queen=1.05, King=1.35), _n("thickness", "inch", 0.8, 4, 6, 8, 10, 12, 14), _c("filling", foam=0.7, memory_foam=0.95, pocket_springs=1.15, latex=1.9), _c("firmness", soft=1.0, medium=1.0, firm=1.0)),
        joint=0.3, coloured=False,
    ),
    Category(
        "garden-hose", ("garden hose", "expandable hose", "soaker hose"), "garden", 32,
        (_n("length", "feet", 0.7, 15, 25, 50, 75, 100, 150), _c("material", vinyl=0.65, rubber=1.25, latex=0.95, stainless_steel=1.7), _n("diameter", "inch", 0.5, 0.5, 0.625, 0.75, 1)),
        extras={"with spray nozzle": 1.2, "with reel": 1.7},
    ),
    Category(
        "lawn-mower", ("lawn mower", "push mower", "robotic mower"), "garden", 330,
        (_c("drive", manual=0.25, electric=0.7, gas=1.05, battery=1.25, robot=2.4), _n("cutting width", "cm", 0.9, 30, 33, 38, 42, 46, 51, 56), _n("bag", "liters", 0.1, 25, 35, 45, 55, 70)),
        joint=0.2,
    ),
    Category(
        "planter", ("planter", "flower pot", "raised bed"), "garden", 26,
        (_n("diameter", "cm", 1.0, 10, 14, 18, 24, 30, 40, 50, 60), _c("material", plastic=0.6, terracotta=0.9, ceramic=1.3, concrete=1.6, corten_steel=2.4), _c("drainage", yes=1.05, no=0.97)),
        packs=(2, 3, 4, 6), extras={"with saucer": 1.1},
    ),
)

_WORK = (
    Category(
        "drill", ("cordless drill", "impact driver", "hammer drill"), "tools", 105,
        (_n("voltage", "V", 0.9, 3.6, 8, 10.8, 12, 14.4, 18, 20, 24), _n("torque", "Nm", 0.4, 10, 25, 35, 45, 60, 80, 110), _n("batteries", "", 0.3, 1, 2, 3), _c("motor", brushed=0.8, brushless=1.35)),
        joint=0.3, extras={"bare tool": 0.7, "with charger and case": 1.15, "with 40-piece bit set": 1.12},
    ),
    Category(
        "saw", ("circular saw", "jigsaw", "miter saw"), "tools", 125,
        (_span("power", "W", 0.7, 400, 2200, 100), _n("blade diameter", "mm", 0.7, 85, 115, 140, 165, 185, 190, 216, 254), _c("cord", corded=0.9, cordless=1.25), _c("laser guide", yes=1.1, no=0.95)),
        extras={"with spare blade": 1.06},
    ),
    Category(
        "tool-set", ("tool set", "socket set", "screwdriver set"), "tools", 60,
        (_n("pieces", "piece", 0.55, 6, 12, 24, 40, 56, 82, 120, 168, 216), _c("steel", carbon=0.65, chrome_vanadium=1.1, S2=1.3), _c("case", none=0.85, soft_bag=0.95, hard_case=1.12)),
        joint=0.3,
    ),
    Category(
        "pen", ("ballpoint pens", "gel pens", "fineliner"), "office", 9,
        (_c("type", ballpoint=0.7, gel=1.0, fineliner=1.1, fountain=4.0), _n("tip", "mm", 0.0, 0.3, 0.4, 0.5, 0.7, 1), _c("barrel", plastic=0.9, rubber_grip=1.0, metal=1.9)),
        packs=(4, 10, 12, 24, 50),
    ),
    Category(
        "paper", ("copy paper", "notebook", "photo paper"), "office", 11,
        (_n("sheets", "sheet", 0.65, 50, 80, 100, 160, 200, 250, 500), _n("weight", "gsm", 0.9, 70, 80, 90, 100, 120, 160, 200), _c("size", A6=0.5, A5=0.7, A4=1.0, A3=1.9, Letter=1.0)),
        packs=(2, 3, 5, 10), coloured=False,
    ),
    Category(
        "car-tire", ("all-season tire", "winter tire", "summer tire"), "auto", 105,
        (_n("rim", "inch", 1.6, 13, 14, 15, 16, 17, 18, 19, 20, 22), _n("width", "mm", 0.6, 155, 175, 185, 195, 205, 225, 245, 265, 295), _c("season", summer=1.0, winter=1.08, all_season=1.03), _c("run flat", yes=1.3, no=0.96)),
        packs=(2, 4), coloured=False,
    ),
    Category(
        "car-battery", ("car battery", "AGM battery", "deep cycle battery"), "auto", 130,
        (_n("capacity", "Ah", 0.8, 35, 44, 52, 60, 70, 80, 95, 105), _n("cold cranking amps", "A", 0.3, 300, 420, 540, 640, 720, 800, 900), _c("type", flooded=0.75, EFB=1.0, AGM=1.45, lithium=3.0)),
        coloured=False,
    ),
    Category(
        "brake-pads", ("brake pads", "brake pad set", "brake discs and pads"), "auto", 48,
        (_c("compound", organic=0.65, semi_metallic=0.95, ceramic=1.35), _c("axle", front=1.1, rear=0.95), _n("thickness", "mm", 0.3, 10, 12, 14, 16, 18, 20)),
        extras={"with wear sensor": 1.12, "with two rotors": 2.4}, coloured=False,
    ),
)

_WEAR = (
    Category(
        "jacket", ("jacket", "rain jacket", "winter parka"), "fashion", 85,
        (_CLOTH, _c("insulation", none=0.75, synthetic=1.1, down=1.9), _SIZES, _c("waterproof", yes=1.25, no=0.9)),
        brand_pull=1.4, joint=0.3,
    ),
    Category(
        "jeans", ("jeans", "chinos", "work trousers"), "fashion", 48,
        (_c("fit", slim=1.0, regular=0.95, relaxed=0.95, tapered=1.08), _n("waist", "inch", 0.05, 26, 28, 30, 32, 34, 36, 38, 40), _c("fabric", stretch_cotton=0.85, denim=1.0, selvedge_denim=2.2)),
        brand_pull=1.5, packs=(2,),
    ),
    Category(
        "t-shirt", ("t-shirt", "polo shirt", "long sleeve top"), "fashion", 18,
        (_c("material", polyester=0.75, cotton=0.95, organic_cotton=1.3, merino_wool=3.0), _SIZES, _n("fabric weight", "gsm", 0.4, 120, 140, 160, 180, 200, 240)),
        brand_pull=1.5, packs=(2, 3, 5, 6),
    ),
    Category(
        "shoes", ("running shoes", "hiking boots", "sneakers"), "fashion", 78,
        (_c("upper", mesh=0.85, synthetic=0.75, suede=1.2, leather=1.6), _n("size", "", 0.05, 6, 6.5, 7, 8, 8.5, 9, 10, 11, 12, 13), _c("waterproof", yes=1.25, no=0.94), _c("sole", foam=0.9, rubber=1.0, carbon_plate=2.2)),
        brand_pull=1.4,
    ),
    Category(
        "handbag", ("handbag", "tote bag", "crossbody bag"), "fashion", 95,
        (_c("material", canvas=0.45, nylon=0.55, faux_leather=0.7, leather=1.9, suede=1.7), _n("width", "cm", 0.3, 18, 22, 26, 30, 36, 42), _c("lining", none=0.85, cotton=1.0, satin=1.15)),
        brand_pull=2.2,
    ),
    Category(
        "watch", ("wrist watch", "automatic watch", "chronograph"), "fashion", 160,
        (_c("movement", quartz=0.5, solar=0.9, automatic=2.2, hand_wound=1.9), _c("case material", plastic=0.35, stainless_steel=1.0, titanium=1.6, gold_plated=1.5), _n("case size", "mm", 0.1, 34, 36, 38, 40, 42, 44), _n("water resistance", "m", 0.2, 30, 50, 100, 200, 300)),
        brand_pull=1.9, joint=0.4, extras={"with box and papers": 1.15},
    ),
    Category(
        "backpack", ("backpack", "laptop backpack", "hiking pack"), "sport", 62,
        (_n("volume", "liters", 0.5, 10, 15, 20, 25, 30, 40, 55, 65, 80), _c("material", polyester=0.7, nylon=1.0, ripstop_nylon=1.35, canvas=0.9), _c("waterproof", yes=1.3, no=0.93)),
        extras={"with rain cover": 1.08},
    ),
    Category(
        "bicycle", ("mountain bike", "road bike", "city bike"), "sport", 430,
        (_c("frame", steel=0.55, aluminum=0.95, carbon=2.8, titanium=3.4), _n("gears", "speed", 0.3, 1, 3, 7, 8, 18, 21, 24, 27), _n("wheel size", "inch", 0.5, 16, 20, 24, 26, 27.5, 29), _c("brakes", rim=0.8, mechanical_disc=1.05, hydraulic_disc=1.4), _c("suspension", none=0.9, front=1.1, full=1.7)),
        joint=0.3, extras={"with lights and lock": 1.05},
    ),
    Category(
        "tent", ("tent", "camping tent", "backpacking tent"), "sport", 135,
        (_n("persons", "person", 0.55, 1, 2, 3, 4, 6, 8), _n("weight", "kg", -0.3, 1.2, 1.8, 2.4, 3.5, 5, 7.5), _n("water column", "mm", 0.25, 1000, 1500, 2000, 3000, 5000), _c("season", **{"3": 0.9, "4": 1.6})),
    ),
    Category(
        "dumbbell", ("dumbbell", "kettlebell", "weight plate"), "sport", 34,
        (_n("weight", "kg", 0.85, 1, 2, 3, 5, 8, 10, 12, 16, 20, 24, 32), _c("material", vinyl=0.8, cast_iron=0.95, rubber=1.15, chrome=1.4)),
        packs=(2, 3, 4), extras={"with stand": 1.4},
    ),
)

_LIFE = (
    Category(
        "building-blocks", ("building blocks", "construction set", "model kit"), "toys", 38,
        (_n("pieces", "piece", 0.75, 40, 80, 150, 250, 400, 650, 900, 1400, 2300), _n("age", "years", 0.2, 2, 3, 4, 6, 8, 10, 12), _c("theme", city=0.95, space=1.1, castle=1.1, farm=0.85, racing=1.05)),
        brand_pull=0.9, coloured=False,
    ),
    Category(
        "board-game", ("board game", "card game", "puzzle"), "toys", 28,
        (_n("players", "player", 0.1, 1, 2, 4, 5, 6, 8), _n("play time", "minutes", 0.35, 10, 15, 20, 30, 45, 60, 90, 120), _c("language", English=1.0, French=1.0, German=1.0)),
        coloured=False, extras={"with expansion": 1.6},
    ),
    Category(
        "book", ("novel", "cookbook", "textbook"), "books", 22,
        (_c("binding", paperback=0.65, hardcover=1.3, leather_bound=3.0, spiral=0.85), _n("pages", "pages", 0.45, 48, 96, 160, 224, 320, 416, 560, 800), _c("subject", fiction=0.7, cooking=1.05, history=1.0, medicine=3.2, mathematics=2.3), _n("edition", "", 0.1, 1, 2, 3, 4, 5)),
        brand_pull=0.4, coloured=False, joint=0.2,
    ),
    Category(
        "stroller", ("stroller", "pram", "jogging stroller"), "baby", 210,
        (_c("type", umbrella=0.4, compact=0.9, jogging=1.3, double=1.6, travel_system=1.7), _n("weight", "kg", -0.3, 5.5, 6.8, 8, 9.5, 11, 13), _n("load", "kg", 0.2, 15, 18, 20, 22, 25)),
        brand_pull=1.3, extras={"with rain cover": 1.05, "with car seat": 1.5},
    ),
    Category(
        "diapers", ("diapers", "training pants", "overnight diapers"), "baby", 24,
        (_n("count", "count", 0.8, 18, 24, 36, 48, 72, 96, 124, 160), _n("size", "", 0.12, 1, 2, 3, 4, 5, 6), _c("line", basic=0.75, sensitive=1.1, organic=1.5)),
        coloured=False, packs=(2, 3),
    ),
    Category(
        "perfume", ("eau de parfum", "eau de toilette", "cologne"), "beauty", 58,
        (_n("volume", "ml", 0.6, 10, 15, 30, 50, 75, 100, 150, 200), _c("concentration", mist=0.35, toilette=0.85, parfum=1.3), _c("scent", citrus=0.9, floral=1.0, woody=1.1, oud=1.5)),
        brand_pull=1.9, coloured=False, joint=0.2, extras={"tester without cap": 0.75, "gift set": 1.25},
    ),
    Category(
        "skin-care", ("face cream", "serum", "sunscreen"), "beauty", 24,
        (_n("volume", "ml", 0.45, 15, 20, 30, 50, 75, 100, 150, 200), _c("active", aloe=0.7, vitamin_C=1.1, hyaluronic_acid=1.15, retinol=1.4, peptides=1.7), _c("skin type", dry=1.0, oily=1.0, sensitive=1.05)),
        brand_pull=1.7, coloured=False, packs=(2, 3),
    ),
    Category(
        "hair-tool", ("hair dryer", "hair straightener", "beard trimmer"), "beauty", 46,
        (_span("power", "W", 0.3, 40, 2200, 60), _c("plates", plastic=0.6, ceramic=1.0, tourmaline=1.25, titanium=1.6), _n("heat settings", "", 0.2, 1, 2, 3, 5, 6), _c("cordless", yes=1.3, no=0.92)),
        brand_pull=1.4,
    ),
    Category(
        "dog-food", ("dry dog food", "wet dog food", "dog treats"), "pet", 34,
        (_n("weight", "kg", 0.75, 0.4, 1, 2, 3, 5, 7.5, 10, 12, 15), _c("flavor", chicken=0.9, beef=1.0, lamb=1.1, salmon=1.25, venison=1.7), _c("recipe", standard=0.8, grain_free=1.2, raw=1.7)),
        coloured=False, packs=(2, 6, 12),
    ),
    Category(
        "cat-tree", ("cat tree", "scratching post", "cat tower"), "pet", 68,
        (_n("height", "cm", 1.0, 45, 60, 80, 110, 140, 170, 200), _c("cover", carpet=0.85, plush=1.0, sisal=1.15), _n("platforms", "", 0.2, 1, 2, 3, 4, 5, 7)),
    ),
    Category(
        "guitar", ("acoustic guitar", "electric guitar", "bass guitar"), "music", 290,
        (_c("body wood", basswood=0.55, mahogany=1.15, spruce=1.0, maple=1.4, rosewood=2.0), _n("strings", "string", 0.3, 4, 5, 6, 7, 12), _n("frets", "", 0.1, 19, 20, 21, 22, 24), _c("pickups", none=0.8, single_coil=1.0, humbucker=1.25)),
        brand_pull=1.3, joint=0.4, extras={"with gig bag": 1.06, "with amplifier": 1.35},
    ),
    Category(
        "digital-piano", ("digital piano", "keyboard piano", "synthesizer"), "music", 360,
        (_n("keys", "key", 1.2, 25, 37, 49, 61, 73, 76, 88), _c("action", unweighted=0.6, semi_weighted=1.0, hammer=1.7), _n("polyphony", "voices", 0.3, 32, 48, 64, 128, 192, 256)),
        joint=0.3, extras={"with stand and bench": 1.15},
    ),
)

CATEGORIES: tuple[Category, ...] = _COMPUTING + _DEVICES + _HOME + _WORK + _WEAR + _LIFE
