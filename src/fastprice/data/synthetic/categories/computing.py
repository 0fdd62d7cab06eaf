"""Computers and their parts."""

from __future__ import annotations

from fastprice.data.synthetic.categories.category import Category, ChoiceAttribute, choice, number, number_range

__all__ = ["COMPUTING"]

# One attribute a line reads better than one argument a line.
# fmt: off
_YEARS = number_range("model year", "", 150.0, 2012, 2025, 1)
_CHIPSETS = {
    f"{line} {generation}{tier}{suffix}": worth * step * extra
    for line, generation, worth in (
        ("Arcon GT", "9", 0.4),
        ("Arcon GX", "16", 0.75),
        ("Arcon RT", "30", 1.2),
        ("Arcon RT", "40", 1.7),
        ("Vulpen VX", "5", 0.6),
        ("Vulpen VX", "67", 1.3),
    )
    for tier, step in (("50", 0.6), ("60", 1.0), ("70", 1.5), ("80", 2.3))
    for suffix, extra in (("", 1.0), (" Xi", 1.18), (" Plus", 1.1))
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
_LINK = choice("connection type", Wired=0.85, Wireless=1.1, Bluetooth=1.15)

COMPUTING: tuple[Category, ...] = (
    Category(
        "video-card", ("graphics card", "video card", "GPU"), "computing", 260,
        (
            ChoiceAttribute("chipset", _CHIPSETS),
            number("memory", "GB", 0.45, 2, 4, 6, 8, 10, 12, 16, 24),
            number_range("core clock", "MHz", 0.2, 1000, 1750, 5),
            number_range("boost clock", "MHz", 0.3, 1760, 2650, 5),
            number_range("length", "mm", 0.1, 150, 340, 1),
            number("fans", "", 0.1, 1, 2, 3),
        ),
        brand_exponent=0.5, interaction=0.3, extras={"with backplate and support bracket": 1.05},
    ),
    Category(
        "cpu", ("processor", "desktop CPU", "CPU"), "computing", 190,
        (
            number("core count", "cores", 0.75, 2, 4, 6, 8, 10, 12, 16, 24),
            number("boost clock", "GHz", 0.9, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8),
            number("core clock", "GHz", 0.3, 2, 2.4, 2.8, 3, 3.2),
            number("tdp", "W", 0.1, 35, 65, 95, 105, 125, 170),
            choice("graphics", none=0.92, integrated=1.05),
            choice("smt", yes=1.08, no=0.92),
        ),
        brand_exponent=0.3, interaction=0.2, colored=False, extras={"with boxed cooler": 1.07, "tray version": 0.95},
    ),
    Category(
        "motherboard", ("motherboard", "mainboard"), "computing", 150,
        (
            choice("socket", LGA1151=0.7, LGA1200=0.85, LGA1700=1.25, AM4=0.85, AM5=1.4, TR4=2.4),
            choice("form factor", Mini_ITX=1.15, Micro_ATX=0.8, ATX=1.0, EATX=1.9),
            number("max memory", "GB", 0.2, 32, 64, 128, 192, 256),
            number("memory slots", "", 0.15, 2, 4, 8),
            choice("wifi", yes=1.15, no=0.95),
        ),
        interaction=0.3,
    ),
    Category(
        "memory", ("RAM kit", "desktop memory", "memory kit"), "computing", 70,
        (
            ChoiceAttribute("modules", _MODULES),
            ChoiceAttribute("speed", _MEMORY_SPEEDS),
            number("cas latency", "", -0.2, 9, 14, 16, 18, 30, 32, 36, 40),
            number("first word latency", "ns", -0.2, 8.9, 10, 11.25, 12, 13.5, 15),
            choice("lighting", none=0.95, RGB=1.15),
        ),
        brand_exponent=0.6, interaction=0.2, extras={"with heat spreader": 1.04},
    ),
    Category(
        "internal-hard-drive", ("hard drive", "internal hard drive", "HDD"), "computing", 85,
        (
            number("capacity", "GB", 0.6, 250, 500, 1000, 2000, 4000, 6000, 8000, 12000, 16000),
            number("rpm", "RPM", 0.6, 5400, 5900, 7200, 10000),
            number("cache", "MB", 0.1, 16, 32, 64, 128, 256, 512),
            number("form factor", "inch", 0.0, 2.5, 3.5),
            choice("interface", **{"SATA_3.0_Gb/s": 0.85, "SATA_6.0_Gb/s": 1.0, "SAS_12.0_Gb/s": 1.5}),
        ),
        brand_exponent=0.4, colored=False,
    ),
    Category(
        "ssd", ("solid state drive", "SSD", "NVMe drive"), "computing", 90,
        (
            number("capacity", "GB", 0.8, 120, 240, 256, 480, 500, 512, 960, 1000, 2000, 4000, 8000),
            choice("interface", **{
                "SATA_6.0_Gb/s": 0.85, "PCIe_3.0_X4": 0.95, "PCIe_4.0_X4": 1.25, "PCIe_5.0_X4": 1.9,
            }),
            choice("form factor", **{"2.5": 0.95, "M.2-2280": 1.0, "mSATA": 0.8}),
            number("cache", "MB", 0.05, 128, 256, 512, 1024, 2048),
        ),
        brand_exponent=0.5, interaction=0.2, colored=False, extras={"with heatsink": 1.1},
    ),
    Category(
        "power-supply", ("power supply", "PSU"), "computing", 95,
        (
            number_range("wattage", "W", 0.9, 300, 1600, 50),
            choice("efficiency", white=0.7, bronze=0.85, gold=1.15, platinum=1.6, titanium=2.1),
            choice("modular", no=0.8, Semi=1.0, Full=1.2),
            choice("type", ATX=1.0, SFX=1.25, Flex_ATX=1.1),
        ),
        brand_exponent=0.6, interaction=0.5,
    ),
    Category(
        "case", ("PC case", "computer case", "tower case"), "computing", 95,
        (
            choice("type", ATX_Mid_Tower=1.0, ATX_Full_Tower=1.7, MicroATX_Mini_Tower=0.75, Mini_ITX_Desktop=1.2),
            choice("side panel", none=0.8, Acrylic=0.85, Tempered_Glass=1.15, Mesh=1.05),
            number("external volume", "L", 0.25, 12, 18, 25, 32, 40, 48, 56, 65),
            number("internal 35 bays", "", 0.1, 1, 2, 3, 4, 6, 8),
            number("fans", "", 0.15, 1, 2, 3, 4, 6),
        ),
    ),
    Category(
        "cpu-cooler", ("CPU cooler", "liquid cooler", "tower cooler"), "computing", 65,
        (
            number("size", "mm", 0.9, 92, 120, 140, 240, 280, 360, 420),
            choice("cooling", air=0.75, liquid=1.4),
            number_range("rpm", "RPM", 0.1, 1200, 3000, 50),
            number("noise level", "dB", -0.4, 19.2, 22.4, 24.6, 27.8, 30.5, 33, 36.9),
            choice("lighting", none=0.93, RGB=1.12),
        ),
        interaction=0.2,
    ),
    Category(
        "case-fan", ("case fan", "PWM fan", "cooling fan"), "computing", 17,
        (
            number("size", "mm", 0.5, 40, 60, 80, 92, 120, 140, 200),
            number_range("rpm", "RPM", 0.2, 800, 3000, 50),
            number_range("airflow", "CFM", 0.2, 28, 120, 1),
            number("noise level", "dB", -0.3, 16.8, 20.1, 23.4, 26, 29.6, 34.5),
            choice("pwm", yes=1.15, no=0.85),
        ),
        pack_sizes=(2, 3, 5), extras={"with fan hub": 1.3},
    ),
    Category(
        "monitor", ("monitor", "gaming monitor", "LED display"), "computing", 240,
        (
            number("screen size", "inch", 1.3, 19, 21.5, 22, 23.8, 24, 27, 28, 32, 34, 43, 49),
            ChoiceAttribute("resolution", _RESOLUTIONS),
            number("refresh rate", "Hz", 0.5, 60, 75, 100, 120, 144, 165, 240, 360),
            number("response time", "ms", -0.1, 0.5, 1, 2, 4, 5, 8, 14),
            choice("panel type", TN=0.8, VA=0.95, IPS=1.1, OLED=2.2),
            choice("aspect ratio", **{"16:9": 1.0, "16:10": 1.05, "21:9": 1.2}),
        ),
        interaction=0.4,
    ),
    Category(
        "keyboard", ("mechanical keyboard", "keyboard", "gaming keyboard"), "computing", 70,
        (
            choice("switches", membrane=0.45, linear=1.1, tactile=1.15, clicky=1.05, optical=1.4),
            _LINK,
            choice("backlit", none=0.8, White=0.95, RGB=1.15),
            choice("tenkeyless", yes=0.95, no=1.0),
            choice("style", Standard=0.9, Gaming=1.15, Ergonomic=1.35, Slim=1.0),
        ),
        extras={"with wrist rest": 1.1, "with spare keycaps": 1.08},
    ),
    Category(
        "mouse", ("mouse", "gaming mouse", "wireless mouse"), "computing", 38,
        (
            number("max dpi", "DPI", 0.4, 800, 1200, 1600, 3200, 6400, 12000, 16000, 26000),
            _LINK,
            choice("tracking method", Optical=1.0, Laser=1.1, Trackball=1.3),
            number("buttons", "", 0.25, 3, 5, 6, 7, 8, 11, 12),
            choice("hand orientation", Right=1.02, Left=1.1, Both=0.95),
        ),
        extras={"with mouse pad": 1.15},
    ),
    Category(
        "webcam", ("webcam", "HD webcam", "streaming camera"), "computing", 60,
        (
            choice("resolutions", **{"720p": 0.5, "1080p": 0.95, "1440p": 1.4, "2160p": 2.1}),
            number("fov", "degrees", 0.2, 60, 68, 78, 84, 90, 103),
            choice("focus type", Fixed=0.85, Auto=1.2),
            number("frame rate", "fps", 0.3, 15, 24, 30, 60),
            choice("microphone", yes=1.05, no=0.9),
        ),
    ),
    Category(
        "external-hard-drive", ("portable drive", "external hard drive", "desktop backup drive"), "computing", 105,
        (
            number("capacity", "GB", 0.55, 500, 1000, 2000, 4000, 5000, 8000, 12000, 18000),
            choice("type", Portable_HDD=0.85, Desktop_HDD=1.0, Portable_SSD=1.8),
            choice("interface", **{
                "USB_2.0": 0.7, "USB_Type-A_3.2_Gen_1": 0.95, "USB_Type-C_3.2_Gen_2": 1.15, "USB_Type-C_4.0": 1.9,
            }),
        ),
        brand_exponent=0.6, interaction=0.3, extras={"with carrying case": 1.07},
    ),
    Category(
        "network-card", ("network adapter", "Wi-Fi card", "Ethernet card"), "computing", 42,
        (
            choice("protocol", **{
                "Gigabit_Ethernet": 0.7, "10_Gigabit_Ethernet": 3.0, "Wi-Fi_4": 0.5, "Wi-Fi_5": 0.85,
                "Wi-Fi_6": 1.15, "Wi-Fi_6E": 1.35,
            }),
            choice("interface", PCI=0.75, PCIe_x1=1.0, PCIe_x4=1.3, PCIe_x8=1.9, USB=0.8),
            number("ports", "", 0.4, 1, 2, 4),
            number("antennas", "", 0.1, 1, 2, 3, 4),
        ),
        colored=False,
    ),
    Category(
        "ups", ("UPS", "battery backup", "uninterruptible power supply"), "computing", 170,
        (
            number("capacity w", "W", 0.9, 180, 255, 330, 450, 600, 900, 1000, 1350, 1980),
            number("capacity va", "VA", 0.1, 350, 550, 650, 850, 1500, 2200, 3000),
            number("outlets", "", 0.1, 4, 6, 8, 10, 12),
            choice("output", simulated_sine=0.85, pure_sine=1.3),
        ),
        colored=False,
    ),
    Category(
        "printer", ("printer", "all-in-one printer"), "computing", 150,
        (
            choice("type", inkjet=0.65, laser=1.25, photo=1.1, label=0.8),
            number("speed", "ppm", 0.6, 8, 12, 15, 20, 28, 36, 42),
            choice("functions", print_only=0.7, print_and_scan=1.0, print_scan_copy_fax=1.3),
            choice("wifi", yes=1.1, no=0.85),
        ),
        brand_exponent=0.7,
    ),
    Category(
        "laptop", ("laptop", "notebook", "ultrabook"), "computing", 480,
        (
            number("memory", "GB", 0.5, 4, 8, 12, 16, 32, 64),
            number("storage", "GB", 0.25, 128, 256, 512, 1000, 2000),
            number("screen size", "inch", 0.3, 11.6, 13.3, 14, 15.6, 16, 17.3),
            choice("processor", dual_core=0.55, quad_core=0.85, six_core=1.15, eight_core=1.5),
            choice("graphics", integrated=0.85, dedicated=1.5),
            _YEARS,
        ),
        brand_exponent=0.8, interaction=0.4, extras={"with charger and sleeve": 1.05},
    ),
)
