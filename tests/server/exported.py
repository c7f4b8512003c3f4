"""The names that a scrape of the running application has."""

from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import serving

PARTS = ("_bucket", "_sum", "_count")
"""What a histogram is queried by."""


def exported_families() -> dict[str, str]:
    """Every metric of /metrics and its type; counters by the name that is queried."""
    with serving() as live:
        text = live.client.get("/metrics").text
    found = {family.name: family.type for family in text_string_to_metric_families(text)}
    return {f"{name}_total" if kind == "counter" else name: kind for name, kind in found.items()}


def exported_names() -> set[str]:
    """Every name that a query may ask for."""
    names = set()
    for name, kind in exported_families().items():
        names |= {name + part for part in PARTS} if kind == "histogram" else {name}
    return names
