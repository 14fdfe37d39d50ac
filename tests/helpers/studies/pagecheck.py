"""What a page asks for and says."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """What a page asks for, and whether its elements are closed."""

    def __init__(self, page):
        super().__init__()
        self.links, self.open, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.links += [v for name, v in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "link", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.text += " " if tag in ("p", "td", "th", "span") else ""

    def handle_data(self, data):
        self.text += data
