"""What a person sees of a page in a browser."""

import re


def contrast(page, selector):
    """Return the WCAG 2 contrast of an element's text with its background, and whether it is lighter."""
    colors = page.evaluate(
        """selector => {
          let element = document.querySelector(selector), behind = "rgba(0, 0, 0, 0)";
          const front = getComputedStyle(element).color;
          for (; element && behind === "rgba(0, 0, 0, 0)"; element = element.parentElement)
            behind = getComputedStyle(element).backgroundColor;
          return [front, behind];
        }""",
        selector,
    )
    bright = []
    for color in colors:
        assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", color), color
        channels = [int(c) / 255 for c in re.findall(r"\d+", color)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        bright.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(bright) + 0.05) / (min(bright) + 0.05), max(bright) == bright[0]
