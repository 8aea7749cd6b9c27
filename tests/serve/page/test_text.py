"""Words on the chat page: what a model writes stays text, Markdown is drawn as it grows, events survive any cut."""

import json

from tests.serve.page.scripted import STATIC, Say, Think

HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload=window.hit=1><iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "[press](javascript:window.hit=1) <javascript:window.hit=1> ![x](data:text/html,<script>window.hit=1</script>)",
    '```"><script>window.hit=1</script>\n</code></pre><script>window.hit=1</script>\n```',
    "| <b onmouseover=hit=1>a</b> | b |\n|---|---|\n| <style>*{display:none}</style> | `<script>` |",
    "<think></think> &lt;script&gt; </textarea><form action=//example.org>",
]


def test_what_a_model_writes_stays_text(page, script):
    text = "\n\n".join(HOSTILE)
    script.answers = [[Think(text), Say(text)]]
    page.ask(text)
    page.click(".thought summary")
    page.reload()
    page.click(".thought summary")
    found = (
        "return [...document.querySelectorAll('#turns :is(script, img, iframe, style, form, svg, b, [href])')].length"
    )
    assert page.run(found) == 0
    assert page.run("return window.hit ?? 0") == 0 and "press <javascript:" in page.text(".words")
    assert page.text(".asked").replace(" ", "") == text.replace(" ", "")
    for part in ("<script>window.hit = 1</script>", "onerror='window.hit = 1'", "&lt;script&gt;", "srcdoc="):
        assert part in page.text(".words") and part in page.text(".thought-text")
    script.refusal = (400, HOSTILE[1], {})
    page.ask("more")
    assert page.text(".problem") == HOSTILE[1] and page.complaints() == []
    # were markup to be assigned somewhere after all, the page's policy would stop it
    assigned = "try { document.body.innerHTML = '<p>'; return '' } catch (error) { return error.name }"
    assert page.run(assigned) == "TypeError"


def test_every_file_is_named_and_nothing_is_inline_or_fetched_from_elsewhere():
    markup = (STATIC / "index.html").read_text()
    assert "style=" not in markup and " on" not in {part[:3] for part in markup.split('"')} and "<style" not in markup
    assert markup.count("<script") == markup.count("<script src=") + markup.count('<script type="module" src=')
    for name in [part.split('"')[0] for part in markup.split('"static/')[1:]]:
        assert (STATIC / name).is_file(), name
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "//cdn", "@import"):
            assert word not in text, file.name
        assert "https://" not in text or file.name == "markdown.js", f"{file.name} names another place"


MARKDOWN = {
    "a *b* **c** ~~d~~ `e*f*g`": "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e*f*g</code></p>",
    "***a*** and ** b ** and *c": "<p><strong><em>a</em></strong> and ** b ** and *c</p>",
    "snake_case_name \\*so\\* **a `b": "<p>snake_case_name *so* **a `b</p>",
    "**a *b* c** _d_": "<p><strong>a <em>b</em> c</strong> <em>d</em></p>",
    "``a ` b`` and `` ` ``": "<p><code>a ` b</code> and <code>`</code></p>",
    "# One #\ntwo\n## Three": "<h3>One</h3><p>two</p><h4>Three</h4>",
    "- a\n- b\n  - c\n\n  d\n- e": "<ul><li>a</li><li>b<ul><li>c</li></ul><p>d</p></li><li>e</li></ul>",
    "3. a\n4. b\n\nc": '<ol start="3"><li>a</li><li>b</li></ol><p>c</p>',
    "- a\n1. b": "<ul><li>a</li></ul><ol><li>b</li></ol>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "a\n***\nb": "<p>a</p><hr><p>b</p>",
    "line one\n    line two": "<p>line one\n    line two</p>",
    "a | b\n--|:-:\n1 | \\|": '<table><thead><tr><th class="left">a</th><th class="center">b</th></tr></thead>'
    '<tbody><tr><td class="left">1</td><td class="center">|</td></tr></tbody></table>',
    "see https://x.y/a_b_c.": '<p>see <a href="https://x.y/a_b_c">https://x.y/a_b_c</a>.</p>',
    "[a **b**](https://x.y 'w') [c](x.y)": '<p><a href="https://x.y">a <strong>b</strong></a> <span>c</span></p>',
    "```py\ndef f(): # no\n```": '<code><span class="keyword">def</span> f(): <span class="comment"># no</span></code>',
    "~~~\n```\nopen": "<code>```\nopen</code>",
}


def test_markdown_is_understood(page):
    drawn = page.module(
        "markdown",
        """return a[0].map((text) => {
            const place = document.createElement("div");
            m.show(place, text);
            for (const link of place.querySelectorAll("a"))
                for (const name of ["target", "rel"]) link.removeAttribute(name);
            return (place.querySelector("pre code, table") ?? { outerHTML: place.innerHTML }).outerHTML;
        });""",
        list(MARKDOWN),
    )
    assert dict(zip(MARKDOWN, drawn, strict=True)) == MARKDOWN


def test_a_text_that_grew_looks_like_one_that_came_whole_and_none_takes_long(page):
    """Drawn again from the first block that changed, at every length; and what would take a careless parser minutes."""
    texts = ["\n".join(MARKDOWN), "- a\n\n  b\n\nc\n\n\n```x\ny\n", *HOSTILE]
    signs = [*"*_`[<|~\\ #", "> ", "- ", "1. ", "**a ", "[a](", "https://", "`a ", "*a*"]
    found = page.module(
        "markdown",
        """const whole = (text) => {
            const place = document.createElement("div");
            m.show(place, text);
            return place.innerHTML;
        };
        const wrong = a[0].filter((text) => {
            const place = document.createElement("div");
            for (let length = 0; length <= text.length; length += 1) {
                m.show(place, text.slice(0, length));
                if (place.innerHTML !== whole(text.slice(0, length))) return true;
            }
            return false;
        });
        for (const sign of a[1]) whole(sign.repeat(20000)), whole((sign + "\\n").repeat(1000));
        return wrong;""",
        texts,
        signs,
    )
    assert found == []  # and within the driver's half minute


def test_events_are_the_same_however_the_network_cuts_them(page):
    stream = 'data: {"a": "é🙂"}\r\n\r\n: waiting\n\ndata:one\rdata: two\r\revent: x\ndata: [DONE]\n\ndata: never ended'
    found = page.module(
        "wire",
        """const bytes = new TextEncoder().encode(a[0]);
        const read = async (...cuts) => {
            const parts = [0, ...cuts, bytes.length].map((at, i, all) => bytes.slice(all[i - 1] ?? 0, at));
            const found = [];
            const pull = (one) => (parts.length ? one.enqueue(parts.shift()) : one.close());
            for await (const data of m.events(new ReadableStream({ pull }))) found.push(data);
            return JSON.stringify(found);
        };
        return (async () => {
            const all = new Set();
            for (let cut = 0; cut <= bytes.length; cut += 1) all.add(await read(cut)).add(await read(cut, cut + 1));
            return [...all];
        })();""",
        stream,
    )
    assert [json.loads(one) for one in found] == [['{"a": "é🙂"}', "one\ntwo", "[DONE]"]]
