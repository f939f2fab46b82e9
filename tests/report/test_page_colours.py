import re
from importlib.resources import files

import pytest

TEXT, GRAPHIC = 4.5, 3.0  # WCAG 2 AA
NEEDED = {
    **dict.fromkeys(("ink", "soft", "c1", "good", "bad"), TEXT),  # c1 is the colour of links too
    **dict.fromkeys(("vision", "language", "bridge", "other", "focus", *(f"c{i}" for i in range(2, 9))), GRAPHIC),
}


def themes():
    style = files("ecoflap.report").joinpath("templates", "page.css").read_text("utf-8")
    found = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    return [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme)) for theme in found]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def mixed(front, back, opacity):
    channels = [
        round(opacity * int(front[i : i + 2], 16) + (1 - opacity) * int(back[i : i + 2], 16)) for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def test_contrast_is_known_to_the_formula():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)  # the lightest grey that passes on white


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark", "paper"])
def test_contrast_is_aa(theme):
    for ground in ("paper", "card"):
        for name, least in NEEDED.items():
            assert contrast(theme[ground], theme[name]) >= least, (ground, name)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark", "paper"])
@pytest.mark.parametrize("colour", ["heat", "cold"])
def test_numbers_in_cells_are_readable_on_every_shade(theme, colour):
    for step in range(21):
        assert contrast(theme["ink"], mixed(theme[colour], theme["card"], step / 20)) >= TEXT, step


def test_every_theme_has_every_colour():
    light, dark, paper = themes()
    assert set(light) == set(dark) == set(paper) >= {*NEEDED, "heat", "cold", "line"}
