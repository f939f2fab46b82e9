"""Pages as tests read them: elements, the text of each section, the policy, the figures."""

import json
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}
ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """Elements with attributes, text per section, and whether every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.section, self.text, self.scripts = [], [], "head", {}, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["aria-labelledby"]
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.text[self.section] += " "

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        elif not self.open or self.open[-1] not in ("style", "text"):
            self.text[self.section] = self.text.get(self.section, "") + data

    def count(self, tag, **attributes):
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(name == tag and wanted.items() <= found.items() for name, found in self.elements)

    @property
    def figures(self):
        return next((json.loads(text) for found, text in self.scripts if found.get("id") == "figures"), {})

    @property
    def policy(self):
        content = next(found["content"] for tag, found in self.elements if tag == "meta" and "http-equiv" in found)
        return {name: values for name, *values in (part.split() for part in content.split(";"))}

    def words(self, section):
        return " ".join(self.text[section].split())


def read(path):
    return path.read_text(encoding="utf-8")


def assert_safe(page):
    """No element, attribute or address that a name of the files could have brought in."""
    assert [found.get("type") for found, _ in page.scripts] in (
        ["application/json", "text/plain", None],
        [None],
    )
    assert not [found for _, found in page.elements if any(name.startswith("on") for name in found)]
    for tag, found in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        if tag == "img":
            assert found["src"].startswith("data:image/png;base64,")
        if tag == "a":
            assert re.match(r"#|https://", found["href"])


def assert_self_contained(html):
    """Nothing on the page makes a request: links are followed by a click alone."""
    page = Page(html)
    for tag, found in page.elements:
        assert "srcset" not in found
        for name in ("src", "href", "xlink:href", "action"):
            if tag != "a":
                assert re.match(r"#|data:image/png;base64,", found.get(name) or "#")
    style = "".join(re.findall(r"<style>.*?</style>", html, flags=re.DOTALL))
    assert "@import" not in style
    assert "url(" not in style
    assert page.policy["default-src"] == ["'none'"]
    assert all(re.fullmatch(r"'sha256-[\w+/=]{44}'", value) for value in page.policy["script-src"])
    assert page.policy["img-src"] == ["data:"]
