"""A page in a tab of headless Chromium, as the tests of the pages use it."""

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Tab:
    """A page in a tab of its own, with everything that the console said and the network was asked for."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**({"viewport": WIDE} | options))
        self.context.set_default_timeout(60_000)  # milliseconds, on a machine that does other work too
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def draw_all(self):
        for plot in self.page.query_selector_all(".plot"):
            plot.scroll_into_view_if_needed()
            self.page.wait_for_function("plot => plot.querySelector('.live .mlayer *')", arg=plot)

    def column(self, table, index):
        script = "(rows, i) => rows.filter(r => !r.hidden).map(r => r.cells[i].dataset.value ?? r.cells[i].innerText)"
        return self.page.eval_on_selector_all(f"#{table} tbody tr", script, index)
