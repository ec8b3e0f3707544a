"""Texts that somebody puts into a data set so that what shows them takes them for something else."""

from __future__ import annotations

HTML = (
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    '\'><iframe srcdoc="<script>alert(1)</script>">',
    "<!-- --><b>bold</b>",
    "<a href=javascript:alert(1)>here</a>",
    "]]> &lt;b&gt; &#60;i&#62; {{ 7 * 7 }} {% raw %} ${7*7}",
)
MARKDOWN = (
    "# heading",
    "a\n# heading\n\n## another",
    "a\n===\nb\n---",
    "- item\n1. first\n+ more",
    "> quoted\n>> deeper",
    "| a | b |\n|---|---|\n| c | d |",
    "[here](javascript:alert(1)) ![](http://example.invalid/x.png) [a]: http://example.invalid",
    "<http://example.invalid>",
    "```\n<script>alert(1)</script>\n```",
    "~~~\n<b>bold</b>",
    "    indented\n\n\tcode",
    "**bold** *italics* __bold__ _italics_ ~~gone~~ `code` ``` $x^2$ \\[x\\]",
    "a\\",
    "`",
)
TERMINAL = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J\x1b[H",
    "\x9b31m \x90q\x9c",
    "hidden\rshown",
    "abc\x08\x08\x08xyz\x7f\x00",
    "\x1b]8;;http://example.invalid\x1b\\\\here\x1b]8;;\x1b\\\\",
)
YAML = (
    "!!python/object/apply:os.system ['true']",
    "mit\ntags: [taken]",
    "x\n---\nlicense: other",
    "&a [*a, *a]",
    "key: {a: b}",
    "'",
    '"',
    "%TAG ! x\n...",
    "yes",
)
DIRECTIONS = ("\u202eback", "\u2066x\u2069 \u200f \u200b \ufeff", "a\u2028b\u2029c\x85d\x0be\x0cf")
FORMULAS = (
    "=1+1",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    '=HYPERLINK("http://example.invalid";"here")',
)
ODD = ("", " ", "\ud800 half", "\u4e2d\u6587" * 60, "x" * 3000, "a" + "\u0301" * 50)

HOSTILE = (*HTML, *MARKDOWN, *TERMINAL, *YAML, *DIRECTIONS, *FORMULAS, *ODD)
