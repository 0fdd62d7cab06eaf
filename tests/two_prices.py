"""Items so easy that a few hundred rows teach them: one word decides between $7 and $640."""

from fastprice import Item

CHEAP, DEAR = "A plain pencil, HB", "Professional racing bicycle, carbon frame, electronic gears"


def two_price_items(count: int) -> list[Item]:
    return [
        Item(f"{CHEAP if n % 2 else DEAR}, lot {n}", 7.0 if n % 2 else 640.0, group=str(n), row=n) for n in range(count)
    ]
