"""Numbers and times as people write them."""

import pytest
from stageline.runtime import words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (words.count(22_565_888), "22.6 M"),
        (words.size(90_300_000), "90.3 MB"),
        (words.size(512), "512 B"),
        (words.rate(1234.5, "tokens"), "1,234 tokens/s"),
        (words.seconds(0.0123), "12.3 ms"),
        (words.seconds(2.5), "2.50 s"),
        (words.seconds(4e-5), "40.0 µs"),
        (words.seconds(600), "10.0 min"),
        (words.share(0.1234), "12.3 %"),
        (words.change(-0.05), "-5.0 %"),
        (words.figure(0.000123), "0.000123"),
        (words.ago(0.0, 7200.0), "2 hours ago"),
        (words.counted(1, "stage"), "1 stage"),
    ],
)
def test_numbers_read_as_people_write_them(text: str, wanted: str) -> None:
    assert text == wanted


def test_a_line_for_a_terminal_does_not_steer_it() -> None:
    said = words.line("a\nb \x1b[2Jc\x07\x9b2J\u202e \u00e9\U0001f600")
    assert said == "a b \\x1b[2Jc\\x07\\x9b2J\\u202e \u00e9\U0001f600"
